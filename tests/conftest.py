"""Tiny random Qwen3-VL checkpoints, and transformers' own model as the truth about them.

T tokens, K latent steps, d width.
"""

from __future__ import annotations

import functools
import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of the hub's client: no test may reach for the network

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported, which transformers does

from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.utils import logging

import vitalrt
from vitalrt_training.backbone import PREPROCESSOR
from vitalrt_training.tokenizer import save_tokenizer, train_tokenizer

NUM_TEXT_IDS = 80
IMAGE_ID, VIDEO_ID, VISION_START_ID, VISION_END_ID = range(NUM_TEXT_IDS, NUM_TEXT_IDS + 4)
VOCAB_SIZE = NUM_TEXT_IDS + 4

Grid = tuple[int, int, int]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes begins first, so that no process is left alone with it while the others are done."""
    items.sort(key=lambda item: not item.name.startswith("test_kernels_as_compiled"))


@dataclass(frozen=True)
class TinyModel:
    """A checkpoint directory and transformers' model of the same weights."""

    directory: Path
    reference: Qwen3VLForConditionalGeneration

    @functools.cached_property
    def model(self) -> vitalrt.Model:
        return self.load()

    def load(self, **options: Any) -> vitalrt.Model:
        return vitalrt.load(self.directory, **{"device": "cpu", "cache_tokens": 2048, **options})

    def prompt(self, seed: int, grids: Sequence[Grid] = (), num_text: int = 5) -> vitalrt.Prompt:
        """Random text between random pictures; grids are in visual tokens, so that every size is allowed."""
        draw = random.Random(seed)
        merge = self.reference.config.vision_config.spatial_merge_size
        ids = [draw.randrange(NUM_TEXT_IDS) for _ in range(num_text)]
        for time, rows, columns in grids:
            ids += [VISION_START_ID] + [IMAGE_ID] * (time * rows * columns) + [VISION_END_ID]
            ids += [draw.randrange(NUM_TEXT_IDS) for _ in range(draw.randint(0, 4))]
        if not grids:
            return vitalrt.Prompt(ids)
        patches = torch.tensor([(time, rows * merge, columns * merge) for time, rows, columns in grids])
        vision = self.reference.config.vision_config
        patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        generator = torch.Generator().manual_seed(seed)
        return vitalrt.Prompt(ids, torch.randn(int(patches.prod(-1).sum()), patch_dim, generator=generator), patches)

    @torch.inference_mode()
    def generate(self, prompt: vitalrt.Prompt, max_new_tokens: int) -> tuple[list[int], torch.Tensor]:
        """transformers' greedy generate: ids (end token included) and their logits [completion_tokens, vocab]."""
        ids = prompt.input_ids[None]
        pictures = {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
        out = self.reference.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == self.reference.config.image_token_id).int(),
            **(pictures if prompt.pixel_values is not None else {}),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return out.sequences[0, prompt.num_tokens :].tolist(), torch.cat(out.logits)

    @torch.inference_mode()
    def think(self, prompt: vitalrt.Prompt, k: int, max_new_tokens: int) -> tuple[torch.Tensor, list[int]]:
        """The latent loop without a cache: everything is recomputed for every step and every token.

        Returns z_1..z_K [K, d] and the answer's ids, end token included.
        """
        model = self.reference.model
        ids = prompt.input_ids[None]
        is_image = ids == self.reference.config.image_token_id
        positions, _ = model.get_rope_index(ids, is_image.int(), image_grid_thw=prompt.image_grid_thw)
        x, deepstack = model.get_input_embeddings()(ids), None
        if prompt.pixel_values is not None:
            features = model.get_image_features(prompt.pixel_values, prompt.image_grid_thw, return_dict=True)
            x[is_image] = torch.cat(features.pooler_output)
            # transformers 5.17 gives each level whole, later ones by image.
            deepstack = [f if isinstance(f, torch.Tensor) else torch.cat(f) for f in features.deepstack_features]

        def last_hidden() -> torch.Tensor:
            out = model.language_model(
                inputs_embeds=x,
                position_ids=positions,
                visual_pos_masks=is_image,
                deepstack_visual_embeds=deepstack,
                use_cache=False,
            )
            return out.last_hidden_state[:, -1:]

        def append(embedding: torch.Tensor) -> None:
            nonlocal x, positions, is_image
            x = torch.cat((x, embedding), dim=1)
            positions = torch.cat((positions, (positions.max() + 1).expand(3, 1, 1)), dim=2)
            is_image = torch.cat((is_image, torch.zeros(1, 1, dtype=torch.bool)), dim=1)

        latents: list[torch.Tensor] = []
        answer: list[int] = []
        hidden = last_hidden()
        for _ in range(k):
            append(hidden)
            hidden = last_hidden()
            latents.append(hidden[0, 0])
        while len(answer) < max_new_tokens and not (answer and answer[-1] in self.stop_ids):
            answer.append(int(self.reference.lm_head(hidden).argmax()))
            append(model.get_input_embeddings()(torch.tensor([answer[-1:]])))
            hidden = last_hidden()
        return torch.stack(latents), answer

    @property
    def stop_ids(self) -> list[int]:
        return self.reference.generation_config.eos_token_id


MakeTiny = Callable[..., TinyModel]


def tiny_config(**changes: Any) -> Qwen3VLConfig:
    """changes: text_*, vision_* set fields of the two parts, anything else of the whole."""
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 4,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 2],
    }
    whole: dict[str, Any] = {
        "tie_word_embeddings": False,
        "image_token_id": IMAGE_ID,
        "video_token_id": VIDEO_ID,
        "vision_start_token_id": VISION_START_ID,
        "vision_end_token_id": VISION_END_ID,
    }
    for name, value in changes.items():
        part, _, field = name.partition("_")
        if name in whole:
            whole[name] = value
        else:
            {"text": text, "vision": vision}[part][field] = value
    vision["out_hidden_size"] = text["hidden_size"]
    return Qwen3VLConfig(text_config=text, vision_config=vision, **whole)


def random_changes(seed: int) -> dict[str, Any]:
    """One of very many shapes of Qwen3-VL, for tiny_config."""
    draw = random.Random(seed)
    head_dim = draw.choice([8, 10, 12, 16, 20, 24, 32])
    kv_heads, groups = draw.choice([1, 1, 2, 3]), draw.choice([1, 2, 3, 4])
    height, width = draw.randint(0, head_dim // 6), draw.randint(0, head_dim // 6)
    depth, vision_heads = draw.randint(1, 4), draw.randint(1, 3)
    return {
        "text_hidden_size": draw.choice([32, 40, 56]),
        "text_intermediate_size": draw.choice([24, 57, 80]),
        "text_num_hidden_layers": draw.randint(1, 4),
        "text_num_attention_heads": kv_heads * groups,
        "text_num_key_value_heads": kv_heads,
        "text_head_dim": head_dim,
        "text_rms_norm_eps": draw.choice([1e-6, 1e-5]),
        "text_rope_parameters": {
            "rope_type": "default",
            "rope_theta": draw.choice([100.0, 10000.0, 5e6]),
            "mrope_section": [head_dim // 2 - height - width, height, width],
            "mrope_interleaved": True,
        },
        "vision_depth": depth,
        "vision_num_heads": vision_heads,
        "vision_hidden_size": vision_heads * draw.choice([4, 8, 12]),
        "vision_intermediate_size": draw.choice([16, 33]),
        "vision_patch_size": draw.choice([2, 3, 4]),
        "vision_temporal_patch_size": draw.randint(1, 2),
        "vision_spatial_merge_size": draw.randint(1, 3),
        "vision_num_position_embeddings": draw.choice([1, 9, 25, 36, 50]),
        "vision_deepstack_visual_indexes": draw.sample(range(depth), draw.randint(0, depth)),
        "tie_word_embeddings": draw.random() < 0.5,
    }


def pytest_make_parametrize_id(val: object) -> str | None:
    return str(val).removeprefix("torch.") if isinstance(val, torch.dtype) else None


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_single_threaded() -> None:
    torch.set_num_threads(1)  # tiny tensors: threads only cost
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def make_tiny(tmp_path_factory: pytest.TempPathFactory) -> MakeTiny:
    """make_tiny(seed=0, stop_ids=[...], random_shape=False, **changes): a checkpoint with weights from `seed`."""

    def make(seed: int = 0, stop_ids: Sequence[int] = (7,), random_shape: bool = False, **changes: Any) -> TinyModel:
        torch.manual_seed(seed)
        shape = random_changes(seed) if random_shape else {}
        reference = Qwen3VLForConditionalGeneration(tiny_config(**{**shape, **changes})).eval()
        with torch.no_grad():
            for parameter in reference.parameters():  # fresh weights are too small to tell anything apart
                parameter.add_(torch.randn_like(parameter) * 0.15)
        reference.generation_config.eos_token_id = list(stop_ids)
        reference.generation_config.pad_token_id = 0
        directory = tmp_path_factory.mktemp("tiny")
        reference.save_pretrained(directory)
        return TinyModel(directory, reference)

    return make


@pytest.fixture(scope="session")
def tiny(make_tiny: MakeTiny) -> TinyModel:
    """One small checkpoint for everything that does not depend on the shape."""
    return make_tiny(0)


@pytest.fixture(scope="session")
def talker(make_tiny: MakeTiny) -> TinyModel:
    """A checkpoint with a byte-level tokenizer and a preprocessor: pictures of 4 to 16 visual tokens."""
    tokenizer = train_tokenizer(["Is the liver visible in this scan? Where is the lesion? yes no left right"], 320)
    token_id = tokenizer.convert_tokens_to_ids
    tiny = make_tiny(
        1,
        stop_ids=[tokenizer.eos_token_id],
        text_vocab_size=len(tokenizer),
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )
    save_tokenizer(tokenizer, tiny.directory)
    size = {"shortest_edge": 16 * 16, "longest_edge": 32 * 32}
    preprocessor = json.dumps({**PREPROCESSOR, "patch_size": 4, "size": size})
    (tiny.directory / "preprocessor_config.json").write_text(preprocessor)
    return tiny


@pytest.fixture(scope="session")
def assert_nothing_held() -> Callable[[vitalrt.Model], None]:
    """Every page is free, or kept for whoever comes; nobody waits or runs."""

    def check(model: vitalrt.Model) -> None:
        cache, statistics = model.engine.cache, model.engine.statistics()
        cache.pool.check_integrity()
        cache.prefixes.check_integrity()
        assert cache.num_available_pages == cache.pool.num_blocks
        assert (statistics.num_waiting, statistics.num_running) == (0, 0)

    return check


@pytest.fixture
def model(tiny: TinyModel, assert_nothing_held: Callable[[vitalrt.Model], None]) -> vitalrt.Model:
    """The tiny model; whatever a test does, nobody may hold a page of its cache afterwards."""
    yield tiny.model
    assert_nothing_held(tiny.model)
