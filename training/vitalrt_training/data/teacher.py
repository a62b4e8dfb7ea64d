"""The rule-based teacher: reads masks and writes answers with reasoning steps, or None where a person could argue.

Everything is in image space: left is the left of the image. x and y are fractions of width and height from the upper
left corner. Every function that returns a Verdict keeps a wide margin to the other answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitalrt_training.data.modalities import KINDS
from vitalrt_training.data.records import Target

OFF_MIDDLE = 0.13
"""A centroid at least this far from a midline is clearly on one side of it."""
NEAR_MIDDLE = 0.05
"""A centroid at most this far from both midlines is clearly in the center."""
CLEAR_RATIO = 1.6
LARGE_RADIUS = 0.097
"""Of the shorter side; a target whose disc of equal area has a greater radius is large."""
NUMBERS = ("zero", "one", "two", "three", "four")


@dataclass(frozen=True)
class Verdict:
    """An answer and the reasoning steps that lead to it."""

    answer: str
    chain: tuple[str, ...]


def centroid(mask: np.ndarray) -> tuple[float, float]:
    """(x, y) of the centre of mass."""
    height, width = mask.shape
    rows, columns = mask.sum(axis=1), mask.sum(axis=0)
    area = rows.sum()
    x = float(columns @ (np.arange(width) + 0.5)) / area / width
    y = float(rows @ (np.arange(height) + 0.5)) / area / height
    return x, y


def side(mask: np.ndarray) -> str | None:
    """Half of the image: "left" or "right"."""
    return _half(centroid(mask)[0], "left", "right")


def place(mask: np.ndarray) -> str | None:
    """One of "upper left", "upper right", "lower left", "lower right", "center"."""
    x, y = centroid(mask)
    if max(abs(x - 0.5), abs(y - 0.5)) <= NEAR_MIDDLE:
        return "center"
    vertical, horizontal = _half(y, "upper", "lower"), _half(x, "left", "right")
    return f"{vertical} {horizontal}" if vertical and horizontal else None


def size(mask: np.ndarray) -> str:
    """Either "small" or "large"."""
    return "large" if np.sqrt(mask.sum() / np.pi) > LARGE_RADIUS * min(mask.shape) else "small"


def shape(mask: np.ndarray) -> str | None:
    """One of "round", "oval" and "irregular", by comparison with the ellipse that has the same second moments."""
    points = np.stack(np.nonzero(mask)).astype(float)
    points -= points.mean(axis=1, keepdims=True)
    covariance = np.cov(points)
    # A full ellipse lies within two standard deviations of its centre in every direction.
    outside = np.mean((points * np.linalg.solve(covariance, points)).sum(axis=0) > 4)
    if outside > 0.05:
        return "irregular"
    narrow, wide = np.linalg.eigvalsh(covariance)
    ratio = np.sqrt(wide / narrow)
    return "round" if ratio < 1.2 else "oval" if ratio > 1.4 else None


def brightness(image: np.ndarray, mask: np.ndarray) -> str | None:
    """Either "bright" or "dark" against what surrounds the target; None where it differs little. image: [H, W, 3]."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    margin = 2 + len(rows) // 8
    box = (
        slice(max(0, rows[0] - margin), rows[-1] + margin + 1),
        slice(max(0, columns[0] - margin), columns[-1] + margin + 1),
    )
    gray, inside = image[box].mean(axis=-1), mask[box]
    difference = gray[inside].mean() - gray[~inside].mean()
    return None if abs(difference) < 20 else "bright" if difference > 0 else "dark"


def _half(position: float, low: str, high: str) -> str | None:
    if abs(position - 0.5) < OFF_MIDDLE:
        return None
    return low if position < 0.5 else high


def _where(target: Target) -> str:
    """A step that says where a target with a clear place is."""
    return f"The {target.name} is in the {place(target.mask)}."


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def judge_presence(name: str, shown: list[Target]) -> Verdict:
    """shown: the targets of this name."""
    if not shown:
        return Verdict("no", (f"No {name} is present.",))
    if len(shown) > 1:
        return Verdict("yes", (f"There are {NUMBERS[len(shown)]} {KINDS[name].plural}.",))
    return Verdict("yes", (f"One {name} is present.",))


def name_target(target: Target) -> Verdict | None:
    return Verdict(target.name, (_where(target),)) if place(target.mask) else None


def judge_side(target: Target) -> Verdict | None:
    half = side(target.mask)
    return Verdict(half, (f"The {target.name} is {half} of the middle.",)) if half else None


def locate(target: Target) -> Verdict | None:
    spot = place(target.mask)
    if spot is None:
        return None
    if spot == "center":
        return Verdict(spot, (f"The {target.name} is not in a corner.", "It is near the middle."))
    vertical, horizontal = spot.split()
    return Verdict(spot, (f"The {target.name} is in the {vertical} half.", f"It is in the {horizontal} half."))


def describe(image: np.ndarray, target: Target) -> Verdict | None:
    """One sentence; two steps, or three where the target differs in brightness from its surroundings."""
    spot = place(target.mask)
    if spot is None:
        return None
    extent, form, tone = size(target.mask), shape(target.mask), brightness(image, target.mask)
    words = [word for word in (extent, form, tone) if word]
    chain = [_where(target), f"It is {extent} and {form}." if form else f"It is {extent}."]
    if tone:
        chain.append(f"It is {tone}er than its surroundings.")
    return Verdict(f"A {' '.join(words)} {target.name} in the {spot}.", tuple(chain))


def compare_size(a: Target, b: Target) -> Verdict | None:
    """Is a larger than b?"""
    area_a, area_b = int(a.mask.sum()), int(b.mask.sum())
    if max(area_a, area_b) < CLEAR_RATIO * min(area_a, area_b) or None in (place(a.mask), place(b.mask)):
        return None
    larger, smaller = (a, b) if area_a > area_b else (b, a)
    steps = (_where(a), _where(b), f"The {larger.name} is larger than the {smaller.name}.")
    return Verdict(_yes(larger is a), steps)


def compare_position(a: Target, b: Target, axis: int) -> Verdict | None:
    """Is a to the left of b (axis 0), or above b (axis 1)?"""
    first, second = centroid(a.mask)[axis], centroid(b.mask)[axis]
    if abs(first - second) < OFF_MIDDLE or None in (place(a.mask), place(b.mask)):
        return None
    relation = ("left of", "above")[axis] if first < second else ("right of", "below")[axis]
    return Verdict(_yes(first < second), (_where(a), _where(b), f"The {a.name} is {relation} the {b.name}."))


def judge_inside(inner: Target, outer: Target) -> Verdict | None:
    """Is inner inside outer? None where it straddles the edge."""
    share = float((inner.mask & outer.mask).sum() / inner.mask.sum())
    if 0.0 < share < 0.95 or place(outer.mask) is None:
        return None
    relation = "inside" if share else "outside"
    sizes = f"It is {size(outer.mask)} and the {inner.name} is {size(inner.mask)}."
    return Verdict(_yes(share > 0), (_where(outer), sizes, f"The {inner.name} is {relation} the {outer.name}."))


def judge_count(shown: list[Target]) -> Verdict | None:
    """Are there more than two of these (same name)?"""
    highest = min(shown, key=lambda target: centroid(target.mask)[1])
    spot = place(highest.mask)
    if spot is None:
        return None
    name, number = shown[0].name, NUMBERS[len(shown)]
    total = f"There are {number} {KINDS[name].plural}." if len(shown) > 1 else f"There is one {name}."
    more = len(shown) > 2
    steps = (
        f"At least one {name} is present.",
        f"The highest one is in the {spot}.",
        total,
        f"{number.capitalize()} is {'' if more else 'not '}more than two.",
    )
    return Verdict(_yes(more), steps)


def judge_larger_side(pair: list[Target]) -> Verdict | None:
    """Is the larger of these two (same name) on the left?"""
    smaller, larger = sorted(pair, key=lambda target: int(target.mask.sum()))
    half, spots = side(larger.mask), (place(larger.mask), place(smaller.mask))
    if larger.mask.sum() < CLEAR_RATIO * smaller.mask.sum() or half is None or None in spots:
        return None
    steps = (
        f"There are two {KINDS[larger.name].plural}.",
        f"The smaller one is in the {spots[1]}.",
        f"The larger one is in the {spots[0]}.",
        f"The larger one is {half} of the middle.",
    )
    return Verdict(_yes(half == "left"), steps)
