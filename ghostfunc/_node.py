"""The node of a compiled graph that a transform's call is: the eager code, recorded with tensors that have no values.

An error of the recording stays in the graph, and the compiled call raises it: Dynamo would raise its own instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import FunctionType
from typing import Any
from weakref import WeakValueDictionary

import torch._dynamo
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ghostfunc import _quantities as quantities
from ghostfunc._axes import GROUPS, layers_by_name, parse, positions_of
from ghostfunc._compile import ARGUMENTS, TRANSFORMS, packed
from ghostfunc._dots import ALL_AXES
from ghostfunc._errors import UnsupportedUse
from ghostfunc._graph_ops import refused
from ghostfunc._nesting import recorded

_objects: WeakValueDictionary[int, Any] = WeakValueDictionary()


@torch._dynamo.assume_constant_result
def remember(value: Any) -> None:
    """Keep a function or a module for the node, which can be given no more than its id."""
    _objects[id(value)] = value


@torch._dynamo.assume_constant_result
def globals_of(function: FunctionType) -> tuple[str, ...]:
    """The globals that a function names; here, for Dynamo would guard on every key, and a new global record anew."""
    return tuple(name for name in function.__code__.co_names if name in function.__globals__)


@torch._dynamo.nonstrict_trace
def node(
    name: str,
    place: int,
    modes: tuple[bool, ...],
    states: list[tuple[int, dict[str, Tensor]]],
    params: Mapping[str, Tensor],
    batches: tuple[Any, ...],
    options: dict[str, Any],
    want: dict[str, tuple[str, dict[str, Any]]],
    preconditioned: bool,
) -> Any:
    """A transform's call.

    Args:
        name: the transform's name.
        place: the id of `model_fn`.
        modes: whether each module is in training mode; here so that a change is recorded anew.
        states: for each module behind `model_fn`, its id and its tensors that are not in `params`, by name.
        params: parameters by name.
        batches: the transform's other positional arguments.
        options: its keyword arguments, layers as a tuple of names where they were given by a function.
        want: the quantities, each as its kind and its fields; under "" what an argument of the transform is of.
        preconditioned: whether there is a precondition, which is not among the options.

    Returns:
        What the transform returns, packed. If it fails while a compiler records it, tensors that raise.
    """
    for tensor in pytree.tree_leaves((states, params, batches, options, want)):
        _fix_sizes(tensor)
    transform = TRANSFORMS[name]
    if isinstance(options.get("layers"), tuple):
        options = {**options, "layers": frozenset(options["layers"]).__contains__}
    if isinstance(options.get("layer_of"), dict):
        options = {**options, "layer_of": options["layer_of"].__getitem__}
    wanted = {key: _quantity(kind, fields) for key, (kind, fields) in want.items()}
    if name == "ghost_quantities":
        options = {**options, "want": wanted}
    elif name in ARGUMENTS:
        argument, _ = ARGUMENTS[name]
        options = {**options, argument: getattr(wanted[""], argument)}
    call = inspect.signature(transform).bind(_objects[place], params, *batches, **options)
    call.apply_defaults()
    has_aux = call.arguments["has_aux"]
    try:
        if preconditioned:
            raise UnsupportedUse(
                "precondition reads the state of an optimizer, which a compiled graph would keep as it was. Make the "
                "direction outside of torch.compile, and pass it to ghost_grad_along."
            )
        if axes := [axis for axis in call.arguments.get("out", "").split() if axis in ("token", "head")]:
            raise UnsupportedUse(
                f"out={call.arguments['out']!r}: torch.compile does not record the axis {axes[0]!r}. Make the call "
                "outside of the compiled function."
            )
        return packed(name, _with_states(lambda: transform(*call.args, **call.kwargs), states), has_aux)
    except Exception as error:
        if not any(map(recorded, params.values())):
            raise
        _forget_unknown_sizes(params)
        return _raising(error, _similar(name, call.arguments, wanted))


def _fix_sizes(value: Any) -> None:
    """Let the graph be of these sizes and no others, where it was asked for with sizes that are symbols.

    A plan is made of numbers: how many samples a loop has, which order of a product is the cheapest, what fits a tile.
    """
    if isinstance(value, Tensor):
        for size in value.shape:
            int(size)


def _quantity(kind: str, fields: dict[str, Any]) -> Any:
    """A quantity from what the node was given of it."""
    fields = dict(fields)
    if kind == "Stream":
        fields["function"] = _objects[fields["function"]]
    if kind == "Project":
        projection, matrices = _objects[fields["projection"]], fields.pop("matrices")
        parts = {name: part._replace(p_in=matrices[name][0], p_out=matrices[name][1])
                 for name, part in projection.parts.items()}  # fmt: skip
        fields["projection"] = replace(projection, parts=parts)
    if isinstance(fields.get("layer_of"), dict):
        fields["layer_of"] = fields["layer_of"].__getitem__
    return getattr(quantities, kind)(**fields)


# ---------------------------------------------------------------- errors of the recording


def _raising(error: Exception, result: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda tensor: refused(tensor, error), result)


def _forget_unknown_sizes(params: Mapping[str, Tensor]) -> None:
    """Take back the symbols of a recording that failed, which Dynamo would look for in its results."""
    mode = detect_fake_mode(list(params.values()))
    if mode is not None and mode.shape_env is not None:
        mode.shape_env.pending_fresh_unbacked_symbols.clear()


def _similar(name: str, arguments: Mapping[str, Any], wanted: Mapping[str, Any]) -> Any:
    """Tensors of the shapes that a transform's results have for these arguments, packed."""
    params = dict(arguments["params"])
    like = next(iter(params.values()))
    train = arguments.get("train", arguments.get("batch"))
    val = arguments.get("val", arguments.get("other"))
    sizes = {"train": _size(train), "val": _size(val), "other": _size(train if val is None else val)}
    losses, val_losses = like.new_zeros(sizes["train"]), like.new_zeros(sizes["val"])
    zeros = {key: torch.zeros_like(p) for key, p in params.items()}

    def of_axes(out: str, layer_of: Any) -> Any:
        axes = parse(out, (*ALL_AXES, "other"))
        shape = [_length(axis, sizes, train) for axis in axes.tensor]
        if not axes.group:
            return like.new_zeros(shape)
        keys = list(params) if axes.group == GROUPS[0] else layers_by_name(params, layer_of).values()
        return {key: like.new_zeros(shape) for key in keys}

    def of(quantity: Any) -> Any:
        if isinstance(quantity, quantities.Project):
            return like.new_zeros(sizes["train"], quantity.projection.dim)
        if isinstance(quantity, quantities.Clip):
            norms = quantity.max_norm
            return zeros, dict.fromkeys(norms, losses) if isinstance(norms, Mapping) else losses, losses
        return (
            like.new_zeros(()) if isinstance(quantity, quantities.Stream) else of_axes(quantity.out, quantity.layer_of)
        )

    if name == "ghost_quantities":
        values = {key: of(quantity) for key, quantity in wanted.items()}
        return (losses, () if val is None else val_losses, zeros, values), {}, ()
    if name == "val_gradient":
        return (val_losses, zeros), (), ()
    if name == "ghost_clipped_grad":
        return of(quantities.Clip(arguments["max_norm"])), (), ()
    if name in ARGUMENTS:
        return of(wanted[""]), (), ()
    dots = of_axes(arguments["out"], arguments["layer_of"])
    return ((losses, val_losses, zeros, dots), {}, ()) if name == "value_and_grad_dot" else (dots, (), ())


def _length(axis: str, sizes: Mapping[str, int], train: Any) -> int:
    """The length of an axis; of heads, whose number is not known here, one."""
    return sizes[axis] if axis in sizes else positions_of(train) if axis == "token" else 1


def _size(batch: Any) -> int:
    return next((len(leaf) for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()), 1)


# ---------------------------------------------------------------- the state of modules


class _Around(nn.Module):
    """A module whose forward is any function, so that `functional_call` can swap a module's tensors around it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


def _with_states(function: Callable[[], Any], states: list[tuple[int, dict[str, Tensor]]]) -> Any:
    """Call a function while modules hold the tensors that the graph has as inputs."""
    if not states:
        return function()
    (place, state), *others = states
    swapped = {f"module.{name}": tensor for name, tensor in state.items()}
    return functional_call(_Around(_objects[place]), swapped, (lambda: _with_states(function, others),))
