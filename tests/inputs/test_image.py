"""Pictures from files of every raster kind, from PIL images and from arrays: exact pixels."""

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageOps

from vitalrt.errors import InputError
from vitalrt.inputs import options as limits
from vitalrt.inputs.image import ReadOptions, read_image

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
GRAY = np.arange(35, dtype=np.uint8).reshape(5, 7) * 7


def encode(image: Image.Image | np.ndarray, kind: str = "PNG", **settings) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def as_gray(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[:, :, None], 3, axis=2).astype(np.uint8)


LOSSLESS = {"PNG": {}, "TIFF": {"compression": "tiff_lzw"}, "BMP": {}, "WEBP": {"lossless": True}}


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("form", ["str", "path", "bytes", "bytearray", "memoryview", "pil"])
def test_same_pixels_from_every_form(tmp_path: Path, kind: str, form: str) -> None:
    data = encode(RGB, kind, **LOSSLESS[kind])
    path = tmp_path / "picture.without-a-useful-extension"
    path.write_bytes(data)
    source = {
        "str": str(path),
        "path": path,
        "bytes": data,
        "bytearray": bytearray(data),
        "memoryview": memoryview(data),
        "pil": Image.open(io.BytesIO(data)),
    }[form]
    picture = read_image(source)
    assert picture.dtype == np.uint8 and picture.flags.c_contiguous
    np.testing.assert_array_equal(picture, RGB)


def test_jpeg_is_close() -> None:
    smooth = np.linspace(0, 255, 64 * 64, dtype=np.uint8).reshape(64, 64)
    assert np.abs(read_image(encode(smooth, "JPEG", quality=95)).astype(int) - as_gray(smooth)).max() <= 4


def test_jpeg_cmyk() -> None:
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(read_image(encode(red, "JPEG", quality=95)).astype(int) - [255, 0, 0]).max() <= 4


def test_modes() -> None:
    bits = GRAY > 100
    np.testing.assert_array_equal(read_image(encode(Image.fromarray(bits))), as_gray(bits * 255))
    np.testing.assert_array_equal(read_image(encode(GRAY)), as_gray(GRAY))
    palette = Image.fromarray(GRAY).convert("P")
    palette.putpalette([value for index in range(256) for value in (index, 255 - index, 7)])
    expected = np.stack([GRAY, 255 - GRAY, np.full_like(GRAY, 7)], axis=-1)
    np.testing.assert_array_equal(read_image(encode(palette)), expected)
    np.testing.assert_array_equal(read_image(encode(palette, "GIF")), expected)


def test_transparency_lies_over_white() -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0] = 200
    rgba[0, :, 3] = 0, 51, 255
    expected = [[[255, 255, 255], [244, 204, 204], [200, 0, 0]]]
    np.testing.assert_array_equal(read_image(encode(rgba)), expected)
    np.testing.assert_array_equal(read_image(rgba), expected)
    np.testing.assert_array_equal(read_image(torch.from_numpy(rgba).permute(2, 0, 1)), expected)
    gray_alpha = Image.merge("LA", [Image.new("L", (1, 1), 100), Image.new("L", (1, 1), 0)])
    np.testing.assert_array_equal(read_image(encode(gray_alpha)), [[[255, 255, 255]]])
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([9, 9, 9, 50, 60, 70])
    np.testing.assert_array_equal(read_image(encode(palette, transparency=0)), [[[255, 255, 255], [50, 60, 70]]])


DEEP = np.array([[0, 128, 129, 32768, 65535]], np.uint16)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_gray_uses_the_whole_range(kind: str) -> None:
    data = encode(Image.fromarray(DEEP), kind)
    np.testing.assert_array_equal(read_image(data)[0, :, 0], [0, 0, 1, 128, 255])
    windowed = read_image(data, ReadOptions(window=(128.5, 255)))
    np.testing.assert_array_equal(windowed[0, :, 0], [0, 127, 128, 255, 255])


def test_32_bit_and_float_tiff_use_their_own_range() -> None:
    for values in (np.array([[-40, 0, 60]], np.int32), np.array([[-0.4, 0.0, 0.6]], np.float32)):
        data = encode(Image.fromarray(values), "TIFF")
        picture = read_image(data)[0, :, 0]
        assert picture[0] == 0 and picture[2] == 255 and 100 <= picture[1] <= 104
    windowed = read_image(data, ReadOptions(window=(0.0, 0.8)))
    np.testing.assert_array_equal(windowed[0, :, 0], [0, 128, 255])
    constant = encode(Image.fromarray(np.full((2, 2), 7.5, np.float32)), "TIFF")
    assert not read_image(constant).any()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind: str, orientation: int) -> None:
    # Large flat corners, which JPEG keeps.
    upright = np.zeros((32, 48), np.uint8)
    upright[:16, :24], upright[:16, 24:], upright[16:, :24] = 250, 170, 90
    # The inverse of an orientation is itself, but for the two quarter turns, which undo each other.
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    turned = Image.fromarray(upright)
    turned.getexif()[0x0112] = inverse
    turned = ImageOps.exif_transpose(turned)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(turned.convert("RGB"), kind, exif=exif)
    assert np.abs(read_image(data).astype(int) - as_gray(upright)).max() <= 3
    assert np.abs(read_image(Image.open(io.BytesIO(data))).astype(int) - as_gray(upright)).max() <= 3


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG"])
def test_text_tags_are_never_logged(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    exif = Image.Exif()
    exif[0x010E] = "Zyxwvut Quentin, 1901-02-03"  # ImageDescription
    data = encode(RGB, kind, exif=exif)
    with caplog.at_level(logging.DEBUG):
        read_image(data)
    assert "Zyxwvut" not in caplog.text


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "WEBP", "PNG"])
def test_frames(kind: str) -> None:
    pages = [Image.new("RGB", (4, 3), (level, level, level)) for level in (10, 120, 240)]
    settings = {"lossless": True} if kind == "WEBP" else {}
    data = encode(pages[0], kind, save_all=True, append_images=pages[1:], **settings)
    assert (read_image(data) == 10).all()
    assert (read_image(data, ReadOptions(frame=2)) == 240).all()
    with pytest.raises(InputError, match=r"image \(bytes\): frame=3 is out of range, the file holds 3"):
        read_image(data, ReadOptions(frame=3))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 255]], np.uint8), [0, 255]),
        (np.array([[0, 32768]], np.uint16), [0, 128]),
        (np.array([[0, 32768]], ">u2"), [0, 128]),
        (np.array([[False, True]]), [0, 255]),
        (np.array([[0.0, 0.5]], np.float16), [0, 128]),
        (np.array([[0.0, 1.0]], np.float32), [0, 255]),
        (np.array([[0.0, 0.25]], np.float64), [0, 64]),
    ],
)
def test_array_dtypes(values: np.ndarray, expected: list[int]) -> None:
    np.testing.assert_array_equal(read_image(values), as_gray(np.array([expected])))
    np.testing.assert_array_equal(read_image(values[:, :, None]), as_gray(np.array([expected])))
    if values.dtype.isnative:
        tensor = torch.from_numpy(values)
        np.testing.assert_array_equal(read_image(tensor), as_gray(np.array([expected])))
        np.testing.assert_array_equal(read_image(tensor[None]), as_gray(np.array([expected])))


def test_torch_layouts() -> None:
    tensor = torch.from_numpy(RGB).permute(2, 0, 1)
    np.testing.assert_array_equal(read_image(tensor), RGB)
    np.testing.assert_array_equal(read_image(tensor.flip(2)), RGB[:, ::-1])
    floating = (tensor.double() / 255).requires_grad_()
    np.testing.assert_array_equal(read_image(floating), RGB)
    half = torch.tensor([[0.0, 0.5, 1.0]], dtype=torch.bfloat16)
    np.testing.assert_array_equal(read_image(half), as_gray(np.array([[0, 128, 255]])))


def test_the_result_is_a_copy() -> None:
    source = RGB.copy()
    read_image(source)[:] = 0
    np.testing.assert_array_equal(source, RGB)


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(
        dtype=st.sampled_from([np.uint8, np.uint16, np.int16, np.int64, np.bool_, np.float16, np.float32, np.float64]),
        shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6),
    )
)
def test_any_array_is_read_or_refused(array: np.ndarray) -> None:
    has_shape = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    has_dtype = array.dtype in (np.uint8, np.uint16, np.bool_) or array.dtype.kind == "f"
    is_fit = has_shape and has_dtype and array.size > 0
    if is_fit and array.dtype.kind == "f":
        is_fit = bool(np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1)
    if not is_fit:
        with pytest.raises(InputError, match=r"^image \(numpy array\): "):
            read_image(array)
        return
    picture = read_image(array)
    assert picture.shape == (*array.shape[:2], 3) and picture.dtype == np.uint8 and picture.flags.c_contiguous
    if array.dtype == np.uint8 and array.ndim == 2:
        np.testing.assert_array_equal(picture, as_gray(array))


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3, 4]))))
def test_png_and_array_and_tensor_agree(array: np.ndarray) -> None:
    expected = read_image(array)
    np.testing.assert_array_equal(read_image(torch.from_numpy(array).permute(2, 0, 1)), expected)
    image = Image.fromarray(array if array.shape[2] > 1 else array[:, :, 0])
    np.testing.assert_array_equal(read_image(image), expected)
    np.testing.assert_array_equal(read_image(encode(image)), expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"frame": -1}, "frame: expected a whole number from 0 or None, got -1"),
        ({"frame": True}, "frame: expected a whole number"),
        ({"slice_index": 1.5}, "slice_index: expected a whole number"),
        ({"axis": 3}, "axis: expected 0"),
        ({"axis": None}, "axis: expected 0"),
        ({"window": (40, 0)}, "window: expected"),
        ({"window": (40, -1)}, "window: expected"),
        ({"window": (float("nan"), 1)}, "window: expected"),
        ({"window": (1, 2, 3)}, "window: expected"),
        ({"window": "lung"}, "window: expected"),
    ],
)
def test_bad_options(values: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ReadOptions(**values)


@pytest.mark.parametrize(
    ("source", "values", "message"),
    [
        (encode(RGB), {"slice_index": 0}, "slice_index=0 does not apply"),
        (encode(RGB), {"axis": 1}, "axis=1 does not apply"),
        (encode(RGB), {"window": (1, 2)}, "does not apply to a picture of 8 bits"),
        (encode(Image.fromarray(DEEP)), {"window": 0}, "window=0 picks a view of a DICOM file"),
        (RGB, {"frame": 0}, "frame=0 does not apply to an array"),
        (torch.from_numpy(GRAY), {"window": 0}, "window=0 does not apply to an array"),
        (Image.fromarray(RGB), {"frame": 0}, "frame=0 does not apply to a PIL image"),
    ],
)
def test_options_that_do_not_apply(source: object, values: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_image(source, ReadOptions(**values))


def test_the_pixel_limit_holds_for_every_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_PIXELS", 34)
    for source in (RGB, GRAY, torch.from_numpy(GRAY), Image.fromarray(RGB), encode(RGB), encode(RGB, "TIFF")):
        with pytest.raises(InputError, match="7 x 5 pixels exceed the limit of 34 pixels"):
            read_image(source)


def test_pictures_need_no_dicom_or_nifti_reader(tmp_path: Path) -> None:
    """pydicom and nibabel are slow to import: reading a PNG must not."""
    program = (
        "import io, sys\nfrom PIL import Image\nfrom vitalrt.inputs.image import read_image\n"
        "buffer = io.BytesIO()\nImage.new('L', (2, 2)).save(buffer, 'PNG')\nread_image(buffer.getvalue())\n"
        "sys.exit(bool({'pydicom', 'nibabel'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    # Run elsewhere: python -c puts the working directory before the package under test.
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, cwd=tmp_path)
