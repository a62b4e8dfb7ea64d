"""Train a phantom checkpoint: resumable at any moment, atomic on disk, repeatable.

Everything random in a step is drawn from (seed, step), so a resumed run goes on exactly as if it had not stopped.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration

from vitalrt.errors import VitalError
from vitalrt.inputs.processor import PatchOptions
from vitalrt_training.backbone import generation_config, new_backbone, phantom_config, save_preprocessor
from vitalrt_training.data.batches import Batch, PhantomBatches
from vitalrt_training.data.phantom import ask, draw_phantom
from vitalrt_training.latent_loop import run_loop
from vitalrt_training.losses import IGNORED, task_loss
from vitalrt_training.recipes import PhantomRecipe
from vitalrt_training.tokenizer import save_tokenizer, train_tokenizer
from vitalrt_training.vision_warmup import SegmentingTower, segmentation_loss

# The tokenizer and the first stages draw training phantoms of their own.
TOKENIZER_SEED = 1_000_003
VISION_SEED = 2_000_003
ALOUD_SEED = 3_000_003


@dataclass(frozen=True)
class Stage:
    """A part of a run. loss_of(step) also returns what to log of the step; validate() what to log now and then."""

    name: str
    steps: int
    learning_rate: float
    module: nn.Module
    loss_of: Callable[[int], tuple[torch.Tensor, dict[str, Any]]]
    validate: Callable[[], dict[str, float]]


def train(recipe: PhantomRecipe, run_dir: Path) -> Path:
    """Train, or go on training, in run_dir; returns the checkpoint directory run_dir/model.

    run_dir holds recipe.json, log.jsonl (a line per step), a state per stage (weights and optimiser, replaced
    atomically) and, when done, model/.  Raises VitalError if run_dir belongs to another recipe, or if the loss stops
    being finite.
    """
    torch.set_num_threads(recipe.threads)
    base_dir = _prepare(recipe, run_dir)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base_dir)
    model = new_backbone(phantom_config(tokenizer), recipe.seed)
    for build in (_vision_stage, _aloud_stage, _loop_stage):
        _run_stage(build(recipe, model, base_dir), recipe, run_dir)
    return _export(model, recipe, base_dir, run_dir)


def _vision_stage(recipe: PhantomRecipe, model: Qwen3VLForConditionalGeneration, base_dir: Path) -> Stage:
    tower = SegmentingTower(model)
    options = PatchOptions.from_directory(base_dir)
    count = recipe.vision_images_per_batch

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, Any]]:
        phantoms = [draw_phantom("train", VISION_SEED + recipe.seed, step * count + i) for i in range(count)]
        return segmentation_loss(tower, phantoms, options), {"samples": count}

    return Stage("vision", recipe.vision_steps, recipe.vision_learning_rate, tower, loss_of, dict)


def _aloud_stage(recipe: PhantomRecipe, model: Qwen3VLForConditionalGeneration, base_dir: Path) -> Stage:
    """Explicit chain of thought first: a written chain says where to look, an answer alone says only what was there."""
    batches = PhantomBatches(base_dir, ALOUD_SEED + recipe.seed, recipe.images_per_batch)

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, Any]]:
        batch = batches.draw(step, aloud=True)
        loop = run_loop(model, batch, torch.zeros(batch.num_samples, dtype=torch.int64))
        return task_loss(loop.logits, batch.answer_ids).value(), {"samples": batch.num_samples}

    return Stage("aloud", recipe.aloud_steps, recipe.learning_rate, model, loss_of, dict)


def _loop_stage(recipe: PhantomRecipe, model: Qwen3VLForConditionalGeneration, base_dir: Path) -> Stage:
    batches = PhantomBatches(base_dir, recipe.seed, recipe.images_per_batch)
    phantoms = [draw_phantom("validation", recipe.seed, index) for index in range(recipe.validation_images)]
    validation = batches.collate([(phantom, ask(phantom)) for phantom in phantoms])

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, Any]]:
        k = draw_k(recipe, step)
        batch = batches.draw(step)
        loop = run_loop(model, batch, torch.full((batch.num_samples,), k))
        return task_loss(loop.logits, batch.answer_ids).value(), {"k": k, "samples": batch.num_samples}

    def validate() -> dict[str, float]:
        return {"validation_exact": exact_share(model, validation, recipe.default_k)}

    return Stage("loop", recipe.steps, recipe.learning_rate, model, loss_of, validate)


def _run_stage(stage: Stage, recipe: PhantomRecipe, run_dir: Path) -> None:
    optimizer = torch.optim.AdamW(_parameter_groups(stage.module, recipe), betas=(0.9, 0.98), fused=True)
    state_path = run_dir / f"{stage.name}.pt"
    first_step = _restore(state_path, stage.module, optimizer)
    _trim_log(run_dir / "log.jsonl", stage.name, first_step)
    with _progress_bar() as bar, (run_dir / "log.jsonl").open("a") as log:
        task = bar.add_task(stage.name, total=stage.steps, completed=first_step, status="")
        for step in range(first_step, stage.steps):
            started = time.perf_counter()
            record = {"stage": stage.name, "step": step, **_step(stage, optimizer, recipe, step, state_path)}
            record["seconds"] = round(time.perf_counter() - started, 3)
            if (step + 1) % recipe.validate_every == 0 or step + 1 == stage.steps:
                record |= stage.validate()
            log.write(json.dumps(record) + "\n")
            log.flush()
            if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == stage.steps:
                _save_state(state_path, stage.module, optimizer, step + 1)
            status = f"loss {record['loss']:.3f}  {record['samples'] / record['seconds']:.0f} samples/s"
            bar.update(task, advance=1, status=status)


def draw_k(recipe: PhantomRecipe, step: int) -> int:
    weights = np.asarray(recipe.k_weights)
    return int(np.random.default_rng((recipe.seed, step)).choice(len(weights), p=weights / weights.sum()))


def learning_rate(stage: Stage, recipe: PhantomRecipe, step: int) -> float:
    """Linear warm-up, then half a cosine down to nothing."""
    if step < recipe.warmup_steps:
        return stage.learning_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, stage.steps - recipe.warmup_steps)
    return stage.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def exact_share(model: Qwen3VLForConditionalGeneration, batch: Batch, k: int) -> float:
    """Share of answers whose every token is the most likely one, which is when greedy decoding writes them."""
    logits = run_loop(model, batch, torch.full((batch.num_samples,), k)).logits
    right = (logits.argmax(-1) == batch.answer_ids) | (batch.answer_ids == IGNORED)
    return float(right.all(-1).float().mean())


def _step(
    stage: Stage, optimizer: torch.optim.Optimizer, recipe: PhantomRecipe, step: int, state_path: Path
) -> dict[str, Any]:
    rate = learning_rate(stage, recipe, step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss, record = stage.loss_of(step)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(stage.module.parameters(), recipe.max_grad_norm)
    if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
        raise VitalError(
            f"training: loss {loss.item()}, gradient norm {norm.item()} at step {step} of stage {stage.name} "
            f"(seed {recipe.seed}); the last good state, if any, is {state_path}"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return record | {"loss": loss.item(), "grad_norm": norm.item(), "learning_rate": rate}


def _prepare(recipe: PhantomRecipe, run_dir: Path) -> Path:
    """Write recipe and base files (tokenizer, preprocessor, config) once; a later call must bring the same recipe."""
    run_dir.mkdir(parents=True, exist_ok=True)
    wanted = json.dumps(asdict(recipe), indent=2) + "\n"
    recipe_path = run_dir / "recipe.json"
    if recipe_path.is_file() and recipe_path.read_text() != wanted:
        raise VitalError(f"out: {run_dir} holds a run of another recipe; choose another directory or remove it")
    base_dir = run_dir / "base"
    if not base_dir.is_dir():
        unfinished = run_dir / "base.partial"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        texts = []
        for index in range(recipe.tokenizer_images):
            for sample in ask(draw_phantom("train", TOKENIZER_SEED, index)):
                texts += [sample.question, sample.answer, *sample.chain]
        tokenizer = train_tokenizer(texts, recipe.vocab_size)
        save_tokenizer(tokenizer, unfinished)
        save_preprocessor(unfinished)
        phantom_config(tokenizer).save_pretrained(unfinished)
        generation_config(tokenizer).save_pretrained(unfinished)
        unfinished.rename(base_dir)
    _write_atomically(recipe_path, wanted)
    return base_dir


def _parameter_groups(module: nn.Module, recipe: PhantomRecipe) -> list[dict[str, Any]]:
    """Weight decay on matrices only."""
    parameters = list(module.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def _save_state(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    partial = path.with_suffix(".partial")
    torch.save({"module": module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, partial)
    os.replace(partial, path)


def _restore(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Step to go on from."""
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _trim_log(path: Path, stage: str, first_step: int) -> None:
    """Drop the lines of steps that will be done again."""
    if path.is_file():
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
        records = [json.loads(line) for line in lines]
        kept = [ln for ln, r in zip(lines, records, strict=True) if r["stage"] != stage or r["step"] < first_step]
        _write_atomically(path, "".join(line + "\n" for line in kept))


def _export(model: Qwen3VLForConditionalGeneration, recipe: PhantomRecipe, base_dir: Path, run_dir: Path) -> Path:
    """An ordinary Hugging Face directory in bf16, with vital.json beside it."""
    partial, final = run_dir / "model.partial", run_dir / "model"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(base_dir, partial)
    model.bfloat16().save_pretrained(partial)
    shutil.copy(base_dir / "generation_config.json", partial)
    vital = {
        "k": recipe.default_k,
        "feedback": "final_norm",
        "provenance": f"vitalrt phantoms, trained from scratch, seed {recipe.seed}, {recipe.steps} steps",
    }
    (partial / "vital.json").write_text(json.dumps(vital, indent=2) + "\n")
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    return final


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
