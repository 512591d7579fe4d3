"""torch.compile of the transforms: each call is one node of the graph, which Dynamo does not look into.

Dynamo reads this module alone. It guards on what the eager code takes from Python (`model_fn`, the options, whether
each module is in training mode), and makes every tensor an input of the graph (parameters, batches, and the frozen
parameters and buffers of the modules that `model_fn` closes over). Behind the node (`_node`) is the eager code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial, wraps
from types import FunctionType, MethodType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

import ghostfunc._graph_ops  # noqa: F401  registers what the recorded code calls
from ghostfunc._functionalize import _Call
from ghostfunc._kronecker import KroneckerProjection
from ghostfunc._quantities import Along, Clip, Dot, Gram, Norm, Project, Stream

RECORDS = torch.__version__ >= "2.13"  # whether this torch has what it takes; in older ones it was not tested
TRANSFORMS: dict[str, Callable] = {}  # what a node calls, by name

_P = ParamSpec("_P")
_R = TypeVar("_R")


def one_node(transform: Callable[_P, _R]) -> Callable[_P, _R]:
    """A transform that is one node of the graph where `torch.compile` meets it, and as it was elsewhere."""
    TRANSFORMS[transform.__name__] = transform

    @wraps(transform)
    def public(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.compiler.is_dynamo_compiling():
            return _as_node(transform.__name__, *args, **kwargs)  # pyright: ignore[reportCallIssue]
        if kwargs.get("group") is not None and "torch._dynamo" in sys.modules:
            # Dynamo is not to record what ranks exchange.
            return torch.compiler.disable(transform)(*args, **kwargs)  # pyright: ignore[reportCallIssue]
        return transform(*args, **kwargs)

    return public


def _as_node(name: str, model_fn: Callable, params: Mapping[str, Tensor], *batches: Any, **options: Any) -> Any:
    if not RECORDS:
        raise RuntimeError(f"torch.compile of {name} needs torch 2.13; this is {torch.__version__}. Call it outside.")
    from ghostfunc._node import node, remember  # here, for torch._dynamo takes seconds to import

    if options.pop("group", None) is not None:
        raise RuntimeError(f"torch.compile of {name} with a group= is not supported. Call it outside.")
    if options.pop("rank", None) is not None:
        raise RuntimeError(
            f"torch.compile of {name} with rank= is not supported: orthonormal bases are no part of a graph that is as "
            "fast as the eager code. Call it outside, or leave rank= out."
        )
    if isinstance(model_fn, (MethodType, partial)):
        raise RuntimeError(
            "model_fn is a bound method or a partial, on which torch.compile cannot guard. Pass a function, or an "
            "object with __call__, made outside of the compiled function."
        )
    batches = tuple([_fixed(value) for value in batches])
    options = {key: _fixed(value) for key, value in options.items()}
    place = id(model_fn)  # lets Dynamo guard on the object
    remember(model_fn)
    layers = options.get("layers", "")
    if callable(layers):
        options["layers"] = tuple([key for key in params if layers(key)])
    if "layer_of" in options:
        options["layer_of"] = _layers(options["layer_of"], params)
    if name in ARGUMENTS:
        argument, described = ARGUMENTS[name]
        value = options.pop(argument) if argument in options else batches[1]
        batches, want = batches[:1], {"": described(value)}
    else:
        want = {key: _described(key, quantity, params) for key, quantity in options.pop("want", {}).items()}
    clips = tuple([key for key, (kind, _) in want.items() if kind == "Clip"])
    preconditioned = options.pop("precondition", None) is not None
    modules = _modules_behind(model_fn)
    for module in modules:
        remember(module)
    states = [(id(module), _state(module, params)) for module in modules]
    modes = tuple([part.training for module in modules for part in module.modules()])
    result = node(name, place, modes, states, params, batches, options, want, preconditioned)
    return _unpacked(name, result, clips, options.get("has_aux", False))


# ---------------------------------------------------------------- what goes into the node


def _fixed(value: Any) -> Any:
    """Numbers as what Dynamo guards on, as it does on the keys of a dict: one that changes would become a symbol."""
    if type(value) is dict:
        return {key: _fixed(part) for key, part in value.items()}
    return next(iter({value: ()})) if isinstance(value, (int, float)) else value


def _layers(layer_of: Any, params: Mapping[str, Tensor]) -> Any:
    """An expression as it is; a function, which the node cannot be given, as what it says of each parameter."""
    return {name: layer_of(name) for name in params} if callable(layer_of) else layer_of


def _described(key: str, quantity: Any, params: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """A quantity as its kind and its fields, of which the node can be given tensors, numbers, strings and ids."""
    if isinstance(quantity, Stream):
        kind, fields = _of_function(quantity.function)
        return kind, {**fields, "out": quantity.out}
    if isinstance(quantity, Project):
        return _of_projection(quantity.projection)
    if isinstance(quantity, Clip):
        return "Clip", {"max_norm": _fixed(quantity.max_norm)}
    if not isinstance(quantity, (Dot, Along, Gram, Norm)):
        raise TypeError(f"want[{key!r}] is none of Dot, Along, Gram, Norm, Project, Clip and Stream.")
    fields = {"out": quantity.out, "layer_of": _layers(quantity.layer_of, params)}
    if isinstance(quantity, Dot):
        fields["reduction"] = quantity.reduction
    if isinstance(quantity, Along):
        fields["direction"] = dict(quantity.direction)
    return type(quantity).__name__, fields


def _of_function(function: Callable) -> tuple[str, dict[str, Any]]:
    from ghostfunc._node import remember

    remember(function)
    return "Stream", {"function": id(function)}


def _of_projection(projection: KroneckerProjection) -> tuple[str, dict[str, Any]]:
    from ghostfunc._node import remember

    remember(projection)
    matrices = {name: (part.p_in, part.p_out) for name, part in projection.parts.items()}
    return "Project", {"projection": id(projection), "matrices": matrices}


# for calls that take what is in one quantity: the argument's name
ARGUMENTS = {"ghost_grad_proj": ("projection", _of_projection), "ghost_grad_stream": ("function", _of_function)}


# ---------------------------------------------------------------- what comes out of it


def packed(name: str, result: Any, has_aux: bool) -> Any:
    """A transform's result as containers that can leave the node: names are keys there, not values."""
    if name == "ghost_quantities":
        values = {key: _packed_clip(value) for key, value in result.values.items()}
        val_losses = () if result.val_losses is None else result.val_losses  # None cannot leave the node
        fields = (result.losses, val_losses, result.grads, values)
        return fields, dict.fromkeys(result.unused, ()), result.aux if has_aux else ()
    if name == "val_gradient":
        return tuple(result), (), ()
    values, aux = result if has_aux else (result, ())
    if name == "value_and_grad_dot":
        return tuple(values), dict.fromkeys(values.unused, ()), aux
    return _packed_clip(values), (), aux


def _packed_clip(value: Any) -> Any:
    from ghostfunc._many import ClippedGrad

    return (*value, value.losses) if isinstance(value, ClippedGrad) else value


def _unpacked(name: str, result: Any, clips: tuple[str, ...], has_aux: bool) -> Any:
    from ghostfunc._dots import ValGradient, ValueAndGradDot
    from ghostfunc._many import Quantities

    values, unused, aux = result
    if name == "ghost_quantities":
        losses, val_losses, grads, found = values
        found = {key: _clipped(value) if key in clips else value for key, value in found.items()}
        val_losses = val_losses if isinstance(val_losses, Tensor) else None
        result = Quantities.__new__(Quantities)  # where annotations are checked, Dynamo cannot read its __init__
        result.losses, result.val_losses, result.grads, result.values = losses, val_losses, grads, found
        result.unused, result.aux = tuple(unused), aux if has_aux else None
        return result
    if name == "val_gradient":
        return ValGradient(*values)
    if name == "ghost_clipped_grad":
        values = _clipped(values)
    if name == "value_and_grad_dot":
        values = ValueAndGradDot(*values)
        values.unused = tuple(unused)
    return (values, aux) if has_aux else values


def _clipped(fields: Any) -> Any:
    from ghostfunc._many import ClippedGrad

    grads, norms, losses = fields
    clipped = ClippedGrad(grads, norms)
    clipped.losses = losses
    return clipped


# ---------------------------------------------------------------- what model_fn reads


def _modules_behind(model_fn: Callable) -> list[nn.Module]:
    """The modules that a function closes over or names, and those of the functions that it closes over."""
    from ghostfunc._node import globals_of

    functions: list[Any] = [model_fn]
    modules: list[nn.Module] = []
    for function in functions:
        if isinstance(function, nn.Module):
            modules.append(function)
        elif isinstance(function, FunctionType):
            inner = [cell.cell_contents for cell in function.__closure__ or ()]
            named = [function.__globals__[name] for name in globals_of(function)]
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
