"""Triton form of begin_step: one thread block per row."""

import torch
import triton
import triton.language as tl

from vitalrt_kernels.begin_step import Rows, StepInputs
from vitalrt_kernels.gpu.norm_rope import cos_sin
from vitalrt_kernels.gpu.overlap import overlap_options, share_alike, wait_for_previous

BLOCKS_PER_SM = {"_begin_step_kernel": 8}
MAX_BLOCK = 4096


@triton.jit
def _begin_step_kernel(
    hidden_ptr, tokens_ptr, latents_left_ptr, lengths_ptr, limits_ptr, offsets_ptr, embed_ptr, stop_ptr,
    frequency_ptr, x_ptr, turns_ptr, reach_ptr, width, num_stops, half,
    STOPS: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """half: of a head.  STOPS, HALF: num_stops and half, or the next power of two."""
    wait_for_previous(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    latents_left = tl.load(latents_left_ptr + row)
    length = tl.load(lengths_ptr + row)
    limit = tl.load(limits_ptr + row)
    token = tl.load(tokens_ptr + row)
    stop = tl.arange(0, STOPS)
    stop_ids = tl.load(stop_ptr + stop, mask=stop < num_stops, other=-1)
    thinks = latents_left > 0
    stops = (thinks == 0) & (tl.max((stop_ids == token).to(tl.int32), 0) > 0)
    runs = (length < limit) & (stops == 0)
    num_thought = tl.where(runs & thinks, width, 0)
    num_embedded = tl.where(runs & (thinks == 0), width, 0)
    position = length + tl.load(offsets_ptr + row)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        thought = tl.load(hidden_ptr + row * width + columns, mask=columns < num_thought, other=0.0)
        embedded = tl.load(embed_ptr + token * width + columns, mask=columns < num_embedded, other=0.0)
        tl.store(x_ptr + row * width + columns, tl.where(thinks, thought, embedded), mask=columns < width)
    i = tl.arange(0, HALF)
    frequency = tl.load(frequency_ptr + i, mask=i < half, other=0.0)
    cos, sin = cos_sin(tl.where(runs, position, 0).to(tl.float32) * frequency)
    cos_ptr = turns_ptr + row * 2 * half + i
    tl.store(cos_ptr, cos, mask=i < half)
    tl.store(cos_ptr + half, sin, mask=i < half)
    tl.store(reach_ptr + row, tl.where(runs, length + 1, 0))
    tl.debug_barrier()  # every thread has read the counters before one of them moves them on
    tl.store(lengths_ptr + row, length + runs.to(tl.int32))
    tl.store(latents_left_ptr + row, latents_left - (runs & thinks).to(tl.int32))
    tl.store(limits_ptr + row, tl.where(stops, 0, limit))


def begin_step(rows: Rows, embed: torch.Tensor, stop_ids: torch.Tensor, frequencies: torch.Tensor) -> StepInputs:
    (batch, width), half = rows.hidden.shape, len(frequencies)
    x, reach = torch.empty_like(rows.hidden), torch.empty_like(rows.lengths)
    turns = frequencies.new_empty(batch, 2 * half)
    if batch:
        kernel = _begin_step_kernel[(batch,)](
            rows.hidden, rows.tokens, rows.latents_left, rows.lengths, rows.limits, rows.offsets, embed, stop_ids,
            frequencies, x, turns, reach, width, len(stop_ids), half,
            STOPS=triton.next_power_of_2(max(1, len(stop_ids))), BLOCK=min(MAX_BLOCK, triton.next_power_of_2(width)),
            HALF=triton.next_power_of_2(half), num_warps=4, **overlap_options(x),
        )  # fmt: skip
        share_alike(kernel, x)
    return StepInputs(x, turns, reach)
