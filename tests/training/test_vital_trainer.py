"""VITAL's trainer on tiny tables: losses, resuming, several processes, and the adapter that the runtime merges."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from transformers import ByT5Tokenizer

import vitalrt
from vitalrt.errors import VitalError
from vitalrt.model.scaffold import Scaffold
from vitalrt_training import vital_trainer
from vitalrt_training.backbone import TINY
from vitalrt_training.data.tables import load_tables
from vitalrt_training.losses import IGNORED, LossConfig, Mean
from vitalrt_training.paradigms import vital
from vitalrt_training.plan import plan
from vitalrt_training.vision_cache import VisionCacheConfig
from vitalrt_training.vital_trainer import VitalRun, rows_of, train_vital

ADAPTER = "adapter/adapter_model.safetensors"


def read_log(run_dir):
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def losses(run_dir):
    """Text and visual loss are NaN where no sample of a batch thought."""
    names = ("loss_task", "loss_text", "loss_visual")
    return [(r["stage"], r["step"], *(r.get(name, float("nan")) for name in names)) for r in read_log(run_dir)]


RUN = """
import pickle, sys
from pathlib import Path
from vitalrt_training.vital_trainer import train_vital
train_vital(pickle.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2]))
"""
# accelerate leaves FSDP to accelerators: on the CPU it has to be told.
RUN_SHARED = """
import accelerate
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor
from vitalrt_training import vital_trainer

def accelerator(**options):
    found = accelerate.Accelerator(**options)
    found.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    found.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return found

def build(*parts):
    run = VitalRun(*parts)
    assert all(isinstance(parameter, DTensor) for parameter in run.model.parameters())
    return run

VitalRun, vital_trainer.Accelerator, vital_trainer.VitalRun = vital_trainer.VitalRun, accelerator, build
"""
FSDP2 = Path(__file__).parents[2] / "examples" / "accelerate-fsdp2.yaml"


def start_in_processes(recipe, folder, run_dir, processes, config=None):
    """The run as a command of its own on one process or several; returns the command's Popen.

    config: a configuration file of `accelerate launch` that shares out the model.
    """
    (folder / "recipe.pickle").write_bytes(pickle.dumps(recipe))
    (folder / "run.py").write_text(RUN if config is None else RUN_SHARED + RUN)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, folder / "run.py", folder / "recipe.pickle", run_dir]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if config is not None:
        asked = launch_command_parser().parse_args(["--config_file", str(config), "run.py"])
        environment |= prepare_multi_gpu_env(_validate_launch_command(asked)[0])
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    return subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.PIPE, text=True)


def test_a_tokenizer_that_cannot_go_along_is_refused_before_training(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(vital_trainer.AutoTokenizer, "from_pretrained", lambda _: ByT5Tokenizer())
    with pytest.raises(VitalError, match=r"text_decoder: expected a tokenizer .* got a ByT5Tokenizer"):
        train_vital(recipe, tmp_path / "run")


def stop_at(monkeypatch, phase, step):
    do_step = VitalRun._step

    def fail(self, batch, *place):
        if place[:2] == (phase, step):
            raise KeyboardInterrupt
        return do_step(self, batch, *place)

    monkeypatch.setattr(VitalRun, "_step", fail)


def test_an_interrupted_run_goes_on_bit_for_bit(recipe, finished, tmp_path, monkeypatch):
    stop_at(monkeypatch, phase=1, step=3)
    with pytest.raises(KeyboardInterrupt):
        train_vital(recipe, tmp_path)
    monkeypatch.undo()
    train_vital(recipe, tmp_path)
    assert losses(tmp_path) == losses(finished)
    assert (tmp_path / ADAPTER).read_bytes() == (finished / ADAPTER).read_bytes()


def test_a_killed_run_goes_on_bit_for_bit(recipe, finished, tmp_path):
    """SIGKILL, at whatever it was doing, once after the first state and once later; dropout and data order included."""
    recipe = replace(recipe, adapter=replace(recipe.adapter, dropout=0.1))
    torch.set_num_threads(1)
    train_vital(recipe, tmp_path / "whole")
    for num_records in (3, 7):
        process = start_in_processes(recipe, tmp_path, tmp_path / "killed", processes=1)
        deadline = time.monotonic() + 120
        log = tmp_path / "killed" / "log.jsonl"
        while not (log.is_file() and log.read_text().count("\n") >= num_records):
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()[-3000:]
            time.sleep(0.01)
        process.kill()
        process.communicate()
    assert not (tmp_path / "killed" / "adapter").exists()
    train_vital(recipe, tmp_path / "killed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert (tmp_path / "killed" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()


@pytest.mark.parametrize("k_weights", [(), (1.0, 1.0)])
def test_two_processes_have_the_losses_of_one(recipe, tmp_path, k_weights):
    """gloo on the CPU, same global batch, no dropout (each process draws its own); with batches that do not think."""
    recipe = replace(recipe, projector="linear", k_weights=k_weights)
    train_vital(recipe, tmp_path / "one")
    process = start_in_processes(recipe, tmp_path, tmp_path / "two", processes=2)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    for one, two in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert one[:2] == two[:2]
        assert two[2:] == pytest.approx(one[2:], abs=1e-5, nan_ok=True)


def test_a_shared_out_model_goes_on_where_a_whole_one_stopped(recipe, tmp_path, monkeypatch):
    """FSDP2 over two gloo processes: losses, what is saved, and what is exported, equal those of one process."""
    recipe = replace(recipe, projector="linear", recompute=True)
    train_vital(recipe, tmp_path / "one")
    stop_at(monkeypatch, phase=0, step=3)
    with pytest.raises(KeyboardInterrupt):
        train_vital(recipe, tmp_path / "two")
    process = start_in_processes(recipe, tmp_path, tmp_path / "two", processes=2, config=FSDP2)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    for one, two in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert one[:2] == two[:2]
        assert two[2:] == pytest.approx(one[2:], abs=1e-5, nan_ok=True)
    whole, shared = (torch.load(tmp_path / name / "state.pt") for name in ("one", "two"))
    torch.testing.assert_close(shared, whole, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(*(load_file(tmp_path / n / ADAPTER) for n in ("two", "one")), rtol=1e-3, atol=1e-5)


def test_k_weights_let_every_batch_think_for_itself(recipe, tmp_path):
    recipe = replace(recipe, text_decoder=TINY, k_weights=(1.0, 1.0, 1.0, 1.0), images_together=True)
    directory = train_vital(recipe, tmp_path)
    drawn = {stage: {r["k"] for r in read_log(tmp_path) if r["stage"] == stage} for stage in ("phase 1", "phase 2")}
    assert drawn["phase 1"] == {0, 1, 2} and drawn["phase 2"] == {0, 1, 2, 3}
    assert vitalrt.load(recipe.backbone, adapter=directory).checkpoint.vital.k == 3
    assert Scaffold.load(directory).text_decoder.config.hidden_size == 128


def test_chains_are_cut_or_end_before_the_latents_do(recipe, tmp_path):
    run = VitalRun(recipe, tmp_path, vital_trainer.Accelerator())
    lengths = run.tables.num_steps
    rows = [int(np.flatnonzero(lengths == 1)[0]), int(np.flatnonzero(lengths > 2)[0])]
    batch = run.collator.collate(rows, k=2)
    own = run.collator.collate(rows)
    has_words = (batch.chain_ids != IGNORED).any(-1)
    assert batch.num_steps.tolist() == [2, 2]
    assert sorted(has_words.sum(-1).tolist()) == [1, 2]
    assert sorted(own.num_steps.tolist()) == sorted(lengths[rows].tolist())
    found = run.model(batch)
    assert found["text"].counted == 2 and torch.isfinite(found["text"].value())
    assert set(run.model(run.collator.collate(rows, k=0))) == {"task"}


def test_vision_features_on_disk_change_no_bit(recipe, finished, tmp_path):
    kept = VisionCacheConfig(str(tmp_path / "features"))
    train_vital(replace(recipe, vision_cache=kept), tmp_path / "run")
    assert losses(tmp_path / "run") == losses(finished)
    assert (tmp_path / "run" / ADAPTER).read_bytes() == (finished / ADAPTER).read_bytes()
    pictures = len(load_tables(recipe.data).images)
    assert len(list((tmp_path / "features").rglob("*.safetensors"))) == pictures


def test_questions_about_a_picture_share_a_batch(recipe, tmp_path):
    rows = None
    for together in (False, True):
        run = VitalRun(replace(recipe, images_together=together), tmp_path / str(together), vital_trainer.Accelerator())
        rows = rows_of(run.tables, recipe.phases[1])
        steps = len(rows) // recipe.batch_size
        batches = [run._rows_of_step(rows, 1, step, steps) for step in range(steps)]
        assert len({row for batch in batches for row in batch}) == steps * recipe.batch_size
        pictures = np.mean([len({int(run.tables.image_rows[row]) for row in batch}) for batch in batches])
        assert (pictures < 2.1) == together
        assert batches != [run._rows_of_step(rows, 1, step + steps, steps) for step in range(steps)]


def test_a_plan_counts_the_tables_samples_and_tokens(recipe):
    found = plan(recipe)
    tables = load_tables(recipe.data)
    assert found.samples == [int((tables.num_steps <= 2).sum()), len(tables.samples)]
    assert found.steps == [n // recipe.batch_size for n in found.samples]
    runtime = vitalrt.load(recipe.backbone, device="cpu")
    lengths = []
    for row, sample in enumerate(tables.samples):
        answer = runtime.processor.tokenizer(sample["answer"])["input_ids"]
        prompt = runtime.prepare(tables.read_picture(row), sample["question"])
        lengths.append(prompt.num_tokens + len(sample["chain"]) + len(answer) + 1)
    assert found.tokens_per_sample == pytest.approx([np.mean(lengths)] * 2)


def test_recomputing_changes_no_gradient(recipe, tmp_path):
    gradients = []
    for recompute in (False, True):
        run = VitalRun(replace(recipe, recompute=recompute), tmp_path / str(recompute), vital_trainer.Accelerator())
        found = run.model(run.collator.collate([1, 2, 3]))
        sum(mean.value() for mean in found.values()).backward()
        gradients.append([p.grad for p in run.model.backbone.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_rate_warms_up_and_falls_to_its_final_share(recipe):
    recipe = replace(recipe, learning_rate=1.0, warmup_share=0.1, final_rate=0.25)
    rates = [vital_trainer.learning_rate(recipe, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (n + 1) for n in range(10)])
    assert rates[55] == pytest.approx((1 + 0.25) / 2)
    assert rates[-1] == pytest.approx(0.25, abs=1e-3)
    assert vital_trainer.learning_rate(replace(recipe, final_rate=1.0), 99, 100) == 1.0


@pytest.mark.parametrize(
    ("switches", "present"),
    [
        (LossConfig(text_weight=0.0, visual_weight=0.0), {"task"}),
        (LossConfig(visual_weight=0.0), {"task", "text"}),
        (LossConfig(text_weight=0.0), {"task", "visual"}),
    ],
)
def test_a_loss_that_is_switched_off_trains_nothing(recipe, tmp_path, switches, present):
    run = VitalRun(replace(recipe, losses=switches), tmp_path, vital_trainer.Accelerator())
    found = run.model(run.collator.collate([0, 1, 2]))
    assert set(found) == present
    text_trains = any(p.requires_grad for p in run.model.scaffold.text_decoder.parameters())
    assert text_trains == ("text" in present)


def test_every_loss_reaches_adapter_and_scaffolding(recipe, tmp_path):
    run = VitalRun(recipe, tmp_path, vital_trainer.Accelerator())
    found = run.model(run.collator.collate([1, 2, 3, 5]))
    adapter = [p for n, p in run.model.backbone.named_parameters() if "lora_B" in n and "layers.0.self_attn.q" in n]
    for name, parameters in (
        ("task", adapter),
        ("text", [*adapter, run.model.scaffold.pj_in.weight]),
        ("visual", [*adapter, *run.model.scaffold.projector.parameters()]),
    ):
        gradients = torch.autograd.grad(found[name].value(), parameters, retain_graph=True)
        assert all(gradient.abs().max() > 0 for gradient in gradients), name


def test_an_exploding_loss_stops_the_run_and_names_samples_and_state(recipe, tmp_path):
    with pytest.raises(VitalError, match=r"step 0 of phase 1, samples \['s\d+'.*state.pt"):
        train_vital(replace(recipe, loss_limit=1e-6), tmp_path)


def test_a_loss_that_is_no_number_stops_the_run(recipe, tmp_path, monkeypatch):
    def broken(logits, answer_ids):
        return Mean(logits.sum() * float("nan"), torch.ones(()))

    monkeypatch.setattr(vital, "task_loss", broken)
    with pytest.raises(VitalError, match=r"loss nan at step 0 of phase 1, samples \['s\d+'.*state.pt"):
        train_vital(recipe, tmp_path)
    assert not (tmp_path / "adapter").exists()


def test_autocast_computes_in_bf16_and_sums_losses_in_fp32(recipe, tmp_path):
    """Over a bf16 backbone, as vital_8b runs; the losses are those of fp32 up to bf16's three digits."""
    found = {}
    for precision in ("no", "bf16"):
        accelerator = vital_trainer.Accelerator(mixed_precision=precision, cpu=True)
        run = VitalRun(replace(recipe, precision=precision), tmp_path / precision, accelerator)
        run.model.eval()
        with accelerator.autocast():
            found[precision] = run.model(run.collator.collate([1, 2, 3, 5]))
            latents = run.model.think(run.collator.collate([1, 2, 3, 5])).latents
        AcceleratorState._reset_state(reset_partial_state=True)
    backbone = run.model.backbone
    assert {p.dtype for p in backbone.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in run.model.parameters() if p.requires_grad} == {torch.float32}
    assert latents[0].dtype == torch.bfloat16
    for name, mean in found["bf16"].items():
        assert mean.total.dtype == torch.float32
        assert float(mean.value()) == pytest.approx(float(found["no"][name].value()), rel=0.03)
        assert float(mean.value()) != float(found["no"][name].value())


def test_a_full_disk_leaves_the_last_good_state(recipe, tmp_path, monkeypatch):
    save = torch.save
    calls = []

    def fill_up(state, path):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half a state")
            raise OSError(28, "No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", fill_up)
    with pytest.raises(OSError, match="No space"):
        train_vital(recipe, tmp_path)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert (state["phase"], state["step"]) == (0, 2)
    assert not list(tmp_path.glob("*.partial"))


def test_too_few_samples_for_a_phase_is_an_error(recipe, tmp_path):
    with pytest.raises(VitalError, match="batch_size"):
        train_vital(replace(recipe, batch_size=1000), tmp_path)
