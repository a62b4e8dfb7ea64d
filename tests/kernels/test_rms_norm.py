from __future__ import annotations

import pytest
import torch

from vitalrt.model.decoder import RMSNorm
from vitalrt_kernels.rms_norm import rms_norm, rms_norm_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 128), (3, 97), (2, 1), (40, 48), (5, 4096), (0, 8)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_kernel(dtype: torch.dtype, shape: tuple[int, int], with_residual: bool, device: str, assert_close) -> None:
    from vitalrt_kernels.gpu import rms_norm as gpu

    torch.manual_seed(0)
    x, residual = (3 * torch.randn(2, *shape, dtype=torch.float64)).to(device, dtype)
    weight = (1 + torch.randn(shape[1]) / 4).to(device, dtype)
    if not with_residual:
        out = torch.empty_like(x)
        assert gpu.rms_norm(x, weight, 1e-6, None, out) is out
        assert_close("rms_norm", out, rms_norm_reference(x.double(), weight, 1e-6))
        return
    normed, total = gpu.rms_norm(x, weight, 1e-6, residual, None)
    assert_close("rms_norm", total, x.double() + residual.double())
    assert_close("rms_norm", normed, rms_norm_reference(total.double(), weight, 1e-6))


def test_reference_is_the_decoders() -> None:
    norm = RMSNorm(48, 1e-5).bfloat16()
    norm.weight.data.normal_()
    x, residual = torch.randn(2, 7, 48).bfloat16()
    assert torch.equal(rms_norm(x, norm.weight, 1e-5), norm(x))
    normed, total = rms_norm(x, norm.weight, 1e-5, residual)
    assert torch.equal(normed, norm(x + residual)) and torch.equal(total, x + residual)
    out = torch.empty_like(x)
    assert rms_norm(x, norm.weight, 1e-5, out=out) is out and torch.equal(out, norm(x))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"x": torch.ones(4)}, "x: expected"),
        ({"x": torch.ones(4, 2).T}, "not contiguous"),
        ({"weight": torch.ones(3)}, "weight: expected"),
        ({"weight": torch.ones(4, dtype=torch.float16)}, "weight: expected contiguous torch.float32"),
        ({"residual": torch.ones(4)}, "residual: expected"),
        ({"out": torch.ones(2, 5)}, "out: expected"),
    ],
)
def test_bad_arguments(changes: dict[str, torch.Tensor], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        rms_norm(**{"x": torch.ones(2, 4), "weight": torch.ones(4), "eps": 1e-6, **changes})
