"""One launch of every kernel, small: what compute-sanitizer watches (python -m bench.gpu.sanitized)."""

import torch

from bench.gpu.ours import Ours
from bench.gpu.shapes import prompt_of, random_model, small_config
from vitalrt.engine.device_step import StepWeights
from vitalrt_kernels import ProjectorWeights, latent_projector

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def steps(dtype: torch.dtype, int8: bool = False) -> None:
    """Two prompts, a question more, a step of one row and one of two."""
    config = small_config()
    with torch.no_grad():
        model = random_model(config, DEVICE, dtype)
        ours = Ours(model, 2, 128, StepWeights(model.decoder, int8=True) if int8 else None)
        prompt = prompt_of(config, 70)
        ours.begin(prompt, 2, 0)
        ours.go_on(prompt, 5)
        ours.begin(prompt, 0, 1)
        for rows in (1, 2):
            ours.step.step(rows, answers=True)


def projector(rows: int = 5, width: int = 48, features: int = 20) -> None:
    """Forward with dropout, and backward."""

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(*shape, device=DEVICE, requires_grad=True)

    square, out = ones(width, width), ones(features, width)
    weights = ProjectorWeights(ones(width), ones(width), square, out, ones(features), ones(features))
    latent_projector(torch.randn(rows, width, device=DEVICE, requires_grad=True), weights, dropout=0.5).sum().backward()


def main() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        steps(dtype)
    steps(torch.bfloat16, int8=True)
    projector()
    torch.cuda.synchronize()
    print("steps in three dtypes and a projector ran")


if __name__ == "__main__":
    main()
