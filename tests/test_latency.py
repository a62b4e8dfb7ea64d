"""The arithmetic of the latency comparison, with contenders that take no time."""

import pytest
import torch

from vitalrt.latency import LATENT, WRITTEN, Contender, Row, Thought, interleave, speedup, table
from vitalrt.spread import Spread

CPU = torch.device("cpu")


def contender(name: str, asked: list[str], every: int = 1, num_tokens: int = 3, written: int = 0) -> Contender:
    def ask() -> int:
        asked.append(name)
        return num_tokens

    return Contender(name, Thought(written_tokens=written), ask, every)


def row(milliseconds: dict[int, float], engine: str = "vitalrt", thought: Thought = LATENT[-1]) -> Row:
    return Row(engine, thought, 2, milliseconds)


def test_contenders_take_turns_within_each_round() -> None:
    asked: list[str] = []
    rows = interleave([contender("a", asked), contender("b", asked)], 3, CPU)
    assert asked == ["a", "b"] * 4  # one round warms up and is not measured
    assert [list(row.milliseconds) for row in rows] == [[0, 1, 2]] * 2
    assert [row.engine for row in rows] == ["a", "b"]


def test_a_slow_contender_joins_every_nth_round() -> None:
    asked: list[str] = []
    rows = interleave([contender("a", asked), contender("slow", asked, every=3)], 7, CPU)
    assert list(rows[1].milliseconds) == [0, 3, 6]
    assert asked.count("slow") == 1 + 3


def test_a_written_thought_is_not_part_of_the_answer() -> None:
    [measured] = interleave([contender("a", [], num_tokens=70, written=64)], 1, CPU)
    assert measured.answer_tokens == 6


def test_speedup_pairs_rounds_before_it_takes_the_median() -> None:
    slow, fast = row({0: 100.0, 3: 30.0, 6: 80.0}), row({n: float(n + 1) for n in range(8)})
    assert speedup(slow, fast).p50 == pytest.approx(80 / 7)  # of 100/1, 30/4 and 80/7


def test_spread_interpolates_between_values() -> None:
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == pytest.approx((2.0, 3.5, 5.0))
    assert Spread.of([7.0]) == (7.0, 7.0, 7.0)


def test_table_compares_with_the_default_number_of_latent_steps() -> None:
    shown = table([row({0: 10.0}), row({0: 250.0}, thought=WRITTEN[-1])])
    assert list(shown.columns[-1].cells) == ["1.00", "25.00"]
    assert list(shown.columns[1].cells) == ["K=4", "CoT 920"]
