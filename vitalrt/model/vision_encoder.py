"""The frozen vision encoder whose features the visual projector aims at: any SigLIP or CLIP, or a Qwen3-VL's own tower.

N images, H, W pixels; R, C rows and columns of the patch grid; d_v feature width.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError

from vitalrt.checkpoint import WeightFiles
from vitalrt.config import read_json
from vitalrt.errors import CheckpointError
from vitalrt.inputs.processor import PatchOptions, patchify

_MODEL_TYPES = ("siglip", "siglip_vision_model", "clip", "clip_vision_model")
_BACKBONE = "qwen3_vl"


class PatchEncoder(Protocol):
    """id: names the encoder and its weights.  grid: (R, C).  width: d_v."""

    id: str
    grid: tuple[int, int]
    width: int

    def encode(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """images: uint8 [H, W, 3] of any size, stretched to the encoder's own.  Returns float32 [N, R, C, d_v]."""
        ...


def open_encoder(directory: str | os.PathLike[str], device: str | torch.device = "cpu") -> PatchEncoder:
    """Whichever of the two below the directory holds.  Raises CheckpointError where it holds neither."""
    path = Path(directory)
    is_backbone = (path / "config.json").is_file() and read_json(path / "config.json", "encoder").get(
        "model_type"
    ) == _BACKBONE
    return BackboneEncoder(path, device) if is_backbone else VisionEncoder(path, device)


def require_id(encoder: PatchEncoder, expected: str) -> None:
    """expected: of vital.json, "" for none.  Raises CheckpointError where the encoder is another."""
    if encoder.id != expected:
        aims_at = f"{expected}, whose features the projector was trained for" if expected else "none"
        raise CheckpointError(f"encoder: expected {aims_at}, got {encoder.id}")


class BackboneEncoder:
    """A Qwen3-VL's own vision tower: the output of its last block, before patches are merged to visual tokens.

    Images are stretched to the square that its position embeddings were made for.
    """

    def __init__(self, directory: str | os.PathLike[str], device: str | torch.device = "cpu") -> None:
        """directory: of the whole model, of which only the tower is read.  Raises CheckpointError where it has none."""
        from transformers import Qwen3VLConfig
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

        path = Path(directory)
        config: Any = Qwen3VLConfig.from_pretrained(path).vision_config
        with WeightFiles(path) as files:
            weights = {name.split("visual.")[1]: files.read(name) for name in files.names() if "visual." in name}
        self._model = Qwen3VLVisionModel(config)
        try:
            self._model.load_state_dict(weights)
        except RuntimeError as error:
            raise CheckpointError(f"encoder: expected a whole vision tower in {path}: {error}") from error
        self._model.eval().requires_grad_(False).to(device)
        side = math.isqrt(config.num_position_embeddings)
        self._image_side = side * config.patch_size
        options = PatchOptions.from_directory(path)
        self._options = replace(options, min_pixels=1, max_pixels=self._image_side**2)
        self._device = torch.device(device)
        self.grid = (side, side)
        self.width: int = config.hidden_size
        digest = hashlib.sha256(repr(self._options).encode())
        for name, weight in self._model.state_dict().items():
            digest.update(name.encode() + weight.cpu().numpy().tobytes())
        self.id = f"{_BACKBONE}-{digest.hexdigest()[:16]}"

    @torch.inference_mode()
    def encode(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """See PatchEncoder."""
        size = (self._image_side, self._image_side)
        stretched = [np.asarray(Image.fromarray(i).resize(size, Image.Resampling.BICUBIC)) for i in images]
        patches, grids = zip(*(patchify(image, self._options) for image in stretched), strict=True)
        pixels = torch.from_numpy(np.concatenate(patches)).to(self._device)
        last_block: list[torch.Tensor] = []
        hook = self._model.blocks[-1].register_forward_hook(lambda _m, _in, out: last_block.append(out))
        try:
            self._model(pixels, grid_thw=torch.tensor(grids, device=self._device))
        finally:
            hook.remove()
        merge = self._options.merge_size
        rows, columns = (side // merge for side in self.grid)
        # From merge-block order to rows and columns.
        blocks = last_block[0].view(len(images), rows, columns, merge, merge, self.width)
        return blocks.transpose(2, 3).reshape(len(images), *self.grid, self.width).float().cpu()


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
        with _quiet_transformers():  # it frets about the text tower's defaults, and shows a progress bar
            model_type = AutoConfig.from_pretrained(path).model_type
        if model_type not in _MODEL_TYPES:
            raise CheckpointError(f"encoder: expected a SigLIP or CLIP model, got a {model_type!r} in {path}")
        self._processor = _image_processor(path)
        with _quiet_transformers():
            try:
                whole, loading = AutoModel.from_pretrained(
                    path, use_safetensors=True, dtype=torch.float32, output_loading_info=True
                )
            except (SafetensorError, RuntimeError) as error:  # the latter: of other shapes
                reason = " ".join(str(error).split())
                raise CheckpointError(f"encoder: the weights in {path} cannot be read ({reason})") from error
        tower = [name for name in loading["missing_keys"] if "text_model." not in name]
        lacking = sorted(name for name in tower if "encoder." in name or "embeddings." in name)  # what encode() runs
        if lacking:
            raise CheckpointError(f"encoder: {path} lacks {len(lacking)} tensors, the first is {lacking[0]}")
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
            input_data_format="channels_last",
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


_quiet_lock = threading.Lock()  # what is changed belongs to the whole process


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    with _quiet_lock:
        verbosity, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if shows_bars:
                logging.enable_progress_bar()


def _image_processor(path: Path) -> Any:
    from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.17 asks torchvision for its alias

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
