"""NIfTI: orientation as a radiological viewer shows it, windows, and what is refused."""

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitalrt.errors import InputError
from vitalrt.inputs import options as limits
from vitalrt.inputs.image import ReadOptions, read_image

NIBABEL_DATA = Path(nib.__file__).parent / "tests" / "data"
NIBABEL_FILES = sorted(path for path in NIBABEL_DATA.rglob("*") if path.is_file() and path.suffix[:3] != ".py")

FULL = (127.5, 255.0)  # shows the values 0..255 as they are


def volume(values: np.ndarray, affine: np.ndarray | None = None, kind: type = nib.Nifti1Image) -> bytes:
    return kind(values, np.eye(4) if affine is None else affine).to_bytes()


def shown(data: bytes, **values: object) -> np.ndarray:
    picture = read_image(data, ReadOptions(**({"window": FULL} | values)))
    assert (picture == picture[..., :1]).all()
    return picture[..., 0]


def head() -> np.ndarray:
    """[right 5, front 4, up 3], each voxel its own value, with landmarks on the three positive ends."""
    values = np.arange(60, dtype=np.uint8).reshape(5, 4, 3)
    values[4, :, :], values[:, 3, :], values[:, :, 2] = 200, 210, 220
    return values


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_axial_is_front_up_and_patients_right_on_the_left(kind: type, pack) -> None:
    values = head()
    picture = shown(pack(volume(values, kind=kind)))  # the middle slice, 1
    assert picture.shape == (4, 5)
    assert (picture[0] == 210).all()  # the front is up
    assert (picture[1:, 0] == 200).all()  # the patient's right is on the viewer's left
    for x in range(5):
        for y in range(4):
            assert picture[3 - y, 4 - x] == values[x, y, 1]


def test_coronal_and_sagittal_are_head_up() -> None:
    values = head()
    coronal = shown(volume(values), axis=1, slice_index=0)
    assert coronal.shape == (3, 5) and (coronal[0] == 220).all() and (coronal[1:, 0] == 200).all()
    sagittal = shown(volume(values), axis=0, slice_index=0)
    assert sagittal.shape == (3, 4) and (sagittal[0] == 220).all() and (sagittal[1:, 0] == 210).all()
    np.testing.assert_array_equal(coronal, values[::-1, 0, ::-1].T)
    np.testing.assert_array_equal(sagittal, values[0, ::-1, ::-1].T)


def test_slices_count_from_left_back_and_bottom() -> None:
    values = np.zeros((4, 4, 4), np.uint8)
    values[0], values[3] = 10, 40
    assert (shown(volume(values), axis=0, slice_index=0) == 10).all()
    assert (shown(volume(values), axis=0, slice_index=3) == 40).all()
    with pytest.raises(InputError, match=r"image \(bytes\): slice_index=4 is out of range, axis 0 has 4 slices"):
        shown(volume(values), axis=0, slice_index=4)


@settings(max_examples=60, deadline=None)
@given(st.permutations(range(3)), st.tuples(*[st.booleans()] * 3), st.integers(0, 2), st.integers(0, 2))
def test_storage_order_does_not_matter(order: list[int], flips: tuple[bool, ...], axis: int, index: int) -> None:
    """The same head, stored with its axes permuted and flipped and the affine that says so, gives the same picture."""
    canonical = nib.Nifti1Image(head(), np.diag([1.0, 2.0, 3.0, 1.0]))
    orientation = np.array([[target, -1 if flip else 1] for target, flip in zip(order, flips, strict=True)])
    stored = canonical.as_reoriented(orientation)
    expected = shown(canonical.to_bytes(), axis=axis, slice_index=index)
    np.testing.assert_array_equal(shown(stored.to_bytes(), axis=axis, slice_index=index), expected)
    turned = nib.as_closest_canonical(stored).get_fdata().take(index, axis=axis)
    np.testing.assert_array_equal(expected, turned[::-1, ::-1].T)


def test_oblique_takes_the_closest_axes() -> None:
    angle = np.deg2rad(20)
    affine = np.eye(4)
    affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    np.testing.assert_array_equal(shown(volume(head(), affine)), shown(volume(head())))


def test_window_and_slope() -> None:
    values = np.array([-160, 40, 240], np.int16).reshape(3, 1, 1)
    np.testing.assert_array_equal(shown(volume(values), window=(40.0, 400.0)), [[255, 128, 0]])
    image = nib.Nifti1Image(np.array([0, 50, 100], np.int16).reshape(3, 1, 1), np.eye(4))
    image.header.set_slope_inter(2, -100)
    np.testing.assert_array_equal(shown(image.to_bytes(), window=(0.0, 200.0)), [[255, 128, 0]])
    with pytest.raises(InputError, match="window=0 picks a view of a DICOM file"):
        shown(volume(values), window=0)


def test_without_a_window_the_range_of_the_slice() -> None:
    values = np.zeros((3, 1, 2), np.float32)
    values[:, 0, 0] = -1, 0, 1
    values[:, 0, 1] = 5000
    np.testing.assert_array_equal(shown(volume(values), slice_index=0, window=None), [[255, 128, 0]])
    assert not shown(volume(values), slice_index=1, window=None).any()


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("order", ["<", ">"])
def test_dtypes_and_byte_orders(dtype: type, order: str) -> None:
    values = np.array([0, 60, 120], dtype).reshape(3, 1, 1)
    header = nib.Nifti1Header(endianness=order)
    header.set_data_dtype(dtype)
    data = nib.Nifti1Image(values, np.eye(4), header).to_bytes()
    np.testing.assert_array_equal(shown(data, window=(60.0, 120.0)), [[255, 128, 0]])


def test_rgb() -> None:
    colors = np.zeros((2, 1, 1), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    colors[0, 0, 0], colors[1, 0, 0] = (1, 2, 3), (250, 100, 0)
    np.testing.assert_array_equal(read_image(volume(colors)), [[[250, 100, 0], [1, 2, 3]]])
    with pytest.raises(InputError, match="does not apply to a colour NIfTI volume"):
        read_image(volume(colors), ReadOptions(window=FULL))


def test_fourth_axis() -> None:
    one = np.full((3, 2, 4, 1), 7, np.uint8)
    assert (shown(volume(one)) == 7).all()
    with pytest.raises(InputError, match=r"expected a 3-D volume, got shape \[3, 2, 4, 5\]; save one volume"):
        shown(volume(np.zeros((3, 2, 4, 5), np.uint8)))


def test_only_the_slice_shown_must_be_finite() -> None:
    values = np.zeros((2, 2, 2), np.float32)
    values[0, 0, 1] = np.nan
    assert shown(volume(values), slice_index=0).shape == (2, 2)
    with pytest.raises(InputError, match="1 of 4 values are NaN or infinite; replace them"):
        shown(volume(values), slice_index=1)


def test_gzip_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    data = gzip.compress(volume(np.zeros((128, 128, 64), np.uint8)))
    assert len(data) < 10_000
    assert shown(data).shape == (128, 128)
    monkeypatch.setattr(limits, "MAX_FILE_BYTES", 500_000)
    with pytest.raises(InputError, match="unpacks to more than the limit of 500,000 bytes"):
        shown(data)


@pytest.mark.parametrize("path", NIBABEL_FILES, ids=lambda path: path.name)
def test_every_file_of_nibabel_loads_or_says_why(path: Path) -> None:
    try:
        picture = read_image(path)
    except InputError as error:
        assert str(error).startswith(f"image {path.name!r}: ") and "\n" not in str(error)
    else:
        assert picture.ndim == 3 and picture.shape[2] == 3 and picture.dtype == np.uint8


@pytest.mark.parametrize("name", ["anatomical.nii", "standard.nii.gz", "reoriented_anat_moved.nii"])
def test_these_files_of_nibabel_load(name: str) -> None:
    canonical = nib.as_closest_canonical(nib.load(NIBABEL_DATA / name)).get_fdata()
    for axis in range(3):
        plane = canonical.take(canonical.shape[axis] // 2, axis=axis)[::-1, ::-1].T
        picture = read_image(NIBABEL_DATA / name, ReadOptions(axis=axis))[..., 0]
        assert picture.shape == plane.shape
        # The picture orders its pixels as the volume does.
        order = np.argsort(plane.ravel(), kind="stable")
        assert (np.diff(picture.ravel()[order].astype(int)) >= 0).all()
