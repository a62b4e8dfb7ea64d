"""The visual window: where each latent aims in the picture, in the feature space of training's vision encoder.

Source: VITAL section 3.3 ("Dual Interpretability"), figures 3 and 12.
K latent steps, d backbone width, v feature width, R, C rows and columns of patches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import normalize

from vitalrt.model.scaffold import Scaffold
from vitalrt.model.vision_encoder import PatchEncoder


@torch.inference_mode()
def aim(scaffold: Scaffold, latents: torch.Tensor) -> torch.Tensor:
    """VP(z_k), unit norm.  latents: [K, d].  Returns float32 [K, v] on the CPU."""
    projected = scaffold.projector(latents.to(scaffold.pj_in.weight)[None])[0]
    return normalize(projected.float(), dim=-1).cpu()


def heatmaps(encoder: PatchEncoder, pictures: Sequence[np.ndarray], aims: torch.Tensor) -> list[torch.Tensor]:
    """Cosine of every patch of every picture with every aim.

    pictures: uint8 [H, W, 3], of any size: the encoder stretches them to its grid, so that a patch covers 1/R of the
    height and 1/C of the width.  aims: [K, v], unit norm.  Returns float32 [K, R, C] for each picture.
    """
    patches = [normalize(encoder.encode([picture])[0], dim=-1) for picture in pictures]
    return [torch.einsum("rcv,kv->krc", found, aims) for found in patches]


def peak_of(heatmap: torch.Tensor) -> str:
    """Where a heat map [R, C] is greatest, in words: the middle of that patch."""
    row, column = divmod(int(heatmap.argmax()), heatmap.shape[1])
    return f"{(column + 0.5) / heatmap.shape[1]:.0%} from the left, {(row + 0.5) / heatmap.shape[0]:.0%} from the top"
