"""What one decoder step has to move, from a configuration alone, and the least time that takes on a card.

A step of few rows reads every weight of the decoder once, and the keys and values of its context: that time is the
floor. Activations pass from launch to launch through L2; they are listed, and are no part of the floor. Neither are a
kernel's own scratch, positions and page tables (kilobytes). Launches are those of vitalrt_kernels, greedy decoding.
A model that fits into a card's L2 can be faster than its floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import rich.box
from rich.table import Table

from vitalrt.config import DecoderConfig, ModelConfig, VisionConfig
from vitalrt.errors import VitalError
from vitalrt_kernels.linear_decode import MAX_ROWS

DEFAULT_MODEL = "Qwen3-VL-8B"
PREFILL_TOKENS = (300, 500, 1000, 1500)
BYTES = {"fp32": (4, 4), "bf16": (2, 2), "int8": (1, 2)}  # a weight of a linear map, any other value
SCALE_BYTES = 4  # int8: one fp32 for each output of a linear map


@dataclass(frozen=True)
class Card:
    """bandwidth: bytes a second.  flops: of bf16 products, dense, a second; None where unknown."""

    name: str
    bandwidth: float
    flops: float | None
    source: str

    def floor_ms(self, num_bytes: float, flops: float) -> float:
        seconds = num_bytes / self.bandwidth
        return 1000 * (max(seconds, flops / self.flops) if self.flops else seconds)


# What is specified is not reached: a H200 is reported to copy at 4.3 of its 4.8 TB/s, and to multiply at 790 of 989
# TFLOP/s.
CARDS = {
    card.name: card
    for card in (
        Card("H200", 4.3e12, 790e12, "public reports of a large copy and product; docs/performance.md has ours"),
        Card("H100", 3.35e12, 989e12, "specified: NVIDIA H100 data sheet, SXM"),
        Card("A100-80GB", 2.039e12, 312e12, "specified: NVIDIA A100 data sheet, SXM"),
        Card("RTX-PRO-6000", 1.792e12, 500e12, "specified: NVIDIA RTX PRO 6000 Blackwell, bf16 from its FP4 rate"),
        Card("RTX-4090", 1.008e12, 165e12, "specified: NVIDIA Ada GPU architecture"),
    )
}


def _qwen3_vl(
    width: int, ffn: int, layers: int, heads: int, vision: tuple[int, int, int, tuple[int, ...]], tied: bool
) -> ModelConfig:
    """vision: depth, width, FFN and deepstack layers of the tower.  What all sizes share is written out here."""
    depth, vision_width, vision_ffn, deepstack = vision
    return ModelConfig(
        vision=VisionConfig(
            depth=depth,
            hidden_size=vision_width,
            intermediate_size=vision_ffn,
            num_heads=16,
            in_channels=3,
            patch_size=16,
            temporal_patch_size=2,
            spatial_merge_size=2,
            out_hidden_size=width,
            num_position_embeddings=2304,
            deepstack_visual_indexes=deepstack,
        ),
        decoder=DecoderConfig(
            vocab_size=151936,
            hidden_size=width,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=262144,
            rms_norm_eps=1e-6,
            rope_theta=5e6,
            mrope_section=(24, 20, 20),
            tie_word_embeddings=tied,
        ),
        image_token_id=151655,
        video_token_id=151656,
        dtype="bfloat16",
    )


_SMALL_TOWER = (24, 1024, 4096, (5, 11, 17))
_LARGE_TOWER = (27, 1152, 4304, (8, 16, 24))
# Source: their config.json on the hub.
KNOWN_MODELS = {
    "Qwen3-VL-2B": _qwen3_vl(2048, 6144, 28, 16, _SMALL_TOWER, tied=True),
    "Qwen3-VL-4B": _qwen3_vl(2560, 9728, 36, 32, _SMALL_TOWER, tied=True),
    "Qwen3-VL-8B": _qwen3_vl(4096, 12288, 36, 32, _LARGE_TOWER, tied=False),
    "Qwen3-VL-32B": _qwen3_vl(5120, 25600, 64, 64, _LARGE_TOWER, tied=False),
}


def find_config(model: str) -> ModelConfig:
    """model: a directory, of which only config.json is read, or a known name, as on the hub or without its ends."""
    if Path(model).expanduser().is_dir():
        return ModelConfig.from_directory(Path(model).expanduser())
    name = model.removeprefix("Qwen/").removesuffix("-Instruct").removesuffix("-Thinking")
    if name not in KNOWN_MODELS:
        raise VitalError(f"model: expected a directory or one of {sorted(KNOWN_MODELS)}, got {model!r}")
    return KNOWN_MODELS[name]


@dataclass(frozen=True)
class Operation:
    """One launch, and how often a step makes it.  Bytes and FLOPs of one launch, all rows together."""

    name: str
    kernel: str
    launches: int
    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    flops: int


@dataclass(frozen=True)
class StepCost:
    """is_fused: whether each operation is a launch of its own, with what stands before and after it."""

    operations: tuple[Operation, ...]
    is_fused: bool

    def total(self, quantity: str) -> int:
        """quantity: weight_bytes, kv_bytes, activation_bytes or flops."""
        return sum(operation.launches * getattr(operation, quantity) for operation in self.operations)

    @property
    def launches(self) -> int | None:
        """None where cuBLAS multiplies, in launches of its own: bytes and floor hold there too."""
        return sum(operation.launches for operation in self.operations) if self.is_fused else None

    @property
    def streamed_bytes(self) -> int:
        return self.total("weight_bytes") + self.total("kv_bytes")

    def floor_ms(self, card: Card) -> float:
        return card.floor_ms(self.streamed_bytes, self.total("flops"))


def step_cost(
    config: DecoderConfig, *, answers: bool, context: int = 0, batch: int = 1, dtype: str = "bf16"
) -> StepCost:
    """One step of `batch` sequences, each with `context` tokens in its cache before its own is appended.

    answers: an answer step, which also embeds its token and chooses the next one; a latent step does neither.
    dtype: "fp32", "bf16" or "int8" (weights of linear maps, the head included; all else bf16).  Raises VitalError.
    """
    if dtype not in BYTES:
        raise VitalError(f"dtype: expected one of {sorted(BYTES)}, got {dtype!r}")
    if context < 0 or batch < 1:
        raise VitalError(f"context, batch: expected at least 0 and 1, got {context} and {batch}")
    linear_bytes, value_bytes = BYTES[dtype]
    scale_bytes = SCALE_BYTES if dtype == "int8" else 0
    layers, width, ffn = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim

    def operation(
        name: str,
        kernel: str,
        launches: int,
        moved: int,
        *,
        linear: tuple[int, int] = (0, 0),
        values: int = 0,
        kv_tokens: int = 0,
        flops: int = 0,
    ) -> Operation:
        """moved: activations read and written, by row.  linear: outputs and inputs.  values: weights of other kinds."""
        outputs, inputs = linear
        return Operation(
            name,
            kernel,
            launches,
            weight_bytes=outputs * (inputs * linear_bytes + scale_bytes) + values * value_bytes,
            kv_bytes=batch * kv_tokens * 2 * kv * value_bytes,
            activation_bytes=batch * moved * value_bytes,
            flops=batch * (2 * outputs * inputs + flops),
        )

    qkv, reach = q + 2 * kv, context + 1
    step = [
        operation("QKV", "linear_decode", layers, width + qkv, linear=(qkv, width), values=width),
        operation("attention", "paged_attention", layers, qkv + q, values=q + kv, kv_tokens=reach, flops=4 * q * reach),
        operation("O", "linear_decode", layers, q + 2 * width, linear=(width, q)),
        operation("gate/up", "linear_decode", layers, width + ffn, linear=(2 * ffn, width), values=width),
        operation("down", "linear_decode", layers, ffn + 2 * width, linear=(width, ffn)),
        operation("final norm", "rms_norm", 1, 2 * width, values=width),
    ]
    if answers:
        head = (config.vocab_size, width)
        step.insert(0, operation("embedding", "begin_step", 1, width, values=batch * width))
        step.append(operation("head, argmax", "head_argmax", 1, width, linear=head))
    else:
        step.insert(0, operation("feed back z", "begin_step", 1, 2 * width))
    return StepCost(tuple(step), is_fused=batch == 1 or (dtype == "int8" and batch <= MAX_ROWS))


@dataclass(frozen=True)
class PrefillFlops:
    """Of one prompt. The vision tower's are those of an image of as many visual tokens as the prompt is long."""

    tokens: int
    decoder: int
    vision: int

    def floor_ms(self, card: Card) -> float | None:
        return card.floor_ms(0, self.decoder + self.vision) if card.flops else None


def prefill_flops(config: ModelConfig, tokens: int) -> PrefillFlops:
    """Of products: causal attention by the pairs it needs, and the last layer finishes the last token only."""
    return PrefillFlops(tokens, _decoder_flops(config.decoder, tokens), _vision_flops(config.vision, tokens))


def _decoder_flops(config: DecoderConfig, tokens: int) -> int:
    width, q = config.hidden_size, config.num_attention_heads * config.head_dim
    qkv = width * (q + 2 * config.num_key_value_heads * config.head_dim)
    after_attention = width * q + 3 * width * config.intermediate_size
    finished = (config.num_hidden_layers - 1) * tokens + 1  # rows that go on after attention, over all layers
    pairs = tokens * (tokens + 1) // 2
    return 2 * config.num_hidden_layers * (tokens * qkv + 2 * q * pairs) + 2 * finished * after_attention


def _vision_flops(config: VisionConfig, tokens: int) -> int:
    width, folded = config.hidden_size, config.hidden_size * config.spatial_merge_size**2
    patches = tokens * config.spatial_merge_size**2
    block = 2 * patches * (4 * width**2 + 2 * width * config.intermediate_size) + 4 * patches**2 * width
    merger = 2 * tokens * (folded**2 + folded * config.out_hidden_size)
    num_mergers = 1 + len(config.deepstack_visual_indexes)
    return 2 * patches * config.patch_dim * width + config.depth * block + num_mergers * merger


@dataclass(frozen=True)
class ModelCost:
    """All that `vitalrt bench --model-cost` tells."""

    model: str
    dtype: str
    context: int
    batch: int
    latent: StepCost
    answer: StepCost
    prefill: tuple[PrefillFlops, ...]

    @classmethod
    def of(cls, model: str, *, context: int = 0, batch: int = 1, dtype: str = "bf16") -> ModelCost:
        """Arguments: as find_config and step_cost, which say what raises."""
        config = find_config(model)
        latent, answer = (
            step_cost(config.decoder, answers=answers, context=context, batch=batch, dtype=dtype)
            for answers in (False, True)
        )
        return cls(
            model, dtype, context, batch, latent, answer, tuple(prefill_flops(config, n) for n in PREFILL_TOKENS)
        )

    def record(self, cards: Sequence[Card]) -> dict[str, Any]:
        """As JSON takes it."""
        steps = {"latent_step": self.latent, "answer_token": self.answer}
        return {
            "model": self.model,
            "dtype": self.dtype,
            "context": self.context,
            "batch": self.batch,
            **{name: _step_record(step) for name, step in steps.items()},
            "prefill_flops": [asdict(prefill) for prefill in self.prefill],
            "floors": [
                asdict(card)
                | {f"{name}_ms": step.floor_ms(card) for name, step in steps.items()}
                | {"prefill_ms": {str(prefill.tokens): prefill.floor_ms(card) for prefill in self.prefill}}
                for card in cards
            ],
        }

    def operations_table(self) -> Table:
        """What an answer step launches; a latent step feeds z back and does without the last two lines."""
        title = f"{self.model}, {self.dtype}, batch {self.batch}, context {self.context}: one step"
        shown = _table(title, ("operation", "kernel"), ("launches", "weights", "KV", "activations"))
        for operation in self.answer.operations:
            shown.add_row(
                operation.name,
                operation.kernel,
                str(operation.launches),
                *_megabytes(operation.weight_bytes, operation.kv_bytes, operation.activation_bytes),
            )
        shown.add_section()
        for name, step in (("latent step", self.latent), ("answer token", self.answer)):
            totals = _megabytes(*(step.total(f"{kind}_bytes") for kind in ("weight", "kv", "activation")))
            shown.add_row(name, "all", str(step.launches or "–"), *totals, style="bold")
        shown.caption = "megabytes: by launch, then of the whole step"
        if self.latent.launches is None:
            shown.caption += "; several rows are multiplied by cuBLAS, in launches of its own"
        return shown

    def floors_table(self, cards: Sequence[Card]) -> Table:
        """The least milliseconds on each card: bytes over bandwidth, or FLOPs over their rate if that is more."""
        steps = [f"latent\n{_gigabytes(self.latent)}", f"answer\n{_gigabytes(self.answer)}"]
        prompts = [f"{prefill.tokens}\ntokens" for prefill in self.prefill]
        shown = _table("floors, ms", ("card",), ("TB/s", "TF/s", *steps, *prompts))
        for card in cards:
            floors = [step.floor_ms(card) for step in (self.latent, self.answer)]
            compute = [prefill.floor_ms(card) for prefill in self.prefill]
            shown.add_row(
                card.name,
                f"{card.bandwidth / 1e12:.3g}",
                f"{card.flops / 1e12:.0f}" if card.flops else "–",
                *(f"{floor:.2f}" for floor in floors),
                *("–" if floor is None else f"{floor:.1f}" for floor in compute),
            )
        sources = "\n".join(f"{card.name}: {card.source}" for card in cards)
        shown.caption = f"tokens: prefill of one prompt of so many visual tokens, vision tower included\n{sources}"
        return shown


def _step_record(step: StepCost) -> dict[str, Any]:
    totals = {kind: step.total(kind) for kind in ("weight_bytes", "kv_bytes", "activation_bytes", "flops")}
    operations = [asdict(operation) for operation in step.operations]
    return {"launches": step.launches, "streamed_bytes": step.streamed_bytes, **totals, "operations": operations}


def _table(title: str, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    """Narrow enough for a terminal of 80 columns."""
    layout: dict[str, Any] = {"collapse_padding": True, "pad_edge": False}
    shown = Table(title=title, box=rich.box.SIMPLE_HEAD, title_justify="left", caption_justify="left", **layout)
    for heading in texts:
        shown.add_column(heading, no_wrap=True)
    for heading in numbers:
        shown.add_column(heading, justify="right", no_wrap=True)
    return shown


def _megabytes(*counts: int) -> list[str]:
    return [f"{count / 1e6:,.3f}" for count in counts]


def _gigabytes(step: StepCost) -> str:
    return f"{step.streamed_bytes / 1e9:.2f} GB"
