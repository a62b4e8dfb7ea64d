"""A step whose whole state lives on the device, so that it can be captured once and replayed without the host.

One function serves latent and answer phases, and rows of both in one batch: it feeds each row z or embed(token), runs
the layers through vitalrt_kernels, and, if any row is to answer next, takes the greedy token. It allocates nothing that
lives on, reads nothing back and branches on nothing that the device computes.

B rows, d width, P pages per row, S slots, G key/value heads, D head dim, K latent steps.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import NamedTuple

import torch
from torch import nn

from vitalrt.model.decoder import Decoder, DecoderLayer
from vitalrt.model.int8_linear import Int8Linear
from vitalrt.transfers import pinned
from vitalrt_kernels import (
    Append,
    Int8Weight,
    Norm,
    Rope,
    Rows,
    begin_step,
    head_argmax,
    linear_decode,
    new_tickets,
    num_splits,
    paged_attention,
    quantise_int8,
    rms_norm,
    splits_up_to,
    why_not_triton,
)
from vitalrt_kernels.backend import TRITON_DTYPES

MAX_HEAD_DIM = 256

Weight = torch.Tensor | Int8Weight


class LayerWeights(NamedTuple):
    """As DecoderLayer has them; linear maps may be int8."""

    input_norm: torch.Tensor
    qkv: Weight
    qk_norm: torch.Tensor
    o: Weight
    post_norm: torch.Tensor
    gate_up: Weight
    down: Weight


def why_not_device_step(decoder: Decoder) -> str | None:
    """None if steps of this decoder keep their state on the device and run in the kernels, else why not, for people."""
    weight = decoder.embed.weight
    if reason := why_not_triton(weight.device):
        return reason
    if weight.dtype not in TRITON_DTYPES:
        return f"the kernels know no {str(weight.dtype).removeprefix('torch.')}"
    if decoder.config.head_dim > MAX_HEAD_DIM:
        return f"heads of {decoder.config.head_dim} are wider than {MAX_HEAD_DIM}, more than a block's registers hold"
    return None


class StepWeights:
    """What a step reads: the decoder's own tensors, or int8 ones made from them."""

    def __init__(self, decoder: Decoder, int8: bool = False) -> None:
        """int8: make these of a decoder whose own linear maps are not, which keeps them."""
        self.config = decoder.config
        self.eps = decoder.config.rms_norm_eps
        self.embed = decoder.embed.weight.detach()
        self.norm = decoder.norm.weight.detach()
        self.rope = Rope(decoder.rope.inverse_frequencies, decoder.rope.axis_of_frequency)

        def linear(module: nn.Linear | Int8Linear) -> Weight:
            if isinstance(module, Int8Linear):
                return module.int8
            weight = module.weight.detach()
            return quantise_int8(weight) if int8 else weight

        self.head = linear(decoder.head)
        self.layers = [
            LayerWeights(
                layer.input_norm.weight.detach(),
                linear(layer.qkv),
                layer.qk_norm.weight.detach(),
                linear(layer.o),
                layer.post_norm.weight.detach(),
                linear(layer.gate_up),
                linear(layer.down),
            )
            for layer in decoder.layers
            if isinstance(layer, DecoderLayer)
        ]


def run_layer(
    weights: StepWeights,
    layer: int,
    x: torch.Tensor,
    attend: Callable[[int, torch.Tensor], torch.Tensor],
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """x: [T, d].

    attend(layer, qkv [T, H + 2 G, D], as projected) stores keys and values and gives [T, H, D].  rows: whose result is
    wanted; None for all.
    """
    w, config = weights.layers[layer], weights.config
    qkv = linear_decode(x, w.qkv, Norm(w.input_norm, weights.eps)).view(len(x), -1, config.head_dim)
    attended = attend(layer, qkv).reshape(len(x), config.num_attention_heads * config.head_dim)
    if rows is not None:
        x, attended = x[rows], attended[rows]
    x = linear_decode(attended, w.o, residual=x)
    inner = linear_decode(x, w.gate_up, Norm(w.post_norm, weights.eps), swiglu=True)
    return linear_decode(inner, w.down, residual=x)


class DeviceStep:
    """Rows 0 .. max_batch - 1, their state, and the step over the first few of them.

    rows: vitalrt_kernels.Rows of all of them; hidden is z while a row thinks, else what its next token is taken from.
    pages: [max_batch, P] int32, as paged_attention takes them.
    latents: [max K, d], z_1 .. of row 0 where think() was used.
    """

    def __init__(
        self,
        weights: StepWeights,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        page_size: int,
        max_batch: int,
        stop_ids: Many[int] = (),
        max_latents: int = 64,
    ) -> None:
        """k_cache, v_cache: [layers, S, G, D], written at the slots that the rows' pages name, and nowhere else."""
        self.weights, self.k_cache, self.v_cache, self.page_size = weights, k_cache, v_cache, page_size
        device, num_pages = k_cache.device, k_cache.shape[1] // page_size
        self.max_batch = max_batch
        self.stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
        latents_left, lengths, limits, offsets = torch.zeros(4, max_batch, dtype=torch.int32, device=device)
        self.rows = Rows(
            hidden=weights.embed.new_zeros(max_batch, weights.config.hidden_size),
            tokens=torch.zeros(max_batch, dtype=torch.int64, device=device),
            latents_left=latents_left,
            lengths=lengths,
            limits=limits,
            offsets=offsets,
        )
        self.pages = torch.zeros(max_batch, num_pages, dtype=torch.int32, device=device)
        self.latents = weights.embed.new_zeros(max_latents, weights.config.hidden_size)
        self._tickets = new_tickets(max_batch * weights.config.num_key_value_heads, device)
        self._lengths = [0] * max_batch  # of rows that run never less than rows.lengths, which the host does not see

    def place(
        self, row: int, hidden: torch.Tensor, num_tokens: int, position: int, pages: torch.Tensor, k: int, limit: int
    ) -> None:
        """Start a sequence in a row. Nothing of it waits for the device.

        hidden: [d], z_0.  num_tokens: of it in the cache.  position: its next M-RoPE position.  k: latent steps to go.
        pages: int32, on the CPU (pinned, so that the copy does not wait) or the device.  limit: inputs it may come to.
        Where k is 0 its first token is taken from hidden at once.
        """
        rows = self.rows
        self._lengths[row] = num_tokens
        rows.hidden[row].copy_(hidden)
        self.pages[row, : len(pages)].copy_(pages, non_blocking=True)
        rows.latents_left[row : row + 1].fill_(k)
        rows.lengths[row : row + 1].fill_(num_tokens)
        rows.limits[row : row + 1].fill_(limit)
        rows.offsets[row : row + 1].fill_(position - num_tokens)
        if k == 0:
            self.answer(row, row + 1)

    def load(
        self,
        hidden: torch.Tensor,
        lengths: Many[int],
        positions: Many[int],
        latents_left: Many[int],
        limits: Many[int],
        pages: torch.Tensor,
    ) -> None:
        """All rows anew, from row 0 on; what is behind them is left idle. Nothing waits for the device.

        hidden: [B, d].  lengths: tokens in the cache.  positions: next M-RoPE positions.  limits: inputs they may come
        to.  pages: [B, at most P] int32. Whoever calls this sees to it that a row has a page for every step. Tokens
        stay as they are.
        """
        rows, num_rows = self.rows, len(hidden)
        self._lengths = [*lengths, *[0] * (self.max_batch - num_rows)]
        rows.hidden[:num_rows].copy_(hidden)
        self.pages[:num_rows, : pages.shape[1]].copy_(pinned(pages, self.k_cache.device), non_blocking=True)
        offsets = [position - length for position, length in zip(positions, lengths, strict=True)]
        counters = (rows.lengths, rows.offsets, rows.latents_left, rows.limits)
        for counter, values in zip(counters, (lengths, offsets, latents_left, limits), strict=True):
            told = pinned(torch.tensor(values, dtype=torch.int32), self.k_cache.device)
            counter[:num_rows].copy_(told, non_blocking=True)
        rows.limits[num_rows:].zero_()

    def tell(self, tokens: Many[int]) -> None:
        """Newest tokens of the first rows, as the host chose them; of no meaning where a row thinks."""
        self.rows.tokens[: len(tokens)].copy_(pinned(torch.tensor(tokens), self.k_cache.device), non_blocking=True)

    def clear(self, row: int) -> None:
        """Leave a row idle."""
        self._lengths[row] = 0
        self.rows.limits[row : row + 1].zero_()

    def answer(self, start: int, stop: int) -> None:
        """Tokens of rows start .. stop - 1, from their hidden states."""
        self._choose(self.rows.hidden[start:stop], self.rows.tokens[start:stop])

    def splits(self, num_rows: int, num_steps: int = 1) -> int:
        """Into how many parts attention is best divided in the next num_steps of the first num_rows rows."""
        longest = max(self._lengths[:num_rows]) + num_steps - 1  # the newest token is no part of a split
        return num_splits(num_rows * self.k_cache.shape[2], min(longest, self._capacity))

    def all_splits(self, num_rows: int) -> list[int]:
        """What splits() may come to as contexts grow."""
        return splits_up_to(num_rows * self.k_cache.shape[2], self._capacity)

    @property
    def _capacity(self) -> int:
        return self.pages.shape[1] * self.page_size

    def has_stepped(self, num_rows: int, num_steps: int = 1) -> None:
        """StepGraphs says so after each step or think: replayed, these run no Python. Unsaid, it costs speed alone."""
        for row in range(num_rows):
            self._lengths[row] += num_steps if self._lengths[row] else 0

    def step(self, num_rows: int, answers: bool, splits: int | None = None) -> None:
        """One latent step or answer token for each of the first num_rows rows. Of idle ones only hidden changes.

        answers: whether any of them answers after this step. If not, neither head nor sampling is run.
        splits: as paged_attention takes it.
        """
        hidden = self.rows.hidden[:num_rows]
        self._feed(hidden, hidden, splits)
        if answers:
            self.answer(0, num_rows)

    def think(self, k: int, splits: int | None = None) -> None:
        """k latent steps of row 0 alone, z_1 .. z_k into latents, and then its first token.  splits: as for step."""
        z = self.rows.hidden[:1]
        for i in range(k):
            self._feed(z, self.latents[i : i + 1], splits)
            z = self.latents[i : i + 1]
        self._choose(z, self.rows.tokens[:1])
        self.rows.hidden[:1].copy_(z)

    def _feed(self, z: torch.Tensor, hidden: torch.Tensor, splits: int | None) -> None:
        """Through all layers: z [B, d], or the tokens of rows that answer. What they give goes to hidden [B, d]."""
        weights = self.weights
        rows = Rows(*[tensor[: len(z)] for tensor in self.rows])._replace(hidden=z)
        x, turns, reach = begin_step(rows, weights.embed, self.stop_ids, weights.rope.frequencies)

        def attend(layer: int, qkv: torch.Tensor) -> torch.Tensor:
            append = Append(weights.layers[layer].qk_norm, weights.eps, turns)
            caches, pages = (self.k_cache[layer], self.v_cache[layer]), self.pages[: len(z)]
            return paged_attention(qkv, *caches, pages, reach, self.page_size, self._tickets, append, splits)

        for layer in range(len(weights.layers)):
            x = run_layer(weights, layer, x, attend)
        rms_norm(x, weights.norm, weights.eps, out=hidden)

    def _choose(self, hidden: torch.Tensor, tokens: torch.Tensor) -> None:
        head_argmax(hidden, self.weights.head, self._tickets, out=tokens)
