"""Any picture a caller may hand over -> uint8 RGB.

What a file is, is decided by its content: names and extensions are never looked at.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vitalrt.errors import InputError
from vitalrt.inputs import options as limits
from vitalrt.inputs.arrays import read_array, read_tensor
from vitalrt.inputs.options import MAX_PIXELS, ReadOptions
from vitalrt.inputs.quiet import quietly
from vitalrt.inputs.raster import read_pil, read_raster

__all__ = ["MAX_PIXELS", "ReadOptions", "read_image", "read_images"]

ImageSource = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | np.ndarray | torch.Tensor

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_RASTER_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"GIF87a", b"GIF89a", *_TIFF_MAGIC)
_SUPPORTED = "PNG, JPEG, TIFF, BMP, WebP, GIF, DICOM or NIfTI"


def read_image(source: ImageSource, options: ReadOptions = ReadOptions(), *, name: str = "image") -> np.ndarray:
    """One picture -> uint8 RGB [H, W, 3], C-contiguous and not shared with `source`.

    source: a path; the bytes of a file; a PIL image; a numpy array [H, W] or [H, W, 1, 3 or 4]; a torch tensor [H, W]
        or [1, 3 or 4, H, W]. Arrays: uint8, uint16 (0..65535), bool, or floating point in 0..1.
    options: which frame, slice and window (see `ReadOptions`).
    name: what errors call this argument.

    EXIF orientation is applied. Transparency is laid over white. 16-bit greyscale PNG and TIFF map 0..65535 to 0..255
    (pass a window if the file uses less of it); 32-bit and floating-point TIFF, NIfTI, and DICOM without a view of its
    own map their 0.5th to 99.5th percentile. 16-bit colour PNG keeps its high bytes. For the rest see `read_dicom` and
    `read_nifti`.

    Raises InputError naming the source and the trouble. Files are named without their folder.
    """
    with quietly():  # PIL, pydicom and nibabel would quote text of the file
        if isinstance(source, (str, os.PathLike)):
            path = os.fsdecode(source)
            label = f"{name} {(Path(path).name or path)!r}"
            picture = _read_bytes(_load(path, label), options, label)
        elif isinstance(source, (bytes, bytearray, memoryview)):
            label = f"{name} (bytes)"
            _check_file_size(memoryview(source).nbytes, label)
            picture = _read_bytes(bytes(source), options, label)
        elif isinstance(source, Image.Image):
            picture = read_pil(source, options, f"{name} (PIL image)")
        elif isinstance(source, np.ndarray):
            picture = read_array(source, options, f"{name} (numpy array)")
        elif isinstance(source, torch.Tensor):
            picture = read_tensor(source, options, f"{name} (torch tensor)")
        else:
            kind = type(source).__name__
            raise InputError(f"{name}: expected a path, bytes, PIL image, numpy array or torch tensor, got {kind}")
    return np.array(picture, dtype=np.uint8, order="C")


def read_images(sources: Any, options: ReadOptions = ReadOptions()) -> list[np.ndarray]:
    """One source, a list or tuple of them, or None for no picture: each as read_image gives it."""
    listed = [] if sources is None else list(sources) if isinstance(sources, list | tuple) else [sources]
    return [
        read_image(source, options, name=f"image[{index}]" if len(listed) > 1 else "image")
        for index, source in enumerate(listed)
    ]


def _load(path: str, label: str) -> bytes:
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            trouble = "is a directory, expected a file"
        elif not stat.S_ISREG(status.st_mode):
            trouble = "is not an ordinary file"  # a pipe or a device would keep us waiting
        else:
            _check_file_size(status.st_size, label)
            return Path(path).read_bytes()
    except FileNotFoundError:
        trouble = "no such file"
    except PermissionError:
        trouble = "permission denied"
    except InputError:
        raise
    except (OSError, ValueError) as error:  # a name too long, or with a null byte
        trouble = f"cannot be opened ({getattr(error, 'strerror', None) or error})"
    raise InputError(f"{label}: {trouble}")


def _check_file_size(num_bytes: int, label: str) -> None:
    if num_bytes == 0:
        raise InputError(f"{label}: is empty (0 bytes)")
    if num_bytes > limits.MAX_FILE_BYTES:
        raise InputError(f"{label}: {num_bytes:,} bytes exceed the limit of {limits.MAX_FILE_BYTES:,} bytes")


def _read_bytes(data: bytes, options: ReadOptions, label: str) -> np.ndarray:
    # pydicom and nibabel are imported when first needed: together they take longer than all else here.
    if data[128:132] == b"DICM":  # before the others: its preamble may be made to look like a TIFF
        from vitalrt.inputs.dicom import read_dicom

        return read_dicom(data, options, label)
    if data.startswith(_RASTER_MAGIC) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
        return read_raster(data, options, label)

    from vitalrt.inputs.nifti import GZIP_MAGIC, is_nifti, read_nifti

    if data.startswith(GZIP_MAGIC) or is_nifti(data):
        return read_nifti(data, options, label)
    if _may_be_bare_dicom(data):
        from vitalrt.inputs.dicom import read_dicom

        return read_dicom(data, options, label)
    raise InputError(f"{label}: expected {_SUPPORTED}, got {_describe(data)}")


def _may_be_bare_dicom(data: bytes) -> bool:
    """A data set without preamble starts with an attribute of group 0002 or 0008, in either byte order."""
    return data[:2] in (b"\x02\0", b"\x08\0", b"\0\x08") and len(data) > 8


def _describe(data: bytes) -> str:
    start = data[:512].lstrip()
    if start[:1] == b"<":
        return "HTML or XML text"
    if start[:4] == b"%PDF":
        return "a PDF"
    if start[:2] == b"PK":
        return "a ZIP archive"
    if all(byte >= 32 or byte in b"\t\r\n\f" for byte in data[:512]) and data[:512].isascii():
        return "text"
    return "an unknown format, or a damaged or truncated file"
