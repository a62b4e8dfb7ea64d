"""Pictures of training runs, drawn from plain numbers. K latent steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

INK, PALE = "#444444", "#c9c5ba"
COLOURS = {"loss": INK, "task": "#1f6f8b", "text": "#c2703d", "visual": "#6a8f3c"}
SEQUENCE = ("#1f6f8b", "#c2703d", "#6a8f3c", "#7a5195", "#b5892e", "#8c8c8c", "#b04a5a", "#3f5f9f")
PIXELS_PER_INCH, MARGIN = 160, 0.1  # margin around panels, in inches
MAX_NUMBERED_STEPS = 16  # beyond that, numbers in the cells of a matrix cannot be read


def new_figure(width: float, height: float, compress: bool = False) -> Figure:
    """width, height: in inches.  compress: no gaps between panels whose shape is fixed, such as matrices."""
    layout = ConstrainedLayoutEngine(w_pad=MARGIN, h_pad=MARGIN, compress=compress)
    figure = Figure(figsize=(width, height), layout=layout, dpi=PIXELS_PER_INCH)
    FigureCanvasAgg(figure)
    return figure


def plot_curves(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Losses, gradient norm and learning rate over the steps of all stages.  records: the lines of log.jsonl."""
    figure = new_figure(10, 8)
    losses, norms, rates = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1.4, 1))
    parts = [name for name in COLOURS if name != "loss" and any(f"loss_{name}" in r for r in records)]
    if len(parts) > 1:
        _smoothed(losses, records, "loss", COLOURS["loss"], "weighted sum")
    for name in parts:
        _smoothed(losses, records, f"loss_{name}", COLOURS[name], name)
    losses.set_ylabel("loss")
    losses.legend(loc="upper right", frameon=False, ncols=len(parts) + 1)
    _smoothed(norms, records, "grad_norm", INK)
    norms.set_ylabel("gradient norm\nbefore clipping")
    rates.plot([record["learning_rate"] for record in records], color=INK, linewidth=1.2)
    rates.set_ylabel("learning rate")
    rates.set_ylim(bottom=0)
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rates.set_xlabel("optimiser step")
    rates.xaxis.set_major_locator(MaxNLocator(integer=True))
    starts = [i for i, record in enumerate(records) if i == 0 or record["stage"] != records[i - 1]["stage"]]
    for start in starts:
        losses.annotate(
            records[start]["stage"],
            (start, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(3, 4),
            textcoords="offset points",
            fontsize=9,
        )
    for axes in (losses, norms, rates):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
        for start in starts[1:]:
            axes.axvline(start - 0.5, color="#999999", linewidth=0.8, linestyle=":")
    for axes in (losses, norms):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    # Room above the curves for the legend.
    low, high = losses.get_ylim()
    losses.set_ylim(low, high * (high / low) ** 0.15)
    return figure


def plot_accuracy(evaluation: Mapping[str, Any], title: str) -> Figure:
    """By K, question type and modality.  evaluation: as evaluate.evaluate gives it, its keys text."""
    groups = {"question type": evaluation["by_type"], "modality": evaluation["by_modality"]}
    num_bars = max(len(evaluation["by_k"]), *map(len, groups.values()))
    figure = new_figure(13, 2 + 0.34 * num_bars)
    panels = figure.subplots(1, 3)
    for axes in panels:
        axes.set_ylim(num_bars - 0.5, -0.5)  # from the top down, bars as thick in all panels
    overall = evaluation["majority_accuracy"]
    by_k = {f"K = {k}": value for k, value in evaluation["by_k"].items()}
    _bars(panels[0], by_k, dict.fromkeys(by_k, overall))
    panels[0].set_title("all closed questions, by latent steps", fontsize=10)
    for axes, (kind, group) in zip(panels[1:], groups.items(), strict=True):
        # The majority baseline knows the question type, not the modality.
        majority = evaluation["majority_of_type"] if kind == "question type" else {}
        values = {f"{name} ({g['questions']:,})": g["accuracy"] for name, g in group.items()}
        shares = {
            f"{name} ({g['questions']:,})": majority.get(name, {"share": overall})["share"] for name, g in group.items()
        }
        _bars(axes, values, shares)
        axes.set_title(f"by {kind}, K = {evaluation['k']} (number of questions)", fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False)
    figure.suptitle(f"Accuracy: {title}", fontsize=11)
    return figure


def plot_cosine(matrix: Sequence[Sequence[float]], num_samples: int) -> Figure:
    side = 2.0 + 0.6 * min(len(matrix), MAX_NUMBERED_STEPS)
    figure = new_figure(side + 1.6, side + 0.6, compress=True)
    axes = figure.subplots()
    image = draw_cosine(axes, matrix)
    figure.colorbar(image, ax=axes, label="cosine similarity")
    axes.set_title(f"Latent steps beside each other\n(mean over {num_samples:,} samples)", fontsize=10)
    return figure


def draw_cosine(axes: Axes, matrix: Sequence[Sequence[float]]) -> AxesImage:
    """matrix: K x K.  Colours go from 0 to 1 in every picture, so that pictures can be compared."""
    values = np.asarray(matrix)
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis")
    steps = range(len(values))
    axes.set_xticks(steps, [f"$z_{{{step + 1}}}$" for step in steps])
    axes.set_yticks(steps, [f"$z_{{{step + 1}}}$" for step in steps])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if len(values) <= MAX_NUMBERED_STEPS:
        for (row, column), value in np.ndenumerate(values):
            colour = "black" if value > 0.6 else "white"
            axes.text(column, row, f"{value:.3f}", ha="center", va="center", fontsize=8, color=colour)
    return image


def plot_gradients(norms: Mapping[str, float], weights: Mapping[str, float]) -> Figure:
    """norms: of each loss, weighted.  weights: the lambdas."""
    figure = new_figure(7, 1.3 + 0.45 * len(norms))
    axes = figure.subplots()
    labels = [f"{name}, λ = {weights[name]:g}" for name in norms]
    bars = axes.barh(labels, list(norms.values()), 0.6, color=[COLOURS[name] for name in norms])
    axes.bar_label(bars, [f"{value:.3g}" for value in norms.values()], padding=4, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlim(left=0)
    axes.set_xlabel("norm of λ × gradient, over the LoRA parameters")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _smoothed(
    axes: Axes, records: Sequence[Mapping[str, Any]], key: str, colour: str, label: str | None = None
) -> None:
    """Every step in pale, and above it a centred moving average that does not reach across stages."""
    half = len(records) // 200
    for stage in dict.fromkeys(record["stage"] for record in records):
        steps = [i for i, record in enumerate(records) if record["stage"] == stage and key in record]
        if not steps:
            continue
        values = np.array([records[i][key] for i in steps])
        sums = np.concatenate(([0.0], values.cumsum()))
        places = np.arange(len(values))
        first, last = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
        axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.7)
        axes.plot(steps, (sums[last] - sums[first]) / (last - first), color=colour, linewidth=1.5, label=label)
        label = None  # once in the legend


def _bars(axes: Axes, values: Mapping[str, float], majority: Mapping[str, float]) -> None:
    places = range(len(values))
    bars = axes.barh(places, list(values.values()), 0.66, color=COLOURS["task"])
    axes.bar_label(bars, [f"{value:.1%}" for value in values.values()], padding=4, fontsize=8)
    axes.scatter(
        [majority[name] for name in values],
        places,
        marker="|",
        s=200,
        linewidths=2,
        color="#e0a030",
        zorder=3,
        label="always the most common answer of the question's type",
    )
    axes.set_yticks(places, list(values))
    axes.set_xlim(0, 1.16)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
