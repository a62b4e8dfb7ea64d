"""Kernel tests on a machine without a GPU run in Triton's interpreter; results start as NaN.

triton reads TRITON_INTERPRET when it is first imported, and transformers imports it: tests/conftest.py sets it before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# How far a kernel may be from its reference in float64: the largest error over the root mean square of the reference. A
# result of unit variance reaches four to five times its rms, so rounding it once costs up to 5 u (u: fp32 6e-8,
# fp16 4.9e-4, bf16 3.9e-3). docs/numerics.md says how many roundings each kernel does.
TOLERANCES = {
    "rms_norm": {torch.float32: 2e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2},
    "latent_projector": {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2},
    "latent_projector_grad": {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 0.16},
    "swiglu": {torch.float32: 2e-6, torch.float16: 1e-2, torch.bfloat16: 8e-2},
    "turn_heads": {torch.float32: 2e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2},
    "linear_decode": {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2},
    "norm_rope_append": {torch.float32: 2e-6, torch.float16: 1e-2, torch.bfloat16: 8e-2},
    "paged_attention": {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2},
}

AssertClose = Callable[[str, torch.Tensor, torch.Tensor], None]


@pytest.fixture
def device() -> str:
    pytest.importorskip("triton", reason="the Triton forms need triton: pip install triton")
    return DEVICE


@pytest.fixture
def skip_if_dot_is_wrong() -> Callable[[torch.dtype], None]:
    def skip(dtype: torch.dtype) -> None:
        if dtype == torch.bfloat16 and IS_INTERPRETED:
            pytest.skip("the interpreter's bf16 tl.dot is wrong; test_ptx.py runs what is compiled")

    return skip


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """torch.empty gives NaN under deterministic algorithms, so that a cell no kernel wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def assert_close() -> AssertClose:
    """assert_close(kernel, actual, expected): expected in float64."""

    def check(kernel: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
        assert expected.dtype == torch.float64
        actual, expected = actual.detach(), expected.detach()
        assert actual.shape == expected.shape
        if not actual.numel():
            return
        scale = expected.square().mean().sqrt().clamp(min=1e-12)
        tolerance = TOLERANCES[kernel][actual.dtype]
        if actual.dtype == torch.bfloat16 and IS_INTERPRETED:
            tolerance *= 2  # the interpreter truncates to bf16 where a GPU rounds
        error = float((actual.double() - expected).abs().max() / scale)
        assert error <= tolerance, f"{kernel} {actual.dtype}: error {error:.2e}"

    return check
