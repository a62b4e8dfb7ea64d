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
from vitalrt.model.scaffold import VisualProjector

WIDTH, FEATURE_WIDTH = 4096, 1152  # Qwen3-VL-8B, MedSigLIP
ROWS = (192, 1536)  # latents of a step: 48 samples of 4 steps, and eight times as many
MINIATURE = (64, 20, (12, 24))
CALLS = 10  # timed as one
COMPILING_S = 20.0  # of one form, of four

Call = Callable[[], tuple[torch.Tensor, ...]]


class Eager(nn.Module):
    """Equation 5 as one would write it in torch, over the very same parameters."""

    def __init__(self, projector: VisualProjector) -> None:
        super().__init__()
        self.projector = projector

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        ours = self.projector
        hidden = ours.dropout(F.gelu(ours.hidden(ours.norm_in(z))))
        return ours.norm_out(ours.output(hidden + z))


def measure(record: Record, device: torch.device) -> dict[str, Any]:
    """Milliseconds by rows, for the forward pass without dropout and for forward and backward with it."""
    width, features, sizes = (WIDTH, FEATURE_WIDTH, ROWS) if device.type == "cuda" else MINIATURE
    projector = VisualProjector("res_mlp_ln", width, features).to(device)
    contenders: dict[str, nn.Module] = {"vitalrt": projector, "torch": Eager(projector)}
    skipped: dict[str, str] = {}
    if record.quick:
        skipped["torch, compiled"] = "--quick: nothing is compiled"
    else:
        contenders["torch, compiled"] = torch.compile(Eager(projector), dynamic=False)
    ms: dict[str, Any] = {}
    with torch.enable_grad():
        for rows in sizes:
            z = torch.randn(1, rows, width, device=device, requires_grad=True)
            for trains in (False, True):
                calls = {name: _call(project.train(trains), z) for name, project in contenders.items()}
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
        "difference": relative_difference(contenders["vitalrt"], contenders["torch"], z),
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


def _call(project: nn.Module, z: torch.Tensor) -> Call:
    """In training the gradients of z and of all parameters; else only the result, with nothing kept for them."""

    def call() -> tuple[torch.Tensor, ...]:
        with torch.autocast(z.device.type, torch.bfloat16, enabled=z.device.type == "cuda"):
            if not project.training:
                with torch.no_grad():
                    return (project(z),)
            out = project(z)
        return torch.autograd.grad(out, (z, *project.parameters()), torch.ones_like(out))

    return call


def relative_difference(ours: nn.Module, eager: nn.Module, z: torch.Tensor) -> float:
    """Without dropout: the norm of the difference over the norm."""
    (mine,), (theirs,) = (_call(project.eval(), z)() for project in (ours, eager))
    return round(float((mine.float() - theirs.float()).norm() / theirs.float().norm()), 6)
