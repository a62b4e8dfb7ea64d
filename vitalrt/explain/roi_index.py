"""Regions that a model was trained on, by their features: what a latent's aim is compared with.

N regions, K latent steps, v feature width.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vitalrt.errors import CheckpointError


@dataclass(frozen=True)
class Neighbour:
    """A region: what it shows, and the cosine of its feature with a latent's aim."""

    label: str
    cosine: float


@dataclass(frozen=True, eq=False)
class RoiIndex:
    """features: float16 [N, v], unit norm.  labels: of each, what it shows ("cyst, ultrasound"), and not of whom.
    encoder_id: whose features they are."""

    features: torch.Tensor
    labels: Sequence[str]
    encoder_id: str

    def nearest(self, aims: torch.Tensor, count: int) -> list[list[Neighbour]]:
        """aims: [K, v], unit norm.  For each the `count` regions most like it, the likest first."""
        cosines = aims @ self.features.to(aims).T
        best = cosines.topk(min(count, len(self.labels)), dim=-1)
        return [
            [Neighbour(self.labels[index], cosine) for index, cosine in zip(places, values, strict=True)]
            for places, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        metadata = {"encoder_id": self.encoder_id, "labels": json.dumps(list(self.labels))}
        save_file({"features": self.features.contiguous()}, path, metadata)

    @classmethod
    def load(cls, path: Path) -> RoiIndex:
        """Raises CheckpointError where the file is not such an index."""
        try:
            with safe_open(path, framework="pt") as file:
                features, metadata = file.get_tensor("features"), file.metadata() or {}
            labels, encoder_id = json.loads(metadata["labels"]), metadata["encoder_id"]
        except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise CheckpointError(f"roi_index: {path} cannot be read ({error})") from error
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise CheckpointError(f"roi_index: expected a list of labels in {path}, got other JSON")
        if features.ndim != 2 or len(features) != len(labels) or not bool(features.float().isfinite().all()):
            came = f"features {list(features.shape)} and {len(labels)} labels"
            raise CheckpointError(f"roi_index: expected finite features, a row for each label, got {came} in {path}")
        return cls(features, labels, encoder_id)
