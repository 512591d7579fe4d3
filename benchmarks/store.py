"""How fast a store is read: stored megabytes a second of processor time, with and without checksums, all and a slice.

    python benchmarks/store.py

The store is in the page cache. Each figure is the best of several passes that take turns, on one thread.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow
import torch

from ghostfunc.index import Store, StoreWriter

RESULTS = Path(__file__).parent / "results" / "store.json"
DTYPES = ("float32", "bfloat16", "int8")
HEADER = [
    "| `dtype` | with checksums | `check=False` | `check=False`, one slice of {slices} (MB of the whole rows) |",
    "|---|---|---|---|",
]


def build(folder: Path, arguments: argparse.Namespace, dtype: str) -> None:
    """Write the store."""
    width = arguments.dim // arguments.slices
    slices = {f"layer {i}": slice(i * width, (i + 1) * width) for i in range(arguments.slices)}
    writer = StoreWriter(folder, dim=arguments.dim, dtype=dtype, slices=slices)
    source = writer.source("synthetic", fingerprint="synthetic", rows=arguments.rows, shard_rows=1024)
    for shard in source.missing():
        rows = torch.randn(shard.stop - shard.start, arguments.dim)
        source.write(shard, rows, pyarrow.table({"sample_id": range(shard.start, shard.stop)}))


def seconds(folder: Path, *, check: bool, one_slice: bool) -> float:
    """Processor time of one pass."""
    store = Store(folder)
    columns = next(iter(store.slices.values())) if one_slice else None
    begin = time.process_time()
    for _ in store.stream(columns=columns, check=check):
        pass
    return time.process_time() - begin


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """MB a second of each dtype and way."""
    ways = {
        "checked": {"check": True, "one_slice": False},
        "unchecked": {"check": False, "one_slice": False},
        "slice": {"check": False, "one_slice": True},
    }
    found: dict[str, Any] = {}
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            folder = Path(name)
            build(folder, arguments, dtype)
            size = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 1e6
            rounds = [{way: seconds(folder, **how) for way, how in ways.items()} for _ in range(arguments.rounds)]
            found[dtype] = {way: size / min(took[way] for took in rounds) for way in ways}
    return {
        "environment": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0],
        },
        "rows": arguments.rows,
        "dim": arguments.dim,
        "slices": arguments.slices,
        "rounds": arguments.rounds,
        "megabytes_a_second": found,
    }


def table(results: dict[str, Any]) -> str:
    """The table of docs/index.md."""
    lines = [line.format(slices=results["slices"]) for line in HEADER]
    for dtype, of in results["megabytes_a_second"].items():
        lines.append(f"| `{dtype}` | {' | '.join(f'{round(of[way], -1):,.0f}' for way in of)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--slices", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where stores are built; by default a temporary folder")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = measure(arguments)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
