"""A trunk from its input to its output: in parts, and at several depths."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

_N_DEPTHS = 3


def stages_of(module: nn.Module) -> list[nn.Module]:
    """Cut a trunk into parts from input to output, for freezing the first and for rates by layer.

    A module may say them itself by a method ``stages()``. Otherwise they are its children in order
    of registration; where there is one child only, or one alone that is a chain of blocks, that
    one's children in its place. Layers without weights of their own, normalisations among them,
    belong to the part before, and parameters of the module itself to the first.

    Parameters
    ----------
    module : torch.nn.Module
        A trunk.

    Returns
    -------
    stages : list of torch.nn.Module
        Together they hold each of its parameters once. One that joins several layers is a
        ``torch.nn.ModuleList``: it can be frozen, but not called.
    """
    stages: list[list[nn.Module]] = []
    for part in _parts(module):
        if not stages or (_begins(part) and any(map(_begins, stages[-1]))):
            stages.append([])
        stages[-1].append(part)
    return [group[0] if len(group) == 1 else nn.ModuleList(group) for group in stages]


def pyramid_of(module: nn.Module, images: Tensor) -> list[Tensor]:
    """Encode images at several depths.

    Parameters
    ----------
    module : torch.nn.Module
        A trunk. One that is a chain (``torch.nn.Sequential`` and what is made of it, as the
        package's convolutional networks are) is read at every resolution; one that has a method
        ``pyramid(images)`` by that.
    images : Tensor of shape (n, C, *spatial)
        Normalised images.

    Returns
    -------
    outputs : list of Tensor
        The last map of each of the last three resolutions, coarser and coarser; of all other
        networks the output alone. The last one always is the output of the module.
    """
    if callable(own := getattr(type(module), "pyramid", None)):
        return own(module, images)
    maps: dict[tuple[int, ...], Tensor] = {}
    x = images
    for link in _links(module):
        x = link(x)
        if isinstance(x, Tensor):  # links may hand one another what is no map
            maps.pop(size := tuple(x.shape[2:]), None)
            maps[size] = x
    return list(maps.values())[-_N_DEPTHS:] if isinstance(x, Tensor) and x.ndim > 3 else [x]


def _links(module: nn.Module) -> Iterator[nn.Module]:
    """What a chain calls one after the other; of anything else, itself."""
    if type(module).forward is not nn.Sequential.forward:
        yield module
        return
    for child in module.children():
        yield from _links(child)


def _parts(module: nn.Module) -> list[nn.Module]:
    if callable(own := getattr(type(module), "stages", None)):
        return own(module)
    children = list(module.children())
    loose = list(module.parameters(recurse=False))
    weighty = [child for child in children if _is_weighty(child)]
    if not weighty:
        return [module]
    opened = weighty if len(weighty) == 1 and not loose else [c for c in children if _is_chain(c)]
    parts: list[nn.Module] = [nn.ParameterList(loose)] if loose else []
    for child in children:
        parts += _parts(child) if len(opened) == 1 and child is opened[0] else [child]
    return parts


def _is_chain(module: nn.Module) -> bool:
    """Whether it holds several blocks: children that have children with parameters."""
    weighty = [child for child in module.children() if _is_weighty(child)]
    if len(weighty) == 1 and not [*module.parameters(recurse=False)]:
        return _is_chain(weighty[0])
    return sum(any(map(_is_weighty, child.children())) for child in module.children()) > 1


def _is_weighty(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _begins(part: nn.Module) -> bool:
    """Whether it may begin a stage; a normalisation, or loose parameters, may not."""
    return not isinstance(part, nn.ParameterList) and any(p.ndim > 1 for p in part.parameters())
