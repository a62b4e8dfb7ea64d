"""One thin function per verb. Each imports what it needs when it runs: `vitalrt --help` should not wait for torch."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console

from vitalrt.cli.printing import answer_record, print_answer, print_steps
from vitalrt.errors import VitalError
from vitalrt.serve.settings import ServeConfig, read_api_keys

if TYPE_CHECKING:
    from vitalrt.api import Model
    from vitalrt.engine.request import Request
    from vitalrt.inputs.options import ReadOptions

WRITTEN_EVERY = 5  # a written chain of thought takes seconds, so it joins every fifth round of `bench`

SERVE_LIMITS = {  # fields of ServeConfig, each an option of `serve`
    "max_queue": "answers that wait for the engine",
    "deadline_s": "seconds for a request, from its arrival to its last byte",
    "drain_s": "seconds that running answers have after SIGTERM",
    "max_body_bytes": "bytes of a request, or of a fetched image",
    "max_images": "images in a request",
    "max_image_pixels": "pixels of an image, before it is resized",
    "max_text_chars": "characters of text in a request",
    "max_prompt_tokens": "tokens of text and images",
    "max_completion_tokens": "tokens of an answer",
    "default_max_tokens": "tokens of an answer where the request does not say",
    "max_choices": "choices (n) of a request",
}


def ask(arguments: argparse.Namespace) -> None:
    """One question about one or several images, or a file of them."""
    if (arguments.batch is None) == (len(arguments.words) < 2):
        raise VitalError("ask: expected either IMAGE [IMAGE ...] QUESTION or --batch FILE.jsonl")
    if arguments.batch:
        requests = _read_batch(arguments)
    else:
        requests = [_request(arguments, arguments.words[:-1], arguments.words[-1])]
    model = _load(arguments)
    answers = model.generate_batch(requests)
    for request, answer in zip(requests, answers, strict=True):
        if arguments.json or arguments.batch:
            print(json.dumps(answer_record(request, answer)))
        else:
            print_answer(request, answer)
            print(answer.notice)


def explain(arguments: argparse.Namespace) -> None:
    """One question, and what training's scaffolding reads from each latent step: words, heat maps, neighbours."""
    if len(arguments.words) < 2:
        raise VitalError(f"explain: expected IMAGE [IMAGE ...] QUESTION, got {len(arguments.words)} of them")
    if arguments.out is not None and (arguments.out.is_dir() or not arguments.out.parent.is_dir()):
        raise VitalError(f"--out: expected a file in a folder that is there, got {str(arguments.out)!r}")
    request = _request(arguments, arguments.words[:-1], arguments.words[-1])
    names = ("k", "max_new_tokens", "temperature", "top_p", "top_k", "seed", "read")
    options = {name: getattr(request, name) for name in names}
    explanation = _load(arguments).explain(request.image, request.question, **options, encoder=arguments.encoder)
    trouble = None
    if arguments.out is not None:
        try:
            explanation.save(arguments.out)
        except VitalError as error:  # told after the answer, which is not to be lost
            trouble = error
    if arguments.json:
        print(json.dumps(answer_record(request, explanation.answer) | explanation.as_dict()))
    else:
        print_answer(request, explanation.answer)
        print_steps(explanation)
    if trouble is not None:
        raise trouble


def info(arguments: argparse.Namespace) -> None:
    """What is loaded, what it needs, which backends were found and why others were not."""
    from vitalrt.describe import describe_machine, describe_model

    report: dict[str, Any] = {"machine": describe_machine(), "model": describe_model(_load(arguments))}
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    console = Console()
    for section, values in report.items():
        console.print(f"[bold]{section}[/bold]")
        for name, value in values.items():
            console.print(f"  {name:<22}{value}", highlight=False)


def bench(arguments: argparse.Namespace) -> None:
    """Latency of K = 0, 1, 2, 4 and of written chains of thought; with --model-cost, what a step has to move."""
    if arguments.model_cost:
        _print_model_cost(arguments)
        return
    import numpy as np

    from vitalrt import latency

    for name in ("context", "batch", "card", "bandwidth"):
        if getattr(arguments, name) is not None:
            raise VitalError(f"--{name}: expected together with --model-cost")
    if arguments.rounds < 1:
        raise VitalError(f"--rounds: expected at least 1, got {arguments.rounds}")
    model = _load(arguments, prefix_cache=False)  # no round may find what the one before has left
    ramp = np.tile(np.arange(128, dtype=np.uint8), (128, 1))  # what the picture shows does not matter to the clock
    image = ramp if arguments.image is None else arguments.image
    contenders = latency.contenders(model, image, arguments.question, every=WRITTEN_EVERY)
    rows = latency.interleave(contenders, arguments.rounds, model.weights.decoder.embed.weight.device)
    if arguments.json:
        print(json.dumps({"environment": latency.environment(model), "rows": [latency.record(row) for row in rows]}))
    else:
        Console().print(latency.table(rows))


def data_phantom(arguments: argparse.Namespace) -> None:
    """Write phantoms as PNG, masks, JSONL and Parquet."""
    with _needs("data"):
        from vitalrt_training.data.phantom import write_phantoms
    counts = {arguments.split: arguments.count}
    if arguments.validation:
        counts["validation"] = counts.get("validation", 0) + arguments.validation
    write_phantoms(arguments.out, counts, arguments.seed)
    print(json.dumps({"out": str(arguments.out), "phantoms": counts}) if arguments.json else arguments.out)


def data_roi(arguments: argparse.Namespace) -> None:
    """Add ROI features, by a SigLIP, a CLIP or a backbone's own tower, to the samples table of data with masks."""
    with _needs("train"):
        from vitalrt_training.data.roi_columns import add_roi_features
    add_roi_features(arguments.data, arguments.encoder, arguments.device)
    print(json.dumps({"data": str(arguments.data)}) if arguments.json else arguments.data)


def train(arguments: argparse.Namespace) -> None:
    """Train a recipe; run again with the same --out to go on after an interruption."""
    with _needs("train"):
        from vitalrt_training.encoder import EncoderRecipe, train_encoder
        from vitalrt_training.plan import plan, print_plan
        from vitalrt_training.recipes import RECIPES, VitalRecipe, with_settings
        from vitalrt_training.trainer import train as train_phantom
        from vitalrt_training.vital_trainer import train_vital
    if arguments.recipe not in RECIPES:
        raise VitalError(f"recipe: expected one of {sorted(RECIPES)}, got {arguments.recipe!r}")
    recipe = with_settings(RECIPES[arguments.recipe](), dict(_setting(text) for text in arguments.set))
    if arguments.dry_run:
        if not isinstance(recipe, VitalRecipe):
            raise VitalError(f"--dry-run: expected a recipe over a given backbone, got {arguments.recipe!r}")
        found = plan(recipe)
        if arguments.json:
            print(json.dumps(found.as_dict(), indent=2))
        else:
            print_plan(recipe, found)
        return
    if arguments.out is None:
        raise VitalError("--out: expected a directory for the run")
    if isinstance(recipe, VitalRecipe):
        directory = train_vital(recipe, arguments.out, arguments.track)
    elif isinstance(recipe, EncoderRecipe):
        directory = train_encoder(recipe, arguments.out)
    else:
        directory = train_phantom(recipe, arguments.out)
    print(json.dumps({"directory": str(directory)}) if arguments.json else directory)


def evaluate(arguments: argparse.Namespace) -> None:
    """Accuracy on fresh phantoms or a data set, beside the majority answer and with images shuffled among questions."""
    with _needs("train"):
        from vitalrt_training import evaluate as evaluation
        from vitalrt_training.data.tables import load_tables
        from vitalrt_training.patching import patch_latents, print_patched
    model = _load(arguments)
    report: dict[str, Any] = {"split": arguments.split}
    if arguments.data is None:
        shown: Any = evaluation.Phantoms(arguments.split, arguments.seed, arguments.count)
        report["seed"] = arguments.seed
    else:
        shown = evaluation.TablePictures(load_tables(arguments.data), arguments.split)
    ks = arguments.k or [model.checkpoint.vital.k]
    patched = patch_latents(model, shown, ks[-1]) if arguments.patch else None
    report |= evaluation.evaluate(model, shown, ks)
    if patched is not None:
        report["patched"] = patched
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        evaluation.print_report(report)
        if patched is not None:
            print_patched(patched)


def export_onnx(arguments: argparse.Namespace) -> None:
    """Write a checkpoint as ONNX graphs, checked against torch; with --dry-run, tell what that would take."""
    from vitalrt import export
    from vitalrt.api import BUNDLED

    model = arguments.model or BUNDLED
    options = {"dtype": arguments.dtype, "int8": arguments.int8, "opset": arguments.opset}
    if arguments.dry_run:
        record = asdict(export.plan(model, **options))
    else:
        if arguments.out is None:
            raise VitalError("--out: expected a directory for the export")
        done = export.onnx(
            model,
            arguments.out,
            adapter=arguments.adapter,
            k=arguments.k,
            verify=arguments.verify,
            device=arguments.device,
            **options,
        )
        record = {"directory": str(done.directory), "seconds": round(done.seconds, 1), "files": done.files}
        record["verification"] = done.verification and asdict(done.verification)
        if not arguments.json:
            record["verification"] = str(done.verification or "not asked for")
    if arguments.json:
        print(json.dumps(record, indent=2))
    else:
        for name, value in record.items():
            print(f"{name:<16}{value}")


def export_merged(arguments: argparse.Namespace) -> None:
    """Write a checkpoint with its adapter merged."""
    from vitalrt import export
    from vitalrt.api import BUNDLED

    directory = export.merged(arguments.model or BUNDLED, arguments.adapter, arguments.out, arguments.encoder)
    print(json.dumps({"directory": str(directory)}) if arguments.json else directory)


def serve(arguments: argparse.Namespace) -> None:
    """Answer over HTTP, as OpenAI's API does."""
    if arguments.replicas is not None and not arguments.ray:
        raise VitalError("--replicas: expected together with --ray")
    config = ServeConfig(
        host=arguments.host,
        port=arguments.port,
        model_name=arguments.name,
        api_keys=() if arguments.api_keys is None else read_api_keys(arguments.api_keys),
        image_origins=tuple(arguments.allow_images_from),
        audit_file=arguments.audit,
        audit_text=arguments.audit_text,
        **{name: getattr(arguments, name) for name in SERVE_LIMITS},
    )
    if arguments.ray:
        with _needs("ray"):
            from vitalrt.serve.cluster import serve_on_ray

            serve_on_ray(_loading(arguments), config, 2 if arguments.replicas is None else arguments.replicas)
        return
    with _needs("serve"):
        from vitalrt.serve.app import build_app
        from vitalrt.serve.server import server
    server(build_app(_load(arguments), config, arguments.adapter), config).run()


def _load(arguments: argparse.Namespace, prefix_cache: bool = True) -> Model:
    """With a progress bar on a terminal, once loading takes long enough to wonder."""
    from rich.progress import Progress

    from vitalrt.api import load

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("loading weights")
        return load(
            **_loading(arguments),
            prefix_cache=prefix_cache,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _loading(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of vitalrt.load that are options of the command line."""
    from vitalrt.api import BUNDLED

    names = ("adapter", "device", "dtype", "int8", "cache_tokens", "vision_cache_bytes")
    return {"model": arguments.model or BUNDLED, **{name: getattr(arguments, name) for name in names}}


def _read_options(arguments: argparse.Namespace) -> ReadOptions:
    from vitalrt.inputs.options import ReadOptions

    window: int | tuple[float, float] | None = None
    if arguments.window is not None:
        try:
            parts = [float(part) for part in arguments.window.split(",")]
        except ValueError:
            parts = []
        if len(parts) not in (1, 2):
            raise VitalError(f"--window: expected CENTER,WIDTH or an index, got {arguments.window!r}")
        window = (parts[0], parts[1]) if len(parts) == 2 else int(parts[0])
    return ReadOptions(frame=arguments.frame, slice_index=arguments.slice_index, axis=arguments.axis, window=window)


def _request(arguments: argparse.Namespace, image: Any, question: str, k: int | None = None) -> Request:
    from vitalrt.engine.request import Request

    return Request(
        image,
        question,
        k=arguments.k if k is None else k,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        seed=arguments.seed,
        read=_read_options(arguments),
    )


def _read_batch(arguments: argparse.Namespace) -> list[Request]:
    requests = []
    try:
        lines = arguments.batch.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise VitalError(f"--batch: {arguments.batch.name} cannot be read ({type(error).__name__})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            image, question, k = record["image"], record["question"], record.get("k")
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            expected = 'expected {"image": ..., "question": ...}'
            raise VitalError(f"--batch: {arguments.batch.name} line {number}: {expected}") from error
        requests.append(_request(arguments, image, question, k))
    return requests


def _print_model_cost(arguments: argparse.Namespace) -> None:
    """`bench --model-cost`: for all known cards, one of them, or one of the given bandwidth."""
    from vitalrt.model_cost import CARDS, DEFAULT_MODEL, Card, ModelCost

    if arguments.bandwidth is not None:
        if arguments.card is not None or not 0 < arguments.bandwidth < float("inf"):
            raise VitalError(f"--bandwidth: expected GB/s above 0 and no --card, got {arguments.bandwidth}")
        cards = [Card(f"{arguments.bandwidth:g} GB/s", arguments.bandwidth * 1e9, None, "as given")]
    elif arguments.card is not None:
        if arguments.card not in CARDS:
            raise VitalError(f"--card: expected one of {sorted(CARDS)}, got {arguments.card!r}")
        cards = [CARDS[arguments.card]]
    else:
        cards = list(CARDS.values())
    cost = ModelCost.of(
        arguments.model or DEFAULT_MODEL,
        context=arguments.context or 0,
        batch=1 if arguments.batch is None else arguments.batch,
        dtype="int8" if arguments.int8 else "bf16" if arguments.dtype == "auto" else arguments.dtype,
    )
    if arguments.json:
        print(json.dumps(cost.record(cards), indent=2))
    else:
        Console().print(cost.operations_table(), cost.floors_table(cards), sep="\n")


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise VitalError(f"--set: expected KEY=VALUE, got {text!r}")
    return name, value


@contextmanager
def _needs(extra: str) -> Iterator[None]:
    """Say how to install a missing optional package; a package that is there but broken raises as it is."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("vitalrt"):
            raise
        raise VitalError(f"{error.name} is not installed; run: pip install 'vitalrt[{extra}]'") from error
