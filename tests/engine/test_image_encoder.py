"""Images through the vision tower in groups: each gets what it would have got alone."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch

import vitalrt
from vitalrt.engine import image_encoder
from vitalrt.engine.image_encoder import ImageEncoder, images_of
from vitalrt.inputs import processor
from vitalrt.inputs.image import ReadOptions

GRIDS = [(1, 2, 3), (1, 4, 4), (2, 2, 2), (1, 2, 3), (1, 4, 4), (1, 1, 5)]  # in visual tokens, of 4 patches each


@pytest.fixture
def prompts(tiny) -> list[vitalrt.Prompt]:
    return [tiny.prompt(seed, [grid]) for seed, grid in enumerate(GRIDS)]


@pytest.mark.parametrize("max_patches", [1, 40, 64, 10_000])
def test_features_are_those_of_the_image_alone(tiny, prompts, monkeypatch, max_patches: int) -> None:
    tower = tiny.model.weights.vision
    sizes: list[int] = []
    forward = tower.forward
    monkeypatch.setattr(tower, "forward", lambda pixels, grids: sizes.append(len(pixels)) or forward(pixels, grids))
    width = tower.config.intermediate_size * tower.patch_embed.weight.itemsize
    monkeypatch.setattr(image_encoder, "CPU_BYTES", max_patches * width)
    images = [
        image for prompt in prompts for image in images_of(prompt, b"", tiny.model.checkpoint.config.image_token_id)
    ]
    encoder = ImageEncoder(tower, max_bytes=0)
    with torch.inference_mode():
        encoder.encode(images)
        largest = max(image.picture.num_patches for image in images)
        assert max(sizes) <= max(max_patches, largest)
        assert sum(sizes) == sum(image.picture.num_patches for image in images)
        assert len(sizes) == {1: 6, 10_000: 1}.get(max_patches, len(sizes))
        for image in images:
            tokens, deepstack = forward(image.picture.patches(), [image.picture.grid])
            for found, expected in zip(
                (image.features.tokens, *image.features.deepstack), (tokens, *deepstack), strict=True
            ):
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert encoder.num_encoded == len(GRIDS)


def test_a_device_makes_patches_when_its_tower_looks(talker, monkeypatch) -> None:
    """On meta: the picture is neither resized by the CPU nor before the features are wanted."""
    model = talker.load()
    monkeypatch.setattr(processor, "patchify", lambda *_: pytest.fail("on the CPU"))
    made = []
    patchify_on = processor.patchify_on
    monkeypatch.setattr(processor, "patchify_on", lambda *of: made.append(of) or patchify_on(*of))
    encoder = ImageEncoder(deepcopy(model.weights.vision).to("meta"), max_bytes=0)
    monkeypatch.setattr(model.engine, "encoder", encoder)
    pictures = model.processor.look_at([np.zeros((40, 50, 3), np.uint8), np.ones((60, 30), np.uint8)], ReadOptions())
    model.engine.make_patches(pictures)
    assert not made
    images = images_of(model.processor.ask_about(pictures, "What?", 0.0), b"", model.processor.image_token_id)
    with torch.inference_mode():
        encoder.encode(images)
    assert len(made) == 2
    assert all(image.features is not None and image.features.tokens.is_meta for image in images)
