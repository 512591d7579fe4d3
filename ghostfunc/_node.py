"""The node of a compiled graph that a transform's call is: the eager code, recorded with tensors that have no values.

An error of the recording stays in the graph, and the compiled call raises it: Dynamo would raise its own instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakValueDictionary

import torch._dynamo
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ghostfunc import _transforms as transforms
from ghostfunc._compile import packed
from ghostfunc._errors import UnsupportedUse
from ghostfunc._graph_ops import refused
from ghostfunc._nesting import recorded

_objects: WeakValueDictionary[int, Any] = WeakValueDictionary()


@torch._dynamo.assume_constant_result
def remember(value: Any) -> None:
    """Keep a function or a module for the node, which can be given no more than its id."""
    _objects[id(value)] = value


@torch._dynamo.nonstrict_trace
def node(
    name: str,
    place: int,
    modes: tuple[bool, ...],
    states: list[tuple[int, dict[str, Tensor]]],
    params: Mapping[str, Tensor],
    batches: tuple[Any, ...],
    options: dict[str, Any],
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
        preconditioned: whether there is a precondition, which is not among the options.

    Returns:
        What the transform returns, packed. If it fails while a compiler records it, tensors that raise.
    """
    transform = getattr(transforms, name).__wrapped__
    if isinstance(options.get("layers"), tuple):
        options = {**options, "layers": frozenset(options["layers"]).__contains__}
    call = inspect.signature(transform).bind(_objects[place], params, *batches, **options)
    call.apply_defaults()
    wraps = name == "value_and_grad_dot"
    try:
        if preconditioned:
            raise UnsupportedUse(
                "precondition reads the state of an optimizer, which a compiled graph would keep as it was. Make the "
                "direction outside of torch.compile, and pass it to ghost_grad_along."
            )
        if axes := [axis for axis in options.get("out", "").split() if axis in ("token", "layer", "head")]:
            raise UnsupportedUse(
                f"out={options['out']!r}: torch.compile does not record the axis {axes[0]!r}. Make the call outside of "
                "the compiled function."
            )
        result = _with_states(lambda: transform(*call.args, **call.kwargs), states)
        return packed(result, call.arguments["has_aux"]) if wraps else result
    except Exception as error:
        if not any(map(recorded, params.values())):
            raise
        _forget_unknown_sizes(params)
        return _raising(error, _similar(call.arguments, wraps))


def _raising(error: Exception, result: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda tensor: refused(tensor, error), result)


def _forget_unknown_sizes(params: Mapping[str, Tensor]) -> None:
    """Take back the symbols of a recording that failed, which Dynamo would look for in its results."""
    mode = detect_fake_mode(list(params.values()))
    if mode is not None and mode.shape_env is not None:
        mode.shape_env.pending_fresh_unbacked_symbols.clear()


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


def _similar(arguments: Mapping[str, Any], wraps: bool) -> Any:
    """Tensors of the shapes that a transform's results have for these arguments."""
    params = dict(arguments["params"])
    like = next(iter(params.values()))
    sizes = {what: _size(arguments[what]) for what in ("train", "val", "batch") if what in arguments}
    n = sizes.get("train", sizes.get("batch", 1))
    axes = arguments["out"].split()
    sizes |= {"sample": n, "train": n}
    shape = [sizes[axis] for axis in axes if axis in sizes]
    dots: Any = like.new_zeros(shape)
    if "param" in axes:
        dots = {name: like.new_zeros(shape) for name in params}
    if wraps:
        losses = like.new_zeros(n), like.new_zeros(sizes["val"])
        return (*losses, {name: torch.zeros_like(p) for name, p in params.items()}, dots), {}, ()
    return (dots, ()) if arguments["has_aux"] else dots


def _size(batch: Any) -> int:
    return next((len(leaf) for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()), 1)
