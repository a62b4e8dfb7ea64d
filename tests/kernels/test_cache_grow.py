from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from vitalrt_kernels.cache_grow import cache_grow, cache_grow_reference


def latent_loop(x: torch.Tensor, weight: torch.Tensor, steps: int, storages: list[torch.Tensor] | None) -> torch.Tensor:
    """A prefix x, then `steps` of a loop that feeds attention's output back, through a growing or a copied cache."""
    past = [s[:, :, :0] for s in storages] if storages else [x.new_empty(*x.shape[:2], 0, x.shape[3])] * 2
    outputs = []
    for _ in range(steps + 1):
        new = [x @ w for w in weight[:2]]
        if storages:
            past = [cache_grow(s, p, n) for s, p, n in zip(storages, past, new, strict=True)]
        else:
            past = [cache_grow_reference(p, n) for p, n in zip(past, new, strict=True)]
        x = scaled_dot_product_attention((x @ weight[2])[:, :, -1:], *past)
        outputs.append(x)
    return torch.cat(outputs, dim=2)


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_loop_equals_the_copying_cache(steps: int) -> None:
    torch.manual_seed(steps)
    x, weight = torch.randn(2, 3, 5, 7, dtype=torch.float64), torch.randn(3, 7, 7, dtype=torch.float64) / 7**0.5
    storages = [torch.full((2, 3, 5 + steps, 7), float("nan"), dtype=torch.float64) for _ in range(2)]
    inputs = (x.requires_grad_(), weight.requires_grad_())
    expected = latent_loop(*inputs, steps, None)
    cotangent = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, inputs, cotangent)
    actual = latent_loop(*inputs, steps, storages)
    torch.testing.assert_close(actual, expected)
    for grad, expected_grad in zip(torch.autograd.grad(actual, inputs, cotangent), expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


def test_grows_in_place_and_leaves_the_rest() -> None:
    storage = torch.full((1, 2, 6, 4), float("nan"))
    first = cache_grow(storage, storage[:, :, :0], torch.ones(1, 2, 3, 4))
    before = storage.clone()
    second = cache_grow(storage, first, torch.full((1, 2, 1, 4), 2.0))
    assert second.data_ptr() == storage.data_ptr()
    assert torch.equal(storage[:, :, :3], before[:, :, :3]) and bool(storage[:, :, 4:].isnan().all())
    assert torch.equal(second[:, :, 3], torch.full((1, 2, 4), 2.0))


def test_gradcheck() -> None:
    def grow_twice(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        storage = torch.empty(1, 2, 5, 3, dtype=torch.float64)
        first = cache_grow(storage, storage[:, :, :0], a)
        return first.sin().sum() + cache_grow(storage, first, b).square().cumsum(2)

    a, b = (torch.randn(1, 2, n, 3, dtype=torch.float64, requires_grad=True) for n in (3, 2))
    assert torch.autograd.gradcheck(grow_twice, (a, b))


def test_bad_arguments() -> None:
    storage = torch.zeros(1, 2, 4, 3)
    empty, new = storage[:, :, :0], torch.ones(1, 2, 2, 3)
    for arguments, says in [
        ((storage, empty, torch.ones(1, 2, 5, 3)), "room for 5"),
        ((storage, empty, new[:, :1]), "new: expected"),
        ((storage, torch.ones(1, 2, 1, 3), new), "prefix: expected"),
        ((storage, empty, new.half()), "storage: expected"),
        ((storage[0], empty, new), "4 axes"),
    ]:
        with pytest.raises(ValueError, match=says):
            cache_grow(*arguments)
