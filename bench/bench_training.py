"""A training step of the latent loop, K = 4: ours beside the loop that one would write over DynamicCache and PEFT.

Time is of one interleaved run, forward and backward, and told twice: by the clock, and as the processor time of the
process, which a busy machine does not stretch. Peak memory is what a step has allocated at most, beyond model and
gradients. N samples, K latent steps.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from pytest_benchmark.fixture import BenchmarkFixture
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, DynamicCache, Qwen3VLConfig, Qwen3VLForConditionalGeneration

import vitalrt
from bench.bench_latency import ReplayClock
from bench.files import commit
from vitalrt import latency
from vitalrt.api import BUNDLED
from vitalrt.files import replace_whole
from vitalrt.latency import rounded
from vitalrt.spread import Spread
from vitalrt_training.adapter import AdapterConfig, attach_adapter
from vitalrt_training.backbone import PREPROCESSOR, new_backbone
from vitalrt_training.data.batches import Asked, Batch, Collator
from vitalrt_training.data.phantom import ask, draw_phantom
from vitalrt_training.latent_loop import run_loop
from vitalrt_training.losses import IGNORED, task_loss

NUM_STEPS = 4
PEER, OURS, CHECKPOINTED = "DynamicCache + PEFT", "vitalrt", "vitalrt, checkpointed"
ENGINES = (PEER, OURS, CHECKPOINTED)
REPLAY = ReplayClock()


@dataclass(frozen=True)
class Case:
    """A model of random weights and a batch.  text: changes to the phantom decoder's shape.  picture_side: pixels."""

    name: str
    pictures: int
    questions_per_picture: int
    picture_side: int = 96
    text: dict[str, int] = field(default_factory=dict)


CASES = (
    Case("phantom, 6 questions a picture", pictures=4, questions_per_picture=6),
    Case("phantom, 1 question a picture", pictures=16, questions_per_picture=1),
    Case(
        "wide, 1 question a picture",
        pictures=4,
        questions_per_picture=1,
        picture_side=272,  # 289 visual tokens
        text={
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 64,
        },
    ),
)


@dataclass(frozen=True)
class Row:
    """milliseconds (by the clock), cpu_milliseconds: by round.  peak_bytes: see the module."""

    case: Case
    engine: str
    milliseconds: list[float]
    cpu_milliseconds: list[float]
    peak_bytes: int


@dataclass(frozen=True)
class Report:
    environment: dict[str, Any]
    prompt_tokens: dict[str, int]
    rows: list[Row]

    def row(self, case: Case, engine: str) -> Row:
        return next(row for row in self.rows if (row.case, row.engine) == (case, engine))

    def as_dict(self) -> dict[str, Any]:
        return {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "environment": self.environment,
            "latent_steps": NUM_STEPS,
            "cases": [{**asdict(case), "prompt_tokens": self.prompt_tokens[case.name]} for case in CASES],
            "rows": [self._row_dict(row) for row in self.rows],
            "claims": [{"text": text, "is_met": is_met} for text, is_met in self.claims],
        }

    @property
    def claims(self) -> list[tuple[str, bool]]:
        """What our loop promises against the peer's, and whether the medians of processor time and memory say so."""
        found = []
        for case in CASES:
            ours, theirs = self.row(case, OURS), self.row(case, PEER)
            faster = ratio(theirs.cpu_milliseconds, ours.cpu_milliseconds).p50 >= 1
            found.append((f"{case.name}: at least as fast", faster))
            found.append((f"{case.name}: lower peak memory", ours.peak_bytes < theirs.peak_bytes))
        return found

    def _row_dict(self, row: Row) -> dict[str, Any]:
        peer = self.row(row.case, PEER)
        return {
            "case": row.case.name,
            "engine": row.engine,
            "ms": rounded(Spread.of(row.milliseconds)),
            "cpu_ms": rounded(Spread.of(row.cpu_milliseconds)),
            "ms_by_round": [round(value, 3) for value in row.milliseconds],
            "cpu_ms_by_round": [round(value, 3) for value in row.cpu_milliseconds],
            "peak_bytes": row.peak_bytes,
            "peer_over_this": {
                "ms": rounded(ratio(peer.milliseconds, row.milliseconds)),
                "cpu_ms": rounded(ratio(peer.cpu_milliseconds, row.cpu_milliseconds)),
                "peak_bytes": round(peer.peak_bytes / row.peak_bytes, 3),
            },
        }

    def print(self, console: Console) -> None:
        shown = Table("case", "engine", "ms", "CPU ms", "MiB", "peer: ms", "CPU ms", "MiB", title="medians")
        for row in self.rows:
            peer = self.row(row.case, PEER)
            shown.add_row(
                row.case.name,
                row.engine,
                f"{Spread.of(row.milliseconds).p50:,.0f}",
                f"{Spread.of(row.cpu_milliseconds).p50:,.0f}",
                f"{row.peak_bytes / 2**20:,.0f}",
                f"× {ratio(peer.milliseconds, row.milliseconds).p50:.2f}",
                f"× {ratio(peer.cpu_milliseconds, row.cpu_milliseconds).p50:.2f}",
                f"× {peer.peak_bytes / row.peak_bytes:.2f}",
            )
        console.print(shown)
        for text, is_met in self.claims:
            console.print("[green]met[/]" if is_met else "[red]not met[/]", text)


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> Spread:
    """Round by round."""
    return Spread.of([a / b for a, b in zip(theirs, ours, strict=True)])


@pytest.fixture(scope="module")
def report(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The interleaved run. Writes its JSON and prints its table."""
    rows: list[Row] = []
    prompt_tokens = {}
    for case in CASES:
        model, batch = build(case, tmp_path_factory.mktemp("model"))
        prompt_tokens[case.name] = batch.prefix.ids.shape[1] + batch.question.ids.shape[1]
        rows += measure(case, model, batch, pytestconfig.getoption("bench_rounds"))
    environment = latency.environment(vitalrt.load(BUNDLED, device="cpu", dtype="float32"))
    result = Report({k: v for k, v in environment.items() if k not in ("model", "parameters")}, prompt_tokens, rows)
    folder: Path = pytestconfig.getoption("bench_out")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "training-step-cpu.json"
    text = json.dumps(result.as_dict(), indent=1) + "\n"
    replace_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        console = Console(width=120)  # a pipe would get 80 columns, too few for the table
        result.print(console)
        console.print("written:", path)
    return result


@pytest.mark.benchmark(group="training step", timer=REPLAY)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("engine", ENGINES)
def test_training_step(benchmark: BenchmarkFixture, report: Report, engine: str, case: Case) -> None:
    row = report.row(case, engine)
    recorded = iter(row.milliseconds)
    benchmark.extra_info["peak_bytes"] = row.peak_bytes
    benchmark.pedantic(lambda: REPLAY.advance(next(recorded)), rounds=len(row.milliseconds))


def build(case: Case, directory: Path) -> tuple[PeftModel, Batch]:
    """An adapter as in the paper over a random backbone, and phantoms, enlarged where the case says so."""
    config: Any = Qwen3VLConfig.from_pretrained(BUNDLED)
    for name, value in case.text.items():
        setattr(config.text_config, name, value)
    config.vision_config.out_hidden_size = config.text_config.hidden_size
    config.save_pretrained(directory)
    AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(directory)
    size = {"shortest_edge": 64 * 64, "longest_edge": case.picture_side**2}
    (directory / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, "size": size}))
    (directory / "chat_template.jinja").write_text((BUNDLED / "chat_template.jinja").read_text())
    asked = []
    for index in range(case.pictures):
        phantom = draw_phantom("train", 0, index)
        picture = Image.fromarray(phantom.image).resize((case.picture_side, case.picture_side))
        samples = ask(phantom)[: case.questions_per_picture]
        asked.append(Asked([np.array(picture)], [(sample.question, sample.answer) for sample in samples]))
    batch = Collator(directory).collate(asked)
    return attach_adapter(new_backbone(config, seed=0), AdapterConfig()), batch


def measure(case: Case, model: PeftModel, batch: Batch, rounds: int) -> Iterator[Row]:
    backbone: Any = model.get_base_model()
    losses: dict[str, Callable[[], torch.Tensor]] = {
        PEER: partial(peer_loss, backbone, peer_inputs(batch)),
        OURS: partial(our_loss, backbone, batch, False),
        CHECKPOINTED: partial(our_loss, backbone, batch, True),
    }
    require_equal_work(model.eval(), losses)
    model.train()
    times: dict[str, list[tuple[float, float]]] = {engine: [] for engine in ENGINES}
    for _ in range(rounds):
        for engine, loss in losses.items():
            clock, processor = time.perf_counter(), time.process_time()
            loss().backward()
            times[engine].append((time.perf_counter() - clock, time.process_time() - processor))
    for engine, loss in losses.items():
        wall, cpu = ([1000 * seconds for seconds in series] for series in zip(*times[engine], strict=True))
        yield Row(case, engine, wall, cpu, peak_bytes(lambda loss=loss: loss().backward()))


def our_loss(backbone: Qwen3VLForConditionalGeneration, batch: Batch, checkpoint: bool) -> torch.Tensor:
    loop = run_loop(backbone, batch, torch.full((batch.num_samples,), NUM_STEPS), checkpoint=checkpoint)
    return task_loss(loop.logits, batch.answer_ids).value()


def peer_inputs(batch: Batch) -> dict[str, torch.Tensor]:
    """The same samples as a usual collator gives them: whole prompts, a picture for each, padding on the left."""
    group = batch.group_of_sample
    pictures = batch.pixel_values.split(batch.image_grid_thw.prod(-1).tolist())
    mask = torch.cat((batch.prefix.mask[group], batch.question.mask), dim=1)
    left = mask.argsort(dim=1, stable=True)  # padding first, tokens in their order
    positions = torch.cat((batch.prefix.positions[:, group], batch.question.positions), dim=2)
    return {
        "input_ids": torch.cat((batch.prefix.ids[group], batch.question.ids), dim=1).gather(1, left),
        "attention_mask": mask.gather(1, left),
        "position_ids": positions.gather(2, left.expand(3, -1, -1)),
        "pixel_values": torch.cat([pictures[g] for g in group.tolist()]),
        "image_grid_thw": batch.image_grid_thw[group],
        "next_position": batch.next_position,
        "answer_ids": batch.answer_ids,
    }


def peer_loss(backbone: Qwen3VLForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Prompt, K latent steps and teacher-forced answer over one DynamicCache; the task loss."""
    inputs = dict(inputs)
    position, answer_ids = inputs.pop("next_position")[:, None], inputs.pop("answer_ids")
    mask, decoder = inputs["attention_mask"], backbone.model.language_model
    cache = DynamicCache(config=backbone.config.get_text_config())
    hidden = backbone.model(**inputs, past_key_values=cache, use_cache=True).last_hidden_state[:, -1:]
    fed = answer_ids[:, :-1].clamp(min=0)

    def decode(embeddings: torch.Tensor) -> torch.Tensor:
        nonlocal mask, position
        num_new = embeddings.shape[1]
        mask = torch.cat((mask, mask.new_ones(len(mask), num_new)), dim=1)
        positions = position + torch.arange(num_new)
        position = position + num_new
        return decoder(
            inputs_embeds=embeddings,
            position_ids=positions.expand(3, -1, -1),
            attention_mask=mask,
            past_key_values=cache,
        ).last_hidden_state

    for _ in range(NUM_STEPS):
        hidden = decode(hidden)
    logits = backbone.lm_head(torch.cat((hidden, decode(decoder.embed_tokens(fed))), dim=1))
    return cross_entropy(logits.flatten(0, 1), answer_ids.flatten(), ignore_index=IGNORED)


def require_equal_work(model: PeftModel, losses: dict[str, Callable[[], torch.Tensor]]) -> None:
    """The same loss and gradients without dropout, or nothing is timed. Leaves gradients allocated."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected: list[torch.Tensor] = []
    for loss in losses.values():
        value = loss()
        found = [value.detach(), *torch.autograd.grad(value, trained)]
        expected = expected or found
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    losses[PEER]().backward()


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most that work() has allocated at a time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    changes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(torch.tensor(changes).cumsum(0).max())
