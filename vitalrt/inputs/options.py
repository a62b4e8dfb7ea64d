"""How one 2-D picture is picked out of a file, and how large a file or picture may be."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vitalrt.errors import InputError

MAX_PIXELS = 89_478_485
"""Largest picture, in pixels: 256 MiB as RGB, and PIL's own limit. Checked on the header, before decoding."""

MAX_FILE_BYTES = 2 << 30
"""Largest file, and largest content of a compressed (.nii.gz, deflated DICOM) file, in bytes."""

Window = tuple[float, float]
"""(center, width) in the units of the stored image: Hounsfield units for a CT, say."""


@dataclass(frozen=True)
class ReadOptions:
    """Which picture of a file to show, and with what contrast. The default suits every source.

    frame: page of a TIFF, frame of a DICOM file or of an animation, from 0. None: the first.
    axis: plane of a NIfTI volume: 0 sagittal, 1 coronal, 2 axial.
    slice_index: slice along `axis`, from 0 = leftmost, hindmost or lowest. None: the middle one.
    window: (center, width) maps [center - width/2, center + width/2] to black..white. A plain number picks one of a
        DICOM file's own views: its VOI lookup tables first, then its windows. None: the file's first view; without
        one, see `read_image`.

    An option that the source at hand cannot use is an InputError when the image is read, and so is a bad value here.
    """

    frame: int | None = None
    slice_index: int | None = None
    axis: int = 2
    window: int | Window | None = None

    def __post_init__(self) -> None:
        for field in ("frame", "slice_index"):
            value = getattr(self, field)
            if value is not None and not _is_index(value):
                raise InputError(f"{field}: expected a whole number from 0 or None, got {value!r}")
        if not _is_index(self.axis) or self.axis > 2:
            raise InputError(f"axis: expected 0 (sagittal), 1 (coronal) or 2 (axial), got {self.axis!r}")
        if self.window is not None and not _is_index(self.window) and not _is_window(self.window):
            expected = "(center, width) with width > 0, an index from 0, or None"
            raise InputError(f"window: expected {expected}, got {self.window!r}")

    def refuse(self, label: str, kind: str, *fields: str) -> None:
        """Raises InputError if any of `fields` was set, because a `kind` of image cannot use it."""
        for field in fields:
            value = getattr(self, field)
            if value != getattr(_DEFAULTS, field):
                raise InputError(f"{label}: {field}={value!r} does not apply to {kind}")

    def given_window(self, label: str) -> Window | None:
        """(center, width), for sources without views of their own. Raises InputError if `window` is an index."""
        if isinstance(self.window, int):
            raise InputError(f"{label}: window={self.window} picks a view of a DICOM file; pass (center, width)")
        return self.window


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_window(value: object) -> bool:
    if not isinstance(value, tuple) or len(value) != 2:
        return False
    numbers = all(isinstance(part, (int, float)) and not isinstance(part, bool) for part in value)
    return numbers and all(map(math.isfinite, value)) and value[1] > 0


_DEFAULTS = ReadOptions()
