"""A Hugging Face Qwen3-VL directory or hub id, and a PEFT LoRA adapter, to weights on a device."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from vitalrt.config import DecoderConfig, ModelConfig, VitalConfig, read_json
from vitalrt.errors import CheckpointError
from vitalrt.model.qwen3_vl import Qwen3VL, weight_sources

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Checkpoint:
    """A model directory that has been read but whose weights have not.

    scaffold_directory: where scaffolding of these weights would lie: the adapter's directory, or the model's own.
    """

    directory: Path
    config: ModelConfig
    vital: VitalConfig
    scaffold_directory: Path

    @classmethod
    def open(cls, model: str | Path, adapter: str | Path | None = None) -> Checkpoint:
        """An adapter's vital.json, where it has one, stands in for the model's."""
        directory = resolve(model, "model")
        raw = read_json(directory / "config.json")
        if "quantization_config" in raw:
            raise CheckpointError("model: expected float weights (safetensors), got a quantized checkpoint")
        trained = directory if adapter is None else resolve(adapter, "adapter")
        source = trained if (trained / "vital.json").is_file() else directory
        return cls(directory, ModelConfig.from_dict(raw), VitalConfig.from_directory(source), trained)


def resolve(location: str | Path, argument: str) -> Path:
    """A local directory as it is, or a hub id downloaded into the hub's cache (with the hub's progress bars)."""
    path = Path(location).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not HUB_ID.fullmatch(str(location)):
        raise CheckpointError(f"{argument}: expected a directory or a hub id 'owner/name', got {str(location)!r}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(location), allow_patterns=MODEL_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        came = f"no directory {str(location)!r}, and the hub gave no such model: {reason}"
        raise CheckpointError(f"{argument}: {came}") from error


def choose_device(device: str | torch.device) -> torch.device:
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"device: expected 'auto', 'cpu' or 'cuda[:n]', got {device!r}") from error
    if chosen.type not in ("cpu", "cuda"):
        raise CheckpointError(f"device: expected 'auto', 'cpu' or 'cuda[:n]', got {device!r}")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise CheckpointError(f"device: expected a device of this machine, got {device!r}, but torch finds no CUDA")
    return chosen


def choose_dtype(dtype: str | torch.dtype, device: torch.device, config: ModelConfig) -> torch.dtype:
    """For "auto" the checkpoint's own dtype on a GPU and float32 on the CPU, where half precision is slower."""
    if isinstance(dtype, torch.dtype):
        name = str(dtype).removeprefix("torch.")
    elif dtype == "auto":
        name = config.dtype if device.type == "cuda" else "float32"
    else:
        name = dtype
    if name not in DTYPES:
        raise CheckpointError(f"dtype: expected 'auto' or one of {sorted(DTYPES)}, got {name!r}")
    return DTYPES[name]


class WeightFiles:
    """The safetensors of a directory, memory-mapped: a tensor is read when it is asked for."""

    def __init__(self, directory: Path) -> None:
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            files = read_json(index).get("weight_map", {})
        elif (directory / "model.safetensors").is_file():
            files = {}
        else:
            raise CheckpointError(f"model: {directory} has no model.safetensors and no model.safetensors.index.json")
        self._open: dict[str, Any] = {}
        self._directory = directory
        self._file_of = files or dict.fromkeys(self._file("model.safetensors").keys(), "model.safetensors")

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.clear()

    def names(self) -> set[str]:
        return set(self._file_of)

    def read(self, name: str) -> torch.Tensor:
        try:
            return self._file(self._file_of[name]).get_tensor(name)
        except KeyError as error:
            raise CheckpointError(f"model: {self._directory} has no tensor {name}") from error
        except SafetensorError as error:
            raise CheckpointError(f"model: {self._directory / self._file_of[name]}: {error}") from error

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self._directory / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"model: {self._directory / name} cannot be read ({error})") from error
        return self._open[name]


def load_weights(
    checkpoint: Checkpoint,
    adapter: str | Path | None,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None = None,
) -> Qwen3VL:
    """Build the model on `device`, one fused tensor at a time, merging the adapter as it goes.

    progress is called with (tensors done, tensors in all).  Raises CheckpointError on missing, unknown or misshapen
    tensors of the model or the adapter.
    """
    with torch.device("meta"):
        model = Qwen3VL(checkpoint.config)
    lora = None if adapter is None else LoraAdapter(resolve(adapter, "adapter"))
    sources = list(weight_sources(checkpoint.config))
    parameters = dict(model.named_parameters())
    with WeightFiles(checkpoint.directory) as files:
        _check_names(files.names(), {name for _, names in sources for name in names})
        for done, (ours, theirs) in enumerate(sources):
            filled = torch.empty(parameters[ours].shape, dtype=dtype, device=device)
            parts = filled.split(rows_of_parts(theirs, len(filled), checkpoint.config.decoder))
            for name, part in zip(theirs, parts, strict=True):
                tensor = files.read(name)
                if lora is not None:
                    tensor = lora.merge(name, tensor)
                part.copy_(_fitted(name, tensor, part.shape))
            _set_parameter(model, ours, filled)
            if progress is not None:
                progress(done + 1, len(sources))
    if lora is not None:
        lora.require_all_merged()
    if checkpoint.config.decoder.tie_word_embeddings:
        model.decoder.head.weight = model.decoder.embed.weight
    return model.to(device).eval().requires_grad_(False)


def rows_of_parts(sources: tuple[str, ...], num_rows: int, config: DecoderConfig) -> list[int]:
    """How many of a parameter's rows each of the tensors that are stacked in it fills."""
    if len(sources) == 2 and "mlp" in sources[0]:
        return [num_rows // 2] * 2  # gate and up
    heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads][: len(sources)]
    return [num_rows * n // sum(heads) for n in heads]


def _fitted(name: str, tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A source tensor in the shape of its part of a parameter."""
    fitted = tensor
    if name.endswith("patch_embed.proj.weight") and tensor.ndim == 5:
        fitted = tensor.flatten(1)
    elif name.endswith(("q_norm.weight", "k_norm.weight")) and tensor.shape == shape[1:]:
        fitted = tensor.expand(shape)
    if fitted.shape != shape:
        came = f"expected shape {list(shape)} as config.json says, got {list(tensor.shape)}"
        raise CheckpointError(f"model: {name}: {came}")
    return fitted


def _check_names(present: set[str], needed: set[str]) -> None:
    missing = sorted(needed - present)
    unknown = sorted(present - needed - {"lm_head.weight"})  # tied checkpoints may repeat the embedding there
    for label, names in (("lacks", missing), ("has unknown", unknown)):
        if names:
            raise CheckpointError(f"model: the checkpoint {label} {len(names)} tensors, the first is {names[0]}")


def _set_parameter(model: nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))


# adapter_config.json keys that make an adapter more than a sum, and the value with which it is one.
PLAIN_LORA = {"use_dora": False, "fan_in_fan_out": False, "bias": "none", "modules_to_save": None}


class LoraAdapter:
    """A PEFT LoRA directory. merge() adds scale * B @ A to a base weight (Hu et al. 2021, eq. 3)."""

    def __init__(self, directory: Path) -> None:
        if not (directory / "adapter_config.json").is_file():
            raise CheckpointError(f"adapter: {directory} has no adapter_config.json (expected a PEFT LoRA directory)")
        self.config = read_json(directory / "adapter_config.json", "adapter")
        if self.config.get("peft_type") != "LORA":
            raise CheckpointError(f"adapter: expected peft_type LORA, got {self.config.get('peft_type')!r}")
        for key, plain in PLAIN_LORA.items():
            if self.config.get(key) not in (plain, None, []):
                raise CheckpointError(f"adapter: {key}: only {plain!r} can be merged, got {self.config[key]!r}")
        if "lora_alpha" not in self.config:
            raise CheckpointError("adapter: adapter_config.json has no lora_alpha")
        path = directory / "adapter_model.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"adapter: {path} cannot be read ({error})") from error
        self._pairs: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            matched = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
            if matched is None or tensor.ndim != 2:
                raise CheckpointError(f"adapter: cannot merge tensor {name} of shape {list(tensor.shape)}")
            self._pairs.setdefault(matched[1], {})[matched[2]] = tensor
        self._unmerged = set(self._pairs)

    def merge(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """weight: [out, in], the base tensor called `name`.  Returns it with the adapter's update, or as it is."""
        module = name.removesuffix(".weight")
        pair = self._pairs.get(module)
        if pair is None or not name.endswith(".weight"):
            return weight
        fits = set(pair) == {"A", "B"} and pair["B"].shape[1] == len(pair["A"])
        if not fits or (len(pair["B"]), pair["A"].shape[1]) != tuple(weight.shape):
            shapes = {key: list(tensor.shape) for key, tensor in pair.items()}
            raise CheckpointError(f"adapter: {module}: expected lora_A, lora_B for {list(weight.shape)}, got {shapes}")
        self._unmerged.discard(module)
        update = pair["B"].float() @ pair["A"].float()
        return weight.float() + self._scale(module, len(pair["A"])) * update

    def require_all_merged(self) -> None:
        if self._unmerged:
            raise CheckpointError(f"adapter: the model has no weight for {sorted(self._unmerged)[0]}")

    def _scale(self, module: str, rank: int) -> float:
        alpha = self.config["lora_alpha"]
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = value
                break
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)
