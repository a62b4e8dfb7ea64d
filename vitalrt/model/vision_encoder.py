"""The frozen vision encoder whose features the visual projector aims at: any SigLIP or CLIP.

N images, H, W pixels; R, C rows and columns of the patch grid; d_v feature width.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitalrt.errors import CheckpointError

_MODEL_TYPES = ("siglip", "siglip_vision_model", "clip", "clip_vision_model")


class VisionEncoder:
    """The vision tower of a SigLIP or CLIP directory, frozen.

    id: the model's type and a digest of its weights and preprocessing.  width: d_v.
    """

    def __init__(self, directory: str | os.PathLike[str], device: str | torch.device = "cpu") -> None:
        """directory: as transformers saves it, with or without the text tower, with its image processor's file.

        Raises CheckpointError where that cannot be loaded.
        """
        from transformers import AutoConfig, AutoModel

        path = Path(directory)
        weights = sorted(path.glob("*.safetensors"))
        if not weights or not (path / "config.json").is_file():
            raise CheckpointError(f"encoder: expected a directory with config.json and *.safetensors, got {path}")
        model_type = AutoConfig.from_pretrained(path).model_type
        if model_type not in _MODEL_TYPES:
            raise CheckpointError(f"encoder: expected a SigLIP or CLIP model, got a {model_type!r} in {path}")
        self._processor = _image_processor(path)
        whole = AutoModel.from_pretrained(path, use_safetensors=True, dtype=torch.float32)
        self._model = getattr(whole, "vision_model", whole)
        self._model.eval().requires_grad_(False).to(device)
        config = self._model.config
        side = config.image_size // config.patch_size
        self._image_side = config.image_size
        self._device = torch.device(device)
        self._has_class_token = model_type.startswith("clip")
        self.grid = (side, side)
        self.width: int = config.hidden_size
        self.id = f"{model_type}-{_digest([*weights, *path.glob('*processor_config.json')])[:16]}"

    @torch.inference_mode()
    def encode(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """The last block's output, on the CPU and without a class token: float32 [N, R, C, d_v].

        images: uint8 [H, W, 3] of any size.
        Images are stretched to a square, never cropped: every pixel keeps its place in the grid.
        """
        pixels = self._processor(
            images=list(images),
            size={"height": self._image_side, "width": self._image_side},
            do_center_crop=False,
            return_tensors="pt",
        )["pixel_values"]
        last_block: list[torch.Tensor] = []
        hook = self._model.encoder.layers[-1].register_forward_hook(lambda _m, _in, out: last_block.append(out))
        try:
            self._model(pixels.to(self._device))
        finally:
            hook.remove()
        patches = last_block[0][:, 1:] if self._has_class_token else last_block[0]
        return patches.unflatten(1, self.grid).float().cpu()


def _image_processor(path: Path) -> Any:
    from transformers import AutoImageProcessor

    try:
        # PIL's arithmetic everywhere: features must not depend on whether torchvision is installed.
        return AutoImageProcessor.from_pretrained(path, backend="pil")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"encoder: expected an image processor's file in {path}, found none to read") from error


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
