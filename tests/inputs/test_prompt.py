"""Ready-made prompts: every form they come in, their digests, and what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitalrt import InputError, Prompt
from vitalrt.inputs.prompt import Picture

PIXELS = torch.arange(8 * 6, dtype=torch.float32).reshape(8, 6)
GRID = torch.tensor([[1, 2, 2], [1, 1, 4]])


@pytest.mark.parametrize(
    "ids",
    [
        [3, 1, 2],
        (3, 1, 2),
        np.array([3, 1, 2], np.int32),
        torch.tensor([3, 1, 2], dtype=torch.uint8),
        torch.tensor([[3, 1, 2]]),
        [[3, 1, 2]],
    ],
)
def test_ids_in_any_form(ids) -> None:
    prompt = Prompt(ids)
    assert prompt.input_ids.dtype == torch.int64
    assert prompt.input_ids.tolist() == [3, 1, 2]
    assert prompt.num_tokens == 3
    assert prompt.grids() == [] and prompt.digests == ()


def test_pictures_in_any_form() -> None:
    for pixels, grid in ((PIXELS, GRID), (PIXELS.numpy(), GRID.numpy()), (PIXELS.tolist(), GRID.tolist())):
        prompt = Prompt([1], pixels, grid)
        assert torch.equal(prompt.pixel_values, PIXELS)
        assert prompt.grids() == [(1, 2, 2), (1, 1, 4)]
        assert prompt.digests == Prompt([2, 3], PIXELS, GRID).digests


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (([],), "input_ids"),
        ((None,), "input_ids"),
        (("text",), "input_ids"),
        (([1.0, 2.0],), "input_ids"),
        (([True, False],), "input_ids"),
        (([[1, 2], [3, 4]],), "input_ids"),
        (([[1, 2], [3]],), "input_ids"),
        ((torch.tensor(3),), "input_ids"),
        ((torch.empty(1, 0, dtype=torch.int64),), "input_ids"),
        (([1], PIXELS), "pixel_values and image_grid_thw"),
        (([1], None, GRID), "pixel_values and image_grid_thw"),
        (([1], "pixels", GRID), "pixel_values"),
        (([1], PIXELS, "grid"), "image_grid_thw"),
        (([1], PIXELS.long(), GRID), "pixel_values"),
        (([1], PIXELS[None], GRID), "pixel_values"),
        (([1], PIXELS[:7], GRID), "pixel_values"),
        (([1], PIXELS, GRID[:1]), "pixel_values"),
        (([1], PIXELS, GRID[0]), "image_grid_thw"),
        (([1], PIXELS, GRID[:, :2]), "image_grid_thw"),
        (([1], PIXELS, -GRID), "image_grid_thw"),
        (([1], PIXELS[:0], GRID[:0]), "image_grid_thw"),
        (([1], PIXELS.index_fill(1, torch.tensor([3]), float("nan")), GRID), "pixel_values"),
        (([1], PIXELS / 0, GRID), "pixel_values"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, name) -> None:
    with pytest.raises(InputError, match=rf"^{name}: expected .*, got .*"):
        Prompt(*arguments)


def test_one_digest_per_picture() -> None:
    assert len(set(Prompt([1], PIXELS, GRID).digests)) == 2
    with pytest.raises(InputError, match=r"^digests: expected one per image"):
        Prompt([1], PIXELS, GRID, digests=[b"one"])


@settings(max_examples=50, deadline=None)
@given(patch=st.integers(0, 7), column=st.integers(0, 5), change=st.floats(-5, 5, width=32).filter(bool))
def test_a_digest_tells_every_change(patch, column, change) -> None:
    changed = PIXELS.clone()
    changed[patch, column] += change
    first, second = Prompt([1], changed, GRID).digests
    before = Prompt([1], PIXELS, GRID).digests
    is_same = bool(changed[patch, column] == PIXELS[patch, column])  # lost in rounding
    assert ((first == before[0]), (second == before[1])) == (is_same or patch >= 4, is_same or patch < 4)


def test_a_digest_tells_the_grid_and_the_precision() -> None:
    pixels = PIXELS[:4]
    forms = [(pixels, [[1, 2, 2]]), (pixels, [[1, 1, 4]]), (pixels, [[1, 4, 1]]), (pixels.half(), [[1, 2, 2]])]
    assert len({Prompt([1], pixels, torch.tensor(grid)).digests for pixels, grid in forms}) == 4


def test_patches_are_made_once_and_when_they_are_needed() -> None:
    made = []
    picture = Picture((1, 2, 2), 6, b"digest", lambda device: made.append(device.type) or PIXELS[:4].to(device))
    prompt = Prompt.of_pictures([1], [picture], preprocess_ms=3.0)
    assert prompt.digests == (b"digest",) and prompt.grids() == [(1, 2, 2)] and prompt.preprocess_ms == 3.0
    assert prompt.image_grid_thw is not None and prompt.image_grid_thw.tolist() == [[1, 2, 2]]
    assert not made
    for _ in range(2):
        assert prompt.pixel_values is not None and torch.equal(prompt.pixel_values, PIXELS[:4])
    assert made == ["cpu"]


def test_another_device_makes_patches_of_its_own_where_the_cpu_has_none() -> None:
    made, meta = [], torch.device("meta")
    picture = Picture((1, 2, 2), 6, b"digest", lambda device: made.append(device.type) or PIXELS[:4].to(device))
    prompt = Prompt.of_pictures([1], [picture], preprocess_ms=0.0)
    assert picture.patches(meta).is_meta and picture.patches(meta).is_meta
    assert made == ["meta", "meta"]  # none of its memory is held
    assert prompt.pixel_values is not None and torch.equal(prompt.pixel_values, PIXELS[:4])
    assert picture.patches(meta).is_meta and made == ["meta", "meta", "cpu"]
