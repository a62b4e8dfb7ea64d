"""An engine over exported graphs: what vitalrt.engine.scheduler.Engine is over torch.

B rows of the batch, T longest prompt, S cache capacity, K latent steps, d width.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable

import numpy as np
import torch

from vitalrt.checkpoint import Checkpoint
from vitalrt.config import EngineConfig
from vitalrt.engine.cache import DEFAULT_BYTES, DEFAULT_MAX_TOKENS
from vitalrt.engine.request import Decoding, Terms
from vitalrt.engine.sampling import choose_tokens
from vitalrt.engine.sequence import Sequence
from vitalrt.engine.waiting import WaitingLine
from vitalrt.errors import CapacityError, CheckpointError
from vitalrt.export.sessions import Cache, Sessions
from vitalrt.inputs.prompt import Picture, Prompt
from vitalrt.model.rope import mrope_positions

DTYPE_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def open_engine(
    checkpoint: Checkpoint,
    adapter: object,
    device: str | torch.device,
    dtype: str | torch.dtype,
    config: EngineConfig,
    stop_ids: Collection[int],
) -> OnnxEngine:
    """The engine of an exported directory, for what vitalrt.load was asked.  Raises VitalError."""
    if adapter is not None:
        raise CheckpointError("adapter: an ONNX export cannot take one; merge it with `vitalrt export onnx --adapter`")
    sessions = Sessions(checkpoint.directory, str(device), torch.get_num_threads())
    if str(dtype).removeprefix("torch.") not in ("auto", DTYPE_NAMES[sessions.manifest["dtype"]]):
        raise CheckpointError(f"dtype: the ONNX export is {sessions.manifest['dtype']}, got {str(dtype)!r}")
    return OnnxEngine(sessions, config, stop_ids)


class OnnxEngine:
    """Runs waiting requests batch by batch: prompts padded on the right, each row with its own number of latent steps.

    submit() and cancel() may be called from any thread; advance() takes everybody in the batch one answer token
    further. A batch ends when all its rows have; those that wait come next.
    fused: think in one run of latent_loop.onnx, else step by step.
    """

    def __init__(
        self, sessions: Sessions, config: EngineConfig, stop_ids: Collection[int], *, fused: bool = True
    ) -> None:
        self.sessions = sessions
        self.config = config
        self.stop_ids = frozenset(stop_ids)
        self.fused = fused
        values = sessions.config.decoder.kv_values_per_token
        self.bytes_per_token = values * (4 if sessions.manifest["dtype"] == "fp32" else 2)
        most = min(DEFAULT_BYTES // self.bytes_per_token, DEFAULT_MAX_TOKENS)
        self.cache_tokens = config.cache_tokens or most
        self._waiting = WaitingLine(config.max_waiting)
        self._rows: list[Sequence] = []
        self._cache = Cache({})
        self._logits = np.empty((0, 0), np.float32)
        self._lock = threading.RLock()

    def make_patches(self, pictures: Iterable[Picture], cache_salt: str | None = None) -> None:
        """As Engine.make_patches; here no features are kept."""
        for picture in pictures:
            picture.patches()

    def submit(
        self, prompt: Prompt, decoding: Decoding, terms: Terms | None = None, latents: torch.Tensor | None = None
    ) -> Sequence:
        """Queue a request.  Raises InputError or CapacityError before any work is done.

        latents: None; the loop's graph takes none.
        """
        config = self.sessions.config
        positions, next_position = mrope_positions(prompt.input_ids, prompt.grids(), config)
        prompt.require_patches_of(config.vision.patch_dim)
        sequence = Sequence(prompt, positions, next_position, decoding, terms)
        if sequence.capacity >= self.cache_tokens:
            raise CapacityError(
                f"cache_tokens: the request needs {sequence.capacity + 1} tokens of KV cache, the engine has "
                f"{self.cache_tokens}; shorten it or load with a larger cache_tokens"
            )
        with self._lock:
            self._waiting.join(sequence)
        return sequence

    def advance(self) -> None:
        """Start the next batch where none is running, then give every running sequence one answer token."""
        with self._lock:
            self._expire()
            try:
                if not self._rows:
                    self._rows = self._admit()
                    if self._rows:
                        self._think(self._prefill())
                self._answer()
                if all(sequence.is_finished for sequence in self._rows):
                    self._rows, self._cache = [], Cache({})
                else:
                    self._decode()
            except BaseException:
                for sequence in self._rows:
                    if not sequence.is_finished:
                        sequence.finish("cancelled")
                self._rows, self._cache = [], Cache({})
                raise

    def cancel(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is. Does nothing if it has finished."""
        with self._lock:
            if sequence.is_finished:
                return
            self._end(sequence, "cancelled")

    def _end(self, sequence: Sequence, reason: str) -> None:
        sequence.finish(reason)
        if sequence in self._waiting:
            self._waiting.leave(sequence)

    def _expire(self) -> None:
        for sequence in (*self._waiting, *self._rows):
            if sequence.is_overdue and not sequence.is_finished:
                self._end(sequence, "timeout")

    def _admit(self) -> list[Sequence]:
        """As many waiting sequences as fit, all with room for the longest of them and one slot to spare."""
        rows: list[Sequence] = []
        longest = 0
        for sequence in self._waiting:
            longest = max(longest, sequence.capacity + 1)
            if len(rows) == self.config.max_batch or (rows and longest * (len(rows) + 1) > self.cache_tokens):
                break
            self._waiting.leave(sequence)
            rows.append(sequence)
        return rows

    def _prefill(self) -> np.ndarray:
        """Returns z_0 [B, d]."""
        prompts = [sequence.prompt for sequence in self._rows]
        longest = max(prompt.num_tokens for prompt in prompts)
        ids = np.zeros((len(prompts), longest), np.int64)
        positions = np.zeros((3, len(prompts), longest), np.int64)
        for row, sequence in enumerate(self._rows):
            sequence.mark("prefill")
            sequence.num_tokens = sequence.prompt.num_tokens
            ids[row, : sequence.num_tokens] = sequence.prompt.input_ids.numpy()
            positions[:, row, : sequence.num_tokens] = sequence.positions.numpy()
        features, deepstack = self._see(prompts)
        capacity = max(sequence.capacity for sequence in self._rows) + 1
        hidden, self._cache = self.sessions.prefill(ids, positions, self._lengths(), features, deepstack, capacity)
        for sequence in self._rows:
            sequence.mark("latent")
        return hidden

    def _see(self, prompts: list[Prompt]) -> tuple[np.ndarray, np.ndarray]:
        """One image at a time: attention is within a frame, so nothing is shared between images but the weights."""
        config = self.sessions.config
        width, num_levels = config.decoder.hidden_size, len(config.vision.deepstack_visual_indexes)
        features, deepstack = [np.empty((0, width), np.float32)], [np.empty((num_levels, 0, width), np.float32)]
        for prompt in prompts:
            for picture in prompt.pictures:
                t, h, w = picture.grid
                seen, levels = self.sessions.see(picture.patches().float().reshape(t, h * w, -1).numpy(), (h, w))
                features.append(seen)
                deepstack.append(levels)
        return np.concatenate(features), np.concatenate(deepstack, axis=1)

    def _think(self, hidden: np.ndarray) -> None:
        """All latent steps of all rows, and the logits that the first answer tokens come from."""
        first = hidden
        steps = np.array([sequence.decoding.k for sequence in self._rows], np.int64)
        if self.fused:
            latents, self._logits = self.sessions.latent_loop(
                hidden, steps, self._positions(), self._lengths(), self._cache
            )
        else:
            latents = np.empty((steps.max(), *hidden.shape), np.float32)
            for step in range(steps.max()):
                done = np.minimum(steps, step)
                at = self._positions() + done, self._lengths() + done
                latents[step] = self.sessions.latent_step(hidden, *at, self._cache)
                hidden = np.where((step < steps)[:, None], latents[step], hidden)
            self._logits = self.sessions.head(hidden)
        for row, sequence in enumerate(self._rows):
            sequence.thoughts = list(torch.from_numpy(np.stack((first[row], *latents[: steps[row], row]))))
            sequence.num_tokens += int(steps[row])
            sequence.mark("decode")

    def _answer(self) -> None:
        running = [row for row, sequence in enumerate(self._rows) if not sequence.is_finished]
        if not running:
            return
        speakers = [self._rows[row] for row in running]
        logits = torch.from_numpy(self._logits[running])
        tokens = choose_tokens(logits, [s.decoding for s in speakers], [s.generator for s in speakers])
        for sequence, token, row_logits in zip(speakers, tokens, logits, strict=True):
            sequence.num_completion_tokens += 1
            if sequence.decoding.return_logits:
                sequence.logits.append(row_logits)
            if token in self.stop_ids:
                sequence.finish("stop")
                continue
            sequence.token_ids.append(token)
            if sequence.num_completion_tokens == sequence.decoding.max_new_tokens:
                sequence.finish("length")

    def _decode(self) -> None:
        """Finished rows stay where they are: they write their spare slot over and over, and nobody reads it."""
        tokens = [0 if s.is_finished else s.token_ids[-1] for s in self._rows]
        self._logits = self.sessions.decode_step(
            np.array(tokens, np.int64), self._positions(), self._lengths(), self._cache
        )
        for sequence in self._rows:
            if not sequence.is_finished:
                sequence.num_tokens += 1

    def _lengths(self) -> np.ndarray:
        return np.array([sequence.num_tokens for sequence in self._rows], np.int64)

    def _positions(self) -> np.ndarray:
        return np.array([sequence.position for sequence in self._rows], np.int64)
