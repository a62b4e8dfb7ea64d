from __future__ import annotations

import pytest
import torch

from vitalrt_kernels import decode_attention
from vitalrt_kernels.norm_rope_append import Rope, norm_rope_append
from vitalrt_kernels.paged_attention import (
    Append,
    num_splits,
    paged_attention,
    paged_attention_reference,
    splits_up_to,
)
from vitalrt_kernels.tickets import new_tickets

PAGE = 4


def random_case(
    lengths: list[int], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: str, page: int = PAGE
):
    """Pages in random order; every slot that belongs to no context is NaN, and page numbers past a length are wild."""
    torch.manual_seed(sum(lengths))
    pages_per_row = -(-max(lengths) // page) + 1
    num_pages = len(lengths) * pages_per_row
    pages = torch.randperm(num_pages).view(len(lengths), pages_per_row)
    caches = torch.full((2, num_pages * page, kv_heads, head_dim), float("nan"))
    for row, length in enumerate(lengths):
        slots = (pages[row, :, None] * page + torch.arange(page)).flatten()[:length]
        caches[:, slots] = torch.randn(2, length, kv_heads, head_dim)
        pages[row, -(-length // page) :] = 2**30
    caches = caches.to(device, dtype)
    q = 3 * torch.randn(len(lengths), heads, head_dim)
    int32 = {"dtype": torch.int32, "device": device}
    return q.to(device, dtype), *caches, pages.to(**int32), torch.tensor(lengths, **int32), page


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("lengths", "heads"),
    [
        ([1], (8, 2, 16)),
        ([257], (4, 1, 128)),
        ([5, 0, 131, 64], (6, 2, 24)),
        ([67, 3], (3, 3, 10)),
        ([90], (34, 2, 8)),
        ([700], (2, 1, 16)),
    ],
)
def test_kernel(dtype, lengths, heads, device, assert_close, skip_if_dot_is_wrong, monkeypatch) -> None:
    from vitalrt_kernels.gpu import paged_attention as gpu

    skip_if_dot_is_wrong(dtype)
    monkeypatch.setattr(gpu, "PART_CELLS", 128)  # so that a short context is combined in several rounds
    case = random_case(lengths, *heads, dtype, device)
    tickets = new_tickets(len(lengths) * heads[1], device)
    expected = paged_attention_reference(*[x.double() for x in case[:3]], *case[3:])
    for splits in (num_splits(heads[1], max(lengths)), 8, 2):  # each finds the tickets as the one before left them
        assert_close("paged_attention", gpu.paged_attention(*case, tickets, None, splits), expected)
    assert not bool(tickets.any())


@pytest.mark.parametrize("page", [1, 12, 64, 100, 128])
@pytest.mark.parametrize("head_dim", [1, 7, 24])
def test_pages_that_are_no_part_of_a_block_and_odd_heads(page: int, head_dim: int, device: str, assert_close) -> None:
    from vitalrt_kernels.gpu import paged_attention as gpu

    case = random_case([150, 0, 65], 6, 2, head_dim, torch.float32, device, page)
    expected = paged_attention_reference(*[x.double() for x in case[:3]], *case[3:])
    assert_close("paged_attention", gpu.paged_attention(*case, new_tickets(6, device), None, splits=2), expected)


def frequencies_of(head_dim: int) -> torch.Tensor:
    return 1e-4 ** torch.linspace(0, 1, head_dim // 2)


def append_case(
    lengths: list[int], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: str, page: int = PAGE
):
    """As random_case, with q, k and v as projected, and NaN where the new keys and values are to go.

    Every new token is at a position of its own, that of its row times 1000.
    """
    _, *caches, pages, row_lengths, page_size = random_case(lengths, heads, kv_heads, head_dim, dtype, device, page)
    for row, length in enumerate(lengths):
        if length:
            slot = int(pages[row, (length - 1) // page]) * page + (length - 1) % page
            for cache in caches:
                cache[slot] = float("nan")
    qkv = (3 * torch.randn(len(lengths), heads + 2 * kv_heads, head_dim)).to(device, dtype)
    norm = (1 + torch.randn(heads + kv_heads, head_dim) / 4).to(device, dtype)
    angles = 1000.0 * torch.arange(len(lengths))[:, None] * frequencies_of(head_dim)
    turns = torch.cat((angles.cos(), angles.sin()), dim=1).to(device)
    return (qkv, *caches, pages, row_lengths, page_size), Append(norm, 1e-6, turns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("lengths", "heads"),
    [
        ([1], (8, 2, 16)),
        ([257], (4, 1, 128)),
        ([5, 0, 131, 64], (6, 2, 24)),
        ([65, 3], (3, 3, 10)),
        ([90], (34, 2, 8)),
        ([66], (32, 2, 8)),
        ([700], (2, 1, 16)),
    ],
)
@pytest.mark.parametrize("page", [PAGE, 12])
def test_kernel_that_appends(
    dtype, lengths, heads, page, device, assert_close, skip_if_dot_is_wrong, monkeypatch
) -> None:
    from vitalrt_kernels.gpu import paged_attention as gpu

    skip_if_dot_is_wrong(dtype)
    splits = num_splits(heads[1], max(lengths))
    if page != PAGE:
        monkeypatch.setattr(gpu, "PART_CELLS", 128)  # so that a short context is combined in several rounds
        splits = 8 if max(lengths) > 512 else 2  # so that one has several blocks
    case, append = append_case(lengths, *heads, dtype, device, page)
    exact = [x.double() if x.is_floating_point() else x for x in case[:5]]
    expected = paged_attention_reference(*exact, page, append._replace(norm_weight=append.norm_weight.double()))
    before = [cache.clone() for cache in case[1:3]]
    tickets = new_tickets(len(lengths) * heads[1], device)
    assert_close("paged_attention", gpu.paged_attention(*case, tickets, append, splits), expected)
    for cache, old, wide in zip(case[1:3], before, exact[1:3], strict=True):
        was_written = old.isnan().all(-1).all(-1) & ~wide.isnan().any(-1).any(-1)
        assert int(was_written.sum()) == sum(length > 0 for length in lengths)
        assert_close("norm_rope_append", cache[was_written], wide[was_written])
        others = ~was_written
        assert torch.equal(cache[others].nan_to_num(7), old[others].nan_to_num(7)), "only the new slots are written"


def test_appending_is_norm_rope_append_and_then_attention() -> None:
    case, append = append_case([9, 0, 4], 6, 2, 8, torch.float32, "cpu")
    qkv, k_cache, v_cache, pages, lengths, page_size = case
    caches = k_cache.clone(), v_cache.clone()
    rope = Rope(frequencies_of(8), torch.zeros(4, dtype=torch.int64))
    slots = torch.tensor([int(pages[0, 2]) * PAGE, -1, int(pages[2, 0]) * PAGE + 3])
    positions = 1000 * torch.arange(3).expand(3, -1).contiguous()
    q = norm_rope_append(qkv, append.norm_weight, append.eps, positions, rope, *caches, slots)
    apart = paged_attention(q, *caches, pages, lengths, page_size, new_tickets(6, "cpu"))
    assert torch.equal(paged_attention(*case, new_tickets(6, "cpu"), append), apart)
    assert torch.equal(k_cache.nan_to_num(7), caches[0].nan_to_num(7)) and bool(k_cache[slots[::2]].isfinite().all())


def test_contexts_are_split_by_their_length() -> None:
    assert splits_up_to(8, 9000) == splits_up_to(8, 1025) == [8, 16, 32]
    assert (splits_up_to(8, 700), splits_up_to(8, 8), splits_up_to(64, 9000)) == ([8, 16], [8], [4])
    assert [num_splits(8, longest) for longest in (0, 65, 512, 513, 1024, 1500, 9000)] == [8, 8, 8, 16, 16, 32, 32]
    assert num_splits(64, 2048) == 4
    assert num_splits(512, 2048) == 1


def test_reference_is_decode_attention() -> None:
    q, k_cache, v_cache, pages, lengths, page_size = random_case([9, 9], 6, 2, 8, torch.float32, "cpu")
    positions = torch.arange(9)
    slots = pages[:, positions // page_size].long() * page_size + positions % page_size
    actual = paged_attention(q, k_cache, v_cache, pages, lengths, page_size, new_tickets(4, "cpu"))
    torch.testing.assert_close(actual, decode_attention(q, k_cache, v_cache, slots, None))


@pytest.mark.parametrize(
    ("index", "bad", "says"),
    [
        (0, torch.ones(2, 5, 8), "G dividing H"),
        (1, torch.ones(48, 2, 8).half(), "k_cache: expected"),
        (2, torch.ones(4, 2, 8), "v_cache: expected"),
        (3, torch.ones(2, 3, dtype=torch.int64), "pages: expected"),
        (4, torch.ones(3, dtype=torch.int32), "lengths: expected"),
        (5, 0, "page_size: expected"),
    ],
)
def test_bad_arguments(index: int, bad: torch.Tensor, says: str) -> None:
    case = list(random_case([9, 9], 6, 2, 8, torch.float32, "cpu"))
    case[index] = bad
    with pytest.raises(ValueError, match=says):
        paged_attention(*case, new_tickets(4, "cpu"))
    with pytest.raises(ValueError, match="tickets: expected"):
        paged_attention(*random_case([9, 9], 6, 2, 8, torch.float32, "cpu"), new_tickets(3, "cpu"))
    with pytest.raises(ValueError, match="splits: expected at least 1, got 0"):
        paged_attention(*random_case([9, 9], 6, 2, 8, torch.float32, "cpu"), new_tickets(4, "cpu"), splits=0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"norm_weight": torch.ones(6, 8)}, "append.norm_weight: expected"),
        ({"turns": torch.ones(2, 8).double()}, "append.turns: expected"),
        ({"turns": torch.ones(1, 8)}, "append.turns: expected"),
    ],
)
def test_bad_append(changes: dict[str, torch.Tensor], says: str) -> None:
    case, append = append_case([9, 9], 6, 2, 8, torch.float32, "cpu")
    with pytest.raises(ValueError, match=says):
        paged_attention(*case, new_tickets(4, "cpu"), append._replace(**changes))
    with pytest.raises(ValueError, match=r"H \+ 2 G"):
        paged_attention(case[0][:, :4].contiguous(), *case[1:], new_tickets(4, "cpu"), append)
