"""What a trained model's latents and losses look like from inside: similarity between steps, gradient per loss.

N samples, K latent steps, d backbone width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.nn.functional import normalize
from torch.nn.utils import get_total_norm

from vitalrt.errors import VitalError
from vitalrt_training.paradigms.vital import VitalBatch, VitalModel


def probe(model: VitalModel, batches: Iterable[VitalBatch], num_steps: int) -> dict[str, Any]:
    """Both probes over several batches, on the model's device, as plain numbers for a report.

    num_steps: how many latent steps every sample takes for the cosine matrix, as VITAL's figure 11 does; gradients are
    those of training, with each sample's own K. Gradient norms depend on the batch size: give the batches of training.
    Returns "samples", "batches", "cosine" (K lists of K numbers, [] where num_steps is 0) and "gradient_norms" (means
    over the batches in which a loss occurs).
    """
    latents: list[torch.Tensor] = []
    norms: defaultdict[str, list[float]] = defaultdict(list)
    num_samples = num_batches = 0
    for batch in batches:
        num_batches += 1
        num_samples += len(batch.num_steps)
        if num_steps:
            latents.append(_latents(model, batch, num_steps))
        for name, norm in gradient_norms(model, batch).items():
            norms[name].append(norm)
    if not num_batches:
        raise VitalError("batches: expected at least one, got none")
    return {
        "samples": num_samples,
        "batches": num_batches,
        "cosine": cosine_matrix(torch.cat(latents)).tolist() if latents else [],
        "gradient_norms": {name: fmean(found) for name, found in norms.items()},
    }


def cosine_matrix(latents: torch.Tensor) -> torch.Tensor:
    """S_ij, the mean over samples of cos(z_i, z_j) (VITAL appendix C.6, figure 11).

    latents: [N, K, d].  Returns [K, K] float32 with ones on the diagonal.
    """
    if latents.ndim != 3 or not len(latents):
        raise VitalError(f"latents: expected [N, K, d] with at least one sample, got {list(latents.shape)}")
    directions = normalize(latents.float(), dim=-1)
    return (directions @ directions.mT).mean(0)


def gradient_norms(model: VitalModel, batch: VitalBatch) -> dict[str, float]:
    """The norm over all LoRA parameters of the gradient of each loss times its lambda, by the loss's name.

    Without dropout; leaves gradients, random state and the modes of modules as they were. A loss that is switched off,
    or that nothing in the batch counts for, is left out.
    """
    parameters = [p for p in model.backbone.parameters() if p.requires_grad]
    norms: dict[str, float] = {}
    with _evaluating(model), torch.enable_grad():
        found = {name: mean for name, mean in model(batch).items() if mean.counted > 0}
        for name, mean in found.items():
            loss = model.weight_of(name) * mean.value()
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            norms[name] = float(get_total_norm([g for g in gradients if g is not None]))
    return norms


@torch.no_grad()
def _latents(model: VitalModel, batch: VitalBatch, num_steps: int) -> torch.Tensor:
    """[N, K, d] float32 on the CPU, every sample with num_steps steps."""
    with _evaluating(model):
        asked = torch.full_like(batch.num_steps, num_steps)
        loop = model.think(replace(batch, num_steps=asked, chain_ids=batch.chain_ids[:, :num_steps]))
    return torch.cat(loop.latents, dim=1).float().cpu()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training
