"""Baselines on VITAL's backbone and tables: what each is taught to think, write and answer."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import vitalrt
from bench import baselines
from vitalrt.errors import VitalError
from vitalrt.model.scaffold import Scaffold
from vitalrt_training import evaluate as evaluation
from vitalrt_training import finished_run
from vitalrt_training.backbone import TINY
from vitalrt_training.data.phantom import Sample, draw_phantom
from vitalrt_training.data.tables import SAMPLES_SCHEMA, load_tables, write_rows
from vitalrt_training.evaluate import Outcome, Shown, TablePictures, evaluate, is_right
from vitalrt_training.losses import IGNORED, LossConfig
from vitalrt_training.plan import plan
from vitalrt_training.probes import probe
from vitalrt_training.recipes import (
    BASELINES,
    RECIPES,
    as_coconut,
    as_cot,
    as_direct,
    as_sim_cot,
    phantom,
    vital_8b,
    with_settings,
)
from vitalrt_training.report import variant_of
from vitalrt_training.vital_trainer import Accelerator, VitalRun, draw_k, train_vital
from vitalrt_training.written import END_OF_THOUGHT, answer_of, write_out


def test_a_thought_is_written_before_its_answer_and_read_off_again():
    text = write_out(("It is bright.", "It is on the left."), "left")
    assert text == "It is bright.\nIt is on the left.\n</think>\nleft"
    assert answer_of(text) == "left"
    assert write_out((), "left") == answer_of("left") == "left"
    assert answer_of("It is bright.\nIt is on") == "It is bright.\nIt is on"  # cut off: no answer


def taught(run, phase, row):
    """(latent steps, what is written, chain steps that supervise latents) for a sample in a phase."""
    k = draw_k(run.recipe, phase, step=0)
    batch = run.collator.collate([row], k)
    tokenizer = run.collator.collator.processor.tokenizer
    ids = batch.prompt.answer_ids[0]
    assert ids[-1] == tokenizer.eos_token_id
    steps = [tokenizer.decode(step[step != IGNORED][:-1]) for step in batch.chain_ids[0] if (step != IGNORED).any()]
    return int(batch.num_steps[0]), tokenizer.decode(ids[:-1]), steps


def test_every_baseline_is_taught_what_its_paper_says(recipe, tmp_path):
    run = VitalRun(recipe, tmp_path, Accelerator())
    row = next(row for row in range(len(run.tables.samples)) if run.tables.num_steps[row] == 3)
    sample = run.tables.samples[row]
    (first, second, third), answer = sample["chain"], sample["answer"]

    def phases(derived):
        run.recipe, run.collator.written = derived, derived.written
        return [taught(run, phase, row) for phase in range(len(derived.phases))]

    assert phases(as_direct(recipe)) == [(0, answer, [])]
    assert phases(as_cot(recipe)) == [(0, write_out((first, second, third), answer), [])]
    replaced = [
        (0, write_out((first, second, third), answer), []),
        (1, write_out((second, third), answer), [first]),
        (2, write_out((third,), answer), [first, second]),
        (3, answer, [first, second, third]),
        (4, answer, [first, second, third]),
    ]
    assert phases(as_coconut(recipe)) == phases(as_sim_cot(recipe)) == replaced
    assert phases(recipe)[-1] == (3, answer, [first, second, third])


def test_each_has_its_losses_and_as_many_epochs(recipe):
    own = replace(recipe, schedule="three_phase", epochs=(0.5, 0.5, 1.0), k_weights=(1.0, 2.0))
    derived = {name: derive(own) for name, derive in BASELINES.items()}
    assert [variant_of(asdict(one)) for one in derived.values()] == ["direct", "CoT", "Coconut", "SIM-CoT"]
    for one in derived.values():
        assert sum(phase.epochs for phase in one.phases) == pytest.approx(2.0)
        assert (one.backbone, one.data, one.adapter) == (own.backbone, own.data, own.adapter)
        assert one.losses.visual_weight == 0 and one.k_weights == ()
    assert {name: one.losses.text_weight for name, one in derived.items()} == {
        "direct": 0.0,
        "cot": 0.0,
        "coconut": 0.0,
        "sim_cot": own.losses.text_weight,
    }
    assert [phase.epochs for phase in derived["coconut"].phases] == pytest.approx([0.25, 0.25, 0.25, 0.25, 1.0])
    assert [one.longest for one in derived.values()] == [0, 0, 4, 4]
    assert (own.longest, recipe.longest) == (1, None)
    assert sum(phase.epochs for phase in as_coconut(vital_8b()).phases) == 20


def test_variants_of_a_run_are_named():
    both, none = LossConfig(), LossConfig(text_weight=0.0, visual_weight=0.0)
    assert variant_of(asdict(vital_8b())) == "VITAL"
    assert variant_of(asdict(replace(vital_8b(), losses=none))) == "task-only"
    assert variant_of(asdict(replace(as_coconut(vital_8b()), losses=both))) == "VITAL, steps written"
    older = asdict(vital_8b())
    del older["written"]  # as a recipe.json of before has it
    assert variant_of(older) == "VITAL"


def test_recipes_of_baselines_go_by_the_name_of_what_they_are_compared_with():
    names = {f"phantom_{kind}" for kind in BASELINES} | {
        f"{kind}_{size}" for kind in BASELINES for size in ("8b", "2b")
    }
    assert names <= set(RECIPES)
    assert RECIPES["phantom_sim_cot"]() == as_sim_cot(phantom())
    assert RECIPES["coconut_8b"]() == as_coconut(vital_8b())
    assert RECIPES["sim_cot_2b"]().text_decoder == "Qwen/Qwen3-0.6B"
    with pytest.raises(VitalError, match="k_weights: expected none with schedule coconut, which says k itself"):
        with_settings(as_coconut(phantom()), {"k_weights": "1,1"})
    with pytest.raises(VitalError, match="written: expected k_weights, or a schedule that says k; with three_phase"):
        with_settings(vital_8b(), {"written": "true"})
    assert with_settings(phantom(), {"written": "true"}).written  # where a batch thinks less than its chains are long


@pytest.fixture(scope="module")
def with_validation(recipe, write_tables, tmp_path_factory):
    """The recipe over tables of which two pictures are for validation; few steps."""
    folder = tmp_path_factory.mktemp("tables")
    write_tables(folder, [draw_phantom("train", 5, index) for index in range(7)], *["train"] * 5, "validation")
    return replace(recipe, data=str(folder), epochs=(0.2, 0.2))


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_is_trained_and_evaluated_with_its_own_k(with_validation, tmp_path, name, monkeypatch):
    probed = []

    def spy(model, batches, num_steps):
        probed.extend(batches)
        return probe(model, batches, num_steps)

    monkeypatch.setattr(finished_run, "probe", spy)
    derived = BASELINES[name](with_validation)
    derived = replace(derived, epochs=(0.2,) * len(derived.phases))
    adapter = train_vital(derived, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    ks = list(dict.fromkeys(line["k"] for line in lines))
    assert ks == [phase.k for phase in derived.phases]
    assert all(("loss_text" in line) == (name == "sim_cot" and line["k"] > 0) for line in lines)
    assert {int(k) for batch in probed for k in batch.num_steps} == {derived.longest}
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["variant"] == variant_of(asdict(derived))
    assert list(report["evaluation"]["by_k"]) == [str(k) for k in range(derived.longest + 1)]
    assert all(tokens > 0 for tokens in report["evaluation"]["tokens_by_k"].values())
    assert set(report["probes"]["gradient_norms"]) == ({"task", "text"} if name == "sim_cot" else {"task"})
    vital = vitalrt.load(derived.backbone, adapter=adapter, device="cpu").checkpoint.vital
    assert vital.k == derived.longest and vital.provenance.startswith(report["variant"])
    assert Scaffold.load(adapter).supervised == (("text",) if name == "sim_cot" else ())
    assert (derived.text_decoder == TINY) == (name != "sim_cot")


def test_what_never_thinks_trains_no_scaffolding_and_what_does_needs_no_chains(recipe, write_tables, tmp_path):
    both = LossConfig()
    for name, derive, expected in (("direct", as_direct, ()), ("coconut", as_coconut, ("visual",))):
        folder = tmp_path / name
        folder.mkdir()
        write_tables(folder, [draw_phantom("train", 5, 0)], "train")
        if name == "coconut":  # with latents that no chain asks for
            rows = [sample | {"chain": []} for sample in load_tables(folder).samples]
            write_rows(folder / "samples.parquet", rows, SAMPLES_SCHEMA)
        derived = replace(derive(recipe), data=str(folder), losses=both, text_decoder=TINY)
        directory = train_vital(replace(derived, epochs=(1.0,) * len(derived.phases)), folder / "run")
        assert Scaffold.load(directory).supervised == expected


def test_evaluation_counts_the_tokens_and_reads_the_answer_after_the_thought(recipe, monkeypatch):
    """Each question is answered rightly after a thought, with ten tokens more for every latent step."""
    shown = TablePictures(load_tables(recipe.data), "train")

    def thoughtful(model, shown, k, shift):
        for one in shown:
            for sample in one.samples:
                yield Outcome(sample, one.modality, write_out(("It is wrong.",), sample.answer), 10 * (k + 1))

    monkeypatch.setattr(evaluation, "ask_all", thoughtful)
    found = evaluate(None, shown, [0, 2])
    assert found["accuracy"] == found["by_k"][0] == 1.0
    assert found["tokens_by_k"] == {0: 10, 2: 30}
    sample = shown[0].samples[0]
    assert not is_right(f"{sample.answer}\n{END_OF_THOUGHT}\nit is not", sample)


def test_the_tokens_of_an_outcome_are_all_that_the_runtime_wrote(recipe):
    """With room for a thought of twice the length of the chain."""
    model = vitalrt.load(recipe.backbone, device="cpu")  # knows nothing, and so seldom ends
    shown = [TablePictures(load_tables(recipe.data), "train")[0]]
    outcomes = list(evaluation.ask_all(model, shown, k=0, shift=0))
    for outcome in outcomes:
        chain = model.processor.tokenizer("\n".join(outcome.sample.chain))["input_ids"]
        room = 2 * len(chain) + 24
        answer = model.generate(shown[0].picture, outcome.sample.question, k=0, max_new_tokens=room)
        assert (outcome.text, outcome.num_tokens) == (answer.text, answer.usage.completion_tokens)
        assert outcome.num_tokens <= room
    assert any(outcome.num_tokens > 24 for outcome in outcomes)


def test_a_plan_counts_what_is_written_and_leaves_out_what_is_not_trained(recipe):
    paper, cot, coconut = plan(vital_8b()), plan(as_cot(vital_8b())), plan(as_coconut(vital_8b()))
    assert set(cot.parameters) == {"backbone (frozen)", "LoRA"}
    assert cot.trainable == cot.parameters["LoRA"] == paper.parameters["LoRA"]
    assert cot.tokens_per_sample == [300 + 920]
    falling = coconut.tokens_per_sample
    assert falling == sorted(falling, reverse=True) and (falling[0], falling[-1]) == (300 + 920, 300)
    assert coconut.steps == [int(52_199 // 48 * 2.5)] * 4 + [52_199 // 48 * 10]
    assert coconut.activation_bytes == cot.activation_bytes  # of the phase that writes most
    assert set(plan(as_sim_cot(vital_8b())).parameters) == {"backbone (frozen)", "LoRA", "pj_in", "text decoder"}
    direct, written = plan(as_direct(recipe)).tokens_per_sample, plan(as_cot(recipe)).tokens_per_sample
    tokenizer = vitalrt.load(recipe.backbone, device="cpu").processor.tokenizer
    samples = load_tables(recipe.data).samples
    added = [
        len(tokenizer(write_out(sample["chain"], sample["answer"]))["input_ids"])
        - len(tokenizer(sample["answer"])["input_ids"])
        for sample in samples
    ]
    assert written[0] - direct[0] == pytest.approx(sum(added) / len(added))


def test_written_steps_teach_the_latents_before_them(recipe, tmp_path):
    """Coconut's latents get their gradient through what is written after them, of which the answer is the end alone."""
    run = VitalRun(as_coconut(recipe), tmp_path, Accelerator())
    row = next(row for row in range(len(run.tables.samples)) if run.tables.num_steps[row] == 3)
    batch = run.collator.collate([row], k=2)
    loop = run.model.think(batch)
    third = run.collator.collator.processor.tokenizer(run.tables.samples[row]["chain"][2])["input_ids"]
    ids = batch.prompt.answer_ids[0, : len(third)]
    assert ids.tolist() == third
    loss = torch.nn.functional.cross_entropy(loop.logits[0, : len(third)], ids)
    gradients = torch.autograd.grad(loss, loop.latents)
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_runs_take_turns_and_are_asked_with_their_own_k(monkeypatch):
    asked = []

    class Counting:
        processor = SimpleNamespace(tokenizer=lambda text: {"input_ids": text.split()})

        def __init__(self, k):
            self.checkpoint = SimpleNamespace(vital=SimpleNamespace(k=k))

        def generate(self, picture, question, k, max_new_tokens):
            asked.append((self.checkpoint.vital.k, k, int(picture[0, 0, 0])))

    runs = [baselines.Run(str(k), "VITAL", {}, 0, 0.0, Counting(k)) for k in (0, 4, 2)]
    pictures = [np.full((1, 1, 3), number, np.uint8) for number in range(4)]
    samples = [Sample("?", "a", "describe", "t", "organ", (), False), Sample("?", "a", "yesno", "t", "organ", (), True)]
    shown = [Shown(picture, "ct", samples) for picture in pictures]
    times = baselines.time_in_turns(runs, shown, count=3)
    assert [len(found) for found in times] == [3, 3, 3]
    assert all(own == used for own, used, _ in asked)
    warm, timed = asked[:3], asked[3:]
    assert {number for *_, number in warm} == {3}
    assert [(own, number) for own, _, number in timed] == [
        *((0, 0), (4, 0), (2, 0)),
        *((4, 1), (2, 1), (0, 1)),
        *((2, 2), (0, 2), (4, 2)),
    ]
    evaluated = []

    def note(model, shown, k, shift):
        evaluated.append((k, shift))
        return [Outcome(sample, "ct", "a", 1) for sample in samples]

    monkeypatch.setattr(baselines, "ask_all", note)
    answered = baselines.answer_all(runs[1], shown)
    assert evaluated == [(4, 0), (4, 1)]
    assert [len(answered.own), len(answered.shuffled)] == [1, 1]  # the open one does not count


def test_runs_are_measured_beside_the_first(with_validation, tmp_path, capsys):
    runs = []
    for name in ("direct", "coconut"):
        derived = BASELINES[name](with_validation)
        runs.append(tmp_path / name)
        train_vital(replace(derived, epochs=(0.2,) * len(derived.phases)), runs[-1])
    arguments = ["--split", "validation", "--count", "4", "--timed", "9", "--out", str(tmp_path / "results")]
    assert baselines.main([*map(str, [*runs, runs[0]]), *arguments]) == 0
    found = json.loads((tmp_path / "results" / "baselines.json").read_text())
    first, second, again = found["runs"]
    assert [(one["run"], one["variant"], one["k"]) for one in found["runs"]] == [
        ("direct", "direct", 0),
        ("coconut", "Coconut", 4),
        ("direct", "direct", 0),
    ]
    assert (first["only_this"], first["only_first"], first["times_first"]["p50"]) == (0, 0, 1.0)
    assert (again["accuracy"], again["tokens"]) == (first["accuracy"], first["tokens"])
    right = round((second["accuracy"] - first["accuracy"]) * found["closed_questions"])
    assert second["only_this"] - second["only_first"] == right
    assert found["timed_questions"] == 3  # one phantom is for warming up
    assert second["training"]["steps"] == len((runs[1] / "log.jsonl").read_text().splitlines())
    assert (tmp_path / "results" / "baselines.png").stat().st_size > 10_000
    assert "Coconut" in capsys.readouterr().out
    with pytest.raises(VitalError, match="RUN: expected a finished run with an adapter, got"):
        baselines.main([str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit):
        baselines.main([str(runs[0]), "--count", "1"])
