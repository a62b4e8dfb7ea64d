"""The two forward passes of a request: prefill of what is known of it, and one step of a running batch.

T new tokens (of all sequences), B sequences, L longest context, V visual tokens, d width, H query heads, G key/value
heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from vitalrt.engine.cache import PagedCache
from vitalrt.engine.cpu_decoder import CpuDecoder
from vitalrt.engine.device_prefill import MAX_LEFT, DevicePrefill, Inputs
from vitalrt.engine.graphs import StepGraphs
from vitalrt.engine.image_encoder import ImageEncoder
from vitalrt.engine.sequence import Image, Sequence
from vitalrt.model.qwen3_vl import Qwen3VL
from vitalrt.transfers import rows_of, sent
from vitalrt_kernels import decode_attention, kv_append


@dataclass(frozen=True)
class Chunk:
    """The next `count` inputs of a sequence, all of them known."""

    sequence: Sequence
    count: int

    @property
    def start(self) -> int:
        return self.sequence.num_tokens

    @property
    def stop(self) -> int:
        return self.sequence.num_tokens + self.count

    @property
    def slots(self) -> torch.Tensor:
        """[count] int64, where their keys and values go."""
        return self.sequence.slots[self.start : self.stop]

    @property
    def images(self) -> list[Image]:
        """Those of the prompt that have tokens among these inputs."""
        return [image for image in self.sequence.images if image.start < self.stop and image.stop > self.start]


def prefill(
    model: Qwen3VL,
    cache: PagedCache,
    chunks: Many[Chunk],
    encoder: ImageEncoder,
    cpu_decoder: CpuDecoder | None = None,
    device_prefill: DevicePrefill | None = None,
) -> torch.Tensor:
    """Feed each chunk to its sequence, packed without padding, and append its keys and values to the cache.

    cpu_decoder: takes the torch decoder's place where no chunk is long; device_prefill, for one that begins anew, and
    for few tokens of any.
    Returns [B, d]: the hidden state of each chunk's last token after the final norm. At the end of a prompt that is z_0
    (VITAL section 3.1).
    """
    device = cache.k.device
    inputs = _inputs(model, chunks, encoder, device)
    counts = [chunk.count for chunk in chunks]
    if cpu_decoder is not None and max(counts) <= cpu_decoder.max_tokens:
        done = torch.tensor([chunk.start for chunk in chunks])
        rows = _slot_rows([chunk.sequence for chunk in chunks], device)
        hidden = cpu_decoder(
            inputs.embeddings,
            rows,
            done,
            torch.tensor(counts),
            inputs.positions,
            inputs.image_rows,
            inputs.deepstack,
        )
    elif device_prefill is not None and len(chunks) == 1 and not chunks[0].start:
        slots = chunks[0].sequence.slots[: chunks[0].stop]
        hidden = device_prefill.begin(inputs, slots).clone()
    elif device_prefill is not None and sum(counts) <= MAX_LEFT:
        slots = torch.cat([chunk.slots for chunk in chunks])
        pages = _page_rows([chunk.sequence for chunk in chunks]).repeat_interleave(torch.tensor(counts), dim=0)
        reach = torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in chunks]).int() + 1
        by_token = device_prefill.go_on(inputs, slots, pages, reach)
        hidden = torch.stack([rows[-1] for rows in by_token.split(counts)])
    else:
        attend = PrefillAttention(cache, chunks)
        last = sent(torch.tensor(counts).cumsum(0) - 1, device)
        out = model.decoder(inputs.embeddings, inputs.positions, attend, inputs.image_rows, inputs.deepstack, rows=last)
        hidden = model.decoder.norm(out)
    for chunk in chunks:
        chunk.sequence.num_tokens += chunk.count
    return hidden


def _inputs(model: Qwen3VL, chunks: Many[Chunk], encoder: ImageEncoder, device: torch.device) -> Inputs:
    ids = torch.cat([chunk.sequence.token_range(chunk.start, chunk.stop) for chunk in chunks])
    positions = torch.cat([chunk.sequence.position_range(chunk.start, chunk.stop) for chunk in chunks], dim=1)
    x = model.decoder.embed(sent(ids, device))
    thought_rows: list[int] = []
    thoughts: list[torch.Tensor] = []
    image_rows: list[torch.Tensor] = []
    levels: list[tuple[torch.Tensor, ...]] = []  # the visual tokens, then deepstack's features of the same
    encoder.encode([image for chunk in chunks for image in chunk.images])
    offset = 0  # of a sequence's first input among the rows of x
    for chunk in chunks:
        offset -= chunk.start
        for image in chunk.images:
            assert image.features is not None
            first, last = max(image.start, chunk.start), min(image.stop, chunk.stop)
            image_rows.append(torch.arange(offset + first, offset + last))
            own = slice(first - image.start, last - image.start)
            levels.append(tuple(level[own] for level in (image.features.tokens, *image.features.deepstack)))
        length = chunk.sequence.prompt.num_tokens
        for index in range(max(chunk.start, length), min(chunk.stop, length + chunk.sequence.decoding.k)):
            thought_rows.append(offset + index)
            thoughts.append(chunk.sequence.thoughts[index - length])
        offset += chunk.stop
    if thoughts:
        x = x.index_copy(0, sent(torch.tensor(thought_rows), device), torch.stack(thoughts).to(x.dtype))
    if not image_rows:
        return Inputs(x, sent(positions, device))
    tokens, *deepstack = (torch.cat(level) for level in zip(*levels, strict=True))
    rows = sent(torch.cat(image_rows), device)
    return Inputs(x.index_copy(0, rows, tokens.to(x.dtype)), sent(positions, device), rows, deepstack)


class PrefillAttention:
    """Causal attention of each chunk to what its sequence holds; its keys and values go to the cache as well."""

    def __init__(self, cache: PagedCache, chunks: Many[Chunk]) -> None:
        self.cache, self.chunks = cache, chunks
        self.slots = torch.cat([chunk.slots for chunk in chunks])

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = self.cache.k[layer], self.cache.v[layer]
        kv_append(keys, values, k, v, self.slots)
        counts = [chunk.count for chunk in self.chunks]
        attended = []
        for chunk, own_q, own_k, own_v in zip(
            self.chunks, q.split(counts), k.split(counts), v.split(counts), strict=True
        ):
            if chunk.start:
                held = chunk.sequence.slots[: chunk.stop]
                own_k, own_v = keys[held], values[held]
            own_q, own_k, own_v = (tensor.transpose(0, 1)[None] for tensor in (own_q, own_k, own_v))
            causal = causal_lower_right(chunk.count, chunk.stop)  # a mask only where no fused kernel knows it
            attended.append(scaled_dot_product_attention(own_q, own_k, own_v, causal, enable_gqa=True))
        return torch.cat(attended, dim=2)[0].transpose(0, 1)


class RunningBatch:
    """Rows of the sequences that are running, in one order for all tensors. Rebuilt only when one joins or leaves.

    hidden: [B, d], the newest hidden state of each after the final norm: z_k while thinking, else what predicts the
    next answer token.
    """

    def __init__(
        self, sequences: list[Sequence], hidden: torch.Tensor, device_graphs: StepGraphs | None = None
    ) -> None:
        """device_graphs: where there are kernels; the rows' state is then there, and moves on there."""
        self.sequences = sequences
        self.hidden = hidden
        self.device_graphs = device_graphs
        if device_graphs is not None:
            self._load(device_graphs)
            return
        device = hidden.device
        self.lengths = torch.tensor([s.num_tokens for s in sequences], device=device)
        self.positions = torch.tensor([s.position for s in sequences], device=device)
        self.slots = _slot_rows(sequences, device)
        self._one_each = torch.ones_like(self.lengths)
        self._columns = torch.arange(self.slots.shape[1], device=device)
        self._single_run = len(sequences) == 1 and _is_run(sequences[0].pages)

    def refresh(self) -> RunningBatch:
        """The same after sequences were given more pages."""
        return RunningBatch(self.sequences, self.hidden, self.device_graphs)

    def join(self, sequences: list[Sequence], hidden: torch.Tensor) -> RunningBatch:
        return RunningBatch(self.sequences + sequences, torch.cat((self.hidden, hidden)), self.device_graphs)

    def keep(self, rows: list[int]) -> RunningBatch:
        return RunningBatch([self.sequences[row] for row in rows], rows_of(self.hidden, rows), self.device_graphs)

    def step_on_device(self, tokens: Many[int] | None = None, answers: bool = False) -> None:
        """As step, with device_graphs.  tokens: of each sequence the newest, of no meaning where it thinks; None where
        the device has taken them.  answers: whether it takes tokens after the step as well."""
        assert self.device_graphs is not None
        device_step, num_rows = self.device_graphs.device_step, len(self.sequences)
        if tokens is not None:
            device_step.tell(tokens)
        self.device_graphs.step(num_rows, answers)
        self.hidden = device_step.rows.hidden[:num_rows].clone()
        for sequence in self.sequences:
            sequence.num_tokens = min(sequence.num_tokens + 1, sequence.capacity)

    def _load(self, device_graphs: StepGraphs) -> None:
        if not self.sequences:
            return
        device_graphs.device_step.load(
            self.hidden,
            [sequence.num_tokens for sequence in self.sequences],
            [sequence.position for sequence in self.sequences],
            [sequence.num_latents_left for sequence in self.sequences],
            [sequence.capacity for sequence in self.sequences],
            _page_rows(self.sequences),
        )

    def step(
        self, model: Qwen3VL, cache: PagedCache, inputs: torch.Tensor, cpu_decoder: CpuDecoder | None = None
    ) -> None:
        """Feed one embedding per sequence, append its keys and values to the cache in place, and renew hidden.

        inputs: [B, d]: z_{k-1} for a latent step, embed(token) for an answer step. One pass serves both phases.
        cpu_decoder: takes the torch decoder's place.
        """
        if cpu_decoder is not None:
            self.hidden = cpu_decoder(inputs, self.slots, self.lengths, self._one_each, self.positions[None])
        else:
            self.hidden = self._step_in_torch(model, cache, inputs)
        self.lengths += 1
        self.positions += 1
        for sequence in self.sequences:
            sequence.num_tokens += 1

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


def _slot_rows(sequences: Many[Sequence], device: torch.device) -> torch.Tensor:
    """[B, L] int64: the slots of each sequence, zeros after the end of the shorter ones. A lone one's are a view."""
    if len(sequences) == 1:
        return sequences[0].slots[None]
    longest = max((len(sequence.slots) for sequence in sequences), default=0)
    rows = torch.zeros(len(sequences), longest, dtype=torch.int64, device=device)
    for row, sequence in zip(rows, sequences, strict=True):
        row[: len(sequence.slots)] = sequence.slots
    return rows


def _page_rows(sequences: Many[Sequence]) -> torch.Tensor:
    """[B, P] int32, on the CPU: the pages of each sequence, zeros after the end of the shorter ones."""
    rows = torch.zeros(len(sequences), max(len(sequence.pages) for sequence in sequences), dtype=torch.int32)
    for row, sequence in zip(rows, sequences, strict=True):
        row[: len(sequence.pages)] = torch.tensor(sequence.pages, dtype=torch.int32)
    return rows


def _is_run(pages: list[int]) -> bool:
    return pages == list(range(pages[0], pages[0] + len(pages)))
