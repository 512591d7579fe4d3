"""What each quantity costs beside a plain training step: FLOPs, time and memory.

    python benchmarks/quantities.py                     # benchmarks/results/quantities.json, then docs/quantities.md
    python benchmarks/quantities.py --size mlp          # one size; the others keep their results
    python benchmarks/quantities.py --page              # the tables of docs/quantities.md again, from the results

The plain step is forward and backward of the mean training loss on the train samples alone. FLOPs are those of
`torch.utils.flop_counter`, matrix products and convolutions, with attention as plain products everywhere (the counter
does not see the fused kernel of a CPU). Times and memory are taken as in `vs_vmap.py`: all quantities take turns in one
process, and a figure is the median over the rounds of the ratio to the plain step of the same round; memory is that of
one call in a process of its own.
"""

import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import vs_vmap
from torch import Tensor
from vs_vmap import Workload, flops, plain_gradient

import ghostfunc as gf

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quantities.json"
ADAM_RESULTS = ROOT / "benchmarks" / "results" / "adam_leave_one_out.json"
PAGE = ROOT / "docs" / "quantities.md"
LEARNING_RATE = 1e-3
Step = Callable[[], Any]

LANGUAGE_MODEL = {"layers": 4, "heads": 4, "width": 128, "vocabulary": 4096, "tied": True}
SIZES: dict[str, Callable[[torch.device], Workload]] = {
    "mlp": vs_vmap.mlp,
    "short": partial(vs_vmap.gpt2, positions=64, samples=(8, 2), **LANGUAGE_MODEL),
    "long": partial(vs_vmap.gpt2, positions=256, samples=(4, 1), **LANGUAGE_MODEL),
}


class Quantity(NamedTuple):
    """A quantity and how it is asked for.

    Attributes:
        label: its name on the page.
        prepare: what is done once, before the calls that are counted: it gives the call.
        gradient: whether the call also gives the mean training gradient.
        tokens: whether it needs a language model.
    """

    label: str
    prepare: Callable[[Workload], Step]
    gradient: bool = True
    tokens: bool = False


# --- quantities -------------------------------------------------------------------------------------------------------


def dots(work: Workload, **options: Any) -> Step:
    return lambda: gf.value_and_grad_dot(work.model_fn, work.params, work.train, work.val, **options)


def by_head(work: Workload) -> Step:
    heads = gf.attention_heads(work.module)
    return dots(work, out="train head", heads=heads, layers=heads)


def under_adam(work: Workload, *, exact: bool) -> Step:
    """Two steps are taken first, so that Adam has its moments."""
    optimizer = torch.optim.Adam(work.module.parameters(), lr=LEARNING_RATE)
    for _ in range(2):
        gradient = plain_gradient(work, work.train)
        for name, p in work.module.named_parameters():
            p.grad = gradient[name]
        optimizer.step()
        optimizer.zero_grad()
    return dots(work, precondition=gf.adam(optimizer, work.module, exact=exact))


def under_ekfac(work: Workload) -> Step:
    return dots(work, precondition=gf.ekfac(work.model_fn, work.params, [work.train], max_side=1024))


def along(work: Workload) -> Step:
    direction = plain_gradient(work, work.val)
    return lambda: gf.ghost_grad_along(work.model_fn, work.params, work.train, direction)


def norms(work: Workload, **options: Any) -> Step:
    return lambda: gf.ghost_grad_norm(work.model_fn, work.params, work.train, **options)


def gram(work: Workload) -> Step:
    return lambda: gf.ghost_grad_gram(work.model_fn, work.params, work.train)


def clipped(work: Workload) -> Step:
    return lambda: gf.ghost_clipped_grad(work.model_fn, work.params, work.train, max_norm=1.0)


def second_moments(work: Workload) -> Step:
    def of_tile(tile: gf.Tile) -> Tensor:
        return tile.grads.square().mean(0)

    return lambda: gf.ghost_grad_stream(work.model_fn, work.params, work.train, of_tile, out="entry")


def projection(work: Workload) -> Step:
    projected = gf.kronecker_projection(work.model_fn, work.params, work.train, rank=256)
    return lambda: gf.ghost_grad_proj(work.model_fn, work.params, work.train, projected)


def many(work: Workload) -> Step:
    want = {"dots": gf.Dot(), "matrix": gf.Dot("train val"), "gram": gf.Gram(), "norms": gf.Norm()}
    return lambda: gf.ghost_quantities(work.model_fn, work.params, work.train, work.val, want=want)


def values(work: Workload) -> Step:
    return lambda: gf.in_run_values(work.model_fn, work.params, work.train, work.val, lr=LEARNING_RATE, order=2)


def two_checkpoints(work: Workload) -> Step:
    points = [dict(work.params), {name: 1.01 * p for name, p in work.params.items()}]
    return lambda: gf.tracin(work.model_fn, points, work.train, work.val)


def plain(work: Workload) -> Step:
    return lambda: plain_gradient(work, work.train)


QUANTITIES = {
    "plain": Quantity("a plain step", plain),
    "dots": Quantity("dots", dots),
    "matrix": Quantity('dots, `"train val"`', partial(dots, out="train val")),
    "param": Quantity('dots, `"param train"`', partial(dots, out="param train")),
    "token": Quantity('dots, `"train token"`', partial(dots, out="train token"), tokens=True),
    "head": Quantity('dots, `"train head"`, attention weights', by_head, tokens=True),
    "adam": Quantity("dots under `adam`", partial(under_adam, exact=False)),
    "adam exact": Quantity("dots under `adam(exact=True)`", partial(under_adam, exact=True)),
    "ekfac": Quantity("dots under `ekfac`, which exists already", under_ekfac),
    "values": Quantity("`in_run_values`, order 2", values),
    "many": Quantity("dots, matrix, Gram matrix and norms together", many),
    "clipped": Quantity("`ghost_clipped_grad`", clipped, gradient=False),
    "along": Quantity("`ghost_grad_along` a direction that exists", along, gradient=False),
    "norms": Quantity("`ghost_grad_norm`", norms, gradient=False),
    "token norms": Quantity('`ghost_grad_norm`, `"token"`', partial(norms, out="token"), gradient=False, tokens=True),
    "gram": Quantity("`ghost_grad_gram`", gram, gradient=False),
    "stream": Quantity("`ghost_grad_stream`: second moments", second_moments, gradient=False),
    "projection": Quantity("`ghost_grad_proj`, rank 256", projection, gradient=False),
    "tracin": Quantity("`tracin`, 2 checkpoints", two_checkpoints, gradient=False),
}
WITH_PEAK = ("plain", "dots", "matrix", "token", "values", "many", "clipped", "norms", "gram", "stream", "projection")
PEAK_SIZE = "long"


# --- measurements -----------------------------------------------------------------------------------------------------


def of_size(work: Workload) -> dict[str, Quantity]:
    return {name: quantity for name, quantity in QUANTITIES.items() if "T" in work.description or not quantity.tokens}


def build(size: str, device: torch.device) -> Workload:
    torch.manual_seed(0)
    return SIZES[size](device)


def measure(size: str, arguments: Any) -> dict[str, Any]:
    device = torch.device(arguments.device)
    started = vs_vmap.environment(arguments)
    peaks = {name: vs_vmap.peak(__file__, size, name, arguments) for name in WITH_PEAK if size == PEAK_SIZE}
    work = build(size, device)
    steps = {name: quantity.prepare(work) for name, quantity in of_size(work).items()}
    counted = {name: flops(step) for name, step in steps.items()}
    methods = {name: lambda _, step=step: step() for name, step in steps.items()}
    taken = vs_vmap.times(work, methods, arguments.rounds, device)
    rows = {
        name: {
            "flops": counted[name],
            "flops_ratio": counted[name] / counted["plain"],
            **taken[name],
            "peak_bytes": peaks.get(name),
        }
        for name in steps
    }
    command = f"python benchmarks/quantities.py --size {size}"
    command += "".join(f" --{name} {getattr(arguments, name)}" for name in ("rounds", "threads", "device"))
    about = {**work.description, "command": command, "environment": started, "rounds": arguments.rounds}
    return {**about, "quantities": rows}


# --- the page ---------------------------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    """FLOPs and times as ratios to the plain step, and memory."""
    sizes = {size: results[size] for size in SIZES}
    heads = ["MLP", *(f"T={sizes[size]['T']}" for size in ("short", "long"))]
    columns = [f"{what}, {head}" for what in ("FLOPs", "time") for head in heads]
    lines = [f"| | gradient too | {' | '.join(columns)} | memory, {heads[-1]} |", "|---" * (len(columns) + 3) + "|"]
    for name, quantity in QUANTITIES.items():
        rows = [result["quantities"].get(name) for result in sizes.values()]
        cells = [_ratio(row, key) for key in ("flops_ratio", "median_ratio") for row in rows]
        peak = sizes[PEAK_SIZE]["quantities"][name]["peak_bytes"]
        memory = "" if peak is None else f"{peak / 2**20:.0f} MiB"
        lines.append(f"| {quantity.label} | {'yes' if quantity.gradient else ''} | {' | '.join(cells)} | {memory} |")
    return "\n".join(lines)


def _ratio(row: dict[str, Any] | None, key: str) -> str:
    return "" if row is None else f"{row[key]:.2f}"


def caption(results: dict[str, Any]) -> str:
    """What was measured, on what."""
    models = [results[size] for size in SIZES]
    first, environment = models[0], models[0]["environment"]
    threads = environment["threads"]
    load = max(model["environment"]["load_average_before"] for model in models)
    batches = [", ".join(f"{key}={model[key]}" for key in ("B", "Bv", "T") if key in model) for model in models]
    return (
        f"{first['model']} with {batches[0]}; {models[1]['model']} with {batches[1]}, and with {batches[2]}. torch "
        f"{environment['torch']}, {environment['dtype']}, {environment['device']}, {threads} "
        f"thread{'s' * (threads > 1)}; {environment['cores']} cores with a load average of up to {load:.0f}. Medians "
        f"of {first['rounds']} interleaved rounds. Raw numbers: "
        "[benchmarks/results/quantities.json](../benchmarks/results/quantities.json)."
    )


METRICS = {
    "plain dots": "plain, first",
    "`adam(optimizer, model)`": "diagonal, first",
    "`adam(..., exact=True)`": "derivative, first",
    "`in_run_values`, order 2, `exact=True`": "derivative, second",
}


def agreement(adam: dict[str, Any]) -> str:
    """How well dots under each metric foretell what leaving a sample out of AdamW's step changes."""
    stretches = adam["stretches"]
    heads = [stretch["what"] for stretch in stretches]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for label, method in METRICS.items():
        of_steps = [[found["pearson"] for found in stretch["by_step"][method]] for stretch in stretches]
        cells = [f"{statistics.median(found):.2f} ({min(found):.2f})" for found in of_steps]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with the tables of the results between their marks."""
    results, adam = (json.loads(path.read_text(encoding="utf-8")) for path in (RESULTS, ADAM_RESULTS))
    for name, block in (("costs", f"{caption(results)}\n\n{table(results)}"), ("agreement", agreement(adam))):
        before, begin, rest = text.partition(f"<!-- {name}: benchmarks/quantities.py --page -->\n")
        _, end, after = rest.partition(f"\n<!-- end of {name} -->")
        text = before + begin + block + end + after
    return text


def main() -> None:
    parser = vs_vmap.arguments_of(__doc__, SIZES, list(SIZES), QUANTITIES, RESULTS)
    parser.add_argument("--page", action="store_true", help="write the tables of docs/quantities.md, and run nothing")
    parser.set_defaults(threads=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak_of:
        device = torch.device(arguments.device)
        work = build(arguments.size[0], device)
        step = QUANTITIES[arguments.peak_of].prepare(work)
        vs_vmap.print_peak(work, lambda _: step(), device)
        return
    if not arguments.page:
        for size in arguments.size:
            result = measure(size, arguments)
            vs_vmap.save(arguments.results, {size: result})
            for name, row in result["quantities"].items():
                print(f"{size:6} {name:12}{row['flops_ratio']:8.2f}{row['median_ratio']:8.2f}", flush=True)
    if arguments.results == RESULTS:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
