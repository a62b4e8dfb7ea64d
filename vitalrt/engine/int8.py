"""A model whose decoder's weights are in 8 bits, held to the latents that it had before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vitalrt.config import EngineConfig
from vitalrt.engine.request import Decoding
from vitalrt.engine.scheduler import Engine
from vitalrt.errors import CheckpointError
from vitalrt.inputs.prompt import Prompt
from vitalrt.model.int8_linear import quantise_linear_maps
from vitalrt.model.qwen3_vl import Qwen3VL

TOLERANCE = 0.1  # of the median; every step feeds its error back, so that the last ones of odd prompts may be far off
NUM_STEPS = 4


@dataclass(frozen=True)
class Int8Error:
    """Median and largest ‖z_k - z_k'‖ / ‖z_k‖, z_1 .. z_NUM_STEPS of num_prompts prompts."""

    median: float
    largest: float
    num_prompts: int

    def __str__(self) -> str:
        return (
            f"{self.median:.2g} (median; at most {self.largest:.2g}) over {self.num_prompts} prompts, K = {NUM_STEPS}"
        )


def quantise(model: Qwen3VL, prompts: Sequence[Prompt]) -> Int8Error:
    """Put the decoder's linear maps and its head into 8 bits, in place, and measure what that does to latents.

    prompts: to measure it by, in one batch of an engine on the model's device.  Raises CheckpointError where the error
    is beyond TOLERANCE; the model is then of no use.
    """
    expected = _latents(model, prompts)
    quantise_linear_maps(model.decoder)
    off = ((_latents(model, prompts) - expected).norm(dim=-1) / expected.norm(dim=-1)).flatten()
    error = Int8Error(float(off.median()), float(off.max()), len(prompts))
    if not error.median <= TOLERANCE:  # a NaN is within no tolerance
        raise CheckpointError(f"int8: expected a relative error of latents up to {TOLERANCE:g}, got {error}")
    return error


def _latents(model: Qwen3VL, prompts: Sequence[Prompt]) -> torch.Tensor:
    """[prompts, NUM_STEPS, d] fp32, on the CPU."""
    decoding = Decoding(NUM_STEPS, max_new_tokens=1)
    page_size = EngineConfig.page_size
    num_pages = sum(-(-(prompt.num_tokens + NUM_STEPS + 1) // page_size) for prompt in prompts)
    engine = Engine(model, EngineConfig(num_pages * page_size, max_batch=len(prompts), prefix_cache=False), ())
    running = [engine.submit(prompt, decoding) for prompt in prompts]
    while not all(sequence.is_finished for sequence in running):
        engine.advance()
    return torch.stack([torch.stack(sequence.latents) for sequence in running]).float().cpu()
