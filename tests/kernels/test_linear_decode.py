from __future__ import annotations

import sys

import pytest
import torch
from torch.nn import functional as F

from vitalrt.model.decoder import RMSNorm
from vitalrt_kernels.linear_decode import (
    Int8Weight,
    Norm,
    linear_cublas,
    linear_decode,
    linear_decode_reference,
    quantise_int8,
)
from vitalrt_kernels.tuned import Tile

module = sys.modules[linear_decode.__module__]  # the package has a function of this name
STAGES = ["norm", "residual", "norm_swiglu", "plain"]


def random_case(stage: str, rows: int, outputs: int, width: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(rows)
    swiglu = stage == "norm_swiglu"
    case = {"x": torch.randn(rows, width), "weight": torch.randn(outputs * (1 + swiglu), width) / width**0.5}
    if "norm" in stage:
        case["norm"] = 1 + torch.randn(width) / 4
    if stage == "residual":
        case["residual"] = torch.randn(rows, outputs)
    return case


def options(case: dict[str, torch.Tensor], stage: str) -> tuple:
    norm = Norm(case["norm"], 1e-6) if "norm" in case else None
    return norm, case.get("residual"), stage == "norm_swiglu"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 37, 515), (1, 16, 64), (2, 33, 130), (16, 19, 257), (3, 40, 1280), (0, 5, 8)])
@pytest.mark.parametrize("int8", [False, True])
def test_kernel(stage, dtype, shape, int8, device, assert_close, skip_if_dot_is_wrong) -> None:
    from vitalrt_kernels.gpu import linear_decode as gpu

    if shape[0] > 1:
        skip_if_dot_is_wrong(dtype)
    case = {name: tensor.to(device, dtype) for name, tensor in random_case(stage, *shape).items()}
    exact = {name: tensor.double() for name, tensor in case.items()}
    weight, exact_weight = case["weight"], exact["weight"]
    if int8:
        weight = exact_weight = quantise_int8(case["weight"])
    actual = gpu.linear_decode(case["x"], weight, *options(case, stage))
    assert_close("linear_decode", actual, linear_decode_reference(exact["x"], exact_weight, *options(exact, stage)))


@pytest.mark.parametrize("stage", ["norm", "norm_swiglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "warps"), [(1, 1), (2, 2), (32, 1), (32, 4)])
@pytest.mark.parametrize("int8", [False, True])
def test_tiles_of_one_row(stage, dtype, outputs: int, warps: int, int8: bool, device: str, assert_close) -> None:
    """Lanes share the sums of as many outputs as there are: of one, of all 32; in more than one round."""
    from vitalrt_kernels.gpu import linear_decode as gpu

    columns = 256 * warps
    case = random_case(stage, 1, outputs + 1, columns + 259)
    case = {name: tensor.to(device, dtype) for name, tensor in case.items()}
    exact = {name: tensor.double() for name, tensor in case.items()}
    weight, exact_weight = case["weight"], exact["weight"]
    if int8:
        weight = exact_weight = quantise_int8(case["weight"])
    actual = gpu.linear_decode(case["x"], weight, *options(case, stage), Tile(outputs, columns, 1, warps))
    assert_close("linear_decode", actual, linear_decode_reference(exact["x"], exact_weight, *options(exact, stage)))


@pytest.mark.parametrize("rows", [1, 2])
def test_norm_of_what_fp16_cannot_hold_times_its_weight(rows: int, device: str, assert_close) -> None:
    from vitalrt_kernels.gpu import linear_decode as gpu

    torch.manual_seed(0)
    x, weight = (3e4 * torch.rand(rows, 64)).to(device, torch.float16), torch.randn(9, 64).to(device, torch.float16)
    norm = torch.full((64,), 8.0, dtype=torch.float16, device=device)
    actual = gpu.linear_decode(x, weight, Norm(norm, 1e-6), None, False)
    expected = linear_decode_reference(x.double(), weight.double(), Norm(norm.double(), 1e-6))
    assert_close("linear_decode", actual, expected)


def test_reference_is_the_decoders() -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(3, 24), torch.randn(3, 10)
    norm = RMSNorm(24, 1e-6)
    norm.weight.data.normal_()
    gate_up, down = torch.nn.Linear(24, 20, bias=False), torch.nn.Linear(10, 10, bias=False)
    gate, up = gate_up(norm(x)).chunk(2, dim=-1)
    with torch.no_grad():
        inner = linear_decode(x, gate_up.weight, Norm(norm.weight, 1e-6), swiglu=True)
        torch.testing.assert_close(inner, F.silu(gate) * up)
        torch.testing.assert_close(linear_decode(inner, down.weight, residual=residual), residual + down(inner))


def test_quantise_int8() -> None:
    weight = torch.randn(40, 300) * torch.logspace(-6, 3, 40)[:, None]
    weight[7] = 0
    values, scale = quantise_int8(weight)
    assert values.dtype == torch.int8 and int(values.min()) >= -127
    error = (values * scale[:, None] - weight).abs().amax(1)
    assert bool((error <= scale * 0.5001).all())
    assert bool((values[7] == 0).all()) and bool(scale.isfinite().all())
    assert bool((values.abs().amax(1)[weight.abs().amax(1) > 0] == 127).all())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"x": torch.ones(4)}, "x: expected"),
        ({"x": torch.ones(2, 4).half()}, "weight: expected"),
        ({"weight": torch.ones(6, 5)}, "weight: expected"),
        ({"weight": torch.ones(6)}, "weight: expected"),
        ({"weight": Int8Weight(torch.ones(6, 4, dtype=torch.int8), torch.ones(5))}, "weight.scale: expected"),
        ({"weight": torch.ones(5, 4), "swiglu": True}, "even number"),
        ({"norm": Norm(torch.ones(3), 1e-6)}, "norm.weight: expected"),
        ({"residual": torch.ones(2, 6), "swiglu": True}, "residual: expected"),
    ],
)
def test_bad_arguments(changes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        linear_decode(**{"x": torch.ones(2, 4), "weight": torch.ones(6, 4), **changes})


@pytest.mark.parametrize("stage", STAGES)
def test_cublas_form_is_the_same(stage: str) -> None:
    case = random_case(stage, 21, 34, 24)
    torch.testing.assert_close(
        linear_cublas(case["x"], case["weight"], *options(case, stage)),
        linear_decode(case["x"], case["weight"], *options(case, stage)),
    )


def test_more_rows_than_a_launch_takes(device: str, monkeypatch: pytest.MonkeyPatch, assert_close) -> None:
    """int8 goes 16 rows at a time; 21 rows are two launches."""
    monkeypatch.setattr(module, "runs_triton", lambda *tensors: True)
    case = random_case("residual", 21, 33, 40)
    case = {name: tensor.to(device) for name, tensor in case.items()}
    weight = quantise_int8(case["weight"])
    expected = linear_decode_reference(case["x"].double(), weight, residual=case["residual"].double())
    assert_close("linear_decode", linear_decode(case["x"], weight, residual=case["residual"]), expected)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_int8_of_many_rows(stage, dtype, monkeypatch: pytest.MonkeyPatch, assert_close) -> None:
    """As numbers of the rows' dtype; in fp16 sums that are not scaled yet would be infinite."""
    monkeypatch.setattr(module, "runs_triton", lambda *tensors: True)
    case = {name: tensor.to(dtype) for name, tensor in random_case(stage, 65, 20, 300).items()}
    case["x"] = case["x"] * 64 if "norm" not in case else case["x"]
    weight, exact = quantise_int8(case["weight"]), {name: tensor.double() for name, tensor in case.items()}
    actual = linear_decode(case["x"], weight, *options(case, stage))
    assert_close("linear_decode", actual, linear_decode_reference(exact["x"], weight, *options(exact, stage)))
