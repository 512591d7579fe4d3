"""Tables made from the results of `run.py`: nothing in them is typed."""

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from methods import METHODS
from parts import COMPARED, LIMITED_METHODS, PAPER, PARTS, Claim, claims
from workloads import Case

Results = Mapping[str, Any]
KINDS = ("peaks", "counts", "times")
RIGHT = 1e-4  # relative error of dots in float32: above, a method computes something else


class Spread(NamedTuple):
    """Quartiles of what was measured in several rounds."""

    low: float
    median: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


class Outcome(NamedTuple):
    """What became of a claim.

    Attributes:
        claim: the claim.
        spread: the ratio; None where it was not measured.
        flops: the ratio of FLOPs; None where they were not counted.
        missing: why it was not measured.
    """

    claim: Claim
    spread: Spread | None
    flops: float | None
    missing: str

    @property
    def verdict(self) -> str:
        """Whether the median is within the target."""
        return self.missing if self.spread is None else "yes" if self.spread.median <= self.claim.target else "**no**"


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


# --- ratios -----------------------------------------------------------------------------------------------------------


def rows_of(results: Results, kind: str, part: str, case: Case) -> dict[str, Any]:
    """What each method of a case has; empty where the case was not measured, or another one in its place."""
    found = results.get(kind, {}).get(part, {}).get(case.name)
    return found["methods"] if found and found["measured"] == asdict(case) else {}


def spread(values: list[float]) -> Spread:
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(low, median, high, len(values))


def why_missing(rows: Mapping[str, Any], methods: Mapping[str, int], key: str) -> str:
    """Empty where every method has the key."""
    for method in methods:
        if method not in rows:
            return "not measured"
        if key not in rows[method]:
            return rows[method].get("raised", "not measured")
    return ""


def of_rounds(rows: Mapping[str, Any], above: Mapping[str, int], below: Mapping[str, int]) -> list[float]:
    """The ratio of weighted sums of steps' times, round by round."""

    def sums(weights: Mapping[str, int]) -> list[float]:
        taken = [[count * s for s in rows[method]["seconds"]] for method, count in weights.items()]
        return [sum(of_round) for of_round in zip(*taken, strict=True)]

    return [a / b for a, b in zip(sums(above), sums(below), strict=True)]


def single(rows: Mapping[str, Any], above: Mapping[str, int], below: Mapping[str, int], key: str) -> float:
    a, b = (sum(count * rows[method][key] for method, count in weights.items()) for weights in (above, below))
    return a / b


def outcome(claim: Claim, results: Results) -> Outcome:
    """A claim against what was measured."""
    methods = {**claim.above, **claim.below}
    counted = rows_of(results, "counts", claim.part, claim.case)
    flops = None
    if claim.of == "times" and not why_missing(counted, methods, "flops"):
        flops = single(counted, claim.above, claim.below, "flops")
    rows = rows_of(results, claim.of, claim.part, claim.case)
    missing = why_missing(rows, methods, "peak_bytes" if claim.of == "peaks" else "seconds")
    if missing:
        return Outcome(claim, None, flops, missing)
    if claim.of == "peaks":
        return Outcome(claim, spread([single(rows, claim.above, claim.below, "peak_bytes")]), None, "")
    return Outcome(claim, spread(of_rounds(rows, claim.above, claim.below)), flops, "")


# --- tables -----------------------------------------------------------------------------------------------------------


def markdown(heads: list[str], lines: list[list[str]]) -> str:
    rule = "|---" * len(heads) + "|"
    return "\n".join([f"| {' | '.join(heads)} |", rule, *(f"| {' | '.join(line)} |" for line in lines)])


def claims_table(results: Results, keep: Callable[[Claim], bool] = lambda claim: True) -> str:
    """Every claim, its target, and what was measured."""
    lines = []
    for found in (outcome(claim, results) for claim in claims() if keep(claim)):
        claim, measured = found.claim, found.spread
        lines.append(
            [
                claim.label, claim.case.name, f"{claim.target:.2f}", "" if measured is None else str(measured),
                "" if measured is None else str(measured.rounds),
                "" if found.flops is None else f"{found.flops:.3f}", found.verdict,
            ]
        )  # fmt: skip
    if limit := results.get("memory-limit"):
        lines.append(limit_line(limit))
    heads = ["claim", "measured on", "at most", "median (quartiles)", "rounds", "FLOPs", "held"]
    return markdown(heads, lines)


def limit_line(limit: Mapping[str, Any]) -> list[str]:
    """One step in little memory: vmap fails there, and ghostfunc runs."""
    ours, vmap = (limit["methods"][method] for method in LIMITED_METHODS)
    said = [
        f"{label}: {row['raised'] if 'raised' in row else mebibytes(row['peak_bytes'])}"
        for label, row in (("ghostfunc", ours), ("vmap", vmap))
    ]
    held = "yes" if "raised" not in ours and "alloc" in vmap.get("raised", "") else "**no**"
    label = f"dots with gradients in {mebibytes(limit['allowed_bytes'])} more, where vmap runs out of memory"
    return [label, limit["case"], "", "; ".join(said), "1", "", held]


def mebibytes(count: float) -> str:
    return f"{count / 2**20:.0f} MiB"


def compared_cases() -> list[Case]:
    return [case for case, _ in PARTS["compare"].cases]


def compared_table(results: Results) -> str:
    """Each method on each model: FLOPs, time, memory and error, or why there are none."""
    heads = ["model", "batch", "method", "FLOPs / plain", "time / plain", "memory of a step", "error of the dots"]
    lines = []
    for case in compared_cases():
        peaks, counted, timed = (rows_of(results, kind, "compare", case) for kind in KINDS)
        for method in COMPARED:
            line = [case.architecture, case.batch, METHODS[method].label]
            if raised := peaks.get(method, {}).get("raised"):
                lines.append([*line, f"cannot: {raised}", "", "", ""])
                continue
            flops = _cell(counted, method, "flops", lambda a, b: f"{a / b:.2f}")
            error = _error(counted.get(method, {}))
            lines.append([*line, flops, _time(timed, method, "plain"), _memory(peaks, method), error])
    return markdown(heads, lines)


def _cell(rows: Mapping[str, Any], method: str, key: str, form: Callable[[float, float], str]) -> str:
    return "" if why_missing(rows, {method: 1, "plain": 1}, key) else form(rows[method][key], rows["plain"][key])


def _time(rows: Mapping[str, Any], method: str, beside: str) -> str:
    if missing := why_missing(rows, {method: 1, beside: 1}, "seconds"):
        return missing if rows else ""
    return f"{spread(of_rounds(rows, {method: 1}, {beside: 1})).median:.2f}"


def _memory(peaks: Mapping[str, Any], method: str) -> str:
    return mebibytes(peaks[method]["peak_bytes"]) if "peak_bytes" in peaks.get(method, {}) else ""


def _error(row: Mapping[str, Any]) -> str:
    if "error" not in row:
        return ""
    return f"{row['error']:.0e}" + (", **wrong**" if row["error"] > RIGHT else "")


def against_others(results: Results) -> str:
    """Of each other way to the same dots: how ghostfunc's time and memory compare, and a verdict on both."""
    heads = ["model", "batch", "beside", "time of ghostfunc / theirs", "memory / theirs", "faster", "leaner"]
    lines = []
    for case in compared_cases():
        peaks, counted, timed = (rows_of(results, kind, "compare", case) for kind in KINDS)
        for method in COMPARED[COMPARED.index("dots") + 1 :]:
            line = [case.architecture, case.batch, METHODS[method].label]
            error = counted.get(method, {}).get("error", 0)
            if raised := peaks.get(method, {}).get("raised"):
                lines.append([*line, f"cannot: {raised}", "", "", ""])
            elif error > RIGHT:
                lines.append([*line, f"other numbers: error {error:.0e}", "", "", ""])
            else:
                lines.append(line + _faster_and_leaner(peaks, timed, method))
    return markdown(heads, lines)


def _faster_and_leaner(peaks: Mapping[str, Any], timed: Mapping[str, Any], method: str) -> list[str]:
    pair = {"dots": 1, method: 1}
    time, faster = "not measured", ""
    if not why_missing(timed, pair, "seconds"):
        measured = spread(of_rounds(timed, {"dots": 1}, {method: 1}))
        time, faster = str(measured), "yes" if measured.median < 1 else "**no**"
    memory, leaner = "not measured", ""
    if not why_missing(peaks, pair, "peak_bytes"):
        ratio = single(peaks, {"dots": 1}, {method: 1}, "peak_bytes")
        memory, leaner = f"{ratio:.2f}", "yes" if ratio < 1 else "**no**"
    return [time, memory, faster, leaner]


PAPERS_TABLE = {"plain": "regular", "dots": "first order", "second": "second order", "direct": "direct"}


def paper_table(results: Results) -> str:
    """Table 1 of "Data Shapley in One Training Run", in kind: samples per second."""
    peaks, counted, timed = (rows_of(results, kind, "claims-paper", PAPER) for kind in KINDS)
    lines = []
    for method, label in PAPERS_TABLE.items():
        if missing := why_missing(timed, {method: 1, "plain": 1}, "seconds"):
            lines.append([label, missing, "", "", ""])
            continue
        rate = PAPER.n / statistics.median(timed[method]["seconds"])
        ratio = spread(of_rounds(timed, {method: 1}, {"plain": 1}))
        flops = _cell(counted, method, "flops", lambda a, b: f"{a / b:.3f}")
        lines.append([label, f"{rate:.2f}", str(ratio), flops, _memory(peaks, method)])
    return markdown(["", "samples / s", "time / regular", "FLOPs / regular", "memory of a step"], lines)


def of_models(results: Results) -> str:
    """Methods by models: time over a plain step, and memory."""
    cases = compared_cases()
    lines = []
    for method in COMPARED:
        cells = []
        for case in cases:
            peaks, counted, timed = (rows_of(results, kind, "compare", case) for kind in KINDS)
            error = counted.get(method, {}).get("error", 0)
            if "raised" in peaks.get(method, {}):
                cells.append("cannot")
            elif error > RIGHT:
                cells.append(f"other numbers (error {error:.0e})")
            else:
                parts = (_time(timed, method, "plain"), _memory(peaks, method))
                cells.append(", ".join(part for part in parts if part) or "not measured")
        lines.append([METHODS[method].label, *cells])
    return markdown(["", *(f"{case.architecture}; {case.batch}" for case in cases)], lines)


# --- captions ---------------------------------------------------------------------------------------------------------


def caption(results: Results) -> str:
    """The machine and the code that the results are of."""
    return "\n".join(
        f"- {what}: {_of(results, kind)}" for kind, what in zip(KINDS, ("memory", "FLOPs", "times"), strict=True)
    )


def _of(results: Results, kind: str) -> str:
    found = [case["environment"] for part in results.get(kind, {}).values() for case in part.values()]
    if not found:
        return "not measured"
    load = max(e["load_average_before"] for e in found)
    commits = sorted({e["commit"] for e in found if e["commit"]})
    machines = sorted({f"{e['cpu']}, {e['threads']} threads on {e['cores']} cores" for e in found})
    versions = sorted({f"torch {e['torch']}, transformers {e['transformers']}, Python {e['python']}" for e in found})
    code = f"code at {', '.join(commits)}"
    return "; ".join([*machines, *versions, "float32", f"load average up to {load:.1f} at the start", code])
