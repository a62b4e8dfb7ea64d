"""The decoder step of a small float32 model on the CPU: one call of the C++ core in place of many torch operations.

B sequences, d width, L longest capacity.
"""

from __future__ import annotations

import torch

from vitalrt._core import CpuStep as NativeStep
from vitalrt.engine.cache import PagedCache
from vitalrt.model.decoder import Decoder, DecoderLayer

# Up to here the core's one thread is done before torch has so much as called its operations, whatever its threads would
# then gain: a layer of 0.94 Mi weights takes the core 0.4 ms for one sequence and 0.9 ms for eight, where torch spends
# 0.5 and 0.9 ms on a layer of next to nothing (AMD EPYC, one core of a busy machine).
MAX_LAYER_WEIGHTS = 1 << 20
MAX_BATCH = 8


def why_not_cpu_step(decoder: Decoder) -> str | None:
    """None if up to MAX_BATCH sequences of this decoder step in C++, else what keeps them in torch, for people."""
    weight = decoder.embed.weight
    if weight.device.type != "cpu":
        return f"the model is on {weight.device.type}"
    if weight.dtype != torch.float32:
        return f"the model is in {str(weight.dtype).removeprefix('torch.')}, not float32"
    layer_weights = sum(parameter.numel() for parameter in decoder.layers[0].parameters())
    if layer_weights > MAX_LAYER_WEIGHTS:
        return f"a layer has {layer_weights:,} weights, enough for torch's threads to pay"
    return None


class CpuStep:
    """RunningBatch's step in C++. Holds on to the weights and the cache that the core points at."""

    def __init__(self, decoder: Decoder, cache: PagedCache) -> None:
        """decoder: one for which why_not_cpu_step finds nothing."""
        config = decoder.config
        weights = [_weights(layer) for layer in decoder.layers if isinstance(layer, DecoderLayer)]
        final_norm, frequencies = decoder.norm.weight.detach(), decoder.rope.inverse_frequencies
        self._pointed_at = weights, final_norm, frequencies, cache.k, cache.v
        self._native = NativeStep(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            intermediate_size=config.intermediate_size,
            rms_norm_eps=config.rms_norm_eps,
            layers=[[weight.data_ptr() for weight in layer] for layer in weights],
            final_norm=final_norm.data_ptr(),
            inverse_frequencies=frequencies.data_ptr(),
            k_cache=cache.k.data_ptr(),
            v_cache=cache.v.data_ptr(),
            num_slots=cache.num_tokens,
        )

    def __call__(
        self, inputs: torch.Tensor, slots: torch.Tensor, lengths: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """inputs: [B, d] float32.  slots: [B, L]; lengths, positions: [B]; int64.  All contiguous, on the CPU.

        Appends each sequence's token to the cache, at slots[b, lengths[b]].  Returns hidden [B, d], after final norm.
        """
        hidden = torch.empty_like(inputs)
        batch, row_length = slots.shape
        addresses = [tensor.data_ptr() for tensor in (slots, lengths, positions, inputs, hidden)]
        self._native.run(batch, row_length, *addresses)
        return hidden


def _weights(layer: DecoderLayer) -> list[torch.Tensor]:
    modules = layer.input_norm, layer.qkv, layer.qk_norm, layer.o, layer.post_norm, layer.gate_up, layer.down
    return [module.weight.detach() for module in modules]
