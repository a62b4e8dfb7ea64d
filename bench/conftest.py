"""What to measure: pytest bench/ --bench-model DIR --bench-device cuda ..."""

from pathlib import Path

import pytest
from PIL import Image

import vitalrt
from vitalrt.api import BUNDLED, Model
from vitalrt_training.data.phantom import ask, draw_phantom


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vitalrt benchmarks")
    group.addoption("--bench-model", default=str(BUNDLED), help="Qwen3-VL directory or hub id [the bundled model]")
    group.addoption("--bench-adapter", help="PEFT LoRA directory or hub id")
    group.addoption("--bench-device", default="auto")
    group.addoption("--bench-dtype", default="auto")
    group.addoption("--bench-image", type=Path, help="image file [a phantom]")
    group.addoption("--bench-question", help="question about it [the phantom's own]")
    group.addoption("--bench-rounds", type=int, default=40, help="rounds of the interleaved run [40]")
    group.addoption("--bench-out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")


@pytest.fixture(scope="session")
def model(pytestconfig: pytest.Config) -> Model:
    option = pytestconfig.getoption
    # No round may find what the one before has left.
    return vitalrt.load(
        option("bench_model"),
        option("bench_adapter"),
        option("bench_device"),
        option("bench_dtype"),
        prefix_cache=False,
    )


@pytest.fixture(scope="session")
def image_and_question(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    image, question = pytestconfig.getoption("bench_image"), pytestconfig.getoption("bench_question")
    phantom = draw_phantom("test", seed=0, index=0)
    if image is None:
        image = tmp_path_factory.mktemp("bench") / "phantom.png"
        Image.fromarray(phantom.image).save(image)
    return image, question or ask(phantom)[0].question
