from __future__ import annotations

import pytest
import torch

from vitalrt_kernels.head_argmax import head_argmax, head_argmax_reference
from vitalrt_kernels.linear_decode import quantise_int8
from vitalrt_kernels.tickets import new_tickets


def whole_numbers(rows: int, vocab: int, width: int, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Small integers: every sum is exact in every dtype and order, so the token has to be exact, ties included."""
    torch.manual_seed(vocab)
    return tuple(torch.randint(-1, 2, (n, width)).to(device, dtype) for n in (rows, vocab))


def kernel(h: torch.Tensor, head, tickets: torch.Tensor) -> torch.Tensor:
    """As the Triton form gives it, into tokens that no head has."""
    from vitalrt_kernels.gpu import head_argmax as gpu

    tokens = torch.full((len(h),), -1, device=h.device)
    gpu.head_argmax(h, head, tickets, tokens)
    return tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 37, 40), (1, 1, 3), (1, 97, 2), (2, 101, 130), (16, 997, 9), (0, 5, 8)])
@pytest.mark.parametrize("int8", [False, True])
def test_kernel(
    dtype: torch.dtype, shape: tuple[int, int, int], int8: bool, device: str, skip_if_dot_is_wrong, monkeypatch
) -> None:
    from vitalrt_kernels.gpu import head_argmax as gpu

    monkeypatch.setattr(gpu, "SLICES_AT_ONCE", {1: 4, 16: 4})  # so that a small vocabulary takes several rounds

    if shape[0] > 1:
        skip_if_dot_is_wrong(dtype)
    h, head = whole_numbers(*shape, device, dtype)
    tickets = new_tickets(1, device)
    weight = quantise_int8(head * 127) if int8 else head
    for _ in range(2):  # the second launch finds the ticket as the first left it
        assert torch.equal(kernel(h, weight, tickets), (h.double() @ head.double().T).argmax(-1))
    assert int(tickets[0]) == 0


@pytest.mark.parametrize("winner", [0, 36])
def test_ties_go_to_the_lowest_id_and_nan_wins(winner: int, device: str) -> None:
    h, head = torch.ones(1, 4, device=device), torch.zeros(37, 4, device=device)
    tickets = new_tickets(1, device)
    assert int(kernel(h, head, tickets)) == int(head_argmax_reference(h, head)) == 0
    head[winner] = float("nan")
    assert int(kernel(h, head, tickets)) == int(head_argmax_reference(h, head)) == winner


def test_logits_are_compared_as_rounded(device: str) -> None:
    """256 and 257 are one number in bf16: the lower id wins although the other sum is larger."""
    h = torch.ones(1, 2, device=device, dtype=torch.bfloat16)
    head = torch.tensor([[0, 0], [256, 0], [256, 1]], device=device, dtype=torch.bfloat16)
    assert int(kernel(h, head, new_tickets(1, device))) == int((h @ head.T).argmax()) == 1


def test_bad_arguments() -> None:
    h, head, tickets = torch.ones(2, 4), torch.ones(6, 4), new_tickets(1, "cpu")
    for arguments, says in [
        ((torch.ones(4), head, tickets), "x: expected"),
        ((h, head.half(), tickets), "weight: expected"),
        ((h, head, tickets[:0]), "tickets: expected"),
        ((h, head, tickets.long()), "tickets: expected"),
        ((h, head, tickets, torch.zeros(2, dtype=torch.int32)), "out: expected"),
    ]:
        with pytest.raises(ValueError, match=says):
            head_argmax(*arguments)


def test_out_is_where_tokens_go() -> None:
    h, head, out = torch.eye(3)[:2], torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 0]]), torch.full((2,), -1)
    assert head_argmax(h, head, new_tickets(1, "cpu"), out=out) is out and out.tolist() == [2, 1]
