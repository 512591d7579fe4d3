"""Nothing of B x d_in x d_out is allocated, and no `[B, T, V]` outlives the head's backward."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peak_memory import model_fn
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ghostfunc as gf
from ghostfunc import _allocations
from ghostfunc._allocations import Span, at_peak
from ghostfunc._fake import as_fake, new_mode
from ghostfunc._planner import tile_bytes


class Allocations(TorchDispatchMode):
    """Records every operation's outputs: the largest one, and which large ones are alive when an operation runs."""

    def __init__(self, large: float = math.inf) -> None:
        super().__init__()
        self.large = large
        self.largest = 0
        self.large_storages: list[StorageWeakRef] = []
        self.large_alive_at: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        alive = sum(not storage.expired() for storage in self.large_storages)
        self.large_alive_at.setdefault(func.__name__.split(".")[0], []).append(alive)
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                elements = t.untyped_storage().nbytes() // t.element_size()
                self.largest = max(self.largest, elements)
                if elements >= self.large:
                    reference = StorageWeakRef(t.untyped_storage())
                    if reference not in self.large_storages:
                        self.large_storages.append(reference)
        return out


@pytest.mark.parametrize("schedule", ["joint", "two-phase"])
@pytest.mark.parametrize("out", ["train", "param train"])
def test_no_per_sample_gradient_is_allocated(schedule, out):
    """The largest tensor is far below `[B, d_in, d_out]`, where the oracle's is that."""
    n, m, positions, width = 16, 2, 64, 512  # sixteen gradients of 2 MB
    params = {"up": torch.randn(2 * width, width) / width, "down": torch.randn(width, 2 * width) / width}
    train, val = torch.randn(n, positions, width), torch.randn(m, positions, width)
    with Allocations() as recorded:
        gf.value_and_grad_dot(model_fn, params, train, val, schedule=schedule, out=out)
    rows = (n + m) * positions * 2 * width  # the hidden activations
    assert rows < n * width * 2 * width / 3
    assert params["up"].numel() <= recorded.largest <= max(rows, n * width * 2 * width / 2)
    with Allocations() as recorded:
        gf.per_sample_grad(model_fn, params, train)
    assert recorded.largest >= n * width * 2 * width


@pytest.mark.parametrize("clip", [False, True])
def test_nor_for_any_other_quantity(clip):
    """Together they take a tile, and clipping keeps activations and cotangents, never a gradient of each sample."""
    n, m, positions, width = 16, 2, 64, 512
    params = {"up": torch.randn(2 * width, width) / width, "down": torch.randn(width, 2 * width) / width}
    train, val = torch.randn(n, positions, width), torch.randn(m, positions, width)
    want = {"dots": gf.Dot(), "matrix": gf.Dot("train val"), "gram": gf.Gram(), "norms": gf.Norm()}
    want |= {"second": gf.Stream(lambda tile: tile.grads.square().mean(0), "entry")}
    want |= {"clipped": gf.Clip(1.0)} if clip else {}
    with Allocations() as recorded:
        gf.ghost_quantities(model_fn, params, train, val, want=want)
    rows = (n + m) * positions * 2 * width
    assert params["up"].numel() <= recorded.largest <= max(rows, n * width * 2 * width / 2)


@pytest.mark.parametrize("tied", [False, True])
def test_no_logits_outlive_the_backward_of_the_head(tied):
    """When the last LayerNorm's backward begins, nothing of `[B, T, V]` is left, tied weights included."""
    from transformers import GPT2Config, GPT2LMHeadModel

    n, m, positions, vocabulary = 4, 1, 32, 1500
    config = GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=vocabulary, n_positions=positions, tie_word_embeddings=tied,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model, params = gf.functionalize(GPT2LMHeadModel(config), gf.causal_lm_loss)
    train, val = ({"input_ids": torch.randint(vocabulary, (k, positions))} for k in (n, m))
    with Allocations(large=n * positions * vocabulary) as recorded:
        gf.value_and_grad_dot(model, params, train, val, schedule="joint")
    assert recorded.large_storages  # the logits were seen
    assert max(max(counts) for counts in recorded.large_alive_at.values()) > 0
    first = recorded.large_alive_at["native_layer_norm_backward"]
    assert set(first) == {0}, f"{max(first)} tensors of [B, T, V] are alive in the backward of the body"


def peak_of(method: str, *sizes: int) -> int:
    script = Path(__file__).with_name("peak_memory.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), method, *map(str, sizes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_in_a_process_of_its_own():
    """A step with dots peaks within two weights of the plain step on both batches; the oracle needs B weights."""
    sizes = 16, 1, 64, 1024  # weights of 8 MB; sixteen per-sample gradients of two are 268 MB
    weight = 4 * 1024 * 2048
    plain, ghost, dense = (peak_of(method, *sizes) for method in ("plain", "ghostfunc", "vmap"))
    print(f"peak above the start, MB: plain {plain / 1e6:.0f}, ghostfunc {ghost / 1e6:.0f}, vmap {dense / 1e6:.0f}")
    assert dense > 2 * 16 * weight
    assert ghost <= plain + 2 * weight


@pytest.mark.parametrize("sizes", [(4, 1, 256), (2, 1, 1024), (4, 4, 256), (16, 1, 64)])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocabulary", [50257, 512])  # the peak is at the logits, and at the last gradient
def test_as_much_is_alive_as_in_a_plain_step(vocabulary, tied, sizes):
    """On fake tensors, so that an allocator's habits are not in it: at GPT-2's width, 1% and 32 MiB more at most.

    The tile is 16 MiB, and the cross terms of a tied table are as many pairs of positions.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    n, m, positions = sizes
    config = GPT2Config(
        n_layer=2, vocab_size=vocabulary, tie_word_embeddings=tied, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    with torch.device("meta"):
        module = GPT2LMHeadModel(config).eval()
        module.tie_weights()
    model_fn, params = gf.functionalize(module, gf.causal_lm_loss)
    mode = new_mode()
    params = {name: as_fake(mode, p) for name, p in params.items()}
    train, val, both = (
        {"input_ids": as_fake(mode, torch.zeros(k, positions, dtype=torch.int64))} for k in (n, m, n + m)
    )

    def plain():
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        return torch.autograd.grad(model_fn(leaves, both).mean(), list(leaves.values()))

    def alive_at_most(step):
        with mode, _allocations.Allocations() as recorded:
            result = step()
        del result
        return sum(at_peak(Span("", a.bytes, a.born, a.died) for a in recorded.made).values())

    expected, found = (
        alive_at_most(step) for step in (plain, lambda: gf.value_and_grad_dot(model_fn, params, train, val))
    )
    print(f"{sizes}: {found / 2**20:.0f} MiB alive, {expected / 2**20:.0f} in a plain step")
    assert expected / 2 < found <= 1.01 * expected + 2 * tile_bytes("cpu")
