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


def length_bucket(num_tokens: int) -> int:
    """Steps of 64 up to 512, of 128 above: at most an eighth more than was asked for, once a prompt is worth it."""
    step = 64 if num_tokens <= 512 else 128
    return -(-num_tokens // step) * step


class DevicePrefill:
    """One prompt at a time, from its first token on."""

    def __init__(
        self, weights: StepWeights, k_cache: torch.Tensor, v_cache: torch.Tensor, num_deepstack: int = 0
    ) -> None:
        """weights: not int8.  num_deepstack: to how many layers deepstack adds.

        k_cache, v_cache: [layers, S, G, D], written at a prompt's slots and nowhere else.
        """
        self.weights, self.k_cache, self.v_cache = weights, k_cache, v_cache
        device, width = k_cache.device, weights.config.hidden_size
        self._graphs = Graphs(device)
        self._ids = torch.zeros(MAX_CAPTURED, dtype=torch.int64, device=device)
        self._positions = torch.zeros(3 * MAX_CAPTURED, dtype=torch.int64, device=device)
        self._write_slots = torch.full((MAX_CAPTURED,), -1, dtype=torch.int64, device=device)
        self._read_slots = torch.zeros(MAX_CAPTURED, dtype=torch.int64, device=device)
        self._last = torch.zeros(1, dtype=torch.int64, device=device)
        self._is_visual = torch.zeros(MAX_CAPTURED, 1, dtype=torch.bool, device=device)
        self._visual = weights.embed.new_zeros(1 + num_deepstack, MAX_CAPTURED, width)  # visual tokens, then deepstack
        self._hidden = weights.embed.new_zeros(width)

    def __call__(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        image_rows: torch.Tensor | None = None,
        visual: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """ids: [T] int64.  positions: [3, T] int64.  slots: [T] int64, where each token's key and value go.

        image_rows: [V] int64, which tokens are visual.  visual: what they are, [V, d], and then what deepstack adds to
        them after layer 0, 1, ..  Returns z_0 [d], after the final norm; with CUDA the next call overwrites it.
        """
        num_tokens = len(ids)
        if not self._graphs.is_captured or num_tokens > MAX_CAPTURED:
            last = slots.new_tensor([num_tokens - 1])
            features, is_visual = self._spread(num_tokens, image_rows, visual, ids.device)
            return self._run(ids, positions, slots, slots, last, is_visual, features)
        length = length_bucket(num_tokens)
        self._fill(length, ids, positions, slots, image_rows, visual)
        views = (
            self._ids[:length],
            self._positions[: 3 * length].view(3, length),
            self._write_slots[:length],
            self._read_slots[:length],
            self._last,
            self._is_visual[:length] if visual else None,
            [features[:length] for features in self._visual[: len(visual)]],
        )

        def run() -> None:
            self._hidden.copy_(self._run(*views))

        # A run of the same prompt again writes the same to the same slots: it needs no undoing.
        self._graphs((length, len(visual)), run, dry_run=run)
        return self._hidden

    def _fill(
        self,
        length: int,
        ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        image_rows: torch.Tensor | None,
        visual: Sequence[torch.Tensor],
    ) -> None:
        num_tokens = len(ids)
        self._ids[:num_tokens].copy_(ids)
        self._ids[num_tokens:length].zero_()
        self._positions[: 3 * length].view(3, length)[:, :num_tokens].copy_(positions)
        self._positions[: 3 * length].view(3, length)[:, num_tokens:].zero_()
        self._write_slots[:num_tokens].copy_(slots)
        self._write_slots[num_tokens:length].fill_(-1)
        self._read_slots[:num_tokens].copy_(slots)
        self._read_slots[num_tokens:length].copy_(slots[:1].expand(length - num_tokens))  # finite once it is written
        self._last.fill_(num_tokens - 1)
        if image_rows is None or not visual:
            return
        self._is_visual[:length].zero_()
        self._is_visual.index_fill_(0, image_rows, True)
        self._visual[: len(visual), :length].zero_()
        for buffer, features in zip(self._visual, visual, strict=True):
            buffer.index_copy_(0, image_rows, features.to(buffer.dtype))

    def _spread(
        self, num_tokens: int, image_rows: torch.Tensor | None, visual: Sequence[torch.Tensor], device: torch.device
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """Features of visual tokens at their rows among all tokens, 0 elsewhere, and which rows these are."""
        if image_rows is None or not visual:
            return [], None
        is_visual = torch.zeros(num_tokens, 1, dtype=torch.bool, device=device).index_fill(0, image_rows, True)
        empty = self.weights.embed.new_zeros(num_tokens, self.weights.config.hidden_size)
        return [empty.index_copy(0, image_rows, features.to(empty.dtype)) for features in visual], is_visual

    def _run(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        write_slots: torch.Tensor,
        read_slots: torch.Tensor,
        last: torch.Tensor,
        is_visual: torch.Tensor | None,
        visual: list[torch.Tensor],
    ) -> torch.Tensor:
        weights = self.weights
        x = weights.embed[ids]
        if is_visual is not None:
            x = torch.where(is_visual, visual[0], x)
        num_layers, deepstack = len(weights.layers), visual[1:]

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
    """The vision tower, by grids: images come in few sizes. The grids used last stay captured."""

    def __init__(self, tower: VisionTower) -> None:
        self.tower = tower
        self._device = tower.patch_embed.weight.device
        self._graphs = Graphs(self._device)
        self._static: OrderedDict[tuple[Grid, ...], tuple[torch.Tensor, list[torch.Tensor], GridTables]] = OrderedDict()

    def __call__(self, pixel_values: torch.Tensor, grids: Sequence[Grid]) -> list[torch.Tensor]:
        """pixel_values: [P, patch_dim], on the CPU or the device.

        Returns visual tokens [V, d] and deepstack features [V, d] by layer; with CUDA the next call for the same grids
        overwrites them.
        """
        if not self._graphs.is_captured:
            tokens, deepstack = self.tower(pixel_values, grids)
            return [tokens, *deepstack]
        key = (*grids,)
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

    def _make_room(self) -> None:
        if len(self._static) == MAX_GRIDS:
            self._graphs.drop(self._static.popitem(last=False)[0])
