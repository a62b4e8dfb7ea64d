from __future__ import annotations

import pytest
import torch

from vitalrt_kernels.swiglu import swiglu, swiglu_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 2), (3, 2 * 97), (2, 2 * 1024), (5, 2 * 1500), (0, 8), (4, 0)])
def test_kernel(dtype: torch.dtype, shape: tuple[int, int], device: str, assert_close) -> None:
    from vitalrt_kernels.gpu import swiglu as gpu

    torch.manual_seed(0)
    x = (4 * torch.randn(shape, dtype=torch.float64)).to(device, dtype)
    y = gpu.swiglu(x)
    assert y.shape == (shape[0], shape[1] // 2) and y.dtype == dtype
    assert_close("swiglu", y, swiglu_reference(x.double()))


def test_of_large_gates(device: str) -> None:
    """exp(-gate) is infinite for one of them."""
    from vitalrt_kernels.gpu import swiglu as gpu

    x = torch.tensor([[-200.0, 200.0, 0.0, 2.0, 3.0, 4.0]], device=device)
    assert torch.equal(gpu.swiglu(x).cpu(), torch.tensor([[0.0, 600.0, 0.0]]))


def test_reference_is_torch() -> None:
    x = torch.randn(3, 10)
    torch.testing.assert_close(swiglu(x), torch.nn.functional.silu(x[:, :5]) * x[:, 5:])


@pytest.mark.parametrize(
    ("x", "says"),
    [(torch.ones(4), "expected .N, 2 I"), (torch.ones(2, 3), "expected .N, 2 I"), (torch.ones(4, 2).T, "contiguous")],
)
def test_bad_arguments(x: torch.Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        swiglu(x)
