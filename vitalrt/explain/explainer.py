"""Puts training's scaffolding back beside a model, to read its latents.

K latent steps, d backbone width.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitalrt.checkpoint import Checkpoint
from vitalrt.config import ENCODER, ROI_INDEX, SCAFFOLD_TOKENIZER
from vitalrt.engine.request import Answer
from vitalrt.errors import CheckpointError, VitalError
from vitalrt.explain.explanation import Explanation, Step
from vitalrt.explain.roi_index import Neighbour, RoiIndex
from vitalrt.explain.text_window import Words, end_ids, read_words
from vitalrt.explain.visual_window import aim, heatmaps
from vitalrt.model.scaffold import Scaffold
from vitalrt.model.vision_encoder import PatchEncoder, open_encoder, require_id

NUM_NEIGHBOURS = 5


class Explainer:
    """The scaffolding of one checkpoint, on a device, in float32. Safe to call from several threads, one at a time."""

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, model_decode: Callable[[Sequence[int]], str]
    ) -> None:
        """model_decode: the model's own ids to text, for a text decoder that has no tokenizer of its own.

        Raises CheckpointError where the checkpoint has no scaffolding, or none that was trained.
        """
        directory = checkpoint.scaffold_directory
        self.scaffold = Scaffold.load(directory).to(device)
        if not self.scaffold.supervised:
            raise CheckpointError(
                f"scaffold: that of {directory} was not trained: no loss supervised its latents, so nothing can be read"
                " from them"
            )
        if self.scaffold.pj_in.in_features != checkpoint.config.decoder.hidden_size:
            width = checkpoint.config.decoder.hidden_size
            raise CheckpointError(f"scaffold: expected width {width}, got {self.scaffold.pj_in.in_features}")
        if "text" in self.scaffold.supervised:
            end_ids(self.scaffold)  # it must have them
        self._checkpoint, self._device = checkpoint, device
        self._decode = _decoding(directory / SCAFFOLD_TOKENIZER) or model_decode
        self._index = _index(directory / ROI_INDEX, checkpoint.vital.encoder, self.scaffold)
        self._encoder: tuple[Path, PatchEncoder] | None = None
        self._one_at_a_time = threading.Lock()

    def open_encoder(self, directory: str | os.PathLike[str] | None = None) -> PatchEncoder | None:
        """directory: None for the one beside the scaffolding, if there is one.

        Raises CheckpointError where it holds another encoder than the projector was trained for.
        """
        beside = self._checkpoint.scaffold_directory / ENCODER
        if directory is None and not beside.is_dir():
            return None
        try:
            path = Path(beside if directory is None else directory).resolve()
        except (TypeError, ValueError) as error:
            raise VitalError(f"encoder: expected a directory, got {directory!r}") from error
        with self._one_at_a_time:
            if self._encoder is None or self._encoder[0] != path:
                encoder = open_encoder(path, self._device)
                require_id(encoder, self._checkpoint.vital.encoder)
                self._encoder = path, encoder
            return self._encoder[1]

    def explain(
        self, answer: Answer, question: str, pictures: Sequence[np.ndarray], encoder: PatchEncoder | None
    ) -> Explanation:
        """pictures: uint8 RGB [H, W, 3], those that were asked about.  encoder: as open_encoder gives it."""
        with self._one_at_a_time:
            missing: dict[str, str] = {}
            latents = answer.latents.to(self._device)
            words = self._words(latents, missing)
            maps, neighbours = self._aims(latents, pictures, encoder, missing)
        steps = [
            Step(
                None if words is None else words[k].text,
                None if words is None else words[k].probability,
                tuple(of_picture[k] for of_picture in maps),
                tuple(neighbours[k]) if neighbours else (),
            )
            for k in range(len(latents))
        ]
        provenance = self._checkpoint.vital.provenance
        return Explanation(question, answer, tuple(steps), tuple(pictures), missing, provenance)

    def _words(self, latents: torch.Tensor, missing: dict[str, str]) -> list[Words] | None:
        if "text" not in self.scaffold.supervised:
            missing["words"] = "the text decoder of this scaffolding was not trained"
            return None
        return read_words(self.scaffold, latents, self._decode) if len(latents) else []

    def _aims(
        self,
        latents: torch.Tensor,
        pictures: Sequence[np.ndarray],
        encoder: PatchEncoder | None,
        missing: dict[str, str],
    ) -> tuple[list[torch.Tensor], list[list[Neighbour]]]:
        """Heat maps [K, R, C] of each picture, and neighbours of each latent."""
        if "visual" not in self.scaffold.supervised:
            missing["pictures"] = missing["neighbours"] = "the visual projector of this scaffolding was not trained"
            return [], []
        if not len(latents):
            return [], []
        aims = aim(self.scaffold, latents)
        if encoder is None:
            aims_at = self._checkpoint.vital.encoder or "the vision encoder"
            missing["pictures"] = f"no {aims_at} lies beside the scaffolding: name its directory (encoder=, --encoder)"
        elif not pictures:
            missing["pictures"] = "the question is about no picture"
        if self._index is None:
            missing["neighbours"] = f"no {ROI_INDEX} lies beside the scaffolding"
        maps = heatmaps(encoder, pictures, aims) if encoder is not None else []
        return maps, self._index.nearest(aims, NUM_NEIGHBOURS) if self._index else []


def _index(path: Path, encoder_id: str, scaffold: Scaffold) -> RoiIndex | None:
    if not path.is_file():
        return None
    index, width = RoiIndex.load(path), scaffold.projector.output.out_features
    if index.encoder_id != encoder_id or index.features.shape[1] != width:
        came = f"width {index.features.shape[1]} of {index.encoder_id}"
        raise CheckpointError(
            f"roi_index: expected features of width {width} of {encoder_id or 'no encoder'}, got {came}"
        )
    return index


def _decoding(tokenizer_path: Path) -> Callable[[Sequence[int]], str] | None:
    if not tokenizer_path.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer: Any = Tokenizer.from_file(str(tokenizer_path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(f"scaffold: {tokenizer_path} cannot be read ({error})") from error
    return partial(tokenizer.decode, skip_special_tokens=True)
