"""One launch of every kernel of a step, small: what compute-sanitizer watches (python -m bench.gpu.sanitized)."""

import torch

from bench.gpu.ours import Ours
from bench.gpu.shapes import prompt_of, random_model, small_config


def main() -> None:
    config = small_config()
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad():
            ours = Ours(random_model(config, torch.device("cuda"), dtype), num_rows=2, row_tokens=128)
            prompt = prompt_of(config, 70)
            ours.begin(prompt, 2, 0)
            ours.go_on(prompt, 5)
            ours.begin(prompt, 0, 1)
            for rows in (1, 2):
                ours.step.step(rows, answers=True)
            torch.cuda.synchronize()
    print("two prompts, a question more and two steps ran")


if __name__ == "__main__":
    main()
