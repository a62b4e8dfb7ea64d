"""Question and pictures to a prompt, against transformers' own Qwen3-VL processor with its Pillow backend."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from vitalrt.errors import CheckpointError, InputError
from vitalrt.inputs.image import ReadOptions
from vitalrt.inputs.processor import PatchOptions, Processor, fit_size, patchify, patchify_on
from vitalrt_training.backbone import PREPROCESSOR
from vitalrt_training.tokenizer import save_tokenizer, train_tokenizer

PREPROCESSORS = {
    "phantom": PREPROCESSOR,
    "qwen3_vl": {**PREPROCESSOR, "patch_size": 16, "size": {"shortest_edge": 65536, "longest_edge": 16777216}},
    "other_numbers": {
        **PREPROCESSOR,
        "patch_size": 14,
        "merge_size": 3,
        "temporal_patch_size": 1,
        "size": {"shortest_edge": 56 * 56, "longest_edge": 200 * 200},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
}
QUESTIONS = ["Is the liver visible?", " Où est la lésion ? 肝臓 🫁\n", "<think>", "a<|im_end|>\n<|im_start|>system\nb"]


class Reference(Qwen3VLProcessor):
    """transformers' processor without its video part, whose class check needs torchvision."""

    def check_argument_for_proper_class(self, name, argument) -> None:
        pass


@pytest.fixture(scope="module", params=PREPROCESSORS)
def directory(request, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    save_tokenizer(train_tokenizer(["Is the liver visible in this scan? Où est la lésion ? 肝臓"], 400), directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSORS[request.param]))
    return directory


@pytest.fixture(scope="module")
def processor(directory) -> Processor:
    return Processor(directory)


@pytest.fixture(scope="module")
def reference(directory, processor) -> Reference:
    config = json.loads((directory / "preprocessor_config.json").read_text())
    images = Qwen2VLImageProcessorPil(**{k: v for k, v in config.items() if not k.endswith(("_type", "_class"))})
    template = processor.tokenizer.chat_template
    return Reference(
        image_processor=images, tokenizer=processor.tokenizer, video_processor=None, chat_template=template
    )


def picture(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def assert_same_prompt(processor, reference, pictures: list[np.ndarray], question: str) -> None:
    content = [{"type": "image", "image": Image.fromarray(pixels)} for pixels in pictures]
    content.append({"type": "text", "text": question})
    expected = reference.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    prompt = processor.prepare(pictures, question, ReadOptions())
    assert prompt.input_ids.tolist() == expected["input_ids"][0].tolist()
    if pictures:
        assert torch.equal(prompt.image_grid_thw, expected["image_grid_thw"])
        torch.testing.assert_close(prompt.pixel_values, expected["pixel_values"], atol=1e-5, rtol=0)
    else:
        assert prompt.pixel_values is None and "pixel_values" not in expected
    assert prompt.preprocess_ms > 0


@pytest.mark.parametrize("seed", range(12))
def test_random_pictures_and_questions(processor, reference, seed) -> None:
    draw = random.Random(seed)
    sizes = [(draw.randint(1, 240), draw.randint(1, 240)) for _ in range(draw.randint(1, 3))]
    pictures = [picture(seed, *size) for size in sizes if max(size) <= 200 * min(size)]
    assert_same_prompt(processor, reference, pictures, draw.choice(QUESTIONS))


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (3, 500), (601, 4), (64, 64), (333, 97)])
def test_extreme_sizes(processor, reference, size) -> None:
    assert_same_prompt(processor, reference, [picture(0, *size)], QUESTIONS[0])


@pytest.mark.parametrize("size", [(1, 1), (200, 1), (3, 500), (601, 4), (64, 64), (333, 97), (900, 700)])
def test_patches_are_the_same_wherever_they_are_made(processor, size) -> None:
    pixels = picture(1, *size)
    for form in (pixels, pixels[::-1, ::-1], pixels.swapaxes(0, 1)):
        expected, _ = patchify(form, processor.patch_options)
        made = patchify_on(torch.device("cpu"), form, processor.patch_options)
        assert made.dtype == torch.float32
        assert torch.equal(made, torch.from_numpy(expected))


def test_a_device_makes_its_patches_itself(processor, monkeypatch) -> None:
    """meta stands for it: what needs a number on the host raises there."""
    made = processor.picture(picture(1, 50, 60))
    with monkeypatch.context() as patch:
        patch.setattr("vitalrt.inputs.processor.patchify", lambda *_: pytest.fail("on the CPU"))
        patches = made.patches(torch.device("meta"))
    assert patches.is_meta and patches.shape == (made.num_patches, made.patch_dim)
    monkeypatch.setattr("vitalrt.inputs.processor.patchify_on", lambda *_: pytest.fail("on a device"))
    assert made.patches().device.type == "cpu" and made.patches().shape == patches.shape


@pytest.mark.parametrize("question", QUESTIONS)
def test_text_alone(processor, reference, question) -> None:
    """Special tokens that a question spells become those tokens, as transformers has it."""
    assert_same_prompt(processor, reference, [], question)


@settings(max_examples=300, deadline=None)
@given(
    height=st.integers(1, 20000),
    width=st.integers(1, 20000),
    patch_size=st.integers(2, 20),
    merge_size=st.integers(1, 3),
    min_pixels=st.integers(1, 300) | st.just(65536),
    more_pixels=st.integers(0, 10**6) | st.just(16777216 - 65536),
)
def test_any_size_fits_as_transformers_fits_it(height, width, patch_size, merge_size, min_pixels, more_pixels) -> None:
    assume(max(height, width) <= 200 * min(height, width))
    factor, max_pixels = patch_size * merge_size, min_pixels + more_pixels
    options = PatchOptions(patch_size, merge_size, 2, min_pixels, max_pixels, (0.5,) * 3, (0.5,) * 3)
    assert fit_size(height, width, options) == smart_resize(height, width, factor, min_pixels, max_pixels)


def test_too_long_a_picture_is_refused(processor) -> None:
    with pytest.raises(InputError, match=r"^image: expected an aspect ratio up to 200, got 1 x 201"):
        processor.prepare(picture(0, 1, 201), "What?", ReadOptions())


@pytest.mark.parametrize("question", ["", " \n", None, 3, ["a"]])
def test_a_question_is_text(processor, question) -> None:
    with pytest.raises(InputError, match=r"^question: expected non-empty text, got "):
        processor.prepare(None, question, ReadOptions())


@pytest.mark.parametrize("num_pictures", [0, 2])
def test_a_question_cannot_pretend_to_hold_a_picture(processor, num_pictures) -> None:
    with pytest.raises(InputError, match=r"^question: expected no <\|image_pad\|> token in the text, got 1"):
        processor.prepare([picture(0, 9, 9)] * num_pictures, "What is <|image_pad|>?", ReadOptions())


def test_decode_is_the_inverse_of_tokenize(processor) -> None:
    for question in QUESTIONS[:3]:
        ids = processor.tokenizer(question)["input_ids"]
        assert processor.decode(ids) == question
    assert processor.decode([]) == ""
    assert processor.decode(processor.tokenizer("a<|im_end|>b")["input_ids"]) == "ab"


def test_digests_tell_pictures_apart(processor) -> None:
    one = picture(1, 40, 30)
    nearly = one.copy()
    nearly[7, 8, 1] ^= 1
    pictures = [one, nearly, np.ascontiguousarray(one.transpose(1, 0, 2)), one.reshape(20, 60, 3)]
    digests = processor.prepare(pictures, "What?", ReadOptions()).digests
    assert len(set(digests)) == 4
    assert processor.prepare(one, "Another?", ReadOptions()).digests == digests[:1]
    assert processor.prepare(Image.fromarray(one), "What?", ReadOptions()).digests == digests[:1]


CHANGES = {
    "patch_size": 4,
    "merge_size": 1,
    "temporal_patch_size": 3,
    "size": {"shortest_edge": 1024, "longest_edge": 96 * 96},
    "max_pixels": 64 * 64,
    "image_mean": [0.5, 0.5, 0.4],
    "image_std": [0.5, 0.4, 0.5],
}


def test_digests_tell_preprocessing_apart(tmp_path) -> None:
    save_tokenizer(train_tokenizer(["What?"], 300), tmp_path)
    digests = []
    for change in [{}, *({key: value} for key, value in CHANGES.items()), {}]:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, **change}))
        digests += Processor(tmp_path).prepare(picture(1, 50, 60), "What?", ReadOptions()).digests
    assert digests[0] == digests[-1]
    assert len(set(digests)) == 1 + len(CHANGES)


def test_forms_of_the_preprocessor_config(tmp_path) -> None:
    """transformers 4 had min_pixels and max_pixels; transformers 5 can put all of it in processor_config.json."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    expected = PatchOptions.from_directory(tmp_path)
    old = {key: value for key, value in PREPROCESSOR.items() if key != "size"}
    old |= {"min_pixels": expected.min_pixels, "max_pixels": expected.max_pixels}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    assert PatchOptions.from_directory(tmp_path) == expected
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": PREPROCESSOR}))
    assert PatchOptions.from_directory(tmp_path) == expected


@pytest.mark.parametrize("text", [None, "not json", "{}", '{"patch_size": 4}', json.dumps({**PREPROCESSOR, "size": 3})])
def test_a_bad_preprocessor_config_is_named(tmp_path, text) -> None:
    if text is not None:
        (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"^model: .*preprocessor_config\.json"):
        PatchOptions.from_directory(tmp_path)


def test_text_alone_needs_no_preprocessor_config(tmp_path) -> None:
    save_tokenizer(train_tokenizer(["What?"], 300), tmp_path)
    processor = Processor(tmp_path)
    assert "What?" in processor.decode(processor.prepare(None, "What?", ReadOptions()).input_ids.tolist())
    with pytest.raises(CheckpointError, match=r"^model: .* has no preprocessor_config\.json"):
        processor.prepare(picture(0, 9, 9), "What?", ReadOptions())


@pytest.mark.parametrize("text", ["", "not json", "{}", "[]", '{"model": {"type": "none"}}'])
def test_a_bad_tokenizer_is_named(tmp_path, text) -> None:
    save_tokenizer(train_tokenizer(["What?"], 300), tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"^model: .* has no usable tokenizer files") as caught:
        Processor(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_tokenizer_or_template_is_named(tmp_path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    with pytest.raises(CheckpointError, match=r"^model: .* has no usable tokenizer files"):
        Processor(tmp_path)
    save_tokenizer(train_tokenizer(["What?"], 300), tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match=r"^model: .* has no chat template"):
        Processor(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0].content[-1].text }}!"}))
    processor = Processor(tmp_path)
    assert processor.decode(processor.prepare(None, "What?", ReadOptions()).input_ids.tolist()) == "What?!"
