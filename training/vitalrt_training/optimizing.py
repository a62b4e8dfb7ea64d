"""One optimiser step of a small model trained from scratch: AdamW, warm-up and cosine, clipped and checked."""

from __future__ import annotations

import math

import torch
from torch import nn

from vitalrt.errors import VitalError


def new_adamw(module: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """Over what is trainable, with weight decay on matrices only. The rate is set by each step."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def cosine_rate(peak: float, step: int, num_steps: int, warmup_steps: int) -> float:
    """Linear warm-up, then half a cosine down to nothing."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def update(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: torch.Tensor,
    rate: float,
    max_grad_norm: float,
    what: str,
) -> dict[str, float]:
    """Backward, clip, step.  Returns what to log.  Raises VitalError with `what` if loss or gradient is not finite."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm)
    if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
        raise VitalError(f"training: loss {loss.item()}, gradient norm {norm.item()} at {what}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss.item(), "grad_norm": norm.item(), "learning_rate": rate}
