"""A process of its own for `test_memory.py`: run one step and print its peak resident memory in bytes.

`python peak_memory.py plain|ghostfunc|vmap N M POSITIONS WIDTH`: two layers, `width` to `2 width` and back.
"""

import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import ghostfunc as gf


def peak() -> int:
    """The high-water mark of this process. `ru_maxrss` would include the parent's, carried over by `vfork`."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return 1024 * int(match[1])


def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """`[B, T, width] -> [B]`."""
    return F.linear(F.linear(x, p["up"]).relu(), p["down"]).pow(2).mean((1, 2))


def step(method: str, n: int, m: int, positions: int, width: int) -> int:
    """One step of a method on random data: by how many bytes it raises the peak."""
    params = {"up": torch.randn(2 * width, width) / width, "down": torch.randn(width, 2 * width) / width}
    train, val = torch.randn(n, positions, width), torch.randn(m, positions, width)
    before = peak()
    if method == "ghostfunc":
        gf.value_and_grad_dot(model_fn, params, train, val)
    elif method == "vmap":
        gf.per_sample_grad(model_fn, params, train)
    else:
        leaves = {name: p.requires_grad_() for name, p in params.items()}
        torch.autograd.grad(model_fn(leaves, torch.cat([train, val])).mean(), list(leaves.values()))
    return peak() - before


def main() -> None:
    """Warm up on a tiny model, for what is imported at a first call is no part of a step, then run the step."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    method, sizes = sys.argv[1], map(int, sys.argv[2:])
    step(method, 1, 1, 2, 8)
    print(step(method, *sizes))


if __name__ == "__main__":
    main()
