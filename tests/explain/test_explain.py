"""Model.explain: the answer is generate's, what is shown is of its latents, and what is missing is told."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import Qwen3VLForConditionalGeneration

import vitalrt
from vitalrt.api import BUNDLED
from vitalrt.describe import describe_model
from vitalrt.errors import CheckpointError, InputError
from vitalrt.explain import explainer
from vitalrt.explain.roi_index import RoiIndex
from vitalrt.explain.text_window import read_words
from vitalrt.explain.visual_window import aim, heatmaps
from vitalrt.inputs import image as image_reading
from vitalrt.model.scaffold import Scaffold
from vitalrt.model.vision_encoder import open_encoder

DEMO = Path(__file__).parents[2] / "examples" / "demo.png"
QUESTION = "Where is the cyst?"


@pytest.fixture(scope="module")
def model():
    return vitalrt.load(device="cpu")


@pytest.fixture
def bundle(tmp_path):
    """A copy of the bundled model's directory, to be changed."""
    return shutil.copytree(BUNDLED, tmp_path / "bundle")


def set_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_answer_is_that_of_generate(model):
    drawn = {"temperature": 9.0, "seed": 3}
    every = [
        {"k": 2},
        {"max_new_tokens": 1},
        drawn,
        {**drawn, "seed": 4},
        {**drawn, "top_p": 0.5},
        {**drawn, "top_k": 3},
    ]
    texts = []
    for options in every:
        answer, explanation = model.generate(DEMO, QUESTION, **options), model.explain(DEMO, QUESTION, **options)
        assert str(explanation) == answer.text and explanation.question == QUESTION
        assert explanation.answer.token_ids == answer.token_ids
        assert torch.equal(explanation.answer.latents, answer.latents)
        assert len(explanation.steps) == options.get("k", 4)
        texts.append(str(explanation))
    assert len(set(texts)) >= 5  # every option has its effect


def test_it_is_asked_on_the_same_terms_and_about_what_was_read(model, tmp_path, monkeypatch):
    late = model.explain(DEMO, QUESTION, terms=vitalrt.Terms(timeout_s=0.0))
    assert late.answer.finish_reason == "timeout"
    nib.Nifti1Image(np.random.default_rng(0).integers(0, 9, (30, 40, 3)).astype(np.uint8), np.eye(4)).to_filename(
        path := tmp_path / "volume.nii"
    )
    read, reads = vitalrt.ReadOptions(slice_index=2, window=(4, 9)), []
    original = image_reading.read_image
    monkeypatch.setattr(image_reading, "read_image", lambda *of, **by: reads.append(of) or original(*of, **by))
    explanation = model.explain(path, QUESTION, k=1, read=read)
    assert len(reads) == 1
    assert np.array_equal(explanation.pictures[0], original(path, read))
    assert not np.array_equal(explanation.pictures[0], original(path))
    answer = model.generate(path, QUESTION, k=1, read=read)
    assert torch.equal(explanation.answer.latents, answer.latents)


def test_reading_is_part_of_the_time_it_took(model, monkeypatch):
    original = image_reading.read_image
    monkeypatch.setattr(image_reading, "read_image", lambda *of, **by: time.sleep(0.05) or original(*of, **by))
    assert model.explain(DEMO, QUESTION, k=1).answer.timings.preprocess >= 50


def test_nobodys_random_numbers_move_on():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    vitalrt.load(device="cpu").explain(DEMO, QUESTION, k=1)
    assert torch.equal(torch.rand(3), expected)


def test_every_step_shows_its_own_latent(model):
    explanation = model.explain(DEMO, QUESTION, k=3)
    latents = explanation.answer.latents
    scaffold, encoder = Scaffold.load(BUNDLED), open_encoder(BUNDLED / "encoder")
    index = RoiIndex.load(BUNDLED / "roi_index.safetensors")
    [maps] = heatmaps(encoder, [np.asarray(Image.open(DEMO).convert("RGB"))], aim(scaffold, latents))
    for k, step in enumerate(explanation.steps):
        [words] = read_words(scaffold, latents[k : k + 1], model.processor.decode)
        assert (step.text, step.text_probability) == (words.text, pytest.approx(words.probability, rel=1e-4))
        torch.testing.assert_close(step.heatmap, maps[k])
        [nearest] = index.nearest(aim(scaffold, latents[k : k + 1]), 5)
        assert [neighbour.label for neighbour in step.neighbours] == [neighbour.label for neighbour in nearest]
    assert [step.text for step in explanation.steps[:2]] == [
        "The cyst is in the lower half.",
        "It is in the left half.",
    ]
    assert not explanation.missing
    assert explanation.provenance == model.checkpoint.vital.provenance != ""


def test_without_latents_there_is_nothing_to_read(model):
    explanation = model.explain(DEMO, QUESTION, k=0)
    assert explanation.steps == () and not explanation.missing
    assert str(explanation)


def test_each_of_several_pictures_has_its_map(model):
    ramp = np.tile(np.arange(80, dtype=np.uint8), (50, 1))
    explanation = model.explain([DEMO, ramp], QUESTION, k=1)
    [step] = explanation.steps
    alone = model.explain(ramp, QUESTION, k=1).steps[0]
    assert len(step.heatmaps) == 2 and step.heatmap is step.heatmaps[0]
    assert not torch.allclose(step.heatmaps[0], step.heatmaps[1])
    assert [picture.shape for picture in explanation.pictures] == [(*Image.open(DEMO).size[::-1], 3), (50, 80, 3)]
    assert step.heatmaps[1].shape == alone.heatmap.shape


def test_a_question_about_no_picture_is_read_in_words(model):
    explanation = model.explain(None, QUESTION, k=1)
    assert explanation.steps[0].text and explanation.steps[0].heatmap is None and explanation.steps[0].neighbours
    assert "no picture" in explanation.missing["pictures"]


def test_threads_do_not_see_each_others_pictures(model):
    pictures = [np.full((40 + n, 60, 3), 20 * n, np.uint8) for n in range(8)]
    alone = [model.explain(picture, QUESTION, k=1).steps[0].heatmap for picture in pictures]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda picture: model.explain(picture, QUESTION, k=1).steps[0].heatmap, pictures * 4))
    for together, one in zip(found, alone * 4, strict=True):
        torch.testing.assert_close(together, one, rtol=1e-4, atol=1e-4)


def test_what_it_takes_is_loaded_once(monkeypatch):
    """Also when several threads ask for the first explanations, and once for all of them."""
    loads, encoders = [], []
    load = Scaffold.load
    monkeypatch.setattr(Scaffold, "load", lambda directory: loads.append(directory) or load(directory))
    monkeypatch.setattr(
        explainer, "open_encoder", lambda path, device: encoders.append(path) or open_encoder(path, device)
    )
    cold = vitalrt.load(device="cpu")
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: cold.explain(DEMO, QUESTION, k=1).steps[0].text, range(4)))
    assert found == ["The cyst is in the lower half."] * 4
    assert (len(loads), len(encoders)) == (1, 1)


def test_words_are_spelt_by_the_text_decoders_own_tokenizer(bundle, model):
    latents = model.generate(DEMO, QUESTION, k=2).latents
    ids = [
        words.text.split() for words in read_words(Scaffold.load(bundle), latents, lambda ids: " ".join(map(str, ids)))
    ]
    special = ids[0][0]
    tokenizer = Tokenizer(WordLevel({f"w{number}": number for number in range(639)}, unk_token="w0"))
    tokenizer.add_special_tokens([f"w{special}"])
    tokenizer.save(str(bundle / "scaffold_tokenizer.json"))
    steps = vitalrt.load(bundle, device="cpu").explain(DEMO, QUESTION, k=2).steps
    assert steps[0].text.split() == [f"w{number}" for number in ids[0] if number != special]
    assert steps[1].text.split() == [f"w{number}" for number in ids[1] if number != special]


def test_what_was_not_supervised_is_not_shown(bundle):
    set_json(bundle / "scaffold.json", supervised=["text"])
    explanation = vitalrt.load(bundle, device="cpu").explain(DEMO, QUESTION, k=1)
    assert explanation.steps[0].text and not explanation.steps[0].heatmaps and not explanation.steps[0].neighbours
    assert set(explanation.missing) == {"pictures", "neighbours"}
    set_json(bundle / "scaffold.json", supervised=["visual"])
    explanation = vitalrt.load(bundle, device="cpu").explain(DEMO, QUESTION, k=1)
    assert explanation.steps[0].text is None and explanation.steps[0].heatmap is not None
    assert set(explanation.missing) == {"words"}
    set_json(bundle / "scaffold.json", supervised=[])
    with pytest.raises(CheckpointError, match="not trained"):
        vitalrt.load(bundle, device="cpu").explain(DEMO, QUESTION)


def test_an_encoder_elsewhere_is_named_or_told_to_be_missing(bundle, model):
    encoder = (bundle / "encoder").rename(bundle.parent / "moved")
    (bundle / "roi_index.safetensors").unlink()
    apart = vitalrt.load(bundle, device="cpu")
    explanation = apart.explain(DEMO, QUESTION, k=1)
    assert explanation.steps[0].text and not explanation.steps[0].heatmaps
    assert apart.checkpoint.vital.encoder in explanation.missing["pictures"]
    assert "roi_index" in explanation.missing["neighbours"]
    found = apart.explain(DEMO, QUESTION, k=1, encoder=encoder).steps[0].heatmap
    torch.testing.assert_close(found, model.explain(DEMO, QUESTION, k=1).steps[0].heatmap)


def test_the_encoder_that_is_named_is_the_one_that_is_used(bundle, model, monkeypatch):
    good = shutil.copytree(bundle / "encoder", bundle.parent / "good")
    (bundle / "encoder" / "config.json").unlink()
    apart = vitalrt.load(bundle, device="cpu")
    monkeypatch.chdir(bundle.parent)
    found = apart.explain(DEMO, QUESTION, k=1, encoder="good").steps[0].heatmap
    torch.testing.assert_close(found, model.explain(DEMO, QUESTION, k=1).steps[0].heatmap)
    with pytest.raises(CheckpointError, match=r"encoder: expected a directory with config\.json"):
        apart.explain(DEMO, QUESTION, k=1)
    with pytest.raises(vitalrt.VitalError, match="encoder: expected a directory, got 3"):
        apart.explain(DEMO, QUESTION, k=1, encoder=3)
    set_json(good / "preprocessor_config.json", resample=2)
    with pytest.raises(CheckpointError, match="encoder: expected siglip-"):
        vitalrt.load(bundle, device="cpu").explain(DEMO, QUESTION, k=0, encoder=good)


def test_info_tells_what_could_be_shown(bundle):
    def told():
        return describe_model(vitalrt.load(bundle, device="cpu"))["explanations"]

    assert told() == "words; heat maps; nearest regions"
    (bundle / "encoder").rename(bundle.parent / "elsewhere")
    (bundle / "roi_index.safetensors").unlink()
    assert told() == "words; heat maps, given siglip-8046c86211e896ff"
    set_json(bundle / "scaffold.json", supervised=["text"])
    assert told() == "words"
    set_json(bundle / "scaffold.json", supervised=[])
    assert told() == "none: no loss supervised the latents"
    (bundle / "scaffold.json").unlink()
    assert told() == "none: no scaffolding lies beside the weights"


def test_another_encoder_or_index_is_refused(bundle):
    set_json(bundle / "vital.json", encoder="siglip-0123456789abcdef")
    with pytest.raises(
        CheckpointError, match="roi_index: expected features of width 128 of siglip-0123456789abcdef, got width 128"
    ):
        vitalrt.load(bundle, device="cpu").explain(DEMO, QUESTION)
    (bundle / "roi_index.safetensors").unlink()
    with pytest.raises(CheckpointError, match="encoder: expected siglip-0123456789abcdef"):
        vitalrt.load(bundle, device="cpu").explain(DEMO, QUESTION)


def test_a_model_without_scaffolding_says_so_and_still_answers(bundle):
    (bundle / "scaffold.json").unlink()
    bare = vitalrt.load(bundle, device="cpu")
    with pytest.raises(CheckpointError, match=r"scaffold: .* saved without scaffolding"):
        bare.explain(DEMO, QUESTION)
    assert str(bare.generate(DEMO, QUESTION)) == "lower left"


def test_an_adapters_latents_are_not_read_with_the_models_scaffolding(tmp_path):
    backbone = Qwen3VLForConditionalGeneration.from_pretrained(BUNDLED, dtype=torch.float32)
    get_peft_model(backbone, LoraConfig(r=2, target_modules=r".*language_model.*q_proj")).save_pretrained(tmp_path)
    adapted = vitalrt.load(BUNDLED, adapter=tmp_path, device="cpu")
    with pytest.raises(CheckpointError, match=f"scaffold: {tmp_path} has no"):
        adapted.explain(DEMO, QUESTION)


def set_decoder(bundle, **values):
    config = json.loads((bundle / "scaffold.json").read_text())["text_decoder"]
    set_json(bundle / "scaffold.json", text_decoder=config | values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda bundle: (bundle / "scaffold.json").write_text("{}"), "expected keys .*'text_decoder'.* got \\[\\]"),
        (lambda bundle: set_json(bundle / "scaffold.json", colour="red"), "expected keys .*'colour'"),
        (lambda bundle: set_json(bundle / "scaffold.json", supervised="text"), "supervised: expected a list .*'text'"),
        (lambda bundle: set_json(bundle / "scaffold.json", supervised=["words"]), "supervised: expected .*'words'"),
        (lambda bundle: set_json(bundle / "scaffold.json", projector="resnet"), "cannot be built .*'resnet'"),
        (lambda bundle: set_json(bundle / "scaffold.json", width=-1), "cannot be built"),
        (lambda bundle: set_json(bundle / "scaffold.json", width=100), "safetensors cannot be read"),
        (lambda bundle: (bundle / "scaffold.safetensors").write_bytes(b"no"), "safetensors cannot be read"),
        (lambda bundle: set_decoder(bundle, model_type="nothing"), "cannot be built"),
        (lambda bundle: set_decoder(bundle, num_key_value_heads=0), "cannot be built"),
        (lambda bundle: set_decoder(bundle, eos_token_id=None), "eos_token_id: expected .* below 639, got None"),
        (lambda bundle: set_decoder(bundle, eos_token_id=[]), "eos_token_id: expected"),
        (lambda bundle: set_decoder(bundle, eos_token_id=639), "eos_token_id: expected"),
        (lambda bundle: Scaffold.build("linear", 100, 128, tiny_decoder()).save(bundle), "expected width 192, got 100"),
        (lambda bundle: (bundle / "scaffold_tokenizer.json").write_text("{}"), "scaffold_tokenizer.json cannot be"),
    ],
)
def test_broken_scaffolding_is_named(bundle, change, message):
    change(bundle)
    with pytest.raises(CheckpointError, match=f"scaffold: .*{message}"):
        vitalrt.load(bundle, device="cpu").explain(DEMO, QUESTION)


def tiny_decoder():
    return Scaffold.load(BUNDLED).text_decoder


def test_bad_input_is_refused_as_in_generate(model):
    with pytest.raises(InputError, match="no such file"):
        model.explain("missing.png", QUESTION)
    with pytest.raises(InputError, match="question"):
        model.explain(DEMO, "")
