"""What takes the time of dots with gradients: a weight's tile stream, beside the product of a plain step.

    python benchmarks/tile_stream.py             # benchmarks/results/tile_stream.json, then docs/overhead.md
    python benchmarks/tile_stream.py --page      # the table of docs/overhead.md again, from the results

For each weight of GPT-2 small a plain step makes one product, of all train and validation rows. The stream makes the
products of the validation rows and of each train sample apart, in tiles; passes over every tile for the dot products;
and over every tile for the sum. Each part runs here alone, over the planner's tiles, and all of it as a transform runs
it (`contract_outer`). Methods take turns; a figure is the median over the rounds of the ratio to the plain product of
the same round.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import measuring
import torch
from torch import Tensor

from ghostfunc._contract import contract_outer, shape_of
from ghostfunc._directions import FromRows
from ghostfunc._factors import Outer
from ghostfunc._planner import best_order
from ghostfunc._stream import add_up, long_products, per_sample

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "tile_stream.json"
PAGE = ROOT / "docs" / "overhead.md"
WEIGHTS = {
    "attention, in": (768, 2304),
    "attention, out": (768, 768),
    "MLP, in": (768, 3072),
    "MLP, out": (3072, 768),
    "head": (50257, 768),
}
SIZES = {"B=4, Bv=1, T=256": (4, 1, 256), "B=2, Bv=1, T=1024": (2, 1, 1024)}


class Work(NamedTuple):
    """The rows of one weight, and the tiles that the planner has chosen: `samples` of `rows` of it at a time."""

    left: Tensor
    right: Tensor
    train: Outer
    directions: FromRows
    samples: int
    rows: int
    buffer: Tensor
    grad: Tensor

    def tiles(self, each: Callable[[slice, slice], Any]) -> None:
        """Call with the rows of the weight and the samples of every tile."""
        for start in range(0, len(self.grad), self.rows):
            for first in range(0, len(self.train.right), self.samples):
                rows = slice(start, min(start + self.rows, len(self.grad)))
                each(rows, slice(first, first + self.samples))

    def tile(self, rows: slice, samples: slice) -> Tensor:
        """The place of a tile, with whatever is there."""
        n = len(self.train.right[samples])
        return self.buffer[: n * (rows.stop - rows.start) * self.grad.shape[1]].view(n, -1, self.grad.shape[1])


def work_of(weight: tuple[int, int], size: tuple[int, int, int]) -> Work:
    (p, q), (n, m, positions) = weight, size
    left, right = torch.randn(n + m, positions, p), torch.randn(n + m, positions, q)
    train = Outer(left[:n], right[:n], transposed=True)
    directions = FromRows(Outer(left[n:], right[n:], transposed=True), each=False)
    order = best_order(shape_of(train, directions, want_grad=True), None)
    buffer = torch.zeros(order.samples * order.rows * q)
    return Work(left, right, train, directions, order.samples, order.rows, buffer, torch.zeros(p, q))


def plain(work: Work) -> Tensor:
    return work.left.flatten(0, 1).t() @ work.right.flatten(0, 1)


def direction(work: Work) -> None:
    for start in range(0, len(work.grad), work.rows):
        work.directions.tile(start, min(start + work.rows, len(work.grad)))


def products(work: Work) -> None:
    def each(rows: slice, samples: slice) -> None:
        per_sample(work.train.left_rows(rows.start, rows.stop)[samples], work.train.right[samples], work.buffer)

    work.tiles(each)


def dots(work: Work) -> None:
    def each(rows: slice, samples: slice) -> None:
        long_products(work.tile(rows, samples).flatten(1), work.grad[rows].view(1, -1))

    work.tiles(each)


def sums(work: Work) -> None:
    def each(rows: slice, samples: slice) -> None:
        add_up(work.tile(rows, samples), work.grad[rows], fresh=samples.start == 0)

    work.tiles(each)


def stream(work: Work) -> Any:
    return contract_outer(work.train, work.directions, want_grad=True)


METHODS: dict[str, Callable[[Work], Any]] = {
    "plain": plain,
    "val product": direction,
    "train products": products,
    "passes for dots": dots,
    "passes for the sum": sums,
    "stream": stream,
}


def measured(size: str, arguments: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"environment": measuring.environment(arguments), "rounds": arguments.rounds, "weights": {}}
    for name, weight in WEIGHTS.items():
        work = work_of(weight, SIZES[size])
        taken = measuring.times(work, METHODS, arguments.rounds, torch.device(arguments.device))
        tile = [work.samples, work.rows, weight[1]]
        found["weights"][name] = {"shape": weight, "tile": tile, "methods": taken}
    return found


def figures(results: dict[str, Any]) -> str:
    parts = [name for name in METHODS if name != "plain"]
    lines = [f"| batch | weight | tile | plain product, ms | {' | '.join(parts)} |", "|---" * (4 + len(parts)) + "|"]
    for size, of_size in results.items():
        for name, row in of_size["weights"].items():
            taken = row["methods"]
            ratios = [f"{taken[part]['median_ratio']:.2f}" for part in parts]
            milliseconds = f"{1e3 * taken['plain']['median_seconds']:.1f}"
            cells = [size, f"{name} {row['shape']}", " x ".join(map(str, row["tile"])), milliseconds, *ratios]
            lines.append(f"| {' | '.join(cells)} |")
    first = next(iter(results.values()))
    told = first["environment"]
    where = f"{told['cpu']}, {told['threads']} threads, torch {told['torch']}, {told['dtype']}"
    load = max(of_size["environment"]["load_average_before"] for of_size in results.values())
    return "\n".join([*lines, "", f"{where}; medians of {first['rounds']} rounds; load average up to {load:.1f}."])


page = partial(measuring.with_figures, script="tile_stream.py")


def main() -> None:
    parser = measuring.arguments_of(__doc__, SIZES, list(SIZES), METHODS, RESULTS)
    parser.add_argument("--page", action="store_true", help="write the page from the results, and run nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for size in [] if arguments.page else arguments.size:
        measuring.save(arguments.results, {size: measured(size, arguments)})
    found = figures(json.loads(arguments.results.read_text(encoding="utf-8")))
    print(found)
    if arguments.results == RESULTS:
        measuring.write(PAGE, page(PAGE.read_text(encoding="utf-8"), figures=found))


if __name__ == "__main__":
    main()
