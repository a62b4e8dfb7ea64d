"""The decoder of a small float32 model on the CPU: one call of the C++ core in place of many torch operations.

B sequences, T new tokens of all of them, d width, L longest capacity, V visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vitalrt._core import CpuDecoder as NativeDecoder
from vitalrt.engine.cache import PagedCache
from vitalrt.engine.torch_threads import parallel_address
from vitalrt.model.decoder import Decoder, DecoderLayer

# Up to here the core is done before torch has so much as called its operations, whatever its threads would then gain.
MAX_LAYER_WEIGHTS = 1 << 20
# The same for the new tokens of a sequence: within a sequence nothing is shared out, and for long prompts torch's
# attention is the faster one. bench/bench_cpu_decoder.py measures both.
MAX_LAYER_PRODUCTS = 1 << 25


def why_not_cpu_decoder(decoder: Decoder) -> str | None:
    """None if this decoder runs in C++, else what keeps it in torch, for people."""
    weight = decoder.embed.weight
    if weight.device.type != "cpu":
        return f"the model is on {weight.device.type}"
    if weight.dtype != torch.float32:
        return f"the model is in {str(weight.dtype).removeprefix('torch.')}, not float32"
    layer_weights = _num_layer_weights(decoder)
    if layer_weights > MAX_LAYER_WEIGHTS:
        return f"a layer has {layer_weights:,} weights, enough for torch's threads to pay"
    return None


class CpuDecoder:
    """Prefill and step in C++, on torch's threads. The core has copies of the matrices, and points at norms and cache.

    max_tokens: up to how many new tokens of a sequence it is faster than torch. A step it always is.
    """

    def __init__(self, decoder: Decoder, cache: PagedCache) -> None:
        """decoder: one for which why_not_cpu_decoder finds nothing."""
        config, rope = decoder.config, decoder.rope
        self.max_tokens = MAX_LAYER_PRODUCTS // _num_layer_weights(decoder)
        weights = [_weights(layer) for layer in decoder.layers if isinstance(layer, DecoderLayer)]
        final_norm = decoder.norm.weight.detach()
        norms = [(input_norm, qk_norm, post_norm) for input_norm, _, qk_norm, _, post_norm, _, _ in weights]
        self._pointed_at = norms, final_norm, rope.inverse_frequencies, rope.axis_of_frequency, cache.k, cache.v
        self._native = NativeDecoder(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            intermediate_size=config.intermediate_size,
            rms_norm_eps=config.rms_norm_eps,
            layers=[[weight.data_ptr() for weight in layer] for layer in weights],
            final_norm=final_norm.data_ptr(),
            inverse_frequencies=rope.inverse_frequencies.data_ptr(),
            axes=rope.axis_of_frequency.data_ptr(),
            k_cache=cache.k.data_ptr(),
            v_cache=cache.v.data_ptr(),
            num_slots=cache.num_tokens,
        )

    @property
    def num_bytes(self) -> int:
        """Of the core's copies: two a weight where bf16 holds it, else four."""
        return self._native.num_bytes

    def __call__(
        self,
        inputs: torch.Tensor,
        slots: torch.Tensor,
        lengths: torch.Tensor,
        counts: torch.Tensor,
        positions: torch.Tensor,
        image_rows: torch.Tensor | None = None,
        deepstack: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """inputs: [T, d] float32, the new tokens of all sequences one after the other, counts[b] of sequence b.

        slots: [B, L]; lengths, counts: [B]; positions: [3, T], or [1, T] where the axes agree; int64.  image_rows: [V]
        int64 and deepstack: [V, d] each, as Decoder.forward takes them.  All contiguous, on the CPU.
        Appends the new tokens to the cache, at slots[b, lengths[b]] and on.  Returns hidden [B, d], of each sequence's
        last new token, after the final norm.
        """
        hidden = inputs.new_empty(slots.shape[0], inputs.shape[1])
        (batch, row_length), num_axes = slots.shape, positions.shape[0]
        num_image_rows, image_address = (0, 0) if image_rows is None else (len(image_rows), image_rows.data_ptr())
        self._native.run(
            batch,
            row_length,
            slots.data_ptr(),
            lengths.data_ptr(),
            counts.data_ptr(),
            num_axes,
            positions.data_ptr(),
            inputs.data_ptr(),
            hidden.data_ptr(),
            num_image_rows,
            image_address,
            [features.data_ptr() for features in deepstack],
            parallel_address(),
            torch.get_num_threads(),
        )
        return hidden


def _num_layer_weights(decoder: Decoder) -> int:
    config = decoder.config
    heads = config.num_attention_heads + config.num_key_value_heads
    return config.hidden_size * (2 * heads * config.head_dim + 3 * config.intermediate_size)


def _weights(layer: DecoderLayer) -> list[torch.Tensor]:
    modules = layer.input_norm, layer.qkv, layer.qk_norm, layer.o, layer.post_norm, layer.gate_up, layer.down
    return [module.weight.detach() for module in modules]
