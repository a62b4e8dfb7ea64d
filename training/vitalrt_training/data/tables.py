"""The contract of all training data: two Parquet tables in one folder, `images` and `samples`.

DIR/images.parquet     a row per picture; `path` is relative to DIR, or `bytes` holds the file itself
DIR/samples.parquet    a row per question; `image_id` names its picture
DIR/masks/             optional, see roi_columns.py

tables = load_tables(directory)
rows = tables.select("train", max_steps=2)
sampler = ShuffledSampler(rows, seed=0)
for row in sampler:
    sample, pixels = tables.samples[row], tables.read_picture(row)
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from torch.utils.data import Sampler

from vitalrt.errors import VitalError
from vitalrt.inputs.image import read_image
from vitalrt_training.data.records import SPLITS
from vitalrt_training.run_files import replacing

if TYPE_CHECKING:
    from datasets import Dataset

IMAGES_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("path", pa.string()),
        ("bytes", pa.binary()),
        ("sha256", pa.string()),
        ("modality", pa.string()),
        ("source", pa.string()),
        ("split", pa.string()),
        ("volume_id", pa.string()),
    ]
)
SAMPLES_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image_id", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("question_type", pa.string()),
        ("target_name", pa.string()),
        ("target_type", pa.string()),
        ("chain", pa.list_(pa.string())),
        ("roi_feature", pa.list_(pa.float32())),
        ("global_feature", pa.list_(pa.float32())),
        ("encoder_id", pa.string()),
        ("provenance", pa.string()),
    ]
)
NULLABLE = frozenset({"path", "bytes", "roi_feature", "global_feature", "encoder_id"})
"""Columns that may be null; of path and bytes exactly one is, and a table may lack the other."""
NORM_TOLERANCE = 1e-3
ROWS_PER_GROUP = 1024


@dataclass(frozen=True)
class Tables:
    """Both tables, memory-mapped; what is held in memory is a few numbers per row.

    images, samples: HF datasets with the columns of the schemas.  image_rows: int64, the row in `images` of each
    sample's picture.  num_steps: int64, K of each sample.  splits: of each sample, as a place in SPLITS.
    encoder_id: whose features the table holds; "" where it has none.
    """

    directory: Path
    images: Dataset
    samples: Dataset
    image_rows: np.ndarray
    num_steps: np.ndarray
    splits: np.ndarray
    encoder_id: str

    def select(self, split: str, max_steps: int | None = None) -> np.ndarray:
        """Rows of the samples of a split, those with K <= max_steps where that is given."""
        if split not in SPLITS:
            raise VitalError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        chosen = self.splits == SPLITS.index(split)
        if max_steps is not None:
            chosen &= self.num_steps <= max_steps
        return np.flatnonzero(chosen)

    def read_picture(self, row: int) -> np.ndarray:
        """The picture of a sample: uint8 RGB [H, W, 3].  Raises InputError where the file cannot be read."""
        return read_picture(self.directory, self.images[int(self.image_rows[row])])


def read_picture(directory: Path, image: Mapping[str, Any]) -> np.ndarray:
    """image: a row of `images`.  uint8 RGB [H, W, 3]."""
    path = image.get("path")
    return read_image(directory / path if path is not None else image["bytes"])


def load_tables(directory: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None) -> Tables:
    """Open and check both tables.

    cache_dir: where the memory-mapped copies are kept; HF datasets' own place where None.
    Raises VitalError naming table, column and row where the contract is broken.
    """
    folder = Path(directory)
    images = _open(folder / "images.parquet", IMAGES_SCHEMA, cache_dir, optional=("path", "bytes"))
    samples = _open(folder / "samples.parquet", SAMPLES_SCHEMA, cache_dir)
    row_of_id, image_splits = _check_images(images)
    image_rows, num_steps, encoder_id = _check_samples(samples, row_of_id)
    return Tables(folder, images, samples, image_rows, num_steps, image_splits[image_rows], encoder_id)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Write a table row by row; `path` is replaced at the end.  Missing values are null.

    Raises VitalError on a value that is not a column.
    """
    with replacing(path) as partial, pq.ParquetWriter(partial, schema) as writer:
        remaining = iter(rows)
        while group := list(islice(remaining, ROWS_PER_GROUP)):
            if unknown := set().union(*group) - set(schema.names):
                raise VitalError(f"{path.name}: expected columns {schema.names}, got {sorted(unknown)} as well")
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


class ShuffledSampler(Sampler[int]):
    """Rows in an order that is a function of (seed, epoch); goes on from any position.

    Iterating gives what is left of the current epoch and then stands at the start of the next. A position counts rows
    handed out: a loader that reads ahead has to save the position of what it has delivered.
    """

    def __init__(self, rows: np.ndarray, seed: int) -> None:
        self.rows = np.asarray(rows, dtype=np.int64)
        self.seed = seed
        self.epoch = 0
        self.index = 0

    def __len__(self) -> int:
        """Rows left in the current epoch."""
        return len(self.rows) - self.index

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.rows))
        while self.index < len(order):
            row = int(self.rows[order[self.index]])
            self.index += 1
            yield row
        self.epoch, self.index = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int | str]:
        return {"seed": self.seed, "rows": self._digest(), "epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises VitalError where the state is of another seed or other rows."""
        if (state["seed"], state["rows"]) != (self.seed, self._digest()):
            raise VitalError(f"state: expected that of seed {self.seed} and these {len(self.rows)} rows, got another's")
        self.epoch, self.index = int(state["epoch"]), int(state["index"])

    def _digest(self) -> str:
        return hashlib.sha256(self.rows.tobytes()).hexdigest()


def _open(
    path: Path, schema: pa.Schema, cache_dir: str | os.PathLike[str] | None, optional: tuple[str, ...] = ()
) -> Dataset:
    """The columns of `schema`, cast to its types.  Raises VitalError where columns are missing or of another kind."""
    try:
        from datasets import Dataset, Features
    except ModuleNotFoundError as error:
        raise VitalError("load_tables needs HF datasets: pip install 'vitalrt[train]'") from error
    if not path.is_file():
        raise VitalError(f"directory: expected {path.name} in {path.parent}, found none")
    try:
        found = pq.read_schema(path)
    except pa.ArrowInvalid as error:
        raise VitalError(f"{path.name}: expected a Parquet file, got something else in {path.parent}") from error
    for wanted in schema:
        if wanted.name in found.names:
            kind = found.field(wanted.name).type
            if not _fits(kind, wanted.type) and not (wanted.name in NULLABLE and pa.types.is_null(kind)):
                raise VitalError(f"{path.name}: column {wanted.name!r}: expected {wanted.type}, got {kind}")
        elif wanted.name not in optional:
            raise VitalError(f"{path.name}: expected a column {wanted.name!r}, found only {found.names}")
    held = pa.schema([field for field in schema if field.name in found.names])
    cache = None if cache_dir is None else os.fspath(cache_dir)
    features = Features.from_arrow_schema(held)
    return Dataset.from_parquet(os.fspath(path), features=features, columns=held.names, cache_dir=cache)


def _fits(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether a column can be read as the wanted type; writers differ in widths of offsets and numbers."""
    kinds = pa.types
    if kinds.is_list(wanted):
        is_list = kinds.is_list(found) or kinds.is_large_list(found) or kinds.is_fixed_size_list(found)
        return is_list and _fits(found.value_type, wanted.value_type)
    if kinds.is_string(wanted):
        return kinds.is_string(found) or kinds.is_large_string(found)
    if kinds.is_binary(wanted):
        return kinds.is_binary(found) or kinds.is_large_binary(found)
    return kinds.is_floating(found)


def _check_images(images: Dataset) -> tuple[dict[str, int], np.ndarray]:
    """Returns the row of each id and the split of each row, as a place in SPLITS."""
    row_of_id: dict[str, int] = {}
    split_of_volume: dict[str, str] = {}
    splits: list[int] = []
    for batch in _batches("images", images):
        content = [_is_valid(batch[name]) for name in ("path", "bytes") if name in batch.schema.names]
        filled = np.sum([np.zeros(len(batch)), *content], axis=0)
        columns = (batch[name].to_pylist() for name in ("id", "split", "volume_id"))
        for image_id, split, volume, number in zip(*columns, filled, strict=True):
            if image_id in row_of_id:
                raise VitalError(f"images: expected ids to be unique, {image_id!r} comes twice")
            if split not in SPLITS:
                raise VitalError(f"images: split of {image_id!r}: expected one of {SPLITS}, got {split!r}")
            first = split_of_volume.setdefault(volume, split)
            if first != split:
                raise VitalError(
                    f"images: expected each volume in one split, {volume!r} is in {first!r} and with {image_id!r} "
                    f"in {split!r}"
                )
            if number != 1:
                raise VitalError(f"images: {image_id!r}: expected either path or bytes, got {number:.0f} of them")
            row_of_id[image_id] = len(splits)
            splits.append(SPLITS.index(split))
        if "path" in batch.schema.names:
            for image_id, place in zip(batch["id"].to_pylist(), batch["path"].to_pylist(), strict=True):
                if place is not None and (PurePosixPath(place).is_absolute() or ".." in PurePosixPath(place).parts):
                    raise VitalError(f"images: path of {image_id!r}: expected one inside the folder, got {place!r}")
    return row_of_id, np.array(splits, dtype=np.int64)


def _check_samples(samples: Dataset, row_of_id: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray, str]:
    """Returns the image row and the number of steps of each sample, and the encoder. row_of_id: of the images."""
    seen: set[str] = set()
    encoders: set[str] = set()
    image_rows: list[int] = []
    num_steps = [np.empty(0, np.int64)]
    width: int | None = None
    for batch in _batches("samples", samples):
        for sample_id, image_id in zip(batch["id"].to_pylist(), batch["image_id"].to_pylist(), strict=True):
            if sample_id in seen:
                raise VitalError(f"samples: expected ids to be unique, {sample_id!r} comes twice")
            if image_id not in row_of_id:
                raise VitalError(f"samples: image_id of {sample_id!r}: no image of images.parquet is {image_id!r}")
            seen.add(sample_id)
            image_rows.append(row_of_id[image_id])
        if batch["chain"].flatten().null_count:
            broken = next(row for row, steps in enumerate(batch["chain"].to_pylist()) if None in steps)
            raise VitalError(
                f"samples: chain of {batch['id'][broken].as_py()!r}: expected text in every step, got null"
            )
        num_steps.append(pc.list_value_length(batch["chain"]).to_numpy(zero_copy_only=False).astype(np.int64))
        for name in ("roi_feature", "global_feature"):
            width = _check_features(batch, name, width)
        encoders.update(batch["encoder_id"].drop_null().to_pylist())
        if len(encoders) > 1:
            raise VitalError(f"samples: expected the features of one encoder, got those of {sorted(encoders)}")
    return np.array(image_rows, dtype=np.int64), np.concatenate(num_steps), next(iter(encoders), "")


def _check_features(batch: pa.RecordBatch, name: str, width: int | None) -> int | None:
    """Returns the width of all features so far, None as long as there are none."""
    column = batch[name]
    present = np.flatnonzero(_is_valid(column))
    if not len(present):
        return width

    def refuse(where: np.ndarray, trouble: str) -> None:
        raise VitalError(f"samples: {name} of {batch['id'][int(present[where][0])].as_py()!r}: {trouble}")

    widths = pc.list_value_length(column).to_numpy(zero_copy_only=False)[present]
    width = int(widths[0]) if width is None else width
    if (other := widths != width).any():
        refuse(other, f"expected {width} values as before, got {widths[other][0]:.0f}")
    # flatten skips what lies under nulls, so these are the values of `present`.
    values = column.flatten().to_numpy(zero_copy_only=False).reshape(len(present), width)
    norms = np.linalg.norm(values.astype(np.float64), axis=1)
    off = ~(np.abs(norms - 1) <= NORM_TOLERANCE)  # written so that NaN counts as off
    if off.any():
        refuse(off, f"expected unit norm, got {norms[off][0]:.4g}")
    unnamed = ~_is_valid(batch["encoder_id"])[present]
    if unnamed.any():
        refuse(unnamed, "expected an encoder_id beside it, got null")
    return width


def _batches(name: str, table: Dataset) -> Iterator[pa.RecordBatch]:
    """A table a part at a time; raises VitalError on nulls where none may be."""
    for batch in table.data.to_batches(max_chunksize=ROWS_PER_GROUP):
        for column in batch.schema.names:
            if column not in NULLABLE and batch[column].null_count:
                row = int(np.flatnonzero(~_is_valid(batch[column]))[0])
                raise VitalError(f"{name}: {column} of {batch['id'][row].as_py()!r}: expected a value, got null")
        yield batch


def _is_valid(column: pa.Array) -> np.ndarray:
    return column.is_valid().to_numpy(zero_copy_only=False)
