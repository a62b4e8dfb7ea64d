"""What users call: load a model, ask it about images."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vitalrt.checkpoint import Checkpoint, Progress, choose_device, choose_dtype, load_weights
from vitalrt.config import EngineConfig, read_json
from vitalrt.engine.int8 import Int8Error, quantise
from vitalrt.engine.request import Answer, Decoding, Request, Terms, Usage
from vitalrt.engine.scheduler import Engine
from vitalrt.engine.sequence import Sequence as Running
from vitalrt.errors import VitalError
from vitalrt.explain.explainer import Explainer
from vitalrt.explain.explanation import Explanation
from vitalrt.export.runtime import OnnxEngine, open_engine
from vitalrt.export.sessions import MANIFEST
from vitalrt.inputs.image import ReadOptions, read_images
from vitalrt.inputs.probes import probe_prompts
from vitalrt.inputs.processor import Processor
from vitalrt.inputs.prompt import Picture, Prompt
from vitalrt.model.qwen3_vl import Qwen3VL

BUNDLED = Path(__file__).parent / "assets" / "phantom"
WORTH_A_THREAD_S = 0.002  # what reading a picture takes; below, threads wait for each other more than they do
REPLACEMENT = "\ufffd"  # how a tokenizer shows the bytes of an unfinished UTF-8 character


class Model:
    """A loaded checkpoint with its engine. Safe to call from several threads; they share one running batch."""

    def __init__(
        self, checkpoint: Checkpoint, engine: Engine | OnnxEngine, int8_error: Int8Error | None = None
    ) -> None:
        """int8_error: what 8 bits do to latents, where the decoder's weights are in 8 bits."""
        self.checkpoint = checkpoint
        self.engine = engine
        self.int8_error = int8_error
        self._building = threading.Lock()
        self._built_explainer: Explainer | None = None

    @property
    def weights(self) -> Qwen3VL:
        """Raises VitalError for an ONNX export, whose weights are ONNX Runtime's."""
        if isinstance(self.engine, OnnxEngine):
            raise VitalError("model: expected a checkpoint, got an ONNX export, whose weights torch does not hold")
        return self.engine.model

    @property
    def precision(self) -> str:
        """Of the weights: "bfloat16", say, or "bfloat16, decoder int8"."""
        if isinstance(self.engine, OnnxEngine):
            manifest = self.engine.sessions.manifest
            return manifest["dtype"] + (", linear layers int8" if manifest["int8"] else "")
        dtype = str(self.weights.decoder.embed.weight.dtype).removeprefix("torch.")
        return dtype if self.int8_error is None else f"{dtype}, decoder int8"

    @functools.cached_property
    def processor(self) -> Processor:
        """Read when first needed: a directory without tokenizer files still runs ready-made prompts."""
        return Processor(self.checkpoint.directory)

    def generate(
        self,
        image: Any,
        question: str,
        k: int | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        read: ReadOptions | None = None,
        terms: Terms | None = None,
    ) -> Answer:
        """Answer one question after k latent steps (None: the checkpoint's default). Research use only.

        image: a path (PNG, JPEG, TIFF, DICOM, NIfTI), bytes, PIL image, numpy or torch array, a list of these for
        several images, or None.  read: which frame, slice or window to look at.  temperature 0 is greedy.
        terms: priority, time limit, whose cache.  Raises VitalError.
        """
        read, terms = read or ReadOptions(), terms or Terms()
        request = Request(image, question, k, max_new_tokens, temperature, top_p, top_k, seed, read, terms)
        return self.generate_batch([request])[0]

    def generate_batch(self, requests: Sequence[Request]) -> list[Answer]:
        """Answers in the order of the requests. Each may have its own k, length, sampling and images.

        Requests that name the same image (a path, or the very same object) have it read once and share its prefill.
        """
        _require_list("requests", requests, Request)
        decodings = [self._decoding(request) for request in requests]
        terms = [request.terms for request in requests]
        return self._answers(self._prepare_all(requests), decodings, terms, decode=True)

    def stream(
        self,
        image: Any,
        question: str,
        k: int | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        read: ReadOptions | None = None,
        terms: Terms | None = None,
    ) -> Iterator[str]:
        """Like generate, piece by piece; the pieces join to Answer.text, and none ends inside a character.

        Closing the iterator cancels the request and frees its cache at once.
        """
        read, terms = read or ReadOptions(), terms or Terms()
        request = Request(image, question, k, max_new_tokens, temperature, top_p, top_k, seed, read, terms)
        return self._pieces(self._prepare_all([request])[0], self._decoding(request), terms)

    def explain(
        self,
        image: Any,
        question: str,
        k: int | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        read: ReadOptions | None = None,
        terms: Terms | None = None,
        encoder: str | os.PathLike[str] | None = None,
    ) -> Explanation:
        """Like generate, and then what training's scaffolding reads from the latents: words, heat maps, neighbours.

        encoder: directory of the vision encoder that the projector was trained for, where it does not lie beside the
        model. What cannot be shown is left out, and Explanation.missing says why.  Raises VitalError: CheckpointError
        where the checkpoint has no scaffolding, as ONNX exports never have.
        """
        explainer = self._explainer
        patch_encoder = explainer.open_encoder(encoder)  # before the model thinks for nothing
        terms, started = terms or Terms(), time.perf_counter()
        pixels = read_images(image, read or ReadOptions())
        pictures = [self.processor.picture(one) for one in pixels]
        self.engine.make_patches(pictures, terms.cache_salt)
        prompt = self.processor.ask_about(pictures, question, started)
        request = Request(image, question, k, max_new_tokens, temperature, top_p, top_k, seed)
        [answer] = self._answers([prompt], [self._decoding(request)], [terms], decode=True)
        return explainer.explain(answer, question, pixels, patch_encoder)

    @property
    def _explainer(self) -> Explainer:
        """Built when first needed, once."""
        device = self.weights.decoder.embed.weight.device
        with self._building:
            if self._built_explainer is None:
                self._built_explainer = Explainer(self.checkpoint, device, lambda ids: self.processor.decode(ids))
            return self._built_explainer

    def prepare(self, image: Any, question: str, read: ReadOptions | None = None) -> Prompt:
        """Read, resize and tokenize: what run() takes."""
        return self.processor.prepare(image, question, read or ReadOptions())

    def run(
        self,
        prompts: Sequence[Prompt],
        k: int | Sequence[int] | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        return_logits: bool = False,
        latents: Sequence[torch.Tensor | None] | None = None,
    ) -> list[Answer]:
        """Run ready-made prompts in one batch.  k: one for all, or one per prompt.

        With return_logits, answer.logits holds what each answer token was chosen from. Text is empty where the
        directory has no tokenizer files.
        latents: for each prompt None, or its first thoughts z_1, z_2, .. [at most k, d], which are taken as they are
        instead of being thought; the model thinks on from there. A prompt's own give its own answer; another's show
        what the latents do to it.
        """
        _require_list("prompts", prompts, Prompt)
        k = self.checkpoint.vital.k if k is None else k
        steps = list(k) if isinstance(k, Sequence) else [k] * len(prompts)
        if len(steps) != len(prompts):
            raise VitalError(f"k: expected one int or {len(prompts)} of them, got {len(steps)}")
        decodings = [Decoding(n, max_new_tokens, temperature, top_p, top_k, seed, return_logits) for n in steps]
        terms = [Terms()] * len(prompts)
        given = None if latents is None else self._given_latents(latents, steps)
        return self._answers(prompts, decodings, terms, has_tokenizer(self.checkpoint.directory), given)

    def _prepare_all(self, requests: Sequence[Request]) -> list[Prompt]:
        keys = [_image_key(request) for request in requests]
        first: dict[tuple[Any, str], Request] = {}  # to name an image
        for key, request in zip(keys, requests, strict=True):
            first.setdefault(key, request)

        seen = dict(zip(first, self._look_at_all(list(first.values())), strict=True))
        prompts = []
        for key, request in zip(keys, requests, strict=True):
            pictures, seconds = seen[key]
            self.engine.make_patches(pictures, request.terms.cache_salt)  # whoever named the image first may know it
            prompts.append(self.processor.ask_about(pictures, request.question, time.perf_counter() - seconds))
            seen[key] = pictures, 0.0
        return prompts

    def _look_at_all(self, requests: Sequence[Request]) -> list[tuple[list[Picture], float]]:
        """Each one's pictures and the seconds they took; side by side after the first that was worth a thread."""

        def look_at(request: Request) -> tuple[list[Picture], float]:
            started = time.perf_counter()
            pictures = self.processor.look_at(request.image, request.read)
            self.engine.make_patches(pictures, request.terms.cache_salt)
            return pictures, time.perf_counter() - started

        seen: list[tuple[list[Picture], float]] = []
        while len(seen) < len(requests) and (not seen or seen[-1][1] < WORTH_A_THREAD_S):
            seen.append(look_at(requests[len(seen)]))
        with ThreadPoolExecutor(os.cpu_count()) as threads:  # none starts that is not asked to
            look = threads.map if len(requests) - len(seen) > 1 else map
            seen += look(look_at, requests[len(seen) :])
        return seen

    def _decoding(self, request: Request) -> Decoding:
        k = self.checkpoint.vital.k if request.k is None else request.k
        return Decoding(k, request.max_new_tokens, request.temperature, request.top_p, request.top_k, request.seed)

    def _given_latents(self, latents: Sequence[torch.Tensor | None], steps: Sequence[int]) -> list[torch.Tensor | None]:
        """Checked, in the dtype of the weights."""
        if isinstance(self.engine, OnnxEngine):
            raise VitalError("latents: expected none, got some for an ONNX export, which thinks in one graph")
        if not isinstance(latents, Sequence) or len(latents) != len(steps):
            came = f"{len(latents)} of them" if isinstance(latents, Sequence) else type(latents).__name__
            raise VitalError(
                f"latents: expected a list with an entry or None for each of {len(steps)} prompts, got {came}"
            )
        weight = self.weights.decoder.embed.weight
        found: list[torch.Tensor | None] = []
        for index, (given, k) in enumerate(zip(latents, steps, strict=True)):
            if given is None:
                found.append(None)
                continue
            came = f"{given.dtype} {list(given.shape)}" if isinstance(given, torch.Tensor) else type(given).__name__
            is_plain = isinstance(given, torch.Tensor) and given.is_floating_point() and given.layout == torch.strided
            if not is_plain or given.ndim != 2 or given.shape[1] != weight.shape[1] or len(given) > k:
                raise VitalError(
                    f"latents[{index}]: expected floats [at most {k}, {weight.shape[1]}] or None, got {came}"
                )
            own = given.detach().to(weight)
            found.append(own)
            if not bool(own.isfinite().all()):
                raise VitalError(f"latents[{index}]: expected finite numbers of {weight.dtype}, got NaN or infinity")
        return found

    def _answers(
        self,
        prompts: Sequence[Prompt],
        decodings: Sequence[Decoding],
        terms: Sequence[Terms],
        decode: bool,
        latents: Sequence[torch.Tensor | None] | None = None,
    ) -> list[Answer]:
        with self._running(prompts, decodings, terms, latents) as running:
            while not all(sequence.is_finished for sequence in running):
                self.engine.advance()
        to_text = self.processor.decode if decode else _no_text
        return [self._answer(sequence, to_text) for sequence in running]

    def _pieces(self, prompt: Prompt, decoding: Decoding, terms: Terms) -> Iterator[str]:
        with self._running([prompt], [decoding], [terms]) as [sequence]:
            shown = 0
            is_last = False
            while not is_last:
                self.engine.advance()
                # In this order: another thread's step may add tokens, or the last of them, at any moment.
                is_last, count = sequence.is_finished, len(sequence.token_ids)
                text = self.processor.decode(sequence.token_ids[shown:count])
                if text and (is_last or not text.endswith(REPLACEMENT)):
                    shown = count
                    yield text

    @contextmanager
    def _running(
        self,
        prompts: Sequence[Prompt],
        decodings: Sequence[Decoding],
        terms: Sequence[Terms],
        latents: Sequence[torch.Tensor | None] | None = None,
    ) -> Iterator[list[Running]]:
        """Submit all or none; whatever has not finished on the way out is cancelled."""
        running: list[Running] = []
        given = [None] * len(prompts) if latents is None else latents
        try:
            for submission in zip(prompts, decodings, terms, given, strict=True):
                running.append(self.engine.submit(*submission))
            yield running
            if any(sequence.finish_reason == "cancelled" for sequence in running):
                raise RuntimeError("a step that this request shared with another thread's failed there")
        finally:
            for sequence in running:
                self.engine.cancel(sequence)

    def _answer(self, sequence: Running, to_text: Callable[[Sequence[int]], str]) -> Answer:
        width = self.checkpoint.config.decoder.hidden_size
        latents = torch.stack(sequence.latents).float().cpu() if sequence.latents else torch.empty(0, width)
        assert sequence.finish_reason is not None
        return Answer(
            text=to_text(sequence.token_ids),
            token_ids=sequence.token_ids,
            finish_reason=sequence.finish_reason,
            latents=latents,
            usage=Usage(
                prompt_tokens=sequence.prompt.num_tokens,
                cached_tokens=sequence.cached_tokens,
                latent_steps=len(sequence.latents),
                completion_tokens=sequence.num_completion_tokens,
            ),
            timings=sequence.timings(),
            logits=torch.stack(sequence.logits) if sequence.logits else None,
        )


def load(
    model: str | Path = BUNDLED,
    adapter: str | Path | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    *,
    int8: bool = False,
    cache_tokens: int | None = None,
    max_batch: int = 64,
    prefix_cache: bool = True,
    vision_cache_bytes: int = EngineConfig.vision_cache_bytes,
    progress: Progress | None = None,
) -> Model:
    """Load a Hugging Face Qwen3-VL directory or hub id, or a directory that `vitalrt export onnx` wrote.

    model: without one, the bundled phantom model.  adapter: a PEFT LoRA directory or hub id, merged while loading.
    dtype "auto": the checkpoint's on a GPU, float32 on the CPU, and an export's own.  int8: weights of the decoder's
    linear maps and head in 8 bits: half the bytes of bf16 once they are loaded, for steps of CUDA devices (a CPU widens
    them, which costs time and, in the C++ core, memory). A few prompts are thought about before and after, and loading
    fails where the median relative change of their latents is above 0.1.  cache_tokens: capacity of the KV cache
    (None: what 2 GiB hold, at most 32,768), taken once, now; an export takes what a batch needs, up to it.
    prefix_cache: whether requests share what they begin with, images above all; an export has no such cache.
    vision_cache_bytes: what the features of past images may take, for questions that come later.
    Raises VitalError: CheckpointError or CapacityError, mostly.
    """
    engine = EngineConfig(
        cache_tokens=cache_tokens,
        max_batch=max_batch,
        prefix_cache=prefix_cache,
        vision_cache_bytes=vision_cache_bytes,
    )
    checkpoint = Checkpoint.open(model, adapter)
    if (checkpoint.directory / MANIFEST).is_file():
        if int8:
            raise VitalError("int8: an ONNX export is in 8 bits if it was written so: vitalrt export onnx --int8")
        return Model(checkpoint, open_engine(checkpoint, adapter, device, dtype, engine, stop_ids(checkpoint)))
    where = choose_device(device)
    weights = load_weights(checkpoint, adapter, where, choose_dtype(dtype, where, checkpoint.config), progress)
    int8_error = quantise(weights, probe_prompts(checkpoint.config, checkpoint.directory)) if int8 else None
    return Model(checkpoint, Engine(weights, engine, stop_ids(checkpoint)), int8_error)


@functools.lru_cache(maxsize=1)
def _cached_load(model: str | Path) -> Model:
    return load(model)


def generate(image: Any, question: str, k: int | None = None, model: str | Path = BUNDLED, **options: Any) -> Answer:
    """Model.generate with the bundled phantom model, or another; the last one used stays loaded."""
    return _cached_load(model).generate(image, question, k, **options)


def _require_list(name: str, values: Any, kind: type) -> None:
    if not isinstance(values, Sequence):
        raise VitalError(f"{name}: expected a list of vitalrt.{kind.__name__}, got {type(values).__name__}")
    for value in values:
        if not isinstance(value, kind):
            raise VitalError(f"{name}: expected vitalrt.{kind.__name__}, got {type(value).__name__}")


def stop_ids(checkpoint: Checkpoint) -> set[int]:
    """End tokens: generation_config.json's, else config.json's. Empty only if neither names one."""
    path = checkpoint.directory / "generation_config.json"
    found = read_json(path).get("eos_token_id") if path.is_file() else None
    if found is None:
        config = read_json(checkpoint.directory / "config.json")
        own = config.get("eos_token_id")
        found = config.get("text_config", {}).get("eos_token_id") if own is None else own
    if found is None:
        return set()
    return set(found) if isinstance(found, list) else {found}


def has_tokenizer(directory: Path) -> bool:
    return (directory / "tokenizer.json").is_file() or (directory / "vocab.json").is_file()


def _image_key(request: Request) -> tuple[Any, str]:
    """The same for requests whose images and reading are known to be the same."""
    image = request.image
    return image if isinstance(image, str | Path) else id(image), repr(request.read)


def _no_text(token_ids: Sequence[int]) -> str:
    return ""
