"""Clipped gradients as Opacus has them, by both of its ways.

Opacus clips with min(1, C / (|g_b| + 1e-6)), ghostfunc with min(1, C / |g_b|). A loss times 2^40 with a threshold times
2^40 is clipped alike, but there Opacus's 1e-6 is below the rounding of float64: so its own code is compared at 1e-10.
At the loss's own scale the weights differ by 1e-6 C / (|g_b| (|g_b| + 1e-6)) where they are below 1, and the sums by
1e-6 C / (|g_b| + 1e-6) for each such sample, at most.
"""

import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cases import Draw
from oracle import assert_grads
from test_clipping import between, norms_of
from torch import Tensor, nn

import ghostfunc as gf

pytest.importorskip("opacus", reason="Opacus needs torch 2.6, and here an older one is tested")
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # a first layer's input has no gradient
CPU = torch.device("cpu")
SCALE = 2.0**40
Grads = dict[str, Tensor]


class Mixed(nn.Module):
    """`[B, T]` ids to `[B, 3]`: an embedding, norms, a convolution over positions, and linear maps."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.convolution, self.group = nn.Conv1d(8, 6, 3, padding=1), nn.GroupNorm(2, 6)
        self.hidden, self.head = nn.Linear(6, 7), nn.Linear(7, 3, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embedding(ids)).transpose(1, 2)
        x = self.group(self.convolution(x)).tanh().transpose(1, 2)  # [B, T, 6]
        return self.head(self.hidden(x).tanh().mean(1))


class Images(nn.Sequential):
    """`[B, 2, 6, 6]` to `[B, 3]`."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=2),
            nn.Flatten(), nn.Linear(16, 3),
        )  # fmt: skip


class Case(NamedTuple):
    """A module and its inputs; the loss is cross-entropy."""

    module: Callable[[], nn.Module]
    inputs: Callable[[Draw, int], Tensor]


CASES = {
    "embedding, norm, convolution, linear": Case(Mixed, lambda draw, n: draw.ids(11, n, 5)),
    "images": Case(Images, lambda draw, n: draw.normal(n, 2, 6, 6)),
    "mlp": Case(
        lambda: nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)),
        lambda draw, n: draw.normal(n, 5),
    ),
}


def built(name: str, n: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    draw = Draw(torch.float64, CPU, 1)
    return CASES[name].module().double(), (CASES[name].inputs(draw, n), draw.ids(3, n))


def losses_of(module: nn.Module, batch: Any, scale: float) -> Tensor:
    return scale * gf.classification_loss(module(batch[0]), batch)


def by_hooks(module: nn.Module, batch: Any, limit: float, scale: float) -> Grads:
    wrapped = GradSampleModule(module)
    optimizer = DPOptimizer(
        torch.optim.SGD(module.parameters()), noise_multiplier=0, max_grad_norm=limit, expected_batch_size=len(batch[0])
    )
    losses_of(wrapped, batch, scale).mean().backward()
    optimizer.clip_and_accumulate()
    return {name: p.summed_grad.detach() for name, p in module.named_parameters()}


def by_ghost(module: nn.Module, batch: Any, limit: float, scale: float) -> Grads:
    wrapped = GradSampleModuleFastGradientClipping(module, max_grad_norm=limit)
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(module.parameters()), noise_multiplier=0, max_grad_norm=limit, expected_batch_size=len(batch[0])
    )
    DPTensorFastGradientClipping(wrapped, optimizer, losses_of(wrapped, batch, scale)).backward()
    return {name: p.grad for name, p in module.named_parameters()}


def ours(module: nn.Module, batch: Any, limit: float, scale: float) -> gf.ClippedGrad:
    model_fn, params = gf.functionalize(module, gf.classification_loss)
    return gf.ghost_clipped_grad(lambda p, b: scale * model_fn(p, b), params, batch, limit)


@pytest.mark.parametrize("way", [by_hooks, by_ghost])
@pytest.mark.parametrize("n", [1, 6])
@pytest.mark.parametrize("name", list(CASES))
def test_equal_where_its_constant_is_below_rounding(name: str, n: int, way: Any) -> None:
    module, batch = built(name, n)
    _, norms = ours(module, batch, 1.0, 1.0)
    limit = between(norms) if n > 1 else 0.5 * norms.item()
    assert (norms > limit).any()
    assert n == 1 or (norms < limit).any()
    found = ours(module, batch, SCALE * limit, SCALE)
    assert 1e-6 / found.norms.min() < torch.finfo(torch.float64).eps
    assert_grads(found.grads, way(module, batch, SCALE * limit, SCALE), 1e-10, name)


@pytest.mark.parametrize("way", [by_hooks, by_ghost])
@pytest.mark.parametrize("name", list(CASES))
def test_apart_by_its_constant_and_no_more(name: str, way: Any) -> None:
    module, batch = built(name, 6)
    limit = between(ours(module, batch, 1.0, 1.0).norms)
    grads, norms = ours(module, batch, limit, 1.0)
    theirs = way(module, batch, limit, 1.0)
    apart = norms_of({key: (grads[key] - theirs[key]).unsqueeze(0) for key in grads}).item()
    bound = (1e-6 * limit / (norms + 1e-6))[norms > limit - 1e-6].sum().item()
    assert 1e-3 * bound < apart <= bound * (1 + 1e-6)


def test_a_layer_that_is_used_twice() -> None:
    """Opacus's hooks add up its uses; its ghost clipping refuses it."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(self.layer(x).tanh()).tanh())

    module, draw = Twice().double(), Draw(torch.float64, CPU, 1)
    batch = draw.normal(6, 5), draw.ids(3, 6)
    limit = SCALE * between(ours(module, batch, 1.0, 1.0).norms)
    grads = ours(module, batch, limit, SCALE).grads
    assert_grads(grads, by_hooks(module, batch, limit, SCALE), 1e-10, "used twice")
    with pytest.raises(NotImplementedError, match="Parameter tying"):
        by_ghost(Twice().double(), batch, limit, SCALE)


# ---------------------------------------------------------------- the benchmark

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
benchmark = import_module("clipping")


def test_the_benchmark_compares_like_with_like(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small transformer every method gives the same sum, and ours takes fewer products than Opacus's ways."""
    module = benchmark.Transformer(1, 16, 2, 50, 8)
    monkeypatch.setitem(
        benchmark.SIZES, "tiny", lambda _: benchmark.workload(module, torch.randint(50, (3, 8)), "tiny")
    )
    work = benchmark.build("tiny", CPU)
    limit = between(gf.ghost_grad_norm(work.model_fn, work.params, work.train))
    reference = benchmark.by_loop(work, limit)
    steps = {name: prepare(work, limit) for name, prepare in benchmark.METHODS.items()}
    for name in ("ghostfunc", "opacus hooks", "opacus ghost"):
        assert benchmark.difference(steps[name](), reference) < 1e-5
        assert benchmark.difference(steps[name](), reference) < 1e-5, "a second step is like the first"
    assert benchmark.difference(steps["plain"](), reference) > 0.1
    counted = {name: benchmark.vs_vmap.flops(step) for name, step in steps.items()}
    assert counted["plain"] <= counted["ghostfunc"] < counted["opacus hooks"] < counted["opacus ghost"]


def test_the_committed_results() -> None:
    """Every method is there, the sums agree, and clipping from one backward takes fewer products than from two."""
    results = json.loads(benchmark.RESULTS.read_text(encoding="utf-8"))
    assert list(results) == list(benchmark.SIZES)
    for result in results.values():
        methods = result["methods"]
        assert list(methods) == list(benchmark.METHODS)
        assert all(row["difference"] < 1e-4 for name, row in methods.items() if name != "plain")
        assert methods["ghostfunc"]["difference"] < 1e-5
        assert methods["plain"]["flops"] <= methods["ghostfunc"]["flops"] < methods["opacus ghost"]["flops"]
        assert all(len(row["ratios"]) == result["rounds"] and row["peak_bytes"] > 0 for row in methods.values())
