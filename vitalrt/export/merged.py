"""A checkpoint with its adapter merged, as an ordinary Hugging Face directory: what a site deploys."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vitalrt.checkpoint import Checkpoint, LoraAdapter, resolve
from vitalrt.config import SCAFFOLD_FILES
from vitalrt.export.directory import building, require_empty


def merged(model: str | Path, adapter: str | Path, out: str | Path) -> Path:
    """Write model + adapter to `out`, file by file and tensor by tensor, in the checkpoint's own dtype.

    The adapter's vital.json and scaffolding, where it has them, go along; no scaffolding of the model itself does.
    Raises CheckpointError where the adapter does not fit, VitalError where `out` has content; then `out` is as it was.
    """
    checkpoint = Checkpoint.open(model)
    adapter_dir, out = resolve(adapter, "adapter"), Path(out)
    require_empty(out)
    lora = LoraAdapter(adapter_dir)
    kept = [path for path in sorted(checkpoint.directory.iterdir()) if path.is_file()]
    kept = [path for path in kept if path.name not in SCAFFOLD_FILES]
    added = [adapter_dir / name for name in ("vital.json", *SCAFFOLD_FILES) if (adapter_dir / name).is_file()]
    with building(out, sum(path.stat().st_size for path in (*kept, *added))) as scratch:
        for path in kept:
            if path.suffix == ".safetensors":
                _merge_file(lora, path, scratch / path.name)
            else:
                shutil.copy(path, scratch / path.name)
        lora.require_all_merged()
        for path in added:
            shutil.copy(path, scratch / path.name)
    return out


def _merge_file(lora: LoraAdapter, source: Path, target: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(source, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            tensor = file.get_tensor(name)
            tensors[name] = lora.merge(name, tensor).to(tensor.dtype)
        metadata = file.metadata()
    save_file(tensors, target, metadata)
