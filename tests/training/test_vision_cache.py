"""Vision features on disk: the same bits with and without, whatever the folder holds."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from vitalrt.errors import VitalError
from vitalrt_training import vision_cache
from vitalrt_training.data.batches import Asked, Collator
from vitalrt_training.data.phantom import ask, draw_phantom
from vitalrt_training.latent_loop import VisionFeatures, run_loop
from vitalrt_training.vision_cache import VisionCache, VisionCacheConfig

CPU = torch.device("cpu")
NUM_PICTURES = 3


@pytest.fixture(scope="module")
def model(random_phantom):
    model = Qwen3VLForConditionalGeneration.from_pretrained(random_phantom)
    model.model.visual.requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def batch(random_phantom):
    phantoms = [draw_phantom("train", 0, index) for index in range(NUM_PICTURES)]
    asked = [Asked([p.image], [(s.question, s.answer) for s in ask(p)[:2]]) for p in phantoms]
    return Collator(random_phantom).collate(asked)


@pytest.fixture
def calls(model):
    """Pictures that the tower was given, one entry per call."""
    found = []
    hook = model.model.visual.register_forward_pre_hook(
        lambda _module, _args, kwargs: found.append(len(kwargs["grid_thw"])), with_kwargs=True
    )
    yield found
    hook.remove()


def open_cache(folder, model, most_gib=1.0, num_processes=1):
    return VisionCache(VisionCacheConfig(str(folder), most_gib), model.model.visual, CPU, num_processes)


def encode(cache, model, batch):
    return cache.encode(model.model.visual, batch.pixel_values, batch.image_grid_thw)


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_loop_is_the_same_bit_for_bit(model, batch, calls, tmp_path):
    """Without a cache, with an empty one, with a full one of a later run; gradients included."""
    num_steps = torch.arange(batch.num_samples) % 3
    weight = model.model.language_model.layers[0].self_attn.k_proj.weight

    def run(vision):
        logits = run_loop(model, batch, num_steps, vision=vision).logits
        return logits, torch.autograd.grad(logits.square().mean(), weight)[0]

    expected = run(None)
    calls.clear()
    for _ in range(2):
        found = run(encode(open_cache(tmp_path, model), model, batch))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert calls == [1] * NUM_PICTURES, "each picture should have been encoded once"
    assert len(files(tmp_path)) == NUM_PICTURES


def test_what_comes_from_disk_is_in_the_order_that_was_asked(model, batch, calls, tmp_path):
    pictures = batch.pixel_values.split(batch.image_grid_thw.prod(-1).tolist())
    turned = torch.cat(pictures[::-1]), batch.image_grid_thw.flip(0)
    cache = open_cache(tmp_path, model)
    encode(cache, model, batch)
    num_calls = len(calls)
    found = cache.encode(model.model.visual, *turned)
    assert len(calls) == num_calls
    expected = VisionFeatures.of(model.model.visual(turned[0], grid_thw=turned[1]))
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.deepstack, expected.deepstack)


def test_another_tower_has_features_of_its_own(model, batch, calls, tmp_path):
    before = encode(open_cache(tmp_path, model), model, batch)
    bias = model.model.visual.merger.linear_fc2.bias
    bias += 1
    try:
        after = encode(open_cache(tmp_path, model), model, batch)
    finally:
        bias -= 1
    assert len(calls) == 2 * NUM_PICTURES == len(files(tmp_path))
    assert not torch.equal(before.tokens, after.tokens)


def test_the_folder_never_holds_more_than_it_may(model, batch, calls, tmp_path):
    open_cache(tmp_path / "all", model)
    encode(open_cache(tmp_path / "all", model), model, batch)
    sizes = [path.stat().st_size for path in files(tmp_path / "all")]
    room = (max(sizes) + min(sizes)) / 2**30  # of three about as large
    expected = encode(open_cache(tmp_path / "all", model), model, batch)
    for _ in range(2):  # what is there counts
        found = encode(open_cache(tmp_path / "some", model, room), model, batch)
        assert torch.equal(found.tokens, expected.tokens)
        assert 0 < sum(path.stat().st_size for path in files(tmp_path / "some")) <= room * 2**30
    encode(open_cache(tmp_path / "shared", model, room, num_processes=2), model, batch)
    assert sum(path.stat().st_size for path in files(tmp_path / "shared")) <= room * 2**30 / 2


def test_a_broken_file_is_made_again(model, batch, tmp_path):
    expected = encode(open_cache(tmp_path, model), model, batch)
    broken = files(tmp_path)[0]
    whole = broken.read_bytes()
    for content in (b"", whole[:100], whole[:-1]):
        broken.write_bytes(content)
        found = encode(open_cache(tmp_path, model), model, batch)
        assert torch.equal(found.tokens, expected.tokens) and broken.read_bytes() == whole


def test_a_full_disk_leaves_no_half_file(model, batch, tmp_path, monkeypatch):
    def fill_up(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vision_cache, "save_file", fill_up)
    with pytest.raises(OSError, match="No space"):
        encode(open_cache(tmp_path, model), model, batch)
    assert not files(tmp_path)


def test_a_tower_in_training_is_refused(model, tmp_path):
    model.model.visual.merger.linear_fc2.bias.requires_grad_(True)
    try:
        with pytest.raises(VitalError, match="vision_cache: expected a frozen vision tower"):
            open_cache(tmp_path, model)
    finally:
        model.model.visual.requires_grad_(False)


def test_room_is_needed():
    with pytest.raises(VitalError, match=r"vision_cache.most_gib: expected more than 0, got 0"):
        VisionCacheConfig("folder", 0)
