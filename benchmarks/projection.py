"""Tokens per second and peak memory of projecting per-sample gradients of GPT-2 small, by ghostfunc and by others.

    python benchmarks/projection.py --peers-venv ~/peers    # results/projection.json, then docs/projection_speed.md
    python benchmarks/projection.py --quick                 # a tiny model, own ways alone, nothing written: seconds
    python benchmarks/projection.py --page                  # docs/projection_speed.md again, from the results

Every way has a process of its own (`projection_methods.py`) and, told to by a pipe, takes its turn in each round: a
figure is the median over the rounds of the ratio to the plain step of the same round. Memory is by how many bytes the
first call raises the peak of its process. Peers are installed into the folder `--peers-venv`, made if it is not there,
beside the packages of this interpreter, which stay as they are; one that fails has its reason in the results.

Rows are checked too: inner products of the rows of a way against those of explicit gradients of the parameters that it
says it covers, and for ghostfunc the rows themselves against explicit gradients, explicitly projected.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import projection_methods as ways
import torch
import vs_vmap
import workers
from peers import REQUIREMENTS, installed, make_venv
from torch import Tensor

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "projection.json"
PAGE = ROOT / "docs" / "projection_speed.md"
MAIN_REQUIREMENTS = [lines[0] for lines in REQUIREMENTS.values()]
APART = ("trak",)  # takes memory and a minute for a step: one round, beside the plain step alone


# --- workers ----------------------------------------------------------------------------------------------------------


class Worker(workers.Worker):
    """A process that runs one way.

    Attributes:
        told: what it said about its first call.
    """

    def __init__(self, python: Path, name: str, size: str, threads: int, folder: Path) -> None:
        script = str(Path(ways.__file__))
        command = [str(python), script, name, "--size", size, "--threads", str(threads), "--folder", str(folder)]
        super().__init__(name, command, folder / f"{name}.log")
        self.told = self.answer()

    def seconds(self) -> float:
        """Of one more step."""
        return self.ask("step")["seconds"]


class Runs:
    """What workers did.

    Attributes:
        told: of each way that ran, what its worker said about its first call.
        seconds: of each way that ran, its steps; those of the plain step are in the order of the others' rounds.
        ratios: of each way that ran, its steps' times over that of the plain step of the same round.
        missing: why the others did not run.
    """

    def __init__(self, python: Path, size: str, threads: int, folder: Path) -> None:
        self.told: dict[str, dict[str, Any]] = {}
        self.seconds: dict[str, list[float]] = {}
        self.ratios: dict[str, list[float]] = {}
        self.missing: dict[str, str] = {}
        self._python, self._size, self._threads, self._folder = python, size, threads, folder

    def take_turns(self, names: Sequence[str], rounds: int) -> None:
        """Start workers for some ways, the plain step among them; let them take turns; end them."""
        running = [worker for name in names if (worker := self._start(name)) is not None]
        for _ in range(rounds):
            taken: dict[str, float] = {}
            for worker in running:
                try:
                    taken[worker.name] = worker.seconds()
                except RuntimeError as error:
                    self._failed(worker.name, error)
            running = [worker for worker in running if worker.name in taken]
            running = running[1:] + running[:1]  # each is the first once
            for name, seconds in taken.items():
                self.seconds.setdefault(name, []).append(seconds)
                self.ratios.setdefault(name, []).append(seconds / taken["plain"])
        for worker in running:
            worker.stop()

    def _start(self, name: str) -> Worker | None:
        try:
            python = Path(sys.executable) if name in ways.OWN else self._python
            if name in ways.PEERS and (reason := installed(python, name)):
                raise RuntimeError(reason)
            worker = Worker(python, name, self._size, self._threads, self._folder)
        except RuntimeError as error:
            return self._failed(name, error)
        self.told[name] = worker.told
        return worker

    def _failed(self, name: str, error: RuntimeError) -> None:
        """A peer that fails is left out, own ways must not."""
        if name in ways.OWN:
            raise error
        for of_ways in (self.told, self.seconds, self.ratios):
            of_ways.pop(name, None)
        self.missing[name] = str(error)


# --- what the rows are worth ------------------------------------------------------------------------------------------


class Explicit:
    """Gradients of every sample by a backward pass each.

    Attributes:
        grams: of every parameter of the layers: the inner products `[B, B]`.
        rows: ghostfunc's projection `[B, k]` of the explicit gradients.
    """

    def __init__(self, size: str) -> None:
        work = ways.build(size)
        _, _, projection = ways.own_projection(work)
        of_layers = tuple(f"{layer}." for layer in work.layers)
        params = {name: p for name, p in work.module.named_parameters() if name.startswith(of_layers)}
        found: dict[str, list[Tensor]] = {name: [] for name in params}
        for ids in work.ids.split(1):
            grads = torch.autograd.grad(ways.losses_of(work.module, ids).sum(), list(params.values()))
            for name, grad in zip(params, grads, strict=True):
                found[name].append(grad)
        flat = {name: torch.stack(grads).flatten(1) for name, grads in found.items()}
        self.grams = {name: rows @ rows.t() for name, rows in flat.items()}
        columns = []
        for name in projection.slices:
            p_in, p_out = projection.matrices(name)
            columns.append((p_in.t() @ torch.stack(found[name]) @ p_out).flatten(1))  # Conv1D: [d_in, d_out] as it is
        self.rows = torch.cat(columns, 1)

    def fidelity(self, rows: Tensor, covers: list[str]) -> dict[str, float]:
        """How rows `[B, k]` keep the inner products of gradients of the parameters that they cover.

        Returns:
            scale: that of the rows' inner products against the gradients', by least squares.
            pearson: of inner products of two different samples.
            error: the largest |<p_i, p_j> / scale - <g_i, g_j>| / (|g_i| |g_j|).
        """
        exact = torch.stack([self.grams[name] for name in covers]).sum(0)
        found = rows @ rows.t()
        scale = (found * exact).sum() / exact.square().sum()
        norms = exact.diagonal().sqrt()
        pairs = torch.triu_indices(len(rows), len(rows), 1).unbind()
        return {
            "scale": scale.item(),
            "pearson": torch.corrcoef(torch.stack([found[pairs], exact[pairs]]))[0, 1].item(),
            "error": ((found / scale - exact).abs() / torch.outer(norms, norms)).max().item(),
        }

    def difference(self, rows: Tensor) -> float:
        """|rows - explicitly projected gradients|, of the largest of these."""
        return ((rows - self.rows).abs().max() / self.rows.abs().max()).item()


# --- measurements -----------------------------------------------------------------------------------------------------


def measure(arguments: Any) -> dict[str, Any]:
    """Every way, at one size."""
    folder = arguments.peers_venv
    python, peers = (make_venv(folder.absolute()), arguments.peers) if folder else (Path(sys.executable), [])
    asked = [*ways.OWN, *peers]
    started = vs_vmap.environment(arguments)
    explicit = Explicit(arguments.size)
    gc.collect()  # its model, which has cycles
    work = ways.SIZES[arguments.size]
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(python, arguments.size, arguments.threads, Path(folder))
        runs.take_turns([name for name in asked if name not in APART], arguments.rounds)
        for name in APART:
            if name in asked:
                runs.take_turns(["plain", name], 1)
        rows = {name: row_of(name, runs, work, explicit, Path(folder)) for name in runs.told}
    plain = rows["plain"]["flops_of_one_sample"]
    for row in rows.values():
        row["flops_ratio"] = row["flops_of_one_sample"] / plain
    started["load_average_after"] = vs_vmap.environment(arguments)["load_average_before"]
    return {
        "size": arguments.size,
        **work,
        "layers_projected": ways.LAYERS,
        "rank": ways.RANK,
        "requirements": [line for peer in rows if peer in REQUIREMENTS for line in REQUIREMENTS[peer]],
        "environment": started,
        "rounds": arguments.rounds,
        "ways": {name: rows.get(name, {"missing": runs.missing.get(name, "not asked for")}) for name in ways.WAYS},
    }


def row_of(name: str, runs: Runs, work: dict[str, int], explicit: Explicit, folder: Path) -> dict[str, Any]:
    """What is known of a way."""
    seconds, told = runs.seconds[name], runs.told[name]
    row = {
        "median_seconds": statistics.median(seconds),
        "tokens_per_second": work["samples"] * work["positions"] / statistics.median(seconds),
        "median_ratio": statistics.median(runs.ratios[name]),
        "ratios": runs.ratios[name],
        "held_bytes": told["held_bytes"],
        "peak_bytes": told["peak_bytes"],
        "flops_of_one_sample": told["flops_of_one_sample"],
        **told["notes"],
    }
    if told["shape"] is None:
        return row
    rows = torch.from_numpy(np.load(folder / f"{name}.npy", allow_pickle=False))
    row |= {"dim": rows.shape[1], "covers": len(told["covers"]), **explicit.fidelity(rows, told["covers"])}
    if name in ways.OWN:
        row["difference"] = explicit.difference(rows)
    return row


def print_table(result: dict[str, Any]) -> None:
    print(f"{'':10}{'seconds':>9}{'x plain':>9}{'FLOPs':>8}{'tokens/s':>10}{'peak MB':>9}{'numbers':>9}{'error':>8}")
    for name, row in result["ways"].items():
        if "missing" in row:
            print(f"{name:10}  {row['missing']}")
            continue
        kept = f"{row['dim']:9}{row['error']:8.3f}" if "dim" in row else ""
        times = f"{row['median_seconds']:9.3f}{row['median_ratio']:9.2f}{row['flops_ratio']:8.3f}"
        print(f"{name:10}{times}{row['tokens_per_second']:10.0f}{row['peak_bytes'] / 1e6:9.0f}{kept}")


# --- the page ---------------------------------------------------------------------------------------------------------

LABELS = {
    "plain": "a plain training step",
    "floor": "forward and gradients of activations: the floor",
    "ghostfunc": "**`ghost_grad_proj`**",
    "hooks": "a full backward, projected in hooks (GhostSuite's way)",
    "bergson": "Bergson",
    "dattri": "dattri, LoGra",
    "trak": "TRAK",
}


def table(result: dict[str, Any]) -> str:
    """One line for each way, and one for each that could not run."""
    lines = [
        "| | tokens/s | time | FLOPs | memory of a step | numbers | error | parameters |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["ways"].items():
        if "missing" in row:
            lines.append(f"| {LABELS[name]} | did not run: {row['missing']} | | | | | | |")
            continue
        cells = [f"{row['tokens_per_second']:.0f}", f"{row['median_ratio']:.2f}", f"{row['flops_ratio']:.3f}"]
        cells.append(f"{row['peak_bytes'] / 2**20:.0f} MiB")
        kept = [f"{row['dim']}", f"{row['error']:.3f}", f"{row['covers']}"] if "dim" in row else [""] * 3
        lines.append(f"| {LABELS[name]} | {' | '.join(cells + kept)} |")
    return "\n".join(lines)


def caption(result: dict[str, Any]) -> str:
    """What was measured, on what."""
    environment = result["environment"]
    threads = environment["threads"]
    load = max(environment[f"load_average_{when}"] for when in ("before", "after"))
    return (
        f"GPT-2 {result['layers']} x {result['width']} with random weights, vocabulary {result['vocabulary']}, "
        f"B={result['samples']}, T={result['positions']}, the weights of attention and MLP, rank {result['rank']}. "
        f"torch {environment['torch']}, {environment['dtype']}, {environment['cpu']}, {threads} "
        f"thread{'s' * (threads > 1)}, {environment['cores']} cores with a load average of up to {load:.1f}. Medians "
        f"of {result['rounds']} interleaved rounds (TRAK: one, afterwards). "
        f"Peers: {', '.join(line for line in result['requirements'] if line in MAIN_REQUIREMENTS)}. Raw numbers: "
        "[benchmarks/results/projection.json](../benchmarks/results/projection.json)."
    )


def page(text: str, result: dict[str, Any]) -> str:
    """The page with the results' table between its marks."""
    before, begin, rest = text.partition("<!-- speed: benchmarks/projection.py --page -->\n")
    _, end, after = rest.partition("\n<!-- end of speed -->")
    return f"{before}{begin}{caption(result)}\n\n{table(result)}{end}{after}"


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peers-venv", type=Path, help="a folder outside of the repository, made if it is not there")
    parser.add_argument("--peers", nargs="+", choices=ways.PEERS, default=list(ways.PEERS), help="of these, with it")
    parser.add_argument("--quick", action="store_true", help="a tiny model; writes only to --results")
    parser.add_argument("--results", type=Path, help="the JSON file to write")
    parser.add_argument("--page", action="store_true", help="write the page, and run nothing")
    arguments = parser.parse_args(given)
    arguments.size, arguments.device = "tiny" if arguments.quick else "gpt2-small", "cpu"
    torch.set_num_threads(arguments.threads)
    results = arguments.results or (None if arguments.quick else RESULTS)
    if not arguments.page:
        result = measure(arguments)
        print_table(result)
        if results is not None:
            results.parent.mkdir(parents=True, exist_ok=True)
            results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if results == RESULTS:
        result = json.loads(RESULTS.read_text(encoding="utf-8"))
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), result), encoding="utf-8")


if __name__ == "__main__":
    main()
