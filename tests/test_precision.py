"""Low precision: models in bfloat16 and float16, autocast, mixed dtypes, and what the probe makes of rounding.

The reference is a plain step in the same precision: one forward of the whole batch, and one backward for each sample.
An entry of a gradient is rounded at most four times there (the activation, its product with the grad-output, the sum
over positions, the sum over uses), and at most four times by ghostfunc; each rounding is half of the dtype's eps.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BY_NAME, CASES
from oracle import as_double, dots, expected, mean, per_sample_grads
from torch import Tensor, nn

import ghostfunc as gf

ROUNDINGS = 4 + 4
N, M = 4, 2  # powers of two, so that means add no rounding
LOW = [torch.bfloat16, torch.float16]
ROOT = Path(__file__).parents[1]


def plain(model_fn: Callable, params: dict[str, Tensor], batch: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Per-sample gradients and the mean gradient of one forward of the batch, by plain backward passes."""
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    losses = model_fn(leaves, batch)

    def gradients(loss: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(leaves.values(), found, strict=True)]

    rows = [gradients(loss) for loss in losses]
    whole = dict(zip(leaves, gradients(losses.mean()), strict=True))
    return {name: torch.stack([row[k] for row in rows]) for k, name in enumerate(leaves)}, whole


def rounding(dtype: torch.dtype) -> float:
    return ROUNDINGS * torch.finfo(dtype).eps / 2


def underflow(dtype: torch.dtype, size: int) -> float:
    """The norm of what numbers below the smallest normal one lose."""
    return ROUNDINGS * torch.finfo(dtype).smallest_normal * size**0.5


def check(model_fn: Callable, params: dict[str, Tensor], train: Any, val: Any, dtype: torch.dtype) -> None:
    """Dots, gradients and factors of every parameter against a plain step."""
    (g, whole), (v, _) = plain(model_fn, params, train), plain(model_fn, params, val)
    wanted = expected("param train", g, v)
    _, factors = gf.ghost_factors(model_fn, params, train)
    for schedule in ("joint", "two-phase"):
        result = gf.value_and_grad_dot(model_fn, params, train, val, out="param train", schedule=schedule)
        for name, p in params.items():
            small = underflow(dtype, p.numel())
            value, scale = wanted[name]
            of_sample, direction = g[name].double().reshape(N, -1).norm(dim=1), v[name].double().mean(0).norm()
            allowed = rounding(dtype) * scale + small * (of_sample + direction)
            assert result.dots[name].dtype == torch.float32
            assert ((result.dots[name].double() - value).abs() <= allowed).all(), (schedule, name)
            error = (result.grads[name].double() - whole[name].double()).norm()
            assert result.grads[name].dtype == p.dtype
            assert error <= rounding(dtype) * whole[name].double().norm() + small, (schedule, name)
    for name, uses in factors.items():
        total = sum((use.dense(params[name].shape) for use in uses), torch.zeros(N, *params[name].shape))
        assert total.dtype == torch.float32
        error, size = ((t.reshape(N, -1)).norm(dim=1) for t in (total - g[name].float(), g[name].float()))
        assert (error <= rounding(dtype) * size + underflow(dtype, params[name].numel())).all(), name


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_model_in_low_precision(case, dtype):
    model_fn, params, batch = case.make(dtype, torch.device("cpu"))
    check(model_fn, params, batch(N, 1), batch(M, 2), dtype)


AUTOCAST = [case for case in CASES if case.name != "products"]  # F.bilinear has no autocast in torch itself


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("case", AUTOCAST, ids=lambda case: case.name)
def test_autocast_inside_the_model(case, dtype):
    inner, params, batch = case.make(torch.float32, torch.device("cpu"))

    def model_fn(p: dict[str, Tensor], batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return inner(p, batch)

    check(model_fn, params, batch(N, 1), batch(M, 2), dtype)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_autocast_around_the_call_is_autocast_inside_the_model(dtype):
    model_fn, params, batch = BY_NAME["gpt2 tied"].make(torch.float32, torch.device("cpu"))
    autocast = partial(torch.autocast, "cpu", dtype=dtype)

    def inside(p: dict[str, Tensor], batch: Any) -> Tensor:
        with autocast():
            return model_fn(p, batch)

    with autocast():
        around = gf.value_and_grad_dot(model_fn, params, batch(N, 1), batch(M, 2))
    result = gf.value_and_grad_dot(inside, params, batch(N, 1), batch(M, 2))
    assert torch.equal(around.dots, result.dots)
    assert all(torch.equal(around.grads[name], result.grads[name]) for name in params)


class Mixed(nn.Module):
    """Norms and the head in float32, linear layers and the table in low precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8).to(dtype)
        self.first, self.second = nn.Linear(8, 16).to(dtype), nn.Linear(16, 8, bias=False).to(dtype)
        self.norm, self.scale = nn.LayerNorm(8), nn.Parameter(torch.linspace(0.5, 2, 8))
        self.head = nn.Linear(8, 11)

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.table(input_ids)  # [B, T, 8]
        h = h + self.second(self.first(self.norm(h.float()).to(h.dtype)).relu())
        return self.head(h * self.scale)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_mixed_dtypes_in_one_model(dtype):
    torch.manual_seed(0)
    model_fn, params = gf.functionalize(Mixed(dtype), gf.causal_lm_loss)
    assert {p.dtype for p in params.values()} == {torch.float32, dtype}
    train, val = ({"input_ids": torch.randint(11, (n, 6))} for n in (N, M))
    check(model_fn, params, train, val, dtype)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_llama_in_low_precision(dtype):
    """Its norms compute in float32 inside, with weights in the low precision."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, use_cache=False,
    )  # fmt: skip
    model_fn, params = gf.functionalize(LlamaForCausalLM(config).to(dtype), gf.causal_lm_loss)
    train, val = ({"input_ids": torch.randint(17, (n, 6))} for n in (N, M))
    check(model_fn, params, train, val, dtype)


# ---------------------------------------------------------------- the dtype of contractions


@pytest.mark.parametrize("schedule", ["joint", "two-phase"])
@pytest.mark.parametrize("out", ["train", "train val"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", ["mlp", "gpt2 tied", "convolution"])
def test_a_coarse_dtype_is_for_the_dots_alone(name, dtype, out, schedule):
    """Factors and directions are rounded to it, and products; the gradient is as precise as without it."""
    model_fn, params, batch = BY_NAME[name].make(torch.float32, torch.device("cpu"))
    train, val = batch(N, 1), batch(M, 2)
    exact_fn = BY_NAME[name].make(torch.float64, torch.device("cpu")).model_fn
    g, v = (per_sample_grads(exact_fn, as_double(params), as_double(b)) for b in (train, val))
    result = gf.value_and_grad_dot(model_fn, params, train, val, out=out, schedule=schedule, dtype=dtype)
    value, scale = expected(out, g, v)
    assert result.dots.dtype == dtype
    assert ((result.dots.double() - value).abs() <= rounding(dtype) * scale).all()
    for name, whole in mean(g).items():
        assert (result.grads[name] - whole).norm() <= 1e-5 * whole.norm(), name


# ---------------------------------------------------------------- the probe and rounding


def hidden_by(p: dict[str, Tensor], x: Tensor, inside: torch.dtype, mixing: float) -> Tensor:
    """A model whose samples an unusual operation hides, with a norm in another dtype; gradients mix if asked to."""
    h = torch.special.i0e(x @ p["w"])  # [B, T, d]: not known to keep samples apart
    other = h.roll(1, 0)
    h = h + mixing * (other - other.detach())  # no loss shows it
    narrow = h.to(inside)
    h = (narrow * torch.rsqrt(narrow.square().mean(-1, keepdim=True) + 0.1)).to(h.dtype)
    return ((h * p["scale"]) @ p["v"]).float().square().sum((1, 2))


def hidden_model(dtype: torch.dtype, samples: int) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": (5, 6), "scale": (6,), "v": (6, 3)}
    params = {name: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for name, s in shapes.items()}
    return params, torch.randn(samples, 3, 5, generator=generator, dtype=torch.float64).to(dtype)


DTYPES = [torch.float64, torch.float32, *LOW]


@pytest.mark.parametrize("inside", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("samples", [2, 9, 70])
def test_rounding_is_not_mixing(samples, dtype, inside):
    """Whatever the model computes in, a probe takes no rounding for samples that meet."""
    params, x = hidden_model(dtype, samples)
    model_fn = partial(hidden_by, inside=inside, mixing=0.0)
    assert "i0e" in gf.explain(model_fn, params, x).probe
    g, _ = plain(model_fn, params, x)
    direction = {name: torch.ones_like(p) for name, p in params.items()}
    along = gf.ghost_grad_along(model_fn, params, x, direction)
    value, scale = dots(g, direction)
    coarsest = max(dtype, inside, torch.float32, key=lambda d: torch.finfo(d).eps)
    assert ((along.double() - value).abs() <= rounding(coarsest) * scale).all()


@pytest.mark.parametrize(
    "dtype, inside, mixing",
    [
        (torch.float64, torch.float64, 1e-9),
        (torch.float64, torch.float32, 1e-9),  # far below the rounding of the float32 inside
        (torch.float64, torch.bfloat16, 1e-9),
        (torch.float32, torch.float32, 1e-5),
        (torch.float32, torch.bfloat16, 1e-5),
        (torch.bfloat16, torch.bfloat16, 0.1),
        (torch.float16, torch.float16, 0.1),
    ],
)
@pytest.mark.parametrize("samples", [2, 9, 70])
def test_mixing_below_the_rounding_is_found(samples, dtype, inside, mixing):
    params, x = hidden_model(dtype, samples)
    model_fn = partial(hidden_by, inside=inside, mixing=mixing)
    with pytest.raises(gf.InteractingSamples, match="a probe of the backward found samples meeting"):
        gf.ghost_grad_along(model_fn, params, x, params)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_that_cancels_is_not_mixing(dtype):
    """A stabiliser, as in the softmax of a recurrence, has no gradient but what rounding leaves of it."""

    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        h = torch.special.i0e(x @ p["w"]) * 3  # [B, T, d]
        largest = torch.maximum(torch.zeros_like(h[:, 0]) - 100, h[:, 0] + p["decay"])
        weights = [(part - largest).exp() for part in h.unbind(1)]
        weights = torch.stack(weights, 1)  # [B, T, d]
        return ((weights * x.tanh()).sum(1) / weights.sum(1)).float().square().sum(1)

    generator = torch.Generator().manual_seed(0)
    params = {name: torch.randn(*s, generator=generator).to(dtype) for name, s in {"w": (5, 5), "decay": (5,)}.items()}
    x = torch.randn(6, 3, 5, generator=generator).to(dtype)
    g, _ = plain(model_fn, params, x)
    assert g["decay"].norm() <= rounding(dtype) * g["w"].norm()
    result = gf.ghost_grad_along(model_fn, params, x, params)
    value, scale = dots(g, params)
    assert ((result.double() - value).abs() <= rounding(max(dtype, torch.float32, key=eps)) * scale).all()


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


class Noisy(torch.autograd.Function):
    """The identity, with a backward that rounds in another way each time, as atomic additions do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad * (1 + 2e-7 * torch.rand_like(grad))


@pytest.mark.parametrize("mixing", [0.0, 0.01])
def test_a_backward_that_varies_is_not_mixing(mixing):
    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        h = Noisy.apply(torch.special.i0e(x @ p["w"]))
        h = h + mixing * (h.roll(1, 0) - h.roll(1, 0).detach())
        return ((h * p["scale"]) @ p["v"]).square().sum((1, 2))

    params, x = hidden_model(torch.float32, 9)
    if mixing:
        with pytest.raises(gf.InteractingSamples, match="a probe of the backward found samples meeting"):
            gf.ghost_grad_along(model_fn, params, x, params)
        return
    value, scale = dots(per_sample_grads(model_fn, params, x), params)
    assert ((gf.ghost_grad_along(model_fn, params, x, params).double() - value).abs() <= 1e-6 * scale).all()


# ---------------------------------------------------------------- the page


def test_the_page_has_the_measured_table():
    """docs/precision.md shows what benchmarks/precision.py last wrote."""
    results = json.loads((ROOT / "benchmarks" / "results" / "precision.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "precision.md").read_text(encoding="utf-8")
    assert len(results["rows"]) >= 8
    for row in results["rows"]:
        figures = " | ".join(f"{row[column]:.1e}" for column in results["columns"])
        assert f"| {row['setting']} | {figures} |" in page
