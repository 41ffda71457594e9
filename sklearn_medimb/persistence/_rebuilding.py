"""Networks from a description and their weights: nothing is fetched, and nothing larger is made.

Whoever writes a file writes the description. So the network is first made on torch's device "meta",
where layers have shapes and no memory, and counted as it grows: a network cannot need more layers
than there are weights for. Only where every shape fits do the weights take their places.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from sklearn_medimb._machine.randomness import seeded
from sklearn_medimb._machine.runtime import resolve_device, resolve_precision
from sklearn_medimb.persistence._format import is_outside

# What is made on the way and thrown away again, such as the last stages of a shortened ResNet.
_SPARE_PARTS, _SPARE_BYTES = 2000, 2**26
_PARTS_PER_WEIGHT = 6  # layers without weights, and those that hold others
# A blank image is tried where it takes less: numbers in the largest activation, operations.
_MAX_ACTIVATION, _MAX_OPERATIONS = 2**23, 2e10
_MAX_IMAGE = 2**22  # numbers in an image, for networks that cannot be made on "meta"


def rebuild(estimator: Any, weights: dict[str, np.ndarray]) -> bool:
    """Make the network of an estimator from its parameters, with these weights.

    Parameters
    ----------
    estimator : estimator
        With everything it learned but ``net_``, which it gets.
    weights : dict of str to ndarray
        By the names of the network; emptied on the way, lest everything is in memory twice.

    Returns
    -------
    is_light : bool
        Whether an answer for one image takes little memory and time.

    Raises
    ------
    ValueError
        If the parameters describe another network than that of the weights, or a larger one.
    """
    device = resolve_device(estimator.device, fall_back=True)
    dtype, _ = resolve_precision(estimator.precision, device, len(estimator.image_shape_))
    meta, budget = torch.device("meta"), _Budget(weights)
    cost = _Cost()
    try:
        with budget.watching(), meta:
            module: Any = estimator._network(meta, dtype, pretrained=False)
            with cost:
                module.trunk.probe()
    except Exception:
        # Some of the networks that others wrote need numbers to be made from.
        if budget.exceeded or not _is_foreign(estimator):
            raise
        module = None
    if module is None or _keeps_more_than_weights(module):
        if math.prod(estimator.image_shape_) > _MAX_IMAGE:
            raise ValueError(f"its images of shape {estimator.image_shape_} are too large to try.")
        with budget.watching(), seeded(0, device):
            module = estimator._network(device, dtype, pretrained=False)
    own = module.state_dict()
    if odd := sorted(own.keys() ^ weights.keys()):
        raise ValueError(f"its weights are those of another network: {odd[:5]} differ.")
    for name, like in own.items():
        array = weights.pop(name)
        if tuple(like.shape) != array.shape or str(like.dtype) != f"torch.{array.dtype}":
            raise ValueError(
                f"the weights {name} have shape {array.shape} and dtype {array.dtype}, not "
                f"{tuple(like.shape)} and {str(like.dtype)[6:]}."
            )
        own[name] = torch.empty_like(like, device=device).copy_(torch.from_numpy(array))
    module.load_state_dict(own, assign=True)
    estimator.net_ = estimator._make_net(device, module=module)
    estimator.net_.module_.eval()
    return cost.largest <= _MAX_ACTIVATION and cost.operations <= _MAX_OPERATIONS


class _Budget:
    """How many layers, weights and bytes may be made for some weights.

    The hooks are torch's own, global ones: they count what this thread makes.
    """

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        self.n_parts = _SPARE_PARTS + _PARTS_PER_WEIGHT * len(weights)
        self.n_bytes = _SPARE_BYTES + sum(array.nbytes for array in weights.values())
        self.exceeded = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count inside the block, and end it when too much is made."""
        me, left = threading.get_ident(), [self.n_parts, self.n_bytes]

        def count(_module: nn.Module, name: str, part: Any) -> None:
            if threading.get_ident() != me:
                return
            left[0] -= 1
            if isinstance(part, torch.Tensor) and not part.is_meta:
                left[1] -= part.nbytes  # not touched yet, so that it takes no memory
            if min(left) < 0:
                self.exceeded = True
                raise ValueError(f"the network that it describes is too large, from {name!r} on.")

        with ExitStack() as registered:
            for kind in ("parameter", "buffer", "module"):
                register = getattr(hooks, f"register_module_{kind}_registration_hook")
                registered.callback(register(count).remove)
            yield


class _Cost(TorchDispatchMode):
    """Size of the largest tensor, and number of operations, of what is computed inside."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.operations = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, and count."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.operations += count(*args, **kwargs, out_val=out)
        return out


def _is_foreign(estimator: Any) -> bool:
    """Whether the network is one of another package, or of a class from outside."""
    foreign = is_outside(type(estimator))
    while estimator._start is not None:
        estimator = estimator._start
        foreign |= is_outside(type(estimator))
    backbone = estimator.backbone
    if foreign or is_outside(backbone) or is_outside(type(backbone)):
        return True
    name = backbone if isinstance(backbone, str) else type(backbone).__name__
    return name.lower().startswith(("monai", "timm", "transformers"))


def _keeps_more_than_weights(module: nn.Module) -> bool:
    """Whether it holds tensors that a state dict leaves out."""
    kept = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
    held = [*module.parameters(), *module.buffers()]
    held += [v for part in module.modules() for v in vars(part).values()]
    return any(isinstance(v, torch.Tensor) and id(v) not in kept for v in held)
