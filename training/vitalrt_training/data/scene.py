"""Which things a phantom shows, where and how large: drawn so that no name gives its place, size or presence away.

Every kind is present in exactly half of its modality's scenes, whatever else is present; places and sizes do not
depend on the kind. A question about a name can therefore only be answered by looking.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitalrt_training.data.modalities import Kind, Modality

# Quadrants first, then the centre; signs of the offset from the middle of the image (x to the right, y down).
CELLS = ((-1, -1), (1, -1), (-1, 1), (1, 1), (0, 0))
COUNTS = (1, 2, 3, 4)
COUNT_ODDS = (0.52, 0.16, 0.16, 0.16)


@dataclass(frozen=True)
class Item:
    """One organ or lesion to draw. x, y: fractions of width and height; radius: fraction of the shorter side."""

    kind: Kind
    x: float
    y: float
    radius: float


def compose_scene(rng: np.random.Generator, modality: Modality) -> tuple[str, list[Item]]:
    """Returns (layout, items). layout "nested": a large outer thing and a small one inside or outside of it, chances
    even; "spread": things apart from each other, sizes small or large, at most one lesion kind several times."""
    present = _draw_present(rng, modality)
    names = {kind.name for kind in present}
    if modality.nested and names.issuperset(modality.nested) and rng.random() < 0.65:
        return "nested", _nest(rng, modality, present)
    return "spread", _spread(rng, _repeat_one_lesion(rng, present))


def _draw_present(rng: np.random.Generator, modality: Modality) -> list[Kind]:
    """A random subset in which a set and its complement are equally likely: each kind is in half of them."""
    kinds = list(modality.kinds)
    order = rng.permutation(len(kinds))
    draw = rng.random()
    if draw < 0.03:
        return []
    if draw > 0.97:
        return kinds
    size = 1 if rng.random() < 0.5 else 2
    return [kinds[i] for i in order[:size]]


def _repeat_one_lesion(rng: np.random.Generator, present: list[Kind]) -> list[Kind]:
    """Shows one of the lesion kinds one to four times; a scene with all three kinds keeps one of each."""
    lesions = [kind for kind in present if kind.type == "lesion"]
    if not lesions or len(present) > 2:
        return present
    chosen = lesions[rng.integers(len(lesions))]
    return present + [chosen] * (int(rng.choice(COUNTS, p=COUNT_ODDS)) - 1)


def _place(rng: np.random.Generator, cell: tuple[int, int], near: float, far: float) -> tuple[float, float]:
    """A point in a cell; quadrants keep `near` to `far` away from both midlines, the centre hugs the middle."""
    offset = rng.uniform(near, far, size=2) * cell if any(cell) else rng.uniform(-0.03, 0.03, size=2)
    return 0.5 + float(offset[0]), 0.5 + float(offset[1])


def _apart(items: list[Item]) -> bool:
    """Whether no two items touch, with a gap and whatever their shape."""
    for i, a in enumerate(items):
        for b in items[:i]:
            if np.hypot(a.x - b.x, a.y - b.y) < 1.2 * (a.radius + b.radius) + 0.02:
                return False
    return True


def _size_range(num_items: int, large: bool) -> tuple[float, float]:
    """Radii by class; the more there is to see, the smaller. Any large item has over 1.6 times the area of a small."""
    if num_items <= 2:
        return (0.13, 0.155) if large else (0.075, 0.09)
    if num_items == 3:
        return (0.12, 0.135) if large else (0.072, 0.085)
    return (0.105, 0.115) if large else (0.065, 0.078)


def _spread(rng: np.random.Generator, kinds: list[Kind]) -> list[Item]:
    shrink = 1.0
    while True:
        cells = rng.permutation(len(CELLS))[: len(kinds)]
        items = []
        for kind, cell in zip(kinds, cells, strict=True):
            x, y = _place(rng, CELLS[cell], 0.18, 0.26)
            radius = rng.uniform(*_size_range(len(kinds), rng.random() < 0.5)) * shrink
            items.append(Item(kind, x, y, radius))
        if _apart(items):
            return items
        # Slowly, so that sizes stay in their class: a crowded draw fits after a few dozen tries at most.
        shrink *= 0.998


def _nest(rng: np.random.Generator, modality: Modality, present: list[Kind]) -> list[Item]:
    by_name = {kind.name: kind for kind in present}
    outer, inner = (by_name[name] for name in modality.nested)
    others = [kind for kind in present if kind.name not in modality.nested]
    inside = rng.random() < 0.5
    shrink = 1.0
    while True:
        cells = rng.permutation(len(CELLS))
        x, y = _place(rng, CELLS[cells[0]], 0.17, 0.21)
        host = Item(outer, x, y, rng.uniform(0.19, 0.21) * shrink)
        radius = rng.uniform(0.068, 0.08) * shrink
        if inside:
            angle, away = rng.uniform(0, 2 * np.pi), 0.35 * host.radius * np.sqrt(rng.random())
            guest = Item(inner, x + away * np.cos(angle), y + away * np.sin(angle), radius)
        else:
            guest = Item(inner, *_place(rng, CELLS[cells[1]], 0.18, 0.26), radius)
        rest = [Item(kind, *_place(rng, CELLS[cells[2]], 0.18, 0.26), rng.uniform(0.07, 0.08)) for kind in others]
        if _apart([host, *rest] if inside else [host, guest, *rest]) and _apart([guest, *rest]):
            return [host, guest, *rest]
        shrink *= 0.998
