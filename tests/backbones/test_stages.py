from __future__ import annotations

import itertools
import sys
import types
from collections import OrderedDict

import pytest
import torch
from torch import nn

from sklearn_medimb.backbones import (
    MLP,
    ConvNet,
    EfficientNetLite,
    HybridViT,
    ResNet,
    TimmBackbone,
    ViT,
    pyramid_of,
    stages_of,
)

SMALL_VIT = {"width": 6, "depth": 3, "n_heads": 2}
OWN = [
    (MLP(hidden=(8, 4, 4), dropout=0.1), 3),
    (ConvNet(widths=(4, 8, 8)), 3),
    (ConvNet(widths=(4,)), 1),
    (ResNet(width=4), 5),
    (ResNet(depth=50, width=4, stem="large"), 5),
    (ViT(**SMALL_VIT), 4),
    (ViT(**{**SMALL_VIT, "depth": 1}), 2),
    (HybridViT(stem_width=4, **SMALL_VIT), 8),
    (HybridViT(stem_width=4, n_stages=1, **SMALL_VIT), None),
    (EfficientNetLite(weights=None), 9),
    (EfficientNetLite(2, weights=None), 9),
]


def conv_norm(n_in, n_out, stride=1):
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride, 1), nn.BatchNorm2d(n_out), nn.ReLU())


class Block(nn.Module):
    def __init__(self, n_in, n_out, stride=1):
        super().__init__()
        self.first = conv_norm(n_in, n_out, stride)
        self.second = conv_norm(n_out, n_out)

    def forward(self, x):
        return self.second(self.first(x))


class Body(nn.Module):
    """A network as others build them: single layers around one body of blocks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.blocks = nn.Sequential(Block(4, 4), Block(4, 8, 2), Block(8, 8, 2), Block(8, 8))
        self.scale = nn.Parameter(torch.ones(1, 8, 1, 1))
        self.last_norm = nn.BatchNorm2d(8)

    def forward_features(self, x):
        return self.scale * self.last_norm(self.blocks(self.relu(self.norm(self.stem(x)))))

    def forward(self, x):
        return self.forward_features(x)


def check_partition(net, stages):
    parts = [id(p) for stage in stages for p in stage.parameters()]
    assert len(parts) == len(set(parts))
    assert set(parts) == {id(p) for p in net.parameters()}
    assert all(any(True for _ in stage.parameters()) for stage in stages)


def check_order(net, stages, images):
    """All layers with parameters of a stage run before those of the next one."""
    order = []
    layers = [m for m in net.modules() if [*m.parameters(recurse=False)] and not [*m.children()]]
    hooks = [m.register_forward_hook(lambda m, *_: order.append(id(m))) for m in layers]
    with torch.no_grad():
        net.train()(torch.cat([images, images]))  # with kept statistics some layers are merged
    for hook in hooks:
        hook.remove()
    assert len(order) == len(layers)
    places = [[order.index(id(m)) for m in stage.modules() if id(m) in order] for stage in stages]
    assert all(max(a) < min(b) for a, b in itertools.pairwise(places))


@pytest.mark.parametrize(("spec", "n"), OWN, ids=str)
def test_stages_are_a_partition_in_order(spec, n):
    net = spec.build((3, 32, 32))
    stages = stages_of(net)
    assert n is None or len(stages) == n
    check_partition(net, stages)
    check_order(net, stages, torch.randn(1, 3, 32, 32))
    wrapped = stages_of(nn.Sequential(OrderedDict(net=net)))
    assert len(wrapped) == len(stages)
    check_partition(net, wrapped)


def test_positions_belong_to_what_makes_the_tokens():
    for spec, place in ((ViT(**SMALL_VIT), 0), (HybridViT(stem_width=4, **SMALL_VIT), 4)):
        net = spec.build((1, 16, 16))
        stages = stages_of(net)
        for own in (net.cls_token, net.pos_embed, net.patch_embed.proj.weight):
            assert any(own is p for p in stages[place].parameters())
        assert any(net.norm.weight is p for p in stages[-1].parameters())


def test_one_body_of_blocks_is_opened():
    net = Body()
    for whole in (net, nn.Sequential(net)):
        stages = stages_of(whole)
        check_partition(net, stages)
        check_order(net, stages, torch.randn(1, 3, 16, 16))
        first, *blocks, last = stages
        assert [*blocks] == [*net.blocks[:3]]
        firsts = {id(p) for p in (net.scale, net.stem.weight, net.norm.weight)}
        assert firsts <= {id(p) for p in first.parameters()}
        assert any(net.last_norm.weight is p for p in last.parameters())


def test_a_body_is_opened_through_what_wraps_it():
    blocks = nn.ModuleList(Block(4, 4) for _ in range(3))
    encoder = nn.ModuleDict({"layers": blocks, "act": nn.ReLU()})
    net = nn.ModuleDict({"stem": conv_norm(3, 4), "encoder": encoder, "norm": nn.BatchNorm2d(4)})
    for whole in (net, nn.ModuleDict({"net": net})):
        stem, *middle, last = stages_of(whole)
        assert stem is net["stem"]
        assert middle == [*blocks[:2]]
        assert next(iter(last)) is blocks[2]
        check_partition(net, stages_of(whole))


def test_a_network_of_timm_is_opened(monkeypatch):
    fake = types.SimpleNamespace(create_model=lambda *_, **__: Body(), list_models=lambda: ["body"])
    monkeypatch.setitem(sys.modules, "timm", fake)
    net = TimmBackbone("body").build((3, 16, 16))
    assert len(stages_of(net)) == 5
    check_partition(net, stages_of(net))


def test_freezing_a_stage_freezes_its_layers_and_no_other():
    net = ResNet(width=4).build((1, 16, 16))
    stages_of(net)[0].requires_grad_(False)
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1.weight", "bn1.weight", "bn1.bias"}


def test_a_network_may_say_its_stages_and_depths():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.second, self.first = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.second(self.first(x))

        def stages(self):
            return [self.first, self.second]

        def pyramid(self, x):
            return [self.first(x), self(x)]

    net, x = Own(), torch.randn(2, 4)
    assert stages_of(net) == [net.first, net.second]
    assert stages_of(nn.Sequential(net)) == [net.first, net.second]
    assert torch.equal(pyramid_of(net, x)[0], net.first(x))

    class Stages(Block):  # a layer of that name says nothing of all
        def __init__(self):
            super().__init__(3, 4)
            self.stages = self.second

    assert len(stages_of(Stages())) == 2


@pytest.mark.parametrize(
    ("spec", "size", "shapes"),
    [(ConvNet(), (28, 28), [(32, 28, 28), (64, 14, 14), (128, 7, 7)]),
     (ConvNet(), (8, 8), [(32, 8, 8), (128, 4, 4)]),
     (ConvNet(widths=(4, 8)), (8, 8, 8), [(4, 8, 8, 8), (8, 4, 4, 4)]),
     (ResNet(width=2), (28, 28), [(4, 14, 14), (8, 7, 7), (16, 4, 4)]),
     (ResNet(depth=50, width=2, stem="large"), (64, 64), [(16, 8, 8), (32, 4, 4), (64, 2, 2)]),
     (EfficientNetLite(weights=None), (64, 96), [(40, 8, 12), (112, 4, 6), (1280, 2, 3)]),
     (EfficientNetLite(1, None), (32, 32), [(40, 4, 4), (112, 2, 2), (1280, 1, 1)])],
    ids=str,
)  # fmt: skip
def test_pyramid_is_the_last_map_of_each_resolution(spec, size, shapes):
    net, images = spec.build((1, *size)).eval(), torch.randn(2, 1, *size)
    with torch.no_grad():
        maps = pyramid_of(net, images)
        assert torch.equal(maps[-1], net(images))
    assert [tuple(m.shape[1:]) for m in maps] == shapes


def test_pyramid_of_blocks_is_what_they_return():
    net, images = ResNet(width=2).build((1, 28, 28)).eval(), torch.randn(2, 1, 28, 28)
    seen = {}
    for name in ("layer2", "layer3"):
        block = getattr(net, name)[-1]
        block.register_forward_hook(lambda m, x, out, name=name: seen.update({name: out}))
    maps = pyramid_of(net, images)
    assert torch.equal(maps[0], seen["layer2"])
    assert torch.equal(maps[1], seen["layer3"])


@pytest.mark.parametrize("spec", [MLP(hidden=(8, 4)), ViT(**SMALL_VIT)], ids=str)
def test_pyramid_of_other_networks_is_their_output(spec):
    net, images = spec.build((1, 16, 16)).eval(), torch.randn(2, 1, 16, 16)
    (output,) = pyramid_of(net, images)
    assert torch.equal(output, net(images))
