"""NIfTI volumes (.nii, .nii.gz) -> one slice as RGB, in the orientation of a radiological viewer.

The volume is turned to canonical axes, RAS+: x grows to the patient's right, y to the front, z to the head. Of the
plane that is left, the second axis runs up the picture and the first runs leftwards:

    axis 2, axial      front up,  patient's right on the left
    axis 1, coronal    head up,   patient's right on the left
    axis 0, sagittal   head up,   front on the left

Voxels are shown as they are: a volume with thick slices looks flat in the other two planes.
"""

from __future__ import annotations

import gzip
import io
import math
import zlib
from contextlib import suppress
from typing import Any

import nibabel as nib
import numpy as np

from vitalrt.errors import InputError
from vitalrt.inputs import options as limits
from vitalrt.inputs.options import ReadOptions
from vitalrt.inputs.pixels import apply_window, as_rgb, check_finite, check_size, robust_window

GZIP_MAGIC = b"\x1f\x8b"


def is_nifti(data: bytes) -> bool:
    """Whether an uncompressed file starts as NIfTI-1 or NIfTI-2 does, the halves of .hdr/.img pairs included."""
    return data[344:348] in (b"n+1\0", b"ni1\0") or data[4:8] in (b"n+2\0", b"ni2\0")


def read_nifti(data: bytes, options: ReadOptions, label: str) -> np.ndarray:
    """The bytes of a .nii or .nii.gz file -> uint8 RGB [H, W, 3].

    options.window (center, width) is in the volume's units; None: `robust_window` of the slice shown. RGB volumes take
    none. Raises InputError for a truncated file, a slice that is not there, a 4-D series, complex numbers, or NaN.
    """
    options.refuse(label, "NIfTI", "frame")
    try:
        return _read(_gunzip(data, label), options, label)
    except InputError:
        raise
    except Exception as error:  # nibabel raises whatever its parser trips over
        kind = type(error).__name__
    raise InputError(f"{label}: damaged, truncated or not supported as NIfTI ({kind})")


def _gunzip(data: bytes, label: str) -> bytes:
    if not data.startswith(GZIP_MAGIC):
        return data
    content = None
    with suppress(EOFError, OSError, zlib.error):
        # Stops one byte after the limit, however much more a bomb would give.
        content = gzip.GzipFile(fileobj=io.BytesIO(data)).read(limits.MAX_FILE_BYTES + 1)
    if content is None:
        raise InputError(f"{label}: damaged or truncated gzip file")
    if len(content) > limits.MAX_FILE_BYTES:
        raise InputError(f"{label}: unpacks to more than the limit of {limits.MAX_FILE_BYTES:,} bytes")
    if not is_nifti(content):
        raise InputError(f"{label}: a gzip file, but not of a NIfTI volume")
    return content


def _read(data: bytes, options: ReadOptions, label: str) -> np.ndarray:
    if data[344:348] == b"ni1\0" or data[4:8] == b"ni2\0":
        raise InputError(f"{label}: one half of a .hdr/.img pair; convert the pair to one .nii file")
    image = (nib.Nifti1Image if data[344:348] == b"n+1\0" else nib.Nifti2Image).from_bytes(data)
    shape, dtype = image.shape, image.get_data_dtype()
    if len(shape) > 3 and math.prod(shape[3:]) == 1:
        shape = shape[:3]
    if len(shape) != 3:
        advice = "save one volume of it, as with nibabel's image.slicer[..., 0]"
        raise InputError(f"{label}: expected a 3-D volume, got shape {list(shape)}; {advice}")
    if dtype.kind == "c":
        raise InputError(f"{label}: expected real numbers or RGB, got complex; save the magnitude")
    proxy: Any = image.dataobj
    num_bytes = proxy.offset + math.prod(shape) * dtype.itemsize
    if num_bytes > len(data):
        raise InputError(f"{label}: truncated, its header promises {num_bytes:,} bytes and {len(data):,} came")

    plane = _canonical_plane(image, shape, options, label)
    picture = plane[::-1, ::-1].swapaxes(0, 1)
    if dtype.kind == "V":  # NIfTI's RGB and RGBA
        options.refuse(label, "a colour NIfTI volume", "window")
        return as_rgb(picture)
    check_finite(label, picture)
    return as_rgb(apply_window(picture, options.given_window(label) or robust_window(picture)))


def _canonical_plane(image: nib.Nifti1Image, shape: tuple[int, ...], options: ReadOptions, label: str) -> np.ndarray:
    """The slice asked for, [A, B] or [A, B, channels], where A and B are the canonical axes left, in order.

    Scaled by scl_slope and scl_inter. Of the volume's voxels, only this slice's are read.
    """
    affine = image.affine
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise InputError(f"{label}: its affine is singular or not finite, so its orientation is unknown")
    orientation = nib.io_orientation(affine)  # [3, 2]: canonical axis, and sign, of each stored axis
    to_stored = [int(np.flatnonzero(orientation[:, 0] == axis)[0]) for axis in range(3)]
    is_flipped = [orientation[stored, 1] < 0 for stored in to_stored]

    size = shape[to_stored[options.axis]]
    width, height = (shape[to_stored[axis]] for axis in range(3) if axis != options.axis)
    check_size(label, width, height)
    index = size // 2 if options.slice_index is None else options.slice_index
    if index >= size:
        raise InputError(f"{label}: slice_index={index} is out of range, axis {options.axis} has {size} slices")

    where: list[slice | int] = [slice(None)] * 3 + [0] * (len(image.shape) - 3)
    where[to_stored[options.axis]] = size - 1 - index if is_flipped[options.axis] else index
    plane = np.asanyarray(image.dataobj[tuple(where)])
    if plane.dtype.names:
        plane = plane.view(np.uint8).reshape(*plane.shape, len(plane.dtype.names))

    first, second = (axis for axis in range(3) if axis != options.axis)
    if to_stored[first] > to_stored[second]:
        plane = plane.swapaxes(0, 1)
    if is_flipped[first]:
        plane = plane[::-1]
    return plane[:, ::-1] if is_flipped[second] else plane
