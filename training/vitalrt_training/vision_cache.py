"""What a frozen vision tower says of a picture, kept on disk: computed once, read when the picture comes again.

FOLDER/TOWER/PICTURE.safetensors   tokens [V, d] and deepstack [D, V, d]
    TOWER: digest of the weights, configuration and dtype, the device's kind and the libraries
    PICTURE: digest of patches and grid, which is what the tower sees

V visual tokens, d width of the decoder, D deepstack levels, P patches, I images.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vitalrt.errors import VitalError
from vitalrt_training.latent_loop import VisionFeatures


@dataclass(frozen=True)
class VisionCacheConfig:
    """folder: where features are kept; "" keeps none.  Runs may share it, also at the same time.

    most_gib: what the folder may hold. A picture of V visual tokens takes V · d · (1 + D) numbers, 8 MiB at 512 x 512
    pixels of an 8B model in 16 bits; one that no longer fits is encoded each time.
    """

    folder: str = ""
    most_gib: float = 100.0

    def __post_init__(self) -> None:
        if not self.most_gib > 0:
            raise VitalError(f"vision_cache.most_gib: expected more than 0, got {self.most_gib}")


class VisionCache:
    """Of one frozen tower.

    Pictures are encoded one at a time: what is found is the same bit for bit whatever the folder holds, so that a
    resumed run repeats an uninterrupted one.
    """

    def __init__(self, config: VisionCacheConfig, tower: Any, device: torch.device, num_processes: int = 1) -> None:
        """tower: with all its weights in place.  num_processes: that share what is left of the folder's room.

        Raises VitalError if the tower is not frozen.
        """
        if any(parameter.requires_grad for parameter in tower.parameters()):
            raise VitalError("vision_cache: expected a frozen vision tower, got one that is being trained")
        root = Path(config.folder).expanduser()
        self.folder = root / _identity(tower, device)
        self.folder.mkdir(parents=True, exist_ok=True)
        held = sum(path.stat().st_size for path in root.rglob("*.safetensors"))
        self.room_bytes = (int(config.most_gib * 2**30) - held) // num_processes

    def encode(self, tower: Any, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> VisionFeatures:
        """What the tower says, without a graph.  pixel_values: [P, patch_dim].  grid_thw: [I, 3]."""
        pictures = pixel_values.split(grid_thw.prod(-1).tolist())
        found = [self._encode_one(tower, patches, grid) for patches, grid in zip(pictures, grid_thw, strict=True)]
        tokens = torch.cat([one.tokens for one in found])
        return VisionFeatures(tokens, torch.cat([one.deepstack for one in found], dim=1))

    def _encode_one(self, tower: Any, patches: torch.Tensor, grid: torch.Tensor) -> VisionFeatures:
        path = self.folder / f"{_digest([grid, patches])}.safetensors"
        try:
            kept = load_file(path, device=str(patches.device))
            return VisionFeatures(kept["tokens"], kept["deepstack"])
        except (FileNotFoundError, SafetensorError, KeyError):  # not there, or not by us: made again
            with torch.no_grad():
                features = VisionFeatures.of(tower(patches, grid_thw=grid[None]))
            self._keep(path, features)
            return features

    def _keep(self, path: Path, features: VisionFeatures) -> None:
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in features)
        if num_bytes > self.room_bytes:
            return
        # A name of its own: other processes may be writing the same picture.
        with NamedTemporaryFile(dir=self.folder, suffix=".partial", delete=False) as file:
            partial = Path(file.name)
        try:
            save_file({name: tensor.contiguous().cpu() for name, tensor in features._asdict().items()}, partial)
            num_bytes = partial.stat().st_size
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        self.room_bytes -= num_bytes


def _identity(tower: Any, device: torch.device) -> str:
    versions = f"{torch.__version__} {transformers.__version__} {device.type} {tower.config.to_json_string()}"
    weights = tower.state_dict()
    names = " ".join(f"{name} {weight.dtype}" for name, weight in weights.items())
    return _digest(weights.values(), f"{versions} {names}")[:32]


def _digest(tensors: Iterable[torch.Tensor], text: str = "") -> str:
    """SHA-256 of text and of the tensors' shapes and bytes."""
    found = hashlib.sha256(text.encode())
    for tensor in tensors:
        found.update(str(tuple(tensor.shape)).encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
