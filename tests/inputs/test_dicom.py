"""DICOM: exact pixels for each step from stored values to picture, pydicom's own files, and silence about patients."""

import io
import logging
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import Dataset, dcmwrite
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

from vitalrt.errors import InputError
from vitalrt.inputs import options as limits
from vitalrt.inputs.image import ReadOptions, read_image

PYDICOM_DATA = Path(pydicom.__file__).parent / "data"  # what the package ships: nothing is downloaded
PYDICOM_FILES = sorted(path for path in PYDICOM_DATA.rglob("*") if path.is_file() and path.suffix[:3] != ".py")

PATIENT = {
    "PatientName": "Zyxwvut^Quentin",
    "PatientID": "PID-8675309",
    "PatientBirthDate": "19010203",
    "AccessionNumber": "ACC-424242",
    "InstitutionName": "Hospital Nowhere",
    "ReferringPhysicianName": "Doktor^Frumious",
    "StudyDescription": "bandersnatch follow-up",
}


def make(stored: np.ndarray, syntax: UID = ExplicitVRLittleEndian, bits: int = 0, **fields: object) -> Dataset:
    """A data set with one plane [H, W], [H, W, 3], or several [F, H, W], as stored, and a patient."""
    samples = 3 if stored.ndim == 3 and stored.shape[-1] == 3 else 1
    num_frames = stored.shape[0] if stored.ndim == 3 and samples == 1 else 1
    dataset = Dataset()
    dataset.file_meta = Dataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    dataset.SOPInstanceUID = "1.2.3"
    dataset.SamplesPerPixel = samples
    dataset.PhotometricInterpretation = "RGB" if samples == 3 else "MONOCHROME2"
    if samples == 3:
        dataset.PlanarConfiguration = 0
    if num_frames > 1:
        dataset.NumberOfFrames = num_frames
    dataset.Rows, dataset.Columns = stored.shape[:2] if samples == 3 else stored.shape[-2:]
    dataset.BitsAllocated = stored.dtype.itemsize * 8
    dataset.BitsStored = bits or dataset.BitsAllocated
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    data = stored.astype(stored.dtype.newbyteorder(">" if syntax == ExplicitVRBigEndian else "<")).tobytes()
    dataset.PixelData = data + b"\0" * (len(data) % 2)
    dataset["PixelData"].VR = "OW" if stored.dtype.itemsize > 1 else "OB"
    for keyword, value in (PATIENT | fields).items():
        setattr(dataset, keyword, value)
    return dataset


def write(dataset: Dataset, **settings: object) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcmwrite(buffer, dataset, **(settings or {"enforce_file_format": True}))
    return buffer.getvalue()


def shown(dataset: Dataset, **values: object) -> list[int]:
    """The grey levels of the first row."""
    picture = read_image(write(dataset), ReadOptions(**values))
    assert (picture[..., 0] == picture[..., 1]).all() and (picture[..., 0] == picture[..., 2]).all()
    return picture[0, :, 0].tolist()


def row(*values: float, dtype: type = np.uint16) -> np.ndarray:
    return np.array([values, values], dtype)


def lut(values: list[int], first: int, bits: int, kind: str = "ModalityLUTType") -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(values), first, bits])
    item.add_new("LUTData", "US", values)
    if kind:
        setattr(item, kind, "US")
    return item


CT = {"RescaleSlope": 1, "RescaleIntercept": -1024}


def test_rescale_then_window() -> None:
    # LINEAR, PS3.3 C.11.2.1.2.1: black up to c - .5 - (w - 1)/2, white above c - .5 + (w - 1)/2.
    stored = row(1024 - 160, 1024 - 159, 1024 + 40, 1024 + 239, 1024 + 240)
    assert shown(make(stored, WindowCenter=40, WindowWidth=400, **CT)) == [0, 1, 128, 255, 255]


def test_rescale_slope() -> None:
    dataset = make(row(0, 100, 200), RescaleSlope="0.5", RescaleIntercept="10", WindowCenter="60.5", WindowWidth="101")
    assert shown(dataset) == [0, 128, 255]


def test_a_given_window_is_linear_exact() -> None:
    stored = row(1024 - 160, 1024 + 40, 1024 + 240)
    assert shown(make(stored, WindowCenter=1, WindowWidth=2, **CT), window=(40.0, 400.0)) == [0, 128, 255]


def test_multi_valued_windows() -> None:
    dataset = make(row(0, 200, 1000), WindowCenter=[50.5, 500.5], WindowWidth=[101, 1001])
    assert shown(dataset) == shown(dataset, window=0) == [0, 255, 255]
    assert shown(dataset, window=1) == [0, 51, 255]
    with pytest.raises(InputError, match=r"image \(bytes\): window=2 is out of range, the file holds 2 views"):
        shown(dataset, window=2)


def test_window_functions() -> None:
    values = row(0, 50, 100)
    assert shown(make(values, WindowCenter=50, WindowWidth=100, VOILUTFunction="LINEAR_EXACT")) == [0, 128, 255]
    assert shown(make(values, WindowCenter=50, WindowWidth=100, VOILUTFunction="SIGMOID")) == [30, 128, 225]
    assert shown(make(values, WindowCenter=50, WindowWidth=1)) == [0, 255, 255]


@pytest.mark.parametrize("fields", [{}, {"WindowCenter": None, "WindowWidth": None}])
def test_without_a_window_the_range_of_the_image(fields: dict) -> None:
    assert shown(make(row(300, 400, 500), **fields)) == [0, 128, 255]
    assert shown(make(row(-500, 0, 500, dtype=np.int16), **fields)) == [0, 128, 255]
    assert shown(make(row(7, 7), **fields)) == [0, 0]


def test_without_a_window_8_bits_stay() -> None:
    assert shown(make(row(3, 100, 200, dtype=np.uint8))) == [3, 100, 200]
    assert shown(make(row(0, 7, 15, dtype=np.uint8), bits=4)) == [0, 119, 255]


def test_padding_does_not_stretch_the_range() -> None:
    stored = row(-2000, 300, 400, 500, dtype=np.int16)
    assert shown(make(stored, PixelPaddingValue=-2000)) == [0, 0, 128, 255]
    stored = row(-2000, -1500, 0, 9, dtype=np.int16)
    assert shown(make(stored, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1500)) == [0, 0, 0, 255]


def test_signed() -> None:
    stored = row(-100, 0, 100, dtype=np.int16)
    assert shown(make(stored, WindowCenter="0.5", WindowWidth=201)) == [0, 128, 255]
    signed_12 = row(-100, 0, 100, dtype=np.int16) & 0x0FFF  # sign in bit 11, upper bits empty
    assert shown(make(signed_12, bits=12, WindowCenter="0.5", WindowWidth=201)) == [0, 128, 255]


def test_monochrome1_is_inverted() -> None:
    stored = row(0, 50, 100)
    fields = {"WindowCenter": 50.5, "WindowWidth": 101, "PhotometricInterpretation": "MONOCHROME1"}
    assert shown(make(stored, **fields)) == [255, 127, 0]
    assert shown(make(row(0, 100, 255, dtype=np.uint8), PhotometricInterpretation="MONOCHROME1")) == [255, 155, 0]


def test_modality_lut() -> None:
    dataset = make(row(0, 10, 11, 12, 99), WindowCenter=50.5, WindowWidth=101)
    dataset.ModalityLUTSequence = [lut([0, 50, 100], first=10, bits=16)]
    assert shown(dataset) == [0, 0, 128, 255, 255]


def test_voi_lut_comes_before_windows() -> None:
    dataset = make(row(0, 1, 2, 3), WindowCenter=2, WindowWidth=4)
    dataset.VOILUTSequence = [lut([0, 1023, 100], 0, 10, kind=""), lut([65535, 0], 1, 16, kind="")]
    assert shown(dataset) == [0, 255, 25, 25]
    assert shown(dataset, window=1) == [255, 255, 0, 0]
    assert shown(dataset, window=2) == [0, 85, 170, 255]


def test_frames() -> None:
    stored = np.array([[[0, 1]], [[2, 3]], [[4, 255]]], np.uint8)
    assert shown(make(stored)) == shown(make(stored), frame=0) == [0, 1]
    assert shown(make(stored), frame=2) == [4, 255]
    with pytest.raises(InputError, match=r"image \(bytes\): frame=3 is out of range, the file holds 3"):
        shown(make(stored), frame=3)


def test_enhanced_multi_frame_has_its_own_rescale_and_window() -> None:
    dataset = make(np.array([[[0, 100]], [[0, 100]]], np.uint16))
    frames = []
    for slope in (1, 2):
        rescale, frame = Dataset(), Dataset()
        rescale.RescaleSlope, rescale.RescaleIntercept = slope, 0
        frame.PixelValueTransformationSequence = [rescale]
        frames.append(frame)
    window, shared = Dataset(), Dataset()
    window.WindowCenter, window.WindowWidth = 100.5, 201
    shared.FrameVOILUTSequence = [window]
    dataset.PerFrameFunctionalGroupsSequence, dataset.SharedFunctionalGroupsSequence = frames, [shared]
    assert shown(dataset, frame=0) == [0, 128]
    assert shown(dataset, frame=1) == [0, 255]


COLORS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [10, 20, 30]]], np.uint8)


def test_rgb_and_planes() -> None:
    np.testing.assert_array_equal(read_image(write(make(COLORS))), COLORS)
    planar = make(COLORS, PlanarConfiguration=1)
    planar.PixelData = COLORS.transpose(2, 0, 1).tobytes()
    np.testing.assert_array_equal(read_image(write(planar)), COLORS)
    with pytest.raises(InputError, match="window=0 does not apply to a colour DICOM image"):
        read_image(write(make(COLORS)), ReadOptions(window=0))


def test_rgb_of_16_bits() -> None:
    np.testing.assert_array_equal(read_image(write(make(COLORS.astype(np.uint16) * 257))), COLORS)
    np.testing.assert_array_equal(read_image(write(make(COLORS.astype(np.uint16) << 4, bits=12)))[0, 0], [254, 0, 0])


def test_ybr() -> None:
    gray = np.full((2, 2, 3), 128, np.uint8)
    gray[..., 0] = [[0, 50], [100, 255]]
    picture = read_image(write(make(gray, PhotometricInterpretation="YBR_FULL")))
    np.testing.assert_array_equal(picture, np.repeat(gray[..., :1], 3, axis=2))


@pytest.mark.parametrize("bits", [8, 16])
def test_palette(bits: int) -> None:
    dataset = make(row(0, 1, 2, dtype=np.uint8), PhotometricInterpretation="PALETTE COLOR")
    for color, entries in (("Red", [0, 200]), ("Green", [10, 100]), ("Blue", [255, 1])):
        table = np.array(entries, "u1") if bits == 8 else np.array(entries, "<u2") * 257
        dataset.add_new(f"{color}PaletteColorLookupTableDescriptor", "US", [2, 0, bits])
        dataset.add_new(f"{color}PaletteColorLookupTableData", "OW", table.tobytes())
    np.testing.assert_array_equal(read_image(write(dataset))[0], [[0, 10, 255], [200, 100, 1], [200, 100, 1]])


def test_one_bit() -> None:
    dataset = make(np.zeros((1, 8), np.uint8))
    dataset.BitsAllocated = dataset.BitsStored = 1
    dataset.HighBit = 0
    dataset.PixelData = b"\xaa\0"
    assert shown(dataset) == [0, 255] * 4


def test_float_pixels() -> None:
    dataset = make(row(0, 0, 0))
    del dataset.PixelData
    dataset.BitsAllocated = 32
    dataset.FloatPixelData = row(0.0, 0.5, 1.0, dtype=np.float32).tobytes()
    assert shown(dataset, window=(0.5, 1.0)) == [0, 128, 255]
    dataset.FloatPixelData = row(0.0, np.nan, 1.0, dtype=np.float32).tobytes()
    with pytest.raises(InputError, match=r"2 of 6 values are NaN"):
        shown(dataset)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_without_preamble_and_meta(syntax: UID) -> None:
    dataset = make(row(0, 50, 100), syntax, WindowCenter=50.5, WindowWidth=101)
    whole = write(dataset)
    del dataset.file_meta
    is_little_endian = syntax != ExplicitVRBigEndian
    bare = write(dataset, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=is_little_endian, overwrite=True)
    assert b"DICM" not in bare
    for data in (whole, whole[132:], bare):
        assert read_image(data)[0, :, 0].tolist() == [0, 128, 255]


def test_rle() -> None:
    dataset = make(np.tile(row(0, 50, 100), (8, 8)), WindowCenter=50.5, WindowWidth=101)
    dataset.compress(RLELossless)
    assert shown(dataset)[:3] == [0, 128, 255]


def test_missing_codec_names_syntax_and_packages() -> None:
    dataset = make(row(0, 1), JPEGLSLossless)
    dataset.PixelData = encapsulate([b"\xff\xd8\xff\xd9"])
    dataset["PixelData"].is_undefined_length = True
    with pytest.raises(InputError) as caught:
        read_image(write(dataset))
    if not get_decoder(JPEGLSLossless).is_available:  # with the packages there, this stub of a file is damaged
        assert "JPEG-LS Lossless Image Compression needs a decoder" in str(caught.value)
        assert "pip install pylibjpeg pylibjpeg-libjpeg" in str(caught.value)


def test_video_and_unknown_transfer_syntaxes() -> None:
    dataset = make(row(0, 1), UID("1.2.840.10008.1.2.4.102"))
    dataset.PixelData = encapsulate([b"\0\0"])
    dataset["PixelData"].is_undefined_length = True
    video = write(dataset)
    unknown = video.replace(b"1.2.840.10008.1.2.4.102", b"1.2.3.4.5.6.7.8.9.10.11")
    for data, name in ((video, "MPEG-4 AVC/H.264"), (unknown, "an unknown transfer syntax")):
        with pytest.raises(InputError, match=f"{name}.* cannot be decoded; convert the file"):
            read_image(data)


def test_deflated_and_its_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make(np.zeros((200, 200), np.uint8), DeflatedExplicitVRLittleEndian)
    data = write(dataset)
    assert len(data) < 2000
    assert read_image(data).shape == (200, 200, 3)
    monkeypatch.setattr(limits, "MAX_FILE_BYTES", 30_000)
    with pytest.raises(InputError, match="inflates to more than the limit of 30,000 bytes"):
        read_image(data)


def test_a_huge_header_is_refused_before_decoding() -> None:
    dataset = make(row(0, 1), Rows=60000, Columns=60000)
    with pytest.raises(InputError, match="60000 x 60000 pixels exceed the limit"):
        read_image(write(dataset))


@pytest.mark.parametrize("path", PYDICOM_FILES, ids=lambda path: path.name)
def test_every_file_of_pydicom_loads_or_says_why(path: Path) -> None:
    try:
        picture = read_image(path)
    except InputError as error:
        assert str(error).startswith(f"image {path.name!r}: ") and "\n" not in str(error)
    else:
        assert picture.ndim == 3 and picture.shape[2] == 3 and picture.dtype == np.uint8


LOADS = [
    *("CT_small", "MR_small", "MR_small_RLE", "MR_small_bigendian", "MR_small_expb", "MR_small_implicit"),
    *("MR_small_jp2klossless", "MR_small_padded", "ExplVR_BigEnd", "J2K_pixelrep_mismatch", "JPEG2000", "693_J2KI"),
    *("SC_rgb_jpeg", "SC_rgb_rle", "SC_rgb_rle_16bit_2frame", "SC_rgb_rle_32bit", "SC_rgb_small_odd_big_endian"),
    *("SC_ybr_full_422_uncompressed", "examples_jpeg2k", "examples_overlay", "examples_palette", "examples_rgb_color"),
    *("examples_ybr_color", "image_dfl", "liver_1frame", "liver_expb_1frame", "rtdose", "rtdose_rle"),
]


@pytest.mark.filterwarnings("ignore")  # pydicom's own, on reading what is compared with
@pytest.mark.parametrize("name", LOADS)
def test_these_files_of_pydicom_load(name: str) -> None:
    path = PYDICOM_DATA / "test_files" / f"{name}.dcm"
    dataset = pydicom.dcmread(path, specific_tags=["Rows", "Columns"])
    picture = read_image(path)
    assert picture.shape == (dataset.Rows, dataset.Columns, 3)
    assert len(np.unique(picture)) > 1


def test_agrees_with_pydicoms_own_pipeline() -> None:
    path = PYDICOM_DATA / "test_files" / "MR_small.dcm"
    dataset = pydicom.dcmread(path)
    values = pydicom.pixels.apply_windowing(dataset.pixel_array, dataset)
    low, high = -(2**15), 2**15 - 1  # 16 bits stored, signed: the range that pydicom maps a window to
    np.testing.assert_array_equal(read_image(path)[..., 0], np.rint((values - low) / (high - low) * 255))
    color = PYDICOM_DATA / "test_files" / "SC_rgb_rle.dcm"
    np.testing.assert_array_equal(read_image(color), pydicom.dcmread(color).pixel_array)


def broken_files() -> dict[str, bytes]:
    """Files with a patient in them that cannot be read, each for another reason."""
    good = write(make(row(0, 50, 100), WindowCenter=50.5, WindowWidth=101))
    leaky = write(make(row(0, 50, 100), WindowCenter=[1, 2], WindowWidth=3))
    jpeg = make(row(0, 1), JPEGBaseline8Bit)
    jpeg.PixelData = encapsulate([b"Zyxwvut^Quentin PID-8675309 "])
    jpeg["PixelData"].is_undefined_length = True
    # A patient's name where numbers and codes belong, as in files with shifted fields.
    name_as_window = good.replace(b"50.5", b"Zyxw").replace(b"MONOCHROME2", b"Zyxwvut^Que")
    return {
        "cut in the pixels": good[:-4],
        "cut in the header": good[: good.index(b"Zyxwvut") + 4],
        "no image": good[: good.index(b"\xe0\x7f\x10\0")],
        "windows": leaky,
        "jpeg": write(jpeg),
        "names as values": name_as_window,
        "name as window": good.replace(b"50.5", b"Zyxw"),
        "name as syntax": good.replace(b"1.2.840.10008.1.2.1", b"Zyxwvut^Quentin.123"),
        "frames": write(make(row(0, 1), NumberOfFrames=99)),
    }


@pytest.mark.parametrize("case", ["good", *broken_files()])
def test_no_word_about_the_patient(
    case: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture, tmp_path: Path
) -> None:
    path = tmp_path / "scan.dcm"
    path.write_bytes(write(make(row(0, 50, 100))) if case == "good" else broken_files()[case])
    said = []
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        if case == "good":
            said.append(repr(read_image(path)))
        else:
            with pytest.raises(InputError, match=r"^image 'scan.dcm': ") as failure:
                read_image(path)
            assert failure.value.__context__ is None and failure.value.__cause__ is None
            said += traceback.format_exception(failure.value)
    said += [str(warning.message) for warning in caught] + [caplog.text, *capfd.readouterr()]
    text = "\n".join(said).lower()
    for value in PATIENT.values():
        for part in value.lower().split("^"):
            assert part not in text
    assert "zyxw" not in text and not caught and not caplog.text


def test_readers_speak_again_afterwards(caplog: pytest.LogCaptureFixture) -> None:
    logger, filters = logging.getLogger("pydicom"), list(warnings.filters)
    before = list(logger.handlers), logger.propagate
    files = [write(make(row(0, 1))), broken_files()["cut in the pixels"]] * 20

    def read(data: bytes) -> None:
        with suppress(InputError):
            read_image(data)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, files))
    assert (logger.handlers, logger.propagate) == before and warnings.filters == filters
    logger.warning("still here")
    assert "still here" in caplog.text
