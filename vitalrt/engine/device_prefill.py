"""A prompt's one pass, and its images', on static buffers: captured by length and by grid where there is CUDA.

At a few hundred tokens, torch's launches take as long as the products; captured they are one call. A length is rounded
up to the next bucket: the tokens that fill it up come last, are seen by nobody (attention is causal) and write no slot.
Of a later question about an image only the question is left to compute, a few tokens over a long context: a step's own
attention does for these.

T tokens, V visual tokens, P patches, d width, S slots, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from vitalrt.engine.device_step import StepWeights, run_layer
from vitalrt.engine.graphs import Graphs
from vitalrt.model.rope import Grid, GridTables, grid_tables
from vitalrt.model.vision import VisionTower
from vitalrt.transfers import pinned
from vitalrt_kernels import new_tickets, norm_rope_append, paged_attention, rms_norm

MAX_CAPTURED = 2048  # longer prompts keep the device busy whoever launches
LEFT_BUCKETS = (16, 32, 64)
MAX_LEFT = LEFT_BUCKETS[-1]  # each token reads the whole context, so more of them are better off in tiles
MAX_GRIDS = 8
MAX_SEEN = 64


def length_bucket(num_tokens: int) -> int:
    """Steps of 64 up to 512, of 128 above: at most an eighth more than was asked for, once a prompt is worth it."""
    step = 64 if num_tokens <= 512 else 128
    return -(-num_tokens // step) * step


class Inputs(NamedTuple):
    """embeddings: [T, d], visual tokens and latents in their places.  positions: [3, T] int64.

    image_rows: [V] int64, None without visual tokens.  deepstack: [V, d] each, as Decoder.forward takes them.
    """

    embeddings: torch.Tensor
    positions: torch.Tensor
    image_rows: torch.Tensor | None = None
    deepstack: Sequence[torch.Tensor] = ()


class DevicePrefill:
    """Prompts from their first token on, one at a time, and what is left of prompts that the cache has most of."""

    def __init__(
        self, weights: StepWeights, k_cache: torch.Tensor, v_cache: torch.Tensor, page_size: int, num_deepstack: int = 0
    ) -> None:
        """num_deepstack: to how many layers deepstack adds.

        k_cache, v_cache: [layers, S, G, D], written at the slots that are given and nowhere else.
        """
        self.weights, self.k_cache, self.v_cache, self.page_size = weights, k_cache, v_cache, page_size
        device, width, num_pages = k_cache.device, weights.config.hidden_size, k_cache.shape[1] // page_size
        self._graphs = Graphs(device)
        # What a graph reads; 2048 tokens of an 8B model and 3 layers of deepstack: 67 MB.
        self._embeddings = weights.embed.new_zeros(MAX_CAPTURED, width)
        self._deepstack = weights.embed.new_zeros(num_deepstack, MAX_CAPTURED, width)
        self._positions = torch.zeros(3 * MAX_CAPTURED, dtype=torch.int64, device=device)
        self._write_slots, self._read_slots = torch.zeros(2, MAX_CAPTURED, dtype=torch.int64, device=device)
        self._last = torch.zeros(1, dtype=torch.int64, device=device)
        self._pages = torch.zeros(MAX_LEFT, num_pages, dtype=torch.int32, device=device)
        self._reach = torch.zeros(MAX_LEFT, dtype=torch.int32, device=device)
        self._tickets = new_tickets(MAX_LEFT * weights.config.num_key_value_heads, device)
        self._hidden = weights.embed.new_zeros(MAX_LEFT, width)

    def begin(self, inputs: Inputs, slots: torch.Tensor) -> torch.Tensor:
        """A whole prompt, or as much of its beginning.

        slots: [T] int64, where each token's key and value go.
        Returns [1, d], the last token's after the final norm; the next call overwrites it.
        """
        num_tokens = len(slots)
        if num_tokens > MAX_CAPTURED:
            embeddings, positions, image_rows, deepstack = inputs
            spread = [
                torch.zeros_like(embeddings).index_copy(0, image_rows, features.to(embeddings.dtype))
                for features in deepstack
                if image_rows is not None
            ]
            attend = self._among_themselves(positions, slots, slots)
            return self._run(embeddings, spread, attend, slots.new_tensor([num_tokens - 1]))
        length = length_bucket(num_tokens)
        self._fill(length, inputs, slots)
        self._read_slots[:num_tokens].copy_(slots)
        self._read_slots[num_tokens:length].copy_(slots[:1].expand(length - num_tokens))
        self._last.fill_(num_tokens - 1)
        x, by_axis, write_slots, levels = self._views(length, len(inputs.deepstack))
        attend = self._among_themselves(by_axis, write_slots, self._read_slots[:length])

        def run() -> None:
            self._hidden[:1].copy_(self._run(x, levels, attend, self._last))

        # A run of the same prompt again writes the same to the same slots: it needs no undoing.
        self._graphs(("begin", length, len(levels)), run, dry_run=run)
        return self._hidden[:1]

    def go_on(self, inputs: Inputs, slots: torch.Tensor, pages: torch.Tensor, reach: torch.Tensor) -> torch.Tensor:
        """At most MAX_LEFT tokens, of any prompts, whose earlier tokens are in the cache. As begin(), and:

        pages: [T, at most P] int32, of each token's prompt, as paged_attention takes them.  reach: [T] int32, how many
        of its tokens each one sees, itself included. Both on the CPU.
        Returns [T, d], after the final norm; the next call overwrites it.
        """
        num_tokens, device = len(slots), self.k_cache.device
        length = next(length for length in LEFT_BUCKETS if length >= num_tokens)
        self._fill(length, inputs, slots)
        self._pages[:num_tokens, : pages.shape[1]].copy_(pinned(pages, device), non_blocking=True)
        self._reach[:num_tokens].copy_(pinned(reach, device), non_blocking=True)
        self._reach[num_tokens:length].zero_()
        x, by_axis, write_slots, levels = self._views(length, len(inputs.deepstack))

        def attend(layer: int, qkv: torch.Tensor) -> torch.Tensor:
            q, caches = self._append(layer, qkv, by_axis, write_slots), (self.k_cache[layer], self.v_cache[layer])
            # Each token is a row of its own, which reads its prompt's context: from L2, where the others have left it.
            return paged_attention(
                q, *caches, self._pages[:length], self._reach[:length], self.page_size, self._tickets
            )

        def run() -> None:
            self._hidden[:length].copy_(self._run(x, levels, attend))

        self._graphs(("go on", length, len(levels)), run, dry_run=run)
        return self._hidden[:num_tokens]

    def _fill(self, length: int, inputs: Inputs, slots: torch.Tensor) -> None:
        """The static buffers. What fills up a bucket is zeros and has no slot to write."""
        embeddings, positions, image_rows, deepstack = inputs
        num_tokens = len(slots)
        x, by_axis, write_slots, levels = self._views(length, len(deepstack))
        x[:num_tokens].copy_(embeddings)
        x[num_tokens:].zero_()
        by_axis[:, :num_tokens].copy_(positions)
        by_axis[:, num_tokens:].zero_()
        write_slots[:num_tokens].copy_(slots)
        write_slots[num_tokens:].fill_(-1)
        if image_rows is not None:
            for level, features in zip(levels, deepstack, strict=True):
                level.zero_().index_copy_(0, image_rows, features.to(level.dtype))

    def _views(
        self, length: int, num_levels: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Of the static buffers: embeddings, positions [3, length], slots to write, deepstack's levels."""
        positions = self._positions[: 3 * length].view(3, length)
        levels = [level[:length] for level in self._deepstack[:num_levels]]
        return self._embeddings[:length], positions, self._write_slots[:length], levels

    def _append(
        self, layer: int, qkv: torch.Tensor, positions: torch.Tensor, write_slots: torch.Tensor
    ) -> torch.Tensor:
        weights, caches = self.weights, (self.k_cache[layer], self.v_cache[layer])
        qk_norm = weights.layers[layer].qk_norm
        return norm_rope_append(qkv, qk_norm, weights.eps, positions, weights.rope, *caches, write_slots)

    def _among_themselves(
        self, positions: torch.Tensor, write_slots: torch.Tensor, read_slots: torch.Tensor
    ) -> Callable[[int, torch.Tensor], torch.Tensor]:
        """Attention of tokens with nothing before them."""

        def attend(layer: int, qkv: torch.Tensor) -> torch.Tensor:
            q = self._append(layer, qkv, positions, write_slots)
            k, v = self.k_cache[layer][read_slots], self.v_cache[layer][read_slots]
            q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

        return attend

    def _run(
        self,
        x: torch.Tensor,
        deepstack: list[torch.Tensor],
        attend: Callable[[int, torch.Tensor], torch.Tensor],
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """wanted: rows of the result, int64; None for all."""
        num_layers = len(self.weights.layers)
        is_cut = len(deepstack) < num_layers  # else the last layer has yet to add to the other rows
        for layer in range(num_layers):
            rows = wanted if is_cut and layer == num_layers - 1 else None
            x = run_layer(self.weights, layer, x, attend, rows)
            if layer < len(deepstack):
                x = x + deepstack[layer]
        hidden = rms_norm(x if is_cut or wanted is None else x[wanted], self.weights.norm, self.weights.eps)
        assert isinstance(hidden, torch.Tensor)
        return hidden


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
        if not self._is_known(key):
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
