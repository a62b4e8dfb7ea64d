"""Train VITAL through the phases of a schedule, on one process or several, resumable at any moment.

Everything random in a step is drawn from (seed, phase, step, process) and the data order from (seed, phase, epoch), so
a resumed run goes on exactly as if it had not stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3VLForConditionalGeneration

from vitalrt.checkpoint import resolve
from vitalrt.errors import VitalError
from vitalrt.model.scaffold import Scaffold
from vitalrt_training.adapter import attach_adapter
from vitalrt_training.backbone import TINY, tiny_decoder_config
from vitalrt_training.data.tables import Tables, load_tables
from vitalrt_training.evaluate import TablePictures
from vitalrt_training.finished_run import export_adapter, report_run
from vitalrt_training.losses import Mean
from vitalrt_training.paradigms.vital import VitalBatch, VitalCollator, VitalModel, to_device
from vitalrt_training.recipes import Phase, VitalRecipe
from vitalrt_training.run_files import claim_directory, progress_bar, replacing
from vitalrt_training.run_log import TRACKERS, Log, check_trackers, open_log
from vitalrt_training.vision_cache import VisionCache
from vitalrt_training.whole_state import load_optimizer_state, load_trainable, optimizer_state, trainable_state


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
    run.release()
    if accelerator.is_main_process:
        run.finish()
    accelerator.wait_for_everyone()
    return run_dir / "adapter"


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
        if len(TablePictures(self.tables, "validation")) == 1:
            raise VitalError("data: expected validation samples of at least two pictures, or none, got those of one")
        self.state_path = run_dir / "state.pt"
        self.state = torch.load(self.state_path, weights_only=True) if self.state_path.is_file() else None
        self.model = self._build()
        backbone_dir, decoder_dir = _directories(recipe)
        chain_tokenizer = AutoTokenizer.from_pretrained(decoder_dir or backbone_dir)
        if not hasattr(chain_tokenizer, "backend_tokenizer"):  # it is to be saved beside the scaffolding
            kind = type(chain_tokenizer).__name__
            raise VitalError(f"text_decoder: expected a tokenizer of the tokenizers library, got a {kind}")
        self.collator = VitalCollator(backbone_dir, chain_tokenizer, self.tables, recipe.feature_width, recipe.written)
        if recipe.vision_cache.folder:
            tower: Any = self.model.backbone.get_base_model().get_submodule("model.visual")
            processes = accelerator.num_processes
            self.model.vision_cache = VisionCache(recipe.vision_cache, tower, accelerator.device, processes)
        # FSDP2 wants model and optimiser together: it exchanges the parameters of both.
        self.wrapped, self.optimizer = accelerator.prepare(self.model, new_optimizer(self.model, recipe))

    @property
    def done_phases(self) -> int:
        return self.state["phase"] if self.state else 0

    @property
    def done_steps(self) -> int:
        """Of the phase after the finished ones."""
        return self.state["step"] if self.state else 0

    def do_phase(self, index: int, phase: Phase, log: Log) -> None:
        """Skips a phase that was done before. Each phase has a learning rate schedule of its own, and moments."""
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
        if not num_steps:
            came = f"{phase.epochs} of {steps_per_epoch} steps"
            raise VitalError(f"epochs: expected at least one step in phase {index + 1}, got {came}")
        first_step = self.done_steps if self.done_phases == index else 0
        self.optimizer.state.clear()
        if self.state and first_step:
            load_optimizer_state(self.optimizer, self.state["optimizer"])
        name = stage_name(index)
        with progress_bar() as bar:
            bar.disable = not self.accelerator.is_main_process
            task = bar.add_task(name, total=num_steps, completed=first_step, status="")
            for step in range(first_step, num_steps):
                batch = self._batch_of_step(rows, index, step, steps_per_epoch)
                record = {"stage": name, "step": step, **self._step(batch, index, step, num_steps)}
                log(record)  # before the state: a line too many is dropped later, a missing one is lost
                done = step + 1
                if done % self.recipe.checkpoint_every == 0 or done == num_steps:
                    self._save(index + 1 if done == num_steps else index, 0 if done == num_steps else done)
                bar.update(task, advance=1, status=status_of(record))

    def release(self) -> None:
        """Let go of what was trained; its last state is on disk."""
        self.accelerator.free_memory(self.wrapped, self.optimizer)
        del self.model, self.wrapped, self.optimizer
        self.state = None

    def finish(self) -> None:
        """Adapter and report.  In one process, after release."""
        self.state = torch.load(self.state_path, weights_only=True)
        model = self._build()
        export_adapter(self.recipe, self.run_dir, model, self.collator)
        if len(self.tables.select("validation")):
            report_run(self.recipe, self.run_dir, model, self.collator, self.accelerator)

    def _build(self) -> VitalModel:
        """With the weights of the last state, if there is one."""
        torch.manual_seed(self.recipe.seed)
        model = build_model(self.recipe, *_directories(self.recipe))
        if self.state is not None:
            load_trainable(model, self.state["trainable"])
        return model

    def _batch_of_step(self, rows: np.ndarray, phase: int, step: int, steps_per_epoch: int) -> VitalBatch:
        """This process's share of the global batch, with as many latent steps as the others'."""
        chosen = self._rows_of_step(rows, phase, step, steps_per_epoch)
        mine = chosen[self.accelerator.process_index :: self.accelerator.num_processes]
        k = draw_k(self.recipe, phase, step)
        return self.collator.collate(mine, k, max_steps=int(self.tables.num_steps[chosen].max()) if k is None else k)

    def _rows_of_step(self, rows: np.ndarray, phase: int, step: int, steps_per_epoch: int) -> list[int]:
        """The global batch."""
        epoch, place = divmod(step, steps_per_epoch)
        rng = np.random.default_rng((self.recipe.seed, phase, epoch))
        if self.recipe.images_together:
            place_of_image = rng.permutation(len(self.tables.images))
            order = np.argsort(place_of_image[self.tables.image_rows[rows]], kind="stable")
        else:
            order = rng.permutation(len(rows))
        chosen = order[place * self.recipe.batch_size : (place + 1) * self.recipe.batch_size]
        return [int(rows[i]) for i in chosen]

    def _step(self, batch: VitalBatch, phase: int, step: int, num_steps: int) -> dict[str, Any]:
        started = time.perf_counter()
        rate = learning_rate(self.recipe, step, num_steps)
        for group in self.optimizer.param_groups:
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
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {
            "k": int(batch.num_steps.max()),
            "loss": loss,
            **{f"loss_{name}": value for name, value in values.items()},
            "grad_norm": norm,
            "learning_rate": rate,
            "samples": self.recipe.batch_size,
            "tokens": int(self.accelerator.reduce(batch.num_tokens, "sum")),
            "seconds": round(time.perf_counter() - started, 3),
        }

    def _over_processes(self, mean: Mean) -> tuple[torch.Tensor, float]:
        """What to differentiate here (gradients are averaged over processes later), and the mean over all of them."""
        totals = self.accelerator.reduce(torch.stack((mean.total.detach().float(), mean.counted.float())), "sum")
        count = totals[1].clamp(min=1)
        return mean.total * self.accelerator.num_processes / count, float(totals[0] / count)

    def _save(self, phase: int, step: int) -> None:
        """phase, step: the first ones that are still to be done."""
        is_main = self.accelerator.is_main_process
        state = {
            "trainable": trainable_state(self.model, keep=is_main),
            "optimizer": optimizer_state(self.optimizer, keep=is_main),
            "phase": phase,
            "step": step,
        }
        if is_main:
            with replacing(self.state_path) as partial:
                torch.save(state, partial)
        self.accelerator.wait_for_everyone()


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


def _directories(recipe: VitalRecipe) -> tuple[Path, Path | None]:
    """Of the backbone and the text decoder; None for a tiny one."""
    decoder = None if recipe.text_decoder == TINY else resolve(recipe.text_decoder, "text_decoder")
    return resolve(recipe.backbone, "backbone"), decoder


def status_of(record: Mapping[str, Any]) -> str:
    """What stands behind the progress bar: the loss, its parts before their weights, how fast it goes."""
    parts = [f"{name.removeprefix('loss_')} {value:.3f}" for name, value in record.items() if name.startswith("loss_")]
    return f"loss {record['loss']:.3f} ({', '.join(parts)})  {record['tokens'] / record['seconds']:,.0f} tokens/s"


def stage_name(phase: int) -> str:
    return f"phase {phase + 1}"


def rows_of(tables: Tables, phase: Phase) -> np.ndarray:
    rows = tables.select("train", phase.max_steps)
    return rows[tables.num_steps[rows] >= phase.min_steps]


def draw_k(recipe: VitalRecipe, phase: int, step: int) -> int | None:
    """The same on all processes; None where every sample thinks as long as its chain is."""
    if recipe.phases[phase].k is not None:
        return recipe.phases[phase].k
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
