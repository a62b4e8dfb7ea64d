"""What the command line takes: an option for whatever a verb can be told."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitalrt.cli import verbs
from vitalrt.config import EngineConfig
from vitalrt.serve.settings import ServeConfig


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vitalrt",
        description="Latent reasoning for medical images. Research use only, not for clinical decisions.",
    )
    found = parser.add_subparsers(required=True, metavar="VERB")

    verb = _verb(found, "ask", verbs.ask)
    verb.add_argument("words", nargs="*", metavar="IMAGE ... QUESTION", help="PNG, JPEG, TIFF, DICOM or NIfTI files")
    verb.add_argument(
        "--batch", type=Path, metavar="FILE.jsonl", help='lines like {"image": ..., "question": ..., "k": 2}'
    )
    _add_decoding(verb)
    _add_reading(verb)
    _add_model(verb)

    verb = _verb(found, "explain", verbs.explain)
    verb.add_argument("words", nargs="*", metavar="IMAGE ... QUESTION", help="PNG, JPEG, TIFF, DICOM or NIfTI files")
    verb.add_argument("--out", type=Path, metavar="PAGE.html", help="also as a page with pictures and heat maps")
    verb.add_argument(
        "--encoder", metavar="DIR", help="vision encoder that the projector aims at, if not beside the model"
    )
    _add_decoding(verb)
    _add_reading(verb)
    _add_model(verb)

    _add_model(_verb(found, "info", verbs.info))

    verb = _verb(found, "bench", verbs.bench)
    verb.add_argument("--image", type=Path, help="default: a grey ramp")
    verb.add_argument("--question", default="Is the liver visible?")
    verb.add_argument("--rounds", type=int, default=10, help="chains of thought join every fifth")
    verb.add_argument(
        "--model-cost",
        action="store_true",
        help="bytes, launches and floors of a step from config.json alone; --model DIR or e.g. Qwen3-VL-8B (default)"
        " or -32B, --dtype bf16 (default), int8 or fp32",
    )
    verb.add_argument("--context", type=int, metavar="N", help="model cost: tokens in the cache; default: 0")
    verb.add_argument("--batch", type=int, metavar="N", help="model cost: sequences; default: 1")
    verb.add_argument("--card", metavar="NAME", help="model cost: one card instead of all that are known")
    verb.add_argument("--bandwidth", type=float, metavar="GB/S", help="model cost: of any other card")
    _add_model(verb)

    kinds = found.add_parser("data", help="make data sets").add_subparsers(required=True, metavar="KIND")
    verb = _verb(kinds, "phantom", verbs.data_phantom)
    _add_phantoms(verb, split="train", seed=0, count=1000)
    verb.add_argument("--validation", type=int, default=0, metavar="N", help="also so many validation phantoms")
    verb.add_argument("--out", type=Path, required=True, metavar="DIR")
    verb = _verb(kinds, "roi", verbs.data_roi)
    verb.add_argument("data", metavar="DIR", help="a data set with masks; its samples table is filled")
    verb.add_argument("--encoder", required=True, metavar="DIR", help="SigLIP, CLIP or Qwen3-VL directory")
    verb.add_argument("--device", default="cpu")

    kinds = found.add_parser("export", help="write deployment graphs").add_subparsers(required=True, metavar="KIND")
    verb = _verb(kinds, "onnx", verbs.export_onnx)
    verb.add_argument("model", nargs="?", metavar="MODEL", help="directory or hub id; default: the bundled one")
    verb.add_argument("--out", type=Path, metavar="DIR", help="new or empty directory")
    verb.add_argument("-k", type=int, help="default latent steps of the export; default: the checkpoint's")
    verb.add_argument("--adapter", metavar="DIR", help="PEFT LoRA directory or hub id, merged")
    verb.add_argument("--dtype", default="fp32", choices=("fp32", "fp16", "bf16"))
    verb.add_argument("--int8", action="store_true", help="linear weights in 8 bits")
    verb.add_argument("--opset", type=int, default=20)
    verb.add_argument("--device", default="auto", help="where ONNX Runtime verifies: auto, cpu or cuda[:n]")
    verb.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, default=True, help="compare the graphs with torch"
    )
    verb.add_argument("--dry-run", action="store_true", help="file sizes and memory, from config.json alone")

    verb = _verb(kinds, "merged", verbs.export_merged)
    verb.add_argument("model", nargs="?", metavar="MODEL", help="directory or hub id; default: the bundled one")
    verb.add_argument("--adapter", required=True, metavar="DIR", help="PEFT LoRA directory or hub id")
    verb.add_argument("--encoder", metavar="DIR", help="vision encoder the adapter was trained for; goes along")
    verb.add_argument("--out", type=Path, required=True, metavar="DIR", help="new or empty directory")

    verb = _verb(found, "train", verbs.train)
    verb.add_argument(
        "recipe",
        metavar="RECIPE",
        help="phantom_backbone, phantom_encoder, phantom, vital_8b or vital_2b; for baselines direct, cot, coconut and "
        "sim_cot in place of vital, or phantom_direct and so on",
    )
    verb.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting of the recipe"
    )
    verb.add_argument("--dry-run", action="store_true", help="print parameter counts, steps and memory; train nothing")
    verb.add_argument("--out", type=Path, metavar="DIR", help="where the run lives, and goes on after an interruption")
    verb.add_argument(
        "--track", action="append", default=[], metavar="NAME", help="also log to tensorboard, wandb or mlflow"
    )

    verb = _verb(found, "eval", verbs.evaluate)
    _add_phantoms(verb, split="test", seed=0, count=2000)
    verb.add_argument("--data", metavar="DIR", help="the split of a data set's tables, in place of phantoms")
    verb.add_argument(
        "-k", type=int, action="append", help="latent steps, may be repeated; the last is reported in full"
    )
    verb.add_argument(
        "--patch",
        action="store_true",
        help="also whether latents matter: answers with others for all but the last, with the last -k (2 or more)",
    )
    _add_model(verb)

    verb = _verb(found, "serve", verbs.serve)
    verb.add_argument("model", nargs="?", metavar="MODEL", help="directory or hub id; default: the bundled one")
    _add_loading(verb)
    verb.add_argument("--host", default="127.0.0.1", help="default: reachable from this machine only")
    verb.add_argument("--port", type=int, default=8000)
    verb.add_argument("--name", help="the model's name in requests; default: its directory's")
    verb.add_argument("--api-keys", type=Path, metavar="FILE", help="accepted keys, one a line; default: no key needed")
    verb.add_argument(
        "--allow-images-from", action="append", default=[], metavar="ORIGIN", help="fetch links of https://host[:port]"
    )
    verb.add_argument("--audit", type=Path, metavar="FILE", help="append a JSON line per request, with hashes only")
    verb.add_argument("--ray", action="store_true", help="several replicas, on Ray Serve; images find their replica")
    verb.add_argument("--replicas", type=int, metavar="N", help="with --ray; default: 2")
    verb.add_argument("--audit-text", action="store_true", help="questions and answers in the audit file as well")
    for name, text in verbs.SERVE_LIMITS.items():
        default = getattr(ServeConfig, name)
        flag = "--" + name.replace("_", "-")
        verb.add_argument(flag, type=int, default=default, metavar="N", help=f"{text}; default: {default}")
    return parser


def _verb(parsers: Any, name: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = parsers.add_parser(name, help=run.__doc__, description=run.__doc__)
    verb.set_defaults(run=run)
    verb.add_argument("--json", action="store_true", help="print JSON")
    verb.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return verb


def _add_model(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--model", metavar="DIR", help="Hugging Face Qwen3-VL directory or hub id; default: the bundled one"
    )
    _add_loading(verb)


def _add_loading(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--adapter", metavar="DIR", help="PEFT LoRA directory or hub id, merged while loading")
    verb.add_argument("--device", default="auto")
    verb.add_argument("--dtype", default="auto")
    verb.add_argument("--int8", action="store_true", help="the decoder's weights in 8 bits, checked by its latents")
    verb.add_argument("--cache-tokens", type=int, help="capacity of the KV cache in tokens")
    verb.add_argument(
        "--vision-cache-bytes",
        type=int,
        default=EngineConfig.vision_cache_bytes,
        help="memory for the features of past images [256 MiB]",
    )


def _add_decoding(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("-k", type=int, help="latent steps, 0..64; default: the checkpoint's")
    verb.add_argument("--max-new-tokens", type=int, default=64)
    verb.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    verb.add_argument("--top-p", type=float, default=1.0)
    verb.add_argument("--top-k", type=int, default=0)
    verb.add_argument("--seed", type=int)


def _add_reading(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--frame", type=int, help="frame of a DICOM file or page of a TIFF")
    verb.add_argument("--slice", type=int, dest="slice_index", help="slice of a NIfTI volume; default: the middle one")
    verb.add_argument("--axis", type=int, default=2, help="0 sagittal, 1 coronal, 2 axial")
    verb.add_argument("--window", metavar="CENTER,WIDTH", help="grey window, or the index of a DICOM file's own view")


def _add_phantoms(verb: argparse.ArgumentParser, split: str, seed: int, count: int) -> None:
    verb.add_argument("--split", default=split, choices=("train", "validation", "test"))
    verb.add_argument("--seed", type=int, default=seed)
    verb.add_argument("--count", type=int, default=count)
