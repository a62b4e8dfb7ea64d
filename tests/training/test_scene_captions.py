"""Descriptions of phantoms: true of the masks, every name of the modality, one that is never shown."""

from __future__ import annotations

import numpy as np

from vitalrt_training.data import teacher
from vitalrt_training.data.modalities import CATALOG
from vitalrt_training.data.phantom import draw_phantom
from vitalrt_training.data.scene_captions import NUMBERS, describe_scene


def parse(caption):
    """Name -> (number, rest). Names may be of two words."""
    parsed = {}
    for part in caption.split("; "):
        words = part.split(" ")
        at = next(i for i, word in enumerate(words) if word in NUMBERS)
        parsed[" ".join(words[:at])] = (NUMBERS.index(words[at]), " ".join(words[at + 1 :]))
    return parsed


def test_a_description_says_of_every_name_what_the_masks_show():
    for index in range(60):
        phantom = draw_phantom("validation", 3, index)
        parsed = parse(describe_scene(phantom, np.random.default_rng(index)))
        names = {kind.name for kind in CATALOG[phantom.modality].kinds}
        assert names < set(parsed)
        (stranger,) = set(parsed) - names
        assert parsed[stranger] == (0, "")
        for name in names:
            masks = [target.mask for target in phantom.targets if target.name == name]
            number, rest = parsed[name]
            assert number == len(masks)
            if number == 1:
                assert rest == f"{teacher.place(masks[0]) or 'between'} {teacher.size(masks[0])}"


def test_the_order_is_the_generators():
    phantom = draw_phantom("validation", 3, 0)
    captions = {describe_scene(phantom, np.random.default_rng(seed)) for seed in range(20)}
    assert len(captions) > 10
    assert describe_scene(phantom, np.random.default_rng(7)) == describe_scene(phantom, np.random.default_rng(7))
