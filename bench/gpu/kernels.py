"""Every operation of a step at the model's shapes: held to float64, then timed with cold weights, beside cuBLAS.

A share is of what a copy (bytes) or a product (FLOPs) reached in the same run. Weights are those of all layers in turn,
so that each launch reads them from memory and not from L2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.gpu.record import Record, in_short
from bench.gpu.timing import replayed_us
from vitalrt.model.qwen3_vl import Qwen3VL
from vitalrt.model_cost import Card
from vitalrt_kernels import (
    Append,
    Norm,
    Rope,
    Rows,
    begin_step,
    head_argmax,
    new_tickets,
    norm_rope_append,
    paged_attention,
    rms_norm,
    why_not_triton,
)
from vitalrt_kernels import linear_decode as step_linear
from vitalrt_kernels.linear_decode import (
    Int8Weight,
    linear_cublas,
    linear_decode_reference,
    quantise_int8,
)
from vitalrt_kernels.norm_rope_append import norm_rope_append_reference
from vitalrt_kernels.paged_attention import paged_attention_reference
from vitalrt_kernels.rms_norm import rms_norm_reference

PAGE, CONTEXT = 16, 1000


@dataclass(frozen=True)
class Case:
    """run(i): one launch on the i-th of `variants` inputs.  exact(): the float64 result of run(0), or None.

    rival: what else computes the same, and rival_name what it is.  num_bytes, flops: the least one launch has to move
    and compute.
    """

    name: str
    run: Callable[[int], Any]
    exact: Callable[[], torch.Tensor] | None
    rival: Callable[[int], Any] | None
    num_bytes: int
    flops: int
    variants: int
    rival_name: str = "torch"


def measure(record: Record, model: Qwen3VL, card: Card) -> dict[str, Any]:
    """b, for 1 and 16 rows."""
    device = model.decoder.embed.weight.device
    if reason := why_not_triton(device):
        record.tell("kernels", note=f"the torch forms, for {reason}: times say nothing about a GPU")
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    for num_rows in (1, 16):
        for case in cases(model, num_rows):
            if record.seconds_left < 2:
                raise TimeoutError(f"{len(rows)} kernels were measured before the time was over")
            try:
                rows.append(_measure_one(case, num_rows, card, device))
            except TimeoutError:
                raise
            except Exception as error:  # of its compiler, say: the next may run
                failed.append(f"{case.name}, {num_rows} rows: {in_short(error)}")
            record.tell("kernels", rows=rows, failed=failed)
    if failed:
        raise RuntimeError(f"{len(failed)} kernels failed, the first is {failed[0]}")
    return {"copy_bytes_per_s": card.bandwidth, "matmul_flops_per_s": card.flops, "rows": rows}


def _measure_one(case: Case, num_rows: int, card: Card, device: torch.device) -> dict[str, Any]:
    row: dict[str, Any] = {"kernel": case.name, "rows": num_rows}
    if case.exact is not None:
        result, exact = case.run(0), case.exact()
        if isinstance(result, tuple):
            result = result[0]
        row["relative_error"] = float((result.double() - exact).norm() / exact.norm().clamp(min=1e-30))
        if not row["relative_error"] < 2e-2:
            raise RuntimeError(f"relative error {row['relative_error']:.2e}")
    row["us"] = replayed_us(case.run, case.variants, device)
    floor = 1000 * card.floor_ms(case.num_bytes, case.flops)
    row |= {"bytes": case.num_bytes, "flops": case.flops, "floor_us": round(floor, 3)}
    row["share"] = round(floor / row["us"]["p50"], 4)
    if case.rival is not None:
        row |= {"rival": case.rival_name, "rival_us": replayed_us(case.rival, case.variants, device)}
        row["rival_over_ours"] = round(row["rival_us"]["p50"] / row["us"]["p50"], 4)
    return row


def cases(model: Qwen3VL, num_rows: int) -> list[Case]:
    config, layers = model.config.decoder, model.decoder.layers
    x = torch.randn(num_rows, config.hidden_size).to(model.decoder.embed.weight)
    attended = torch.randn(num_rows, config.num_attention_heads * config.head_dim).to(x)
    inner = torch.randn(num_rows, config.intermediate_size).to(x)
    norm = Norm(layers[0].input_norm.weight.detach(), config.rms_norm_eps)
    found = []
    for name, rows, options in (
        ("qkv", x, {"norm": norm}),
        ("o", attended, {"residual": x}),
        ("gate_up", x, {"norm": norm, "swiglu": True}),
        ("down", inner, {"residual": x}),
    ):
        weights = [layer.get_submodule(name).weight.detach() for layer in layers]
        found.append(_linear(f"linear_decode {name}", rows, weights, options))
        found.append(_linear(f"linear_decode {name} int8", rows, [quantise_int8(w) for w in weights[:12]], options))
    found.append(_head(model, x))
    found += _small(model, x)
    return found


def _linear(name: str, x: torch.Tensor, weights: Sequence[Any], options: dict[str, Any]) -> Case:
    first = weights[0]
    is_int8 = isinstance(first, Int8Weight)
    values = first.values if is_int8 else first

    def exact() -> torch.Tensor:
        norm = options.get("norm")
        wide = {**options, **({"norm": Norm(norm.weight.double(), norm.eps)} if norm else {})}
        if "residual" in options:
            wide["residual"] = options["residual"].double()
        return linear_decode_reference(x.double(), first if is_int8 else first.double(), **wide)

    return Case(
        name,
        lambda i: step_linear(x, weights[i], **options),
        exact,
        None if is_int8 else lambda i: linear_cublas(x, weights[i], **options),
        values.numel() * values.element_size() + (4 * len(values) if is_int8 else 0),
        2 * len(x) * values.numel(),
        len(weights),
    )


def _head(model: Qwen3VL, x: torch.Tensor) -> Case:
    head = model.decoder.head.weight.detach()
    tickets = new_tickets(1, x.device)
    return Case(
        "head_argmax",
        lambda i: head_argmax(x, head, tickets),
        None,
        lambda i: linear_cublas(x, head).argmax(-1),
        head.numel() * head.element_size(),
        2 * len(x) * head.numel(),
        3,
    )


def _small(model: Qwen3VL, x: torch.Tensor) -> list[Case]:
    """What moves kilobytes, and attention over CONTEXT tokens a row."""
    config, layers, num_rows, device = model.config.decoder, model.decoder.layers, len(x), x.device
    eps, size = config.rms_norm_eps, x.element_size()
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    pages_per_row = -(-(CONTEXT + 1) // PAGE)
    pages = torch.randperm(num_rows * pages_per_row, device=device).view(num_rows, -1).int()
    copies = max(
        2, min(64 if device.type == "cuda" else 4, (1 << 28) // (num_rows * CONTEXT * kv_heads * head_dim * size))
    )
    caches = torch.randn(copies, 2, pages.numel() * PAGE, kv_heads, head_dim, device=device).to(x.dtype)
    qkv = torch.randn(num_rows, heads + 2 * kv_heads, head_dim, device=device).to(x.dtype)
    q = qkv[:, :heads].contiguous()
    lengths = torch.full((num_rows,), CONTEXT, dtype=torch.int32, device=device)
    tickets = new_tickets(num_rows * kv_heads, device)
    positions = torch.arange(num_rows, device=device) + CONTEXT
    slots = pages[:, -1].long() * PAGE + PAGE - 1
    new_slots = pages[:, (CONTEXT - 1) // PAGE].long() * PAGE + (CONTEXT - 1) % PAGE
    rope = Rope(model.decoder.rope.inverse_frequencies, model.decoder.rope.axis_of_frequency)
    qk_norm, norm = layers[0].qk_norm.weight.detach(), layers[0].input_norm.weight.detach()
    counters = [torch.zeros(num_rows, dtype=torch.int32, device=device) for _ in range(4)]
    counters[2] += 2**30
    state = Rows(x.clone(), torch.zeros(num_rows, dtype=torch.int64, device=device), *counters)
    embed, no_stops = model.decoder.embed.weight.detach(), torch.zeros(0, dtype=torch.int64, device=device)
    kv_bytes = num_rows * CONTEXT * 2 * kv_heads * head_dim * size
    angles = positions[:, None] * rope.frequencies
    append = Append(qk_norm, eps, torch.cat((angles.cos(), angles.sin()), dim=1))
    by_axis = positions.expand(3, -1).contiguous()
    append64 = append._replace(norm_weight=qk_norm.double())

    def in_two_launches(i: int) -> torch.Tensor:
        ready = norm_rope_append(qkv, qk_norm, eps, by_axis, rope, *caches[i], new_slots)
        return paged_attention(ready, *caches[i], pages, lengths, PAGE, tickets)

    return [
        Case(
            f"paged_attention {CONTEXT}, appends",
            lambda i: paged_attention(qkv, *caches[i], pages, lengths, PAGE, tickets, append),
            lambda: paged_attention_reference(qkv.double(), *caches[0].double(), pages, lengths, PAGE, append64),
            in_two_launches,
            kv_bytes,
            4 * num_rows * heads * head_dim * CONTEXT,
            copies,
            "in two launches",
        ),
        Case(
            f"paged_attention {CONTEXT}",
            lambda i: paged_attention(q, *caches[i], pages, lengths, PAGE, tickets),
            lambda: paged_attention_reference(q.double(), *caches[0].double(), pages, lengths, PAGE),
            None,
            kv_bytes,
            4 * num_rows * heads * head_dim * CONTEXT,
            copies,
        ),
        Case(
            "norm_rope_append",
            lambda i: norm_rope_append(qkv, qk_norm, eps, by_axis, rope, *caches[i], slots),
            lambda: norm_rope_append_reference(
                qkv.double(), qk_norm.double(), eps, by_axis, rope, *caches[0].double(), slots
            ),
            None,
            2 * qkv.numel() * size,
            0,
            copies,
        ),
        Case(
            "rms_norm",
            lambda i: rms_norm(x, norm, eps),
            lambda: rms_norm_reference(x.double(), norm.double(), eps),
            None,
            2 * x.numel() * size,
            0,
            12,
        ),
        Case(
            "begin_step",
            lambda i: begin_step(state, embed, no_stops, rope.frequencies),
            None,
            None,
            2 * x.numel() * size,
            0,
            12,
        ),
    ]
