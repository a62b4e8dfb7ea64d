from __future__ import annotations

import pytest
import torch

from vitalrt_kernels.turn_heads import rotate, turn_heads, turn_heads_reference


def random_case(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    angles = 100 * torch.rand(shape[0], 1, shape[2])
    return (3 * torch.randn(shape)).to(device, dtype), angles.cos().to(device), angles.sin().to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shape", "num_heads"), [((5, 48, 72), 32), ((3, 9, 2), 6), ((1, 3, 10), 3), ((0, 3, 8), 2)])
def test_kernel(dtype, shape, num_heads: int, device: str, assert_close) -> None:
    from vitalrt_kernels.gpu import turn_heads as gpu

    qkv, cos, sin = random_case(shape, dtype, device)
    turned = gpu.turn_heads(qkv, num_heads, cos, sin)
    assert turned.shape == (shape[0], num_heads, shape[2]) and turned.dtype == dtype
    assert_close("turn_heads", turned, turn_heads_reference(qkv.double(), num_heads, cos.double(), sin.double()))


def test_reference_is_the_towers() -> None:
    qkv, cos, sin = random_case((7, 6, 8), torch.bfloat16, "cpu")
    torch.testing.assert_close(turn_heads(qkv, 4, cos, sin), rotate(qkv[:, :4].float(), cos, sin).bfloat16())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"qkv": torch.ones(4, 6)}, "qkv: expected .P, at least 4, D"),
        ({"qkv": torch.ones(4, 3, 8)}, "qkv: expected"),
        ({"qkv": torch.ones(4, 6, 7)}, "D even"),
        ({"cos": torch.ones(4, 8)}, "cos: expected"),
        ({"sin": torch.ones(4, 1, 8).double()}, "sin: expected"),
        ({"qkv": torch.ones(6, 4, 8).transpose(0, 1)}, "not contiguous"),
    ],
)
def test_bad_arguments(changes: dict[str, torch.Tensor], says: str) -> None:
    arguments = {"qkv": torch.ones(4, 6, 8), "cos": torch.ones(4, 1, 8), "sin": torch.ones(4, 1, 8)} | changes
    with pytest.raises(ValueError, match=says):
        turn_heads(arguments["qkv"], 4, arguments["cos"], arguments["sin"])
