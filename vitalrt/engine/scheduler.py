"""The engine: admits requests into a running batch and advances it step by step."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection

import torch

from vitalrt.config import EngineConfig
from vitalrt.engine.cache import PagedCache
from vitalrt.engine.cpu_decoder import CpuDecoder, why_not_cpu_decoder
from vitalrt.engine.request import Decoding
from vitalrt.engine.sampling import choose_tokens
from vitalrt.engine.sequence import Sequence
from vitalrt.engine.step import RunningBatch, prefill
from vitalrt.errors import InputError
from vitalrt.inputs.prompt import Prompt
from vitalrt.model.qwen3_vl import Qwen3VL
from vitalrt.model.rope import mrope_positions

PREFILL_TOKENS = 4096  # prompts packed into one prefill pass, unless a single one is longer


class Engine:
    """Owns the cache and the running batch. Sequences of any k, phase and length share each step.

    submit() and cancel() may be called from any thread; advance() does one step for everybody. A sequence reserves all
    the cache it can ever need when it is admitted, so that nothing can run out of room half way.
    """

    def __init__(self, model: Qwen3VL, config: EngineConfig, stop_ids: Collection[int]) -> None:
        self.model = model
        self.config = config
        self.stop_ids = frozenset(stop_ids)
        weight = model.decoder.embed.weight
        self.cache = PagedCache(model.config.decoder, config, weight.device, weight.dtype)
        runs_in_core = why_not_cpu_decoder(model.decoder) is None
        self.cpu_decoder = CpuDecoder(model.decoder, self.cache) if runs_in_core else None
        self._waiting: deque[Sequence] = deque()
        self._nobody = RunningBatch([], weight.new_empty(0, model.config.decoder.hidden_size))
        self._batch = self._nobody
        self._lock = threading.RLock()

    def submit(self, prompt: Prompt, decoding: Decoding) -> Sequence:
        """Queue a request.  Raises InputError or CapacityError before any work is done."""
        positions, next_position = mrope_positions(prompt.input_ids, prompt.grids(), self.model.config)
        patch_dim = self.model.config.vision.patch_dim
        if prompt.pixel_values is not None and prompt.pixel_values.shape[1] != patch_dim:
            raise InputError(f"pixel_values: expected [patches, {patch_dim}], got {list(prompt.pixel_values.shape)}")
        sequence = Sequence(prompt, positions, next_position, decoding)
        self.cache.require_room(sequence.capacity)
        with self._lock:
            self._waiting.append(sequence)
        return sequence

    @torch.inference_mode()
    def advance(self) -> None:
        """Admit what fits, then give every running sequence one latent step or one answer token.

        Whatever it raises, the sequences that were in the failing pass are cancelled and their pages are free.
        """
        with self._lock:
            self._admit()
            if not self._batch.sequences:
                return
            try:
                self._answer()
                self._retire()
                if self._batch.sequences:
                    self._step()
            except BaseException:
                # Half a step leaves tokens and cache at odds: nobody in the batch can go on.
                for sequence in self._batch.sequences:
                    sequence.finish("cancelled")
                self._retire()
                raise

    def cancel(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its pages at once. Does nothing if it has finished."""
        with self._lock:
            if sequence.is_finished:
                return
            sequence.finish("cancelled")
            if sequence in self._waiting:
                self._waiting.remove(sequence)
            else:
                self._retire()

    def _admit(self) -> None:
        admitted: list[Sequence] = []
        num_tokens = 0
        while self._waiting and len(self._batch.sequences) + len(admitted) < self.config.max_batch:
            sequence = self._waiting[0]
            if admitted and num_tokens + sequence.prompt.num_tokens > PREFILL_TOKENS:
                break
            pages = self.cache.take(sequence.capacity)
            if pages is None:
                break
            self._waiting.popleft()
            sequence.pages, sequence.slots = pages, self.cache.slots_of(pages)
            sequence.mark_prefilling()
            num_tokens += sequence.prompt.num_tokens
            admitted.append(sequence)
        if not admitted:
            return
        try:
            hidden = prefill(self.model, self.cache, admitted, self.cpu_decoder)
        except BaseException:
            for sequence in admitted:
                sequence.finish("cancelled")
                self.cache.give_back(sequence.pages)
            raise
        for sequence in admitted:
            sequence.mark_thinking()
        self._batch = self._batch.join(admitted, hidden)

    def _answer(self) -> None:
        """Choose the next token of every sequence that has done its thinking; the first one comes from z_K."""
        rows = [row for row, sequence in enumerate(self._batch.sequences) if not sequence.is_thinking]
        if not rows:
            return
        speakers = [self._batch.sequences[row] for row in rows]
        everyone = len(rows) == len(self._batch.sequences)
        logits = self.model.head(self._batch.hidden if everyone else self._batch.hidden[rows])
        tokens = choose_tokens(logits, [s.decoding for s in speakers], [s.generator for s in speakers])
        for sequence, token, row_logits in zip(speakers, tokens, logits, strict=True):
            sequence.num_completion_tokens += 1
            if sequence.decoding.return_logits:
                sequence.logits.append(row_logits.float().cpu())
            if token in self.stop_ids:
                sequence.finish("stop")
                continue
            sequence.token_ids.append(token)
            if sequence.num_completion_tokens == sequence.decoding.max_new_tokens:
                sequence.finish("length")

    def _retire(self) -> None:
        """Drop finished sequences from the batch and free their pages."""
        finished = [sequence for sequence in self._batch.sequences if sequence.is_finished]
        for sequence in finished:
            self.cache.give_back(sequence.pages)
            sequence.pages, sequence.slots = [], None
        if finished:
            rows = [row for row, sequence in enumerate(self._batch.sequences) if not sequence.is_finished]
            self._batch = self._batch.keep(rows) if rows else self._nobody

    def _step(self) -> None:
        batch = self._batch
        thinking = [sequence.is_thinking for sequence in batch.sequences]
        inputs = batch.hidden
        if not all(thinking):
            tokens = [0 if latent else s.token_ids[-1] for s, latent in zip(batch.sequences, thinking, strict=True)]
            embedded = self.model.decoder.embed(torch.tensor(tokens, device=inputs.device))
            if any(thinking):
                inputs = torch.where(torch.tensor(thinking, device=inputs.device)[:, None], inputs, embedded)
            else:
                inputs = embedded
        batch.step(self.model, self.cache, inputs, self.cpu_decoder)
        for row, sequence in enumerate(batch.sequences):
            if thinking[row]:
                sequence.latents.append(batch.hidden[row])
                if not sequence.is_thinking:
                    sequence.mark_answering()
