"""One table and one picture of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich.box
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from vitalrt.files import replace_whole

COLOURS = {
    "vitalrt": "#1f6f8b",
    "vitalrt, in turn": "#4d93ab",
    "plain torch, graphed": "#a9cbd8",
    "transformers": "#c9c5ba",
    "transformers, compiled": "#8f8a7c",
}


def table(results: dict[str, Any]) -> Table:
    """Milliseconds by contender (p50), kernels' shares, losses and claims."""
    shown = Table(box=rich.box.SIMPLE_HEAD, title_justify="left", title="medians", pad_edge=False)
    shown.add_column("what", no_wrap=True)
    shown.add_column("measured", justify="right")
    shown.add_column("floor or peer", justify="right")
    ceilings = results.get("card", {})
    if ceilings.get("status") == "done":
        shown.add_row("copy", f"{ceilings['copy_bytes_per_s'] / 1e12:.3f} TB/s", "")
        shown.add_row("matrix product", f"{ceilings['matmul_flops_per_s'] / 1e12:.1f} TFLOP/s", "")
    tests = results.get("tests", {})
    if "passed" in tests:
        shown.add_row(
            "kernel tests", f"{tests['passed']} passed", f"{len(tests['failed'])} failed, {tests['skipped']} skipped"
        )
    product = results.get("product", {})
    if "questions" in product:
        same = min(product["same_alone"], product["same_in_batch"])
        shown.add_row(
            "bundled model", f"{same} of {product['questions']}", "answered as on the CPU, alone and in a batch"
        )
    shown.add_section()
    for what, by_name in results.get("requests", {}).get("ms", {}).items():
        ours = by_name.get("vitalrt", {}).get("p50")
        others = "; ".join(f"{name} {row['p50']:.2f}" for name, row in by_name.items() if name != "vitalrt")
        shown.add_row(what, f"{ours:.3f} ms" if ours else "–", others)
    if (agrees := results.get("requests", {}).get("overlap_agrees")) is not None:
        shown.add_row("overlapping launches", "agree" if agrees else "DIFFER", "with launches in turn, to the last bit")
    if (agrees := results.get("requests", {}).get("patches_agree")) is not None:
        shown.add_row("patches cut on the device", "agree" if agrees else "DIFFER", "with Pillow's, to the last bit")
    shown.add_section()
    for name, row in results.get("batches", {}).get("rows", {}).items():
        shown.add_row(name, f"{row['ms']['p50']:.3f} ms", f"floor {row['floor_ms']:.3f} ms, {row['share']:.0%}")
    for name, row in results.get("int8", {}).get("ms", {}).items():
        shown.add_row(f"int8: {name}", f"{row['p50']:.3f} ms", f"bf16 {row['plain_p50']:.3f} ms")
    for name, by_name in results.get("projector", {}).get("ms", {}).items():
        others = "; ".join(f"{other} {row['p50']:.3f}" for other, row in by_name.items() if other != "vitalrt")
        shown.add_row(name, f"{by_name['vitalrt']['p50']:.3f} ms", others)
    shown.add_section()
    for row in results.get("kernels", {}).get("rows", []):
        peer = f"{row['share']:.0%} of the card" + (
            f", {row['rival']} {row['rival_us']['p50']:.1f}" if "rival" in row else ""
        )
        shown.add_row(f"{row['kernel']}, {row['rows']} rows", f"{row['us']['p50']:.2f} us", peer)
    shown.add_section()
    for name, errors in results.get("numerics", {}).get("errors", {}).items():
        z = " ".join(f"{error:.4f}" for error in errors["z"])
        shown.add_row(f"error, {name}", f"logits {errors['logits']:.4f}", f"z {z}")
    for loss in results.get("profile", {}).get("largest_losses", []):
        shown.add_row(f"lost in {loss['what']}", f"{loss['us']:.0f} us", "of an answer token")
    shown.add_section()
    for claim in results.get("requests", {}).get("claims", []):
        bound = f"at most {claim['at_most']}" if "at_most" in claim else f"at least {claim['at_least']}"
        measured = "not measured" if claim["measured"] is None else f"{claim['measured']:.3f}"
        shown.add_row(claim["text"], measured, f"promised of an H200: {bound}")
    return shown


def draw(results: dict[str, Any], title: str, path: Path) -> None:
    """Requests and steps beside the peers; kernels' shares of the card."""
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    times, shares = figure.subplots(1, 2, width_ratios=(3, 2))
    ms = results.get("requests", {}).get("ms", {})
    whats = [what for what in ms if what.startswith(("latent", "answer", "request", "prefill"))]
    names = [name for name in COLOURS if any(name in ms[what] for what in whats)]
    width = 0.8 / max(1, len(names))
    for side, name in enumerate(names):
        present = [(i, ms[what][name]) for i, what in enumerate(whats) if name in ms[what]]
        places = [i + (side - (len(names) - 1) / 2) * width for i, _ in present]
        middles = [row["p50"] for _, row in present]
        errors = [[row["p50"] - row["p20"] for _, row in present], [row["p80"] - row["p50"] for _, row in present]]
        times.bar(places, middles, width * 0.92, yerr=errors, color=COLOURS[name], label=name, ecolor="#444444")
    times.set_xticks(range(len(whats)), [what.replace(" ", "\n", 1) for what in whats], fontsize=7)
    if whats:
        times.set_yscale("log")
        times.legend(frameon=False, fontsize=8)
    times.set_ylabel("ms (median, p20 to p80)")
    rows = results.get("kernels", {}).get("rows", [])
    labels = [f"{row['kernel']}, {row['rows']}" for row in rows]
    shares.barh(range(len(rows)), [100 * row["share"] for row in rows], color=COLOURS["vitalrt"], label="ours")
    others = [(i, row) for i, row in enumerate(rows) if "rival" in row]
    reached = [100 * row["floor_us"] / row["rival_us"]["p50"] for _, row in others]
    shares.plot(reached, [i for i, _ in others], "|", color="#222222", markersize=9, label="torch, or in two launches")
    shares.set_yticks(range(len(rows)), labels, fontsize=6)
    shares.invert_yaxis()
    shares.set_xlabel("% of what a copy or a product reached in this run")
    if rows:
        shares.legend(frameon=False, fontsize=8)
    for axes in (times, shares):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    replace_whole(path, lambda target: figure.savefig(target, format="png", dpi=140))
