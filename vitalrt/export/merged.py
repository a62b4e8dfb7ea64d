"""A checkpoint with its adapter merged, as an ordinary Hugging Face directory: what a site deploys."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vitalrt.checkpoint import Checkpoint, LoraAdapter, resolve
from vitalrt.config import ENCODER, SCAFFOLD_FILES, VitalConfig
from vitalrt.export.directory import building, require_empty
from vitalrt.model.vision_encoder import VisionEncoder, require_id


def merged(
    model: str | Path, adapter: str | Path, out: str | Path, encoder: str | os.PathLike[str] | None = None
) -> Path:
    """Write model + adapter to `out`, file by file and tensor by tensor, in the checkpoint's own dtype.

    The adapter's vital.json and scaffolding, where it has them, go along; no scaffolding of the model itself does.
    encoder: directory of the vision encoder that the adapter's projector was trained for, to go along as `out`/encoder.
    Raises CheckpointError where adapter or encoder do not fit, VitalError where `out` has content; then `out` is as it
    was.
    """
    checkpoint = Checkpoint.open(model)
    adapter_dir, out = resolve(adapter, "adapter"), Path(out)
    require_empty(out)
    lora = LoraAdapter(adapter_dir)
    kept = [path for path in sorted(checkpoint.directory.iterdir()) if path.is_file()]
    kept = [path for path in kept if path.name not in SCAFFOLD_FILES]
    added = [adapter_dir / name for name in ("vital.json", *SCAFFOLD_FILES) if (adapter_dir / name).is_file()]
    features = [] if encoder is None else _encoder_files(Path(encoder), VitalConfig.from_directory(adapter_dir))
    with building(out, sum(path.stat().st_size for path in (*kept, *added, *features))) as scratch:
        for path in kept:
            if path.suffix == ".safetensors":
                _merge_file(lora, path, scratch / path.name)
            else:
                shutil.copy(path, scratch / path.name)
        lora.require_all_merged()
        for path in added:
            shutil.copy(path, scratch / path.name)
        for path in features:
            (scratch / ENCODER).mkdir(exist_ok=True)
            shutil.copy(path, scratch / ENCODER / path.name)
    return out


def _encoder_files(directory: Path, vital: VitalConfig) -> list[Path]:
    require_id(VisionEncoder(directory), vital.encoder)
    return [path for path in sorted(directory.iterdir()) if path.is_file()]


def _merge_file(lora: LoraAdapter, source: Path, target: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(source, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            tensor = file.get_tensor(name)
            tensors[name] = lora.merge(name, tensor).to(tensor.dtype)
        metadata = file.metadata()
    save_file(tensors, target, metadata)
