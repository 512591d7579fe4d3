"""What a call costs beside its arithmetic: Python time and counts on models so narrow that the arithmetic vanishes.

    python benchmarks/overhead.py                   # benchmarks/results/overhead.json, then docs/overhead.md
    python benchmarks/overhead.py --rounds 20       # quicker
    python benchmarks/overhead.py --page            # the table of docs/overhead.md again, from the results

Two train samples and one validation sample of two positions, on one thread. The plain step is forward and backward of
the mean loss of what the call runs: train and validation samples together for dot products, train samples for the
rest. Methods take turns; times are of the process, medians over the rounds, and ratios are to the plain step of the
same round. Counts are exact: calls of Python functions, and operations that reach torch's dispatcher.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from vs_vmap import environment

import ghostfunc as gf

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "overhead.json"
PAGE = ROOT / "docs" / "overhead.md"
PACKAGE = str(Path(gf.__file__).parent)
POSITIONS, VOCABULARY, WIDTH = 2, 16, 8
Step = Callable[[], Any]
Row = dict[str, Any]


class Case(NamedTuple):
    """A model and what it is called on."""

    model_fn: Callable[..., Tensor]
    params: dict[str, Tensor]
    train: Any
    val: Any

    @property
    def both(self) -> Any:
        """Train and validation samples in one batch."""
        if isinstance(self.train, dict):
            return {key: torch.cat([self.train[key], self.val[key]]) for key in self.train}
        return tuple(torch.cat(pair) for pair in zip(self.train, self.val, strict=True))


# --- models -----------------------------------------------------------------------------------------------------------


def gpt2(layers: int, width: int) -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=4, n_positions=POSITIONS, vocab_size=VOCABULARY, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model_fn, params = gf.functionalize(GPT2LMHeadModel(config).eval(), gf.causal_lm_loss)
    train, val = ({"input_ids": torch.randint(VOCABULARY, (n, POSITIONS))} for n in (2, 1))
    return Case(model_fn, params, train, val)


def classifier(module: nn.Module, *shape: int) -> Case:
    model_fn, params = gf.functionalize(module, gf.classification_loss)
    train, val = ((torch.randn(n, *shape), torch.randint(WIDTH, (n,))) for n in (2, 1))
    return Case(model_fn, params, train, val)


def mlp(layers: int) -> Case:
    torch.manual_seed(0)
    hidden = [part for _ in range(layers - 1) for part in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return classifier(nn.Sequential(*hidden, nn.Linear(WIDTH, WIDTH)), WIDTH)


def convolutions() -> Case:
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    for _ in range(4):
        blocks += [nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.GroupNorm(2, WIDTH), nn.ReLU()]
    return classifier(nn.Sequential(*blocks, nn.Flatten(), nn.Linear(WIDTH * 16, WIDTH)), WIDTH, 4, 4)


CASES: dict[str, Callable[[], Case]] = {
    "GPT-2, 4 layers of width 128": lambda: gpt2(4, 128),
    f"GPT-2, 12 layers of width {WIDTH}": lambda: gpt2(12, WIDTH),
    f"MLP, 4 layers of width {WIDTH}": lambda: mlp(4),
    f"4 convolutions of {WIDTH} channels": convolutions,
}


# --- what is called ---------------------------------------------------------------------------------------------------


def plain_step(case: Case, batch: Any) -> tuple[Tensor | None, ...]:
    leaves = {name: p.detach().requires_grad_() for name, p in case.params.items()}
    return torch.autograd.grad(case.model_fn(leaves, batch).mean(), list(leaves.values()), allow_unused=True)


def steps(case: Case) -> dict[str, Step]:
    model_fn, params, train, val = case
    return {
        "plain, train and val": partial(plain_step, case, case.both),
        "plain, train": partial(plain_step, case, train),
        "value_and_grad_dot": lambda: gf.value_and_grad_dot(model_fn, params, train, val),
        "ghost_grad_along": lambda: gf.ghost_grad_along(model_fn, params, train, params),
        "ghost_quantities(Norm)": lambda: gf.ghost_quantities(model_fn, params, train, want={"norm": gf.Norm()}),
        "ghost_clipped_grad": lambda: gf.ghost_clipped_grad(model_fn, params, train, 1.0),
    }


def beside(name: str) -> str:
    """The plain step that a call is compared with."""
    return "plain, train and val" if name == "value_and_grad_dot" else "plain, train"


# --- counts -----------------------------------------------------------------------------------------------------------


class _Operations(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class _Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def model_operations(case: Case) -> int:
    """How many operations and reads of a tensor's attributes the model's forward is written in."""
    leaves = {name: p.detach().requires_grad_() for name, p in case.params.items()}
    with _Operations() as mode:
        case.model_fn(leaves, case.train)
    return mode.count


def dispatched(step: Step) -> int:
    """How many operations of a step reach torch's dispatcher."""
    with _Dispatched() as mode:
        step()
    return mode.count


def python_calls(step: Step, within: str = "") -> int:
    """How many times a step calls a function written in Python, of the files below a path."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        if event == "call" and frame.f_code.co_filename.startswith(within):
            count += 1

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        step()
    finally:
        sys.setprofile(before)
    return count


# --- measuring --------------------------------------------------------------------------------------------------------


def timed(step: Step) -> float:
    start = time.process_time()
    result = step()
    elapsed = time.process_time() - start
    del result
    return elapsed


def measured(case: Case, rounds: int) -> Row:
    methods = steps(case)
    for step in methods.values():
        for _ in range(3):
            step()
    taken: dict[str, list[float]] = {name: [] for name in methods}
    for r in range(rounds):
        names = list(methods)
        for name in names[r % len(names) :] + names[: r % len(names)]:
            taken[name].append(timed(methods[name]))
    operations = model_operations(case)
    rows: Row = {}
    for name, step in methods.items():
        plain = taken[beside(name) if not name.startswith("plain") else name]
        seconds = statistics.median(taken[name])
        rows[name] = {
            "median_seconds": seconds,
            "median_ratio": statistics.median(t / p for t, p in zip(taken[name], plain, strict=True)),
            "extra_microseconds_per_operation": 1e6 * (seconds - statistics.median(plain)) / operations,
            "python_calls": python_calls(step),
            "python_calls_in_ghostfunc": python_calls(step, PACKAGE),
            "dispatched": dispatched(step),
        }
    return {"operations": operations, "parameters": len(case.params), "methods": rows}


# --- the page ---------------------------------------------------------------------------------------------------------


def table(results: Row) -> str:
    lines = [
        "| model, operations | call | ms | plain, ms | ratio | beside it, per operation | Python calls | dispatched |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model, case in results["cases"].items():
        for name, row in case["methods"].items():
            if name.startswith("plain"):
                continue
            plain = case["methods"][beside(name)]
            cells = [f"{model}, {case['operations']}", f"`{name}`", f"{1e3 * row['median_seconds']:.1f}"]
            cells += [f"{1e3 * plain['median_seconds']:.1f}", f"{row['median_ratio']:.2f}"]
            cells.append(f"{row['extra_microseconds_per_operation']:.0f} µs")
            cells.append(f"{row['python_calls']} ({plain['python_calls']})")
            cells.append(f"{row['dispatched']} ({plain['dispatched']})")
            lines.append(f"| {' | '.join(cells)} |")
    told = results["environment"]
    where = f"{told['cpu']}, torch {told['torch']}, Python {told['python']}, {results['rounds']} rounds"
    return "\n".join([*lines, "", f"{where}. In brackets: the plain step's."])


def page(text: str, results: Row) -> str:
    """The page with the table of these results."""
    before, begin, rest = text.partition("<!-- overhead: benchmarks/overhead.py --page -->\n")
    _, end, after = rest.partition("\n<!-- end of overhead -->")
    if not begin or not end:
        raise ValueError(f"{PAGE.name} has no place for the table of overheads.")
    return before + begin + table(results) + end + after


# --- running ----------------------------------------------------------------------------------------------------------


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="write the page from the results, and run nothing")
    arguments = parser.parse_args(given)
    if not arguments.page:
        torch.set_num_threads(1)
        around = environment(argparse.Namespace(device="cpu"))
        results = {"environment": around, "rounds": arguments.rounds, "cases": {}}
        for name, make in CASES.items():
            results["cases"][name] = measured(make(), arguments.rounds)
        arguments.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    results = json.loads(arguments.results.read_text(encoding="utf-8"))
    print(table(results))
    if arguments.results == RESULTS:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
