"""The graphs of an exported directory as functions of numpy arrays, run by ONNX Runtime.

B batch, T longest prompt, S cache capacity, K latent steps, V visual tokens, N deepstack levels, d width;
F frames of one size, P patches of a frame.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vitalrt.config import ModelConfig, read_json
from vitalrt.errors import CheckpointError, VitalError

MANIFEST = "onnx.json"
WEIGHTS_FILE = "weights.bin"  # external data of every graph
FORMAT = 1
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def require(package: str) -> Any:
    """Import an optional package, or say how to install it; one that is there but broken raises as it does."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        how = "pip install 'vitalrt[onnx]', or 'vitalrt[onnx-gpu]' for CUDA"
        raise VitalError(f"{package} is not installed; run: {how}") from error


def choose_provider(device: str, dtype: str) -> tuple[str, int]:
    """device: "auto", "cpu" or "cuda[:n]".  Returns "cpu" or "cuda", and n.  Raises CheckpointError."""
    available = require("onnxruntime").get_available_providers()
    if device == "auto":
        device = "cuda" if PROVIDERS["cuda"] in available else "cpu"
    kind, _, index = device.partition(":")
    if kind not in PROVIDERS or (index and not index.isdigit()):
        raise CheckpointError(f"device: expected 'auto', 'cpu' or 'cuda[:n]', got {device!r}")
    if PROVIDERS[kind] not in available:
        found = f"this onnxruntime has only {', '.join(available)}"
        raise CheckpointError(f"device: {found}, got {device!r}; run: pip install 'vitalrt[onnx-gpu]'")
    if kind == "cpu" and dtype == "bf16":
        raise CheckpointError("device: ONNX Runtime runs bf16 graphs on CUDA only, got 'cpu'; export fp32 or fp16")
    return kind, int(index or 0)


@dataclass
class Cache:
    """Keys and values of one batch, on the device; steps read and write the same buffers, through these bindings."""

    values: dict[str, Any]
    bindings: dict[str, Any] = field(default_factory=dict)


class Sessions:
    """Sessions are opened when first needed; all of them map the same weights file.

    device: "auto", "cpu" or "cuda[:n]".  num_threads: 0 lets ONNX Runtime choose.
    Raises VitalError where onnxruntime is missing or lacks the provider, CheckpointError for a broken directory.
    """

    def __init__(self, directory: Path, device: str = "auto", num_threads: int = 0) -> None:
        self.runtime = require("onnxruntime")
        self.directory = directory
        self.manifest = read_json(directory / MANIFEST)
        if self.manifest.get("format") != FORMAT:
            raise CheckpointError(f"model: {MANIFEST}: expected format {FORMAT}, got {self.manifest.get('format')!r}")
        self.config = ModelConfig.from_directory(directory)
        self.device, self.device_id = choose_provider(device, self.manifest["dtype"])
        # TF32 would round hidden states to ten bits; latents are fed back and must not be.
        self.provider_options = {"device_id": str(self.device_id), "use_tf32": "0"} if self.device == "cuda" else {}
        self.num_threads = num_threads
        self.weights_path = directory / WEIGHTS_FILE
        self._open: dict[str, Any] = {}

    def see(self, pixels: np.ndarray, grid_hw: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """pixels: fp32 [F, P, patch_dim].  Returns features [V, d] and deepstack [N, V, d], frame after frame."""
        feeds = {"pixel_values": pixels, "grid_hw": np.array(grid_hw, np.int64)}
        features, *deepstack = self.session("vision").run(None, feeds)
        return features, deepstack[0] if deepstack else np.empty((0, *features.shape), np.float32)

    def prefill(
        self,
        ids: np.ndarray,
        positions: np.ndarray,
        lengths: np.ndarray,
        features: np.ndarray,
        deepstack: np.ndarray,
        capacity: int,
    ) -> tuple[np.ndarray, Cache]:
        """ids: [B, T].  positions: [3, B, T].  lengths: [B].  Returns z_0 [B, d] and a cache of S = capacity slots."""
        feeds = {"input_ids": ids, "positions": positions, "lengths": lengths, "image_features": features}
        feeds["capacity"] = np.array([capacity], np.int64)
        if len(deepstack):
            feeds["deepstack"] = deepstack
        binding = self.session("prefill").io_binding()
        layers = range(self.config.decoder.num_hidden_layers)
        names = [f"{layer}.{kind}" for layer in layers for kind in ("key", "value")]
        for name in names:
            binding.bind_output(f"present.{name}", self.device, self.device_id)
        [hidden] = self._run("prefill", binding, feeds, ["hidden"])
        return hidden, Cache(dict(zip(names, binding.get_outputs(), strict=False)))

    def latent_step(self, hidden: np.ndarray, positions: np.ndarray, lengths: np.ndarray, cache: Cache) -> np.ndarray:
        """z_{k-1} [B, d] to z_k [B, d].  cache: modified in place."""
        feeds = {"hidden": hidden, "positions": positions, "lengths": lengths}
        return self._step("latent_step", feeds, ["next_hidden"], cache)[0]

    def latent_loop(
        self, hidden: np.ndarray, steps: np.ndarray, positions: np.ndarray, lengths: np.ndarray, cache: Cache
    ) -> tuple[np.ndarray, np.ndarray]:
        """z_0 [B, d] and each row's number of steps [B] to z_1..z_K [K, B, d] and the logits of each z_K [B, vocab]."""
        feeds = {"hidden": hidden, "steps": steps, "positions": positions, "lengths": lengths}
        latents, logits = self._step("latent_loop", feeds, ["latents", "logits"], cache)
        return latents, logits

    def decode_step(self, tokens: np.ndarray, positions: np.ndarray, lengths: np.ndarray, cache: Cache) -> np.ndarray:
        """The newest token of each row [B] to the logits of its next [B, vocab].  cache: modified in place."""
        feeds = {"token_ids": tokens, "positions": positions, "lengths": lengths}
        return self._step("decode_step", feeds, ["logits"], cache)[0]

    def head(self, hidden: np.ndarray) -> np.ndarray:
        """[B, d] to logits [B, vocab]."""
        logits: np.ndarray = self.session("head").run(None, {"hidden": hidden})[0]
        return logits

    def session(self, name: str) -> Any:
        if name not in self._open:
            options = self.runtime.SessionOptions()
            options.intra_op_num_threads = self.num_threads
            # Every session has threads of its own. Were they to spin between runs, they would take the cores from the
            # other sessions, and from preprocessing.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            if not self.manifest["int8"]:
                # A rearranged copy per session would multiply the weights; only the int8 kernels gain much by it.
                options.add_session_config_entry("session.disable_prepacking", "1")
            provider = PROVIDERS[self.device]
            path = self.directory / f"{name}.onnx"
            try:
                session = self.runtime.InferenceSession(path, options, providers=[(provider, self.provider_options)])
            except Exception as error:  # onnxruntime's errors share no base class of their own
                reason = str(error).splitlines()[0]
                raise CheckpointError(f"model: {name}.onnx cannot be opened by ONNX Runtime ({reason})") from error
            if session.get_providers()[0] != provider:
                raise CheckpointError(f"device: {provider} is there but does not start, got {session.get_providers()}")
            self._open[name] = session
        return self._open[name]

    def _step(self, name: str, feeds: dict[str, np.ndarray], outputs: Sequence[str], cache: Cache) -> list[np.ndarray]:
        if name not in cache.bindings:
            binding = self.session(name).io_binding()
            for slot, value in cache.values.items():
                binding.bind_ortvalue_input(f"past.{slot}", value)
                binding.bind_ortvalue_output(f"present.{slot}", value)
            cache.bindings[name] = binding
        return self._run(name, cache.bindings[name], feeds, outputs)

    def _run(self, name: str, binding: Any, feeds: dict[str, np.ndarray], outputs: Sequence[str]) -> list[np.ndarray]:
        """outputs: those not bound yet; they come last and go to the CPU."""
        for feed, value in feeds.items():
            binding.bind_cpu_input(feed, value)
        for output in outputs:
            binding.bind_output(output, "cpu")
        self.session(name).run_with_iobinding(binding)
        return [value.numpy() for value in binding.get_outputs()[-len(outputs) :]]
