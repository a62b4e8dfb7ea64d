"""The two tables: what they hold, what is refused, in which order samples come, and their feature columns."""

from __future__ import annotations

import io
import os
import shutil
from itertools import chain, islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from vitalrt.errors import VitalError
from vitalrt.model.vision_encoder import VisionEncoder
from vitalrt_training.data import roi_columns
from vitalrt_training.data.phantom import ask, draw_phantom, write_phantoms
from vitalrt_training.data.roi import phantom_roi_feature
from vitalrt_training.data.roi_columns import add_roi_features
from vitalrt_training.data.tables import IMAGES_SCHEMA, SAMPLES_SCHEMA, ShuffledSampler, load_tables, write_rows

PIXELS = np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype(np.uint8)


def png_bytes():
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    return file.getvalue()


def image_row(number, **changes):
    row = {name: "x" for name in IMAGES_SCHEMA.names} | {
        "id": f"i{number}",
        "split": "train",
        "volume_id": f"v{number}",
    }
    return row | {"path": None, "bytes": png_bytes()} | changes


def sample_row(number, **changes):
    row = {name: "x" for name in SAMPLES_SCHEMA.names} | {"id": f"s{number}", "image_id": "i0"}
    features = {"roi_feature": None, "global_feature": None, "encoder_id": None}
    return row | {"chain": ["a step"] * (number % 5)} | features | changes


def write(directory, images, samples):
    write_rows(directory / "images.parquet", images, IMAGES_SCHEMA)
    write_rows(directory / "samples.parquet", samples, SAMPLES_SCHEMA)


def load(directory):
    return load_tables(directory, cache_dir=directory / "cache")


def test_rows_come_back_as_written(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    roi = (np.ones(4) / 2).astype(np.float32)
    images = [image_row(0), image_row(1, path="a.png", bytes=None, split="test")]
    samples = [sample_row(0), sample_row(1, image_id="i1", roi_feature=roi.tolist(), encoder_id="e"), sample_row(2)]
    write(tmp_path, images, samples)
    tables = load(tmp_path)
    assert list(tables.images) == images and list(tables.samples) == samples
    assert tables.image_rows.tolist() == [0, 1, 0] and tables.num_steps.tolist() == [0, 1, 2]
    assert all(np.array_equal(tables.read_picture(row), PIXELS) for row in range(3))
    assert tables.samples.cache_files  # on disk and memory-mapped, not in memory


def test_selection_by_split_and_number_of_steps(tmp_path):
    images = [image_row(0), image_row(1, split="validation"), image_row(2, split="test")]
    samples = [sample_row(number, image_id=f"i{number % 3}") for number in range(30)]
    write(tmp_path, images, samples)
    tables = load(tmp_path)
    for split, image in (("train", 0), ("validation", 1), ("test", 2)):
        assert tables.select(split).tolist() == [n for n in range(30) if n % 3 == image]
        for most in range(5):
            expected = [n for n in range(30) if n % 3 == image and n % 5 <= most]
            assert tables.select(split, max_steps=most).tolist() == expected
    with pytest.raises(VitalError, match="split"):
        tables.select("dev")


UNIT = [0.6, 0.8]
BAD_SAMPLES = {
    "no image of images.parquet is 'i9'": [{"image_id": "i9"}],
    "'s0' comes twice": [{}, {"id": "s0"}],
    "chain of 's1': expected a value": [{}, {"chain": None}],
    "chain of 's1': expected text in every step": [{}, {"chain": ["a step", None]}],
    "question of 's0': expected a value": [{"question": None}],
    "expected unit norm, got 1.414": [{"roi_feature": [1.0, 1.0], "encoder_id": "e"}],
    "expected unit norm, got nan": [{"global_feature": [1.0, float("nan")], "encoder_id": "e"}],
    "roi_feature of 's1': expected 2 values as before, got 1": [
        {"roi_feature": UNIT, "encoder_id": "e"},
        {"roi_feature": [1.0], "encoder_id": "e"},
    ],
    "global_feature of 's1': expected 2 values": [
        {"roi_feature": UNIT, "encoder_id": "e"},
        {"global_feature": [1.0], "encoder_id": "e"},
    ],
    "features of one encoder": [{"roi_feature": UNIT, "encoder_id": "e"}, {"roi_feature": UNIT, "encoder_id": "f"}],
    "roi_feature of 's0': expected an encoder_id": [{"roi_feature": UNIT}],
}
BAD_IMAGES = {
    "'i0' comes twice": [{}, {"id": "i0"}],
    "split of 'i0': expected one of": [{"split": "dev"}],
    "'v0' is in 'train' and with 'i1' in 'test'": [{}, {"volume_id": "v0", "split": "test"}],
    "either path or bytes, got 2": [{"path": "a.png"}],
    "either path or bytes, got 0": [{"bytes": None}],
    "expected one inside the folder": [{"path": "../a.png", "bytes": None}],
    "volume_id of 'i1': expected a value": [{}, {"volume_id": None}],
}


@pytest.mark.parametrize("message", BAD_SAMPLES)
def test_bad_samples_are_named(tmp_path, message):
    write(tmp_path, [image_row(0)], [sample_row(n, **changes) for n, changes in enumerate(BAD_SAMPLES[message])])
    with pytest.raises(VitalError, match=message) as raised:
        load(tmp_path)
    assert str(raised.value).startswith("samples: ") and "\n" not in str(raised.value)


@pytest.mark.parametrize("message", BAD_IMAGES)
def test_bad_images_are_named(tmp_path, message):
    write(tmp_path, [image_row(n, **changes) for n, changes in enumerate(BAD_IMAGES[message])], [sample_row(0)])
    with pytest.raises(VitalError, match=message) as raised:
        load(tmp_path)
    assert str(raised.value).startswith("images: ") and "\n" not in str(raised.value)


@pytest.mark.parametrize("table", ["images", "samples"])
def test_missing_files_and_columns_and_wrong_types_are_named(tmp_path, table):
    write(tmp_path, [image_row(0)], [sample_row(0)])
    path = tmp_path / f"{table}.parquet"
    whole = pq.read_table(path)
    for name in whole.column_names:
        if name not in ("path", "bytes"):
            pq.write_table(whole.drop_columns(name), path)
            with pytest.raises(VitalError, match=rf"{table}.parquet: expected a column '{name}'"):
                load(tmp_path)
        numbers = pa.array([7] * len(whole))
        pq.write_table(whole.set_column(whole.column_names.index(name), name, numbers), path)
        with pytest.raises(VitalError, match=rf"{table}.parquet: column '{name}': expected .*, got int64"):
            load(tmp_path)
    path.write_text("not a table")
    with pytest.raises(VitalError, match=f"{table}.parquet: expected a Parquet file"):
        load(tmp_path)
    path.unlink()
    with pytest.raises(VitalError, match=f"expected {table}.parquet"):
        load(tmp_path)


def test_tables_of_other_writers_are_read(tmp_path):
    """Null columns without a type, wide offsets and doubles, one of path and bytes, more columns than ours."""
    images = pa.Table.from_pylist([image_row(0)]).drop_columns("path").append_column("more", pa.array([1]))
    samples = pa.Table.from_pylist([sample_row(1, roi_feature=UNIT, encoder_id="e")])
    wide = {"chain": pa.large_list(pa.large_string()), "roi_feature": pa.list_(pa.float64(), 2)}
    for name, kind in wide.items():
        samples = samples.set_column(samples.column_names.index(name), name, samples[name].cast(kind))
    assert pa.types.is_null(samples.schema.field("global_feature").type)
    pq.write_table(images, tmp_path / "images.parquet")
    pq.write_table(samples, tmp_path / "samples.parquet")
    tables = load(tmp_path)
    assert "more" not in tables.images.column_names
    assert tables.samples[0]["chain"] == ["a step"] and tables.samples[0]["global_feature"] is None
    np.testing.assert_allclose(tables.samples[0]["roi_feature"], UNIT)
    assert np.array_equal(tables.read_picture(0), PIXELS)


def test_a_value_that_is_no_column_is_refused_and_the_old_table_kept(tmp_path):
    path = tmp_path / "images.parquet"
    write_rows(path, [image_row(0)], IMAGES_SCHEMA)
    with pytest.raises(VitalError, match="patient"):
        write_rows(path, (image_row(n, **({"patient": "x"} if n == 3000 else {})) for n in range(4000)), IMAGES_SCHEMA)
    assert os.listdir(tmp_path) == ["images.parquet"] and pq.read_metadata(path).num_rows == 1


@given(st.integers(1, 40), st.integers(0, 3), st.lists(st.integers(1, 25), max_size=6))
def test_a_sampler_goes_on_from_any_position(num_rows, seed, pauses):
    rows = np.arange(num_rows) * 3
    uninterrupted = ShuffledSampler(rows, seed)
    epochs = [list(uninterrupted) for _ in range(sum(pauses) // num_rows + 1)]
    taken, sampler = [], ShuffledSampler(rows, seed)
    for end in np.cumsum(pauses):
        while len(taken) < end:  # an iterator ends with its epoch
            taken += islice(sampler, int(end) - len(taken))
        state, sampler = sampler.state_dict(), ShuffledSampler(rows, seed)
        sampler.load_state_dict(state)
    assert taken == list(chain.from_iterable(epochs))[: len(taken)]
    assert all(sorted(epoch) == rows.tolist() for epoch in epochs)


def test_a_samplers_order_follows_seed_and_epoch():
    orders = []
    for seed in (0, 1):
        sampler = ShuffledSampler(np.arange(50), seed)
        orders += [list(sampler), list(sampler)]
    assert len({tuple(order) for order in orders}) == 4
    assert (sampler.epoch, sampler.index, len(sampler)) == (2, 0, 50)


def test_a_samplers_state_counts_what_was_handed_out():
    sampler = ShuffledSampler(np.arange(10), seed=0)
    drawn = iter(sampler)
    first = [next(drawn) for _ in range(4)]
    resumed = ShuffledSampler(np.arange(10), seed=0)
    resumed.load_state_dict(sampler.state_dict())
    assert len(resumed) == 6 and sorted(first + list(resumed)) == list(range(10))
    for other in (ShuffledSampler(np.arange(10), seed=1), ShuffledSampler(np.arange(11), seed=0)):
        with pytest.raises(VitalError, match="state"):
            other.load_state_dict(sampler.state_dict())


@pytest.fixture(scope="module")
def encoder_dir(tmp_path_factory):
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("encoder")
    config = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    SiglipVisionModel(config).save_pretrained(directory)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("phantoms") / "train"
    write_phantoms(directory, {"train": 12}, 0)
    return directory


@pytest.fixture
def phantoms(written, tmp_path):
    return shutil.copytree(written, tmp_path / "phantoms")


def test_feature_columns_of_phantoms(phantoms, encoder_dir, monkeypatch):
    monkeypatch.setattr(roi_columns, "SAMPLES_PER_SHARD", 30)  # cuts through an image's samples
    before = pq.read_table(phantoms / "samples.parquet").to_pylist()
    add_roi_features(phantoms, encoder_dir, batch_size=5)
    tables = load(phantoms)
    encoder = VisionEncoder(encoder_dir)
    boxes = {row["sample_id"]: row for row in pq.read_table(phantoms / "roi.parquet").to_pylist()}
    row = missing = 0
    for index in range(12):
        phantom = draw_phantom("train", 0, index)
        for sample in ask(phantom):
            filled = tables.samples[row]
            kept = {name: value for name, value in filled.items() if name not in before[row] or before[row][name]}
            assert kept == {name: value for name, value in before[row].items() if value}
            roi = phantom_roi_feature(encoder, phantom, sample)
            assert filled["encoder_id"] == encoder.id
            assert (filled["roi_feature"] is None) == (roi is None) == (filled["id"] not in boxes)
            if roi is None:
                missing += 1
            else:
                np.testing.assert_allclose(filled["roi_feature"], roi.feature, rtol=1e-4, atol=1e-5)
                box = boxes[filled["id"]]
                assert tuple(box["box"]) == roi.box and len(box["top_rows"]) == 5
            np.testing.assert_allclose(np.linalg.norm(filled["global_feature"]), 1, rtol=1e-5)
            row += 1
    assert row == len(tables.samples) and missing
    assert not list(phantoms.glob(".roi*"))


def test_features_broken_off_go_on_and_leave_the_table_alone(phantoms, encoder_dir, monkeypatch):
    monkeypatch.setattr(roi_columns, "SAMPLES_PER_SHARD", 20)
    whole = shutil.copytree(phantoms, phantoms.with_name("whole"))
    add_roi_features(whole, encoder_dir)
    fill, calls = roi_columns._fill, []

    def fail_at_the_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fill(*arguments)

    monkeypatch.setattr(roi_columns, "_fill", fail_at_the_third)
    before = (phantoms / "samples.parquet").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        add_roi_features(phantoms, encoder_dir)
    assert (phantoms / "samples.parquet").read_bytes() == before
    add_roi_features(phantoms, encoder_dir)
    num_shards = -(-pq.read_metadata(phantoms / "samples.parquet").num_rows // 20)
    assert len(calls) == num_shards + 1  # two done before, one tried twice
    for name in ("samples.parquet", "roi.parquet"):
        assert pq.read_table(phantoms / name).equals(pq.read_table(whole / name))


def test_features_need_masks(phantoms, encoder_dir):
    shutil.rmtree(phantoms / "masks")
    with pytest.raises(VitalError, match="masks"):
        add_roi_features(phantoms, encoder_dir)
