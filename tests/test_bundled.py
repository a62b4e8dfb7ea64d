"""The bundled checkpoint: what it may weigh, and that it answers by looking."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import vitalrt
from vitalrt.api import BUNDLED
from vitalrt.model.scaffold import Scaffold
from vitalrt.model.vision_encoder import open_encoder
from vitalrt_training.data.phantom import ask, draw_phantom
from vitalrt_training.data.roi import phantom_roi_features
from vitalrt_training.evaluate import Phantoms, evaluate

DEMO = Path(__file__).parents[1] / "examples" / "demo.png"


@pytest.fixture(scope="module")
def model():
    return vitalrt.load(device="cpu")


def test_it_is_small_and_holds_no_pickle(model):
    files = [path for path in BUNDLED.rglob("*") if path.is_file()]
    assert sum(parameter.numel() for parameter in model.weights.parameters()) <= 6_000_000
    assert sum(file.stat().st_size for file in files) <= 20_000_000
    assert {file.suffix for file in files} <= {".json", ".jinja", ".safetensors"}


@pytest.mark.parametrize(
    ("question", "answer"),
    [("Where is the cyst?", "lower left"), ("Can the kidney be seen here?", "no")],
)
def test_the_demo_is_answered_right(model, question, answer):
    assert str(model.generate(DEMO, question)) == answer


def test_its_scaffolding_can_be_put_back(model):
    """The text decoder reads words from a latent, and the projector a direction in the encoder's feature space."""
    scaffold = Scaffold.load(BUNDLED)
    answer = model.generate(DEMO, "Where is the cyst?", k=2)
    with torch.no_grad():
        logits = scaffold.text_logits(answer.latents[None], torch.zeros(1, 2, 1, dtype=torch.int64))
        projected = scaffold.projector(answer.latents[None])
    first_words = [model.processor.decode([int(token)]).strip() for token in logits[0, :, 0].argmax(-1)]
    assert first_words == ["The", "It"]  # is in the lower half; is in the left half
    assert projected.shape == (1, 2, 128)


def test_its_latents_point_at_what_its_encoder_sees_in_the_region(model):
    """More at the feature of the region that is asked about than at those of other questions' regions."""
    encoder = open_encoder(BUNDLED / "encoder")
    assert encoder.id == model.checkpoint.vital.encoder
    phantoms = [draw_phantom("test", seed=12, index=index) for index in range(40)]
    asked = [
        (phantom, [sample]) for phantom in phantoms for sample in ask(phantom) if sample.question_type == "location"
    ]
    regions = np.stack([roi.feature for roi in phantom_roi_features(encoder, asked)])
    requests = [vitalrt.Request(phantom.image, sample.question, k=4) for phantom, [sample] in asked]
    latents = torch.stack([answer.latents[-1] for answer in model.generate_batch(requests)])
    with torch.no_grad():
        aims = normalize(Scaffold.load(BUNDLED).projector(latents), dim=-1)
    cosines = aims @ torch.from_numpy(regions).T
    others = cosines[~torch.eye(len(cosines), dtype=torch.bool)]
    assert len(cosines) >= 20
    assert float(cosines.diagonal().mean()) > float(others.mean()) + 0.2


def test_it_answers_fresh_phantoms_and_fails_when_it_is_shown_other_images(model):
    """A sample of what `vitalrt eval` measures on 2,000; the thresholds leave room for its smaller number."""
    report = evaluate(model, Phantoms("test", seed=11, count=60), [model.checkpoint.vital.k])
    assert report["closed_questions"] > 300
    assert report["accuracy"] >= 0.88
    assert report["shuffled_accuracy"] <= report["majority_accuracy"] + 0.15
