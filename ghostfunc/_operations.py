"""What an operation is called, which tensors it takes, and whether it writes: read off its function and arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import (
    BuiltinFunctionType,
    FunctionType,
    GetSetDescriptorType,
    MethodDescriptorType,
    MethodWrapperType,
    ModuleType,
    NoneType,
    WrapperDescriptorType,
)
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

LIKE_ANOTHER = frozenset("to type_as expand_as view_as reshape_as".split())  # the second argument gives no data


_PROPERTIES = """
    shape dtype device ndim layout requires_grad is_leaf is_cuda is_cpu is_mps is_meta is_sparse is_quantized itemsize
    nbytes
""".split()
_METHODS = """
    size dim numel nelement ndimension stride storage_offset element_size is_contiguous is_floating_point is_complex
    __len__
""".split()
# What a model asks of a tensor all the time, and what is no tensor: neither a use of a parameter nor data.
READS = frozenset(
    [
        *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
        *(getattr(Tensor, name) for name in _METHODS),
        *(torch.numel, torch.is_floating_point, torch.is_complex),
    ]
)


class Operation(NamedTuple):
    """What a function's name tells.

    Attributes:
        name: one for `torch.add`, `Tensor.add`, `Tensor.add_` and `Tensor.__add__`; "get_T" for the property `T`.
        in_place: whether it writes to its first argument.
    """

    name: str
    in_place: bool


_known: dict[Callable, Operation] = {}


def operation(func: Callable) -> Operation:
    """What a function's name tells, read once for each of torch's own."""
    known = _known.get(func)
    if known is None:
        name = func.__name__
        in_place = (name.endswith("_") and not name.endswith("__")) or (name.startswith("__i") and name != "__invert__")
        name = "get_" + func.__self__.__name__ if name == "__get__" else name.strip("_")  # type: ignore[attr-defined]
        known = Operation(name, in_place)
        if _outlives_a_call(func):
            _known[func] = known
    return known


def _outlives_a_call(func: Callable) -> bool:
    """Whether a function is there as long as torch is, and holds no tensor."""
    if isinstance(func, FunctionType):
        return func.__closure__ is None and (func.__module__ or "").partition(".")[0] == "torch"
    of_torch = (BuiltinFunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType)
    bound_to = (NoneType, ModuleType, GetSetDescriptorType)
    return isinstance(func, of_torch) and isinstance(getattr(func, "__self__", None), bound_to)


_CONTAINERS = (tuple, list, dict)


def op_name(func: Callable) -> str:
    """The name of an operation."""
    return operation(func).name


def is_in_place(func: Callable) -> bool:
    """Whether a function writes to its first argument."""
    return operation(func).in_place


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors among arguments, inside lists, tuples and dicts too."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, _CONTAINERS):
            found += tensors_in(value.values() if isinstance(value, dict) else value)
    return found


def with_leaves(function: Callable[[Any], Any], args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The arguments of an operation with each of their leaves as a function gives it."""
    if any(isinstance(value, _CONTAINERS) for value in (*args, *kwargs.values())):
        return pytree.tree_map(function, (tuple(args), kwargs))
    return tuple(map(function, args)), {name: function(value) for name, value in kwargs.items()}


def einsum_letters(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """The letters of an einsum's operands and of its result, with `...` and an implicit result written out."""
    equation = equation.replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    used = set(equation)
    spare = [c for c in map(chr, range(ord("A"), ord("A") + 400)) if c not in used and c.isalpha()]
    widest = max((rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)), default=0)
    dots = spare[: max(widest, 0)]
    written = []
    for term, rank in zip(terms, ranks, strict=True):
        count = rank - len(term.replace("...", ""))
        written.append(term.replace("...", "".join(dots[len(dots) - count :])))
    if not arrow:
        joined = left.replace("...", "").replace(",", "")
        right = "..." * ("..." in left) + "".join(sorted(c for c in set(joined) if joined.count(c) == 1))
    return written, right.replace("...", "".join(dots))


def as_autocast(x: Tensor) -> Tensor:
    """A factor's activation as the product sees it, which autocast would cast."""
    dtype = dtype_of_product(x)
    return x if x.dtype == dtype else x.to(dtype)


def dtype_of_product(x: Tensor) -> torch.dtype:
    """The dtype of a tensor in a product: under autocast its own, for all dtypes but float64."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
