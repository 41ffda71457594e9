"""Image files to pixels: what a header says, and the pixels behind it, for each kind of file."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, BinaryIO

import numpy as np

from sklearn_medimb._data.headers import BadFileError, Decoded, Header, Window

MAX_VALUES = 2**28  # of one file: what needs more is a mistake, or made to fill the memory
_CALIBRATED = ("CT", "PT")  # modalities whose values mean the same in every file


def decode(file: Any, *, window: Window | None, frames: str | int) -> Decoded:
    """Read the header of an open file, by what it holds and not by its name.

    Parameters
    ----------
    file : binary file
        Open while pixels are read.
    window : tuple of float or None
        Centre and width that values of more than eight bits are shown in.
    frames : "all", "middle" or int
        Which frames of a file that has several.

    Raises
    ------
    ValueError
        If it is no image, a damaged one or too large; the message is the rest of a sentence that
        begins with the file, and tells nothing of what the file says about a patient.
    ImportError
        If a package is missing.
    """
    start = file.read(352)
    file.seek(0)
    if not start:
        raise BadFileError("is empty.")
    if start[:6] == b"\x93NUMPY":
        return _guarded(_array, ".npy", file, window, frames)
    if start[:2] == b"\x1f\x8b":
        file = gzip.GzipFile(fileobj=file)
        try:
            start = file.read(352)
        except (OSError, EOFError, zlib.error) as error:
            raise BadFileError(f"is a damaged gzip file ({error}).") from None
        file.seek(0)
        if not _is_nifti(start):
            raise BadFileError("is packed with gzip and no NIfTI volume: unpack it.")
    if _is_nifti(start):
        return _guarded(_nifti, "NIfTI", file, window, frames)
    if start[128:132] == b"DICM":
        return _guarded(_dicom, "DICOM", file, window, frames)
    if start[:4] == b"PK\x03\x04":
        raise BadFileError("is an archive: unpack the images in it.")
    pillow = _library("PIL.Image", "pillow")
    try:
        image = pillow.open(file)
    except pillow.DecompressionBombError as error:
        raise BadFileError(f"is too large: {error}") from None
    except pillow.UnidentifiedImageError:
        file.seek(0)
        if start[:2] in (b"\x08\x00", b"\x02\x00") or start[:4] == b"\x00\x08\x00\x05":
            return _guarded(_dicom, "DICOM", file, window, frames)  # without preamble
        raise BadFileError(
            "is none of the image files that are read: PNG, JPEG, TIFF, WebP and others of Pillow, "
            "DICOM, NIfTI, .npy."
        ) from None
    except Exception as error:
        raise BadFileError(f"is a damaged picture ({type(error).__name__}: {error}).") from None
    return _guarded(_picture, image.format, image, window, frames)


def _guarded(
    read: Callable[..., Decoded], kind: str, file: Any, window: Window | None, frames: Any
) -> Decoded:
    """Read a header, and have errors of the libraries, then and later, say what is damaged."""
    header, pixels = _told(kind, read, file, window, frames)
    return header, partial(_told, kind, pixels)


def _told(kind: str, read: Callable[..., Any], *args: Any) -> Any:
    try:
        return read(*args)
    except (BadFileError, ImportError, MemoryError):
        raise
    except Exception as error:
        # What pydicom says may quote the file, and with it a name.
        why = "" if kind == "DICOM" else f": {error}"
        raise BadFileError(f"is a damaged {kind} file ({type(error).__name__}{why}).") from None


def _is_nifti(start: bytes) -> bool:
    return start[344:348] in (b"n+1\0", b"ni1\0") or start[4:8] in (b"n+2\0", b"ni2\0")


def _library(name: str, package: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f'needs the package {package}: pip install "sklearn_medimb[files]".'
        ) from error


# ---------------------------------------------------------------- pictures


def _picture(image: Any, window: Window | None, frames: str | int) -> Decoded:
    """PNG, JPEG, TIFF, WebP, BMP, GIF, ...: Pillow.

    What is transparent lies on black. Palettes, inks and other codes of colours become red, green
    and blue; profiles of colour are not applied.
    """
    tiff = image.format == "TIFF"
    page = _frame(frames, image.n_frames if tiff else 1)
    n_pages = image.n_frames if page is None else 1
    if page:
        image.seek(page)
    mode = _mode(image)
    plane = _sides(image)
    sides = plane if page is not None else (n_pages, *plane)
    _check_size(sides, 4)

    def pixels() -> np.ndarray:
        if page is not None:
            return _upright(image, mode, window)
        pages = []
        for k in range(n_pages):
            image.seek(k)
            if _sides(image) != plane or _mode(image) != mode:
                raise BadFileError("has pages of several sizes or modes: choose one by frames=.")
            pages.append(_upright(image, mode, window))
        return np.stack(pages)

    colour = mode == "RGB"
    whole = mode != "F" or window is not None
    return Header(sides, 3 if colour else 1, whole, colour), pixels


def _orientation(image: Any) -> int:
    """EXIF's, as far as it comes before the pixels."""
    if image.format == "TIFF":
        return image.tag_v2.get(0x0112, 1)
    if not any("exif" in str(key) or "xmp" in str(key) for key in image.info):
        return 1
    return _library("PIL.Image", "pillow").Image.getexif(image).get(0x0112, 1)


def _sides(image: Any) -> tuple[int, ...]:
    """Height and width of the upright picture."""
    width, height = image.size
    if image.format == "TIFF":  # some versions of Pillow have turned the size already
        width, height = image.tag_v2.get(0x0100, 0), image.tag_v2.get(0x0101, 0)
    return (width, height) if _orientation(image) in (5, 6, 7, 8) else (height, width)


def _mode(image: Any) -> str:
    """What a picture becomes: "L", "RGB", or "F" where it has more than eight bits."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return "F"
    if image.mode in ("P", "PA"):
        return "L" if _is_gray(image.palette) else "RGB"
    return "L" if image.mode in ("1", "L", "LA", "La") else "RGB"


def _is_gray(palette: Any) -> bool:
    """Whether a palette, as the header has it, holds shades of gray only."""
    order = palette.rawmode or palette.mode
    colours = np.frombuffer(bytes(palette.palette), np.uint8)
    planes = order.endswith(";L")
    colours = colours.reshape(3, -1).T if planes else colours.reshape(-1, len(order))[:, :3]
    return bool((colours == colours[:, :1]).all())


def _upright(image: Any, mode: str, window: Window | None) -> np.ndarray:
    if image.format != "TIFF" and _orientation(image) != 1:  # Pillow turns TIFFs as it loads them
        image = _library("PIL.ImageOps", "pillow").exif_transpose(image)
    if mode == "F":
        return _values(np.asarray(image), window)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        black = _library("PIL.Image", "pillow").new("RGBA", image.size, (0, 0, 0, 255))
        black.alpha_composite(image)
        image = black
    return np.asarray(image if image.mode == mode else image.convert(mode))


# ---------------------------------------------------------------- NumPy


def _array(file: Any, window: Window | None, frames: str | int) -> Decoded:
    """A ``.npy`` file: ``(H, W)``, ``(H, W, C)``, ``(C, H, W)``, else a volume ``(D, H, W)``.

    Channels are one or three.
    """
    version = np.lib.format.read_magic(file)
    read: Any = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, _, dtype = read[version](file)
    if dtype.kind not in "buif":
        raise BadFileError(f"holds an array of {dtype.kind!r} ({dtype.name}), not of numbers.")
    if len(shape) not in (2, 3):
        raise BadFileError(f"holds an array of shape {shape}: one image, or one volume, is read.")
    _check_size(shape, dtype.itemsize)
    start = file.tell()
    n_bytes = file.seek(0, 2) - start
    if n_bytes < math.prod(shape) * dtype.itemsize:
        raise BadFileError(
            f"is cut off: an array of shape {shape} needs more than {n_bytes} bytes."
        )
    last = len(shape) == 3 and shape[-1] in (1, 3)
    first = len(shape) == 3 and shape[0] in (1, 3)
    if first and last:
        raise BadFileError(f"holds an array of shape {shape}: which axis holds the channels?")
    sides = shape[:-1] if last else shape[1:] if first else shape
    channels = shape[-1] if last else shape[0] if first else 1
    is_volume = len(sides) == 3
    chosen = _frame(frames, sides[0] if is_volume else 1)
    small = dtype in (np.uint8, np.bool_)

    def pixels() -> np.ndarray:
        file.seek(0)
        array = np.lib.format.read_array(file, allow_pickle=False)
        array = np.moveaxis(array, 0, -1) if first else array
        array = array[..., 0] if channels == 1 and (first or last) else array
        if is_volume and chosen is not None:
            array = array[chosen]
        if dtype.kind == "b":
            return array * np.uint8(255)
        return array if small else _values(array, window)

    if is_volume and chosen is not None:
        sides = sides[1:]
    return Header(sides, channels, small or window is not None, channels == 3), pixels


# ---------------------------------------------------------------- NIfTI


def _nifti(file: Any, window: Window | None, frames: str | int) -> Decoded:
    """A NIfTI volume ``(D, H, W)``: feet to head, back to front, left to right.

    This is the closest canonical orientation (RAS+) with its axes in reverse. Several volumes in a
    file are channels.
    """
    nibabel = _library("nibabel", "nibabel")
    start = file.read(352)
    file.seek(0)
    if b"ni1\0" in start[344:348] or start[4:8] == b"ni2\0":
        raise BadFileError("is the header of a pair of files (.hdr, .img): join them to one .nii.")
    second = start[4:8] == b"n+2\0"
    holder = nibabel.FileHolder(fileobj=file)
    cls = nibabel.Nifti2Image if second else nibabel.Nifti1Image
    block = file.read(cls.header_class.template_dtype.itemsize)
    file.seek(0)
    if not 0 <= cls.header_class(block, check=False)["vox_offset"] <= MAX_VALUES // 4:
        raise BadFileError("says that its pixels begin far behind its header.")
    volume = cls.from_file_map({"header": holder, "image": holder}, mmap=False)
    shape = tuple(int(side) for side in volume.shape)
    dtype = volume.get_data_dtype()
    _check_size(shape, max(dtype.itemsize, 4))
    grid = (*shape, 1, 1)[:3]
    others = [side for side in shape[3:] if side > 1]
    if len(others) > 1:
        raise BadFileError(f"holds an array of shape {shape}: more than volumes and channels.")
    turns = nibabel.orientations.io_orientation(volume.affine)
    if not np.isfinite(turns).all():
        raise BadFileError("has an affine matrix that gives no orientation.")
    order = np.argsort(turns[:, 0])
    zooms = (*(float(zoom) for zoom in volume.header.get_zooms()), 1.0, 1.0)[:3]
    sides = tuple(grid[axis] for axis in order[::-1])
    spacing = tuple(zooms[axis] for axis in order[::-1])
    colour = dtype.names is not None
    scaled = volume.dataobj.slope != 1 or volume.dataobj.inter != 0
    small = colour or (dtype == np.uint8 and not scaled and window is None)
    page = _frame(frames, sides[0]) if frames != "all" else None

    def pixels() -> np.ndarray:
        array = np.asanyarray(volume.dataobj)
        if colour:
            array = np.stack([array[name] for name in ("R", "G", "B")], axis=-1)
        array = array.reshape(*grid, *(others or ([3] if colour else [])))
        array = nibabel.orientations.apply_orientation(array, turns)
        array = array.swapaxes(0, 2)
        if page is not None:
            array = array[page]
        return np.ascontiguousarray(array) if small else _values(array, window)

    channels = others[0] if others else 3 if colour else 1
    if page is not None:
        sides, spacing = sides[1:], spacing[1:]
    return Header(sides, channels, small or window is not None, colour, spacing), pixels


# ---------------------------------------------------------------- DICOM

# All that is read of a data set: nothing that tells who the patient is.
_TAGS = [
    "Modality", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "Rows",
    "Columns", "NumberOfFrames", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
    "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "VOILUTSequence", "WindowCenter",
    "WindowWidth", "VOILUTFunction", "PixelSpacing", "SpacingBetweenSlices", "SliceThickness",
    "RedPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableDescriptor",
    "BluePaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData",
    "GreenPaletteColorLookupTableData", "BluePaletteColorLookupTableData",
    "SegmentedRedPaletteColorLookupTableData", "SegmentedGreenPaletteColorLookupTableData",
    "SegmentedBluePaletteColorLookupTableData", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence", "ExtendedOffsetTable", "ExtendedOffsetTableLengths",
    "FloatPixelData", "DoubleFloatPixelData", "PixelData",
]  # fmt: skip
_DEFLATED = b"1.2.840.10008.1.2.1.99"


def _dicom(file: BinaryIO, window: Window | None, frames: str | int) -> Decoded:
    """DICOM: pydicom.

    Colours become uint8. Gray values are those of the modality, inverted where MONOCHROME1 says
    that low ones are bright, and then

    - shown in `window`, if that is given: uint8;
    - of CT and PET left in their units, float32: a window of each file's own would take from them
      what makes files comparable;
    - of others shown in the file's own window or lookup table: uint8;
    - uint8 where the file has eight bits, and neither window nor rescaling; float32 else.
    """
    pydicom = _library("pydicom", "pydicom")
    start = file.read(2048)
    if _DEFLATED in start and file.seek(0, 2) > 4 * MAX_VALUES // 1032:  # zlib's best
        raise BadFileError(
            "is deflated and may fill the memory: save it in another transfer syntax."
        )
    file.seek(0)
    data = pydicom.dcmread(file, force=True, stop_before_pixels=True, specific_tags=_TAGS)
    if not data.get("Rows") or not data.get("Columns"):
        raise BadFileError("is a DICOM file without pixels.")
    n_frames = int(data.get("NumberOfFrames") or 1)
    page = _frame(frames, n_frames)
    sides = (int(data.Rows), int(data.Columns))
    _check_size(
        (n_frames if page is None else 1, *sides), 4 * int(data.get("SamplesPerPixel") or 1)
    )
    kind = str(data.get("PhotometricInterpretation", ""))
    colour = kind == "PALETTE COLOR" or int(data.get("SamplesPerPixel") or 1) == 3
    gray = _Gray.of(data, kind, window)
    syntax = data.file_meta.get("TransferSyntaxUID")
    _check_decoder(pydicom, syntax)

    def pixels() -> np.ndarray:
        file.seek(0)
        whole = pydicom.dcmread(file, force=True, specific_tags=_TAGS)
        if syntax is None:  # pydicom has found out, and wants to be told
            (implicit, little), uid = whole.original_encoding, pydicom.uid
            explicit = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
            whole.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else explicit
        try:
            array = pydicom.pixels.pixel_array(whole, index=page)
        except RuntimeError:
            name = syntax.name if syntax else "nobody knows what"
            raise BadFileError(
                f"holds pixels, compressed as {name}, that could not be decoded: they are damaged, "
                'or need another decoder (pip install "pylibjpeg[all]").'
            ) from None
        if kind == "PALETTE COLOR":
            array = pydicom.pixels.apply_color_lut(array, whole)
            return (array >> 8 if array.dtype == np.uint16 else array).astype(np.uint8)
        if colour:
            return (array >> max(0, int(whole.BitsStored) - 8)).astype(np.uint8)
        return gray.shown(pydicom, array, whole, page)

    spacing = _spacing(data, page is None)
    shape = sides if page is not None else (n_frames, *sides)
    return Header(shape, 3 if colour else 1, colour or gray.whole, colour, spacing), pixels


def _check_decoder(pydicom: Any, syntax: Any) -> None:
    """Refuse compressed pixels that no installed package reads."""
    if syntax is None or not syntax.is_compressed or not syntax.is_encapsulated:
        return
    try:
        available = pydicom.pixels.get_decoder(syntax).is_available
    except NotImplementedError:
        raise BadFileError(
            f"holds pixels in a form that pydicom does not read: {syntax.name}."
        ) from None
    if not available:
        raise ImportError(
            f'holds pixels compressed as {syntax.name}: pip install "pylibjpeg[all]" reads them.'
        )


@dataclass(frozen=True)
class _Gray:
    """How gray values of a DICOM file are shown.

    Attributes
    ----------
    inverted : bool
        Whether low values are bright.
    bits, signed : int, bool
        Of a stored value.
    window : tuple of float or None
        The caller's.
    own : bool
        Whether the file's own window or table is applied.
    whole : bool
        Whether the result is uint8.
    """

    inverted: bool
    bits: int
    signed: bool
    window: Window | None
    own: bool
    whole: bool

    @classmethod
    def of(cls, data: Any, kind: str, window: Window | None) -> _Gray:
        bits = int(data.get("BitsStored") or data.get("BitsAllocated") or 8)
        signed = bool(data.get("PixelRepresentation") or 0)
        rescaled = "ModalityLUTSequence" in data or _rescaling(data, 0) != (1.0, 0.0)
        calibrated = str(data.get("Modality", "")) in _CALIBRATED and bits > 8
        own = window is None and not calibrated and (_has_table(data) or bool(_window_of(data, 0)))
        small = bits <= 8 and not signed and not rescaled and not calibrated
        whole = window is not None or own or small
        return cls(kind == "MONOCHROME1", bits, signed, window, own, whole)

    def shown(self, pydicom: Any, stored: np.ndarray, data: Any, page: int | None) -> np.ndarray:
        """Stored values of one frame, or of all, as they are given out."""
        if self.inverted and not self.own and stored.dtype.kind in "iu":
            stored = (-1 if self.signed else 2**self.bits - 1) - stored.astype(np.int64)
        if self.whole and not self.own and self.window is None:
            return np.rint(stored * (255 / (2**self.bits - 1))).astype(np.uint8)
        if page is not None:
            return self._frame(pydicom, stored, data, page)
        return np.stack([self._frame(pydicom, part, data, k) for k, part in enumerate(stored)])

    def _frame(self, pydicom: Any, stored: np.ndarray, data: Any, k: int) -> np.ndarray:
        if "ModalityLUTSequence" in data:
            values = pydicom.pixels.apply_modality_lut(stored, data)
        else:
            slope, intercept = _rescaling(data, k)
            values = stored.astype(np.float64) * slope + intercept
        if not self.own:
            return _values(values, self.window)
        if _has_table(data):
            bits = int(data.VOILUTSequence[0].LUTDescriptor[2])
            table = pydicom.pixels.apply_voi(values.astype(np.int64), data)
            display = np.rint(table * (255 / (2**bits - 1))).clip(0, 255).astype(np.uint8)
        else:
            found = _window_of(data, k)
            assert found is not None
            display = _display(values, *found)
        return 255 - display if self.inverted else display


def _element(data: Any, name: str, group: str, k: int) -> Any:
    """An element of a frame: of the file, or where files of several frames keep it."""
    holders = [data]
    each = data.get("PerFrameFunctionalGroupsSequence") or []
    for groups in [*each[k : k + 1], *(data.get("SharedFunctionalGroupsSequence") or [])[:1]]:
        holders += (groups.get(group) or [])[:1]
    values = (holder.get(name) for holder in holders)
    found = next((value for value in values if value is not None and value != ""), None)
    if found is None or isinstance(found, str) or not hasattr(found, "__len__"):
        return found
    return found[0] if len(found) else None


def _rescaling(data: Any, k: int) -> tuple[float, float]:
    found = [
        _element(data, name, "PixelValueTransformationSequence", k)
        for name in ("RescaleSlope", "RescaleIntercept")
    ]
    slope, intercept = found
    return float(1 if slope is None else slope), float(intercept or 0)


def _has_table(data: Any) -> bool:
    table = data.get("VOILUTSequence")
    return bool(table) and "LUTDescriptor" in table[0] and "LUTData" in table[0]


def _window_of(data: Any, k: int) -> tuple[float, float, str] | None:
    """The first window of a frame, and its function."""
    names = ("WindowCenter", "WindowWidth", "VOILUTFunction")
    centre, width, function = (_element(data, name, "FrameVOILUTSequence", k) for name in names)
    function = str(function or "LINEAR")
    if centre is None or width is None or not float(width) >= (1 if function == "LINEAR" else 1e-9):
        return None
    return float(centre), float(width), function


def _spacing(data: Any, volume: bool) -> tuple[float, ...] | None:
    holder, group = data, "PixelMeasuresSequence"
    for groups in (data.get("SharedFunctionalGroupsSequence") or [])[:1]:
        if "PixelSpacing" not in data and groups.get(group):
            holder = groups.get(group)[0]
    between = holder.get("PixelSpacing")
    if between is None or len(between) != 2:
        return None
    plane = tuple(float(step) for step in between)
    depth = holder.get("SpacingBetweenSlices") or holder.get("SliceThickness")
    if not volume:
        return plane
    return None if depth is None else (abs(float(depth)), *plane)


# ---------------------------------------------------------------- values


def _frame(frames: str | int, n: int) -> int | None:
    """Which of n frames; None for all of several."""
    if frames == "all":
        return 0 if n == 1 else None
    k = n // 2 if frames == "middle" else int(frames)
    if k >= n:
        raise BadFileError(
            f"has {n} {'frame' if n == 1 else 'frames'}: frames={k} is none of them."
        )
    return k


def _check_size(shape: Sequence[int], n_bytes: int) -> None:
    """Refuse what no image is, before any memory is asked for."""
    if min(shape, default=0) < 1:
        raise BadFileError(f"says that its pixels have shape {tuple(shape)}.")
    if math.prod(shape) > MAX_VALUES or math.prod(shape) * n_bytes > 8 * MAX_VALUES:
        raise BadFileError(
            f"says that its pixels have shape {tuple(shape)}: more than {MAX_VALUES:,} values, "
            "which are not read."
        )


def _values(values: np.ndarray, window: Window | None) -> np.ndarray:
    """Values in their units, as float32, or as a window shows them."""
    if window is None:
        with np.errstate(over="ignore"):
            values = values.astype(np.float32)
        if not np.isfinite(values).all():
            raise BadFileError(
                "holds values that are no finite numbers: replace them, or set window=, in which "
                "NaN is black."
            )
        return values
    return _display(values, *window, "LINEAR_EXACT")


def _display(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """Gray levels from 0 to 255 of values in a window (DICOM PS3.3, C.11.2.1.2 and 3)."""
    offset = values.astype(np.float64) - centre
    if function == "SIGMOID":
        share = 1 / (1 + np.exp(np.clip(-4 * offset / width, -700, 700)))
    elif function == "LINEAR_EXACT":
        share = offset / width + 0.5
    elif width > 1:
        share = (offset + 0.5) / (width - 1) + 0.5
    else:
        share = (offset > -0.5).astype(np.float64)
    return np.rint(255 * np.nan_to_num(share).clip(0, 1)).astype(np.uint8)
