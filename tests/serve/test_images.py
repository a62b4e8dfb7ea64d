"""What an image is, is told by its bytes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitalrt.inputs.options import ReadOptions
from vitalrt.serve.errors import ApiError
from vitalrt.serve.images import ImageReader, mime_type
from vitalrt.serve.remote import Fetcher

DEMO = Path(__file__).parents[2] / "examples" / "demo.png"


@pytest.fixture
def reader() -> ImageReader:
    return ImageReader(Fetcher((), 1), max_pixels=10_000_000)


def picture(kind: str, size: tuple[int, int] = (8, 6)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (200, 10, 10)).save(file, kind)
    return file.getvalue()


def test_types_by_content(dicom_bytes):
    assert mime_type(picture("PNG")) == "image/png"
    assert mime_type(picture("JPEG")) == "image/jpeg"
    assert mime_type(dicom_bytes) == "application/dicom"
    assert mime_type(picture("PNG")[:100].ljust(128) + dicom_bytes[128:]) == "application/dicom"
    for other in (picture("GIF"), picture("TIFF"), picture("BMP"), picture("WEBP"), b"", b"\x89PNG", bytes(200)):
        assert mime_type(other) is None


@pytest.mark.parametrize("claimed", ["image/png", "image/jpeg", "application/dicom", "text/html", "", "image/png;x=y"])
def test_the_claimed_type_does_not_matter(running, reader, claimed):
    pixels = reader.read(running.data_uri(picture("PNG"), claimed), ReadOptions(), "url")
    assert pixels.shape == (6, 8, 3)
    assert (pixels == np.array([200, 10, 10])).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_pixels_are_counted_before_decoding(running, kind, monkeypatch):
    def decode(*_):
        raise AssertionError("it was decoded")

    monkeypatch.setattr("vitalrt.serve.images.read_image", decode)
    reader = ImageReader(Fetcher((), 1), max_pixels=47)
    with pytest.raises(ApiError) as error:
        reader.read(running.data_uri(picture(kind)), ReadOptions(), "url")
    assert error.value.code == "image_too_large"


def test_a_dicom_files_pixels_are_counted(running, dicom_bytes):
    with pytest.raises(ApiError) as error:
        ImageReader(Fetcher((), 1), max_pixels=64 * 48 - 1).read(running.data_uri(dicom_bytes), ReadOptions(), "url")
    assert error.value.code == "image_too_large"
    ImageReader(Fetcher((), 1), max_pixels=64 * 48).read(running.data_uri(dicom_bytes), ReadOptions(), "url")
