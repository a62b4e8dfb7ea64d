"""The ROI rule against hand computations, with an encoder that is a table of colours and with real ones.

R, C rows and columns of the patch grid.
"""

from __future__ import annotations

import math
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionModel,
    Qwen3VLForConditionalGeneration,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipVisionModel,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import logging

from vitalrt.errors import CheckpointError, VitalError
from vitalrt.model.vision_encoder import VisionEncoder, open_encoder
from vitalrt_training.data.phantom import ask, draw_phantom
from vitalrt_training.data.roi import (
    global_features,
    phantom_roi_feature,
    phantom_roi_features,
    roi_features,
    square_crop,
)


class MeanColor:
    """Each patch's feature is its mean colour, d_v = 3; images are multiples of the grid. Keeps what it was given."""

    def __init__(self, rows=4, columns=4):
        self.grid = (rows, columns)
        self.seen = []

    def encode(self, images):
        self.seen += list(images)
        return torch.stack([self._means(image) for image in images])

    def _means(self, image):
        rows, columns = self.grid
        height, width = image.shape[:2]
        cells = torch.from_numpy(image).float().reshape(rows, height // rows, columns, width // columns, 3)
        return cells.mean(dim=(1, 3))


def unit(values):
    values = np.asarray(values, dtype=np.float64)
    return values / np.linalg.norm(values)


def draw_cells(colors, size):
    """Image of cells [R, C, 3], each `size` pixels wide and high."""
    return np.kron(np.asarray(colors), np.ones((size, size, 1))).astype(np.uint8)


@pytest.fixture
def colors():
    return np.random.default_rng(0).integers(1, 255, (4, 4, 3))


def test_a_large_target_is_pooled_over_its_patches_of_the_whole_image(colors):
    image, mask = draw_cells(colors, 10), np.zeros((40, 40), bool)
    mask[0:20, 0:20] = True  # four whole patches
    mask[20:23, 0:10] = True  # 30 % of a fifth: kept
    mask[20:22, 10:20] = True  # 20 % of a sixth: not kept
    encoder = MeanColor()
    (found,) = roi_features(encoder, [(image, mask)])
    expected = (colors[0, 0] + colors[0, 1] + colors[1, 0] + colors[1, 1] + colors[2, 0]) / 5
    np.testing.assert_allclose(found.feature, unit(expected), rtol=1e-6)
    assert np.array_equal(encoder.seen[0], image)
    assert found.box == (0, 0, 40, 40)
    assert found.feature.dtype == np.float32


# The crop's eight rows are centred in a square.
@pytest.mark.parametrize(("num_pixels", "box"), [(320, (0, 0, 40, 40)), (319, (-16, 0, 24, 40))])
def test_the_area_decides_from_one_fifth_on(colors, num_pixels, box):
    mask = np.zeros(1600, bool)
    mask[:num_pixels] = True
    (found,) = roi_features(MeanColor(), [(draw_cells(colors, 10), mask.reshape(40, 40))])
    assert found.box == box


def test_a_small_target_is_cropped_with_a_margin_and_padded():
    image = np.random.default_rng(1).integers(1, 255, (100, 120, 3)).astype(np.uint8)
    mask = np.zeros((100, 120), bool)
    mask[30:50, 60] = mask[40, 50:90] = True  # box: 20 rows from 30, 40 columns from 50
    crop = square_crop(image, mask)
    expected = np.zeros((44, 44, 3), np.uint8)
    expected[11:33] = image[29:51, 48:92]  # 5 %: one row, two columns on each side
    assert np.array_equal(crop.image, expected)
    assert crop.box == (18, 48, 62, 92)
    encoder = MeanColor()
    (found,) = roi_features(encoder, [(image, mask)])
    assert np.array_equal(encoder.seen[0], expected) and found.box == crop.box
    # Rows 11 to 32 of 44 lie in the two middle rows of patches, which they fill.
    np.testing.assert_allclose(found.feature, unit(image[29:51, 48:92].mean(axis=(0, 1))), rtol=1e-5)
    assert {patch.row for patch in found.top_patches} <= {1, 2}


def test_half_a_patch_of_content_counts_and_less_does_not():
    image = np.full((200, 200, 3), 7, np.uint8)
    image[..., 0] = np.arange(200)[:, None]
    mask = np.zeros((200, 200), bool)
    mask[100:120, 100:140] = True  # with the margin 22 x 44: as above
    image[99:121, 98:142, 1] = 100
    assert square_crop(image, mask).content.sum() == 22 * 44
    encoder = MeanColor(rows=2, columns=2)  # patches of 22 rows, half of them content
    (found,) = roi_features(encoder, [(image, mask)])
    halves = np.array([image[99:110, 98:142].mean((0, 1)), image[110:121, 98:142].mean((0, 1))]) / 2
    np.testing.assert_allclose(found.feature, unit(halves.mean(axis=0)), rtol=1e-5)


def test_a_target_thinner_than_half_a_patch_is_pooled_where_it_fills_most():
    image = np.full((200, 200, 3), 90, np.uint8)
    mask = np.zeros((200, 200), bool)
    mask[60:62, 20:60] = True  # 2 x 44 in a square of 44: a patch has 11 rows
    (found,) = roi_features(MeanColor(), [(image, mask)])
    np.testing.assert_allclose(np.linalg.norm(found.feature), 1, rtol=1e-6)
    assert {patch.row for patch in found.top_patches} <= {1, 2}


def test_a_crop_ends_at_the_edge_of_the_image():
    mask = np.zeros((100, 100), bool)
    mask[0:40, 80:100] = True
    crop = square_crop(np.full((100, 100, 3), 9, np.uint8), mask)
    assert crop.box == (0, 69, 42, 111)  # 42 x 21: no margin above and to the right
    assert crop.content.sum() == 42 * 21 and np.array_equal(crop.content, crop.image[..., 0] == 9)


def test_the_top_patches_are_the_most_similar_ones(colors):
    image, mask = draw_cells(colors, 10), np.zeros((40, 40), bool)
    mask[0:20, 0:20] = True
    (found,) = roi_features(MeanColor(), [(image, mask)])
    cosines = [(float(unit(colors[r, c]) @ found.feature), r, c) for r in range(4) for c in range(4)]
    expected = sorted(cosines, reverse=True)[:5]
    assert [(patch.row, patch.column) for patch in found.top_patches] == [(r, c) for _, r, c in expected]
    np.testing.assert_allclose([patch.cosine for patch in found.top_patches], [c for c, _, _ in expected], rtol=1e-5)


def test_the_global_feature_is_the_mean_of_all_patches(colors):
    (found,) = global_features(MeanColor(), [draw_cells(colors, 10)])
    np.testing.assert_allclose(found, unit(colors.mean(axis=(0, 1))), rtol=1e-6)


def test_batches_change_nothing():
    rng = np.random.default_rng(2)
    pairs = []
    for _ in range(7):
        image, mask = rng.integers(0, 255, (40, 40, 3)).astype(np.uint8), np.zeros((40, 40), bool)
        mask[: rng.integers(30, 41), : rng.integers(30, 41)] = True
        pairs.append((image, mask))
    together = roi_features(MeanColor(), pairs, batch_size=3)
    for pair, found in zip(pairs, together, strict=True):
        (alone,) = roi_features(MeanColor(), [pair])
        assert np.array_equal(alone.feature, found.feature) and alone.top_patches == found.top_patches


@pytest.mark.parametrize("mask", [np.zeros((40, 40), bool), np.ones((40, 41), bool)])
def test_bad_masks_are_named(mask):
    with pytest.raises(VitalError, match="mask"):
        roi_features(MeanColor(), [(np.zeros((40, 40, 3), np.uint8), mask)])


SIGLIP = {
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    },
    "text_config": {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Directories of tiny models by name, with their vision towers."""
    torch.manual_seed(0)
    found = {}
    for name, whole, processor in (
        ("siglip", SiglipModel(SiglipConfig(**SIGLIP)), SiglipImageProcessorPil(size={"height": 32, "width": 32})),
        ("clip", CLIPModel(CLIPConfig(**SIGLIP)), CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)),
    ):
        tower_class = {"siglip": SiglipVisionModel, "clip": CLIPVisionModel}[name]
        directory = tmp_path_factory.mktemp(name)
        whole.eval().save_pretrained(directory)
        processor.save_pretrained(directory)
        tower = tower_class.from_pretrained(directory).eval()
        tower_directory = tmp_path_factory.mktemp(f"{name}-vision")
        tower.save_pretrained(tower_directory)
        processor.save_pretrained(tower_directory)
        found[name] = (directory, tower)
        found[f"{name}-vision"] = (tower_directory, tower)
    return found


@pytest.mark.parametrize("name", ["siglip", "siglip-vision", "clip", "clip-vision"])
def test_real_encoders_give_their_last_blocks_patches(encoders, name):
    directory, tower = encoders[name]
    image = np.random.default_rng(3).integers(0, 255, (50, 70, 3)).astype(np.uint8)
    encoder = VisionEncoder(directory)
    is_clip = name.startswith("clip")
    mean, std = (
        ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)) if is_clip else ((0.5,) * 3,) * 2
    )
    # The whole image, stretched: a crop would break the link between mask and grid.
    resized = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)) / 255
    pixels = torch.from_numpy((resized - mean) / std).float().permute(2, 0, 1)[None]
    with torch.no_grad():
        x = tower.embeddings(pixels)
        x = tower.pre_layrnorm(x) if is_clip else x
        for layer in tower.encoder.layers:
            x = layer(x, attention_mask=None)
    assert x.shape[1] == 16 + is_clip
    expected = x[0, 1:] if is_clip else x[0]
    found = encoder.encode([image, image[::-1].copy()])
    assert found.shape == (2, 4, 4, 16) and (encoder.grid, encoder.width) == ((4, 4), 16)
    torch.testing.assert_close(found[0].flatten(0, 1), expected, rtol=1e-4, atol=1e-5)
    mask = np.zeros((50, 70), bool)
    mask[:25, :35] = True  # a quarter: the upper left four patches
    (roi,) = roi_features(encoder, [(image, mask)])
    pooled = expected.unflatten(0, (4, 4))[:2, :2].mean(dim=(0, 1))
    np.testing.assert_allclose(roi.feature, unit(pooled), rtol=1e-3, atol=1e-4)


def test_a_backbones_own_tower_gives_its_last_blocks_patches(random_phantom):
    """In rows and columns, though the tower takes them two by two."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(random_phantom).eval()
    encoder = open_encoder(random_phantom)
    side, patch = encoder.grid[0], model.config.vision_config.patch_size
    image = np.random.default_rng(3).integers(0, 255, (side * patch, side * patch, 3)).astype(np.uint8)
    images = [image, image[::-1].copy()]
    processor = AutoImageProcessor.from_pretrained(random_phantom, backend="pil")
    last = []
    model.model.visual.blocks[-1].register_forward_hook(lambda _module, _args, out: last.append(out))
    with torch.no_grad():
        for one in images:
            patches = processor(images=one, return_tensors="pt")
            model.model.visual(patches["pixel_values"], grid_thw=patches["image_grid_thw"])
    found = encoder.encode(images)
    assert found.shape == (2, side, side, model.config.vision_config.hidden_size) == (2, *encoder.grid, encoder.width)
    half, pair = range(side // 2), (0, 1)
    rows = [2 * row + i for row in half for _ in half for i in pair for _ in pair]
    columns = [2 * column + j for _ in half for column in half for _ in pair for j in pair]
    for one, expected in zip(found, last, strict=True):
        torch.testing.assert_close(one[rows, columns], expected, rtol=1e-4, atol=1e-5)
    assert encoder.id == open_encoder(random_phantom).id and encoder.id.startswith("qwen3_vl-")
    # The rule takes it as any other.
    mask = np.zeros(image.shape[:2], bool)
    mask[: len(mask) // 2] = True
    (roi,) = roi_features(encoder, [(image, mask)])
    np.testing.assert_allclose(roi.feature, unit(found[0][: side // 2].mean(dim=(0, 1))), rtol=1e-3, atol=1e-4)


def test_an_encoders_id_follows_its_weights(encoders, tmp_path):
    ids = {name: VisionEncoder(directory).id for name, (directory, _) in encoders.items()}
    assert len(set(ids.values())) == 4
    assert ids["siglip"] == VisionEncoder(encoders["siglip"][0]).id


def test_directories_that_are_no_encoder_are_named(encoders, tmp_path):
    with pytest.raises(CheckpointError, match="encoder"):
        VisionEncoder(tmp_path)
    encoders["siglip"][1].save_pretrained(tmp_path / "bare")
    with pytest.raises(CheckpointError, match="image processor"):
        VisionEncoder(tmp_path / "bare")
    text = SiglipModel(SiglipConfig(**SIGLIP)).text_model
    text.save_pretrained(tmp_path / "text")
    with pytest.raises(CheckpointError, match="siglip_text_model"):
        VisionEncoder(tmp_path / "text")


@pytest.mark.parametrize("name", ["siglip", "siglip-vision", "clip", "clip-vision"])
def test_an_encoder_without_all_its_weights_is_refused(encoders, tmp_path, name):
    """transformers would fill the gap with random numbers."""
    directory = shutil.copytree(encoders[name][0], tmp_path / "gap")
    path = directory / "model.safetensors"
    weights = load_file(path)
    removed = next(key for key in sorted(weights) if "layers.1." in key and "text_model" not in key)
    save_file({key: weight for key, weight in weights.items() if key != removed}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"encoder: .*gap lacks 1 tensors, the first is .*layers\.1\."):
        VisionEncoder(directory)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"encoder: the weights in .*gap cannot be read"):
        VisionEncoder(directory)


def test_what_encode_does_not_run_may_be_missing(encoders, tmp_path):
    directory = shutil.copytree(encoders["siglip"][0], tmp_path / "tower")
    weights = load_file(directory / "model.safetensors")
    tower = {key: weight for key, weight in weights.items() if ".encoder." in key and "text_model" not in key}
    tower |= {key: weight for key, weight in weights.items() if "vision_model.embeddings" in key}
    save_file(tower, directory / "model.safetensors", {"format": "pt"})
    image = np.random.default_rng(3).integers(0, 255, (50, 70, 3)).astype(np.uint8)
    whole = VisionEncoder(encoders["siglip"][0]).encode([image])
    torch.testing.assert_close(VisionEncoder(directory).encode([image]), whole)


@pytest.mark.parametrize("height", [1, 3, 4])
def test_a_picture_of_few_rows_is_no_picture_of_many_channels(encoders, height):
    flat = np.random.default_rng(3).integers(0, 255, (height, 40, 3)).astype(np.uint8)
    stretched = np.asarray(Image.fromarray(flat).resize((32, 32), Image.Resampling.BICUBIC))
    encoder = VisionEncoder(encoders["siglip"][0])
    torch.testing.assert_close(encoder.encode([flat]), encoder.encode([stretched]))


def test_loading_leaves_transformers_as_it_was(encoders):
    """In several threads at once."""
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(VisionEncoder, [encoders["siglip"][0]] * 8))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_phantoms(encoders):
    encoder = VisionEncoder(encoders["siglip"][0])
    asked = [(phantom, ask(phantom)) for phantom in (draw_phantom("train", 0, index) for index in range(12))]
    found = phantom_roi_features(encoder, asked)
    samples = [(phantom, sample) for phantom, samples in asked for sample in samples]
    assert len(found) == len(samples)
    missing = several = 0
    for (phantom, sample), roi in zip(samples, found, strict=True):
        masks = [target.mask for target in phantom.targets if target.name == sample.target_name]
        assert (roi is None) == (not masks)
        missing += roi is None
        several += len(masks) > 1
        if masks:
            (alone,) = roi_features(encoder, [(phantom.image, np.any(masks, axis=0))])
            np.testing.assert_allclose(roi.feature, alone.feature, rtol=1e-4, atol=1e-5)
            assert roi.box == alone.box
            assert math.isclose(np.linalg.norm(roi.feature), 1, rel_tol=1e-5)
    assert missing and several
    phantom, sample = samples[0]
    single = phantom_roi_feature(encoder, phantom, sample)
    assert (single is None) == (found[0] is None)
    if single is not None:
        np.testing.assert_allclose(single.feature, found[0].feature, rtol=1e-4, atol=1e-5)
