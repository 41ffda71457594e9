"""Making the network and the skorch net of an estimator."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator
from torch import nn

from sklearn_medimb._data.batches import Preprocessor
from sklearn_medimb._machine.randomness import seeded
from sklearn_medimb._machine.runtime import resolve_precision
from sklearn_medimb._training.callbacks import resolve_callbacks
from sklearn_medimb._training.net import Net
from sklearn_medimb._training.network import Trunk, trunks_of
from sklearn_medimb.backbones import Backbone, Start, make_backbone, recipe_of
from sklearn_medimb.base._shared import SharedParameters

# What the estimator decides about its skorch net; everything else may come in `net_params`.
_RESERVED = {
    "module", "criterion", "lr", "max_epochs", "callbacks", "train_split", "device", "compile",
    "dataset", "iterator_train", "iterator_valid", "warm_start", "verbose", "batch_size",
    "predict_nonlinearity", "optimizer__lr",
}  # fmt: skip

WEIGHT_DECAY = 1e-2  # unless told otherwise
# One kernel for all weights; and a GPU can replay a step of them.
_FUSED = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)


def described(module: nn.Module) -> Any:
    """What makes a network: layers with their settings, names and shapes of weights."""

    def settings(part: nn.Module) -> dict[str, str]:
        plain = (int, float, str, tuple, type(None))
        return {k: repr(v) for k, v in sorted(vars(part).items()) if isinstance(v, plain)}

    layers = [(name, type(part), settings(part)) for name, part in module.named_modules()]
    return layers, {name: tuple(value.shape) for name, value in module.state_dict().items()}


def _in_short(value: Any) -> str:
    return f"{type(value).__name__}(...)" if isinstance(value, nn.Module) else repr(value)


def _is_same(one: Any, other: Any) -> bool:
    """Whether a parameter has kept its value, as far as that is easily told."""
    if isinstance(one, Backbone):
        return type(one) is type(other) and repr(one.get_params()) == repr(other.get_params())
    plain = (int, float, str, tuple, type(None))
    return one is other or (isinstance(one, plain) and type(one) is type(other) and one == other)


def _brings_weights(backbone: Any) -> bool:
    """Whether it is a module, or a recipe with weights."""
    if isinstance(backbone, nn.Module):
        return True
    recipe = recipe_of(backbone)
    return isinstance(recipe, Backbone) and recipe.weights is not None


def whole_recipe(backbone: Any, net: Net) -> Any:
    """A backbone, or where others would be asked how to make it the recipe that says it all.

    The net is one that was made from it.
    """
    recipe = recipe_of(backbone)
    if not isinstance(recipe, Backbone):
        return backbone
    whole = recipe.described(net.module_.trunk.backbone)
    return backbone if whole is recipe else whole


class MakesNetworks(SharedParameters):
    """Part of :class:`BaseImageEstimator`: from its parameters to a net."""

    @property
    def _brings_weights(self) -> bool:
        """Whether the backbone is a module, or a recipe with weights."""
        return _brings_weights(self.backbone)

    @property
    def _recipe(self) -> Any:
        """Recipe of the backbone, if it has one; with a fitted estimator in its place, of that."""
        return recipe_of(self.backbone) if self._start is None else self._start._recipe

    @property
    def _known_start(self) -> Start | None:
        """What is known of the weights that the backbone brings from elsewhere."""
        recipe = self._recipe
        return recipe.start if isinstance(recipe, Backbone) else None

    @property
    def _has_known_start(self) -> bool:
        """Whether something is known of them; looks nothing up."""
        recipe = self._recipe
        return isinstance(recipe, Backbone) and recipe.has_start

    @property
    def _backbone_share(self) -> float:
        """Learning rate of the backbone as a share of `lr`."""
        return self._share_of_rate(self._has_known_start)

    def _share_of_rate(self, is_known: bool) -> float:
        """Of a backbone that begins with known weights of elsewhere, or of another."""
        if self.backbone_lr == "auto":
            return 0.3 if is_known else 1.0
        return self.backbone_lr

    @property
    def _holds_backbone(self) -> bool:
        """Whether weights of elsewhere, of which something is known, stay as they are."""
        frozen = self.fine_tune_ == "frozen" or self._backbone_share == 0
        return self._has_known_start and frozen

    @property
    def _start(self) -> Any:
        """Fitted estimator whose backbone, and normalisation, training begins with."""
        given = self.backbone
        if isinstance(given, FrozenEstimator):
            given = given.estimator
        if isinstance(given, SharedParameters):
            return given
        pretrain = getattr(self, "pretrain", None)
        fitted = isinstance(pretrain, SharedParameters) and pretrain._was_fitted
        return pretrain if fitted else None

    @property
    def _was_fitted(self) -> bool:
        """Whether it is fitted, or was, when a file was written that leaves out its weights."""
        return hasattr(self, "image_shape_")

    def _make_network(self, trunk: Callable[..., Trunk]) -> nn.Module:
        """Network of the method around a backbone: ``trunk()`` makes one for one image."""
        raise NotImplementedError

    def _make_net(
        self,
        device: torch.device,
        previous: Net | None = None,
        *,
        pretrained: bool = True,
        module: Any = None,
    ) -> Net:
        """Make the skorch net: network (unless it is given), optimiser, callbacks.

        A previous net passes on a copy of its network and its history, so that it stays as it was
        should training fail.
        """
        dtype, autocast = resolve_precision(self.precision, device, len(self.image_shape_))
        pretrained = pretrained and module is None
        callbacks = resolve_callbacks(self.callbacks, self) if pretrained else []
        if previous is not None:
            self._refuse_another_network(previous)
            module = copy.deepcopy(previous.module_).to(device, dtype)
        elif module is None:
            module = self._network(device, dtype, pretrained)
        for trunk in trunks_of(module):
            trunk.autocast = autocast
        net = Net(
            module=module,
            criterion=nn.Identity(),  # the method's loss follows with the training set
            lr=self.lr,
            callbacks=callbacks or None,
            train_split=None,
            device=str(device),
            compile=self.compile,
            verbose=int(self.verbose),
            **self._net_params(),
        )
        net.dtype = dtype
        net.made_from = self._present_parameters() if previous is None else previous.made_from
        net.initialize()
        if previous is not None:
            net.history_ = copy.deepcopy(previous.history_)
            if hasattr(previous, "criterion_"):
                net.last_criterion = previous.criterion_.state_dict()
        return net

    def _present_parameters(self) -> dict[str, Any]:
        """Parameters as they are now; of a recipe a copy, since `set_params` reaches into it."""
        params = self.get_params(deep=False)
        return {k: clone(v) if isinstance(v, Backbone) else v for k, v in params.items()}

    def _described_with(self, params: dict[str, Any]) -> Any:
        """What the network would be with these parameters; it is made as shapes alone."""
        present = {name: getattr(self, name) for name in params}
        self.__dict__.update(params)
        try:
            try:
                with torch.device("meta") as meta:
                    return described(self._network(meta, torch.float32, pretrained=False))
            except Exception:  # some that others wrote need numbers to be made from
                cpu = torch.device("cpu")
                with seeded(0, cpu):
                    return described(self._network(cpu, torch.float32, pretrained=False))
        finally:
            self.__dict__.update(present)

    def _parameters_of(self, net: Net) -> dict[str, Any]:
        """Parameters that a net was made from, where the present ones would make another."""
        now = self.get_params(deep=False)
        then = {k: v for k, v in net.made_from.items() if k in now and not _is_same(v, now[k])}
        if not then:
            return {}
        kept = {} if "backbone" in then else {"backbone": whole_recipe(self.backbone, net)}
        if not kept:
            then["backbone"] = whole_recipe(then["backbone"], net)
        own = self._described_with(then | kept)

        def matters(names: set[str]) -> bool:
            given = {k: v for k, v in then.items() if k in names} | kept
            try:
                return self._described_with(given) != own
            except Exception:  # there is no such network
                return True

        if not matters(set()):
            return {}
        return {k: v for k, v in then.items() if matters(then.keys() - {k})} or then

    def _refuse_another_network(self, previous: Net) -> None:
        """Refuse further training with parameters that describe another network, or its weights."""
        for name in ("backbone", "pretrain"):
            now, then = getattr(self, name, None), previous.made_from.get(name)
            brings = name == "backbone" and _brings_weights(now)
            brings |= isinstance(now, SharedParameters) and now._was_fitted
            if brings and not _is_same(then, now):
                given = repr(now) if isinstance(now, str) else type(now).__name__
                raise ValueError(
                    f"{name}={given} brings weights of its own, but further training "
                    f"goes on from the trained ones: set {name} back, or fit anew "
                    "(warm_start=False, or a clone)."
                )
        if odd := self._parameters_of(previous):
            given, then = (
                ", ".join(f"{name}={_in_short(params[name])}" for name in odd)
                for params in (self.get_params(deep=False), odd)
            )
            raise ValueError(
                f"{given} would be another network than the trained one, with which further "
                f"training begins ({then}): set "
                f"{' and '.join(odd)} back, or fit anew (warm_start=False, or a clone)."
            )

    def _net_params(self) -> dict[str, Any]:
        """Further parameters of the skorch net: the caller's, and the optimiser."""
        params = {"optimizer": torch.optim.AdamW, **(self.net_params or {})}
        if reserved := sorted(k for k in params if {k, k.split("__")[0]} & _RESERVED):
            raise ValueError(
                f"net_params must not hold {reserved}: the estimator sets them itself."
            )
        others = {f"optimizer__{name}" for name in ("foreach", "differentiable")}
        if params["optimizer"] in _FUSED and not others & params.keys():
            params.setdefault("optimizer__fused", True)
        decay = WEIGHT_DECAY if self.weight_decay == "auto" else self.weight_decay
        params.setdefault("optimizer__weight_decay", decay)
        rates = self._backbone_share, self.layer_decay
        if rates != (1, 1) and "optimizer__param_groups" in params:
            raise ValueError(
                f"backbone_lr={self.backbone_lr}, layer_decay={self.layer_decay} and the "
                "optimizer__param_groups of net_params set the same learning rates: leave one of "
                "them."
            )
        return params

    def _network(self, device: torch.device, dtype: torch.dtype, pretrained: bool) -> nn.Module:
        """Make the method's module around the chosen backbone, on the device."""
        _, autocast = resolve_precision(self.precision, device, len(self.image_shape_))
        if on_meta := device.type == "meta":  # shapes alone
            autocast = None
        start, backbone = self._start, self.backbone
        if start is not None and pretrained:
            backbone = start.backbone_
        elif start is not None:  # its weights are not wanted, and a file has none
            module: Any = start._network(device, dtype, pretrained)
            backbone = module.trunk.backbone
        if hasattr(backbone, "trunk"):
            raise ValueError(
                f"backbone={type(backbone).__name__} is a whole network of this package: pass the "
                "fitted estimator."
            )
        if not pretrained and _brings_weights(backbone) and not isinstance(backbone, nn.Module):
            backbone = clone(recipe_of(backbone)).set_params(weights=None)

        def trunk(input_shape: tuple[int, ...] = self.image_shape_) -> Trunk:
            module = make_backbone(backbone, input_shape, self.n_samples_fit_)
            module = module.to("meta" if on_meta else "cpu").float()
            return Trunk(module, input_shape, autocast=autocast, device=device)

        return self._make_network(trunk).to(device, dtype)

    def _preprocessor(self) -> Preprocessor:
        """Normalisation on the device of the network."""
        return Preprocessor(
            self.pixel_mean_,
            self.pixel_std_,
            dtype=self.net_.dtype,
            device=torch.device(self.net_.device),
            channels_last=self.net_.module_.trunk.channels_last,
        )
