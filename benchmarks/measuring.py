"""How the benchmarks measure: times in turns, FLOPs, peak memory; and what they say about the machine."""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def seconds(method: Callable[[Any], Any], work: Any, device: torch.device) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    result = method(work)
    synchronize()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def flops(run: Callable[[], Any]) -> int:
    """Matrix products and convolutions, those of attention in plain products: a CPU's fused kernel is not counted."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _OneModule()  # type: ignore[assignment]
    with counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def with_figures(page: str, script: str, figures: str) -> str:
    """A page with the figures of a script between their marks, in place of what is there."""
    before, begin, rest = page.partition(f"<!-- figures: benchmarks/{script} --page -->\n")
    _, end, after = rest.partition("<!-- end of figures -->")
    return before + begin + f"{figures}\n" + end + after


class _OneModule:
    """What the counter asks which modules are running: its own tracker fails where one is called with a parameter."""

    parents: ClassVar = {"Global"}

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def times(
    work: Any, methods: Mapping[str, Callable[[Any], Any]], rounds: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Of methods that take turns, one of which is "plain"."""
    for method in methods.values():
        seconds(method, work, device)
    taken: dict[str, list[float]] = {name: [] for name in methods}
    for r in range(rounds):
        names = list(methods)
        for name in names[r % len(names) :] + names[: r % len(names)]:
            taken[name].append(seconds(methods[name], work, device))
    ratios = {name: [t / p for t, p in zip(ts, taken["plain"], strict=True)] for name, ts in taken.items()}
    return {
        name: {
            "median_seconds": statistics.median(taken[name]),
            "median_ratio": statistics.median(ratios[name]),
            "ratios": ratios[name],
        }
        for name in methods
    }


def resident(field: str) -> int:
    """`VmHWM` (the high-water mark) or `VmRSS` of this process, in bytes."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {field}: peak memory is measured on Linux only.")
    return 1024 * int(match[1])


def print_peak(work: Any, method: Callable[[Any], Any], device: torch.device) -> None:
    """Run one step and print its peak; what `peak` calls in a process of its own."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = resident("VmRSS")
    method(work)
    print((torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM")) - before)


def peak(script: str, size: str, method: str, arguments: argparse.Namespace) -> int:
    command = [sys.executable, script, "--size", size, "--peak-of", method, "--device", arguments.device]
    command += ["--threads", str(arguments.threads)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return match[1] if match else platform.processor()


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    import transformers

    device = torch.device(arguments.device)
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def save(path: Path, results: dict[str, Any]) -> None:
    """Add to what the file holds already, in one step."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write(path, json.dumps({**known, **results}, indent=1) + "\n")


def write(path: Path, text: str) -> None:
    """In one step: whoever reads sees the old text or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def arguments_of(
    description: str | None, sizes: Mapping[str, Any], default: list[str], methods: Mapping[str, Any], results: Path
) -> argparse.ArgumentParser:
    """The arguments of a benchmark whose methods take turns."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=list(sizes), default=default)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=results, help="the JSON file that gains these sizes")
    parser.add_argument("--peak-of", choices=list(methods), help=argparse.SUPPRESS)
    return parser
