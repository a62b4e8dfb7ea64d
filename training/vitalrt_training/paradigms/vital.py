"""VITAL: LoRA and scaffolding over a frozen backbone, every latent supervised in words and in pictures (section 3.3).

With losses switched off and steps written out, the same model is trained as the baselines are (recipes.BASELINES).

N samples, K most latent steps of the batch, L tokens of a reasoning step, d width, v feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import Qwen3VLForConditionalGeneration

from vitalrt.model.scaffold import Scaffold
from vitalrt_training.data.batches import Asked, Batch, Collator, pad_targets
from vitalrt_training.data.tables import Tables
from vitalrt_training.latent_loop import LoopOutput, run_loop
from vitalrt_training.losses import IGNORED, LossConfig, Mean, task_loss, text_loss, visual_loss, visual_targets
from vitalrt_training.vision_cache import VisionCache
from vitalrt_training.written import write_out


@dataclass(frozen=True)
class VitalBatch:
    """prompt: pictures, questions, answers.  num_steps: [N], each sample's K.  sample_ids: for messages.

    chain_ids: [N, K, L], IGNORED where a step is shorter or has no words. Its K is that of the whole batch, of which
    this may be one process's part: all of them take as many steps.
    roi, global_feature: [N, v], zeros where has_roi is False, which losses leave out; global_feature is None where the
    table has none.
    """

    prompt: Batch
    num_steps: torch.Tensor
    chain_ids: torch.Tensor
    roi: torch.Tensor
    has_roi: torch.Tensor
    global_feature: torch.Tensor | None
    sample_ids: list[str]

    @property
    def num_tokens(self) -> torch.Tensor:
        """What the backbone computes, padding and idle steps not counted: prompts, latents, answers."""
        fed = (self.prompt.answer_ids != IGNORED).sum() - self.prompt.num_samples
        return self.prompt.prefix.mask.sum() + self.prompt.question.mask.sum() + self.num_steps.sum() + fed


class VitalCollator:
    """Rows of the samples table to a VitalBatch. Questions about one picture share its encoding."""

    def __init__(
        self, directory: Path, chain_tokenizer: Any, tables: Tables, feature_width: int, written: bool = False
    ) -> None:
        """directory: the backbone's tokenizer and preprocessor files.  chain_tokenizer: the text decoder's.

        written: answers begin with the steps of their chain that no latent stands for.
        """
        self.collator = Collator(directory)
        self.chain_tokenizer = chain_tokenizer
        self.tables = tables
        self.feature_width = feature_width
        self.written = written

    def collate(self, rows: Sequence[int], k: int | None = None, max_steps: int = 0) -> VitalBatch:
        """k: latent steps of every sample; None: each sample's own, the length of its chain.

        max_steps: at least so many steps are laid out, the further ones idle.
        """
        rows = sorted(rows, key=lambda row: int(self.tables.image_rows[row]))
        samples = [self.tables.samples[row] for row in rows]
        num_steps = [len(sample["chain"]) if k is None else k for sample in samples]
        asked: list[Asked] = []
        image_of_last = None
        for row, sample, thought in zip(rows, samples, num_steps, strict=True):
            image = int(self.tables.image_rows[row])
            if image != image_of_last:
                asked.append(Asked([self.tables.read_picture(row)], []))
                image_of_last = image
            answer = write_out(sample["chain"][thought:] if self.written else (), sample["answer"])
            asked[-1] = Asked(asked[-1].pictures, [*asked[-1].questions, (sample["question"], answer)])
        chains = [sample["chain"][:k] for sample in samples]
        features = [sample["roi_feature"] for sample in samples]
        overall = [sample["global_feature"] for sample in samples]
        return VitalBatch(
            self.collator.collate(asked),
            torch.tensor(num_steps),
            self._chain_ids(chains, max(max_steps, *num_steps)),
            self._stack(features),
            torch.tensor([feature is not None for feature in features]),
            None if any(feature is None for feature in overall) else self._stack(overall),
            [sample["id"] for sample in samples],
        )

    def _chain_ids(self, chains: Sequence[Sequence[str]], num_steps: int) -> torch.Tensor:
        """Every step ends with the decoder's end token, so that it can be decoded on its own later."""
        end = [self.chain_tokenizer.eos_token_id]
        steps = [
            self.chain_tokenizer(chain[step], add_special_tokens=False)["input_ids"] + end if step < len(chain) else []
            for chain in chains
            for step in range(num_steps)
        ]
        ids = pad_targets(steps)
        return ids.view(len(chains), num_steps, ids.shape[1])

    def _stack(self, features: Sequence[Sequence[float] | None]) -> torch.Tensor:
        nothing = torch.zeros(self.feature_width)
        return torch.stack([nothing if feature is None else torch.tensor(feature) for feature in features])


class VitalModel(nn.Module):
    """backbone: a Qwen3-VL under PEFT.  A loss of weight 0 is not computed and its scaffolding gets no gradient.

    recompute: keep no activations of the backbone's layers, compute them again in the backward pass.
    vision_cache: where what the vision tower says of pictures is kept; None computes it each time.
    """

    def __init__(
        self,
        backbone: PeftModel,
        scaffold: Scaffold,
        losses: LossConfig,
        recompute: bool = False,
        vision_cache: VisionCache | None = None,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.vision_cache = vision_cache
        self.backbone = backbone
        self.scaffold = scaffold
        self.losses = losses
        for part, weight in (
            (scaffold.text_decoder, losses.text_weight),
            (scaffold.pj_in, losses.text_weight),
            (scaffold.projector, losses.visual_weight),
        ):
            part.requires_grad_(weight > 0)

    def forward(self, batch: VitalBatch) -> dict[str, Mean]:
        """The losses that are switched on, by name, unweighted."""
        loop = self.think(batch)
        found = {"task": task_loss(loop.logits, batch.prompt.answer_ids)}
        if not loop.latents:
            return found
        z = torch.cat(loop.latents, dim=1)
        if self.losses.text_weight:
            found["text"] = text_loss(self.scaffold.text_logits(z, batch.chain_ids), batch.chain_ids)
        if self.losses.visual_weight:
            targets = visual_targets(
                batch.roi, batch.global_feature, batch.num_steps, z.shape[1], self.losses.visual_target
            )
            has_step = loop.has_step & batch.has_roi[:, None]
            found["visual"] = visual_loss(self.scaffold.projector(z), targets, has_step, self.losses.visual_reduction)
        return found

    def think(self, batch: VitalBatch) -> LoopOutput:
        backbone = cast(Qwen3VLForConditionalGeneration, self.backbone.get_base_model())
        prompt, vision = batch.prompt, None
        if self.vision_cache is not None:
            vision = self.vision_cache.encode(backbone.model.visual, prompt.pixel_values, prompt.image_grid_thw)
        return run_loop(
            backbone,
            prompt,
            batch.num_steps,
            max_steps=batch.chain_ids.shape[1],
            vision=vision,
            checkpoint=self.recompute,
        )

    def weight_of(self, name: str) -> float:
        return {"task": 1.0, "text": self.losses.text_weight, "visual": self.losses.visual_weight}[name]


def to_device(value: Any, device: torch.device) -> Any:
    """A dataclass of tensors, nested, moved."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if hasattr(value, "__dataclass_fields__"):
        return type(value)(**{name: to_device(getattr(value, name), device) for name in value.__dataclass_fields__})
    return value
