"""From the training tables to the index of regions that explanations compare with."""

from __future__ import annotations

from itertools import compress

import numpy as np
import torch

from vitalrt.explain.roi_index import RoiIndex
from vitalrt_training.data.tables import Tables


def index_regions(tables: Tables, most: int) -> RoiIndex | None:
    """Each target of each training picture once, evenly spread over the table where there are more than `most`.

    None where there is nothing to index.
    """
    rows = tables.select("train")
    rows = rows[has_feature(tables, rows)]
    names = np.array(tables.samples.data.column("target_name").to_pylist(), dtype=object)[rows]
    seen: set[tuple[int, str]] = set()
    is_first = []
    for target in zip(tables.image_rows[rows].tolist(), names.tolist(), strict=True):
        is_first.append(target not in seen)
        seen.add(target)
    rows = np.array(list(compress(rows, is_first)), dtype=np.int64)
    if len(rows) > most:
        rows = rows[np.linspace(0, len(rows) - 1, most).round().astype(np.int64)]
    if not len(rows):
        return None
    modalities = tables.images.data.column("modality").to_pylist()
    labels, features = [], []
    for row in rows.tolist():
        sample = tables.samples[row]
        labels.append(label_of(sample["target_name"], modalities[int(tables.image_rows[row])]))
        features.append(torch.tensor(sample["roi_feature"]))
    return RoiIndex(torch.stack(features).half(), labels, tables.encoder_id)


def label_of(target_name: str, modality: str) -> str:
    """What the index says of a region."""
    return f"{target_name}, {modality}"


def has_feature(tables: Tables, rows: np.ndarray) -> np.ndarray:
    """bool, for each of these rows of the samples: whether it has a ROI feature."""
    return tables.samples.data.column("roi_feature").is_valid().to_numpy(zero_copy_only=False)[rows]
