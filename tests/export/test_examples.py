"""The standalone drivers say what vitalrt says, without importing it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vitalrt.export

EXAMPLES = Path(__file__).parents[2] / "examples"
QUESTION = "Where is the lesion?"


@pytest.fixture(scope="module")
def exported(talker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vitalrt.export.onnx(talker.directory, tmp_path_factory.mktemp("onnx") / "out", verify=False).directory


@pytest.fixture(params=[(40, 32), (97, 61), (9, 14)], ids=["kept", "shrunk", "grown"])
def picture(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A smooth picture: a byte of difference between two bicubic filters should not decide."""
    width, height = request.param
    y, x = np.mgrid[0:height, 0:width] / 9
    waves = np.stack((np.sin(x), np.cos(y), np.sin(x + y)), axis=-1)
    Image.fromarray(np.uint8(127 + 120 * waves)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def says(command: list[str], exported: Path, picture: Path, k: int) -> str:
    arguments = [*command, str(exported), str(picture), QUESTION, str(k)]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=EXAMPLES, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.removesuffix("\n")


@pytest.mark.parametrize("k", [0, 4])
def test_numpy(k: int, talker, exported: Path, picture: Path) -> None:
    expected = talker.model.generate(picture, QUESTION, k=k).text
    assert says([sys.executable, "onnx_numpy.py"], exported, picture, k) == expected


def test_numpy_needs_no_vitalrt() -> None:
    source = (EXAMPLES / "onnx_numpy.py").read_text()
    assert "import vitalrt" not in source and "import torch" not in source
    assert len(source.splitlines()) <= 60


def test_node(talker, exported: Path, picture: Path) -> None:
    node = shutil.which("node")
    if node is None or not (EXAMPLES / "node_modules" / "onnxruntime-node").is_dir():
        pytest.skip("needs node, and `npm install` in examples/")
    expected = talker.model.generate(picture, QUESTION, k=4).text
    assert says([node, "onnx_node.mjs"], exported, picture, 4) == expected
