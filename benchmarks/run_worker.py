"""One method of `run.py` in a process of its own: it measures itself when told to, by lines of JSON.

    {"do": "prepare", "case": {...}, "bytes": null}    builds the case, runs its first step and tells the peak
    {"do": "flops"}                                    of one step
    {"do": "times", "calls": 3}                        seconds of a step, the mean of some calls
    {"do": "drop"}                                     forgets the case

The peak is that of the first step; if that is short, of the second, for kernels keep buffers of their own. The answer
to what fails is `{"raised": ...}`; the process goes on. With "bytes" the first step has that much address space beyond
what the process holds.
"""

import argparse
import ctypes
import gc
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import measuring
import torch
import workloads
from methods import METHODS, Numbers, Step

LONG = 0.5  # seconds


class Server:
    """What the process holds between messages."""

    def __init__(self, method: str) -> None:
        self._prepare = METHODS[method].prepare
        self._warm: set[str] = set()
        self._step: Step | None = None

    def prepare(self, case: dict[str, Any], bytes: int | None = None) -> dict[str, Any]:
        """The first step of a case: its numbers, what the process held before, and by how much it raised the peak."""
        self.drop()
        tiny = workloads.of_json(case).tiny()
        if tiny.architecture not in self._warm:  # what is imported at a first call is no part of a step
            self._prepare(tiny.build())()
            self._warm.add(tiny.architecture)
        self._step = self._prepare(workloads.of_json(case).build())
        told = observed(self._step if bytes is None else partial(within, bytes, self._step))
        return told if told["seconds"] > LONG else observed(self._step)

    def flops(self) -> dict[str, Any]:
        """Of one step."""
        return {"flops": measuring.flops(self._prepared())}

    def times(self, calls: int) -> dict[str, Any]:
        """Of one step, the mean of some calls."""
        step = self._prepared()
        start = time.perf_counter()
        for _ in range(calls):
            step()
        return {"seconds": (time.perf_counter() - start) / calls}

    def drop(self) -> dict[str, Any]:
        """Forget the case."""
        self._step = None
        give_back_memory()
        return {}

    def _prepared(self) -> Step:
        if self._step is None:
            raise RuntimeError("nothing is prepared")
        return self._step


def observed(step: Step) -> dict[str, Any]:
    """A step's numbers, time and peak, and what the process held before it."""
    give_back_memory()
    before = measuring.resident("VmRSS")
    start = time.perf_counter()
    numbers = step()
    seconds = time.perf_counter() - start
    peak = measuring.resident("VmHWM") - before
    lists = {name: values.tolist() for name, values in numbers.items()}
    return {"held_bytes": before, "peak_bytes": peak, "seconds": seconds, "numbers": lists}


def give_back_memory() -> None:
    """What was freed goes to the system, and the high-water mark is that of now."""
    gc.collect()  # models, which have cycles
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def within(more: int, step: Callable[[], Numbers]) -> Numbers:
    """A step that may take so many bytes of address space more than the process has."""
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (measuring.resident("VmSize") + more, old[1]))
    try:
        return step()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def serve(method: str, channel: Any) -> None:
    server = Server(method)
    for line in sys.stdin:
        message = json.loads(line)
        try:
            answer = getattr(server, message.pop("do"))(**message)
        except Exception as error:  # what a method cannot do is a result
            server.drop()
            answer = {"raised": said(error)}
        print(json.dumps(answer), file=channel, flush=True)


def said(error: Exception) -> str:
    """The first lines of an error, as one."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:240]}{' ...' if len(words) > 240 else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", message="There is a performance drop")  # vmap over fused attention: exact, slower
    # A first layer's input needs no gradient, and torch says so at peers' hooks.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    with os.fdopen(os.dup(1), "w") as channel:  # what a peer prints goes to standard error
        os.dup2(2, 1)
        serve(arguments.method, channel)


if __name__ == "__main__":
    main()
