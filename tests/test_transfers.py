from __future__ import annotations

import pytest
import torch

from vitalrt.transfers import MAX_PINNED_BYTES, is_pinned_for, pinned, rows_of, sent

CPU = torch.device("cpu")


def test_the_cpu_sends_itself_nothing() -> None:
    tensor = torch.arange(3)
    assert pinned(tensor, CPU) is tensor and sent(tensor, CPU) is tensor


@pytest.mark.parametrize("rows", [[], [2], [3, 0, 0]])
def test_rows(rows: list[int]) -> None:
    tensor = torch.arange(12).view(4, 3)
    assert torch.equal(rows_of(tensor, rows), tensor[rows])


def test_a_device_is_sent_a_copy() -> None:
    meta = torch.device("meta")
    assert sent(torch.arange(3), meta).device == meta and rows_of(torch.empty(4, 2, device=meta), [1]).shape == (1, 2)


def test_what_lies_on_the_device_stays() -> None:
    meta = torch.device("meta")
    tensor = torch.empty(3, device=meta)
    assert sent(tensor, meta) is tensor


def test_only_what_is_worth_it_is_pinned() -> None:
    cuda = torch.device("cuda")
    assert is_pinned_for(MAX_PINNED_BYTES, cuda) and not is_pinned_for(MAX_PINNED_BYTES + 1, cuda)
    assert not is_pinned_for(1, CPU)
