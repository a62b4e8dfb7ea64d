"""The phantoms' encoder: its captions and loss, and that a run is repeatable, resumable and an ordinary directory."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import AutoTokenizer, SiglipModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from vitalrt.errors import VitalError
from vitalrt.model.vision_encoder import VisionEncoder
from vitalrt_training import encoder
from vitalrt_training.data import teacher
from vitalrt_training.data.phantom import draw_phantom
from vitalrt_training.encoder import (
    caption,
    close_up_caption,
    draw_views,
    judge_encoder,
    phantom_encoder,
    sigmoid_loss,
    train_encoder,
)

TINY = replace(phantom_encoder(), steps=5, phantoms_per_batch=3, caption_phantoms=60, judged_phantoms=8)
TINY = replace(TINY, checkpoint_every=2)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    train_encoder(TINY, run_dir)
    return run_dir


def losses(run_dir):
    return [json.loads(line)["loss"] for line in (run_dir / "log.jsonl").read_text().splitlines()]


def test_captions_say_what_is_shown_and_where():
    several = 0
    for index in range(60):
        phantom = draw_phantom("train", 0, index)
        text = caption(phantom)
        modality, things = text.split(" : ")
        assert modality == phantom.modality
        if not phantom.targets:
            assert things == "nothing"
            continue
        phrases = things.split(" , ")
        ordered = sorted(phantom.targets, key=lambda target: -target.mask.sum())
        for phrase, target in zip(phrases, ordered, strict=True):
            assert phrase.startswith(teacher.size(target.mask)) and target.name in phrase
            assert phrase.endswith(teacher.place(target.mask) or target.name)
            close = close_up_caption(phantom, target.name)
            assert close.startswith(f"{phantom.modality} close-up : ")
            alone = [other.name for other in phantom.targets].count(target.name) == 1
            assert not alone or close.endswith(target.name)
            several += not alone
    assert several


def test_the_loss_counts_equal_captions_as_pairs():
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.float64)
    expected = binary_cross_entropy_with_logits(logits, labels, reduction="sum") / 4
    torch.testing.assert_close(sigmoid_loss(logits, ["a", "b", "a", "c"]), expected)


def test_the_loss_of_different_captions_is_siglips(finished_run):
    model = SiglipModel.from_pretrained(finished_run / "encoder").eval()
    ids, pixels = torch.arange(3 * 48).reshape(3, 48) % 20, torch.randn(3, 3, 96, 96)
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=pixels, return_loss=True)
    torch.testing.assert_close(sigmoid_loss(out.logits_per_text, ["a", "b", "c"]), out.loss)


def test_a_steps_views_follow_from_seed_and_step():
    drawn = [draw_views(replace(TINY, seed=seed), step) for seed, step in ((0, 3), (0, 3), (0, 4), (1, 3))]
    assert drawn[0][1] == drawn[1][1]
    assert all(np.array_equal(a, b) for a, b in zip(drawn[0][0], drawn[1][0], strict=True))
    assert len({tuple(captions) for _, captions in drawn}) == 3


def test_every_caption_fits_the_text_tower(finished_run):
    tokenizer = AutoTokenizer.from_pretrained(finished_run / "encoder")
    for step in range(8):
        for text in draw_views(phantom_encoder(), step)[1]:
            assert len(tokenizer(text)["input_ids"]) < encoder.CAPTION_TOKENS


def test_an_interrupted_run_goes_on_bit_for_bit(finished_run, tmp_path, monkeypatch):
    def fail_at_step_3(recipe, step):
        if step == 3:
            raise KeyboardInterrupt
        return draw_views(recipe, step)

    monkeypatch.setattr(encoder, "draw_views", fail_at_step_3)
    with pytest.raises(KeyboardInterrupt):
        train_encoder(TINY, tmp_path)
    monkeypatch.undo()
    assert not (tmp_path / "encoder").exists() and len(losses(tmp_path)) == 3
    train_encoder(TINY, tmp_path)
    assert losses(tmp_path) == losses(finished_run)
    weights = [(run / "encoder" / "model.safetensors").read_bytes() for run in (tmp_path, finished_run)]
    assert weights[0] == weights[1]


def test_another_recipe_does_not_overwrite_a_run(finished_run):
    with pytest.raises(VitalError, match="another recipe"):
        train_encoder(replace(TINY, seed=7), finished_run)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "sigmoid_loss", lambda logits, captions: logits.sum() * float("nan"))
    with pytest.raises(VitalError, match="step 0"):
        train_encoder(TINY, tmp_path)


@pytest.mark.parametrize("changes", [{"steps": 0}, {"phantoms_per_batch": 0}, {"modalities_per_batch": 10}])
def test_bad_settings_are_named(changes):
    with pytest.raises(VitalError, match=next(iter(changes))):
        replace(TINY, **changes)


def test_the_result_is_an_ordinary_directory_that_gives_roi_features(finished_run):
    directory = finished_run / "encoder"
    image = draw_phantom("test", 0, 0).image
    processed = AutoImageProcessor.from_pretrained(directory)(images=[image], return_tensors="pt")
    assert processed["pixel_values"].shape == (1, 3, 96, 96)
    found = VisionEncoder(directory)
    assert (found.grid, found.width) == ((12, 12), 128)
    report = json.loads((finished_run / "report.json").read_text())
    assert report["trained"] == judge_encoder(found, TINY.seed, TINY.judged_phantoms)
    assert report["untrained"]["num_targets"] == report["trained"]["num_targets"] > 0
