"""The visual projector as training uses it, forward and backward: ours, torch eager, torch.compile, in turns.

On a GPU as a bf16 run does, under autocast over fp32 weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bench.gpu.record import Record, in_short
from bench.gpu.timing import spread_of, time_ms
from vitalrt_kernels import ProjectorWeights, latent_projector

WIDTH, FEATURE_WIDTH = 4096, 1152  # Qwen3-VL-8B, MedSigLIP
ROWS = (192, 1536)  # latents of a step: 48 samples of 4 steps, and eight times as many
MINIATURE = (64, 20, (12, 24))
DROPOUT, EPS = 0.1, 1e-5
CALLS = 10  # timed as one
COMPILING_S = 20.0  # of one form, of four

Call = Callable[[], tuple[torch.Tensor, ...]]


class Eager(nn.Module):
    """Equation 5 as one would write it in torch, over the very same parameters."""

    def __init__(self, weights: ProjectorWeights) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        w, (width, features) = self.weights, (z.shape[-1], self.weights.w2.shape[0])
        hidden = F.gelu(F.linear(F.layer_norm(z, (width,), w.norm_in_weight, w.norm_in_bias, EPS), w.w1))
        out = F.linear(F.dropout(hidden, DROPOUT, self.training) + z, w.w2)
        return F.layer_norm(out, (features,), w.norm_out_weight, w.norm_out_bias, EPS)


class Ours(nn.Module):
    def __init__(self, weights: ProjectorWeights) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return latent_projector(z, self.weights, EPS)
        seed = int(torch.randint(2**63 - 1, ()))  # as VisualProjector draws one each step
        return latent_projector(z, self.weights, EPS, DROPOUT, seed)


def measure(record: Record, device: torch.device) -> dict[str, Any]:
    """Milliseconds by rows, for the forward pass without dropout and for forward and backward with it."""
    width, features, sizes = (WIDTH, FEATURE_WIDTH, ROWS) if device.type == "cuda" else MINIATURE
    weights = random_weights(width, features, device)
    contenders: dict[str, nn.Module] = {"vitalrt": Ours(weights), "torch": Eager(weights)}
    skipped: dict[str, str] = {}
    if record.quick:
        skipped["torch, compiled"] = "--quick: nothing is compiled"
    else:
        contenders["torch, compiled"] = torch.compile(Eager(weights), dynamic=False)
    ms: dict[str, Any] = {}
    with torch.enable_grad():
        for rows in sizes:
            z = torch.randn(rows, width, device=device, requires_grad=True)
            for trains in (False, True):
                calls = {name: _call(project.train(trains), z, weights) for name, project in contenders.items()}
                try:
                    if "torch, compiled" in calls:
                        with record.at_most(COMPILING_S):
                            calls["torch, compiled"]()
                except Exception as error:  # a compiler's, which the others need not wait for
                    skipped["torch, compiled"] = in_short(error)
                    del contenders["torch, compiled"], calls["torch, compiled"]
                what = "forward and backward" if trains else "forward"
                ms[f"projector {what}, {rows} rows"] = _in_turns(record, calls, device)
                record.tell("projector", ms=ms)
    return {
        "width": width,
        "feature_width": features,
        "ms": ms,
        "difference": relative_difference(contenders["vitalrt"], contenders["torch"], z, weights),
        "skipped": skipped,
    }


def _in_turns(record: Record, calls: dict[str, Call], device: torch.device) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in record.rounds(15):
        for name, call in calls.items():
            times[name].append(time_ms(lambda c=call: [c() for _ in range(CALLS)], device) / CALLS)
    return {name: spread_of(found) for name, found in times.items()}


def _call(project: nn.Module, z: torch.Tensor, weights: ProjectorWeights) -> Call:
    """In training the gradients of z and of all weights; else only the result, with nothing kept for them."""

    def call() -> tuple[torch.Tensor, ...]:
        with torch.autocast(z.device.type, torch.bfloat16, enabled=z.device.type == "cuda"):
            if not project.training:
                with torch.no_grad():
                    return (project(z),)
            out = project(z)
        return torch.autograd.grad(out, (z, *weights), torch.ones_like(out))

    return call


def relative_difference(ours: nn.Module, eager: nn.Module, z: torch.Tensor, weights: ProjectorWeights) -> float:
    """Without dropout: the norm of the difference over the norm."""
    (mine,), (theirs,) = (_call(project.eval(), z, weights)() for project in (ours, eager))
    return round(float((mine.float() - theirs.float()).norm() / theirs.float().norm()), 6)


def random_weights(width: int, features: int, device: torch.device) -> ProjectorWeights:
    """As a projector has them in training: of a linear layer's own scale, norms around 1."""

    def draw(*shape: int, mean: float = 0.0, std: float = 0.1) -> torch.Tensor:
        return (mean + std * torch.randn(*shape, device=device)).requires_grad_()

    return ProjectorWeights(
        draw(width, mean=1.0),
        draw(width),
        draw(width, width, std=width**-0.5),
        draw(features, width, std=width**-0.5),
        draw(features, mean=1.0),
        draw(features),
    )
