from __future__ import annotations

import pytest
import torch

from vitalrt.model.scaffold import VisualProjector
from vitalrt_kernels.latent_projector import (
    FusedProjector,
    ProjectorWeights,
    dropout_mask,
    latent_projector,
    latent_projector_reference,
)

EPS = 1e-5


def random_case(rows: int, width: int, features: int) -> tuple[torch.Tensor, ProjectorWeights, torch.Tensor]:
    """z, weights and a cotangent in float64, of the sizes that training sees: z far from unit norm."""
    torch.manual_seed(rows)
    norms = [1 + torch.randn(n, dtype=torch.float64) / 4 for n in (width, width, features, features)]
    w1, w2 = (torch.randn(n, width, dtype=torch.float64) / width**0.5 for n in (width, features))
    z = 4 * torch.randn(rows, width, dtype=torch.float64) + 0.5
    return z, ProjectorWeights(norms[0], norms[1], w1, w2, norms[2], norms[3]), torch.randn(rows, features).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("shape", "dropout"), [((1, 64, 32), 0.0), ((7, 97, 53), 0.1), ((131, 33, 17), 0.6), ((0, 8, 4), 0.1)]
)
def test_kernel(dtype: torch.dtype, shape: tuple[int, int, int], dropout: float, device: str, assert_close) -> None:
    """Value and every gradient, against float64 on the same (rounded) inputs."""
    z, weights, cotangent = random_case(*shape)
    rounded = [tensor.to(device, dtype).requires_grad_() for tensor in (z, *weights)]
    exact = [tensor.detach().double().requires_grad_() for tensor in rounded]
    expected = latent_projector_reference(exact[0], ProjectorWeights(*exact[1:]), EPS, dropout, seed=2**40 + 5)
    actual = FusedProjector.apply(rounded[0], EPS, dropout, 2**40 + 5, *rounded[1:])
    assert_close("latent_projector", actual, expected)
    cotangent = cotangent.to(device, dtype)
    expected_grads = torch.autograd.grad(expected, exact, cotangent.double())
    for actual_grad, expected_grad in zip(torch.autograd.grad(actual, rounded, cotangent), expected_grads, strict=True):
        assert_close("latent_projector_grad", actual_grad, expected_grad)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_under_autocast_it_is_as_exact_as_torchs_own(dropout: float, device: str) -> None:
    """As a bf16 run trains it: fp32 weights, products in bf16, and a backward pass that autocast does not reach."""
    z, weights, cotangent = random_case(5, 64, 24)
    exact = [tensor.float().double().requires_grad_() for tensor in (z, *weights)]
    expected = latent_projector_reference(exact[0], ProjectorWeights(*exact[1:]), EPS, dropout, seed=3)
    wanted = [expected, *torch.autograd.grad(expected, exact, cotangent)]
    errors = []
    for projector in (FusedProjector.apply, torchs_own):
        inputs = [tensor.to(device, torch.float32).requires_grad_() for tensor in (z, *weights)]
        with torch.autocast(device, torch.bfloat16):
            y = projector(inputs[0], EPS, dropout, 3, *inputs[1:])
        found = [y, *torch.autograd.grad(y, inputs, cotangent.to(device, torch.float32))]
        assert all(tensor.dtype == torch.float32 for tensor in found)
        pairs = [(a.detach().cpu(), b.detach()) for a, b in zip(found, wanted, strict=True)]
        errors.append([float((a - b).norm() / b.norm()) for a, b in pairs])
    assert errors[0][0] > 1e-4, "autocast was off"
    # The gradient of the last bias is a sum of the cotangent alone: exact up to fp32's rounding.
    assert all(ours < max(1.3 * theirs, 1e-6) for ours, theirs in zip(*errors, strict=True)), errors


def torchs_own(z: torch.Tensor, eps: float, dropout: float, seed: int, *weights: torch.Tensor) -> torch.Tensor:
    return latent_projector_reference(z, ProjectorWeights(*weights), eps, dropout, seed)


def test_reference_gradients() -> None:
    z, weights, _ = random_case(3, 5, 4)
    inputs = [tensor.requires_grad_() for tensor in (z, *weights)]
    assert torch.autograd.gradcheck(
        lambda z, *weights: latent_projector_reference(z, ProjectorWeights(*weights), EPS, 0.3, 7), inputs
    )


def test_reference_is_the_scaffolds() -> None:
    projector = VisualProjector("res_mlp_ln", 24, 10).eval()
    norm_in, norm_out = projector.norm_in, projector.norm_out
    parameters = (norm_in.weight, norm_in.bias, projector.hidden.weight, projector.output.weight)
    weights = ProjectorWeights(*parameters, norm_out.weight, norm_out.bias)
    z = torch.randn(6, 24)
    torch.testing.assert_close(latent_projector(z, weights, norm_in.eps), projector(z[None])[0])


def test_parameter_count_is_the_papers() -> None:
    with torch.device("meta"):
        projector = VisualProjector("res_mlp_ln", 4096, 1152)
    assert round(sum(p.numel() for p in projector.parameters()) / 1e6, 2) == 21.51


def test_dropout_mask_is_philox_and_fair() -> None:
    # Known answer of Philox 4x32-10 for a counter and a key of zeros (Random123): its first word is 0x6627e8d5.
    cpu = torch.device("cpu")
    assert dropout_mask((1, 1), 0x6627E8D5 / 2**32, 0, cpu).item()
    assert not dropout_mask((1, 1), 0x6627E8D6 / 2**32, 0, cpu).item()
    mask = dropout_mask((300, 1000), 0.1, 3, cpu)
    assert abs(float(mask.double().mean()) - 0.9) < 0.003
    assert not torch.equal(mask, dropout_mask((300, 1000), 0.1, 4, cpu))
    assert torch.equal(mask[:7, :11], dropout_mask((7, 11), 0.1, 3, cpu))  # a cell's fate is its own


def test_bad_arguments() -> None:
    z, weights, _ = random_case(3, 5, 4)
    for bad, says in [(weights._replace(w1=weights.w1[:4]), "w1"), (weights._replace(w2=weights.w2.float()), "w2")]:
        with pytest.raises(ValueError, match=says):
            latent_projector(z, bad)
    with pytest.raises(ValueError, match="dropout"):
        latent_projector(z, weights, dropout=1.0)
