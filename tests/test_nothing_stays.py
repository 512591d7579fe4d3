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
