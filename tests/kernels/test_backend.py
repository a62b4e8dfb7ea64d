from __future__ import annotations

import subprocess
import sys

import torch

from vitalrt_kernels import why_not_triton
from vitalrt_kernels.backend import runs_triton


def test_the_cpu_takes_the_torch_form_and_says_so() -> None:
    assert not runs_triton(torch.ones(2))
    assert "cpu" in str(why_not_triton(torch.device("cpu")))


def test_importing_the_runtime_does_not_import_triton() -> None:
    program = "import sys, vitalrt_kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
