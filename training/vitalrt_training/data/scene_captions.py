"""Terse descriptions of a whole phantom: every name it could show, and right behind the name whether and where it is.

They teach a decoder to look: what follows a name can only be known from the visual tokens that are like it. Answers to
questions ask for the same, but from further away and in a word or two.
"""

from __future__ import annotations

import numpy as np

from vitalrt_training.data import teacher
from vitalrt_training.data.modalities import CATALOG, KINDS
from vitalrt_training.data.records import Phantom

REQUEST = "List what is shown."
NUMBERS = ("none", "one", "two", "three", "four")
CAPTION_STREAM = 2


def describe_scene(phantom: Phantom, order: np.random.Generator) -> str:
    """For example "kidney none; cyst one lower left small; liver one upper right large", in a random order.

    One name of another modality, never shown, is among them.
    """
    names = [kind.name for kind in CATALOG[phantom.modality].kinds]
    others = [name for name in KINDS if name not in names]
    names.append(others[int(order.integers(len(others)))])
    return "; ".join(_describe(phantom, names[i]) for i in order.permutation(len(names)))


def _describe(phantom: Phantom, name: str) -> str:
    shown = [target.mask for target in phantom.targets if target.name == name]
    words = [name, NUMBERS[len(shown)]]
    if len(shown) == 1:
        words += [teacher.place(shown[0]) or "between", teacher.size(shown[0])]
    return " ".join(words)
