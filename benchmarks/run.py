"""Every claim about speed and memory, in one run: times, peaks and FLOPs of each method, on each case.

    python benchmarks/run.py                            # all: benchmarks/results/run.json, then docs/benchmarks.md
    python benchmarks/run.py --only claims-dots         # one part; the others keep their results
    python benchmarks/run.py --sweep batch --rounds 9   # the same as --only sweep-batch
    python benchmarks/run.py --times                    # times and peaks alone, without FLOPs and errors of the dots
    python benchmarks/run.py --counts                   # these and peaks alone, which a busy machine does not change
    python benchmarks/run.py --short                    # some minutes: build/bench.json, and nothing of the page
    python benchmarks/run.py --page                     # docs/benchmarks.md and its figures again, from the results

Every method has a process of its own (`run_worker.py`) and takes its turn in each round, the order rotated from round
to round; a figure is the median over the rounds of a ratio of times of the same round. A peak is by how many bytes a
step raises the high-water mark of resident memory above what the process held before it. FLOPs are those of
`torch.utils.flop_counter`, with attention as plain products. Each case is written as soon as it is measured.

Peers need `--peers-venv`, a folder outside of the repository that `peers.py` fills (Opacus alone needs none): what
fails in a peer is its result.
"""

import argparse
import importlib.metadata
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import measuring
import planner_map
from methods import METHODS
from parts import ALLOWED_BYTES, LIMITED, LIMITED_METHODS, PARTS, SHORT, SHORT_LIMITED, Part
from peers import REQUIREMENTS, installed, make_venv
from tables import claims_table, load, outcome
from workers import Worker
from workloads import Case

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "run.json"
ELSEWHERE = ROOT / "build" / "bench.json"
OTHER_PARTS = ("memory-limit", "planner")
SHORTEST_TURN = 0.1  # seconds: below, a turn is several calls
PATIENCE = 300.0  # seconds for a peer's first step


class Workers:
    """A process for each method, started when it is first asked for.

    Attributes:
        missing: why a method has no process.
    """

    def __init__(self, threads: int, venv: Path | None, logs: Path) -> None:
        self.missing: dict[str, str] = {}
        self._threads, self._venv, self._logs = threads, venv, logs
        self._running: dict[str, Worker] = {}

    def ask(self, method: str, **message: Any) -> dict[str, Any]:
        """What the method's process answers; `{"raised": ...}` for whatever fails."""
        if method in self.missing:
            return {"raised": self.missing[method]}
        try:
            if method not in self._running:
                self._running[method] = self._start(method)
            return self._running[method].ask(message, PATIENCE if METHODS[method].peer else None)
        except RuntimeError as error:
            self._running.pop(method, None)
            return {"raised": str(error)}

    def drop(self) -> None:
        """Every process forgets its case."""
        for method in list(self._running):
            self.ask(method, do="drop")

    def stop(self, *, but: Collection[str] = ()) -> None:
        """End them all, but for some."""
        for method in set(self._running).difference(but):
            self._running.pop(method).stop()

    def _start(self, method: str) -> Worker:
        command = [str(self._python(method)), str(Path(__file__).with_name("run_worker.py")), method]
        return Worker(method, [*command, "--threads", str(self._threads)], self._logs / f"{method}.log")

    def _python(self, method: str) -> Path:
        peer = METHODS[method].peer
        if not peer or _is_here(peer):
            return Path(sys.executable)
        if self._venv is None:
            self.missing[method] = "not asked for: it needs --peers-venv"
            raise RuntimeError(self.missing[method])
        python = make_venv(self._venv.absolute())
        if reason := installed(python, peer):
            self.missing[method] = reason
            raise RuntimeError(reason)
        return python


def _is_here(peer: str) -> bool:
    """Whether this interpreter has the very version that is compared."""
    name, version = REQUIREMENTS[peer][0].split("==")
    try:
        return importlib.metadata.version(name) == version
    except importlib.metadata.PackageNotFoundError:
        return False


# --- measurements -----------------------------------------------------------------------------------------------------


def measure(case: Case, methods: Sequence[str], rounds: int, workers: Workers, what: Sequence[str]) -> dict[str, Any]:
    """A case: `{kind: {method: ...}}`, the kinds "peaks" and, of "counts" and "times", what is asked for.

    A method that fails has `{"raised": ...}` in each.
    """
    first = {method: workers.ask(method, do="prepare", case=asdict(case)) for method in methods}
    found = {"peaks": {method: picked(told, "held_bytes", "peak_bytes") for method, told in first.items()}}
    if "counts" in what:
        found["counts"] = counts(case, first, workers)
    if "times" in what:
        found["times"] = times(first, rounds, workers)
    workers.drop()
    return found


def picked(told: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: told[key] for key in (*keys, "raised") if key in told}


def counts(case: Case, first: dict[str, dict[str, Any]], workers: Workers) -> dict[str, Any]:
    """FLOPs, and beside peers errors of everybody's dots."""
    rows = {m: told if "raised" in told else workers.ask(m, do="flops") for m, told in first.items()}
    if any(METHODS[method].peer for method in first):
        told = workers.ask("reference", do="prepare", case=asdict(case))
        if "raised" in told:
            raise RuntimeError(f"the reference of {case.name}: {told['raised']}")
        for method, own in first.items():
            if own.get("numbers"):
                rows[method]["error"] = error(own["numbers"]["dots"], told["numbers"])
    return rows


def error(dots: list[float], reference: dict[str, list[float]]) -> float:
    """The largest |d - d*| / (|g_i| |V|)."""
    return max(abs(d - e) / s for d, e, s in zip(dots, reference["dots"], reference["scales"], strict=True))


def times(first: dict[str, dict[str, Any]], rounds: int, workers: Workers) -> dict[str, Any]:
    """Seconds of a step in each round."""
    calls = {
        method: max(1, math.ceil(SHORTEST_TURN / told["seconds"]))
        for method, told in first.items()
        if "raised" not in told
    }
    taken: dict[str, Any] = {method: {"seconds": []} if method in calls else told for method, told in first.items()}
    names = list(calls)
    for r in range(rounds):
        for method in names[r % len(names) :] + names[: r % len(names)]:
            if "seconds" in taken[method]:
                told = workers.ask(method, do="times", calls=calls[method])
                if "raised" in told:
                    taken[method] = told
                else:
                    taken[method]["seconds"].append(told["seconds"])
    return taken


def memory_limit(case: Case, allowed: int, workers: Workers) -> dict[str, Any]:
    """The same step in the same address space, by each method: its peak, or what it raised."""
    told = {m: workers.ask(m, do="prepare", case=asdict(case), bytes=allowed) for m in LIMITED_METHODS}
    workers.drop()
    methods = {method: picked(row, "peak_bytes", "seconds") for method, row in told.items()}
    return {"case": case.name, "allowed_bytes": allowed, "methods": methods}


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    """The machine, the versions, and the state of the code."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return {**measuring.environment(arguments), "threads": arguments.threads, "commit": git.stdout.strip()}


# --- running ----------------------------------------------------------------------------------------------------------


def store(path: Path, keys: Sequence[str], value: Any) -> None:
    """Put a value into the results, in one step; the rest stays."""
    results = load(path) if path.exists() else {}
    inner = results
    for key in keys[:-1]:
        inner = inner.setdefault(key, {})
    inner[keys[-1]] = value
    measuring.write(path, json.dumps(results, indent=1) + "\n")


def run_part(name: str, part: Part, arguments: argparse.Namespace, workers: Workers) -> None:
    rounds = arguments.rounds or part.rounds
    what = [w for w in ("counts", "times") if getattr(arguments, w)] or ["counts", "times"]
    workers.stop(but={"reference", *(method for _, methods in part.cases for method in methods)})  # they take memory
    for case, methods in part.cases:
        if arguments.case not in case.name:
            continue
        measured = case.tiny() if arguments.tiny else case
        about = {"environment": environment(arguments), "rounds": rounds, "measured": asdict(measured)}
        for kind, rows in measure(measured, methods, rounds, workers, what).items():
            store(arguments.results, (kind, name, case.name), {**about, "methods": rows})
            for method, row in rows.items():
                print(f"{name}; {case.name}: {method}: {said(row)}", flush=True)


def said(row: dict[str, Any]) -> str:
    if "raised" in row:
        return row["raised"]
    if "seconds" in row:
        return " ".join(f"{s:.4g}" for s in row["seconds"]) + " s"
    if "peak_bytes" in row:
        return f"{row['peak_bytes'] / 2**20:.0f} MiB"
    return f"{row['flops'] / 1e9:.4g} GFLOP" + (f", error {row['error']:.1e}" if "error" in row else "")


def run(arguments: argparse.Namespace) -> None:
    """The parts that are asked for."""
    parts = SHORT if arguments.short else PARTS
    names = [*parts, *(SHORT_LIMITED if arguments.short else OTHER_PARTS)]
    chosen = [*(arguments.only or []), *(f"sweep-{of}" for of in arguments.sweep or [])] or names
    with tempfile.TemporaryDirectory() as logs:
        workers = Workers(arguments.threads, arguments.peers_venv, Path(logs))
        try:
            for name in chosen:
                if name in parts:
                    run_part(name, parts[name], arguments, workers)
                elif name == "memory-limit":
                    case = LIMITED.tiny() if arguments.tiny else LIMITED
                    found = memory_limit(case, ALLOWED_BYTES, workers)
                    store(arguments.results, (name,), {"environment": environment(arguments), **found})
                    print(f"{name}: {found}", flush=True)
                else:
                    found = planner_map.measure(tiny=arguments.tiny)
                    store(arguments.results, (name,), {"environment": environment(arguments), **found})
        finally:
            workers.stop()


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*PARTS, *OTHER_PARTS])
    parser.add_argument("--sweep", nargs="+", choices=[p.removeprefix("sweep-") for p in PARTS if "sweep" in p])
    parser.add_argument("--case", default="", help="only the cases whose name has this text")
    parser.add_argument("--rounds", type=int, help="of turns, instead of each part's own number")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--counts", action="store_true", help="FLOPs, errors and peaks alone")
    parser.add_argument("--times", action="store_true", help="times and peaks alone")
    parser.add_argument("--peers-venv", type=Path, help="a folder outside of the repository, made if it is not there")
    parser.add_argument("--short", action="store_true", help=f"a few cases; results into {ELSEWHERE.relative_to(ROOT)}")
    parser.add_argument("--tiny", action="store_true", help="every case in miniature: whether it runs, nothing else")
    parser.add_argument("--results", type=Path, help="the JSON file that gains these results")
    parser.add_argument("--page", action="store_true", help="write the page and its figures, and run nothing")
    arguments = parser.parse_args(given)
    arguments.device = "cpu"
    arguments.results = arguments.results or (ELSEWHERE if arguments.short or arguments.tiny else RESULTS)
    if arguments.tiny and arguments.results == RESULTS:
        parser.error("--tiny does not measure what the committed results are about: give another --results")
    if not arguments.page:
        run(arguments)
        results = load(arguments.results)
        print(claims_table(results, lambda claim: outcome(claim, results).spread is not None))
    if arguments.results == RESULTS:
        from page import write_page

        write_page(load(RESULTS))


if __name__ == "__main__":
    main()
