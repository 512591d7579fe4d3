"""Calls inside other transforms: `torch.func`'s (a level of its own for our backward) and a compiler's (no values yet).

Inside `torch.func.grad`, `vmap` or `jvp` of a function that calls ghostfunc, our backward runs at a functorch level of
its own, above the outer transform's: what comes out of it is unwrapped, and is a function of the outer inputs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._functorch.eager_transforms import enable_inplace_requires_grad, grad_increment_nesting
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._python_dispatch import _disable_current_modes

_P = ParamSpec("_P")
_R = TypeVar("_R")


def functorch_level() -> int | None:
    """The innermost functorch transform that is running; None outside of any."""
    return functorch.maybe_current_level()  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def own_level() -> Iterator[int | None]:
    """A functorch level for one of our backward passes, where a transform is running; None and no level elsewhere."""
    if functorch_level() is None:
        yield None
    else:
        with grad_increment_nesting() as level:
            yield level


def leaf_at(tensor: Tensor, level: int) -> Tensor:
    """A tensor that a backward at this level differentiates with respect to; it depends on the outer inputs."""
    with enable_inplace_requires_grad(True):
        wrapped = functorch._wrap_for_grad(unwrapped(tensor, level), level)  # pyright: ignore[reportAttributeAccessIssue]
        return wrapped.requires_grad_()


def unwrapped(tensor: Tensor, level: int) -> Tensor:
    """A result of a level as a value of the level below."""
    return functorch._unwrap_for_grad(tensor, level)  # pyright: ignore[reportAttributeAccessIssue]


def unrecorded() -> AbstractContextManager:
    """`torch.no_grad()`, where no outer transform has to see what is computed."""
    return torch.no_grad() if functorch_level() is None else nullcontext()


_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # pyright: ignore[reportAttributeAccessIssue]


def saved_tensors_are_hooked(own: tuple[Callable, Callable] | None = None) -> bool:
    """Whether what autograd saves goes through hooks that are not our own: checkpointing, offloading.

    True as well where torch does not tell.
    """
    return _top_hooks is None or _top_hooks(False) not in (None, own)


_OUTSIDE = (
    "torch.compile records dot products, norms, Gram matrices, clipped sums, projections and streams (ghost_quantities "
    "and the calls of one of them), and no other call. Make this one outside of the compiled function."
)


def refuse_compiling() -> None:
    """Raise where Dynamo reads a call that it is not to read."""
    if torch.compiler.is_dynamo_compiling():
        raise RuntimeError(_OUTSIDE)


def uncompiled() -> AbstractContextManager:
    """What `torch.compile` has made of a module or a function runs as it was written, for the interpreter to see."""
    refuse_compiling()
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):  # since torch 2.6
        return nullcontext()
    try:
        return torch.compiler.set_stance("force_eager")
    except RuntimeError as error:  # between two parts of a compiled function
        raise RuntimeError(_OUTSIDE) from error


def readable(tensor: Tensor) -> bool:
    """Whether a tensor has values that can be looked at: not under `vmap`, nor while a compiler traces."""
    while functorch.is_functorch_wrapped_tensor(tensor):  # pyright: ignore[reportAttributeAccessIssue]
        if functorch.is_batchedtensor(tensor):  # pyright: ignore[reportAttributeAccessIssue]
            return False
        tensor = functorch.get_unwrapped(tensor)  # pyright: ignore[reportAttributeAccessIssue]
    return not recorded(tensor)


def with_values(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A function that computes with values even while a compiler records; what it makes is a constant there."""

    @wraps(function)
    def computing(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not torch._C._len_torch_dispatch_stack():
            return function(*args, **kwargs)
        with _disable_current_modes():
            return function(*args, **kwargs)

    return computing


def recorded(tensor: Tensor) -> bool:
    """Whether a compiler records what is done with a tensor, which has no values yet."""
    return isinstance(tensor, (FakeTensor, FunctionalTensor))
