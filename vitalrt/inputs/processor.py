"""Question and pictures to a Prompt: chat template, tokens, resizing, patches.

Gives what transformers' Qwen3-VL processor gives with its Pillow image backend: the same ids and grids, and patches
that agree to 1e-5. (Its torchvision backend resizes with another bicubic filter, one or two of 255 grey levels apart in
a few pixels.) Patches are the same to the last bit wherever they are made: on the CPU by Pillow and numpy, on another
device by torch.

H, W pixels; T tokens; P patches.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from vitalrt.errors import CheckpointError, InputError
from vitalrt.inputs.bicubic import resize_bicubic
from vitalrt.inputs.image import ReadOptions, read_images
from vitalrt.inputs.prompt import Picture, Prompt
from vitalrt.model.rope import Grid
from vitalrt.transfers import is_pinned_for, sent

IMAGE_TOKEN = "<|image_pad|>"
MAX_ASPECT_RATIO = 200
PATCH_AXES = (0, 3, 1, 4, 6, 2, 5)  # _block_shape's: block row, block column, row, column, channel, y, x


@dataclass(frozen=True)
class PatchOptions:
    """How a picture becomes patches (preprocessor_config.json). min_pixels, max_pixels bound H*W after resizing."""

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def patch_dim(self) -> int:
        return 3 * self.temporal_patch_size * self.patch_size**2

    def normalisation(self) -> tuple[np.ndarray, np.ndarray]:
        """(scale, shift), float32 [3, 1, 1] by channel: a value from 0 to 255 becomes value * scale - shift."""
        scale = [1 / (255 * std) for std in self.std]
        shift = [mean / std for mean, std in zip(self.mean, self.std, strict=True)]
        return np.array(scale, np.float32)[:, None, None], np.array(shift, np.float32)[:, None, None]

    @classmethod
    def from_directory(cls, directory: Path) -> PatchOptions:
        path = directory / "preprocessor_config.json"
        if not path.is_file() and (directory / "processor_config.json").is_file():
            path = directory / "processor_config.json"
        try:
            config = json.loads(path.read_text())
            config = config.get("image_processor", config)
            size = config.get("size") or {}
            return cls(
                patch_size=config["patch_size"],
                merge_size=config["merge_size"],
                temporal_patch_size=config["temporal_patch_size"],
                min_pixels=config.get("min_pixels") or size["shortest_edge"],
                max_pixels=config.get("max_pixels") or size["longest_edge"],
                mean=tuple(config["image_mean"]),
                std=tuple(config["image_std"]),
            )
        except FileNotFoundError as error:
            missing = "preprocessor_config.json, needed to read images"
            raise CheckpointError(f"model: {directory} has no {missing}") from error
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"model: {path} lacks or garbles {error} for image preprocessing") from error


def fit_size(height: int, width: int, options: PatchOptions) -> tuple[int, int]:
    """(H, W) after resizing: multiples of patch_size * merge_size, area within bounds, aspect ratio nearly kept."""
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise InputError(f"image: expected an aspect ratio up to {MAX_ASPECT_RATIO}, got {height} x {width} pixels")
    factor = options.patch_size * options.merge_size
    fitted_height, fitted_width = round(height / factor) * factor, round(width / factor) * factor
    if fitted_height * fitted_width > options.max_pixels:
        shrink = math.sqrt(height * width / options.max_pixels)
        fitted_height = max(factor, math.floor(height / shrink / factor) * factor)
        fitted_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif fitted_height * fitted_width < options.min_pixels:
        grow = math.sqrt(options.min_pixels / (height * width))
        fitted_height = math.ceil(height * grow / factor) * factor
        fitted_width = math.ceil(width * grow / factor) * factor
    return fitted_height, fitted_width


def patchify(pixels: np.ndarray, options: PatchOptions) -> tuple[np.ndarray, Grid]:
    """Resize, normalise and cut one picture.

    pixels: uint8 [H, W, 3].  Returns float32 [P, patch_dim], patches in merge-block order (the merge x merge patches of
    one visual token are neighbours), and the grid (1, H / patch, W / patch).
    """
    height, width = fit_size(pixels.shape[0], pixels.shape[1], options)
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    blocks = np.asarray(resized).reshape(_block_shape(height, width, options)).transpose(PATCH_AXES)
    values = blocks.astype(np.float32, order="C").reshape(-1, 3, 1, options.patch_size**2)
    scale, shift = options.normalisation()
    values *= scale
    values -= shift
    grid = (1, height // options.patch_size, width // options.patch_size)
    return values.repeat(options.temporal_patch_size, axis=2).reshape(len(values), -1), grid


def patchify_on(device: torch.device, pixels: np.ndarray, options: PatchOptions) -> torch.Tensor:
    """The patches of patchify(), float32 [P, patch_dim], from a picture that is moved as it is and resized there."""
    height, width = fit_size(pixels.shape[0], pixels.shape[1], options)
    # A copy of its own: torch takes no negative strides, and warns of what it may not write.
    staged = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=is_pinned_for(pixels.nbytes, device))
    staged.numpy()[...] = pixels
    resized = resize_bicubic(staged.to(device, non_blocking=True), height, width)
    blocks = resized.reshape(_block_shape(height, width, options)).permute(PATCH_AXES).contiguous()
    scale, shift = _normalisation_on(device, options)
    values = blocks.float().view(-1, 3, 1, options.patch_size**2).mul_(scale).sub_(shift)
    return values.expand(-1, -1, options.temporal_patch_size, -1).reshape(len(values), -1)


def _block_shape(height: int, width: int, options: PatchOptions) -> tuple[int, ...]:
    """A resized picture's axes taken apart: block row, row, y, block column, column, x, channel."""
    patch, merge = options.patch_size, options.merge_size
    return (height // (merge * patch), merge, patch, width // (merge * patch), merge, patch, 3)


@lru_cache(maxsize=8)
def _normalisation_on(device: torch.device, options: PatchOptions) -> tuple[torch.Tensor, ...]:
    return tuple(sent(torch.from_numpy(part), device) for part in options.normalisation())


class Processor:
    """Tokenizer, chat template and image preprocessing of one checkpoint directory."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer  # seconds to import, and only needed for text

        self.directory = directory
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(directory)
            self.tokenizer.backend_tokenizer.no_truncation()
            self.tokenizer.backend_tokenizer.no_padding()
        except Exception as error:  # a garbled file may raise anything, KeyError and TypeError included
            reason = str(error).partition("\n")[0]
            raise CheckpointError(f"model: {directory} has no usable tokenizer files ({reason})") from error
        self.chat_template = _chat_template(directory, self.tokenizer)
        self.image_token_id = cast(int, self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))

    @cached_property
    def patch_options(self) -> PatchOptions:
        """Read when the first picture comes: text alone does not need them."""
        return PatchOptions.from_directory(self.directory)

    @cached_property
    def _patch_options_digest(self) -> Any:
        return hashlib.sha256(json.dumps(asdict(self.patch_options)).encode())

    def prepare(self, image: Any, question: str, options: ReadOptions) -> Prompt:
        """image: anything read_image takes, a list of such, or None. Patches are made at once, on the CPU.

        Raises InputError.
        """
        started = time.perf_counter()
        pictures = self.look_at(image, options)
        for picture in pictures:
            picture.patches()
        return self.ask_about(pictures, question, started)

    def look_at(self, image: Any, options: ReadOptions) -> list[Picture]:
        """Read what prepare() calls image; one list of these serves any number of questions."""
        return [self.picture(pixels) for pixels in read_images(image, options)]

    def ask_about(self, pictures: Sequence[Picture], question: str, started: float) -> Prompt:
        """started: when preprocessing began, of time.perf_counter.  Raises InputError where there is no question."""
        if not isinstance(question, str) or not question.strip():
            raise InputError(f"question: expected non-empty text, got {type(question).__name__}")
        return self.assemble(self.tokenize(question, [picture.grid for picture in pictures]), pictures, started)

    def picture(self, pixels: np.ndarray) -> Picture:
        """pixels: uint8 RGB [H, W, 3], resized when the patches are needed.  Raises InputError where its shape does
        not fit."""
        options = self.patch_options
        height, width = fit_size(pixels.shape[0], pixels.shape[1], options)
        grid = (1, height // options.patch_size, width // options.patch_size)

        def make_patches(device: torch.device) -> torch.Tensor:
            if device.type == "cpu":
                return torch.from_numpy(patchify(pixels, options)[0])
            return patchify_on(device, pixels, options)

        return Picture(grid, options.patch_dim, self._digest(pixels), make_patches)

    def assemble(self, ids: list[int], pictures: Sequence[Picture], started: float) -> Prompt:
        """pictures: in the order of their tokens in ids.  started: when preprocessing began, of time.perf_counter."""
        return Prompt.of_pictures(ids, pictures, preprocess_ms=(time.perf_counter() - started) * 1000)

    def tokenize(self, question: str, grids: Sequence[Grid]) -> list[int]:
        """Ids of one user turn (pictures first, then the question) up to where the answer begins."""
        content = [{"type": "image"} for _ in grids] + [{"type": "text", "text": question}]
        return self.tokenize_chat([{"role": "user", "content": content}], grids, name="question")

    def tokenize_chat(self, turns: list[dict[str, Any]], grids: Sequence[Grid], name: str) -> list[int]:
        """Ids of turns, as chat templates take them, up to where the answer begins.  name: of the turns, for errors.

        Raises InputError where texts spell the token of a picture, jinja2's TemplateError where the template does not
        take these turns.
        """
        text = self.tokenizer.apply_chat_template(
            turns, chat_template=self.chat_template, add_generation_prompt=True, tokenize=False
        )
        # Calling the tokenizer itself would hand the one text to a pool of threads, and wait for them to wake up.
        ids: list[int] = self.tokenizer.backend_tokenizer.encode(text).ids
        num_extra = ids.count(self.image_token_id) - len(grids)
        if num_extra:
            raise InputError(f"{name}: expected no {IMAGE_TOKEN} token in the text, got {num_extra}")
        expanded, taken = [], 0
        for time_, height, width in grids:
            place = ids.index(self.image_token_id, taken)
            num_tokens = time_ * height * width // self.patch_options.merge_size**2
            expanded += ids[taken:place] + [self.image_token_id] * num_tokens
            taken = place + 1
        return expanded + ids[taken:]

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _digest(self, pixels: np.ndarray) -> bytes:
        digest = self._patch_options_digest.copy()
        digest.update(repr(pixels.shape).encode())
        digest.update(np.ascontiguousarray(pixels).data)
        return digest.digest()


def _chat_template(directory: Path, tokenizer: Any) -> str:
    """The processor's template where the directory has one of its own, else the tokenizer's."""
    if (directory / "chat_template.jinja").is_file():
        return (directory / "chat_template.jinja").read_text()
    if (directory / "chat_template.json").is_file():
        return json.loads((directory / "chat_template.json").read_text())["chat_template"]
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template
    raise CheckpointError(f"model: {directory} has no chat template (chat_template.jinja or tokenizer_config.json)")
