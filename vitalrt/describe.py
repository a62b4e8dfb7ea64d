"""What `vitalrt info` tells: the machine, its backends, and a loaded model."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from vitalrt.api import Model
from vitalrt.engine.request import RESEARCH_NOTICE


def describe_machine() -> dict[str, Any]:
    return {
        "vitalrt": _version("vitalrt"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "backend: torch": "used for every operation, on any device",
        "backend: triton": _triton(),
        "backend: cuda": _cuda(),
        "backend: onnx": _onnx(),
    }


def describe_model(model: Model) -> dict[str, Any]:
    weights, cache, checkpoint = model.weights, model.engine.cache, model.checkpoint
    parameters = list(weights.parameters())
    return {
        "directory": str(checkpoint.directory),
        "default k": checkpoint.vital.k,
        "provenance": checkpoint.vital.provenance,
        "device": str(parameters[0].device),
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in parameters),
        "weight bytes": sum(p.numel() * p.element_size() for p in parameters),
        "cache tokens": cache.num_tokens,
        "cache bytes": cache.num_bytes,
        "decoder": _shape(checkpoint.config.decoder, "num_hidden_layers", "hidden_size", "vocab_size"),
        "vision": _shape(checkpoint.config.vision, "depth", "hidden_size", "patch_size"),
        "notice": RESEARCH_NOTICE,
    }


def _shape(config: Any, *names: str) -> str:
    return ", ".join(f"{name} {getattr(config, name)}" for name in names)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed (running from source)"


def _cuda() -> str:
    if torch.cuda.is_available():
        return f"found: {torch.cuda.get_device_name()}"
    return "not used: " + ("torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device")


def _triton() -> str:
    found = importlib.util.find_spec("triton") is not None
    return "not used: this release has no Triton kernels" + ("" if found else ", and triton is not installed")


def _onnx() -> str:
    return "not used: this release has no ONNX path"
