"""Images of a request: data URIs to bytes, and what those bytes may be."""

from __future__ import annotations

import base64
import binascii
import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from vitalrt.errors import InputError
from vitalrt.inputs.image import ReadOptions, read_image
from vitalrt.inputs.quiet import quietly
from vitalrt.serve.errors import bad_request
from vitalrt.serve.remote import Fetcher

EXPECTED = "a PNG, JPEG or DICOM file"


def mime_type(data: bytes) -> str | None:
    """By content alone; the type that a data URI or a server claims is not looked at."""
    if data[128:132] == b"DICM":  # before the others: the preamble of a DICOM file may look like anything
        return "application/dicom"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    return None


class ImageReader:
    """max_pixels: of one image.  Raises ApiError with `param` as its param; no error repeats a link or file content."""

    def __init__(self, fetcher: Fetcher, max_pixels: int) -> None:
        self.fetcher = fetcher
        self.max_pixels = max_pixels

    def read(self, url: str, options: ReadOptions, param: str) -> np.ndarray:
        """uint8 RGB [H, W, 3]."""
        data = self._from_data_uri(url, param) if url[:5].lower() == "data:" else self.fetcher.fetch(url, param)
        kind = mime_type(data)
        if kind is None:
            raise bad_request(f"{param}: expected {EXPECTED}, the content is none of them", param, "invalid_image")
        if kind != "application/dicom":
            self._check_size(*_header_size(data, param), param)
        try:
            pixels = read_image(data, options)
        except InputError as error:
            raise bad_request(f"{param}: {error}", param, "invalid_image") from None
        self._check_size(pixels.shape[1], pixels.shape[0], param)  # of a DICOM file, which limits itself while read
        return pixels

    def _from_data_uri(self, url: str, param: str) -> bytes:
        head, comma, payload = url.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise bad_request(f"{param}: expected data:<type>;base64,<data>", param, "invalid_image")
        try:
            data = base64.b64decode(payload, validate=True)
        except (binascii.Error, ValueError):
            data = b""
        if not data:
            raise bad_request(f"{param}: expected base64 data, got none that can be decoded", param, "invalid_image")
        return data

    def _check_size(self, width: int, height: int, param: str) -> None:
        if width * height > self.max_pixels:
            limit = f"exceed this server's limit of {self.max_pixels:,} pixels"
            raise bad_request(f"{param}: {width} x {height} pixels {limit}", param, "image_too_large")


def _header_size(data: bytes, param: str) -> tuple[int, int]:
    """(width, height) as a PNG or JPEG header says, without decoding."""
    try:
        with quietly(), Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            return image.size
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise bad_request(f"{param}: expected {EXPECTED}, its header is damaged", param, "invalid_image") from None
