"""Every architecture of the zoo: each parameter's dots, gradients and per-sample gradients, in float64 to 1e-9.

One table: the language models of `zoo_language`, and the encoders, vision, audio, LoRA and plain modules of
`zoo_others`. The reference is a loop over single samples.
"""

from collections import Counter

import pytest
import torch
from oracle import (
    assert_dots,
    assert_dots_by_name,
    assert_grads,
    dots,
    expected,
    matrix,
    mean,
    per_sample_grads,
)
from torch import Tensor
from torch.utils import _pytree as pytree
from zoo import ZooCase, in_double, padded_further
from zoo_language import INTERACTING, LANGUAGE, MIXTURES, language
from zoo_others import OTHERS

import ghostfunc as gf

TOLERANCE = 1e-9
ROUNDING = 1e-12  # of the whole gradient: what is left of a gradient that is zero
LEAST = 1e-15  # of the whole gradient: a sample's gradient of one parameter below it is zero but for rounding


def slow_after(quick: int, cases: list[ZooCase]) -> list:
    """Parameters of a test: the first cases of each family are quick, its other kernels and paddings are slow."""
    count: Counter[str] = Counter()
    marked = []
    for case in cases:
        count[case.family] += 1
        marks = [pytest.mark.slow] if count[case.family] > quick else []
        marked.append(pytest.param(case, id=case.name, marks=marks))
    return marked


def zero_gradients(case: ZooCase, params: dict[str, Tensor]) -> set[str]:
    """The parameters that the case says have no gradient."""
    return {name for name in params if any(part in name for part in case.zero)}


def norm(grads: dict[str, Tensor]) -> float:
    return float(torch.stack([g.norm() for g in grads.values()]).norm())


def only(names: set[str], values: dict) -> dict:
    return {name: value for name, value in values.items() if name in names}


@pytest.mark.parametrize("case", [*slow_after(2, LANGUAGE), *slow_after(len(OTHERS), OTHERS)])
def test_every_parameter_is_exact(case, device):
    """All three ways to the per-sample gradients, for every parameter, each of which has a gradient."""
    model_fn, params, batch = in_double(case, device)
    train, val = batch(3, 1), batch(2, 2)
    g, v = (per_sample_grads(model_fn, params, b) for b in (train, val))
    zero = {name for name in g if g[name].norm() <= ROUNDING * norm(g)}
    assert zero == zero_gradients(case, params)
    counted = set(params) - zero

    result = gf.value_and_grad_dot(model_fn, params, train, val, out="param train", schedule="joint")
    assert set(result.unused) <= zero
    assert list(result.dots) == list(result.grads) == list(params)
    least = LEAST * norm(g) * norm(v)
    per_parameter = {
        name: (value, scale.clamp(min=least / TOLERANCE))
        for name, (value, scale) in only(counted, expected("param train", g, v)).items()
    }
    assert_dots_by_name(only(counted, result.dots), per_parameter, TOLERANCE, "joint")
    assert_grads(only(counted, result.grads), only(counted, mean(g)), TOLERANCE, "joint gradient")
    assert norm(only(zero, result.dots) | {"": torch.zeros(1)}) <= ROUNDING * norm(g) * norm(v)

    pairs = gf.ghost_grad_dot(model_fn, params, train, val, out="train val", schedule="two-phase")
    assert_dots(pairs, matrix(g, v), TOLERANCE, "two-phase")

    _, factors = gf.ghost_factors(model_fn, params, train)
    assert list(factors) == list(params)
    for name, uses in factors.items():
        of_samples = sum((use.dense(params[name].shape) for use in uses), torch.zeros_like(g[name]))
        scale = g[name].norm() if name in counted else norm(g)
        assert (of_samples - g[name]).norm() <= TOLERANCE * scale, name
        norms, expected_norms = (t.reshape(len(t), -1).norm(dim=1) for t in (of_samples, g[name]))
        assert ((norms - expected_norms).abs() <= TOLERANCE * scale).all(), name


@pytest.mark.parametrize("case", slow_after(1, [case for case in LANGUAGE if case.padding]))
def test_neighbours_and_padding_change_nothing(case, device):
    """A sample's dot product is the same in a longer batch, between other samples."""
    model_fn, params, batch = in_double(case, device)
    samples, others = batch(3, 1), batch(6, 5)
    g = per_sample_grads(model_fn, params, samples)
    direction = {name: torch.randn_like(p) for name, p in params.items()}
    crowd = pytree.tree_map(lambda a, b: torch.cat([b[4:], a, b[:2]]), samples, others)
    there = gf.ghost_grad_along(model_fn, params, padded_further(crowd, case.padding), direction)
    assert_dots(there[2:5], dots(g, direction), TOLERANCE, "padded further, between others")


@pytest.mark.parametrize("architecture", MIXTURES)
@pytest.mark.parametrize("schedule", ["joint", "two-phase"])
def test_the_grouped_kernel_of_experts(architecture, schedule):
    """The kernel itself has no float64: in float32 against experts in a loop in float64."""
    device = torch.device("cpu")
    loop = in_double(language(architecture, experts_implementation="eager"), device)
    model_fn, params, batch = language(architecture, experts_implementation="grouped_mm").make(torch.float32, device)
    train, val = batch(4, 1), batch(3, 2)
    g, v = (per_sample_grads(loop.model_fn, loop.params, b) for b in (train, val))
    result = gf.value_and_grad_dot(model_fn, params, train, val, out="param train", schedule=schedule)
    assert_dots_by_name(result.dots, expected("param train", g, v), 1e-5, schedule)
    assert_grads(result.grads, mean(g), 1e-5, schedule)


@pytest.mark.parametrize("schedule", ["joint", "two-phase"])
def test_a_balancing_loss_over_the_batch_is_refused(schedule, device):
    model_fn, params, batch = in_double(INTERACTING, device)
    with pytest.raises(gf.InteractingSamples, match="depends on the others"):
        gf.value_and_grad_dot(model_fn, params, batch(4, 1), batch(3, 2), schedule=schedule)
