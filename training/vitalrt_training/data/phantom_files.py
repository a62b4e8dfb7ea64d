"""Writes phantoms to disk: PNG images and masks, samples.jsonl and the tables `images` and `samples` as Parquet.

DIR/images/train-000017.png          RGB
DIR/masks/train-000017_0_liver.png   8-bit, 255 inside; one file per target, in the order of Phantom.targets
DIR/samples.jsonl                one sample a line, with the path of its image
DIR/images.parquet, DIR/samples.parquet
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from vitalrt.errors import VitalError
from vitalrt_training.data.drawing import draw_phantom
from vitalrt_training.data.questions import ask
from vitalrt_training.data.records import Phantom
from vitalrt_training.data.tables import IMAGES_SCHEMA, SAMPLES_SCHEMA, write_rows

SOURCE = "phantom"


def write_phantoms(out_dir: str | os.PathLike[str], counts: Mapping[str, int], seed: int) -> None:
    """Write phantoms 0 to count - 1 of every split, all or nothing: a run that breaks off leaves out_dir as it was.

    counts: by split.  The ROI columns of `samples` are null until features are computed.
    Raises VitalError when out_dir is not empty or a count is below 1, and as draw_phantom does.
    """
    out = Path(out_dir)
    for split, count in counts.items():
        if count < 1:
            raise VitalError(f"count: expected a number of {split} phantoms from 1 up, got {count}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise VitalError(f"out_dir: expected a new or an empty directory, got {out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        _write_all(building, counts, seed)
        building.chmod(0o755)
        # Renaming onto an empty directory replaces it.
        building.rename(out)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _write_all(root: Path, counts: Mapping[str, int], seed: int) -> None:
    (root / "images").mkdir()
    (root / "masks").mkdir()
    images: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    wanted = [(split, index) for split, count in counts.items() for index in range(count)]
    with (root / "samples.jsonl").open("w", encoding="utf-8") as lines:
        for split, index in track(wanted, "phantoms", console=Console(stderr=True)):
            phantom = draw_phantom(split, seed, index)
            image_row = _write_images(root, phantom)
            images.append(image_row)
            for number, sample in enumerate(ask(phantom)):
                row = asdict(sample) | {
                    "id": f"{image_row['id']}-{number}",
                    "image_id": image_row["id"],
                    "chain": list(sample.chain),
                    "provenance": f"phantom split={split} seed={seed} index={index}",
                }
                closed = row.pop("closed")
                samples.append(row)
                extra = {"image": image_row["path"], "modality": phantom.modality, "closed": closed}
                lines.write(json.dumps(row | extra) + "\n")
    write_rows(root / "images.parquet", images, IMAGES_SCHEMA)
    write_rows(root / "samples.parquet", samples, SAMPLES_SCHEMA)


def _write_images(root: Path, phantom: Phantom) -> dict[str, Any]:
    """Write image and masks; returns the row of the `images` table. Every phantom is a volume of its own."""
    stem = f"{phantom.split}-{phantom.index:06d}"
    path = f"images/{stem}.png"
    Image.fromarray(phantom.image).save(root / path)
    for number, target in enumerate(phantom.targets):
        name = f"{stem}_{number}_{target.name.replace(' ', '+')}.png"
        Image.fromarray(target.mask.astype(np.uint8) * 255).save(root / "masks" / name)
    phantom_id = f"phantom-{phantom.split}-{phantom.seed}-{phantom.index:06d}"
    return {
        "id": phantom_id,
        "path": path,
        "sha256": hashlib.sha256((root / path).read_bytes()).hexdigest(),
        "modality": phantom.modality,
        "source": SOURCE,
        "split": phantom.split,
        "volume_id": phantom_id,
    }
