"""Figures of `run.py`'s results: overhead over batch, val batch, length and width; memory; the planner's orders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from parts import PARTS
from tables import Results, Spread, of_rounds, rows_of, single, spread, why_missing
from workloads import Case

mpl.use("agg")
MODELS = {"gpt2": ("GPT-2", "#1b6ca8"), "mlp": ("MLP", "#c8553d"), "convnet": ("convolutions", "#588157")}
SWEEPS = {
    "batch": ("train samples B", lambda case: case.n),
    "val": ("val samples Bv", lambda case: case.m),
    "length": ("tokens of a sample T", lambda case: case.positions),
    "width": ("width", lambda case: case.width),
}
MEMORY = {
    "both": ("plain step, concatenated", "#6c757d", "-"), "dots": ("ghostfunc", "#1b6ca8", "-"),
    "vmap": ("vmap", "#c8553d", "--"),
}  # fmt: skip
ORDERS = {"Gram": "#e9c46a", "direction": "#c8553d", "tile stream": "#1b6ca8"}
Points = list[tuple[int, float]]


def of_model(sweep: str, model: str) -> list[Case]:
    return [case for case, _ in PARTS[f"sweep-{sweep}"].cases if case.model == model]


def times(results: Results, sweep: str, model: str, above: str, below: str) -> list[tuple[int, Spread]]:
    """Ratios of times over the sweep."""
    found = []
    for case in of_model(sweep, model):
        rows = rows_of(results, "times", f"sweep-{sweep}", case)
        if not why_missing(rows, {above: 1, below: 1}, "seconds"):
            found.append((SWEEPS[sweep][1](case), spread(of_rounds(rows, {above: 1}, {below: 1}))))
    return found


def flops(results: Results, sweep: str, model: str, above: str, below: str) -> Points:
    """Ratios of FLOPs over the sweep."""
    found = []
    for case in of_model(sweep, model):
        rows = rows_of(results, "counts", f"sweep-{sweep}", case)
        if not why_missing(rows, {above: 1, below: 1}, "flops"):
            found.append((SWEEPS[sweep][1](case), single(rows, {above: 1}, {below: 1}, "flops")))
    return found


def peaks(results: Results, model: str, method: str) -> Points:
    """Over the batch, in MiB."""
    found = []
    for case in of_model("batch", model):
        rows = rows_of(results, "peaks", "sweep-batch", case)
        if not why_missing(rows, {method: 1}, "peak_bytes"):
            found.append((case.n, rows[method]["peak_bytes"] / 2**20))
    return found


def on_powers(axes: Axes, xs: list[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(xs)), [str(x) for x in sorted(set(xs))])
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)


def overhead(results: Results) -> Figure:
    """Dots with gradients over a plain step on the concatenated batch: times with quartiles, and FLOPs."""
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for axes, (sweep, (label, _)) in zip(figure.subplots(1, len(SWEEPS), sharey=True), SWEEPS.items(), strict=True):
        seen = []
        for model, (name, color) in MODELS.items():
            if measured := times(results, sweep, model, "dots", "both"):
                xs, spreads = zip(*measured, strict=True)
                axes.plot(xs, [s.median for s in spreads], "o-", color=color, label=name, markersize=4)
                axes.fill_between(xs, [s.low for s in spreads], [s.high for s in spreads], color=color, alpha=0.15)
                seen += xs
            if counted := flops(results, sweep, model, "dots", "both"):
                xs, ratios = zip(*counted, strict=True)
                axes.plot(xs, ratios, ":", color=color, label=f"{name}, FLOPs")
                seen += xs
        axes.axhline(1, color="black", linewidth=0.8)
        on_powers(axes, seen, label)
        if seen and not axes.get_subplotspec().colspan.start:
            axes.set_ylabel("dots with gradients / plain step\non the concatenated batch")
            axes.legend(frameon=False, fontsize=8)
    return figure


def memory(results: Results) -> Figure:
    """Peaks of a step over the batch, for each model."""
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    for axes, (model, (name, _)) in zip(figure.subplots(1, len(MODELS)), MODELS.items(), strict=True):
        seen = []
        for method, (label, color, style) in MEMORY.items():
            if measured := peaks(results, model, method):
                xs, mebibytes = zip(*measured, strict=True)
                axes.plot(xs, mebibytes, style, marker="o", color=color, label=label, markersize=4)
                seen += xs
        on_powers(axes, seen, "train samples B")
        axes.set_yscale("log")
        axes.set_title(name, fontsize=10)
        axes.set_ylabel("memory of a step [MiB]")
        if seen:
            axes.legend(frameon=False, fontsize=8)
    return figure


def planner(found: Mapping[str, Any]) -> Figure:
    """Which order a weight [width, width] gets."""
    plans = found["plans"]
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    names = [*ORDERS, *sorted({name for plan in plans.values() for row in plan for name in row} - {*ORDERS})]
    colors = [ORDERS.get(name, "#6c757d") for name in names]
    (row,) = figure.subplots(1, len(plans), sharey=True, squeeze=False)
    for axes, (label, plan) in zip(row, plans.items(), strict=True):
        cells = [[names.index(name) for name in row] for row in plan]
        axes.pcolormesh(cells, cmap=ListedColormap(colors), vmin=-0.5, vmax=len(names) - 0.5, edgecolors="white")
        axes.set_xticks([i + 0.5 for i in range(len(found["lengths"]))], found["lengths"], fontsize=7)
        axes.set_yticks([i + 0.5 for i in range(len(found["widths"]))], found["widths"])
        axes.set_title(label, fontsize=9)
        axes.set_xlabel("positions of a sample")
        if not axes.get_subplotspec().colspan.start:
            axes.set_ylabel("width of the weight")
    patches = [Patch(color=color, label=name) for name, color in zip(names, colors, strict=True)]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(names), frameon=False)
    return figure


def drawn(results: Results) -> dict[str, Figure]:
    """The figures that the results are enough for, by file name."""
    made = {}
    if any(part.startswith("sweep") for part in results.get("peaks", {})):
        made["bench_overhead.png"] = overhead(results)
    if "sweep-batch" in results.get("peaks", {}):
        made["bench_memory.png"] = memory(results)
    if "planner" in results:
        made["bench_planner.png"] = planner(results["planner"])
    return made


def save(made: Mapping[str, Figure], folder: Path) -> None:
    for name, figure in made.items():
        figure.savefig(folder / name, dpi=110, metadata={"Software": None})
