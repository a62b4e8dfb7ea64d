"""A prompt's one pass, and its images', on static buffers: captured by length and by grid where there is CUDA.

At a few hundred tokens, torch's launches take as long as the products; captured they are one call. A length is rounded
up to the next bucket: the tokens that fill it up come last, are seen by nobody (attention is causal) and write no slot.

T tokens, V visual tokens, P patches, d width, S slots, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from vitalrt.engine.device_step import StepWeights, run_layer
from vitalrt.engine.graphs import Graphs
from vitalrt.model.rope import Grid, GridTables, grid_tables
from vitalrt.model.vision import VisionTower
from vitalrt_kernels import rms_norm

MAX_CAPTURED = 2048  # longer prompts keep the device busy whoever launches
MAX_GRIDS = 8
MAX_SEEN = 64


def length_bucket(num_tokens: int) -> int:
    """Steps of 64 up to 512, of 128 above: at most an eighth more than was asked for, once a prompt is worth it."""
    step = 64 if num_tokens <= 512 else 128
    return -(-num_tokens // step) * step


class DevicePrefill:
    """One prompt at a time, from its first token on."""

    def __init__(
        self, weights: StepWeights, k_cache: torch.Tensor, v_cache: torch.Tensor, num_deepstack: int = 0
    ) -> None:
        """num_deepstack: to how many layers deepstack adds.

        k_cache, v_cache: [layers, S, G, D], written at a prompt's slots and nowhere else.
        """
        self.weights, self.k_cache, self.v_cache = weights, k_cache, v_cache
        device = k_cache.device
        self._graphs = Graphs(device)
        # What a graph reads, where it can be captured; 2048 tokens of an 8B model and 3 layers of deepstack: 67 MB.
        length = MAX_CAPTURED if self._graphs.is_captured else 0
        self._embeddings = weights.embed.new_zeros(length, weights.config.hidden_size)
        self._deepstack = weights.embed.new_zeros(num_deepstack, length, weights.config.hidden_size)
        self._positions = torch.zeros(3 * length, dtype=torch.int64, device=device)
        self._write_slots, self._read_slots = torch.zeros(2, length, dtype=torch.int64, device=device)
        self._last = torch.zeros(1, dtype=torch.int64, device=device)
        self._hidden = weights.embed.new_zeros(weights.config.hidden_size)

    def __call__(
        self,
        embeddings: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        image_rows: torch.Tensor | None = None,
        deepstack: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """embeddings: [T, d], visual tokens in their places.  positions: [3, T] int64.

        slots: [T] int64, where each token's key and value go.  image_rows: [V] int64, and deepstack: [V, d] each, as
        Decoder.forward takes them.  Returns z_0 [d], after the final norm; with CUDA the next call overwrites it.
        """
        num_tokens = len(embeddings)
        if not self._graphs.is_captured or num_tokens > MAX_CAPTURED:
            spread = [
                torch.zeros_like(embeddings).index_copy(0, image_rows, features.to(embeddings.dtype))
                for features in deepstack
                if image_rows is not None
            ]
            return self._run(embeddings, positions, slots, slots, slots.new_tensor([num_tokens - 1]), spread)
        length = length_bucket(num_tokens)
        self._fill(length, embeddings, positions, slots, image_rows, deepstack)
        views = (
            self._embeddings[:length],
            self._positions[: 3 * length].view(3, length),
            self._write_slots[:length],
            self._read_slots[:length],
            self._last,
            [features[:length] for features in self._deepstack[: len(deepstack)]],
        )

        def run() -> None:
            self._hidden.copy_(self._run(*views))

        # A run of the same prompt again writes the same to the same slots: it needs no undoing.
        self._graphs((length, len(deepstack)), run, dry_run=run)
        return self._hidden

    def _fill(
        self,
        length: int,
        embeddings: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        image_rows: torch.Tensor | None,
        deepstack: Sequence[torch.Tensor],
    ) -> None:
        """The static buffers. What fills up a bucket is zeros, has no slot to write, and reads the first token's."""
        num_tokens = len(embeddings)
        self._embeddings[:num_tokens].copy_(embeddings)
        self._embeddings[num_tokens:length].zero_()
        by_axis = self._positions[: 3 * length].view(3, length)
        by_axis[:, :num_tokens].copy_(positions)
        by_axis[:, num_tokens:].zero_()
        self._write_slots[:num_tokens].copy_(slots)
        self._write_slots[num_tokens:length].fill_(-1)
        self._read_slots[:num_tokens].copy_(slots)
        self._read_slots[num_tokens:length].copy_(slots[:1].expand(length - num_tokens))
        self._last.fill_(num_tokens - 1)
        if image_rows is not None:
            self._deepstack[: len(deepstack), :length].zero_()
            for buffer, features in zip(self._deepstack, deepstack, strict=False):
                buffer.index_copy_(0, image_rows, features.to(buffer.dtype))

    def _run(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        write_slots: torch.Tensor,
        read_slots: torch.Tensor,
        last: torch.Tensor,
        deepstack: list[torch.Tensor],
    ) -> torch.Tensor:
        weights = self.weights
        num_layers = len(weights.layers)

        def attend(layer: int, q: torch.Tensor) -> torch.Tensor:
            k, v = self.k_cache[layer][read_slots], self.v_cache[layer][read_slots]
            q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

        is_cut = len(deepstack) < num_layers  # else the last layer has yet to add to the other rows
        for layer in range(num_layers):
            wanted = last if is_cut and layer == num_layers - 1 else None
            x = run_layer(weights, layer, x, positions, self.k_cache, self.v_cache, write_slots, attend, wanted)
            if layer < len(deepstack):
                x = x + deepstack[layer]
        hidden = rms_norm(x if is_cut else x[last], weights.norm, weights.eps)
        assert isinstance(hidden, torch.Tensor)
        return hidden[0]


class DeviceVision:
    """The vision tower, by grids. What comes a second time is captured, and the grids used last stay so."""

    def __init__(self, tower: VisionTower) -> None:
        self.tower = tower
        self._device = tower.patch_embed.weight.device
        self._graphs = Graphs(self._device)
        self._seen: OrderedDict[tuple[Grid, ...], None] = OrderedDict()
        self._static: OrderedDict[tuple[Grid, ...], tuple[torch.Tensor, list[torch.Tensor], GridTables]] = OrderedDict()

    def __call__(self, pixel_values: torch.Tensor, grids: Sequence[Grid]) -> list[torch.Tensor]:
        """pixel_values: [P, patch_dim], on the CPU or the device.

        Returns visual tokens [V, d] and deepstack features [V, d] by layer; with CUDA the next call for the same grids
        overwrites them.
        """
        key = (*grids,)
        if not self._graphs.is_captured or not self._is_known(key):
            tokens, deepstack = self.tower(pixel_values.to(self._device), grids)
            return [tokens, *deepstack]
        if key not in self._static:
            self._make_room()
            pixels = pixel_values.to(self._device, self.tower.patch_embed.weight.dtype)
            tokens, deepstack = self.tower(pixels, grids)
            # The tables are kept: the graph reads them, whoever else forgets them.
            tables = grid_tables(key, self.tower.config, self._device)
            self._static[key] = pixels.clone(), [torch.empty_like(part) for part in (tokens, *deepstack)], tables
        self._static.move_to_end(key)
        pixels, outputs, _ = self._static[key]
        pixels.copy_(pixel_values.to(self._device, non_blocking=True))  # made narrower there, not on the host

        def run() -> None:
            tokens, deepstack = self.tower(pixels, grids)
            for output, part in zip(outputs, (tokens, *deepstack), strict=True):
                output.copy_(part)

        self._graphs(key, run, dry_run=run)
        return outputs

    def _is_known(self, key: tuple[Grid, ...]) -> bool:
        """Whether these grids have come before. Capturing takes several runs: too many for what comes once."""
        is_known = key in self._seen
        self._seen[key] = None
        self._seen.move_to_end(key)
        if len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)
        return is_known

    def _make_room(self) -> None:
        if len(self._static) == MAX_GRIDS:
            self._graphs.drop(self._static.popitem(last=False)[0])
