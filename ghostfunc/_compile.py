"""torch.compile of the transforms: each call is one node of the graph, which Dynamo does not look into.

Dynamo reads this module alone. It guards on what the eager code takes from Python (`model_fn`, the options, whether
each module is in training mode), and makes every tensor an input of the graph (parameters, batches, and the frozen
parameters and buffers of the modules that `model_fn` closes over). Behind the node (`_node`) is the eager code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, wraps
from types import FunctionType, MethodType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

import ghostfunc._graph_ops  # noqa: F401  registers what the recorded code calls
from ghostfunc._functionalize import _Call

RECORDS = torch.__version__ >= "2.13"  # whether this torch has what it takes; in older ones it was not tested

_P = ParamSpec("_P")
_R = TypeVar("_R")


def one_node(transform: Callable[_P, _R]) -> Callable[_P, _R]:
    """A transform that is one node of the graph where `torch.compile` meets it, and as it was elsewhere."""

    @wraps(transform)
    def public(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.compiler.is_dynamo_compiling():
            return _as_node(transform.__name__, *args, **kwargs)  # pyright: ignore[reportCallIssue]
        return transform(*args, **kwargs)

    return public


def _as_node(name: str, model_fn: Callable, params: Mapping[str, Tensor], *batches: Any, **options: Any) -> Any:
    if not RECORDS:
        raise RuntimeError(f"torch.compile of {name} needs torch 2.13; this is {torch.__version__}. Call it outside.")
    from ghostfunc._node import node, remember  # here, for torch._dynamo takes seconds to import

    if options.pop("group", None) is not None:
        raise RuntimeError(f"torch.compile of {name} with a group= is not supported. Call it outside.")
    if isinstance(model_fn, (MethodType, partial)):
        raise RuntimeError(
            "model_fn is a bound method or a partial, on which torch.compile cannot guard. Pass a function, or an "
            "object with __call__, made outside of the compiled function."
        )
    place = id(model_fn)  # lets Dynamo guard on the object
    remember(model_fn)
    layers = options.get("layers", "")
    if callable(layers):
        options["layers"] = tuple([key for key in params if layers(key)])
    preconditioned = options.pop("precondition", None) is not None
    modules = _modules_behind(model_fn)
    for module in modules:
        remember(module)
    states = [(id(module), _state(module, params)) for module in modules]
    modes = tuple([part.training for module in modules for part in module.modules()])
    result = node(name, place, modes, states, params, batches, options, preconditioned)
    return _unpacked(result, options.get("has_aux", False)) if name == "value_and_grad_dot" else result


def packed(result: Any, has_aux: bool) -> Any:
    """The result of `value_and_grad_dot` as containers that can leave the node: names are keys there, not values."""
    values, aux = result if has_aux else (result, ())
    return tuple(values), dict.fromkeys(values.unused, ()), aux


def _unpacked(result: Any, has_aux: bool) -> Any:
    from ghostfunc._dots import ValueAndGradDot

    fields, unused, aux = result
    values = ValueAndGradDot(*fields)
    values.unused = tuple(unused)
    return (values, aux) if has_aux else values


def _modules_behind(model_fn: Callable) -> list[nn.Module]:
    """The modules that a function closes over or names, and those of the functions that it closes over."""
    functions: list[Any] = [model_fn]
    modules: list[nn.Module] = []
    for function in functions:
        if isinstance(function, nn.Module):
            modules.append(function)
        elif isinstance(function, FunctionType):
            inner = [cell.cell_contents for cell in function.__closure__ or ()]
            named = [function.__globals__.get(name) for name in function.__code__.co_names]
            found = [value for value in (*inner, *named) if isinstance(value, nn.Module)]
            modules += [value.module if isinstance(value, _Call) else value for value in found]
            functions += [f for f in inner if isinstance(f, FunctionType) and not any(f is g for g in functions)]
    parts = [part for module in modules for part in module.modules() if part is not module]
    return [m for k, m in enumerate(modules) if not any(m is other for other in (*parts, *modules[:k]))]


def _state(module: nn.Module, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a module that are not among the parameters of the call, by name."""
    state: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if name not in params}
    state.update(module.named_buffers())
    return state
