"""Image files as X: written with the libraries that read them."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.model_selection import cross_val_score

from sklearn_medimb import (
    CSSNClassifier,
    SoftmaxClassifier,
    SPMixClassifier,
    SPMixSampler,
    SSLEncoder,
)
from sklearn_medimb._data import files as files_module
from sklearn_medimb._data import reading as reading_module
from sklearn_medimb._data.images import read_images
from sklearn_medimb._data.resize import resample
from sklearn_medimb.backbones import ConvNet
from sklearn_medimb.datasets import DatasetImages, ImageFiles, MappedImages, Resize
from tests.forgery import forged, set_state
from tests.helpers import SMALL, make_blobs

Image = pytest.importorskip("PIL.Image")
pydicom = pytest.importorskip("pydicom")
nibabel = pytest.importorskip("nibabel")

GRAY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
COLOUR = np.stack([GRAY, GRAY[::-1], GRAY[:, ::-1]], axis=-1)


def picture(path, array, mode=None, **options):
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


def dicom(path, stored, kind="MONOCHROME2", *, bits=12, frames=None, pixels=True, **elements):
    """A DICOM file with a patient, whose name must never be seen again."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["test"])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID = meta.MediaStorageSOPClassUID
    data.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    data.PatientName = "Secret^Sally"
    data.PatientID = "SECRET-7"
    data.Modality = "DX"
    stored = np.asarray(stored)
    plane = stored.shape[1:] if frames else stored.shape
    data.Rows, data.Columns = plane[:2]
    data.SamplesPerPixel = plane[2] if len(plane) == 3 else 1
    if data.SamplesPerPixel == 3:
        data.PlanarConfiguration = 0
    if frames:
        data.NumberOfFrames = len(stored)
    data.PhotometricInterpretation = kind
    data.BitsAllocated, data.BitsStored, data.HighBit = 8 * stored.itemsize, bits, bits - 1
    data.PixelRepresentation = int(stored.dtype.kind == "i")
    if pixels:
        data.PixelData = stored.tobytes()
        data["PixelData"].VR = "OW" if stored.itemsize > 1 else "OB"
    for name, value in elements.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path


def nifti(path, array, affine=None, **header):
    image = nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine)
    if header:
        image.header.set_slope_inter(**header)
    nibabel.save(image, path)
    return path


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_pictures_are_gray_or_rgb(tmp_path, mode, suffix):
    if (mode, suffix) == ("CMYK", "png"):
        suffix = "jpg"
    source = COLOUR if mode in ("P", "RGB", "RGBA", "CMYK") else GRAY
    path = picture(tmp_path / f"x.{suffix}", source, mode)
    colour = source is COLOUR
    X = ImageFiles([path])
    expected = np.asarray(Image.open(path).convert("RGB" if colour else "L"))
    assert X.shape == (1, 6, 8, 3) if colour else (1, 6, 8)
    assert X.dtype == np.uint8
    np.testing.assert_array_equal(X[0], expected)
    if mode != "CMYK":
        np.testing.assert_array_equal(
            ImageFiles([path], mode="L")[0], np.asarray(Image.open(path).convert("L"))
        )
        np.testing.assert_array_equal(
            ImageFiles([path], mode="RGB")[0], np.asarray(Image.open(path).convert("RGB"))
        )


def test_what_is_transparent_lies_on_black(tmp_path):
    alpha = np.where(GRAY > 100, 255, 0).astype(np.uint8)
    shown = np.where(GRAY > 100, GRAY, 0)
    picture(tmp_path / "rgba.png", np.dstack([COLOUR, alpha]))
    picture(tmp_path / "la.png", np.dstack([GRAY, alpha]))
    palette = Image.fromarray(GRAY).convert("P")
    palette.save(tmp_path / "p.png", transparency=bytes([0] * 101 + [255] * 155))
    np.testing.assert_array_equal(
        ImageFiles(tmp_path / "rgba.png")[0], np.where(GRAY[..., None] > 100, COLOUR, 0)
    )
    np.testing.assert_array_equal(ImageFiles(tmp_path / "la.png")[0], shown)
    np.testing.assert_array_equal(ImageFiles(tmp_path / "p.png")[0], shown)


def test_a_palette_of_grays_is_gray_and_one_of_colours_is_not(tmp_path):
    gray = picture(tmp_path / "gray.png", GRAY, "P")
    colour = picture(tmp_path / "colour.gif", COLOUR, "P")
    assert ImageFiles([gray]).shape == (1, 6, 8)
    assert ImageFiles([colour]).shape == (1, 6, 8, 3)
    X = ImageFiles([gray, colour])
    assert X.options["mode"] == "RGB"
    np.testing.assert_array_equal(X[0], np.dstack([GRAY] * 3))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_pictures_stand_upright(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.repeat(np.repeat(COLOUR, 8, 0), 8, 1)
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: np.rot90(stored, -1),
        7: np.rot90(stored, 2).swapaxes(0, 1),
        8: np.rot90(stored),
    }[orientation]
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(
        suffix, {}
    )
    X = ImageFiles([picture(tmp_path / f"x.{suffix}", stored, exif=exif, **options)])
    assert X[0].shape == X.shape[1:] == upright.shape
    assert np.abs(X[0].astype(int) - upright).mean() < (3 if suffix == "jpg" else 0.01)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_stay_what_they_are_or_are_shown_in_a_window(tmp_path, suffix):
    deep = GRAY.astype(np.uint16) * 257
    path = picture(tmp_path / f"deep.{suffix}", deep)
    X = ImageFiles([path])
    assert X.dtype == np.float32
    np.testing.assert_array_equal(X[0], deep)
    shown = ImageFiles([path, picture(tmp_path / "x.png", GRAY)], window=(32767.5, 65535))
    assert shown.dtype == np.uint8
    np.testing.assert_array_equal(shown.take(np.arange(2)), [GRAY, GRAY])


def test_webp_and_pages(tmp_path):
    path = picture(tmp_path / "x.webp", COLOUR, lossless=True)
    np.testing.assert_array_equal(ImageFiles([path])[0], COLOUR)
    pages = [Image.fromarray(GRAY + k) for k in range(3)]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    stack = np.stack([GRAY, GRAY + 1, GRAY + 2])
    np.testing.assert_array_equal(ImageFiles(tmp_path / "x.tif")[0], stack[None])
    np.testing.assert_array_equal(ImageFiles(tmp_path / "x.tif", frames=2)[0], stack[2])
    np.testing.assert_array_equal(ImageFiles(tmp_path / "x.tif", frames="middle")[0], stack[1])


def test_content_counts_and_not_the_name(tmp_path):
    picture(tmp_path / "real.png", GRAY)
    (tmp_path / "real.png").rename(tmp_path / "röntgen 影.dcm")
    dicom(tmp_path / "real.dcm", GRAY, bits=8)
    (tmp_path / "real.dcm").rename(tmp_path / "x.jpg")
    X = ImageFiles([tmp_path / "röntgen 影.dcm", tmp_path / "x.jpg"])
    np.testing.assert_array_equal(X.take(np.arange(2)), [GRAY, GRAY])


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 3), (3, 6, 8), (6, 8, 1)])
def test_arrays_are_pictures(tmp_path, shape):
    array = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
    np.save(tmp_path / "x.npy", array)
    image = ImageFiles(tmp_path / "x.npy")[0]
    expected = np.moveaxis(array, 0, -1) if shape[0] == 3 else array
    np.testing.assert_array_equal(image, expected.reshape(image.shape))
    assert image.shape == ((6, 8, 3) if 3 in shape else (6, 8))


def test_arrays_are_volumes(tmp_path):
    array = np.arange(5 * 6 * 8, dtype=np.int16).reshape(5, 6, 8)
    np.save(tmp_path / "x.npy", np.asfortranarray(array))
    X = ImageFiles(tmp_path / "x.npy")
    assert (X.shape, X.dtype) == ((1, 1, 5, 6, 8), np.float32)
    np.testing.assert_array_equal(X[0][0], array)
    np.testing.assert_array_equal(ImageFiles(tmp_path / "x.npy", frames=1)[0], array[1])


# ---------------------------------------------------------------- DICOM

FILM = (np.arange(48).reshape(6, 8) * 80).astype(np.uint16)  # 12 bits


@pytest.mark.parametrize(
    "options", [{}, {"window": (1000, 900)}, {"window": (2000, 3000), "image_size": 4}]
)
@pytest.mark.parametrize("rescaled", [{}, {"RescaleSlope": 2, "RescaleIntercept": -1000}])
def test_monochrome1_agrees_with_monochrome2(tmp_path, options, rescaled):
    dicom(tmp_path / "2.dcm", FILM, **rescaled)
    dicom(tmp_path / "1.dcm", 4095 - FILM, "MONOCHROME1", **rescaled)
    X = ImageFiles([tmp_path / "1.dcm", tmp_path / "2.dcm"], **options)
    np.testing.assert_array_equal(X[0], X[1])
    if not options:
        slope, intercept = (2, -1000) if rescaled else (1, 0)
        np.testing.assert_array_equal(X[1], FILM * float(slope) + intercept)


def test_monochrome1_of_eight_and_of_signed_bits(tmp_path):
    dicom(tmp_path / "2.dcm", GRAY, bits=8)
    dicom(tmp_path / "1.dcm", 255 - GRAY, "MONOCHROME1", bits=8)
    signed = FILM.astype(np.int16) - 2048
    dicom(tmp_path / "s2.dcm", signed)
    dicom(tmp_path / "s1.dcm", -1 - signed, "MONOCHROME1")
    for pair in (["1.dcm", "2.dcm"], ["s1.dcm", "s2.dcm"]):
        X = ImageFiles([tmp_path / name for name in pair])
        np.testing.assert_array_equal(X[0], X[1])
    np.testing.assert_array_equal(ImageFiles(tmp_path / "1.dcm")[0], GRAY)


def test_films_are_shown_in_their_own_window(tmp_path):
    window = {"WindowCenter": 1800, "WindowWidth": 2000}
    dicom(tmp_path / "2.dcm", FILM, **window)
    dicom(
        tmp_path / "1.dcm", 4095 - FILM, "MONOCHROME1", WindowCenter=4096 - 1800, WindowWidth=2000
    )
    X = ImageFiles([tmp_path / "1.dcm", tmp_path / "2.dcm"])
    assert X.dtype == np.uint8
    assert np.abs(X[0].astype(int) - X[1]).max() <= 1
    data = pydicom.dcmread(tmp_path / "2.dcm")
    display = pydicom.pixels.apply_windowing(data.pixel_array, data) / 4095 * 255
    assert np.abs(X[1] - display).max() <= 0.51


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_windows_follow_the_standard(tmp_path, function):
    dicom(tmp_path / "x.dcm", FILM, WindowCenter=[1500, 9], WindowWidth=[801, 9],
          VOILUTFunction=function)  # fmt: skip
    data = pydicom.dcmread(tmp_path / "x.dcm")
    display = pydicom.pixels.apply_windowing(data.pixel_array, data) / 4095 * 255
    assert np.abs(ImageFiles(tmp_path / "x.dcm")[0] - display).max() <= 0.51


def test_a_table_of_display_values_is_applied(tmp_path):
    from pydicom.dataset import Dataset

    table = Dataset()
    table.LUTDescriptor = [4096, 0, 16]
    table.add_new("LUTData", "OW", (np.arange(4096, dtype=np.uint16)[::-1] * 16).tobytes())
    path = dicom(tmp_path / "x.dcm", FILM, VOILUTSequence=[table])
    expected = np.rint((4095 - FILM.astype(int)) * 16 / 65535 * 255)
    np.testing.assert_array_equal(ImageFiles(path)[0], expected)


def test_ct_stays_in_hounsfield_units_whatever_its_window(tmp_path):
    ct = {"Modality": "CT", "RescaleSlope": 1, "RescaleIntercept": -1024}
    dicom(tmp_path / "a.dcm", FILM, WindowCenter=40, WindowWidth=400, **ct)
    dicom(tmp_path / "b.dcm", FILM // 2, WindowCenter=-600, WindowWidth=1500, **ct)
    X = ImageFiles([tmp_path / "a.dcm", tmp_path / "b.dcm"])
    assert X.dtype == np.float32
    np.testing.assert_array_equal(X.take([0, 1]), [FILM - 1024.0, FILM // 2 - 1024.0])
    lung = ImageFiles(tmp_path / "a.dcm", window=(-600, 1500))[0]
    expected = np.rint(np.clip((FILM - 1024.0 + 600) / 1500 + 0.5, 0, 1) * 255)
    np.testing.assert_array_equal(lung, expected)


def test_no_file_is_stretched_by_its_own_values(tmp_path):
    dicom(tmp_path / "a.dcm", FILM)
    dicom(tmp_path / "b.dcm", FILM // 3)
    X = ImageFiles([tmp_path / "a.dcm", tmp_path / "b.dcm"])
    np.testing.assert_array_equal(X[1], FILM // 3)
    assert X[0].max() > 2 * X[1].max()


def test_frames_of_a_file_are_a_volume(tmp_path):
    stack = np.stack([FILM, FILM // 2, FILM // 3])
    path = dicom(tmp_path / "x.dcm", stack, frames=True)
    np.testing.assert_array_equal(ImageFiles(path)[0], stack[None])
    np.testing.assert_array_equal(ImageFiles(path, frames=1)[0], stack[1])
    clip = np.stack([COLOUR, COLOUR // 2])
    path = dicom(tmp_path / "c.dcm", clip, "RGB", bits=8, frames=True)
    np.testing.assert_array_equal(ImageFiles(path)[0], np.moveaxis(clip, -1, 0))
    np.testing.assert_array_equal(ImageFiles(path, frames="middle")[0], clip[1])


@pytest.mark.parametrize("held", [files_module.HELD, 700, 0])
@pytest.mark.parametrize("options", [{}, {"image_size": 4}, {"cache": True}])
def test_each_slice_is_a_row(tmp_path, monkeypatch, held, options):
    monkeypatch.setattr(files_module, "HELD", held)
    options = {**options, **({"cache": tmp_path / "cache"} if "cache" in options else {})}
    stack = np.stack([GRAY, GRAY // 2, GRAY // 3])
    paths = [
        nifti(tmp_path / "x.nii.gz", stack.transpose(2, 1, 0)),
        dicom(tmp_path / "y.dcm", stack[:2], bits=8, frames=True),
        picture(tmp_path / "z.png", GRAY),
    ]
    X = ImageFiles(paths, frames="each", **options)
    assert X.files.tolist() == [0, 0, 0, 1, 1, 2]
    assert X[1:].paths == [str(paths[k]) for k in (0, 0, 1, 1, 2)]
    expected = np.stack([*stack, *stack[:2], GRAY])
    if "image_size" in options:
        each = [torch.from_numpy(image)[None, None] for image in expected]
        expected = np.stack([resample(image, (4, 4))[0, 0].numpy() for image in each])
    for rows in (np.arange(6), np.array([4, 1, 5, 1]), np.array([2])):
        np.testing.assert_array_equal(X.take(rows), expected[rows])
        np.testing.assert_array_equal(X[rows][0], expected[rows[0]])


def test_a_volume_is_decoded_once_for_its_slices(tmp_path, monkeypatch):
    path = nifti(tmp_path / "x.nii.gz", np.arange(480, dtype=np.int16).reshape(8, 6, 10))
    opened = []
    plain = reading_module.opened
    X, Y = (ImageFiles(path, frames="each", cache=cache) for cache in (None, tmp_path / "cache"))
    monkeypatch.setattr(
        reading_module, "opened", lambda path, *rest: opened.append(path) or plain(path, *rest)
    )
    for rows in ([3, 0], [7], [2, 9, 1]):
        X.take(np.array(rows))
    assert len(opened) == 1
    np.testing.assert_array_equal(Y.take(np.arange(10)), X.take(np.arange(10)))
    assert len(opened) == 2


@pytest.mark.parametrize("implicit", [True, False])
def test_files_of_before_there_was_a_preamble(tmp_path, implicit):
    data = pydicom.Dataset()
    data.update(pydicom.dcmread(dicom(tmp_path / "x.dcm", FILM)))
    path = tmp_path / "old"
    data.save_as(path, implicit_vr=implicit, little_endian=True, enforce_file_format=False)
    assert path.read_bytes()[:2] == b"\x08\x00"
    np.testing.assert_array_equal(ImageFiles(path)[0], FILM)


def test_each_frame_has_its_own_rescaling(tmp_path):
    from pydicom.dataset import Dataset

    def groups(slope):
        values, frame = Dataset(), Dataset()
        values.RescaleSlope, values.RescaleIntercept = slope, 5
        frame.PixelValueTransformationSequence = [values]
        return frame

    stack = np.stack([FILM, FILM])
    path = dicom(tmp_path / "x.dcm", stack, frames=True,
                 PerFrameFunctionalGroupsSequence=[groups(2), groups(3)])  # fmt: skip
    np.testing.assert_array_equal(ImageFiles(path)[0][0], [FILM * 2.0 + 5, FILM * 3.0 + 5])
    np.testing.assert_array_equal(ImageFiles(path, frames=1)[0], FILM * 3.0 + 5)


def sample(name):
    from pydicom.data import get_testdata_file

    path = get_testdata_file(name, download=False)
    if path is None:
        pytest.skip(f"pydicom's {name} is not on this machine")
    return path


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("CT_small.dcm", (128, 128), "float32"),
        ("MR_small.dcm", (64, 64), "uint8"),
        ("MR_small_RLE.dcm", (64, 64), "uint8"),
        ("MR_small_bigendian.dcm", (64, 64), "uint8"),
        ("MR_small_jp2klossless.dcm", (64, 64), "uint8"),
        ("image_dfl.dcm", (512, 512), "uint8"),
        ("examples_palette.dcm", (350, 800, 3), "uint8"),
        ("examples_ybr_color.dcm", (3, 30, 240, 320), "uint8"),
        ("SC_rgb_rle_16bit_2frame.dcm", (3, 2, 100, 100), "uint8"),
        ("SC_ybr_full_422_uncompressed.dcm", (100, 100, 3), "uint8"),
        ("SC_rgb_small_odd_jpeg.dcm", (3, 3, 3), "uint8"),
        ("rtdose_rle.dcm", (1, 15, 10, 10), "float32"),
        ("liver_1frame.dcm", (512, 512), "uint8"),
    ],
)
def test_public_samples(name, shape, dtype):
    X = ImageFiles([sample(name)])
    assert (X.shape[1:], X.dtype) == (shape, dtype)
    image = X[0]
    assert (image.shape, image.dtype) == (shape, dtype)
    assert np.ptp(image) > 0


def test_public_samples_that_are_the_same_picture_agree():
    plain = ImageFiles(sample("MR_small.dcm"))[0]
    for other in ("RLE", "bigendian", "implicit", "expb", "jp2klossless"):
        np.testing.assert_array_equal(ImageFiles(sample(f"MR_small_{other}.dcm"))[0], plain)
    ct = pydicom.dcmread(sample("CT_small.dcm"))
    np.testing.assert_array_equal(
        ImageFiles(sample("CT_small.dcm"))[0], ct.pixel_array * float(ct.RescaleSlope) - 1024
    )
    colour = ImageFiles(sample("SC_rgb_rle.dcm"))[0]
    for other in ("rle_16bit", "rle_32bit"):
        np.testing.assert_array_equal(ImageFiles(sample(f"SC_rgb_{other}.dcm"))[0], colour)
    assert np.abs(ImageFiles(sample("SC_rgb_jpeg_dcmtk.dcm"))[0] - colour.astype(int)).mean() < 2


@pytest.mark.parametrize("name", ["MR_small_jpeg_ls_lossless.dcm", "SC_rgb_jpeg_gdcm.dcm"])
def test_a_missing_decoder_is_named(name):
    path = sample(name)
    from pydicom.pixels import get_decoder

    if get_decoder(pydicom.dcmread(path).file_meta.TransferSyntaxUID).is_available:
        pytest.skip("the decoder is there")
    with pytest.raises(ImportError, match=rf"Row 0 .*{name}.*pip install .pylibjpeg"):
        ImageFiles([path])


# ---------------------------------------------------------------- NIfTI


def test_volumes_come_in_canonical_orientation(tmp_path):
    volume = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    plain = nifti(tmp_path / "plain.nii", volume)
    turned = [
        nifti(tmp_path / "flip.nii.gz", volume[::-1, :, ::-1], np.diag([-1, 1, -1, 1])),
        nifti(
            tmp_path / "swap.nii",
            volume.transpose(2, 0, 1),
            np.array([[0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]]),
        ),
    ]
    X = ImageFiles([plain, *turned])
    assert (X.shape, X.dtype) == ((3, 1, 6, 5, 4), np.float32)
    for image in X:
        np.testing.assert_array_equal(image[0], volume.transpose(2, 1, 0))
    np.testing.assert_array_equal(
        ImageFiles(turned, frames="middle").take([0, 1]), [volume[:, :, 3].T] * 2
    )


def test_slope_and_intercept_are_applied(tmp_path):
    volume = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    scaled = nifti(tmp_path / "s.nii", volume.astype(np.float32) / 2 - 3)
    stored = nifti(tmp_path / "x.nii", volume, slope=0.5, inter=-3)
    X = ImageFiles([scaled, stored])
    np.testing.assert_allclose(X[0], X[1])
    assert ImageFiles(nifti(tmp_path / "u.nii", volume)).dtype == np.uint8


def test_what_is_no_number_is_black_in_a_window(tmp_path):
    volume = np.full((2, 3, 4), 50, np.float32)
    volume[0] = np.nan
    shown = ImageFiles(nifti(tmp_path / "x.nii", volume), window=(50, 100))[0][0]
    assert (shown[..., 0] == 0).all()
    assert (shown[..., 1] == 128).all()


def test_spacing_brings_volumes_to_the_same_scale(tmp_path):
    volume = np.zeros((8, 10, 12), np.float32)
    volume[2:4] = 1
    path = nifti(tmp_path / "x.nii", volume, np.diag([1, 2, 3, 1]))
    assert ImageFiles(path, spacing=1.0).shape == (1, 1, 36, 20, 8)
    X = ImageFiles(path, spacing=(3, 2, 0.5))
    assert X[0].shape == X.shape[1:] == (1, 12, 10, 16)
    profile = X[0][0, 5, 5]
    assert profile.argmax() in (4, 5, 6, 7)
    film = dicom(tmp_path / "x.dcm", FILM, PixelSpacing=[0.2, 0.1])
    assert ImageFiles(film, spacing=0.1).shape == (1, 12, 8)
    assert ImageFiles(film, spacing=0.1, image_size=5)[0].shape == (5, 5)
    with pytest.raises(ValueError, match=r"y\.png.*does not say how far apart"):
        ImageFiles(picture(tmp_path / "y.png", GRAY), spacing=1.0)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("example4d.nii.gz", (2, 24, 96, 128)),
        ("example_nifti2.nii.gz", (2, 12, 20, 32)),
        ("anatomical.nii", (1, 25, 41, 33)),
        ("standard.nii.gz", (1, 7, 5, 4)),
    ],
)
def test_public_volumes(name, shape):
    from nibabel.testing import data_path

    path = Path(data_path) / name
    if not path.exists():
        pytest.skip(f"nibabel's {name} is not on this machine")
    X = ImageFiles(path)
    canonical = nibabel.as_closest_canonical(nibabel.load(path))
    expected = canonical.get_fdata(dtype=np.float32).T.reshape(shape)
    assert X.shape[1:] == shape
    np.testing.assert_allclose(X[0], expected, rtol=1e-6)


# ---------------------------------------------------------------- bad files


def cut(path, share=0.6):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def huge_png(path):
    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    return path


def huge_array(path):
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (40_000, 40_000)}
        )
    return path


def huge_dicom(path):
    return dicom(path, FILM, Rows=40_000, Columns=40_000)


def huge_nifti(path):
    header = nibabel.Nifti1Header()
    header.set_data_shape((4000, 4000, 4000))
    header["magic"] = b"n+1"
    path.write_bytes(header.binaryblock + b"\0" * 100)
    return path


def far_nifti(path):
    nifti(path, np.ones((4, 4, 4)))
    content = bytearray(path.read_bytes())
    content[108:112] = struct.pack("<f", 2e9)  # vox_offset
    path.write_bytes(content)
    return path


def pickled(path):
    np.save(path, np.array([[{"a": 1}, None]], dtype=object))
    return path


def written(content):
    return lambda path: (path.write_bytes(content), path)[1]


def saved(array):
    return lambda path: (np.save(path, array), path)[1]


def loop(path):
    path.symlink_to(path)
    return path


def fifo(path):
    os.mkfifo(path)
    return path


def folder(path):
    path.mkdir()
    return path


BAD_HEADERS = {
    "absent": (lambda path: path, "cannot be opened: No such file"),
    "empty": (written(b""), "is empty"),
    "text": (written(b"not a picture " * 40), "is none of the image files"),
    "noise": (written(np.random.default_rng(0).bytes(900)), "is none of the image files"),
    "one_byte": (written(b"\x89"), "is none of the image files"),
    "png_signature_only": (written(b"\x89PNG\r\n\x1a\n"), "png_signature_only.*"),
    "zip": (written(b"PK\x03\x04" + b"0" * 400), "is an archive"),
    "gzip_of_text": (written(gzip.compress(b"text" * 200)), "no NIfTI volume"),
    "gzip_cut": (written(b"\x1f\x8b\x08\x00\x00\x00"), "gzip_cut"),
    "huge.png": (huge_png, "too large.*pixels"),
    "huge.npy": (huge_array, r"\(40000, 40000\): more than"),
    "huge.dcm": (huge_dicom, r"40000, 40000\): more than"),
    "huge.nii": (huge_nifti, r"4000, 4000, 4000\): more than"),
    "far.nii": (far_nifti, "far behind its header"),
    "many_frames": (lambda p: dicom(p, FILM, NumberOfFrames=10**8), "more than"),
    "no_pixels.dcm": (lambda p: dicom(p, FILM, Rows=None), "without pixels"),
    "zero_rows.dcm": (lambda p: dicom(p, FILM, Rows=0), "without pixels"),
    "pickle.npy": (pickled, "not of numbers"),
    "texts.npy": (saved(np.array([["a", "b"]])), "not of numbers"),
    "complex.npy": (saved(np.ones((4, 4), complex)), "not of numbers"),
    "vector.npy": (saved(np.ones(4)), "one image, or one volume"),
    "no_pixels.npy": (saved(np.ones((0, 4))), r"shape \(0, 4\)"),
    "which_axis.npy": (saved(np.ones((3, 4, 3))), "which axis holds the channels"),
    "cut.npy": (lambda p: cut(saved(np.ones((9, 9)))(p)), "is cut off"),
    "x.npz": (lambda p: (np.savez(p, a=GRAY), p)[1], "is an archive"),
    "loop": (loop, "cannot be opened: .*symbolic"),
    "fifo": (fifo, "is no file"),
    "folder": (folder, "is a folder: from_folder reads it"),
    "cut_header.nii": (lambda p: cut(nifti(p, np.ones((4, 4, 4))), 0.1), "cut_header"),
    "null\0byte": (lambda p: p, "cannot be opened"),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_files_name_themselves_at_once(tmp_path, name):
    make, message = BAD_HEADERS[name]
    good = picture(tmp_path / "good.png", GRAY)
    bad = make(tmp_path / name)
    with pytest.raises(ValueError, match=message) as caught:
        ImageFiles([good, bad])
    assert "Row 1 of X" in str(caught.value)
    assert repr(str(bad))[1:-1] in str(caught.value)


BAD_PIXELS = {
    "cut.png": lambda p: cut(picture(p, noisy())),
    "cut.jpg": lambda p: cut(picture(p, noisy())),
    "cut.tif": lambda p: cut(picture(p, noisy())),
    "cut.dcm": lambda p: cut(dicom(p, np.tile(FILM, (9, 9))), 0.8),
    "no_data.dcm": lambda p: dicom(p, FILM, pixels=False),
    "nan.nii": lambda p: nifti(p, np.full((4, 5, 6), np.nan, np.float32)),
    "infinity.npy": lambda p: saved(np.full((4, 5), 1e300))(p),
    "cut.nii": lambda p: cut(nifti(p, np.ones((9, 9, 9))), 0.8),
    "cut.nii.gz": lambda p: cut(nifti(p, np.random.default_rng(0).random((9, 9, 9))), 0.8),
}


def noisy():
    return np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)


@pytest.mark.parametrize("name", BAD_PIXELS)
def test_bad_pixels_name_their_file_when_they_are_read(tmp_path, name):
    bad = BAD_PIXELS[name](tmp_path / name)
    X = ImageFiles([bad])
    for read in (lambda: X.take([0]), lambda: next(X.stream(np.array([0])))):
        with pytest.raises(ValueError, match="Row 0 of X could not be read") as caught:
            read()
        assert str(bad) in str(caught.value)
    with pytest.raises(ValueError, match=name):
        X[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "CMYK"}, "mode='CMYK' must be one of"),
        ({"window": (40, 0)}, "a centre and a width above 0"),
        ({"window": (float("nan"), 1)}, "a centre and a width above 0"),
        ({"window": 400}, "a centre and a width above 0"),
        ({"spacing": -1}, "millimetres above 0"),
        ({"spacing": ()}, "millimetres above 0"),
        ({"frames": -1}, "frames=-1 must be"),
        ({"frames": True}, "frames=True must be"),
        ({"frames": 3}, "has 1 frame: frames=3 is none of them"),
        ({"image_size": 0}, "image_size=0"),
        ({"image_size": (4, 4, 4)}, "names 3 sides"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, message):
    path = picture(tmp_path / "x.png", GRAY)
    with pytest.raises(ValueError, match=message):
        ImageFiles([path], **options)


@pytest.mark.parametrize("paths", [[], [3], ["", "a"], [None], np.ones(3)])
def test_what_is_no_path_is_refused(paths):
    with pytest.raises((TypeError, ValueError), match=r"path"):
        ImageFiles(paths)


def test_files_that_do_not_go_together_are_refused(tmp_path):
    flat = picture(tmp_path / "flat.png", GRAY)
    deep = picture(tmp_path / "deep.png", GRAY.astype(np.uint16))
    volume = nifti(tmp_path / "x.nii", np.ones((4, 5, 6), np.uint8))
    four = nifti(tmp_path / "4.nii", np.ones((4, 5, 6, 2), np.uint8))
    with pytest.raises(ValueError, match=r"scales may differ.*flat\.png.*deep\.png.*window="):
        ImageFiles([flat, deep])
    with pytest.raises(ValueError, match=r"images and volumes.*flat\.png.*x\.nii"):
        ImageFiles([flat, volume])
    with pytest.raises(ValueError, match=r"different channels.*4\.nii"):
        ImageFiles([volume, four])
    with pytest.raises(ValueError, match="2 channels of another kind"):
        ImageFiles([four], mode="L")


def test_nothing_tells_who_the_patient_is(tmp_path):
    good = dicom(tmp_path / "good.dcm", FILM)
    bad = cut(dicom(tmp_path / "bad.dcm", np.tile(FILM, (9, 9))), 0.8)
    X = ImageFiles([good, bad])
    said = [repr(X), repr(vars(X)), pickle.dumps(X).decode("latin1"), repr(X.options)]
    X[0]
    said.append(repr(vars(X._memory)))
    with pytest.raises(ValueError) as caught:
        X[1]
    error = caught.value
    while error is not None:
        said.append(repr(error))
        error = None if error.__suppress_context__ else error.__cause__ or error.__context__
    assert not [text for text in said if "secret" in text.lower() or "sally" in text.lower()]


# ---------------------------------------------------------------- reading


@pytest.fixture
def pngs(tmp_path):
    X, y = make_blobs()
    images = np.moveaxis(X, 1, -1)
    paths = [picture(tmp_path / f"{k}.png", image) for k, image in enumerate(images)]
    return paths, images, y


def test_reading_is_lazy_ordered_and_the_same_in_threads(pngs, monkeypatch):
    paths, images, _ = pngs
    read = []
    plain = files_module.read_file
    monkeypatch.setattr(
        files_module, "read_file", lambda path, *rest: read.append(path) or plain(path, *rest)
    )
    X = ImageFiles(paths)
    assert (X.shape, X.ndim, X.dtype, len(X)) == ((60, 12, 12, 3), 4, np.uint8, 60)
    assert X.paths == [str(path) for path in paths]
    assert X[3:5].sizes == [(12, 12)] * 2
    assert not read
    rows = np.random.default_rng(0).permutation(60)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    files_module._pool.cache_clear()
    np.testing.assert_array_equal(X[rows].take(np.arange(60)), images[rows])
    files_module._pool.cache_clear()
    assert len(read) == 60
    np.testing.assert_array_equal(X[5:9][1], images[6])
    np.testing.assert_array_equal(X.take(np.array([-1, 3])), images[[-1, 3]])
    np.testing.assert_array_equal(X[np.arange(60) < 5].take(np.arange(5)), images[:5])
    assert len(read) == 60  # they are held


def test_memory_is_bounded(pngs, monkeypatch):
    paths, images, _ = pngs
    monkeypatch.setattr(files_module, "HELD", 5 * images[0].nbytes)
    X = ImageFiles(paths)
    np.testing.assert_array_equal(X.take(np.arange(60)), images)
    assert len(X._memory.images) == 5
    assert X._memory.n_bytes == 5 * images[0].nbytes


def test_what_is_decoded_ahead_is_bounded(pngs, monkeypatch):
    paths, images, _ = pngs
    monkeypatch.setattr(files_module, "HELD", 0)
    monkeypatch.setattr(files_module, "AHEAD", 3 * images[0].nbytes)
    X = ImageFiles(paths)
    X.expect(np.arange(60))
    assert sorted(X._memory.coming[1]) == [0, 1, 2]
    np.testing.assert_array_equal(X.take(np.arange(60)), images)


def test_what_is_expected_is_decoded_once_and_not_held_twice(pngs, monkeypatch):
    paths, images, _ = pngs
    X = ImageFiles(paths)
    monkeypatch.setattr(files_module, "HELD", 0)
    read = []
    plain = files_module.read_file
    monkeypatch.setattr(
        files_module, "read_file", lambda path, *rest: read.append(path) or plain(path, *rest)
    )
    X.expect(np.array([3, 1]))
    np.testing.assert_array_equal(X.take(np.array([1, 3])), images[[1, 3]])
    assert len(read) == 2
    assert not X._memory.coming[1]
    X.expect(np.array([4, 4, 7]))
    np.testing.assert_array_equal(X.take(np.array([7, 4, 4, 9, 9])), images[[7, 4, 4, 9, 9]])
    assert len(read) == 5


def test_a_pickle_holds_paths_alone(pngs):
    paths, images, _ = pngs
    X = ImageFiles(paths)
    X.take(np.arange(60))
    held = pickle.dumps(X[10:20])
    assert len(held) < 100 * len(paths) + 3000
    copy = pickle.loads(held)
    assert not copy._memory.images
    np.testing.assert_array_equal(copy.take(np.arange(10)), images[10:20])


def test_image_size_is_that_of_the_estimators(tmp_path):
    rng = np.random.default_rng(0)
    big = rng.integers(0, 255, (30, 40, 3)).astype(np.uint8)
    paths = [picture(tmp_path / "a.png", big), picture(tmp_path / "b.png", big[:20])]
    X = ImageFiles(paths, image_size=Resize(16, aspect="pad"))
    plain = read_images(SoftmaxClassifier(), [big, big[:20]], reset=True,
                        image_size=Resize(16, aspect="pad"))  # fmt: skip
    assert (X.shape, X.dtype, X.one_size) == ((2, 16, 16, 3), np.uint8, True)
    np.testing.assert_array_equal(
        np.moveaxis(X.take([0, 1]), -1, 1), plain.rows(np.arange(2)).numpy()
    )
    mixed = ImageFiles(paths)
    assert not mixed.one_size
    images = read_images(SoftmaxClassifier(), mixed, reset=True,
                         image_size=Resize(16, aspect="pad"))  # fmt: skip
    np.testing.assert_array_equal(images.rows(np.arange(2)), plain.rows(np.arange(2)))
    with pytest.raises(ValueError, match=r"row 1 \(.*b\.png'\) has shape \(20, 40, 3\)"):
        read_images(SoftmaxClassifier(), mixed, reset=True).rows(np.arange(2))


# ---------------------------------------------------------------- on disk


def test_a_cache_is_built_once_and_found_again(pngs, tmp_path, monkeypatch):
    paths, images, _ = pngs
    folder = tmp_path / "cache"
    X = ImageFiles(paths, cache=folder)
    assert not folder.exists()  # nothing before it is asked for
    np.testing.assert_array_equal(X[[7, 3]].take(np.arange(2)), images[[7, 3]])
    (cached,) = folder.glob("*.npy")
    np.testing.assert_array_equal(MappedImages(cached).take(np.arange(60)), images)
    monkeypatch.setattr(files_module, "read_file", None)
    for again in (ImageFiles(paths, cache=folder), pickle.loads(pickle.dumps(X[:5]))):
        np.testing.assert_array_equal(again[4], images[4])
    assert not X._memory.images
    assert not list(folder.glob("*.tmp"))


def test_of_several_readers_one_builds_the_cache(pngs, tmp_path, monkeypatch):
    paths, images, _ = pngs
    read = []
    plain = files_module.read_file
    monkeypatch.setattr(
        files_module, "read_file", lambda path, *rest: read.append(path) or plain(path, *rest)
    )
    readers = [ImageFiles(paths, cache=tmp_path / "cache") for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda X: X.take(np.arange(60)), readers))
    for several in found:
        np.testing.assert_array_equal(several, images)
    assert len(read) == 60


def test_a_cache_knows_files_and_options(pngs, tmp_path):
    paths, images, _ = pngs
    folder = tmp_path / "cache"
    for options in ({}, {"mode": "L"}, {"image_size": 8}):
        ImageFiles(paths, cache=folder, **options)[0]
    assert len(list(folder.glob("*.npy"))) == 3
    twice = ImageFiles([*paths, paths[0]], cache=folder)
    np.testing.assert_array_equal(twice[60], images[0])
    X = ImageFiles(paths, cache=folder, mode="L", image_size=5)
    picture(paths[0], images[1])
    os.utime(paths[0], (1, 1))
    with pytest.raises(ValueError, match="have changed"):
        X[0]
    np.testing.assert_array_equal(ImageFiles(paths, cache=folder)[0], images[1])


def test_a_broken_file_leaves_no_cache(tmp_path):
    good = picture(tmp_path / "good.png", noisy())
    bad = cut(picture(tmp_path / "bad.png", noisy()))
    X = ImageFiles([good, bad], cache=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"Row 1 of X .*bad\.png"):
        X.take([0])
    assert not list((tmp_path / "cache").glob("*.npy"))
    with pytest.raises(ValueError, match="one size"):
        ImageFiles([good, picture(tmp_path / "x.png", GRAY)], cache=tmp_path)


def test_a_cut_cache_says_so(pngs, tmp_path):
    paths = pngs[0]
    X = ImageFiles(paths, cache=tmp_path / "cache")
    X[0]
    cut(next((tmp_path / "cache").glob("*.npy")))
    with pytest.raises(ValueError, match="is cut off: remove it"):
        X.take([59])


# ---------------------------------------------------------------- paths as X


def shapes_of_paths(paths):
    texts = [str(path) for path in paths]
    return {
        "list": texts,
        "tuple of Path": tuple(paths),
        "array": np.array(texts),
        "array of objects": np.array(paths, dtype=object),
        "series": pd.Series(texts, index=range(5, 5 + len(texts))),
        "frame": pd.DataFrame({"path": texts}),
        "files": ImageFiles(paths),
    }


@pytest.mark.parametrize(
    "kind", ["list", "tuple of Path", "array", "array of objects", "series", "frame", "files"]
)
def test_paths_are_images_to_fit_and_to_predict(pngs, kind):
    paths, images, y = pngs
    X = shapes_of_paths(paths)[kind]
    in_memory = SoftmaxClassifier(**SMALL).fit(images, y)
    clf = SoftmaxClassifier(**SMALL).fit(X, y)
    expected = in_memory.predict_proba(images)
    np.testing.assert_array_equal(clf.predict_proba(X), expected)
    np.testing.assert_array_equal(in_memory.predict_proba(X), expected)
    np.testing.assert_array_equal(clf.predict_proba(images), expected)
    assert clf.file_options_["mode"] == "RGB"
    assert in_memory.file_options_ is None


def test_paths_are_read_as_in_fit(tmp_path, pngs):
    paths, images, y = pngs
    X = ImageFiles(paths, image_size=8)
    clf = SoftmaxClassifier(**SMALL).fit(X, y)
    expected = clf.predict_proba(X)
    np.testing.assert_array_equal(clf.predict_proba([str(path) for path in paths]), expected)
    gray = picture(tmp_path / "gray.png", images[0][..., 0])
    assert clf.predict([gray]).shape == (1,)  # gray is RGB here, as in fit
    copy = pickle.loads(pickle.dumps(clf))
    np.testing.assert_array_equal(copy.predict_proba(paths), expected)


def test_estimators_resize_files_as_they_resize_arrays(pngs):
    paths, images, y = pngs
    clf = SoftmaxClassifier(**SMALL, image_size=8)
    expected = clf.fit(images, y).predict_proba(images)
    np.testing.assert_array_equal(clf.fit(paths, y).predict_proba(paths), expected)
    assert clf.file_options_["image_size"] is None


def test_options_are_saved(tmp_path, pngs):
    pytest.importorskip("safetensors")
    from sklearn_medimb.persistence import load, save

    paths, _, y = pngs
    clf = SoftmaxClassifier(**SMALL).fit(ImageFiles(paths, image_size=Resize(8, "pad")), y)
    save(clf, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    assert again.file_options_["image_size"].aspect == "pad"
    np.testing.assert_array_equal(again.predict_proba(paths), clf.predict_proba(paths))


@pytest.mark.parametrize(
    "options", [{"cache": "/tmp"}, {"mode": "x"}, {"frames": -1}, {"image_size": 10**6}]
)
def test_a_file_of_a_model_cannot_say_more_than_how_to_read(tmp_path, pngs, options):
    pytest.importorskip("safetensors")
    from sklearn_medimb.persistence import load, save

    paths, _, y = pngs
    path = tmp_path / "model.safetensors"
    save(SoftmaxClassifier(**SMALL).fit(paths, y), path)
    known = {"mode": "RGB", "image_size": None, "window": None, "spacing": None, "frames": "all"}
    for given, refused in ((known, False), ({**known, **options}, True)):
        forged(path, set_state("file_options_", {"dict": [[k, v] for k, v in given.items()]}))
        with pytest.raises(ValueError) if refused else nullcontext():
            load(path)


def test_a_path_among_other_things_is_refused(pngs):
    paths, _, y = pngs
    X = [*paths[:-1], 3.5]
    with pytest.raises(TypeError, match=r"Row 59 of X must be the path"):
        SoftmaxClassifier(**SMALL).fit(X, y)
    with pytest.raises(ValueError, match=r"Row 1 .*nowhere\.png"):
        SoftmaxClassifier(**SMALL).fit([paths[0], "nowhere.png"], y[:2])


def test_a_sampler_takes_paths(pngs):
    paths, images, y = pngs
    sampler = SPMixSampler(random_state=0)
    expected, y_expected = sampler.fit_resample(images, y)
    found, y_found = sampler.fit_resample([str(path) for path in paths], y)
    np.testing.assert_array_equal(y_found, y_expected)
    np.testing.assert_array_equal([found[k] for k in range(len(found))], expected)


def test_volumes_of_files_need_no_further_word(tmp_path):
    rng = np.random.default_rng(0)
    paths = [
        nifti(tmp_path / f"{k}.nii.gz", rng.integers(0, 99, (8, 9, 10)).astype(np.uint8))
        for k in range(8)
    ]
    clf = SoftmaxClassifier(**SMALL).fit(ImageFiles(paths), [0, 1] * 4)
    assert clf.image_shape_ == (1, 10, 9, 8)
    assert clf.predict(paths).shape == (8,)


@pytest.mark.parametrize("module", ["PIL.Image", "pydicom", "nibabel"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, module):
    path = {
        "PIL.Image": lambda: picture(tmp_path / "x.png", GRAY),
        "pydicom": lambda: dicom(tmp_path / "x.dcm", FILM),
        "nibabel": lambda: nifti(tmp_path / "x.nii", np.ones((4, 4, 4))),
    }[module]()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install .sklearn_medimb\[files\]"):
        ImageFiles([path])


def test_reading_writes_nothing_and_warns_of_nothing(tmp_path):
    path = picture(tmp_path / "x.png", GRAY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        X = ImageFiles([path], image_size=4)
        image = X[0]
    image[:] = 0  # what was given out is the caller's
    assert X[0].any()
    assert sorted(tmp_path.iterdir()) == [path]
    assert "x.png" not in repr(X)
    buffer = io.BytesIO()
    np.save(buffer, X.take([0]))
    assert buffer.tell()


# ---------------------------------------------------------------- data sets of others


class Columns:
    """What estimators see of a data set of Hugging Face, whose items are decoded on demand."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels
        self.column_names, self.features = ["label", "image"], {"label": None, "image": None}
        self.shape = len(images), 2

    def with_format(self, kind):
        raise AssertionError("nobody asked for another format")

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        if key == "label":
            return self.labels
        assert type(key) is int
        return {"label": self.labels[key], "image": Image.fromarray(self.images[key])}


class Volumes(torch.utils.data.Dataset):
    """What MONAI's data sets give: dictionaries with tensors, channels first."""

    class Meta(torch.Tensor):
        pass

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        tensor = torch.from_numpy(np.ascontiguousarray(np.moveaxis(self.images[key], -1, 0)))
        return {"image": tensor.as_subclass(self.Meta), "label": 0, "image_meta_dict": {}}


@pytest.mark.parametrize("kind", ["columns", "dictionaries"])
def test_data_sets_of_others_are_images(pngs, kind):
    _, images, y = pngs
    X = Columns(images, y) if kind == "columns" else Volumes(images)
    expected = SoftmaxClassifier(**SMALL).fit(images, y).predict_proba(images)
    clf = SoftmaxClassifier(**SMALL, early_stopping=False).fit(X, y)
    np.testing.assert_array_equal(clf.predict_proba(X), expected)
    scores = cross_val_score(clf, DatasetImages(X), y, cv=2, error_score="raise")
    assert np.isfinite(scores).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda **how: SoftmaxClassifier(**how),
        lambda **how: CSSNClassifier(**how),
        lambda **how: SPMixClassifier(**how),
        lambda **how: SSLEncoder("byol", **how),
    ],
    ids=["softmax", "cssn", "spmix", "byol"],
)
def test_every_training_says_what_comes_next(make, pngs, monkeypatch):
    said = []
    plain = ImageFiles.expect
    monkeypatch.setattr(
        ImageFiles, "expect", lambda self, rows: (said.append(len(rows)), plain(self, rows))[1]
    )
    paths, _, y = pngs
    made = make(backbone=ConvNet(widths=(4, 8)), max_epochs=1, batch_size=8, random_state=0)
    made.fit(ImageFiles(paths), y)
    assert said
