"""The trainer: repeatable, resumable, and in parity with the runtime. K latent steps."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from vitalrt.errors import VitalError
from vitalrt_training import trainer
from vitalrt_training.data.phantom import draw_phantom
from vitalrt_training.losses import Mean
from vitalrt_training.recipes import phantom, phantom_backbone, with_settings
from vitalrt_training.vision_warmup import NUM_CLASSES, class_shares

TINY = replace(
    phantom_backbone(),
    vision_steps=3,
    vision_images_per_batch=2,
    scene_steps=2,
    scene_images_per_batch=2,
    answer_steps=5,
    place_steps=2,
    images_per_batch=2,
    tokenizer_images=20,
    validation_images=2,
    checkpoint_every=2,
    threads=1,
)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    trainer.train(TINY, run_dir)
    return run_dir


def losses(run_dir):
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [(record["stage"], record["step"], record["loss"]) for record in records]


@pytest.mark.parametrize("interrupted_stage", ["vision", "scene", "answers", "places"])
def test_an_interrupted_run_goes_on_bit_for_bit(finished_run, tmp_path, monkeypatch, interrupted_stage):
    do_step = trainer._step

    def fail_late(stage, optimizer, recipe, step, state_path):
        if stage.name == interrupted_stage and step == stage.steps - 1:
            raise KeyboardInterrupt
        return do_step(stage, optimizer, recipe, step, state_path)

    monkeypatch.setattr(trainer, "_step", fail_late)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(TINY, tmp_path)
    monkeypatch.undo()
    assert not (tmp_path / "model").exists()
    trainer.train(TINY, tmp_path)
    assert losses(tmp_path) == losses(finished_run)
    weights = [(d / "model" / "model.safetensors").read_bytes() for d in (tmp_path, finished_run)]
    assert weights[0] == weights[1]


def test_another_recipe_does_not_overwrite_a_run(finished_run):
    before = losses(finished_run)
    with pytest.raises(VitalError, match="another recipe"):
        trainer.train(replace(TINY, seed=7), finished_run)
    assert losses(finished_run) == before


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path, monkeypatch):
    monkeypatch.setattr(
        trainer, "task_loss", lambda logits, answer_ids: Mean(logits.sum() * float("nan"), torch.ones(()))
    )
    with pytest.raises(VitalError, match="step 0 of stage scene"):
        trainer.train(TINY, tmp_path)


def test_settings_are_checked():
    assert with_settings(phantom(), {"seed": "7", "k_weights": "1,0,2"}).k_weights == (1.0, 0.0, 2.0)
    assert with_settings(phantom(), {"k_weights": "", "losses.text_weight": "0"}).losses.text_weight == 0
    together = with_settings(phantom(), {"schedule": "full_mix", "epochs": "1.5", "losses.text_weight": "0"})
    assert [phase.epochs for phase in together.phases] == [1.5]
    for settings, message in (
        ({"stepz": "7"}, "stepz"),
        ({"seed": "many"}, "seed"),
        ({"batch_size": "0"}, "batch_size"),
        ({"epochs": "1,2"}, "epochs"),
        ({"k_weights": "0,0,1"}, "k_weights"),
        ({"final_rate": "2"}, "final_rate"),
    ):
        with pytest.raises(VitalError, match=message):
            with_settings(phantom(), settings)


def test_class_shares_cover_each_square_once_and_follow_the_masks(finished_run):
    phantom = next(p for p in (draw_phantom("test", 2, index) for index in range(50)) if p.targets)
    grid = (1, 12, 12)
    shares = class_shares(phantom, grid, merge=2)
    assert shares.shape == (36, NUM_CLASSES)
    torch.testing.assert_close(shares.sum(-1), torch.ones(36))
    covered = np.logical_or.reduce([target.mask for target in phantom.targets]).mean()
    assert abs(1 - shares[:, 0].mean() - covered) < 0.02
