"""What cannot be read: always one InputError of one line that names the source and the trouble, and nothing else."""

import gzip
import io
import os
import random
import socket
import struct
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image

from vitalrt.errors import InputError
from vitalrt.inputs import options as limits
from vitalrt.inputs.image import ReadOptions, read_image

NOISE = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)


def encode(kind: str, image: np.ndarray = NOISE, **settings) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **settings)
    return buffer.getvalue()


def nifti(values: np.ndarray) -> bytes:
    return nib.Nifti1Image(values, np.eye(4)).to_bytes()


def patched(data: bytes, offset: int, layout: str, *values: object) -> bytes:
    whole = bytearray(data)
    struct.pack_into(layout, whole, offset, *values)
    return bytes(whole)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of_size(width: int, height: int) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"\0" * 9)) + png_chunk(b"IEND", b"")


CT = (Path(pydicom.__file__).parent / "data" / "test_files" / "CT_small.dcm").read_bytes()
VOLUME = nifti(np.zeros((6, 5, 4), np.int16))
FLOATS = np.full((6, 5, 4), np.nan, np.float32)
DAMAGED = "damaged, truncated or not supported"
UNKNOWN = "expected PNG, JPEG, TIFF, BMP, WebP, GIF, DICOM or NIfTI, got "

FILES = {
    "empty": (b"", r"is empty \(0 bytes\)"),
    "one byte": (b"\x89", UNKNOWN + "an unknown format"),
    "text": (b"The liver is visible.\n" * 9, UNKNOWN + "text"),
    "html": (b"\n <!DOCTYPE html><html><body>404</body></html>", UNKNOWN + "HTML or XML text"),
    "svg": (b"<?xml version='1.0'?><svg/>", UNKNOWN + "HTML or XML text"),
    "json": (b'{"image": 1}', UNKNOWN + "text"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", UNKNOWN + "text"),
    "pdf": (b"%PDF-1.7\n\xff\xff", UNKNOWN + "a PDF"),
    "zip": (b"PK\x03\x04" + bytes(60), UNKNOWN + "a ZIP archive"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", UNKNOWN + "text"),
    "noise": (random.Random(1).randbytes(4096), UNKNOWN + "an unknown format"),
    "zeros": (bytes(4096), UNKNOWN + "an unknown format"),
    "nrrd": (b"NRRD0004\ntype: short\n\n\xff\xfe", UNKNOWN + "an unknown format"),
    "png cut": (encode("PNG")[:2000], DAMAGED),
    "png cut in its header": (encode("PNG")[:20], DAMAGED),
    "png without its last row": (encode("PNG")[:-60], DAMAGED),
    "png with a flipped byte": (patched(encode("PNG"), 900, "3s", b"\0\0\0"), DAMAGED),
    "png of no width": (png_of_size(0, 7), "damaged|at least one pixel"),
    "png of too little data": (png_of_size(300, 300), DAMAGED),
    "png bomb": (png_of_size(50_000, 50_000), "header claims more pixels than the limit of 89,478,485"),
    "png just too large": (png_of_size(10_000, 9_000), "10000 x 9000 pixels exceed the limit of 89,478,485 pixels"),
    "jpeg cut": (encode("JPEG")[:700], DAMAGED),
    "jpeg of its marker": (b"\xff\xd8\xff\xe0", DAMAGED),
    "jpeg progressive cut": (encode("JPEG", progressive=True)[:900], DAMAGED),
    "tiff cut": (encode("TIFF")[:2000], DAMAGED),
    "tiff lzw cut": (encode("TIFF", compression="tiff_lzw")[:-200], DAMAGED),
    "tiff of its magic": (b"II*\0" + bytes(8), DAMAGED),
    "tiff nan": (encode("TIFF", np.full((3, 4), np.nan, np.float32)), "12 of 12 values are NaN or infinite"),
    "bmp cut": (encode("BMP")[:500], DAMAGED),
    "bmp in name only": (b"BM" + bytes(10), DAMAGED),
    "webp cut": (encode("WEBP")[:300], DAMAGED),
    "webp of its header": (b"RIFF\x08\0\0\0WEBP", DAMAGED),
    "gif cut": (encode("GIF")[:900], DAMAGED),
    "dicom of its preamble": (bytes(128) + b"DICM", "holds no image"),
    "dicom cut in its header": (CT[:700], "holds no image"),
    "dicom cut in its pixels": (CT[:20_000], "as DICOM|holds no image"),
    "dicom of noise": (bytes(128) + b"DICM" + random.Random(2).randbytes(999), "DICOM"),
    "dicom bare and broken": (b"\x08\0\x05\0CS\x0a\0ISO_IR", "DICOM"),
    "gzip cut": (gzip.compress(VOLUME)[:-30], "damaged or truncated gzip file"),
    "gzip with a flipped byte": (patched(gzip.compress(nifti(FLOATS)), 60, "B", 255), "damaged or truncated gzip file"),
    "gzip of text": (gzip.compress(b"not a volume"), "a gzip file, but not of a NIfTI volume"),
    "gzip of a gzip": (gzip.compress(gzip.compress(VOLUME)), "a gzip file, but not of a NIfTI volume"),
    "gzip of its magic": (b"\x1f\x8b\x08", "damaged or truncated gzip file"),
    "nifti of its header": (VOLUME[:348], "truncated|as NIfTI"),
    "nifti cut": (VOLUME[:-1], r"truncated, its header promises 592 bytes and 591 came"),
    "nifti of lies": (patched(VOLUME, 40, "<4h", 3, 30_000, 30_000, 30_000), "truncated, its header promises 54,"),
    "nifti of 5 axes": (nifti(np.zeros((2, 2, 2, 2, 2), np.uint8)), "expected a 3-D volume, got shape"),
    "nifti of one axis": (nifti(np.zeros(5, np.uint8)), r"expected a 3-D volume, got shape \[5\]"),
    "nifti of no voxels": (patched(VOLUME, 40, "<4h", 3, 6, 0, 4), "expected at least one pixel, got 6 x 0"),
    "nifti of no slices": (patched(VOLUME, 40, "<4h", 3, 6, 5, 0), "axis 2 has 0 slices"),
    "nifti of a negative size": (patched(VOLUME, 40, "<4h", 3, 6, -5, 4), "expected at least one pixel, got 6 x -5"),
    "nifti of an unknown dtype": (patched(VOLUME, 70, "<h", 999), "as NIfTI"),
    "nifti nan": (nifti(FLOATS), "30 of 30 values are NaN or infinite; replace them"),
    "nifti complex": (nifti(np.zeros((2, 2, 2), np.complex64)), "expected real numbers or RGB, got complex"),
    "nifti singular": (patched(VOLUME, 312, "<4f", 0, 0, 0, 0), "its affine is singular"),
    "nifti pair": (patched(VOLUME, 344, "4s", b"ni1\0"), "one half of a .hdr/.img pair"),
}


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("form", ["path", "bytes"])
def test_bad_files(case: str, form: str, tmp_path: Path) -> None:
    data, trouble = FILES[case]
    path = tmp_path / "folder-of-mr-x" / "scan 1.png"  # names and extensions play no part
    path.parent.mkdir()
    path.write_bytes(data)
    name = "image 'scan 1.png': " if form == "path" else r"image \(bytes\): "
    with pytest.raises(InputError, match=f"^{name}.*({trouble})") as caught:
        read_image(path if form == "path" else data)
    text = str(caught.value)
    assert "\n" not in text and "mr-x" not in text and "0x" not in text


ARRAYS = {
    "no rows": (np.zeros((0, 5), np.uint8), "expected at least one pixel, got 5 x 0"),
    "no columns": (np.zeros((5, 0, 3), np.uint8), "expected at least one pixel, got 0 x 5"),
    "no axes": (np.array(7, np.uint8), r"expected shape .* got \[\]"),
    "one axis": (np.zeros(9, np.uint8), r"expected shape .* got \[9\]"),
    "four axes": (np.zeros((1, 4, 4, 3), np.uint8), r"expected shape .* got \[1, 4, 4, 3\]"),
    "two channels": (np.zeros((4, 4, 2), np.uint8), r"expected shape \[H, W\] or \[H, W, 1, 3 or 4\], got \[4, 4, 2\]"),
    "five channels": (np.zeros((4, 4, 5), np.uint8), r"got \[4, 4, 5\]"),
    "channels first": (np.zeros((3, 8, 8), np.uint8), r"move the channels last: a.transpose\(1, 2, 0\)"),
    "nan": (np.array([[0.0, np.nan]]), "1 of 2 values are NaN or infinite"),
    "infinity": (np.array([[0.0, np.inf]]), "1 of 2 values are NaN or infinite"),
    "0..255 as floats": (np.array([[0.0, 255.0]]), r"expected floating point in 0..1, got 0..255; scale it"),
    "negative floats": (np.array([[-0.5, 0.5]]), r"expected floating point in 0..1, got -0.5..0.5"),
    "int64": (np.zeros((4, 4), np.int64), "expected dtype uint8, uint16, bool or floating point in 0..1, got int64"),
    "uint32": (np.zeros((4, 4), np.uint32), "expected dtype .* got uint32"),
    "complex": (np.zeros((4, 4), np.complex64), "expected dtype .* got complex64"),
    "object": (np.full((4, 4), None), "expected dtype .* got object"),
    "text": (np.full((4, 4), "a"), "expected dtype .* got <U1"),
    "dates": (np.zeros((4, 4), "datetime64[s]"), "expected dtype .* got datetime64"),
    "records": (np.zeros((4, 4), [("r", "u1")]), "expected dtype "),
    "tensor channels last": (torch.zeros(8, 8, 3), r"move the channels first: t.permute\(2, 0, 1\)"),
    "tensor batch": (torch.zeros(1, 3, 8, 8), r"expected shape .* got \[1, 3, 8, 8\]"),
    "tensor empty": (torch.zeros(3, 0, 8), "expected at least one pixel, got 8 x 0"),
    "tensor scalar": (torch.tensor(1.0), r"got \[\]"),
    "tensor nan": (torch.full((2, 2), torch.nan, dtype=torch.bfloat16), "4 of 4 values are NaN"),
    "tensor int64": (torch.zeros(4, 4, dtype=torch.int64), "expected dtype .* got int64"),
    "tensor complex": (torch.zeros(4, 4, dtype=torch.complex64), "expected dtype .* got complex64"),
    "tensor sparse": (torch.zeros(4, 4).to_sparse(), "expected a dense tensor"),
    "tensor meta": (torch.zeros(4, 4, device="meta"), "expected a dense tensor"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_bad_arrays(case: str) -> None:
    source, trouble = ARRAYS[case]
    name = r"image\[2\] \(torch tensor\)" if isinstance(source, torch.Tensor) else r"image\[2\] \(numpy array\)"
    with pytest.raises(InputError, match=f"^{name}: .*{trouble}") as caught:
        read_image(source, name="image[2]")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", [None, 7, [NOISE], {"path": "a.png"}, object, io.BytesIO(encode("PNG"))])
def test_things_that_are_no_picture(source: object) -> None:
    with pytest.raises(InputError, match=r"^image: expected a path, bytes, PIL image, numpy array or torch tensor"):
        read_image(source)


@pytest.mark.parametrize(
    ("path", "trouble"),
    [
        ("missing.png", "image 'missing.png': no such file"),
        ("", "image '': no such file"),
        ("a/b\nc.png", r"image 'b\\nc.png': no such file"),
        ("null\0byte.png", r"image 'null\\x00byte.png': cannot be opened"),
        ("long" * 999 + ".png", "cannot be opened"),
        ("https://example.org/scan.png", "image 'scan.png': no such file"),
    ],
)
def test_bad_paths(path: str, trouble: str) -> None:
    with pytest.raises(InputError, match=trouble) as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


def test_directories_pipes_and_forbidden_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="is a directory, expected a file"):
        read_image(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="image 'pipe': is not an ordinary file"):
        read_image(tmp_path / "pipe")
    with pytest.raises(InputError, match="image 'null': is not an ordinary file"):
        read_image(os.devnull)
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(tmp_path)
        listener.bind("socket")
        with pytest.raises(InputError, match="image 'socket': is not an ordinary file"):
            read_image("socket")

    secret = tmp_path / "secret.png"
    secret.write_bytes(encode("PNG"))

    def refuse(path: Path) -> bytes:  # chmod would not stop a test that runs as root
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match=r"^image 'secret.png': permission denied$"):
        read_image(secret)


def test_files_beyond_the_size_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_FILE_BYTES", 1000)
    path = tmp_path / "scan.png"
    path.write_bytes(encode("PNG"))
    for source in (path, path.read_bytes()):
        with pytest.raises(InputError, match="bytes exceed the limit of 1,000 bytes"):
            read_image(source)


def test_pil_images_that_cannot_be_decoded() -> None:
    for image, trouble in (
        (Image.open(io.BytesIO(encode("PNG")[:2000])), "cannot be decoded"),
        (Image.new("RGB", (0, 4)), "expected at least one pixel, got 0 x 4"),
        (Image.new("LAB", (4, 4)), "colour mode LAB is not supported"),
        (Image.fromarray(np.full((2, 2), np.inf, np.float32)), "4 of 4 values are NaN or infinite"),
    ):
        with pytest.raises(InputError, match=rf"^image \(PIL image\): .*{trouble}"):
            read_image(image)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "dicom", "nifti", "nifti.gz"])
def test_a_cut_file_is_never_half_a_picture(kind: str) -> None:
    """Cut anywhere: an error, or, where only trailing bytes went, the whole picture."""
    volume = nifti(np.random.default_rng(1).integers(0, 99, (9, 8, 7)).astype(np.int16))
    made = {"dicom": CT, "nifti": volume, "nifti.gz": gzip.compress(volume)}
    data = made[kind] if kind in made else encode(kind)
    whole = read_image(data)
    rng = random.Random(0)
    for length in {*range(0, 60), *rng.sample(range(len(data)), 120), *range(len(data) - 40, len(data))}:
        try:
            picture = read_image(data[:length])
        except InputError:
            continue
        np.testing.assert_array_equal(picture, whole)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "dicom", "nifti", "nifti.gz"])
def test_damage_is_an_error_or_a_picture(kind: str) -> None:
    volume = nifti(np.zeros((9, 8, 7), np.int16))
    made = {"dicom": CT, "nifti": volume, "nifti.gz": gzip.compress(volume)}
    data = made[kind] if kind in made else encode(kind)
    rng = random.Random(3)
    for _ in range(120):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(min(len(data), 600))] ^= 1 << rng.randrange(8)
        try:
            picture = read_image(bytes(damaged), ReadOptions())
        except InputError as error:
            assert "\n" not in str(error)
        else:
            assert picture.ndim == 3 and picture.shape[2] == 3
