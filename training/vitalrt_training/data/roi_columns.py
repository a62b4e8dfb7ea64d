"""Fills the feature columns of `samples`, from masks that lie beside the pictures.

DIR/masks/STEM_NUMBER_NAME.png   nonzero inside; all files of a name together are the target of that name
    STEM: the picture's file name without its ending, or the image's id where `images` holds bytes
    NAME: target_name with "+" for spaces
DIR/roi.parquet                  what else is known of each ROI: the box that was encoded, and its top patches
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from vitalrt.errors import VitalError
from vitalrt.model.vision_encoder import PatchEncoder, open_encoder
from vitalrt_training.data.roi import RoiFeature, global_features, roi_features
from vitalrt_training.data.tables import SAMPLES_SCHEMA, load_tables, read_picture, write_rows
from vitalrt_training.run_files import replacing

ROI_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("encoder_id", pa.string()),
        ("box", pa.list_(pa.int32())),
        ("top_rows", pa.list_(pa.int32())),
        ("top_columns", pa.list_(pa.int32())),
        ("top_cosines", pa.list_(pa.float32())),
    ]
)
"""A row per sample with a ROI feature; see RoiFeature."""
SAMPLES_PER_SHARD = 256
MASK_NAME = re.compile(r"(?P<stem>.+)_\d+_(?P<name>.+)\.png")


def add_roi_features(
    table_dir: str | os.PathLike[str],
    encoder_dir: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    batch_size: int = 32,
) -> None:
    """Write roi_feature, global_feature and encoder_id into samples.parquet, and roi.parquet beside it.

    The ROI feature of a sample without a mask for its target stays null. samples.parquet is replaced at the end, whole;
    a call that breaks off leaves finished shards in a hidden folder, from which the next call for the same samples and
    encoder goes on.  Raises VitalError where the tables or masks cannot be used, CheckpointError on the encoder.
    """
    folder = Path(table_dir)
    samples_path = folder / "samples.parquet"
    for path, exists in ((samples_path, samples_path.is_file()), (folder / "masks", (folder / "masks").is_dir())):
        if not exists:
            raise VitalError(f"table_dir: expected {path.name} in {folder}, found none")
    encoder = open_encoder(encoder_dir, device)
    with samples_path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    shards = folder / f".roi-{encoder.id}-{digest[:16]}"
    tables = load_tables(folder, cache_dir=shards / "cache")
    files = list_masks(folder)
    starts = range(0, len(tables.samples), SAMPLES_PER_SHARD)
    for start in track(starts, "ROI features", console=Console(stderr=True)):
        shard = shards / f"{start:09d}.parquet"
        if not shard.is_file():
            rows = range(start, min(start + SAMPLES_PER_SHARD, len(tables.samples)))
            images = {row: tables.images[int(tables.image_rows[row])] for row in rows}
            samples = [tables.samples[row] for row in rows]
            filled, found = _fill(folder, files, encoder, samples, list(images.values()), batch_size)
            write_rows(shard.with_suffix(".roi"), found, ROI_SCHEMA)
            write_rows(shard, filled, SAMPLES_SCHEMA)
    # roi.parquet first: a reader of the new samples must find their boxes.
    _join(sorted(shards.glob("*.roi")), folder / "roi.parquet", ROI_SCHEMA)
    _join(sorted(shards.glob("*.parquet")), samples_path, SAMPLES_SCHEMA)
    shutil.rmtree(shards)


def list_masks(folder: Path) -> dict[tuple[str, str], list[Path]]:
    """The mask files by STEM and target name."""
    found: defaultdict[tuple[str, str], list[Path]] = defaultdict(list)
    for path in sorted((folder / "masks").iterdir()):
        if match := MASK_NAME.fullmatch(path.name):
            found[match["stem"], match["name"].replace("+", " ")].append(path)
    return dict(found)


def read_mask(files: Mapping[tuple[str, str], list[Path]], image: Mapping[str, Any], name: str) -> np.ndarray | None:
    """bool [H, W]: the union of an image's masks of a target, None where there are none.

    files: of list_masks.  image: a row of `images`.
    """
    stem = image["id"] if image.get("path") is None else Path(image["path"]).stem
    masks = [np.asarray(Image.open(path).convert("L")) > 0 for path in files.get((stem, name), ())]
    return np.logical_or.reduce(masks) if masks else None


def _fill(
    folder: Path,
    files: Mapping[tuple[str, str], list[Path]],
    encoder: PatchEncoder,
    samples: list[dict[str, Any]],
    images: list[dict[str, Any]],
    batch_size: int,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the samples with their features, and the rows of roi.parquet. images: one for each sample.

    A picture is read and encoded once, and so is each of its targets, however many questions there are.
    """
    by_id = {image["id"]: image for image in images}
    pictures = {image_id: read_picture(folder, image) for image_id, image in by_id.items()}
    whole = dict(zip(pictures, global_features(encoder, list(pictures.values()), batch_size), strict=True))
    targets = dict.fromkeys((sample["image_id"], sample["target_name"]) for sample in samples)
    masks = {target: read_mask(files, by_id[target[0]], target[1]) for target in targets}
    shown = {target: mask for target, mask in masks.items() if mask is not None and mask.any()}
    found = roi_features(encoder, [(pictures[image_id], mask) for (image_id, _), mask in shown.items()], batch_size)
    by_target = dict(zip(shown, found, strict=True))
    filled, rois = [], []
    for sample in samples:
        roi = by_target.get((sample["image_id"], sample["target_name"]))
        features = {
            "roi_feature": None if roi is None else roi.feature,
            "global_feature": whole[sample["image_id"]].numpy(),
            "encoder_id": encoder.id,
        }
        filled.append(sample | features)
        if roi is not None:
            rois.append(_roi_row(sample["id"], encoder.id, roi))
    return filled, rois


def _roi_row(sample_id: str, encoder_id: str, roi: RoiFeature) -> dict[str, Any]:
    return {
        "sample_id": sample_id,
        "encoder_id": encoder_id,
        "box": roi.box,
        "top_rows": [patch.row for patch in roi.top_patches],
        "top_columns": [patch.column for patch in roi.top_patches],
        "top_cosines": [patch.cosine for patch in roi.top_patches],
    }


def _join(shards: list[Path], path: Path, schema: pa.Schema) -> None:
    with replacing(path) as partial, pq.ParquetWriter(partial, schema) as writer:
        for shard in shards:
            writer.write_table(pq.read_table(shard, schema=schema))
