"""Train VITAL through the phases of a schedule, on one process or several, resumable at any moment.

Everything random in a step is drawn from (seed, phase, step, process) and the data order from (seed, phase, epoch), so
a resumed run goes on exactly as if it had not stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3VLForConditionalGeneration

from vitalrt.api import load
from vitalrt.checkpoint import resolve
from vitalrt.errors import VitalError
from vitalrt.model.scaffold import Scaffold
from vitalrt_training.adapter import attach_adapter
from vitalrt_training.backbone import TINY, tiny_decoder_config
from vitalrt_training.data.tables import Tables, load_tables
from vitalrt_training.evaluate import TablePictures, evaluate
from vitalrt_training.losses import Mean
from vitalrt_training.paradigms.vital import VitalBatch, VitalCollator, VitalModel
from vitalrt_training.probes import probe
from vitalrt_training.recipes import Phase, VitalRecipe
from vitalrt_training.report import write_report
from vitalrt_training.run_files import claim_directory, progress_bar, replacing, replacing_directory
from vitalrt_training.run_log import TRACKERS, Log, check_trackers, open_log

PROBED_BATCHES = 8


def train_vital(recipe: VitalRecipe, run_dir: Path, trackers: Sequence[str] = ()) -> Path:
    """Train, or go on training, in run_dir; returns run_dir/adapter: a PEFT adapter, the scaffolding beside it.

    run_dir holds recipe.json, log.jsonl (a line per step), state.pt (replaced atomically) and, when done, adapter/ and,
    where the tables have validation samples, report/.
    trackers: what else the log goes to, by accelerate's names: "tensorboard" (to run_dir/trackers), "wandb", "mlflow".
    Raises VitalError if run_dir belongs to another recipe, if no sample fits a phase, if a tracker is not installed, or
    if the loss explodes.
    """
    # Without a GPU accelerate has to be told that several processes are to meet on the CPU.
    accelerator = Accelerator(
        mixed_precision=recipe.precision,
        cpu=not torch.cuda.is_available(),
        # A batch that does not think leaves the scaffolding without gradients.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        log_with=check_trackers(trackers),
        project_dir=run_dir / TRACKERS,
    )
    run = VitalRun(recipe, run_dir, accelerator)
    with open_log(run_dir, accelerator, stage_name(run.done_phases), run.done_steps) as log:
        for index, phase in enumerate(recipe.phases):
            run.do_phase(index, phase, log)
    directory = run.export()
    if accelerator.is_main_process and len(run.tables.select("validation")):
        run.report(directory)
    return directory


class VitalRun:
    """The state of one run: model, tables, and how far it has come."""

    def __init__(self, recipe: VitalRecipe, run_dir: Path, accelerator: Accelerator) -> None:
        self.recipe, self.run_dir, self.accelerator = recipe, run_dir, accelerator
        if recipe.batch_size % accelerator.num_processes:
            raise VitalError(
                f"batch_size: expected a multiple of the {accelerator.num_processes} processes, got {recipe.batch_size}"
            )
        if accelerator.is_main_process:
            claim_directory(run_dir, json.dumps(asdict(recipe), indent=2) + "\n")
        accelerator.wait_for_everyone()
        self.tables = load_tables(recipe.data)
        backbone_dir = resolve(recipe.backbone, "backbone")
        decoder_dir = None if recipe.text_decoder == TINY else resolve(recipe.text_decoder, "text_decoder")
        torch.manual_seed(recipe.seed)
        self.model = build_model(recipe, backbone_dir, decoder_dir)
        chain_tokenizer = AutoTokenizer.from_pretrained(decoder_dir or backbone_dir)
        self.collator = VitalCollator(backbone_dir, chain_tokenizer, self.tables, recipe.feature_width)
        self.wrapped = accelerator.prepare(self.model)
        self.state_path = run_dir / "state.pt"
        self.state = torch.load(self.state_path, weights_only=True) if self.state_path.is_file() else None
        if self.state is not None:
            load_trainable(self.model, self.state["trainable"])
        if len(TablePictures(self.tables, "validation")) == 1:
            raise VitalError("data: expected validation samples of at least two pictures, or none, got those of one")

    @property
    def done_phases(self) -> int:
        return self.state["phase"] if self.state else 0

    @property
    def done_steps(self) -> int:
        """Of the phase after the finished ones."""
        return self.state["step"] if self.state else 0

    def do_phase(self, index: int, phase: Phase, log: Log) -> None:
        """Skips a phase that was done before. Each phase has an optimiser and a learning rate schedule of its own."""
        rows = rows_of(self.tables, phase)
        steps_per_epoch = len(rows) // self.recipe.batch_size
        if not steps_per_epoch:
            raise VitalError(
                f"data: phase {index + 1} needs at least batch_size = {self.recipe.batch_size} training samples with K "
                f"in {phase.min_steps}..{phase.max_steps}, got {len(rows)}"
            )
        if self.done_phases > index:
            return
        num_steps = int(steps_per_epoch * phase.epochs)
        first_step = self.done_steps if self.done_phases == index else 0
        optimizer = self.accelerator.prepare(new_optimizer(self.model, self.recipe))
        if self.state and first_step:
            optimizer.load_state_dict(self.state["optimizer"])
        name = stage_name(index)
        with progress_bar() as bar:
            bar.disable = not self.accelerator.is_main_process
            task = bar.add_task(name, total=num_steps, completed=first_step, status="")
            for step in range(first_step, num_steps):
                batch_rows = self._rows_of_step(rows, index, step, steps_per_epoch)
                batch = self.collator.collate(batch_rows, draw_k(self.recipe, index, step))
                record = {"stage": name, "step": step, **self._step(optimizer, batch, index, step, num_steps)}
                log(record)  # before the state: a line too many is dropped later, a missing one is lost
                done = step + 1
                if done % self.recipe.checkpoint_every == 0 or done == num_steps:
                    self._save(optimizer, index + 1 if done == num_steps else index, 0 if done == num_steps else done)
                bar.update(task, advance=1, status=f"loss {record['loss']:.3f}")

    def export(self) -> Path:
        directory = self.run_dir / "adapter"
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            with replacing_directory(directory) as partial:
                self.model.backbone.save_pretrained(str(partial))
                self.model.scaffold.save(partial)
                (partial / "vital.json").write_text(json.dumps(self._vital(), indent=2) + "\n")
        return directory

    def report(self, adapter: Path) -> None:
        """run_dir/report: accuracy on the validation split through the runtime, for every k, and what probes see."""
        size = self.recipe.batch_size
        rows = self.tables.select("validation")
        rows = rows[:: max(1, len(rows) // (PROBED_BATCHES * size))].tolist()  # of many pictures
        runtime = load(self.recipe.backbone, adapter=adapter, device=self.accelerator.device)
        longest = runtime.checkpoint.vital.k
        starts = range(0, min(len(rows), PROBED_BATCHES * size), size)
        batches = [to_device(self.collator.collate(rows[at : at + size]), self.accelerator.device) for at in starts]
        with self.accelerator.autocast():
            probes = probe(self.model, batches, longest)
        shown = TablePictures(self.tables, "validation")
        evaluation = {"split": "validation", **evaluate(runtime, shown, range(longest + 1))}
        write_report(self.run_dir, evaluation, probes)

    def _vital(self) -> dict[str, Any]:
        recipe = self.recipe
        longest = int(self.tables.num_steps.max())
        losses = ["task"] + [name for name in ("text", "visual") if self.model.weight_of(name)]
        return {
            "k": len(recipe.k_weights) - 1 if recipe.k_weights else longest,
            "feedback": "final_norm",
            "provenance": f"VITAL on {Path(recipe.data).name}, losses {' + '.join(losses)}, {recipe.schedule}, seed "
            f"{recipe.seed}",
        }

    def _rows_of_step(self, rows: np.ndarray, phase: int, step: int, steps_per_epoch: int) -> list[int]:
        """This process's share of the global batch."""
        epoch, place = divmod(step, steps_per_epoch)
        rng = np.random.default_rng((self.recipe.seed, phase, epoch))
        if self.recipe.images_together:
            place_of_image = rng.permutation(len(self.tables.images))
            order = np.argsort(place_of_image[self.tables.image_rows[rows]], kind="stable")
        else:
            order = rng.permutation(len(rows))
        mine = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        chosen = order[place * self.recipe.batch_size : (place + 1) * self.recipe.batch_size][mine]
        return [int(rows[i]) for i in chosen]

    def _step(
        self, optimizer: torch.optim.Optimizer, batch: VitalBatch, phase: int, step: int, num_steps: int
    ) -> dict[str, Any]:
        started = time.perf_counter()
        rate = learning_rate(self.recipe, step, num_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(seed_of(self.recipe.seed, phase, step, self.accelerator.process_index))
        batch = to_device(batch, self.accelerator.device)
        self.wrapped.train()
        with self.accelerator.autocast():
            found: dict[str, Mean] = self.wrapped(batch)
        losses = {name: self._over_processes(mean) for name, mean in found.items()}
        total = torch.stack([self.model.weight_of(name) * share for name, (share, _) in losses.items()]).sum()
        values = {name: value for name, (_, value) in losses.items()}
        loss = sum(self.model.weight_of(name) * value for name, value in values.items())
        if not math.isfinite(loss) or loss > self.recipe.loss_limit:
            raise VitalError(
                f"training: loss {loss} at step {step} of phase {phase + 1}, samples {batch.sample_ids}; the last good "
                f"state, if any, is {self.state_path}"
            )
        self.accelerator.backward(total)
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm))
        if not math.isfinite(norm):
            raise VitalError(
                f"training: gradient norm {norm} at step {step} of phase {phase + 1}, samples {batch.sample_ids}; the "
                f"last good state, if any, is {self.state_path}"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {
            "k": int(batch.num_steps.max()),
            "loss": loss,
            **{f"loss_{name}": value for name, value in values.items()},
            "grad_norm": norm,
            "learning_rate": rate,
            "samples": self.recipe.batch_size,
            "seconds": round(time.perf_counter() - started, 3),
        }

    def _over_processes(self, mean: Mean) -> tuple[torch.Tensor, float]:
        """What to differentiate here (gradients are averaged over processes later), and the mean over all of them."""
        totals = self.accelerator.reduce(torch.stack((mean.total.detach().float(), mean.counted.float())), "sum")
        count = totals[1].clamp(min=1)
        return mean.total * self.accelerator.num_processes / count, float(totals[0] / count)

    def _save(self, optimizer: torch.optim.Optimizer, phase: int, step: int) -> None:
        """phase, step: the first ones that are still to be done."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            state = {
                "trainable": trainable_state(self.model),
                "optimizer": optimizer.state_dict(),
                "phase": phase,
                "step": step,
            }
            with replacing(self.state_path) as partial:
                torch.save(state, partial)


def build_model(recipe: VitalRecipe, backbone_dir: Path, decoder_dir: Path | None) -> VitalModel:
    """Frozen backbone (bf16 under bf16 autocast), fp32 adapter and scaffolding.  decoder_dir: None for a tiny one."""
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    backbone = Qwen3VLForConditionalGeneration.from_pretrained(backbone_dir, dtype=dtype)
    width = backbone.config.get_text_config().hidden_size
    if decoder_dir is None:
        decoder = AutoModelForCausalLM.from_config(tiny_decoder_config(backbone.config))
    else:
        decoder = AutoModelForCausalLM.from_pretrained(decoder_dir, dtype=torch.float32)
    scaffold = Scaffold.build(recipe.projector, width, recipe.feature_width, decoder)
    return VitalModel(attach_adapter(backbone, recipe.adapter), scaffold, recipe.losses, recipe.recompute)


def stage_name(phase: int) -> str:
    return f"phase {phase + 1}"


def rows_of(tables: Tables, phase: Phase) -> np.ndarray:
    rows = tables.select("train", phase.max_steps)
    return rows[tables.num_steps[rows] >= phase.min_steps]


def draw_k(recipe: VitalRecipe, phase: int, step: int) -> int | None:
    """The same on all processes; None where every sample thinks as long as its chain is."""
    weights = np.asarray(recipe.k_weights[: recipe.phases[phase].max_steps + 1])
    if not len(weights):
        return None
    return int(np.random.default_rng((recipe.seed, phase, step)).choice(len(weights), p=weights / weights.sum()))


def learning_rate(recipe: VitalRecipe, step: int, num_steps: int) -> float:
    """Linear warm-up over the first share of a phase, then a cosine; the paper names no decay."""
    warmup = max(1, round(recipe.warmup_share * num_steps))
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    share = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup)))
    return recipe.learning_rate * (recipe.final_rate + (1 - recipe.final_rate) * share)


def new_optimizer(model: VitalModel, recipe: VitalRecipe) -> torch.optim.AdamW:
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trainable, lr=recipe.learning_rate, betas=(0.9, 0.999), weight_decay=recipe.weight_decay)


def seed_of(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def trainable_state(model: VitalModel) -> dict[str, dict[str, torch.Tensor]]:
    return {"adapter": get_peft_model_state_dict(model.backbone), "scaffold": model.scaffold.state_dict()}


def load_trainable(model: VitalModel, state: dict[str, dict[str, torch.Tensor]]) -> None:
    set_peft_model_state_dict(model.backbone, state["adapter"])
    model.scaffold.load_state_dict(state["scaffold"])


def to_device(value: Any, device: torch.device) -> Any:
    """A dataclass of tensors, nested, moved."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if hasattr(value, "__dataclass_fields__"):
        return type(value)(**{name: to_device(getattr(value, name), device) for name in value.__dataclass_fields__})
    return value
