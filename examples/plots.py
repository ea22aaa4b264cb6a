"""The demo's plots as SVG elements; text and axes take the page's colour, so light and dark both work."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib
import torch
from common import Case, Greedy, top_gap
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator
from measure import Sweep

INK = "#010203"  # replaced by the page's text colour
BLUE, ORANGE, GREEN, GREY = "#3b82f6", "#f97316", "#10a37f", "#8b95a5"  # readable on white and on near-black
SIZE_INCHES = (5.6, 3.3)

STYLE = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "font.family": "sans-serif",
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


def svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element; `name` keeps its element ids apart from those of other figures."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def axes() -> tuple[Figure, Axes]:
    """An empty figure of the common size."""
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    return figure, figure.subplots()


@matplotlib.rc_context(STYLE)
def plot_errors(cases: Sequence[Case], outputs: Sequence[Greedy], name: str) -> str:
    """Per generated token: the logit errors of both models, and how clear the choice was."""
    figure, ax = axes()
    exact = torch.stack([case.exact for case in cases])
    steps = range(1, exact.shape[1] + 1)
    gap = top_gap(exact).amin(dim=0).cpu()
    ax.plot(steps, gap, "D", color=GREEN, markersize=5, label="best minus second-best logit (smallest)")
    for logits, label, colour, marker in (
        ([case.stock.logits for case in cases], "error of the untouched model (largest)", GREY, "s"),
        ([output.logits for output in outputs], "error of the patched model (largest)", BLUE, "o"),
    ):
        error = (torch.stack(logits) - exact).abs().amax(dim=(0, 2)).cpu()
        ax.plot(steps, error, f"-{marker}", color=colour, markersize=4, label=label)
    ax.set(yscale="log", xlabel="generated token", ylabel="logits, against float32")
    lowest, highest = ax.get_ylim()
    ax.set_ylim(lowest / 1.3, highest * 8)  # room for the legend
    ax.legend(loc="upper left", fontsize=9)
    return svg(figure, name)


@matplotlib.rc_context(STYLE)
def plot_times(milliseconds: Mapping[str, float], name: str) -> str:
    """One bar per way of decoding, in milliseconds per generated token."""
    figure, ax = axes()
    labels = list(milliseconds)
    colours = [GREY, BLUE, ORANGE, GREEN]
    bars = ax.barh(
        labels, [milliseconds[label] for label in labels], color=colours[: len(labels)], height=0.6
    )
    ax.bar_label(bars, fmt="%.2f", padding=4, color=INK)
    ax.set_yticks(range(len(labels)), [label.replace(", ", ",\n", 1) for label in labels])
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set_xlim(0, 1.15 * max(milliseconds.values()))
    ax.set(xlabel="ms per generated token, mean")
    return svg(figure, name)


@matplotlib.rc_context(STYLE)
def plot_sweeps(sweeps: Sequence[Sweep], quantity: str, xlabel: str, ylabel: str, name: str) -> str:
    """One curve per sweep over its sizes; `quantity` is a field of `measure.Point`."""
    figure, ax = axes()
    sizes = [point.size for point in sweeps[0].points]
    for sweep, colour, marker in zip(sweeps, (BLUE, ORANGE), "os", strict=False):
        values = [getattr(point, quantity) for point in sweep.points]
        ax.plot(sizes, values, f"-{marker}", color=colour, markersize=5, label=sweep.label)
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
    highest = max(getattr(point, quantity) for sweep in sweeps for point in sweep.points)
    ax.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, 1.3 * highest))  # room for the legend
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.ticklabel_format(axis="y", scilimits=(-2, 4))
    ax.legend(loc="upper left", fontsize=9)
    return svg(figure, name)
