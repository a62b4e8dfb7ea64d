"""VITAL's three losses (section 3.3) and their switches. What is missing is left out of the means, never set to zero.

N samples, K most latent steps of the batch, d width, v feature width, A answer tokens, L tokens of a reasoning step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy, normalize

from vitalrt.errors import VitalError

IGNORED = -100
PER_STEP_ALPHAS = (0.0, 0.33, 0.67, 1.0)  # VITAL appendix C.5, for K = 4


@dataclass(frozen=True)
class LossConfig:
    """text_weight, visual_weight: lambda_text, lambda_visual; 0 switches a loss off.

    visual_reduction: how |VP(z_k) - f| is reduced over v. The paper's equation 6 is the sum; "mean" is our default,
    since a sum over 1,152 features would drown the other losses at lambda 0.1.
    visual_target: "shared" is f_ROI for every step; "per_step" goes from the global feature to it (appendix C.5).
    """

    text_weight: float = 1.0
    visual_weight: float = 0.1
    visual_reduction: str = "mean"
    visual_target: str = "shared"

    def __post_init__(self) -> None:
        for name, allowed in (("visual_reduction", ("mean", "sum")), ("visual_target", ("shared", "per_step"))):
            if getattr(self, name) not in allowed:
                raise VitalError(f"{name}: expected one of {allowed}, got {getattr(self, name)!r}")
        for name in ("text_weight", "visual_weight"):
            if getattr(self, name) < 0:
                raise VitalError(f"{name}: expected 0 or more, got {getattr(self, name)}")


class Mean(NamedTuple):
    """A mean that has not been divided yet, so that several processes can divide by what they counted together."""

    total: torch.Tensor
    counted: torch.Tensor

    def value(self) -> torch.Tensor:
        """0, with a gradient of 0, where nothing was counted."""
        return self.total / self.counted.clamp(min=1)


def task_loss(logits: torch.Tensor, answer_ids: torch.Tensor) -> Mean:
    """L_task: cross entropy over answer tokens.  logits: [N, A, vocab].  answer_ids: [N, A], IGNORED where padded."""
    total = cross_entropy(logits.flatten(0, 1).float(), answer_ids.flatten(), ignore_index=IGNORED, reduction="sum")
    return Mean(total, (answer_ids != IGNORED).sum())


def text_loss(logits: torch.Tensor, chain_ids: torch.Tensor) -> Mean:
    """L_text: the mean cross entropy over a reasoning step's tokens, then over a sample's steps, then over samples.

    logits: [N, K, L, vocab] of the text decoder.  chain_ids: [N, K, L], IGNORED where padded; a step without a token,
    or a sample without a step, does not count.
    """
    per_token = cross_entropy(
        logits.flatten(0, 2).float(), chain_ids.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(chain_ids.shape)
    has_token = chain_ids != IGNORED
    return _over_samples(_masked_mean(per_token, has_token), has_token.any(-1))


def visual_loss(projected: torch.Tensor, targets: torch.Tensor, has_step: torch.Tensor, reduction: str) -> Mean:
    """L_visual: |VP(z_k) - f_k| summed or averaged over v; then the mean over a sample's steps, then over samples.

    projected: [N, K, v].  targets: [N, K, v].  has_step: [N, K] bool, False where a sample has no such step or no ROI.
    """
    distance = (projected.float() - targets.float()).abs()
    per_step = distance.mean(-1) if reduction == "mean" else distance.sum(-1)
    return _over_samples(per_step, has_step)


def visual_targets(
    roi: torch.Tensor, global_feature: torch.Tensor | None, num_steps: torch.Tensor, max_steps: int, target: str
) -> torch.Tensor:
    """f_k for every sample and step: [N, K, v].

    roi, global_feature: [N, v].  num_steps: [N], each sample's K.  With "per_step" the alphas of a sample with fewer
    than four steps are the paper's last ones, so that its last step always aims at the ROI.
    """
    if target == "shared":
        return roi[:, None].expand(-1, max_steps, -1)
    if global_feature is None:
        raise VitalError("visual_target: 'per_step' needs global_feature in the samples table, got none")
    if max_steps > len(PER_STEP_ALPHAS):
        raise VitalError(
            f"visual_target: 'per_step' is defined for up to {len(PER_STEP_ALPHAS)} steps, got {max_steps}"
        )
    alphas = torch.tensor(PER_STEP_ALPHAS, device=roi.device, dtype=roi.dtype)
    step = torch.arange(max_steps, device=roi.device) + len(alphas) - num_steps[:, None]
    alpha = alphas[step.clamp(max=len(alphas) - 1)][..., None]
    return normalize(alpha * roi[:, None] + (1 - alpha) * global_feature[:, None], dim=-1)


def _masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (values * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def _over_samples(per_step: torch.Tensor, has_step: torch.Tensor) -> Mean:
    """per_step, has_step: [N, K]."""
    has_any = has_step.any(-1)
    return Mean((_masked_mean(per_step, has_step) * has_any).sum(), has_any.sum())
