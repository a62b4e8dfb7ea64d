"""What `vitalrt info` tells: the machine, its backends, and a loaded model."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from vitalrt.api import Model
from vitalrt.checkpoint import Checkpoint
from vitalrt.config import ENCODER, ROI_INDEX, SCAFFOLD_CONFIG, read_json
from vitalrt.engine.cpu_decoder import why_not_cpu_decoder
from vitalrt.engine.device_step import why_not_device_step
from vitalrt.engine.request import RESEARCH_NOTICE
from vitalrt.engine.scheduler import Engine
from vitalrt.export.runtime import OnnxEngine
from vitalrt.model.int8_linear import Int8Linear
from vitalrt_kernels import why_not_triton
from vitalrt_kernels.linear_decode import MAX_INT8_ROWS
from vitalrt_kernels.tuned import CUBLAS, choices_of


def describe_machine() -> dict[str, Any]:
    return {
        "vitalrt": _version("vitalrt"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "backend: torch": "used for everything but what the C++ core and the kernels do",
        "backend: C++ core": "used for the cache's pages, and for the decoder of small float32 models on the CPU",
        "backend: triton": _triton(),
        "backend: cuda": _cuda(),
        "backend: onnx": _onnx(),
    }


def describe_model(model: Model) -> dict[str, Any]:
    checkpoint, error = model.checkpoint, model.int8_error
    return {
        "directory": str(checkpoint.directory),
        "default k": checkpoint.vital.k,
        "provenance": checkpoint.vital.provenance,
        "dtype": model.precision,
        **(_onnx_engine(model.engine) if isinstance(model.engine, OnnxEngine) else _torch_engine(model.engine)),
        **({} if error is None else {"int8": f"relative error of latents {error}"}),
        "decoder": _shape(checkpoint.config.decoder, "num_hidden_layers", "hidden_size", "vocab_size"),
        "vision": _shape(checkpoint.config.vision, "depth", "hidden_size", "patch_size"),
        "explanations": _explanations(checkpoint),
        "notice": RESEARCH_NOTICE,
    }


def _explanations(checkpoint: Checkpoint) -> str:
    """What Model.explain would show, by the files that lie there."""
    directory = checkpoint.scaffold_directory
    if not (directory / SCAFFOLD_CONFIG).is_file():
        return "none: no scaffolding lies beside the weights"
    supervised = read_json(directory / SCAFFOLD_CONFIG, "scaffold").get("supervised", [])
    shown = ["words"] if "text" in supervised else []
    if "visual" in supervised:
        has_encoder = (directory / ENCODER).is_dir()
        shown.append("heat maps" if has_encoder else f"heat maps, given {checkpoint.vital.encoder}")
        shown += ["nearest regions"] if (directory / ROI_INDEX).is_file() else []
    return "; ".join(shown) or "none: no loss supervised the latents"


def _torch_engine(engine: Engine) -> dict[str, Any]:
    parameters = list(engine.model.parameters())
    int8 = [module for module in engine.model.modules() if isinstance(module, Int8Linear)]
    held = [*parameters, *(module.values for module in int8), *(module.scale for module in int8)]
    return {
        "engine": "torch",
        "device": str(parameters[0].device),
        "parameters": sum(p.numel() for p in parameters) + sum(module.values.numel() for module in int8),
        "weight bytes": sum(tensor.nbytes for tensor in held),
        "cpu decoder": _cpu_decoder(engine),
        "gpu step": _gpu_step(engine),
        "pictures": "cut on the CPU, by Pillow" if engine.encoder.device.type == "cpu" else "cut on the device",
        "cache tokens": engine.cache.num_tokens,
        "cache bytes": engine.cache.num_bytes,
    }


def _onnx_engine(engine: OnnxEngine) -> dict[str, Any]:
    sessions = engine.sessions
    return {
        "engine": f"onnxruntime {sessions.runtime.__version__}, opset {sessions.manifest['opset']}",
        "device": sessions.device,
        "weight bytes": sessions.weights_path.stat().st_size,
        "cache tokens": engine.cache_tokens,
        "cache bytes": "taken for each batch",
    }


def _shape(config: Any, *names: str) -> str:
    return ", ".join(f"{name} {getattr(config, name)}" for name in names)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed (running from source)"


def _cpu_decoder(engine: Engine) -> str:
    reason = why_not_cpu_decoder(engine.model.decoder)
    if engine.cpu_decoder is None:
        return f"in torch: {reason}"
    copies = f"{engine.cpu_decoder.num_bytes / 1e6:.1f} MB of its own"
    return f"in C++, {copies}; prompts of more than {engine.cpu_decoder.max_tokens} new tokens in torch"


def _gpu_step(engine: Engine) -> str:
    decoder = engine.model.decoder
    if engine.device_graphs is None:
        return f"in torch: {why_not_device_step(decoder)}"
    from vitalrt_kernels.gpu.overlap import can_overlap  # and with it triton, which is there where this is

    device = decoder.embed.weight.device
    known = choices_of(device)
    num_cublas = sum(use == CUBLAS for use in known.values())
    launches = "each launch set up beside the one before" if can_overlap(device) else "launches one after the other"
    tuned = f"tuned.json has {len(known)} shapes for this card, {num_cublas} of them for cuBLAS"
    cublas = f"cuBLAS for several rows (int8: above {MAX_INT8_ROWS})"
    return f"in kernels, captured in CUDA graphs, {launches}; {cublas}; {tuned}"


def _cuda() -> str:
    if torch.cuda.is_available():
        return f"found: {torch.cuda.get_device_name()}"
    return "not used: " + ("torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device")


def _triton() -> str:
    if not torch.cuda.is_available():
        return "not used: it is for steps and prompts on a CUDA device"
    reason = why_not_triton(torch.device("cuda", torch.cuda.current_device()))
    return f"not used: {reason}" if reason else f"{_version('triton')}: steps and prompts on a CUDA device"


def _onnx() -> str:
    if importlib.util.find_spec("onnxruntime") is None:
        return "not used: onnxruntime is not installed (pip install 'vitalrt[onnx]')"
    import onnxruntime

    return f"runs exported directories: {onnxruntime.__version__}, {', '.join(onnxruntime.get_available_providers())}"
