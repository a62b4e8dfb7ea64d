"""A random phantom model for every test of the loop with gradients."""

from __future__ import annotations

import pytest

from vitalrt_training.backbone import generation_config, new_backbone, phantom_config, save_preprocessor
from vitalrt_training.data.phantom import ask, draw_phantom
from vitalrt_training.tokenizer import save_tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def random_phantom(tmp_path_factory):
    """A phantom model that has learnt nothing, as a checkpoint directory."""
    directory = tmp_path_factory.mktemp("random_phantom")
    texts = [
        text for index in range(20) for s in ask(draw_phantom("train", 0, index)) for text in (s.question, s.answer)
    ]
    tokenizer = train_tokenizer(texts, 400)
    save_tokenizer(tokenizer, directory)
    save_preprocessor(directory)
    new_backbone(phantom_config(tokenizer), seed=0).save_pretrained(directory)
    generation_config(tokenizer).save_pretrained(directory)
    return directory
