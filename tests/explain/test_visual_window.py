"""Heat maps: cosines of patches with what a latent aims at, and nothing else."""

from __future__ import annotations

import numpy as np
import torch

from vitalrt.explain.visual_window import aim, heatmaps, peak_of

WIDTH, FEATURE_WIDTH = 24, 10  # the scaffold's


class PlantedEncoder:
    """Random patches on a grid that is not square, one of them along a direction."""

    id, grid, width = "planted", (3, 5), FEATURE_WIDTH

    def __init__(self, direction, place):
        self.patches = torch.randn(*self.grid, FEATURE_WIDTH, generator=torch.Generator().manual_seed(3))
        self.patches[place] = 4 * direction

    def encode(self, images):
        return torch.stack([self.patches * (1 + image.mean()) for image in images])


def test_aims_are_unit_vectors_of_the_projector(scaffold):
    latents = torch.randn(4, WIDTH)
    aims = aim(scaffold, latents)
    with torch.no_grad():
        projected = scaffold.projector(latents[None])[0]
    torch.testing.assert_close(aims, projected / projected.norm(dim=-1, keepdim=True))


def test_every_value_is_a_cosine_and_the_planted_patch_is_found(scaffold):
    aims = aim(scaffold, torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(4)))
    encoder = PlantedEncoder(aims[1], (2, 4))
    pictures = [np.zeros((8, 6, 3), np.uint8), np.full((20, 30, 3), 200, np.uint8)]
    maps = heatmaps(encoder, pictures, aims)
    assert [found.shape for found in maps] == [(2, 3, 5)] * 2
    for k in range(2):
        for row in range(3):
            for column in range(5):
                patch = encoder.patches[row, column].double()
                cosine = float(patch @ aims[k].double() / patch.norm())
                assert abs(float(maps[0][k, row, column]) - cosine) < 1e-6
    torch.testing.assert_close(maps[0], maps[1])  # a longer feature is no likelier
    assert divmod(int(maps[0][1].argmax()), 5) == (2, 4)


def test_the_peak_is_told_by_the_middle_of_its_patch():
    heatmap = torch.zeros(4, 2)
    heatmap[3, 0] = 1
    assert peak_of(heatmap) == "25% from the left, 88% from the top"
