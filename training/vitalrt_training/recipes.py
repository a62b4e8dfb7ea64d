"""Runs as functions that return a frozen config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from vitalrt.config import MAX_LATENT_STEPS
from vitalrt.errors import VitalError
from vitalrt.model.scaffold import PROJECTORS
from vitalrt_training.adapter import AdapterConfig
from vitalrt_training.backbone import TINY
from vitalrt_training.encoder import EncoderRecipe, phantom_encoder
from vitalrt_training.losses import LossConfig
from vitalrt_training.vision_cache import VisionCacheConfig


@dataclass(frozen=True)
class BackboneRecipe:
    """A small Qwen3-VL from scratch on phantoms, without latent steps: the vision tower on masks, then the decoder on
    descriptions, then on answers.

    vision_steps, scene_steps, answer_steps, place_steps: optimiser steps of the stages, each with its own warm-up and
    cosine decay; the last two train on answers, the last one with a tower that says louder where things are.
    images_per_batch: fresh phantoms per step, each with all its questions.
    tokenizer_images: phantoms whose text the tokenizer is learnt from.
    checkpoint_every, validate_every: in steps.  threads: of torch on the CPU; sums, and so losses, depend on it.
    """

    seed: int
    vision_steps: int
    vision_images_per_batch: int
    vision_learning_rate: float
    scene_steps: int
    scene_images_per_batch: int
    answer_steps: int
    place_steps: int
    images_per_batch: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    vocab_size: int
    tokenizer_images: int
    validation_images: int
    checkpoint_every: int
    validate_every: int
    threads: int

    def __post_init__(self) -> None:
        for name in (
            "vision_steps",
            "vision_images_per_batch",
            "scene_steps",
            "scene_images_per_batch",
            "answer_steps",
            "place_steps",
            "images_per_batch",
            "checkpoint_every",
            "validate_every",
            "threads",
            "tokenizer_images",
        ):
            if getattr(self, name) < 1:
                raise VitalError(f"{name}: expected at least 1, got {getattr(self, name)}")


def phantom_backbone() -> BackboneRecipe:
    """What the bundled checkpoint is adapted from: about half an hour on one CPU core."""
    return BackboneRecipe(
        seed=0,
        vision_steps=400,
        vision_images_per_batch=48,
        vision_learning_rate=2e-3,
        scene_steps=900,
        scene_images_per_batch=8,
        answer_steps=2400,
        place_steps=2600,
        images_per_batch=4,
        learning_rate=1e-3,
        warmup_steps=50,
        weight_decay=0.05,
        max_grad_norm=1.0,
        vocab_size=640,
        tokenizer_images=1500,
        validation_images=64,
        checkpoint_every=100,
        validate_every=200,
        threads=1,
    )


@dataclass(frozen=True)
class Phase:
    """Samples whose chain has min_steps..max_steps steps, for a number of epochs.

    k: latent steps of every sample, whatever its chain; None leaves them to the recipe's k_weights or to the chains.
    """

    min_steps: int
    max_steps: int
    epochs: float
    k: int | None = None


ALL = MAX_LATENT_STEPS
SCHEDULES: dict[str, tuple[Phase, ...]] = {
    "three_phase": (Phase(0, 1, 5), Phase(0, 2, 5), Phase(0, ALL, 10)),
    "two_phase": (Phase(0, 2, 10), Phase(0, ALL, 10)),
    "full_mix": (Phase(0, ALL, 20),),
    "reverse": (Phase(4, ALL, 5), Phase(2, ALL, 5), Phase(0, ALL, 10)),
    "no_latents": (Phase(0, ALL, 20, k=0),),
    "coconut": (*(Phase(0, ALL, 2.5, k) for k in range(4)), Phase(0, ALL, 10, 4)),
}
"""The first four are those of VITAL table 3. The paper gives the epochs of the first, all others get as many together;
"reverse starts from K=4 and decreases" is read as K = 4, then K >= 2, then all. "coconut" is the curriculum of Coconut
(Hao et al. 2024, section 3): in each phase a latent takes the place of one more written step, up to VITAL's K = 4, and
there it stays longest. As in VITAL there are no tokens around the latents."""


@dataclass(frozen=True)
class VitalRecipe:
    """VITAL's training (section 3.3, appendix A.6) of a LoRA adapter and its scaffolding, over the tables in `data`.

    backbone, text_decoder: Hugging Face directories or hub ids; text_decoder "tiny" is a small one with random weights
    and the backbone's tokenizer.
    data: a folder with images.parquet, samples.parquet.
    images_together: the questions about a picture share a batch, and so its encoding; otherwise samples are shuffled.
    projector: a variant of vitalrt.model.scaffold.  feature_width: v of the ROI features, checked against the table.
    schedule: a name in SCHEDULES; each phase starts from the weights of the one before, with a new optimiser.
    epochs: of each phase, in place of the schedule's own where given.
    k_weights: how often a batch thinks 0, 1, 2, ... steps, up to the longest chain of its phase, so that one adapter
    serves every k: chains are cut, or end before the latents do. Empty: each sample thinks as long as its chain is, or
    as the schedule's phase says.
    written: whether the steps of a chain that no latent stands for are written out before the answer.
    batch_size: samples per optimiser step over all processes.  warmup_share: of each phase's steps.
    final_rate: share of the learning rate that a cosine leaves at the end of a phase; 1 keeps it constant.
    loss_limit: a loss above it counts as exploded and stops the run.  precision: "no" or "bf16" (autocast).
    recompute: gradient checkpointing of the backbone's layers: less memory for more time.
    vision_cache: where the frozen tower's features of pictures are kept, if anywhere; changes no result.
    indexed_regions: how many training regions' features go along with the adapter, for explanations to compare with; 0
    for none. Whoever has a picture can tell by its feature that it was trained on.
    """

    backbone: str
    text_decoder: str
    data: str
    images_together: bool
    feature_width: int
    projector: str
    adapter: AdapterConfig
    losses: LossConfig
    schedule: str
    epochs: tuple[float, ...]
    k_weights: tuple[float, ...]
    written: bool
    batch_size: int
    learning_rate: float
    warmup_share: float
    final_rate: float
    weight_decay: float
    max_grad_norm: float
    loss_limit: float
    precision: str
    recompute: bool
    vision_cache: VisionCacheConfig
    indexed_regions: int
    seed: int
    checkpoint_every: int

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise VitalError(f"schedule: expected one of {sorted(SCHEDULES)}, got {self.schedule!r}")
        if self.precision not in ("no", "bf16"):
            raise VitalError(f"precision: expected 'no' or 'bf16', got {self.precision!r}")
        if self.projector not in PROJECTORS:
            raise VitalError(f"projector: expected one of {PROJECTORS}, got {self.projector!r}")
        for name in ("batch_size", "checkpoint_every", "feature_width"):
            if getattr(self, name) < 1:
                raise VitalError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.indexed_regions < 0:
            raise VitalError(f"indexed_regions: expected at least 0, got {self.indexed_regions}")
        planned = len(SCHEDULES[self.schedule])
        if self.epochs and (len(self.epochs) != planned or min(self.epochs) <= 0):
            raise VitalError(f"epochs: expected {planned} positive numbers for {self.schedule}, got {self.epochs}")
        if self.k_weights and not (
            len(self.k_weights) <= MAX_LATENT_STEPS + 1 and min(self.k_weights) >= 0 and sum(self.k_weights[:2]) > 0
        ):
            raise VitalError(
                f"k_weights: expected weights for k = 0, 1, ..., one of these two > 0, got {self.k_weights}"
            )
        if self.k_weights and self._k_of_phases:
            raise VitalError(
                f"k_weights: expected none with schedule {self.schedule}, which says k itself, got {self.k_weights}"
            )
        if self.written and not self.k_weights and not self._k_of_phases:
            raise VitalError(
                f"written: expected k_weights, or a schedule that says k; with {self.schedule} every step is a latent"
            )
        if not 0 <= self.final_rate <= 1:
            raise VitalError(f"final_rate: expected 0 to 1, got {self.final_rate}")

    @property
    def phases(self) -> tuple[Phase, ...]:
        phases = SCHEDULES[self.schedule]
        if not self.epochs:
            return phases
        return tuple(replace(phase, epochs=epochs) for phase, epochs in zip(phases, self.epochs, strict=True))

    @property
    def longest(self) -> int | None:
        """The most latent steps of a sample; None where that is the length of the longest chain."""
        if self._k_of_phases:
            return max(self._k_of_phases)
        return len(self.k_weights) - 1 if self.k_weights else None

    @property
    def _k_of_phases(self) -> list[int]:
        return [phase.k for phase in SCHEDULES[self.schedule] if phase.k is not None]


def vital_8b() -> VitalRecipe:
    """The paper's: Qwen3-VL-8B, Qwen3-1.7B as text decoder, MedSigLIP features. It gives no batch size; 48 is ours."""
    return VitalRecipe(
        backbone="Qwen/Qwen3-VL-8B-Instruct",
        text_decoder="Qwen/Qwen3-1.7B",
        data="data",
        images_together=False,
        feature_width=1152,
        projector="res_mlp_ln",
        adapter=AdapterConfig(),
        losses=LossConfig(),
        schedule="three_phase",
        epochs=(),
        k_weights=(),
        written=False,
        batch_size=48,
        learning_rate=2e-5,
        warmup_share=0.05,
        final_rate=1.0,
        weight_decay=0.01,
        max_grad_norm=1.0,
        loss_limit=100.0,
        precision="bf16",
        recompute=True,
        vision_cache=VisionCacheConfig(),
        indexed_regions=2048,
        seed=0,
        checkpoint_every=200,
    )


def vital_2b() -> VitalRecipe:
    """The same on the smallest Qwen3-VL, with the smallest Qwen3 as text decoder."""
    return replace(vital_8b(), backbone="Qwen/Qwen3-VL-2B-Instruct", text_decoder="Qwen/Qwen3-0.6B")


def phantom() -> VitalRecipe:
    """The bundled checkpoint, over the phantom backbone and the features of the phantom encoder."""
    return VitalRecipe(
        backbone="runs/backbone/model",
        text_decoder=TINY,
        data="phantoms",
        images_together=True,
        feature_width=128,
        projector="res_mlp_ln",
        adapter=AdapterConfig(),
        # Equation 6 as printed: over 128 features the sum weighs about as much as the words, the mean next to nothing.
        losses=LossConfig(visual_reduction="sum"),
        schedule="three_phase",
        epochs=(0.4, 0.4, 1.0),
        k_weights=(1.0, 1.0, 1.0, 1.0, 4.0),
        written=False,
        batch_size=28,
        learning_rate=1e-3,
        warmup_share=0.05,
        final_rate=0.0,
        weight_decay=0.01,
        max_grad_norm=1.0,
        loss_limit=100.0,
        precision="no",
        recompute=False,
        vision_cache=VisionCacheConfig(),
        indexed_regions=2048,
        seed=0,
        checkpoint_every=100,
    )


def as_direct(recipe: VitalRecipe) -> VitalRecipe:
    """The answer alone: supervised fine-tuning without a thought, for as many epochs as all of VITAL's phases."""
    return replace(
        recipe,
        text_decoder=TINY,  # nothing trains it
        losses=replace(recipe.losses, text_weight=0.0, visual_weight=0.0),
        schedule="no_latents",
        epochs=_shared_out(recipe.epochs, "no_latents"),
        k_weights=(),
    )


def as_cot(recipe: VitalRecipe) -> VitalRecipe:
    """The chain in words, then the answer: explicit chain of thought."""
    return replace(as_direct(recipe), written=True)


def as_coconut(recipe: VitalRecipe) -> VitalRecipe:
    """Coconut (Hao et al. 2024, arXiv 2412.06769): latents replace written steps one by one, unsupervised."""
    return replace(as_cot(recipe), schedule="coconut", epochs=_shared_out(recipe.epochs, "coconut"))


def as_sim_cot(recipe: VitalRecipe) -> VitalRecipe:
    """SIM-CoT over Coconut (Wei et al. 2025, arXiv 2509.20317): a text decoder reads its step from every latent.

    From the first latent on: not, as the authors' own training does, after one of Coconut alone.
    """
    losses = replace(recipe.losses, visual_weight=0.0)
    return replace(as_coconut(recipe), text_decoder=recipe.text_decoder, losses=losses)


def _shared_out(epochs: tuple[float, ...], schedule: str) -> tuple[float, ...]:
    """As many in all, in the proportions of the schedule."""
    planned = [phase.epochs for phase in SCHEDULES[schedule]]
    return tuple(sum(epochs) * share / sum(planned) for share in planned) if epochs else ()


BASELINES: dict[str, Callable[[VitalRecipe], VitalRecipe]] = {
    "direct": as_direct,
    "cot": as_cot,
    "coconut": as_coconut,
    "sim_cot": as_sim_cot,
}
"""Of a VITAL recipe: the same backbone, tables, adapter and optimiser. As many epochs in all, but every phase sees all
samples, so they take more steps than a schedule that starts with short chains."""


def _baselines(recipe: Callable[[], VitalRecipe], name: str) -> dict[str, Callable[[], Recipe]]:
    """name: with {} for the baseline's."""

    def derived(derive: Callable[[VitalRecipe], VitalRecipe]) -> Callable[[], Recipe]:
        return lambda: derive(recipe())

    return {name.format(kind): derived(derive) for kind, derive in BASELINES.items()}


Recipe = BackboneRecipe | EncoderRecipe | VitalRecipe
RECIPES: dict[str, Callable[[], Recipe]] = {
    "phantom": phantom,
    "phantom_backbone": phantom_backbone,
    "phantom_encoder": phantom_encoder,
    "vital_8b": vital_8b,
    "vital_2b": vital_2b,
    **_baselines(phantom, "phantom_{}"),
    **_baselines(vital_8b, "{}_8b"),
    **_baselines(vital_2b, "{}_2b"),
}


def with_settings(recipe: Any, settings: Mapping[str, str]) -> Any:
    """A recipe with values given as text, e.g. {"seed": "1", "losses.text_weight": "0"}.

    Raises VitalError on unknown names and bad values.
    """
    values: dict[str, Any] = {}
    for name, text in settings.items():
        head, _, rest = name.partition(".")
        if head not in {f.name for f in fields(recipe)}:
            raise VitalError(f"--set: unknown setting {head!r}; expected one of {[f.name for f in fields(recipe)]}")
        current = values.get(head, getattr(recipe, head))
        if is_dataclass(current) != bool(rest):
            raise VitalError(
                f"--set: {name}: expected {head}.NAME=VALUE" if not rest else f"--set: {head} has no {rest!r}"
            )
        values[head] = with_settings(current, {rest: text}) if rest else _parse(head, text, current)
    return replace(recipe, **values)  # at once: settings may be valid together only


def _parse(name: str, text: str, current: Any) -> Any:
    """Text as the type of the current value."""
    try:
        if isinstance(current, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(current, tuple):
            return tuple(float(part) for part in text.split(",") if part)
        return type(current)(text)
    except (ValueError, KeyError) as error:
        raise VitalError(f"--set: {name}: expected {type(current).__name__}, got {text!r}") from error
