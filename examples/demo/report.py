"""The demo's report: from a dot log to a table of domains, passages, a figure and one self-contained HTML page.

The value of sample i in a step of n samples with learning rate lr is its share of the step's first-order effect on the
validation loss, v_i = lr / n * <grad l_i, mean_j grad l_j>; values of several steps are summed.
"""

import base64
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

# Okabe and Ito's colours, which stay apart for colour-blind readers, without the yellow that vanishes on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINE_STYLES = ("-", "--", ":")
EXPLANATION = (
    "A positive value means that a plain gradient step on the sample lowers the validation loss (helpful), a negative "
    "one that it raises it (harmful).",
    "Values are in nats of mean validation loss per token, to first order and for plain gradient steps: learning rate "
    "divided by the batch's samples, times the dot product of the sample's gradient with the mean validation gradient, "
    "summed over the run.",
)


@dataclass(frozen=True)
class DomainValue:
    """The values of one domain's training samples, in nats.

    Attributes:
        domain: the domain's name.
        samples: how many samples of it were trained on, repetitions counted.
        total: the sum of their values.
        mean: their mean value, with its `standard_error` (nan for a single sample).
        standard_error: the standard error of the mean.
        quartiles: the 25th, 50th and 75th percentile of their values.
        harmful: the share of samples with a negative value, from 0 to 1.
    """

    domain: str
    samples: int
    total: float
    mean: float
    standard_error: float
    quartiles: tuple[float, float, float]
    harmful: float


@dataclass(frozen=True)
class SampleValue:
    """One training sample: its domain, its id, the sum of its values in nats, and how often it was trained on."""

    domain: str
    sample_id: int
    value: float
    seen: int


@dataclass(frozen=True)
class Passage:
    """A training sample beside its text."""

    sample: SampleValue
    text: str


def values_of(log: pa.Table) -> np.ndarray:
    """The value of each row, v = learning_rate / n * dot, n the number of samples in the row's iteration.

    Args:
        log: the table of `ghostfunc.read_dot_log`. An iteration's micro-steps make one optimizer step together.

    Returns:
        `[rows]`, float64, in nats.
    """
    iterations, rates, dots = (log[name].to_numpy() for name in ("iteration", "learning_rate", "dot"))
    _, step_of_row, samples = np.unique(iterations, return_inverse=True, return_counts=True)
    return rates / samples[step_of_row] * dots


def domain_values(log: pa.Table) -> list[DomainValue]:
    """Sum up each domain's values, the highest total first."""
    domains, values = log["domain"].to_numpy(zero_copy_only=False), values_of(log)
    rows = []
    for domain in np.unique(domains):
        own = values[domains == domain]
        quartiles = np.percentile(own, (25, 50, 75))
        rows.append(
            DomainValue(
                domain=str(domain),
                samples=len(own),
                total=float(own.sum()),
                mean=float(own.mean()),
                standard_error=float(own.std(ddof=1) / len(own) ** 0.5) if len(own) > 1 else float("nan"),
                quartiles=(float(quartiles[0]), float(quartiles[1]), float(quartiles[2])),
                harmful=float((own < 0).mean()),
            )
        )
    return sorted(rows, key=lambda row: -row.total)


def sample_values(log: pa.Table) -> list[SampleValue]:
    """Sum up the values of each sample over the times it was trained on, the highest first."""
    table = log.select(["domain", "sample_id"]).append_column("value", pa.array(values_of(log)))
    grouped = table.group_by(["domain", "sample_id"]).aggregate([("value", "sum"), ("value", "count")])
    samples = [
        SampleValue(row["domain"], row["sample_id"], row["value_sum"], row["value_count"])
        for row in grouped.to_pylist()
    ]
    return sorted(samples, key=lambda sample: -sample.value)


def draw_values(log: pa.Table, val_domain: str, *, windows: int = 15) -> bytes:
    """Draw the value of each domain over training.

    Args:
        log: the table of `ghostfunc.read_dot_log`.
        val_domain: the domain of the validation batch, drawn in black.
        windows: into how many equal stretches of training the right panel divides the run.

    Returns:
        A PNG: on the left the domain's value summed up to each step, on the right the mean value of one of its samples
        in each stretch of the run, with twice its standard error as a band, on a symmetric logarithmic scale.
    """
    iterations, values = log["iteration"].to_numpy(), values_of(log)
    domains = log["domain"].to_numpy(zero_copy_only=False)
    steps = np.unique(iterations)
    edges = np.unique(np.linspace(steps[0], steps[-1] + 1, windows + 1).round())

    rows = domain_values(log)
    figure = Figure(figsize=(9, 3.9), dpi=100, layout="constrained")
    summed, single = figure.subplots(1, 2)
    for place, row in enumerate(rows):
        own = domains == row.domain
        is_val = row.domain == val_domain
        look = {
            "color": "black" if is_val else COLOURS[place % len(COLOURS)],
            "linestyle": LINE_STYLES[place // len(COLOURS) % len(LINE_STYLES)],
            "linewidth": 2.2 if is_val else 1.4,
        }
        per_step = np.bincount(np.searchsorted(steps, iterations[own]), weights=values[own], minlength=len(steps))
        label = f"{row.domain} (validation)" if is_val else row.domain
        summed.plot(steps, per_step.cumsum(), label=label, **look)
        middles, means, errors = _windowed(iterations[own], values[own] * 1e6, edges)
        single.plot(middles, means, marker=".", **look)
        single.fill_between(middles, means - errors, means + errors, color=look["color"], alpha=0.15, linewidth=0)
    # Values shrink by orders of magnitude as the model learns, and they change sign.
    largest = max(abs(single.dataLim.y0), abs(single.dataLim.y1)) or 1.0
    single.set_yscale("symlog", linthresh=10.0 ** np.ceil(np.log10(largest / 100)))
    summed.set(xlabel="training step", ylabel="summed value [nats]", title="Value of a domain, summed up")
    single.set(
        xlabel="training step",
        ylabel="mean value [10⁻⁶ nats], log scale",
        title="Value of one sample, ± 2 standard errors",
    )
    for axes in (summed, single):
        axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(5, len(rows)), frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", pil_kwargs={"optimize": True})
    return buffer.getvalue()


def _windowed(
    iterations: np.ndarray, values: np.ndarray, edges: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Middle, mean value and twice the standard error of each window with at least two samples."""
    rows = []
    for start, end in itertools.pairwise(edges):
        own = values[(iterations >= start) & (iterations < end)]
        if len(own) > 1:
            rows.append(((start + end - 1) / 2, own.mean(), 2 * own.std(ddof=1) / len(own) ** 0.5))
    middles, means, errors = np.array(rows).reshape(-1, 3).T
    return middles, means, errors


def format_table(rows: Sequence[DomainValue], val_domain: str) -> str:
    """The table of domains as text for a terminal; `*` marks the validation batch's domain."""
    width = max(len("domain"), *(len(row.domain) + 2 for row in rows))
    lines = [
        f"{'domain':<{width}} {'samples':>8} {'sum':>9} {'mean ± s.e.':>15} {'25%':>8} {'50%':>8} {'75%':>8} {'<0':>5}",
        f"{'':<{width}} {'':>8} {'[nats]':>9} " + " " * 13 + "of one sample [10⁻⁶ nats]",
    ]
    for row in rows:
        name = f"{row.domain} *" if row.domain == val_domain else row.domain
        mean = f"{row.mean * 1e6:.1f} ± {row.standard_error * 1e6:.1f}"
        quartiles = " ".join(f"{value * 1e6:>8.1f}" for value in row.quartiles)
        lines.append(f"{name:<{width}} {row.samples:>8} {row.total:>9.4f} {mean:>15} {quartiles} {row.harmful:>5.0%}")
    return "\n".join(lines)


def format_passages(passages: Iterable[Passage], *, width: int = 160) -> str:
    """Passages as text for a terminal, one line each, cut to `width` characters and without control characters."""
    lines = []
    for passage in passages:
        text = "".join(character if character.isprintable() else " " for character in passage.text)
        text = " ".join(text.split())
        text = text if len(text) <= width else text[: width - 1] + "…"
        lines.append(f"{passage.sample.value * 1e6:>+9.1f}  {passage.sample.domain}: {text}")
    return "\n".join(lines)


def render_html(
    *,
    domains: Sequence[DomainValue],
    val_domain: str,
    helpful: Sequence[Passage],
    harmful: Sequence[Passage],
    figure: bytes,
    facts: Mapping[str, Any],
    cost: Sequence[str],
    command: str,
) -> str:
    """Render the report as one HTML page that needs nothing beside itself; whatever comes from data is escaped.

    Args:
        domains: the rows of the table, in its order.
        val_domain: the domain of the validation batch, marked in the table.
        helpful: passages of the highest values.
        harmful: passages of the lowest values.
        figure: a PNG.
        facts: what the run was, name by name.
        cost: sentences about the measured cost.
        command: the command that trains on the same data.

    Returns:
        The page's source.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html.jinja").render(
        explanation=EXPLANATION,
        domains=domains,
        val_domain=val_domain,
        passages={"Most helpful passages": helpful, "Most harmful passages": harmful},
        figure=base64.b64encode(figure).decode("ascii"),
        facts=facts,
        cost=cost,
        command=command,
    )
