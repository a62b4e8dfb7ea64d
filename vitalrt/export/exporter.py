"""A checkpoint to a directory of ONNX graphs: built beside its destination, verified, then moved into place."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vitalrt.checkpoint import Checkpoint, Progress, load_weights
from vitalrt.config import SCAFFOLD_FILES, EngineConfig, ModelConfig
from vitalrt.engine.scheduler import Engine
from vitalrt.errors import VitalError
from vitalrt.export.directory import building, require_empty
from vitalrt.export.runtime import OnnxEngine
from vitalrt.export.sessions import FORMAT, MANIFEST, WEIGHTS_FILE, Sessions, choose_provider, require
from vitalrt.export.verify import MAX_NEW_TOKENS, MAX_STEPS, Verification, compare
from vitalrt.inputs.probes import random_prompts, real_prompts
from vitalrt.inputs.processor import Processor
from vitalrt.inputs.prompt import Prompt
from vitalrt.model.qwen3_vl import Qwen3VL

if TYPE_CHECKING:
    from onnx import ModelProto

    from vitalrt.export.weights import WeightLayout

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MIN_OPSET = 20  # Gelu with tanh; ONNX Runtime 1.17 and later run it
COMPANIONS = ("*.json", "*.jinja", "*.txt")  # tokenizer, chat template, preprocessing, configurations


@dataclass(frozen=True)
class Plan:
    """What an export will write and need, in bytes.

    files: by name; weights.bin is the external data of every graph.
    export_memory: at most, without verification; the checkpoint's files, mapped, come on top while there is room.
    run_memory: weights once, mapped; with int8 ONNX Runtime keeps a rearranged copy for each open graph on top.
    kv_per_token: KV cache of one token.
    """

    dtype: str
    int8: bool
    opset: int
    files: dict[str, int]
    export_memory: int
    run_memory: int
    kv_per_token: int


@dataclass(frozen=True)
class Export:
    """A finished export.  files: bytes by name.  verification: None if it was not asked for."""

    directory: Path
    files: dict[str, int]
    seconds: float
    verification: Verification | None


def plan_onnx(model: str | Path, *, dtype: str = "fp32", int8: bool = False, opset: int = MIN_OPSET) -> Plan:
    """What export_onnx() would write, from config.json alone: no weights are read, none need to be there.

    model: a directory or its config.json.  Raises VitalError.
    """
    path = Path(model).expanduser()
    config = ModelConfig.from_directory(path.parent if path.name == "config.json" else path)
    weights = _shapes(config)
    layout, graphs = _build(weights, dtype, int8, opset)
    files = {name: graph.ByteSize() for name, graph in graphs.items()}
    files[WEIGHTS_FILE] = layout.num_bytes
    sizes = [parameter.numel() * DTYPES[dtype].itemsize for parameter in weights.parameters()]
    return Plan(
        dtype=dtype,
        int8=int8,
        opset=opset,
        files=files,
        export_memory=sum(sizes) + max(sizes) * (4 if int8 else 1),  # int8: in fp32, twice, and its packed form
        run_memory=layout.num_bytes,
        kv_per_token=config.decoder.kv_values_per_token * DTYPES[dtype].itemsize,
    )


def export_onnx(
    model: str | Path,
    out: str | Path,
    *,
    adapter: str | Path | None = None,
    k: int | None = None,
    dtype: str = "fp32",
    int8: bool = False,
    opset: int = MIN_OPSET,
    verify: bool = True,
    prompts: Sequence[Prompt] = (),
    device: str = "auto",
    progress: Progress | None = None,
) -> Export:
    """Export a checkpoint as a directory that ONNX Runtime runs, complete with tokenizer and preprocessing files.

    out: must not exist, or be empty; it appears only when everything is written and, with verify, agrees with torch.
    k: default number of latent steps of the export (None: the checkpoint's).  dtype: "fp32", "fp16" or "bf16".
    int8: weights of linear layers in 8 bits, by ONNX Runtime's quantizer.  prompts: more to verify on.
    device: where ONNX Runtime verifies, "auto", "cpu" or "cuda[:n]".  progress: of loading, (done, total) tensors.
    Raises VitalError: missing package, unknown dtype, opset or device, no space, graphs that disagree with torch.
    """
    started = time.perf_counter()
    out = Path(out)
    require_empty(out)
    checkpoint = Checkpoint.open(model, adapter)
    if k is not None:
        checkpoint = replace(checkpoint, vital=replace(checkpoint.vital, k=k))
    layout, graphs = _build(_shapes(checkpoint.config), dtype, int8, opset)
    if verify:
        choose_provider(device, dtype)
    for package in ("onnxruntime", "onnx_ir") if int8 else ():
        require(package)
    # What is wrong, or too large for the disk, has said so before anything is loaded.
    with building(out, layout.num_bytes + sum(graph.ByteSize() for graph in graphs.values())) as scratch:
        weights = load_weights(checkpoint, adapter, torch.device("cpu"), DTYPES[dtype], progress)
        manifest: dict[str, Any] = {"format": FORMAT, "opset": opset, "dtype": dtype, "int8": int8}
        _copy_companions(checkpoint, scratch)
        processor = Processor(scratch) if _has_text(scratch) else None
        manifest["prompt_template"] = processor and _prompt_template(processor)
        _write_json(scratch / MANIFEST, manifest)
        layout.write(weights, scratch)
        for name, graph in graphs.items():
            (scratch / name).write_bytes(graph.SerializeToString())
            _check(scratch / name)
        verification = None
        if verify:
            probes = [*random_prompts(checkpoint.config), *prompts, *(real_prompts(processor) if processor else [])]
            verification = _verify(scratch, weights, probes, "int8" if int8 else dtype, device)
            _write_json(scratch / MANIFEST, {**manifest, "verification": asdict(verification)})
        files = {path.name: path.stat().st_size for path in sorted(scratch.iterdir())}
    return Export(out, files, time.perf_counter() - started, verification)


def _shapes(config: ModelConfig) -> Qwen3VL:
    with torch.device("meta"):
        return Qwen3VL(config)


def _build(model: Qwen3VL, dtype: str, int8: bool, opset: int) -> tuple[WeightLayout, dict[str, ModelProto]]:
    if dtype not in DTYPES:
        raise VitalError(f"dtype: expected one of {sorted(DTYPES)}, got {dtype!r}")
    require("onnx")
    from onnx.defs import onnx_opset_version

    from vitalrt.export.graphs import build
    from vitalrt.export.weights import WeightLayout

    if isinstance(opset, bool) or not isinstance(opset, int) or not MIN_OPSET <= opset <= onnx_opset_version():
        raise VitalError(f"opset: expected {MIN_OPSET}..{onnx_opset_version()}, got {opset!r}")
    layout = WeightLayout(model, DTYPES[dtype], int8=int8)
    return layout, build(model.config, layout, opset)


def _copy_companions(checkpoint: Checkpoint, scratch: Path) -> None:
    for pattern in COMPANIONS:
        for path in checkpoint.directory.glob(pattern):
            if not path.name.endswith(".safetensors.index.json") and path.name not in SCAFFOLD_FILES:
                shutil.copyfile(path, scratch / path.name)
    _write_json(scratch / "vital.json", asdict(checkpoint.vital))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def _has_text(directory: Path) -> bool:
    return (directory / "preprocessor_config.json").is_file() and (directory / "tokenizer.json").is_file()


def _prompt_template(processor: Processor) -> str:
    """One user turn with one picture, as text: for drivers in languages without a chat template engine."""
    content = [{"type": "image"}, {"type": "text", "text": "{question}"}]
    text: str = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=processor.chat_template,
        add_generation_prompt=True,
        tokenize=False,
    )
    return text


def _check(path: Path) -> None:
    """The ONNX checker, with types and shapes inferred all through."""
    from onnx import checker

    checker.check_model(path, full_check=True)


def _verify(directory: Path, weights: Qwen3VL, prompts: Sequence[Prompt], precision: str, device: str) -> Verification:
    longest = max(prompt.num_tokens for prompt in prompts) + MAX_STEPS + MAX_NEW_TOKENS
    config = EngineConfig(cache_tokens=longest * (MAX_STEPS + 2))
    sessions = Sessions(directory, device, torch.get_num_threads())
    exported = [OnnxEngine(sessions, config, stop_ids=(), fused=fused) for fused in (True, False)]
    return compare(Engine(weights, config, stop_ids=()), exported, prompts, precision)
