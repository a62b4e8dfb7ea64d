"""Resizing in torch against Pillow's, byte for byte."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from vitalrt.inputs.bicubic import resize_bicubic

SIDES = st.integers(1, 12) | st.integers(1, 300)


def noise(seed: int, height: int, width: int) -> np.ndarray:
    """Grey levels for even seeds; black and white for odd ones, whose edges leave 0..255."""
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.where(levels > 127, 255, 0).astype(np.uint8) if seed % 2 else levels


def assert_as_pillow(pixels: np.ndarray, height: int, width: int) -> None:
    expected = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    resized = resize_bicubic(torch.from_numpy(pixels), height, width)
    assert resized.dtype == torch.uint8
    np.testing.assert_array_equal(resized.numpy(), np.asarray(expected))


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 99), before=st.tuples(SIDES, SIDES), after=st.tuples(SIDES, SIDES))
@example(seed=0, before=(97, 89), after=(97, 89))
@example(seed=0, before=(97, 89), after=(97, 31))
@example(seed=0, before=(97, 89), after=(31, 89))
@example(seed=1, before=(1, 1), after=(64, 96))
@example(seed=1, before=(64, 96), after=(1, 1))
@example(seed=0, before=(1, 200), after=(8, 283))
@example(seed=0, before=(300, 2), after=(283, 8))
def test_every_byte_is_pillows(seed, before, after) -> None:
    assert_as_pillow(noise(seed, *before), *after)


@pytest.mark.parametrize("after", [(41, 199), (199, 41), (199, 199), (128, 127), (129, 127), (300, 400)])
def test_either_axis_first(after) -> None:
    """Which one is, depends on the sizes, and a picture of black and white shows it."""
    assert_as_pillow(noise(1, 257, 191), *after)


def test_a_large_picture_shrinks() -> None:
    assert_as_pillow(noise(0, 2003, 1501), 448, 336)


def test_layout_does_not_matter_and_nothing_is_modified() -> None:
    pixels = torch.from_numpy(noise(0, 40, 50))
    kept = pixels.clone()
    strided = pixels.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(resize_bicubic(strided, 33, 71), resize_bicubic(pixels, 33, 71))
    assert torch.equal(pixels, kept)
