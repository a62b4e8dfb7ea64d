"""The engine: admits requests into a running batch and advances it step by step."""

from __future__ import annotations

import functools
import threading
from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from vitalrt.config import EngineConfig
from vitalrt.engine.cache import PagedCache
from vitalrt.engine.cpu_decoder import CpuDecoder, why_not_cpu_decoder
from vitalrt.engine.device_prefill import DevicePrefill
from vitalrt.engine.device_step import DeviceStep, StepWeights, why_not_device_step
from vitalrt.engine.graphs import StepGraphs
from vitalrt.engine.host_memory import keep_freed_memory
from vitalrt.engine.image_encoder import ImageEncoder, images_of
from vitalrt.engine.look_ahead import LookAhead
from vitalrt.engine.prefix_cache import PrefixKey, namespace_digest
from vitalrt.engine.request import Decoding, Terms
from vitalrt.engine.sampling import choose_tokens
from vitalrt.engine.sequence import Rank, Sequence
from vitalrt.engine.step import Chunk, RunningBatch, prefill
from vitalrt.engine.waiting import WaitingLine
from vitalrt.inputs.prompt import Picture, Prompt
from vitalrt.model.qwen3_vl import Qwen3VL
from vitalrt.model.rope import mrope_positions
from vitalrt.transfers import rows_of


@dataclass(frozen=True)
class EngineStatistics:
    """Now: num_waiting, num_running (prefilling ones included), and pages, of which sequences hold pages_used and
    others are kept for whoever begins alike (pages_kept).

    Since the engine was built: num_preemptions; prompt_tokens of all requests that were admitted, and cached_tokens of
    these, which others had left; images_encoded by the vision tower, and images_found in the cache of features.
    """

    num_waiting: int
    num_running: int
    pages: int
    pages_used: int
    pages_kept: int
    num_preemptions: int
    prompt_tokens: int
    cached_tokens: int
    images_encoded: int
    images_found: int


class Engine:
    """Owns the cache and the running batch. Sequences of any k, phase and length share each step.

    submit() and cancel() may be called from any thread; advance() does one step for everybody. A sequence takes pages
    as it grows. Where there are none left, the one that came last of those with least priority gives up its own and
    waits again; its thoughts and tokens stay, and it is fed them anew when there is room.
    """

    def __init__(self, model: Qwen3VL, config: EngineConfig, stop_ids: Collection[int]) -> None:
        self.model = model
        self.config = config
        self.stop_ids = frozenset(stop_ids)
        weight = model.decoder.embed.weight
        if weight.device.type == "cpu":
            keep_freed_memory()
        self.cache = PagedCache(model.config.decoder, config, weight.device, weight.dtype)
        self.encoder = ImageEncoder(model.vision, config.vision_cache_bytes if config.prefix_cache else 0)
        runs_in_core = why_not_cpu_decoder(model.decoder) is None
        self.cpu_decoder = CpuDecoder(model.decoder, self.cache) if runs_in_core else None
        self._waiting = WaitingLine(config.max_waiting)
        self._prefilling: list[Sequence] = []
        self.device_graphs: StepGraphs | None = None
        self.device_prefill: DevicePrefill | None = None
        self._look_ahead: LookAhead | None = None
        if why_not_device_step(model.decoder) is None:
            caches, step_weights = (self.cache.k, self.cache.v), StepWeights(model.decoder)
            num_deepstack = len(model.config.vision.deepstack_visual_indexes)
            device_step = DeviceStep(step_weights, *caches, self.cache.page_size, config.max_batch)
            self.device_graphs = StepGraphs(device_step)
            self._look_ahead = LookAhead(self.device_graphs)
            self.device_prefill = DevicePrefill(step_weights, *caches, self.cache.page_size, num_deepstack)
        nobody = weight.new_empty(0, model.config.decoder.hidden_size)
        self._nobody = RunningBatch([], nobody, self.device_graphs)
        self._batch = self._nobody
        self._num_preemptions = self._prompt_tokens = self._cached_tokens = 0
        self._lock = threading.RLock()

    def make_patches(self, pictures: Iterable[Picture], cache_salt: str | None = None) -> None:
        """Of pictures that are about to be asked about, in the caller's thread; not where their features are kept, and
        not for a device other than the CPU, which makes them when the tower looks."""
        for picture in pictures:
            if self.encoder.device.type == "cpu" and not self.encoder.knows(_namespace(cache_salt) + picture.digest):
                picture.patches()

    def submit(
        self, prompt: Prompt, decoding: Decoding, terms: Terms | None = None, latents: torch.Tensor | None = None
    ) -> Sequence:
        """Queue a request.  Raises InputError or CapacityError before any work is done.

        latents: z_1, z_2, .. [at most K, d], in dtype and on the device of the weights, to be taken for its own. Such a
        request shares no pages: what it comes to think is not what its prompt leads to.
        """
        terms = terms or Terms()
        config = self.model.config
        positions, next_position = mrope_positions(prompt.input_ids, prompt.grids(), config)
        prompt.require_patches_of(config.vision.patch_dim)
        namespace = _namespace(terms.cache_salt)
        images = images_of(prompt, namespace, config.image_token_id)
        key = None
        given = () if latents is None else tuple(latents)
        if self.config.prefix_cache and not given:
            key = PrefixKey.of_prompt(namespace, prompt, config).then_latents(decoding.k)
        sequence = Sequence(prompt, positions, next_position, decoding, terms, key, images, given)
        self.cache.require_room(sequence.capacity)
        with self._lock:
            self._waiting.join(sequence)
        return sequence

    @torch.inference_mode()
    def advance(self) -> None:
        """Admit what fits, then give every running sequence one latent step or one answer token.

        Whatever it raises, the sequences that were in the failing pass are cancelled and their pages are free.
        """
        with self._lock, _current(self.cache.k.device):
            self._expire()
            self._admit_and_prefill()
            if not self._batch.sequences:
                return
            try:
                if self._look_ahead is not None and self._look_ahead.suits(self._batch.sequences):
                    self._answer_later(self._look_ahead)
                else:
                    self._answer()
                    self._retire()
                    self._make_room()
                    if self._batch.sequences:
                        self._step()
            except BaseException:
                # Half a step leaves tokens and cache at odds: nobody in the batch can go on.
                for sequence in self._batch.sequences:
                    sequence.finish("cancelled")
                self.cache.give_back(self._batch.sequences)
                self._batch = self._nobody
                raise

    def cancel(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its pages at once. Does nothing if it has finished."""
        with self._lock:
            if not sequence.is_finished:
                self._end(sequence, "cancelled")

    def statistics(self) -> EngineStatistics:
        """Of this moment, without waiting for a step that is under way."""
        kept = self.cache.prefixes.statistics().pages_idle
        return EngineStatistics(
            num_waiting=len(self._waiting),
            num_running=len(self._prefilling) + len(self._batch.sequences),
            pages=self.cache.pool.num_blocks,
            pages_used=self.cache.pool.num_blocks - self.cache.pool.num_free - kept,
            pages_kept=kept,
            num_preemptions=self._num_preemptions,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            images_encoded=self.encoder.num_encoded,
            images_found=self.encoder.cache.statistics().hits,
        )

    def _expire(self) -> None:
        for sequence in (*self._waiting, *self._prefilling, *self._batch.sequences):
            if sequence.is_overdue:
                self._end(sequence, "timeout")

    def _end(self, sequence: Sequence, reason: str) -> None:
        """Finish a sequence before its time, wherever it is."""
        sequence.finish(reason)
        if sequence in self._waiting:
            self._waiting.leave(sequence)
        elif sequence in self._prefilling:
            self._prefilling.remove(sequence)
            self.cache.give_back([sequence])
        else:
            self._retire()

    def _admit_and_prefill(self) -> None:
        """Up to prefill_tokens of prompts, so that those who are running do not wait longer than that."""
        budget = self.config.prefill_tokens
        while budget > 0:
            self._admit()
            chunks: list[Chunk] = []
            for sequence in self._prefilling:
                if budget > 0:
                    chunks.append(Chunk(sequence, min(sequence.num_known - sequence.num_tokens, budget)))
                    budget -= chunks[-1].count
            if not chunks:
                return
            self._prefill(chunks)

    def _admit(self) -> None:
        """Let in who is next, while there are places in the batch and pages."""
        for sequence in self._waiting:
            if not self._make_place(sequence):
                return
            # What another one is computing this moment will soon be in the cache. Those behind may go first.
            if any(self._computes_for(other, sequence) for other in self._prefilling):
                continue
            if not self._give_pages(sequence):
                return
            self._waiting.leave(sequence)
            self._prefilling.append(sequence)
            sequence.mark("prefill")

    def _make_place(self, sequence: Sequence) -> bool:
        running = [*self._prefilling, *self._batch.sequences]
        return len(running) < self.config.max_batch or self._preempt_for(sequence, running)

    def _computes_for(self, other: Sequence, sequence: Sequence) -> bool:
        """Whether the other's prefill has yet to fill a page that both begin with."""
        if other.key is None or sequence.key is None:
            return False
        page_size = self.cache.page_size
        num_shared = min(other.key.num_shared(sequence.key), other.num_known, sequence.num_known - 1)
        return num_shared // page_size > other.num_tokens // page_size

    def _give_pages(self, sequence: Sequence) -> bool:
        """Pages for what is known of a sequence and one step more: those that are in the cache, and new ones."""
        self.cache.find(sequence)
        num_needed = self.cache.num_pages_for(min(sequence.num_foreseen + 1, sequence.capacity)) - len(sequence.pages)
        # One page for each that runs: soon enough they all grow, and would take these back.
        while num_needed + len(self._batch.sequences) > self.cache.num_available_pages:
            if not self._preempt_for(sequence, [*self._prefilling, *self._batch.sequences]):
                self.cache.give_back([sequence])
                return False
        self.cache.take(sequence, num_needed)
        if not sequence.num_preemptions:
            sequence.cached_tokens = min(sequence.num_tokens, sequence.prompt.num_tokens)
            self._prompt_tokens += sequence.prompt.num_tokens
            self._cached_tokens += sequence.cached_tokens
        return True

    def _prefill(self, chunks: list[Chunk]) -> None:
        sequences = [chunk.sequence for chunk in chunks]
        try:
            hidden = prefill(self.model, self.cache, chunks, self.encoder, self.cpu_decoder, self.device_prefill)
        except BaseException:
            for sequence in sequences:
                self._end(sequence, "cancelled")
            raise
        done = []
        for row, sequence in enumerate(sequences):
            if sequence.num_tokens < sequence.num_known:
                continue
            hidden[row] = sequence.take_in(hidden[row].clone())
            if sequence.is_behind:
                continue
            done.append(row)
            self._prefilling.remove(sequence)
            sequence.mark("latent" if sequence.is_thinking else "decode")
            for image in sequence.images:
                image.features = None
        self.cache.keep(sequences, [sequence.num_tokens for sequence in sequences])
        if done:
            self._batch = self._batch.join([sequences[row] for row in done], rows_of(hidden, done))

    def _answer(self) -> None:
        """Choose the next token of every sequence that has done its thinking; the first one comes from z_K."""
        rows = [row for row, sequence in enumerate(self._batch.sequences) if not sequence.is_thinking]
        if not rows:
            return
        speakers = [self._batch.sequences[row] for row in rows]
        everyone = len(rows) == len(self._batch.sequences)
        logits = self.model.head(self._batch.hidden if everyone else rows_of(self._batch.hidden, rows))
        tokens = choose_tokens(logits, [s.decoding for s in speakers], [s.generator for s in speakers])
        for sequence, token, row_logits in zip(speakers, tokens, logits, strict=True):
            if sequence.decoding.return_logits:
                sequence.logits.append(row_logits.float().cpu())
            sequence.say(token, self.stop_ids)

    def _answer_later(self, look_ahead: LookAhead) -> None:
        """Queue a step for everybody, and only then look at the tokens that it is fed."""
        sequences = self._batch.sequences
        look_ahead.begin(self._batch)
        self._make_room()
        if self._batch.sequences is not sequences:
            return  # somebody had to give up their pages: begin again without them
        speakers = [(row, sequence) for row, sequence in enumerate(sequences) if not sequence.is_thinking]
        if any(sequence.num_tokens < sequence.capacity for sequence in sequences):
            look_ahead.step(self._batch)
            self._take_in()
        tokens = look_ahead.take()
        for row, sequence in speakers:
            sequence.say(tokens[row], self.stop_ids)
        self._retire()

    def _retire(self) -> None:
        """Drop finished sequences from the batch and give back their pages; thoughts stay in the cache, answers not."""
        finished = [sequence for sequence in self._batch.sequences if sequence.is_finished]
        if not finished:
            return
        thought = [sequence.prompt.num_tokens + sequence.decoding.k for sequence in finished]
        self.cache.keep(finished, [min(s.num_tokens, count) for s, count in zip(finished, thought, strict=True)])
        self.cache.give_back(finished)
        rows = [row for row, sequence in enumerate(self._batch.sequences) if not sequence.is_finished]
        self._batch = self._batch.keep(rows) if rows else self._nobody

    def _make_room(self) -> None:
        """A page more for who has filled all of its own, first come first served."""
        growing = [s for s in self._batch.sequences if s.num_tokens == len(s.slots) and s.num_tokens < s.capacity]
        for sequence in sorted(growing, key=_rank_of):
            while sequence.pages and not self.cache.take(sequence, 1):
                self._preempt(max([*self._prefilling, *self._batch.sequences], key=_rank_of))
        if growing:
            self._batch = self._batch.refresh()

    def _preempt_for(self, sequence: Sequence, running: Iterable[Sequence]) -> bool:
        """Make room for one that waits, if anybody who runs has less priority. Who came later does not count."""
        worst = max(running, key=_rank_of, default=None)
        if worst is None or worst.rank.priority <= sequence.rank.priority:
            return False
        self._preempt(worst)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the line, with all its thoughts and tokens; what it was fed may stay in the cache for a while."""
        self._num_preemptions += 1
        sequence.num_preemptions += 1
        self.cache.keep([sequence], [sequence.num_tokens])
        self.cache.give_back([sequence])
        if sequence in self._prefilling:
            self._prefilling.remove(sequence)
        else:
            rows = [row for row, other in enumerate(self._batch.sequences) if other is not sequence]
            self._batch = self._batch.keep(rows) if rows else self._nobody
        self._waiting.rejoin(sequence)

    def _step(self) -> None:
        batch = self._batch
        thinking = [sequence.is_thinking for sequence in batch.sequences]
        tokens = [0 if latent else s.token_ids[-1] for s, latent in zip(batch.sequences, thinking, strict=True)]
        if self.device_graphs is not None:
            batch.step_on_device(tokens)
        else:
            inputs = batch.hidden
            if not all(thinking):
                embedded = self.model.decoder.embed(torch.tensor(tokens, device=inputs.device))
                if any(thinking):
                    inputs = torch.where(torch.tensor(thinking, device=inputs.device)[:, None], inputs, embedded)
                else:
                    inputs = embedded
            batch.step(self.model, self.cache, inputs, self.cpu_decoder)
        self._take_in()

    def _take_in(self) -> None:
        """The thoughts of the step just done."""
        for row, sequence in enumerate(self._batch.sequences):
            if sequence.is_thinking:
                sequence.take_in(self._batch.hidden[row])
                if not sequence.is_thinking:
                    sequence.mark("decode")


def _rank_of(sequence: Sequence) -> Rank:
    return sequence.rank


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Streams, graphs and kernels are of the current device, which need not be the model's."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@functools.lru_cache(maxsize=1024)
def _namespace(cache_salt: str | None) -> bytes:
    """An engine has one model, so the salt alone tells namespaces apart."""
    return namespace_digest("", None, cache_salt)
