"""Train the phantom backbone: resumable at any moment, atomic on disk, repeatable.

Everything random in a step is drawn from (seed, step), so a resumed run goes on exactly as if it had not stopped.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration

from vitalrt.inputs.processor import PatchOptions
from vitalrt_training.backbone import generation_config, new_backbone, phantom_config, save_preprocessor
from vitalrt_training.data.batches import Batch, PhantomBatches
from vitalrt_training.data.phantom import ask, draw_phantom
from vitalrt_training.data.scene_captions import NUMBERS, REQUEST
from vitalrt_training.latent_loop import run_loop
from vitalrt_training.losses import IGNORED, task_loss
from vitalrt_training.optimizing import cosine_rate, new_adamw, update
from vitalrt_training.recipes import BackboneRecipe
from vitalrt_training.run_files import (
    claim_directory,
    progress_bar,
    replacing_directory,
    restore_state,
    save_state,
    trim_log,
)
from vitalrt_training.tokenizer import save_tokenizer, train_tokenizer
from vitalrt_training.vision_warmup import SegmentingTower, name_what_is_seen, say_places_loudly, segmentation_loss

# The tokenizer and the first stages draw training phantoms of their own.
TOKENIZER_SEED = 1_000_003
VISION_SEED = 2_000_003
SCENE_SEED = 3_000_003


@dataclass(frozen=True)
class Stage:
    """A part of a run. loss_of(step) also returns what to log of the step; validate() what to log now and then."""

    name: str
    steps: int
    learning_rate: float
    module: nn.Module
    loss_of: Callable[[int], tuple[torch.Tensor, dict[str, Any]]]
    validate: Callable[[], dict[str, float]]


def train(recipe: BackboneRecipe, run_dir: Path) -> Path:
    """Train, or go on training, in run_dir; returns the checkpoint directory run_dir/model.

    run_dir holds recipe.json, log.jsonl (a line per step), a state per stage (weights and optimiser, replaced
    atomically) and, when done, model/.  Raises VitalError if run_dir belongs to another recipe, or if the loss stops
    being finite.
    """
    torch.set_num_threads(recipe.threads)
    base_dir = _prepare(recipe, run_dir)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base_dir)
    model = new_backbone(phantom_config(tokenizer), recipe.seed)
    tower = SegmentingTower(model)
    _run_stage(_vision_stage(recipe, tower, base_dir), recipe, run_dir)
    # From here on the tower is frozen: the first gradients of an untrained decoder would undo what it has learnt.
    name_what_is_seen(tower, model.model.language_model.embed_tokens, tokenizer)
    model.model.visual.requires_grad_(False)
    _run_stage(_scene_stage(recipe, model, base_dir), recipe, run_dir)
    _run_stage(_answer_stage("answers", recipe.answer_steps, recipe.seed, recipe, model, base_dir), recipe, run_dir)
    # By now the decoder knows what it is asked about and misses where that is; a louder tower lets it learn that too.
    say_places_loudly(tower)
    _run_stage(_answer_stage("places", recipe.place_steps, recipe.seed + 1, recipe, model, base_dir), recipe, run_dir)
    return _export(model, recipe, base_dir, run_dir)


def _vision_stage(recipe: BackboneRecipe, tower: SegmentingTower, base_dir: Path) -> Stage:
    options = PatchOptions.from_directory(base_dir)
    count = recipe.vision_images_per_batch

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, Any]]:
        phantoms = [draw_phantom("train", VISION_SEED + recipe.seed, step * count + i) for i in range(count)]
        return segmentation_loss(tower, phantoms, options), {"samples": count}

    return Stage("vision", recipe.vision_steps, recipe.vision_learning_rate, tower, loss_of, dict)


def _scene_stage(recipe: BackboneRecipe, model: Qwen3VLForConditionalGeneration, base_dir: Path) -> Stage:
    """Descriptions first: see scene_captions.py for what they teach that answers do not."""
    batches = PhantomBatches(base_dir, SCENE_SEED + recipe.seed, recipe.scene_images_per_batch)

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, Any]]:
        batch = batches.draw_scenes(step)
        return answer_loss(model, batch), {"samples": batch.num_samples}

    return Stage("scene", recipe.scene_steps, recipe.learning_rate, model, loss_of, dict)


def _answer_stage(
    name: str, steps: int, seed: int, recipe: BackboneRecipe, model: Qwen3VLForConditionalGeneration, base_dir: Path
) -> Stage:
    batches = PhantomBatches(base_dir, seed, recipe.images_per_batch)
    phantoms = [draw_phantom("validation", seed, index) for index in range(recipe.validation_images)]
    validation = batches.collate([(phantom, ask(phantom)) for phantom in phantoms])

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, Any]]:
        batch = batches.draw(step)
        return answer_loss(model, batch), {"samples": batch.num_samples}

    def validate() -> dict[str, float]:
        return {"validation_exact": exact_share(model, validation, k=0)}

    return Stage(name, steps, recipe.learning_rate, model, loss_of, validate)


def _run_stage(stage: Stage, recipe: BackboneRecipe, run_dir: Path) -> None:
    optimizer = new_adamw(stage.module, recipe.weight_decay)
    state_path = run_dir / f"{stage.name}.pt"
    first_step = restore_state(state_path, stage.module, optimizer)
    trim_log(run_dir / "log.jsonl", stage.name, first_step)
    with progress_bar() as bar, (run_dir / "log.jsonl").open("a") as log:
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
                save_state(state_path, stage.module, optimizer, step + 1)
            status = f"loss {record['loss']:.3f}  {record['samples'] / record['seconds']:.0f} samples/s"
            bar.update(task, advance=1, status=status)


def answer_loss(model: Qwen3VLForConditionalGeneration, batch: Batch) -> torch.Tensor:
    """Without latent steps."""
    loop = run_loop(model, batch, torch.zeros(batch.num_samples, dtype=torch.int64))
    return task_loss(loop.logits, batch.answer_ids).value()


@torch.no_grad()
def exact_share(model: Qwen3VLForConditionalGeneration, batch: Batch, k: int) -> float:
    """Share of answers whose every token is the most likely one, which is when greedy decoding writes them."""
    logits = run_loop(model, batch, torch.full((batch.num_samples,), k)).logits
    right = (logits.argmax(-1) == batch.answer_ids) | (batch.answer_ids == IGNORED)
    return float(right.all(-1).float().mean())


def _step(
    stage: Stage, optimizer: torch.optim.Optimizer, recipe: BackboneRecipe, step: int, state_path: Path
) -> dict[str, Any]:
    loss, record = stage.loss_of(step)
    rate = cosine_rate(stage.learning_rate, step, stage.steps, recipe.warmup_steps)
    what = f"step {step} of stage {stage.name} (seed {recipe.seed}); the last good state, if any, is {state_path}"
    return record | update(stage.module, optimizer, loss, rate, recipe.max_grad_norm, what)


def _prepare(recipe: BackboneRecipe, run_dir: Path) -> Path:
    """Claim the directory and write the base files (tokenizer, preprocessor, config) once."""
    claim_directory(run_dir, json.dumps(asdict(recipe), indent=2) + "\n")
    base_dir = run_dir / "base"
    if not base_dir.is_dir():
        texts = []
        for index in range(recipe.tokenizer_images):
            for sample in ask(draw_phantom("train", TOKENIZER_SEED, index)):
                texts += [sample.question, sample.answer, *sample.chain]
        texts += [REQUEST, " ".join(NUMBERS)] * recipe.tokenizer_images
        tokenizer = train_tokenizer(texts, recipe.vocab_size)
        with replacing_directory(base_dir) as partial:
            save_tokenizer(tokenizer, partial)
            save_preprocessor(partial)
            phantom_config(tokenizer).save_pretrained(partial)
            generation_config(tokenizer).save_pretrained(partial)
    return base_dir


def _export(model: Qwen3VLForConditionalGeneration, recipe: BackboneRecipe, base_dir: Path, run_dir: Path) -> Path:
    """An ordinary Hugging Face directory in bf16, with vital.json beside it."""
    vital = {
        "k": 0,
        "feedback": "final_norm",
        "provenance": f"vitalrt phantom backbone, from scratch, without latent steps, seed {recipe.seed}",
    }
    directory = run_dir / "model"
    with replacing_directory(directory) as partial:
        model.bfloat16().save_pretrained(partial)
        shutil.copytree(base_dir, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns("config.json"))
        (partial / "vital.json").write_text(json.dumps(vital, indent=2) + "\n")
    return directory
