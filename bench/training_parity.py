"""Train-inference parity of a trained adapter: the training graph beside the runtime, over fresh phantoms.

    python -m bench.training_parity --backbone runs/backbone/model --adapter runs/phantom/adapter

Every question gets a K of its own, 0 to 4, within batches of mixed K. The runtime answers greedily with the adapter
merged; the training graph, with the adapter beside its weights and in eval mode, is fed the runtime's answers and has
to find every token of them, the end included, the most likely. Padding is on the left and on the right in turn.
Writes results/training-parity.json, and exits with 1 where an answer differs, or latents or logits by more than 1e-4.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import track
from transformers import Qwen3VLForConditionalGeneration

import vitalrt
from bench.files import commit
from vitalrt import latency
from vitalrt.files import replace_whole
from vitalrt_training.data.batches import Asked, Batch, Collator, Tokens, pad_targets
from vitalrt_training.evaluate import MAX_ANSWER_TOKENS, Phantoms, Shown
from vitalrt_training.latent_loop import run_loop
from vitalrt_training.losses import IGNORED

RESULT = Path(__file__).parent / "results" / "training-parity.json"
TOLERANCE = 1e-4
PHANTOMS_PER_BATCH = 8
MOST_STEPS = 4


@dataclass
class Differences:
    """Largest difference over the largest value of what is compared, and questions answered alike."""

    latents: float = 0.0
    logits: float = 0.0
    questions: int = 0
    same_answers: int = 0

    @property
    def is_parity(self) -> bool:
        return max(self.latents, self.logits) <= TOLERANCE and self.same_answers == self.questions


def compare(
    runtime: vitalrt.Model, trained: PeftModel, collator: Collator, shown: Sequence[Shown], right: bool, seed: int
) -> Differences:
    """One batch of pictures with all their questions.  right: pad prefixes and questions on the right."""
    prompts = [runtime.prepare(one.picture, sample.question) for one in shown for sample in one.samples]
    steps = np.random.default_rng(seed).integers(MOST_STEPS + 1, size=len(prompts))
    answers = runtime.run(prompts, k=steps.tolist(), max_new_tokens=MAX_ANSWER_TOKENS, return_logits=True)
    batch = collator.collate([Asked([one.picture], [(s.question, "") for s in one.samples]) for one in shown])
    batch = replace(batch, answer_ids=pad_targets([_choices(answer) for answer in answers]))
    if right:
        batch = replace(batch, prefix=_pad_right(batch.prefix), question=_pad_right(batch.question))
    with torch.no_grad():
        loop = run_loop(trained.get_base_model(), batch, torch.from_numpy(steps))
    found = Differences(questions=len(prompts))
    for row, answer in enumerate(answers):
        length = len(_choices(answer))
        found.logits = max(found.logits, _difference(answer.logits, loop.logits[row, :length]))
        if steps[row]:
            latents = torch.cat([latent[row] for latent in loop.latents[: steps[row]]])
            found.latents = max(found.latents, _difference(answer.latents, latents))
        found.same_answers += _is_answer(batch, loop.logits, row)
    return found


def _choices(answer: vitalrt.Answer) -> list[int]:
    """What greedy decoding wrote, the end token included."""
    assert answer.logits is not None
    return answer.logits.argmax(-1).tolist()


def _difference(ours: torch.Tensor | None, theirs: torch.Tensor) -> float:
    assert ours is not None
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _is_answer(batch: Batch, logits: torch.Tensor, row: int) -> bool:
    wanted = batch.answer_ids[row]
    return bool(((logits[row].argmax(-1) == wanted) | (wanted == IGNORED)).all())


def _pad_right(tokens: Tokens) -> Tokens:
    """Every row turned by its padding."""
    turned = replace(tokens, ids=tokens.ids.clone(), mask=tokens.mask.clone(), positions=tokens.positions.clone())
    for row, padding in enumerate((tokens.mask == 0).sum(-1).tolist()):
        turned.ids[row] = tokens.ids[row].roll(-padding)
        turned.mask[row] = tokens.mask[row].roll(-padding)
        turned.positions[:, row] = tokens.positions[:, row].roll(-padding, dims=-1)
    return turned


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", type=Path, required=True, metavar="DIR")
    parser.add_argument("--adapter", type=Path, required=True, metavar="DIR")
    parser.add_argument("--count", type=int, default=500, help="phantoms")
    parser.add_argument("--seed", type=int, default=0, help="of the test phantoms")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    runtime = vitalrt.load(arguments.backbone, adapter=arguments.adapter, device="cpu", dtype="float32")
    backbone = Qwen3VLForConditionalGeneration.from_pretrained(arguments.backbone, dtype=torch.float32)
    trained = PeftModel.from_pretrained(backbone, arguments.adapter).eval()
    collator = Collator(arguments.backbone)
    shown = Phantoms("test", arguments.seed, arguments.count)
    total = Differences()
    starts = range(0, arguments.count, PHANTOMS_PER_BATCH)
    for number, start in enumerate(track(starts, "phantoms", console=Console(stderr=True))):
        pictures = [shown[index] for index in range(start, min(start + PHANTOMS_PER_BATCH, arguments.count))]
        found = compare(runtime, trained, collator, pictures, right=number % 2 == 1, seed=start)
        total = Differences(
            max(total.latents, found.latents),
            max(total.logits, found.logits),
            total.questions + found.questions,
            total.same_answers + found.same_answers,
        )
    record = _record(runtime, arguments, total)
    replace_whole(RESULT, lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
    print(json.dumps(record, indent=1) if arguments.json else f"{total}\n{'holds' if total.is_parity else 'FAILS'}")
    return 0 if total.is_parity else 1


def _record(runtime: vitalrt.Model, arguments: argparse.Namespace, total: Differences) -> dict[str, Any]:
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "environment": latency.environment(runtime),
        "phantoms": arguments.count,
        "seed": arguments.seed,
        "questions": total.questions,
        "same_answers": total.same_answers,
        "largest_relative_difference": {"latents": total.latents, "logits": total.logits},
        "tolerance": TOLERANCE,
        "holds": total.is_parity,
    }


if __name__ == "__main__":
    sys.exit(main())
