"""Parts of bench.gpu whose answers are known without a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bench.gpu.profile import _shares


def launch(start: float, end: float) -> SimpleNamespace:
    return SimpleNamespace(time_range=SimpleNamespace(start=start, end=end))


def test_what_launches_took_and_gaps_make_the_whole_time() -> None:
    """One after a gap, one that began inside the other, one that ended inside it."""
    took, gaps = _shares([launch(10, 14), launch(16, 20), launch(18, 25), launch(21, 24), launch(25, 26)])
    assert (took, gaps) == ([4, 4, 5, 0, 1], 2)
    assert sum(took) + gaps == 26 - 10


def test_the_same_work_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing of it is captured as overlapping, while other work still is."""
    pytest.importorskip("triton")
    from bench.gpu.ours import InTurn, Ours
    from bench.gpu.shapes import prompt_of, random_model, small_config
    from vitalrt.engine.device_step import DeviceStep
    from vitalrt_kernels.gpu import overlap

    monkeypatch.setattr(overlap, "can_overlap", lambda device: True)
    seen: list[bool] = []
    feed = DeviceStep._feed

    def watched(self: DeviceStep, *tensors: torch.Tensor) -> None:
        seen.append(overlap.can_overlap(self.k_cache.device))
        feed(self, *tensors)

    monkeypatch.setattr(DeviceStep, "_feed", watched)
    with torch.no_grad():
        model, prompt = random_model(small_config(), torch.device("cpu"), torch.float32), prompt_of(small_config(), 60)
        tokens = [contender(model, 1, 256).request(prompt, 2, 3) for contender in (Ours, InTurn)]
    assert tokens[0] == tokens[1] and seen == [True] * 4 + [False] * 4


@pytest.mark.parametrize("broken", ["", "request", "go_on", "two_rows"])
def test_one_number_that_differs_in_turn_is_seen(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from bench.gpu import requests
    from bench.gpu.ours import InTurn
    from bench.gpu.shapes import prompt_of, random_model, small_config

    with torch.no_grad():
        model, prompt = random_model(small_config(), torch.device("cpu"), torch.float32), prompt_of(small_config(), 60)
        assert requests.Contenders(model, quick=True).overlap_agrees(prompt) is None, "nothing overlaps here"
        monkeypatch.setattr(requests, "can_overlap", lambda device: True)
        contenders = requests.Contenders(model, quick=True)
        original = getattr(InTurn, broken) if broken else None

        def late(self: InTurn, *args: object) -> object:
            result = original(self, *args)
            for part in (self.step.latents, self.step.rows.hidden, result):
                if isinstance(part, torch.Tensor):
                    part[0] += 1e-6
            return result

        if broken:
            monkeypatch.setattr(InTurn, broken, late)
        assert contenders.overlap_agrees(prompt) is (not broken)
        contenders.all.remove(contenders.in_turn)
        assert contenders.overlap_agrees(prompt) is None, "it could not run"
