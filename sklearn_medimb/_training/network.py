"""Networks around a backbone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sklearn_medimb._data.batches import image_format
from sklearn_medimb._machine import distributed
from sklearn_medimb._machine.randomness import Draws, current_draws, drawing_from
from sklearn_medimb.backbones import as_features, pyramid_of, stages_of

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Trunk(nn.Module):
    """A backbone at its own precision: what leaves it is float32 (or float64) again.

    Only the backbone, where the time goes, runs in bfloat16; heads, losses and weights do not.
    In training it may see a batch in parts: in shares of several processes, or, where memory ran
    out, a few images at a time, which backward encodes once more. Its output, and so the loss, is
    that of the whole batch either way; batch normalisation takes the statistics of each part.
    `divisible` is False where the images of a batch mix inside the backbone. Where `given_encoded`
    it is given what it made itself, earlier, and passes that on. `at_all_depths` makes it features
    of several depths.

    Parameters
    ----------
    backbone : nn.Module
        The network.
    input_shape : tuple of int
        ``(C, *spatial)`` or ``(d,)``. Image networks hold their weights channels-last, and want
        their images so, where `channels_last` says it.
    autocast : torch.dtype or None
        Reduced precision of the forward and backward pass.
    device : torch.device or None
        Where it will run; None says nothing.
    """

    def __init__(
        self,
        backbone: nn.Module,
        input_shape: tuple[int, ...],
        *,
        autocast: torch.dtype | None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.input_shape = input_shape
        self.autocast = autocast
        self.frozen: list[nn.Module] = []
        self.held: list[nn.Parameter] = []
        self.keeps_statistics = False
        self.at_all_depths = False
        self.given_encoded = False
        self.keep_frozen()
        self.micro_batch: int | None = None
        self.divisible = True
        self.channels_last = len(input_shape) > 2 and may_be_channels_last(backbone)
        if device is not None and device.type == "cuda" and _filters_channels(backbone):
            self.channels_last = False
        for parameter in backbone.parameters():
            memory_format = image_format(parameter.ndim, self.channels_last)
            parameter.data = parameter.data.contiguous(memory_format=memory_format)

    def keep_frozen(self) -> None:
        """Note which layers are frozen now: in training, too, their running statistics stay."""
        layers = _frozen_layers(self.backbone)
        if self.keeps_statistics:
            norms = (m for m in self.backbone.modules() if isinstance(m, BATCH_NORMS))
            layers = chain(layers, norms)
        self.frozen = [layer for layer in layers if _has_statistics(layer)]

    def hold(self, n_trained: int | None) -> None:
        """Keep all but the last stages as they are; None trains every one that may be."""
        for weight in self.held:
            weight.requires_grad_(True)
        stages = stages_of(self.backbone)
        first = [] if n_trained is None else stages[: max(len(stages) - n_trained, 0)]
        self.held = [w for part in first for w in part.parameters() if w.requires_grad]
        for weight in self.held:
            weight.requires_grad_(False)
        self.keep_frozen()

    def shares(self, share: float, layer_decay: float) -> dict[str, float]:
        """Share of the learning rate of its weights, by name or, where they are alike, pattern."""
        if layer_decay == 1:
            return {"*": share}
        found: dict[str, float] = {}
        names = {weight: name for name, weight in self.named_parameters()}
        for k, stage in enumerate(reversed(stages_of(self.backbone))):
            found |= {names[weight]: share * layer_decay**k for weight in stage.parameters()}
        return found

    @contextmanager
    def wholly_held(self, held: bool = True) -> Iterator[None]:
        """Train none of it for a while, if so asked."""
        weights = [w for w in self.backbone.parameters() if held and w.requires_grad]
        for weight in weights:
            weight.requires_grad_(False)
        try:
            yield
        finally:
            for weight in weights:
                weight.requires_grad_(True)

    @contextmanager
    def passing(self, encoded: bool) -> Iterator[None]:
        """Be given what it has encoded earlier, or images, for a while."""
        before, self.given_encoded = self.given_encoded, encoded
        try:
            yield
        finally:
            self.given_encoded = before

    @property
    def learns(self) -> bool:
        """Whether any of its weights is trained."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def statistics_left(self, n_steps: int) -> float:
        """Largest share of a running statistic that is, after some steps, still as it came.

        Layers that came without statistics of images, as they are made, do not count.
        """
        frozen = {id(layer) for layer in self.frozen}
        left = [
            (1 - layer.momentum) ** n_steps
            for layer in self.backbone.modules()
            if isinstance(layer, BATCH_NORMS)
            and layer.momentum is not None  # else it averages all steps
            and layer.running_mean is not None
            and layer.running_mean.any()
            and id(layer) not in frozen
        ]
        return max(left, default=0.0)

    def train(self, mode: bool = True) -> Trunk:
        """Switch the mode of all layers but those that are frozen with statistics.

        While it is given what it has encoded no layer runs, and all stay in evaluation mode: steps
        on that are so short that walking through the layers would be most of them.
        """
        if self.given_encoded:
            if not self.training:
                return self
            mode = False
        super().train(mode)
        for layer in self.frozen:
            layer.training = False
        return self

    def probe(self) -> torch.Tensor:
        """Output for one blank image: tells a method the shape of what it will get."""
        try:
            with torch.no_grad():
                return self._encode_blank()
        except Exception as error:
            raise ValueError(
                f"backbone={type(self.backbone).__name__} failed on one image of shape "
                f"{self.input_shape}: {error}"
            ) from error

    def _encode_blank(self, n: int = 1) -> torch.Tensor:
        training = self.training
        like = next(self.parameters(), torch.empty(0))
        blank = torch.zeros(n, *self.input_shape, dtype=like.dtype, device=like.device)
        try:
            with self.passing(encoded=False):
                return self.eval()(blank)
        finally:
            self.train(training)

    def activation_bytes(self) -> int:
        """Memory that one image takes until the backward pass."""
        return self._kept_bytes(2) - self._kept_bytes(1)  # without what is made of weights

    def _kept_bytes(self, n: int) -> int:
        """Memory that n images take until the backward pass."""
        kept: dict[int, torch.Tensor] = {}  # a tensor that two layers keep is there once

        def keep(saved: torch.Tensor) -> torch.Tensor:
            kept[saved.data_ptr()] = saved
            return saved

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            self._encode_blank(n)
        return sum(saved.nbytes for saved in kept.values())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Encode a batch of normalised images."""
        if self.given_encoded:
            return images
        if not (self.training and self.divisible):
            return self._encode(images)
        return distributed.share_out(self._encode_in_parts, images)

    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        run = partial(of_all_depths, self.backbone) if self.at_all_depths else self.backbone
        if self.autocast is None:
            return run(images)
        with torch.autocast(images.device.type, self.autocast):
            output = run(images)
        # What is no tensor is refused by who reads features of it.
        return output.to(images.dtype) if isinstance(output, torch.Tensor) else output

    def _encode_in_parts(self, images: torch.Tensor) -> torch.Tensor:
        """Keep the activations of one part at a time."""
        if self.micro_batch is None or len(images) <= self.micro_batch:
            return self._encode(images)
        parts = images.tensor_split(-(-len(images) // self.micro_batch))
        if not torch.is_grad_enabled():
            return torch.cat([self._encode(part) for part in parts])
        how: dict[str, Any] = {
            "use_reentrant": False,
            "preserve_rng_state": False,
            "context_fn": partial(_first_and_second_pass, self.backbone),
        }
        return torch.cat([checkpoint(self._encode, part, **how) for part in parts])


def trunks_of(*networks: nn.Module) -> list[Trunk]:
    """All trunks of networks: one may keep a second, and a loss a copy."""
    return [part for net in networks for part in net.modules() if isinstance(part, Trunk)]


@contextmanager
def passing(network: nn.Module, encoded: bool) -> Iterator[None]:
    """Give every trunk of a network what it has encoded earlier, or images, for a while."""
    with ExitStack() as held:
        for trunk in trunks_of(network):
            held.enter_context(trunk.passing(encoded))
        yield


def of_all_depths(backbone: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Features of a convolutional backbone at several depths, of any other one its features.

    Of each map that it gives before the resolution is halved, the last three, the mean over its
    places and, but for the last, their standard deviation.
    """
    *shallow, last = pyramid_of(backbone, images)
    places = [output.flatten(2) for output in shallow]
    spread = [part.std(dim=2, correction=0) for part in places]
    return torch.cat([*(part.mean(dim=2) for part in places), *spread, as_features(last)], dim=1)


def _features_of(trunk: Trunk, images: torch.Tensor) -> torch.Tensor:
    """Pooled features of images, (n, d)."""
    return as_features(trunk(images))


def _frozen_layers(module: nn.Module, parent: bool = False) -> Iterator[nn.Module]:
    """Layers whose own parameters are frozen, or that have none and whose parent is frozen."""
    every, own = list(module.parameters()), list(module.parameters(recurse=False))
    whole = not any(p.requires_grad for p in every) if every else parent
    if not any(p.requires_grad for p in own) if own else whole:
        yield module
    for child in module.children():
        yield from _frozen_layers(child, whole)


def _has_statistics(layer: nn.Module) -> bool:
    """Whether a layer holds numbers that a forward pass in training may change."""
    return any(buffer.is_floating_point() for buffer in layer.buffers(recurse=False))


def may_be_channels_last(backbone: nn.Module) -> bool:
    """Whether the layers of a network are safe with channels-last images and weights.

    On CPUs whose widest instructions are AVX2, oneDNN writes past the end of a buffer in the
    backward pass of a strided convolution with kernels of one pixel on fewer than 8 channels, if it
    is channels-last: the process dies, or worse. Weights that no convolution of torch's own holds
    may be used with any stride.
    """
    kinds = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    layers = [layer for layer in backbone.modules() if isinstance(layer, kinds)]
    held = {id(layer.weight) for layer in layers}
    strided = [layer.weight for layer in layers if max(layer.stride) > 1]
    strided += [w for w in backbone.parameters() if w.ndim in (4, 5) and id(w) not in held]
    return not any(w.shape[1] < 8 and math.prod(w.shape[2:]) == 1 for w in strided)


def _filters_channels(backbone: nn.Module) -> bool:
    """Whether convolutions of a network filter each channel by itself, as those of MobileNets do.

    Where their images are channels-last, cuDNN makes ready for each number of images anew, which
    takes seconds: more than a short training. Otherwise torch's own kernels, as fast, do it.
    """
    kinds = (nn.Conv2d, nn.Conv3d)
    layers = [layer for layer in backbone.modules() if isinstance(layer, kinds)]
    return any(1 < layer.groups == layer.in_channels for layer in layers)


def _first_and_second_pass(backbone: nn.Module) -> tuple[Any, Any]:
    """Contexts of a part's two forward passes.

    The second draws what the first did, and leaves running statistics alone.
    """
    draws = current_draws()
    return nullcontext(), _second_pass(backbone, None if draws is None else draws.copy())


@contextmanager
def _second_pass(backbone: nn.Module, draws: Draws | None) -> Iterator[None]:
    norms = [module for module in backbone.modules() if isinstance(module, BATCH_NORMS)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        with drawing_from(draws):
            yield
    finally:
        for norm, (momentum, n_batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, n_batches


class Output(NamedTuple):
    """Features (n, d) and logits (n, K) of a batch."""

    features: torch.Tensor
    logits: torch.Tensor


class Standardised(nn.Module):
    """Features less their mean, over their standard deviation; as they are until it knows these.

    Parameters
    ----------
    n_features : int
        Number of features.
    """

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("deviation", torch.ones(n_features))

    def settle(self, features: torch.Tensor) -> None:
        """Take mean and deviation from features (n, d); what does not vary keeps its scale."""
        spread, mean = torch.std_mean(features.double(), dim=0, correction=0)
        self.mean.copy_(mean)
        self.deviation.copy_(torch.where(spread > 1e-6 * mean.abs(), spread, 1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features (n, d), standardised."""
        return (features - self.mean) / self.deviation


class SoftmaxNetwork(nn.Module):
    """Backbone, pooled features, head.

    Parameters
    ----------
    trunk : Trunk
        The backbone.
    head : callable
        Number of features to a head.
    at_all_depths : bool, default=False
        Whether features come from three depths of the backbone, or from its end alone.
    standardised : bool, default=False
        Whether features will be standardised, once those of the training images are known.
    """

    def __init__(
        self,
        trunk: Trunk,
        head: Callable[[int], nn.Module],
        *,
        at_all_depths: bool = False,
        standardised: bool = False,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        trunk.at_all_depths = at_all_depths
        self.n_features = as_features(trunk.probe()).shape[1]
        self.scale = Standardised(self.n_features) if standardised else nn.Identity()
        self.head = head(self.n_features)
        if standardised and isinstance(self.head, nn.Linear):  # as a logistic regression begins
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    @property
    def encoded(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """From images to what it needs of the trunk: with this in their place it goes on.

        As a partial function of the trunk and of settings it says what the result depends on.
        """
        return partial(_features_of, self.trunk)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """What the head reads, (n, d)."""
        return self._features(self.trunk, images)

    def _features(self, trunk: Trunk, images: torch.Tensor) -> torch.Tensor:
        return self.scale(_features_of(trunk, images))

    def forward(self, images: torch.Tensor) -> Output:
        """Features and logits."""
        features = self._features(self.trunk, images)
        return Output(features, self.head(features))


class BesideStart(SoftmaxNetwork):
    """The same, which keeps the weights that its backbone begins with beside those that it learns.

    The head, which is trained with the backbone, reads features of the backbone alone; `features`
    are of both. What a tuned network tells apart and what it knew before err on different images.

    Parameters
    ----------
    trunk : Trunk
        The backbone, as it begins.
    head : callable
        Number of features to a head.
    **how
        As of :class:`SoftmaxNetwork`.
    """

    def __init__(self, trunk: Trunk, head: Callable[[int], nn.Module], **how: bool) -> None:
        super().__init__(trunk, head, **how)
        self.start = copy.deepcopy(trunk).requires_grad_(False)
        self.start.keep_frozen()
        self.n_features *= 2

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features that were learned, then those of the start, (n, 2 d)."""
        parts = self.trunk, self.start
        return torch.cat([self._features(part, images) for part in parts], dim=1)
