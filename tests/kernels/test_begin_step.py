from __future__ import annotations

import pytest
import torch

from vitalrt_kernels.begin_step import Rows, begin_step, begin_step_reference

VOCAB, STOP_IDS = 37, [5, 30, 7]
# latents left, length, limit, token: thinking, at its limit, answering, stopped, thinking over a stop token, new, past.
CASES = [(3, 9, 12, 1), (2, 12, 12, 1), (0, 8, 20, 36), (0, 3, 20, 30), (1, 7, 8, 5), (0, 0, 1, 0), (0, 11, 9, 5)]


def random_case(width: int, dtype: torch.dtype, device: str) -> tuple[Rows, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, embed, stop_ids, frequencies."""
    torch.manual_seed(width)
    numbers = torch.tensor(CASES, dtype=torch.int32, device=device).T.contiguous()
    latents_left, lengths, limits, tokens = numbers.unbind()
    batch = len(CASES)
    hidden, embed = torch.randn(batch, width), torch.randn(VOCAB, width)
    offsets = torch.randint(-8, 3, (batch,), dtype=torch.int32, device=device)
    rows = Rows(hidden.to(device, dtype), tokens.long(), latents_left, lengths, limits, offsets)
    frequencies = (1e-4 ** torch.linspace(0, 1, 6)).to(device)
    return rows, embed.to(device, dtype), torch.tensor(STOP_IDS, device=device), frequencies


def copied(rows: Rows) -> Rows:
    return Rows(*[tensor.clone() for tensor in rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 48, 130])
@pytest.mark.parametrize("num_stops", [0, 1, 3])
def test_kernel(dtype: torch.dtype, width: int, num_stops: int, device: str, monkeypatch) -> None:
    from vitalrt_kernels.gpu import begin_step as gpu

    monkeypatch.setattr(gpu, "MAX_BLOCK", 64)  # so that a wide row takes several rounds
    rows, embed, stop_ids, frequencies = random_case(width, dtype, device)
    expected_rows = copied(rows)
    expected = begin_step_reference(expected_rows, embed, stop_ids[:num_stops], frequencies)
    actual = gpu.begin_step(rows, embed, stop_ids[:num_stops], frequencies)
    for name, ours, theirs in zip(
        actual._fields + rows._fields, (*actual, *rows), (*expected, *expected_rows), strict=True
    ):
        same = torch.allclose(ours, theirs, rtol=0, atol=1e-6) if name == "turns" else torch.equal(ours, theirs)
        assert same and ours.dtype == theirs.dtype, name


@pytest.mark.parametrize("position", [0, 1, 1000, 2**18, 2**24])
def test_turns_are_exact_to_rounding(position: int, device: str) -> None:
    """However many turns the angle has."""
    from vitalrt_kernels.gpu import begin_step as gpu

    rows, embed, stop_ids, frequencies = random_case(8, torch.float32, device)
    rows.limits.fill_(2**30)
    rows.offsets.copy_(position - rows.lengths)
    frequencies = torch.cat((frequencies, torch.rand(10, device=device)))
    turns = gpu.begin_step(rows, embed, stop_ids, frequencies).turns[0]  # of a row that thinks
    angles = (torch.tensor(float(position)) * frequencies.cpu()).double()  # rounded to fp32, as positions are turned
    torch.testing.assert_close(turns.cpu().double(), torch.cat((angles.cos(), angles.sin())), rtol=0, atol=3e-7)


def test_what_each_row_is_fed() -> None:
    rows, embed, stop_ids, frequencies = random_case(8, torch.float32, "cpu")
    before = copied(rows)
    x, turns, reach = begin_step(rows, embed, stop_ids, frequencies)
    runs = [True, False, True, False, True, True, False]
    for row, (latents_left, length, limit, token) in enumerate(CASES):
        if runs[row]:
            assert torch.equal(x[row], before.hidden[row] if latents_left else embed[token])
            angles = float(length + before.offsets[row]) * frequencies
        else:
            assert not x[row].any()
            angles = 0 * frequencies
        assert torch.equal(turns[row], torch.cat((angles.cos(), angles.sin())))
        assert reach[row] == (length + 1 if runs[row] else 0)
        assert rows.lengths[row] == length + runs[row]
        assert rows.latents_left[row] == latents_left - (runs[row] and latents_left > 0)
        assert rows.limits[row] == (0 if not latents_left and token in STOP_IDS else limit)
    again = begin_step(rows._replace(tokens=torch.ones_like(rows.tokens)), embed, stop_ids, frequencies)
    assert again.reach[3] == 0, "a row that has stopped stays idle, whatever token it is given"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden": torch.ones(7)}, "hidden, embed, stop_ids: expected"),
        ({"hidden": torch.ones(7, 8).half()}, "embed: expected"),
        ({"tokens": torch.ones(7, dtype=torch.int32)}, "tokens: expected"),
        ({"lengths": torch.ones(7, dtype=torch.int64)}, "lengths: expected"),
        ({"limits": torch.ones(6, dtype=torch.int32)}, "limits: expected"),
    ],
)
def test_bad_arguments(changes: dict[str, torch.Tensor], says: str) -> None:
    rows, *others = random_case(8, torch.float32, "cpu")
    with pytest.raises(ValueError, match=says):
        begin_step(rows._replace(**changes), *others)
    with pytest.raises(ValueError, match="frequencies: expected"):
        begin_step(rows, *others[:2], torch.ones(6).double())
