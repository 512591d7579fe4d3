"""Search of a synthetic store: time and memory of exact streaming search, against FAISS, flat and with inverted lists.

    python benchmarks/search.py                        # ten million rows: 1.5 GB of store, 2.7 GB of each FAISS file
    python benchmarks/search.py --rows 100000 --out quick.json

The rows are of a thousand overlapping clusters with a spectrum that decays, of lengths that vary; the queries are drawn
like the rows. Every measurement is a process of its own: by how much it raised the peak of its resident memory, seconds
on the clock, and seconds of processor time, which hardly depend on what else the machine does. The first pass of an
exact search has the store's pages evicted before it, and checks every shard's checksum; of the passes after it, the
fastest counts. Recall is the share of the exact k rows that were found.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import torch
from torch import Tensor

from ghostfunc.index import FaissIndex, Store, StoreWriter, search, search_ends

RESULTS = Path(__file__).parent / "results" / "search.json"
CENTRES, PASSES = 1000, 3
LONG = 5.0  # seconds of processor time after which a measurement is not made again
EXACT: dict[str, Callable[[Store, Tensor, int], Any]] = {
    "exact, dot": search,
    "exact, cosine": lambda store, queries, k: search(store, queries, k, metric="cosine"),
    "exact, both ends": search_ends,
}


def drawn(count: int, dim: int, seed: int) -> Tensor:
    """Rows `[count, dim]`."""
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + seed)
    spectrum = torch.arange(1, dim + 1).float().rsqrt()
    centres = torch.randn(CENTRES, dim, generator=shared)
    of = torch.randint(CENTRES, (count,), generator=own)
    rows = (centres[of] + torch.randn(count, dim, generator=own)) * spectrum
    return rows * torch.randn(count, 1, generator=own).mul(0.5).exp()


def build(folder: Path, rows: int, dim: int, dtype: str, shard_rows: int) -> None:
    """Write the store."""
    writer = StoreWriter(folder, dim=dim, dtype=dtype)
    source = writer.source("synthetic", fingerprint="synthetic", rows=rows, shard_rows=shard_rows)
    for shard in source.missing():
        samples = pyarrow.table({"sample_id": range(shard.start, shard.stop)})
        source.write(shard, drawn(shard.stop - shard.start, dim, 1 + shard.number), samples)


def peak() -> int:
    """The high-water mark of this process's resident memory, in bytes."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return 1024 * int(match[1])


class Took(NamedTuple):
    """Seconds.

    Attributes:
        processor: of processor time, over all threads.
        clock: on the clock.
    """

    processor: float
    clock: float


def timed(call: Callable[[], Any]) -> tuple[Took, Any]:
    clock, processor = time.perf_counter(), time.process_time()
    value = call()
    return Took(time.process_time() - processor, time.perf_counter() - clock), value


def fastest(call: Callable[[], Any]) -> tuple[Took, Any]:
    """The fastest of some passes, and the value of the last."""
    found, value = timed(call)
    spent, passes = found.processor, 1
    while passes < PASSES and spent < LONG:
        took, value = timed(call)
        found, spent, passes = min(found, took), spent + took.processor, passes + 1
    return found, value


def evict(folder: Path) -> None:
    """Have the system drop a folder's pages, so that reading it means reading the disk."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def measure_exact(folder: Path, what: str, queries: int, k: int) -> dict[str, Any]:
    """One cold pass and some warm ones."""
    vectors = drawn(queries, Store(folder).dim, 0)
    evict(folder / "shards")
    before, store = peak(), Store(folder)
    first, _ = timed(lambda: EXACT[what](store, vectors, k))
    again, hits = fastest(lambda: EXACT[what](store, vectors, k))
    raised = peak() - before
    if what == "exact, dot":
        np.save(_exact_rows(folder, queries), hits.rows.numpy())
    return {"first": first, "again": again, "memory": raised}


def _exact_rows(folder: Path, queries: int) -> Path:
    return folder / f"exact-{queries}.npy"


def measure_build(folder: Path, kind: str) -> dict[str, Any]:
    """Making and saving an index."""
    before, store = peak(), Store(folder)
    making, index = timed(lambda: FaissIndex.build(store, kind))
    saving, path = timed(index.save)
    return {"build": making, "save": saving, "memory": peak() - before, "bytes": path.stat().st_size}


def measure_faiss(folder: Path, kind: str, counts: list[int], k: int) -> list[dict[str, Any]]:
    """Loading an index, and searching it with several efforts."""
    before, store = peak(), Store(folder)
    loading, index = timed(lambda: FaissIndex.load(store, kind))
    lists = getattr(index.index, "nlist", None)
    efforts = [None] if lists is None else sorted({max(1, lists // share) for share in (64, 16, 4)})
    found = []
    for queries in counts:
        vectors = drawn(queries, store.dim, 0)
        exact = torch.from_numpy(np.load(_exact_rows(folder, queries)))
        for effort in efforts:
            again, hits = fastest(lambda v=vectors, e=effort: index.search(v, k, effort=e))
            share = {"lists": lists, "visited": effort} if lists else {}
            found.append({"queries": queries, "again": again, "recall": recall(hits.rows, exact), **share})
    return [row | {"loading": loading, "memory": peak() - before} for row in found]


def recall(found: Tensor, exact: Tensor) -> float:
    hits = sum(len(set(a) & set(b)) for a, b in zip(found.tolist(), exact.tolist(), strict=True))
    return hits / exact.numel()


def in_a_process(*call: Any) -> Any:
    """What a measurement of this file gives, from a process of its own, with the load before it."""
    load = os.getloadavg()[0]
    threads = str(torch.get_num_threads())
    command = [
        sys.executable,
        __file__,
        "--threads",
        threads,
        "--measure",
        json.dumps([str(a) if isinstance(a, Path) else a for a in call]),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "PYTHONPATH": ""})
    found = json.loads(done.stdout.splitlines()[-1])
    for row in found if isinstance(found, list) else [found]:
        row["load"] = load
    return found


def table(results: dict[str, Any]) -> str:
    """The results as a table."""
    store, threads = results["store"], results["environment"]["threads"]
    lines = [
        f"{store['rows']:,} rows of {store['dim']} numbers ({store['dtype']}, {store['bytes'] / 1e9:.1f} GB), "
        f"k = {store['k']}, {threads} thread{'s' if threads > 1 else ''}:",
        "",
        "| search | queries | first pass, from disk | again | again, on the clock | memory | recall |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["searches"]:
        visited = f", {row['visited']} of {row['lists']} lists" if "visited" in row else ""
        first = _seconds(row["first"][0]) if "first" in row else ""
        share = f"{row['recall']:.3f}" if "recall" in row else "exact"
        lines.append(
            f"| {row['what']}{visited} | {row['queries']} | {first} | {_seconds(row['again'][0])} | "
            f"{_seconds(row['again'][1])} | {_bytes(row['memory'])} | {share} |"
        )
    lines += ["", "| index | made in | saved in | loaded in | memory to make it | file |", "|---|---|---|---|---|---|"]
    for row in results["builds"]:
        took = " | ".join(_seconds(row[key][0]) for key in ("build", "save", "loading"))
        lines.append(f"| {row['what']} | {took} | {_bytes(row['memory'])} | {_bytes(row['bytes'])} |")
    return "\n".join(lines)


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{1000 * value:.{0 if value >= 0.01 else 1}f} ms"


def _bytes(value: int) -> str:
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Build the store, and measure."""
    writing, _ = timed(lambda: build(folder, arguments.rows, arguments.dim, arguments.dtype, arguments.shard_rows))
    size = sum(path.stat().st_size for path in (folder / "shards").iterdir())
    results: dict[str, Any] = {
        "environment": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "load": "one-minute load average before each measurement, beside it: the machine was shared",
        },
        "store": {
            "rows": arguments.rows,
            "dim": arguments.dim,
            "dtype": arguments.dtype,
            "shard_rows": arguments.shard_rows,
            "bytes": size,
            "k": arguments.k,
            "write": writing,
        },
        "searches": [],
        "builds": [],
    }
    for what in EXACT:
        some = arguments.queries[len(arguments.queries) // 2]
        for queries in arguments.queries if what == "exact, dot" else [some]:
            row = in_a_process("measure_exact", folder, what, queries, arguments.k)
            results["searches"].append({"what": what, "queries": queries, **row})
            print(results["searches"][-1], flush=True)
    for kind in arguments.kinds:
        built = in_a_process("measure_build", folder, kind)
        rows = in_a_process("measure_faiss", folder, kind, arguments.queries, arguments.k)
        results["searches"] += [{"what": f"FAISS {kind}", **row} for row in rows]
        results["builds"].append({"what": f"FAISS {kind}", **built, "loading": rows[0]["loading"]})
        for path in folder.glob("faiss-*"):
            path.unlink()
        print(results["builds"][-1], *results["searches"][-len(rows) :], sep="\n", flush=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    return results


def _processor() -> str:
    match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return f"{match[1] if match else platform.machine()}, {os.cpu_count()} cores"


def main() -> None:
    """Build, measure, print the table, write it, and remove the store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--shard_rows", type=int, default=65_536)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--kinds", nargs="*", default=["flat", "ivf"])
    parser.add_argument("--folder", type=Path, help="where the store is built; by default a temporary folder")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        name, folder, *rest = json.loads(arguments.measure)
        print(json.dumps(globals()[name](Path(folder), *rest)))
        return
    folder = Path(tempfile.mkdtemp(prefix="search", dir=arguments.folder))
    try:
        results = run(arguments, folder)
    finally:
        shutil.rmtree(folder)
    print(table(results))
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
