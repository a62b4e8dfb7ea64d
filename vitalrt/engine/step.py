"""The two forward passes of a request: prefill of whole prompts, and one step of a running batch.

T packed tokens, B sequences, L longest context, d width, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch
from torch.nn.functional import scaled_dot_product_attention

from vitalrt.engine.cache import PagedCache
from vitalrt.engine.cpu_decoder import MAX_BATCH, CpuDecoder
from vitalrt.engine.sequence import Sequence
from vitalrt.model.qwen3_vl import Qwen3VL
from vitalrt_kernels import decode_attention, kv_append


def prefill(
    model: Qwen3VL, cache: PagedCache, sequences: Many[Sequence], cpu_decoder: CpuDecoder | None = None
) -> torch.Tensor:
    """Run whole prompts, packed without padding, and fill their part of the cache.

    cpu_decoder: takes the torch decoder's place while the prompts are short.
    Returns z_0 of each: [B, d], the last token's hidden state after the final norm (VITAL section 3.1).
    """
    device = cache.k.device
    lengths = [sequence.prompt.num_tokens for sequence in sequences]
    ids = torch.cat([sequence.prompt.input_ids for sequence in sequences])
    positions = torch.cat([sequence.positions for sequence in sequences], dim=1).to(device)
    x = model.decoder.embed(ids.to(device))
    image_rows, deepstack = None, []
    pixels = [s.prompt.pixel_values for s in sequences if s.prompt.pixel_values is not None]
    if pixels:
        grids = [grid for sequence in sequences for grid in sequence.prompt.grids()]
        tokens, deepstack = model.vision(torch.cat(pixels).to(device), grids)
        image_rows = (ids == model.config.image_token_id).nonzero().flatten().to(device)
        x = x.index_copy(0, image_rows, tokens.to(x.dtype))
    if cpu_decoder is not None and len(x) <= cpu_decoder.max_prompt_tokens:
        counts = torch.tensor(lengths)
        done = torch.zeros_like(counts)
        hidden = cpu_decoder(x, _slot_rows(sequences, device), done, counts, positions, image_rows, deepstack)
    else:
        slots = torch.cat([_slots(sequence)[:length] for sequence, length in zip(sequences, lengths, strict=True)])
        attend = PrefillAttention(cache, slots, lengths)
        last = torch.tensor(lengths, device=device).cumsum(0) - 1
        hidden = model.decoder.norm(model.decoder(x, positions, attend, image_rows, deepstack, rows=last))
    for sequence, length in zip(sequences, lengths, strict=True):
        sequence.num_tokens = length
    return hidden


class PrefillAttention:
    """Causal attention within each packed prompt; its keys and values go to the cache as well."""

    def __init__(self, cache: PagedCache, slots: torch.Tensor, lengths: list[int]) -> None:
        self.cache, self.slots, self.lengths = cache, slots, lengths

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        kv_append(self.cache.k[layer], self.cache.v[layer], k, v, self.slots)
        heads_first = [tensor.transpose(0, 1)[None].split(self.lengths, dim=2) for tensor in (q, k, v)]
        pieces = [
            scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            for q, k, v in zip(*heads_first, strict=True)
        ]
        return torch.cat(pieces, dim=2)[0].transpose(0, 1)


class RunningBatch:
    """Rows of the sequences that are running, in one order for all tensors. Rebuilt only when one joins or leaves.

    hidden: [B, d], the newest hidden state of each after the final norm: z_k while thinking, else what predicts the
    next answer token.
    """

    def __init__(self, sequences: list[Sequence], hidden: torch.Tensor) -> None:
        self.sequences = sequences
        self.hidden = hidden
        device = hidden.device
        self.lengths = torch.tensor([s.num_tokens for s in sequences], device=device)
        self.positions = torch.tensor([s.position for s in sequences], device=device)
        self.slots = _slot_rows(sequences, device)
        self._one_each = torch.ones_like(self.lengths)
        self._columns = torch.arange(self.slots.shape[1], device=device)
        self._single_run = len(sequences) == 1 and _is_run(sequences[0].pages)

    def join(self, sequences: list[Sequence], hidden: torch.Tensor) -> RunningBatch:
        return RunningBatch(self.sequences + sequences, torch.cat((self.hidden, hidden)))

    def keep(self, rows: list[int]) -> RunningBatch:
        return RunningBatch([self.sequences[row] for row in rows], self.hidden[rows])

    def step(
        self, model: Qwen3VL, cache: PagedCache, inputs: torch.Tensor, cpu_decoder: CpuDecoder | None = None
    ) -> None:
        """Feed one embedding per sequence, append its keys and values to the cache in place, and renew hidden.

        inputs: [B, d]: z_{k-1} for a latent step, embed(token) for an answer step. One pass serves both phases.
        cpu_decoder: takes the torch decoder's place while the batch is small.
        """
        if cpu_decoder is not None and len(self.sequences) <= MAX_BATCH:
            self.hidden = cpu_decoder(inputs, self.slots, self.lengths, self._one_each, self.positions[None])
        else:
            self.hidden = self._step_in_torch(model, cache, inputs)
        self.lengths += 1
        self.positions += 1
        for sequence in self.sequences:
            sequence.num_tokens += 1
            sequence.position += 1

    def _step_in_torch(self, model: Qwen3VL, cache: PagedCache, inputs: torch.Tensor) -> torch.Tensor:
        new_slots = self.slots.gather(1, self.lengths[:, None]).flatten()
        context: torch.Tensor | slice
        mask = None
        if self._single_run:
            first = self.sequences[0].pages[0] * cache.page_size
            context = slice(first, first + self.sequences[0].num_tokens + 1)
        else:
            longest = 1 + max(sequence.num_tokens for sequence in self.sequences)
            is_own = self._columns[:longest] <= self.lengths[:, None]
            # Padding points at the sequence's own first slot: others may hold NaN, and 0 * NaN is NaN.
            context = torch.where(is_own, self.slots[:, :longest], self.slots[:, :1])
            mask = is_own[:, None, None]

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            kv_append(cache.k[layer], cache.v[layer], k, v, new_slots)
            return decode_attention(q, cache.k[layer], cache.v[layer], context, mask)

        return model.decoder.norm(model.decoder(inputs, self.positions[None], attend))


def _slots(sequence: Sequence) -> torch.Tensor:
    if sequence.slots is None:
        raise RuntimeError("sequence holds no cache slots")
    return sequence.slots


def _slot_rows(sequences: Many[Sequence], device: torch.device) -> torch.Tensor:
    """[B, L] int64: the slots of each sequence, zeros after the end of the shorter ones. A lone one's are a view."""
    if len(sequences) == 1:
        return _slots(sequences[0])[None]
    longest = max((len(_slots(sequence)) for sequence in sequences), default=0)
    rows = torch.zeros(len(sequences), longest, dtype=torch.int64, device=device)
    for row, sequence in zip(rows, sequences, strict=True):
        row[: len(_slots(sequence))] = _slots(sequence)
    return rows


def _is_run(pages: list[int]) -> bool:
    return pages == list(range(pages[0], pages[0] + len(pages)))
