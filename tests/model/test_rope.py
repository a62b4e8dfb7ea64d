"""Positions and rotations against transformers, and the errors of prompts that disagree with their grids."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLTextRotaryEmbedding,
    apply_rotary_pos_emb,
)

import vitalrt
from vitalrt.model.rope import MRope, grid_taps, mrope_positions, patch_coordinates
from vitalrt_kernels import rotate

grid = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), grids=st.lists(grid, max_size=4), num_text=st.integers(1, 9))
def test_positions_of_text_and_pictures(tiny, seed, grids, num_text) -> None:
    prompt = tiny.prompt(seed, grids, num_text)
    positions, following = mrope_positions(prompt.input_ids, prompt.grids(), tiny.model.weights.config)
    ids = prompt.input_ids[None]
    is_image = (ids == tiny.reference.config.image_token_id).int()
    expected, delta = tiny.reference.model.get_rope_index(ids, is_image, image_grid_thw=prompt.image_grid_thw)
    assert torch.equal(positions, expected[:, 0])
    assert following == prompt.num_tokens + int(delta)


def test_a_picture_may_come_first(tiny) -> None:
    prompt = tiny.prompt(0, [(1, 2, 3)], num_text=0)
    ids = prompt.input_ids[1:]  # without the start-of-vision token
    positions, following = mrope_positions(ids, prompt.grids(), tiny.model.weights.config)
    assert positions[:, :6].tolist() == [[0] * 6, [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]]
    assert positions[:, 6].tolist() == [3, 3, 3]
    assert following == len(ids) - 6 + 3


@settings(max_examples=40, deadline=None)
@given(
    half=st.integers(2, 16),
    sections=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    theta=st.sampled_from([10.0, 10000.0, 5e6]),
    seed=st.integers(0, 99),
)
def test_rotation_is_transformers(tiny, half, sections, theta, seed) -> None:
    height, width = (min(section, half // 3) for section in sections)
    sections = [half - height - width, height, width]
    theirs = Qwen3VLTextRotaryEmbedding(
        Qwen3VLTextConfig(
            head_dim=2 * half,
            rope_parameters={"rope_type": "default", "rope_theta": theta, "mrope_section": sections},
        )
    )
    ours = MRope(_decoder_config(tiny, head_dim=2 * half, rope_theta=theta, mrope_section=tuple(sections)))
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(0, 500, (3, 5), generator=generator)
    x = torch.randn(5, 4, 2 * half, generator=generator)
    cos, sin = theirs(x, positions[:, None])
    expected, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    torch.testing.assert_close(rotate(x, *ours(positions, x.dtype)), expected[0].transpose(0, 1), atol=1e-5, rtol=0)
    same = positions[:1].expand(3, -1)
    assert all(map(torch.equal, ours(positions[:1], x.dtype), ours(same, x.dtype)))


def _decoder_config(tiny, **changes):
    config = tiny.model.weights.config.decoder
    return type(config)(**{**vars(config), **changes})


@settings(max_examples=30, deadline=None)
@given(grids=st.lists(grid, min_size=1, max_size=3))
def test_taps_are_weights_inside_the_grid(tiny, grids) -> None:
    config = tiny.model.weights.config.vision
    merge = config.spatial_merge_size
    grids = [(t, h * merge, w * merge) for t, h, w in grids]
    coordinates = patch_coordinates(grids, merge, torch.device("cpu"))
    indices, weights = grid_taps(coordinates, grids, config)
    num_patches = sum(t * h * w for t, h, w in grids)
    assert indices.shape == weights.shape == (num_patches, 4)
    assert 0 <= int(indices.min()) <= int(indices.max()) < config.num_position_embeddings
    torch.testing.assert_close(weights.sum(1), torch.ones(num_patches))
    assert float(weights.min()) >= 0
    start = 0
    for t, h, w in grids:  # each patch of each frame once
        seen = coordinates[:, start : start + t * h * w].T.tolist()
        assert sorted(seen) == sorted([row, column] for row in range(h) for column in range(w) for _ in range(t))
        start += t * h * w


PICTURE = (1, 4, 4)  # four visual tokens at merge size 2


def _prompt(ids: list[int], grids=(PICTURE,)) -> vitalrt.Prompt:
    return vitalrt.Prompt(ids, torch.zeros(sum(t * h * w for t, h, w in grids), 96), torch.tensor(grids))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (lambda i: _prompt([1, *[i] * 3, 2]), "input_ids: expected 4 image placeholders for 1 images, got 3"),
        (lambda i: _prompt([1, *[i] * 5, 2]), "input_ids: expected 4 image placeholders for 1 images, got 5"),
        (lambda i: vitalrt.Prompt([1, i, 2]), "input_ids: expected 0 image placeholders for 0 images, got 1"),
        (lambda i: _prompt([1, i, i, 2, i, i]), "input_ids: expected each image's placeholders in one run"),
        (lambda i: _prompt([1, *[i] * 4], [(1, 1, 16)]), "image_grid_thw: expected height and width in multiples of 2"),
        (lambda i: vitalrt.Prompt([1, i + 1, 2]), "input_ids: expected text and images, got video placeholders"),
        (lambda i: vitalrt.Prompt([1, 84]), "input_ids: expected ids from 0 to 83, got 84"),
        (lambda i: vitalrt.Prompt([-1, 3]), "input_ids: expected ids from 0 to 83, got -1"),
    ],
)
def test_a_prompt_that_disagrees_with_its_grid_is_refused(tiny, model, prompt, message) -> None:
    with pytest.raises(vitalrt.InputError, match=f"^{message}"):
        model.run([prompt(tiny.reference.config.image_token_id)], k=1)
