"""What a finished run leaves: an adapter that the runtime merges, scaffolding that explains, a report."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

import vitalrt
from vitalrt.errors import VitalError
from vitalrt.explain.roi_index import RoiIndex
from vitalrt.model.scaffold import Scaffold
from vitalrt_training import vital_trainer
from vitalrt_training.backbone import TINY
from vitalrt_training.data.phantom import ask, draw_phantom
from vitalrt_training.data.tables import SAMPLES_SCHEMA, load_tables, write_rows
from vitalrt_training.losses import LossConfig
from vitalrt_training.vital_trainer import VitalRun, train_vital


def test_the_adapter_is_what_the_runtime_merges(recipe, finished):
    """Latents and first-token logits of the training graph in eval mode equal the runtime's."""
    run = VitalRun(recipe, finished, vital_trainer.Accelerator())
    run.model.eval()
    rows = list(range(5))
    batch = run.collator.collate(rows)
    with torch.no_grad():
        loop = run.model.think(batch)
    runtime = vitalrt.load(recipe.backbone, adapter=finished / "adapter", device="cpu")
    samples = sorted((run.tables.samples[row] for row in rows), key=lambda s: batch.sample_ids.index(s["id"]))
    row_of = {run.tables.samples[row]["id"]: row for row in rows}
    prompts = [runtime.prepare(run.tables.read_picture(row_of[s["id"]]), s["question"]) for s in samples]
    answers = runtime.run(prompts, k=batch.num_steps.tolist(), max_new_tokens=1, return_logits=True)
    for n, answer in enumerate(answers):
        torch.testing.assert_close(answer.logits[0], loop.logits[n, 0], rtol=1e-4, atol=1e-4)
        own = torch.stack([latent[n, 0] for latent in loop.latents[: int(batch.num_steps[n])]])
        torch.testing.assert_close(answer.latents, own, rtol=1e-4, atol=1e-4)


def test_scaffolding_changes_nothing_about_the_deployed_model(recipe, finished):
    with_scaffold = vitalrt.load(recipe.backbone, adapter=finished / "adapter", device="cpu")
    assert Scaffold.load(finished / "adapter").projector.variant == "res_mlp_ln"
    for name in ("scaffold.safetensors", "scaffold.json"):
        (finished / "adapter" / name).rename(finished / name)
    try:
        without = vitalrt.load(recipe.backbone, adapter=finished / "adapter", device="cpu")
    finally:
        for name in ("scaffold.safetensors", "scaffold.json"):
            (finished / name).rename(finished / "adapter" / name)
    pairs = zip(with_scaffold.weights.named_parameters(), without.weights.named_parameters(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    prompt = vitalrt.Prompt([1, 2, 3])
    answers = [model.run([prompt], k=2, max_new_tokens=4)[0] for model in (with_scaffold, without)]
    assert answers[0].token_ids == answers[1].token_ids
    assert torch.equal(answers[0].latents, answers[1].latents)


def test_a_finished_run_can_be_explained(recipe, finished):
    """Its text decoder has a tokenizer of its own, which goes along, and the token that ended every step it learnt."""
    adapter = finished / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(recipe.text_decoder)
    scaffold = Scaffold.load(adapter)
    assert scaffold.supervised == ("text", "visual")
    assert scaffold.text_decoder.config.eos_token_id == tokenizer.eos_token_id
    assert (
        Tokenizer.from_file(str(adapter / "scaffold_tokenizer.json")).to_str() == tokenizer.backend_tokenizer.to_str()
    )
    index = RoiIndex.load(adapter / "roi_index.safetensors")
    phantoms = [draw_phantom("train", 5, number) for number in range(6)]
    asked = {f"{sample.target_name}, {phantom.modality}" for phantom in phantoms for sample in ask(phantom)}
    assert index.encoder_id == "random" and index.labels and set(index.labels) <= asked
    explanation = vitalrt.load(recipe.backbone, adapter=adapter, device="cpu").explain(
        phantoms[0].image, "Where is it?", k=2
    )
    assert [type(step.text) for step in explanation.steps] == [str, str]
    assert explanation.steps[0].neighbours[0].label in index.labels
    assert "random" in explanation.missing["pictures"]  # the encoder, which lies nowhere


def test_scaffolding_tells_what_trained_it(recipe, tmp_path):
    for name, changed, expected in (
        ("words", {"losses": LossConfig(text_weight=1.0, visual_weight=0.0)}, ("text",)),
        ("nothing", {"losses": LossConfig(text_weight=0.0, visual_weight=0.0)}, ()),
        ("never thinks", {"k_weights": (1.0,)}, ()),
    ):
        settings = {"text_decoder": TINY, "schedule": "full_mix", "epochs": (0.2,), **changed}
        directory = train_vital(replace(recipe, **settings), tmp_path / name)
        assert Scaffold.load(directory).supervised == expected
        assert not (directory / "scaffold_tokenizer.json").exists()  # the backbone's reads these words
        assert not (directory / "roi_index.safetensors").exists()


def test_only_training_samples_count_as_supervision(recipe, write_tables, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    phantoms = [draw_phantom("train", 5, index) for index in range(4)]
    write_tables(folder, phantoms, "validation", "validation", "train")
    tables = load_tables(folder)
    training = set(tables.select("train").tolist())
    rows = [
        sample | ({"roi_feature": None, "chain": []} if number in training else {})
        for number, sample in enumerate(tables.samples)
    ]
    write_rows(folder / "samples.parquet", rows, SAMPLES_SCHEMA)
    settings = {"text_decoder": TINY, "schedule": "full_mix", "epochs": (1.0,), "data": str(folder)}
    assert Scaffold.load(train_vital(replace(recipe, **settings), tmp_path / "run")).supervised == ()
    with pytest.raises(VitalError, match=r"epochs: expected at least one step in phase 1, got 0.01 of"):
        train_vital(replace(recipe, **settings | {"epochs": (0.01,)}), tmp_path / "none")


def test_an_index_may_be_smaller_or_stay_away(recipe, tmp_path):
    settings = {"text_decoder": TINY, "schedule": "full_mix", "epochs": (0.2,)}
    for count in (0, 3):
        directory = train_vital(replace(recipe, indexed_regions=count, **settings), tmp_path / str(count))
        path = directory / "roi_index.safetensors"
        assert path.exists() == bool(count)
    assert len(RoiIndex.load(path).labels) == 3
    with pytest.raises(VitalError, match="indexed_regions: expected at least 0, got -1"):
        replace(recipe, indexed_regions=-1)


def test_a_finished_run_reports_on_the_validation_split(recipe, write_tables, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    phantoms = [draw_phantom("train", 5, index) for index in range(7)]
    write_tables(folder, phantoms, *["train"] * 5, "validation")
    recipe = replace(recipe, data=str(folder), k_weights=(1.0, 1.0, 1.0), epochs=(0.3, 0.3))
    train_vital(recipe, tmp_path / "run", trackers=["tensorboard"])
    report = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert report["variant"] == "VITAL"
    assert set(report["evaluation"]["by_k"]) == {"0", "1", "2"}
    assert (report["evaluation"]["split"], report["evaluation"]["pictures"]) == ("validation", 2)
    asked = sum(sample.question_type != "describe" for phantom in phantoms[5:] for sample in ask(phantom))
    assert report["evaluation"]["closed_questions"] == asked
    assert np.diag(report["probes"]["cosine"]) == pytest.approx([1, 1])
    assert set(report["probes"]["gradient_norms"]) == {"task", "text", "visual"}
    assert list((tmp_path / "run" / "trackers").rglob("events.out.tfevents*"))
