"""A checkpoint with its adapter merged, as an ordinary Hugging Face directory: what a site deploys."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vitalrt.checkpoint import Checkpoint, LoraAdapter, resolve
from vitalrt.errors import VitalError

FROM_ADAPTER = ("vital.json", "scaffold.json", "scaffold.safetensors")
"""What an adapter directory has that stays of use once its weights are merged."""


def merged(model: str | Path, adapter: str | Path, out: str | Path) -> Path:
    """Write model + adapter to `out`, file by file and tensor by tensor, in the checkpoint's own dtype.

    The adapter's vital.json and scaffolding, where it has them, go along; no scaffolding of the model itself does.
    Raises CheckpointError where the adapter does not fit, VitalError where `out` has content; then `out` is as it was.
    """
    checkpoint = Checkpoint.open(model)
    adapter_dir, out = resolve(adapter, "adapter"), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise VitalError(f"out: expected a new or an empty directory, got {out}")
    lora = LoraAdapter(adapter_dir)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for path in sorted(checkpoint.directory.iterdir()):
            if path.suffix == ".safetensors" and path.name not in FROM_ADAPTER:
                _merge_file(lora, path, partial / path.name)
            elif path.is_file() and path.name not in FROM_ADAPTER:
                shutil.copy(path, partial / path.name)
        lora.require_all_merged()
        for name in FROM_ADAPTER:
            source = adapter_dir if (adapter_dir / name).is_file() else checkpoint.directory
            if (source / name).is_file() and (source == adapter_dir or name == "vital.json"):
                shutil.copy(source / name, partial / name)
        # Renaming onto an empty directory replaces it.
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def _merge_file(lora: LoraAdapter, source: Path, target: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(source, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            tensor = file.get_tensor(name)
            tensors[name] = lora.merge(name, tensor).to(tensor.dtype)
        metadata = file.metadata()
    save_file(tensors, target, metadata)
