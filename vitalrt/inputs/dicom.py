"""DICOM files -> one RGB picture, shown as the file says it should be (PS3.3 C.7.6.3, C.11).

Only the attributes in `_KEYWORDS` are kept while a file is read: none describes a patient, a study or a device. Errors
never quote a value of the file, nor chain to the reader's own error, which might.
"""

from __future__ import annotations

import io
import zlib

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.filereader import read_dataset, read_preamble
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut
from pydicom.pixels.utils import as_pixel_options
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000TransferSyntaxes,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
)

from vitalrt.errors import InputError
from vitalrt.inputs import options as limits
from vitalrt.inputs.dicom_gray import gray_to_uint8
from vitalrt.inputs.options import ReadOptions
from vitalrt.inputs.pixels import as_rgb, check_size, uint16_to_uint8, unit_to_uint8

_KEYWORDS = (
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("ModalityLUTSequence", "RescaleIntercept", "RescaleSlope"),
    *("VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *(f"{color}PaletteColorLookupTableDescriptor" for color in ("Red", "Green", "Blue")),
    *(f"{kind}{color}PaletteColorLookupTableData" for kind in ("", "Segmented") for color in ("Red", "Green", "Blue")),
    *("PixelData", "FloatPixelData", "DoubleFloatPixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
)
_PIXEL_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")

_PACKAGES = {
    **dict.fromkeys([*JPEGTransferSyntaxes, *JPEGLSTransferSyntaxes], "pylibjpeg pylibjpeg-libjpeg"),
    **dict.fromkeys(JPEG2000TransferSyntaxes, "pylibjpeg pylibjpeg-openjpeg"),
}
"""What to install where pydicom's Pillow plug-in does not do; it needs nothing more for the other transfer syntaxes."""


def read_dicom(data: bytes, options: ReadOptions, label: str) -> np.ndarray:
    """The bytes of a DICOM file, with or without preamble and file meta information -> uint8 RGB [H, W, 3].

    Grey images go through rescale or modality table, the chosen view (see `dicom_gray`) and MONOCHROME1 inversion.
    Colour (RGB, YBR, palette) takes no window; its bits stored are scaled to 8.
    Compressed files are decoded by pydicom's plug-ins; a missing one is an error with the packages to install.
    Raises InputError, as for a truncated file, a frame that is not there, or a file without an image.
    """
    options.refuse(label, "DICOM", "slice_index", "axis")
    try:
        return _read(data, options, label)
    except InputError:
        raise
    except Exception as error:  # pydicom and its plug-ins raise whatever their parsers trip over
        kind = type(error).__name__
    # Raised out here, so that no __context__ carries the reader's error.
    raise InputError(f"{label}: damaged, truncated or not supported as DICOM ({kind})")


def _read(data: bytes, options: ReadOptions, label: str) -> np.ndarray:
    _refuse_inflation_bomb(data, label)
    dataset = dcmread(io.BytesIO(data), force=True, specific_tags=list(_KEYWORDS))
    if not any(keyword in dataset for keyword in _PIXEL_KEYWORDS):
        raise InputError(f"{label}: this DICOM file holds no image (a report, plan or waveform, or it was cut short)")
    frame = options.frame or 0
    _lift_functional_groups(dataset, frame)
    check_size(label, int(dataset.get("Columns") or 0), int(dataset.get("Rows") or 0))
    num_frames = int(dataset.get("NumberOfFrames") or 1)
    if frame >= num_frames:
        raise InputError(f"{label}: frame={frame} is out of range, the file holds {num_frames}")

    syntax = _transfer_syntax(dataset)
    stored, photometric, bits_stored = _decode_frame(dataset, syntax, frame, label)
    if photometric in ("MONOCHROME1", "MONOCHROME2"):
        gray = gray_to_uint8(dataset, stored, bits_stored, syntax.is_little_endian, options.window, label)
        return as_rgb(255 - gray if photometric == "MONOCHROME1" else gray)
    options.refuse(label, "a colour DICOM image", "window")
    if photometric == "PALETTE COLOR":
        stored = apply_color_lut(stored, dataset)
        return as_rgb(uint16_to_uint8(stored) if stored.dtype.itemsize == 2 else stored)
    if photometric == "RGB":
        is_plain = stored.dtype == np.uint8 and bits_stored == 8
        return stored if is_plain else unit_to_uint8(stored / float(2**bits_stored - 1))
    raise InputError(f"{label}: expected grey, RGB, YBR or palette colours, got another photometric interpretation")


def _refuse_inflation_bomb(data: bytes, label: str) -> None:
    """pydicom inflates a deflated file whole: find out first, in bounded memory, how large that would be."""
    stream = io.BytesIO(data)
    read_preamble(stream, force=True)
    meta = read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
    if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        num_bytes, chunk = 0, stream.read()
        while chunk and num_bytes <= limits.MAX_FILE_BYTES:
            num_bytes += len(inflater.decompress(chunk, 1 << 24))
            chunk = inflater.unconsumed_tail
        if num_bytes > limits.MAX_FILE_BYTES:
            raise InputError(f"{label}: inflates to more than the limit of {limits.MAX_FILE_BYTES:,} bytes")


def _lift_functional_groups(dataset: Dataset, frame: int) -> None:
    """Enhanced multi-frame files keep rescale and window per frame: copy the ones of `frame` up, in place."""
    groups = [*(dataset.get("SharedFunctionalGroupsSequence") or [])[:1]]
    groups += [*(dataset.get("PerFrameFunctionalGroupsSequence") or [])[frame : frame + 1]]
    for group in groups:
        for macro in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            for item in (group.get(macro) or [])[:1]:
                dataset.update(item)


def _transfer_syntax(dataset: Dataset) -> UID:
    """The file's transfer syntax; where the file does not say, the encoding that pydicom found it to be in."""
    if "TransferSyntaxUID" not in dataset.file_meta:
        is_implicit, is_little_endian = dataset.original_encoding
        guess = ImplicitVRLittleEndian if is_implicit else ExplicitVRLittleEndian
        dataset.file_meta.TransferSyntaxUID = guess if is_little_endian else ExplicitVRBigEndian
    return UID(dataset.file_meta.TransferSyntaxUID)


def _decode_frame(dataset: Dataset, syntax: UID, frame: int, label: str) -> tuple[np.ndarray, str, int]:
    """One frame as stored, its photometric interpretation, and its bits stored.

    The frame is [H, W], or [H, W, 3] with YBR turned to RGB.
    """
    # A UID unknown to the standard is its own name: it could be any text that the file holds.
    name = f"transfer syntax {syntax.name}" if syntax.name != str(syntax) else "an unknown transfer syntax"
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        decoder = None
    if decoder is None:
        raise InputError(f"{label}: {name} cannot be decoded; convert the file to Explicit VR Little Endian")
    packages = _PACKAGES.get(syntax)
    if not decoder.is_available:
        raise InputError(f"{label}: {name} needs a decoder: pip install {packages}")
    try:
        array, properties = decoder.as_array(dataset, index=frame, **as_pixel_options(dataset))
        bits_stored = int(properties.get("bits_stored", properties["bits_allocated"]))
        return array, str(properties["photometric_interpretation"]), bits_stored
    except Exception:
        if packages is None or "pylibjpeg" in decoder.available_plugins:
            raise
    raise InputError(f"{label}: {name} could not be decoded: damaged, or another decoder may: pip install {packages}")
