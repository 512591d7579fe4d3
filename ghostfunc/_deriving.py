"""Tensors that are derived from parameters without data: casts, transposes, masks, sums of parameters.

Each is tracked like a parameter, under the names of those that it comes from, with the operation that made it
(`Derivation`), through which factors are pulled back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils import _pytree as pytree

from ghostfunc._errors import UnsupportedUse
from ghostfunc._operations import is_in_place, op_name, tensors_in, with_leaves
from ghostfunc._randomness import MAY_DRAW
from ghostfunc._sites import ISOMETRIES, Derivation, Tracked

if TYPE_CHECKING:
    from ghostfunc._interpreter import Interpreter


def derive(mode: Interpreter, func: Callable, args: Any, kwargs: Any, tracked: list[Tracked]) -> Any:
    """Run an operation on parameters without data: what comes out is tracked as they are, and knows how it was made."""
    if is_in_place(func) or op_name(func) == "setitem":
        return _derive_in_place(mode, func, args, kwargs, tracked)
    real_args, real_kwargs = with_leaves(mode.real, args, kwargs)
    randomness = mode.random_state(op_name(func), args, kwargs)
    out = func(*real_args, **real_kwargs)
    results = tensors_in([out])
    if mode.nested:
        of_sentinels = func(*args, **kwargs) if randomness is None else randomness.replay(func, *args, **kwargs)
    differentiable = [r.requires_grad for r in (tensors_in([of_sentinels]) if mode.nested else results)]
    if not any(differentiable):
        return out
    single = isinstance(out, Tensor)
    if not single and len(pytree.tree_leaves(out)) < len(results):  # results in a container that cannot be opened
        return func(*args, **kwargs)
    recipe_args, recipe_kwargs = with_leaves(
        lambda leaf: mode.find(leaf) or (leaf.detach() if isinstance(leaf, Tensor) else leaf), args, kwargs
    )
    names = tuple(dict.fromkeys(name for t in tracked for name in t.names))
    replacements: dict[int, Tensor] = {}
    for index, result in enumerate(results):
        same = next((t for t in tracked if t.real is result or (t.shard and t.shard.gave(result))), None)
        if same is not None:
            replacements[id(result)] = same.sentinel
        elif differentiable[index]:
            isometric = (
                len(tracked) == 1
                and tracked[0].isometric
                and op_name(func) in ISOMETRIES
                and result.numel() == tracked[0].real.numel()
            )
            how = Derivation(func, recipe_args, recipe_kwargs, index, 0 if single else len(results), randomness)
            derived = mode.track(Tracked(names, mode.leaf(result), result, how, isometric))
            replacements[id(result)] = derived.sentinel
    if single:
        return replacements.get(id(out), out)
    return pytree.tree_map(lambda leaf: replacements.get(id(leaf), leaf), out)


def _derive_in_place(mode: Interpreter, func: Callable, args: Any, kwargs: Any, tracked: list[Tracked]) -> Any:
    """A write to a derived tensor: what it holds afterwards is derived anew, under the same name."""
    written = mode.find(args[0])
    if written is None:
        return func(*args, **kwargs)  # on the sentinels: the backward will find them
    for other in _in_the_same_memory(written, mode.tracked):
        other.stale = f"`{op_name(func)}` wrote to a view of it"

    def on_a_copy(first: Tensor, *more: Any, **kwargs: Any) -> Tensor:
        copy = first.clone()
        func(copy, *more, **kwargs)
        return copy

    if op_name(func) in MAY_DRAW:  # by this name its draws are known
        on_a_copy.__name__ = op_name(func)
    anew = derive(mode, on_a_copy, args, kwargs, tracked)
    now = mode.find(anew)
    if now is None:
        return func(*args, **kwargs)
    mode.stand_for(now, args[0])
    now.sentinel.data = now.real.detach()
    return args[0]


def is_memory_of_a_parameter(written: Tracked, tracked: list[Tracked]) -> bool:
    """Whether a tracked tensor is a parameter, or a view of one."""
    if any(t.shard is not None and t.shard.gave(written.real._base) for t in tracked):
        return True
    return any(t.derivation is None for t in (written, *_in_the_same_memory(written, tracked)))


def refuse_write(name: str, written: Tracked) -> None:
    """Raise for a write to a parameter."""
    raise UnsupportedUse(
        f"{', '.join(written.names)}: `{name}` writes to a parameter, or a view of one, of shape "
        f"{tuple(written.real.shape)}. Write to a copy (clone()).",
        written.names,
    )


def _in_the_same_memory(written: Tracked, tracked: list[Tracked]) -> list[Tracked]:
    storage = written.real.untyped_storage().data_ptr()
    return [t for t in tracked if t is not written and t.real.untyped_storage().data_ptr() == storage]


def refuse_stale(name: str, tracked: list[Tracked]) -> None:
    """Raise for a use of a derived tensor whose memory was written to since."""
    for t in tracked:
        if t.stale:
            raise UnsupportedUse(
                f"{', '.join(t.names)}: `{name}` uses a tensor of shape {tuple(t.real.shape)} derived from it "
                f"after {t.stale}. Write to a copy (clone()).",
                t.names,
            )
