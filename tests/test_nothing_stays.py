"""A call leaves no activation behind, not even until the garbage collector runs."""

import gc

import pytest
import torch
from cases import BY_NAME

import ghostfunc as gf


def large_tensors(entries: int) -> int:
    """Living tensors with memory for so many entries or more."""
    tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor]
    return sum(t.untyped_storage().nbytes() >= entries * t.element_size() and t.numel() >= entries for t in tensors)


@pytest.mark.parametrize("name", ["gpt2 tied", "gpt2 untied", "norms", "weight twice", "convolution"])
def test_no_activation_waits_for_the_collector(name: str) -> None:
    model_fn, params, batch = BY_NAME[name].make(torch.float64, torch.device("cpu"))
    train, val = batch(400, 1), batch(300, 2)
    entries = 700 * 3  # what a position of the smallest activation takes for the samples of both

    def everything() -> None:
        gf.value_and_grad_dot(model_fn, params, train, val)
        gf.ghost_grad_dot(model_fn, params, train, val, schedule="two-phase")
        gf.ghost_grad_along(model_fn, params, train, params)

    everything()  # what torch and transformers keep from a first call
    gc.collect()
    gc.disable()
    try:
        before = large_tensors(entries)
        everything()
        assert large_tensors(entries) == before
    finally:
        gc.enable()


CALLS = {
    "dots": lambda m, p, train, val, projection: gf.value_and_grad_dot(m, p, train, val),
    "two-phase": lambda m, p, train, val, projection: gf.ghost_grad_dot(m, p, train, val, schedule="two-phase"),
    "matrix": lambda m, p, train, val, projection: gf.ghost_grad_dot(m, p, train, val, out="train val"),
    "norms": lambda m, p, train, val, projection: gf.ghost_grad_norm(m, p, train),
    "clipped": lambda m, p, train, val, projection: gf.ghost_clipped_grad(m, p, train, 1.0),
    "projections": lambda m, p, train, val, projection: gf.ghost_grad_proj(m, p, train, projection),
    "making a projection": lambda m, p, train, val, projection: gf.kronecker_projection(
        m, p, train, kind="pca", rank=4
    ),
    "second order": lambda m, p, train, val, projection: gf.ghost_grad_hess_grad(m, p, train, val),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["gpt2 tied", "derived", "weight twice"])
def test_no_tensor_waits_for_the_collector(name: str, call: str) -> None:
    """None at all: parameters in another dtype, or otherwise derived, are as large as parameters."""
    model_fn, params, batch = BY_NAME[name].make(torch.float64, torch.device("cpu"))
    train, val = batch(4, 1), batch(3, 2)
    projection = gf.kronecker_projection(model_fn, params, train, layers=lambda name: True, rank=4, min_rank=2)

    def tensors() -> int:
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    CALLS[call](model_fn, params, train, val, projection)
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        CALLS[call](model_fn, params, train, val, projection)
        assert tensors() == before
    finally:
        gc.enable()
