"""Phantoms: deterministic, fresh for every split and seed, with masks that fit their image; and their files."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vitalrt.errors import VitalError
from vitalrt_training.data.modalities import CATALOG, KINDS
from vitalrt_training.data.phantom import MODALITIES, SPLITS, ask, draw_phantom, write_phantoms


def digest(image: np.ndarray) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


@pytest.mark.parametrize("modality", MODALITIES)
def test_same_arguments_same_phantom(modality):
    a, b = (draw_phantom("train", 3, 11, modality) for _ in range(2))
    assert np.array_equal(a.image, b.image)
    assert [t.name for t in a.targets] == [t.name for t in b.targets]
    assert all(np.array_equal(s.mask, t.mask) for s, t in zip(a.targets, b.targets, strict=True))
    assert ask(a) == ask(b)


def test_splits_seeds_and_indices_never_share_an_image():
    drawn = [digest(draw_phantom(split, seed, i).image) for split in SPLITS for seed in range(3) for i in range(20)]
    assert len(set(drawn)) == len(drawn)


def test_all_modalities_are_drawn_about_equally_often():
    names = [draw_phantom("train", 0, i).modality for i in range(450)]
    assert all(25 <= names.count(modality) <= 80 for modality in MODALITIES)


@pytest.mark.parametrize("modality", MODALITIES)
def test_images_and_masks(modality):
    for index in range(40):
        phantom = draw_phantom("train", 1, index, modality)
        height, width = phantom.image.shape[:2]
        assert phantom.image.dtype == np.uint8 and phantom.image.shape[2] == 3
        assert all(128 <= side <= 192 for side in (height, width))
        assert {target.name for target in phantom.targets} <= {kind.name for kind in CATALOG[modality].kinds}
        for target in phantom.targets:
            assert target.mask.shape == (height, width) and target.mask.dtype == bool
            assert target.type == KINDS[target.name].type
            border = target.mask[[0, -1]].any() or target.mask[:, [0, -1]].any()
            assert not border
            assert 2 * np.sqrt(target.mask.sum() / np.pi) >= 0.12 * min(height, width)
        if phantom.layout == "spread" and phantom.targets:
            assert np.sum([target.mask for target in phantom.targets], axis=0).max() == 1


@pytest.mark.parametrize("modality", MODALITIES)
def test_targets_stand_out_from_what_surrounds_them(modality):
    for index in range(30):
        phantom = draw_phantom("train", 2, index, modality)
        image = phantom.image.astype(float)
        anything = np.any([target.mask for target in phantom.targets], axis=0)
        for target in phantom.targets if phantom.layout == "spread" else ():
            rows, columns = (np.flatnonzero(target.mask.any(axis=axis)) for axis in (1, 0))
            box = slice(rows[0] - 3, rows[-1] + 4), slice(columns[0] - 3, columns[-1] + 4)
            inside, around = image[box][target.mask[box]], image[box][~anything[box]]
            # Mean colour, or how much it varies (a ring with a dark core has the mean of what surrounds it).
            contrast = np.abs(inside.mean(axis=0) - around.mean(axis=0)).max()
            unevenness = inside.std(axis=0).max() - around.std(axis=0).max()
            assert max(contrast, unevenness) > 20, (target.name, index)


def test_each_kind_is_in_half_of_its_modalitys_phantoms():
    for modality in MODALITIES:
        shown = [{t.name for t in draw_phantom("train", 4, i, modality).targets} for i in range(200)]
        for kind in CATALOG[modality].kinds:
            assert 0.35 < np.mean([kind.name in names for names in shown]) < 0.65


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("dev", 0, 0), "split"),
        (("train", 0, 0, "pet"), "modality"),
        (("train", -1, 0), "seed"),
        (("train", 0, -1), "index"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(VitalError, match=named):
        draw_phantom(*arguments)


def test_written_files_hold_what_was_drawn(tmp_path):
    out = tmp_path / "phantoms"
    write_phantoms(out, {"validation": 6}, 5)
    images = pq.read_table(out / "images.parquet").to_pylist()
    samples = pq.read_table(out / "samples.parquet").to_pylist()
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(images) == 6 and len(samples) == len(lines)
    position = 0
    for index, row in enumerate(images):
        phantom = draw_phantom("validation", 5, index)
        assert (row["modality"], row["split"], row["source"]) == (phantom.modality, "validation", "phantom")
        assert np.array_equal(np.asarray(Image.open(out / row["path"])), phantom.image)
        assert hashlib.sha256((out / row["path"]).read_bytes()).hexdigest() == row["sha256"]
        masks = sorted((out / "masks").glob(f"validation-{index:06d}_*.png"))
        for path, target in zip(masks, phantom.targets, strict=True):
            assert np.array_equal(np.asarray(Image.open(path)) > 0, target.mask)
        for sample in ask(phantom):
            written, line = samples[position], lines[position]
            for key in ("question", "answer", "question_type", "target_name", "target_type"):
                assert written[key] == line[key] == getattr(sample, key)
            assert tuple(written["chain"]) == sample.chain
            assert written["image_id"] == row["id"] and line["image"] == row["path"]
            assert written["roi_feature"] is written["global_feature"] is written["encoder_id"] is None
            position += 1
    assert position == len(samples)
    assert len({row["id"] for row in samples}) == len(samples)


def test_a_directory_with_content_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(VitalError, match="out_dir"):
        write_phantoms(tmp_path, {"train": 1}, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failed_run_leaves_nothing_behind(tmp_path):
    out = tmp_path / "phantoms"
    with pytest.raises(VitalError, match="split"):
        write_phantoms(out, {"dev": 2}, 0)
    with pytest.raises(VitalError, match="count"):
        write_phantoms(out, {"train": 0}, 0)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_directory_is_filled(tmp_path):
    out = tmp_path / "phantoms"
    out.mkdir()
    write_phantoms(out, {"train": 1}, 0)
    assert (out / "samples.jsonl").stat().st_size > 0
