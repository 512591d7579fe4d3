"""TracIn: dot products of gradients, over the checkpoints of a training run.

    mean_k <grad l_i(theta_k), V(theta_k)>                  without learning rates
    sum_k eta_k <grad l_i(theta_k), V(theta_k)>             TracInCP, with them

V is the gradient of the mean (or summed) validation loss at the same checkpoint. (Pruthi et al., 2020, arXiv
2002.08484, section 3.2, for one test example; V is linear in them.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from os import PathLike, fspath
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ghostfunc._batch import batch_size, plain
from ghostfunc._call import Params
from ghostfunc._functionalize import ModelFn
from ghostfunc._operations import tensors_in
from ghostfunc._randomness import RandomState
from ghostfunc._ranks import Ranks
from ghostfunc._sharded import group_of
from ghostfunc._transforms import ghost_grad_dot

Checkpoint = Params | str | PathLike
Dots = Any
_BACKWARD = 3  # a backward under vmap keeps activations, their gradients and the factors
_STACKABLE_BYTES = 256 << 20


class TracIn(NamedTuple):
    """What `tracin` returns.

    Attributes:
        dots: in the axes of `out`, averaged or weighted over checkpoints.
        checkpoints: how many there were.
        method: "vmap" or "loop", whichever ran.
    """

    dots: Dots
    checkpoints: int
    method: str


def tracin(
    model_fn: ModelFn,
    checkpoints: Iterable[Checkpoint] | Params,
    train: Any,
    val: Any,
    *,
    learning_rates: Sequence[float] | Tensor | None = None,
    params: Params | None = None,
    method: str = "auto",
    memory: int = _STACKABLE_BYTES,
    **options: Any,
) -> TracIn:
    """Dot products of each train sample's gradient with the validation gradient, over checkpoints (TracIn).

    dots[i] = mean_k <grad l_i, mean_j grad l_j> at checkpoint k; with learning rates, sum_k eta_k <...> (TracInCP,
    arXiv 2002.08484, section 3.2): what plain gradient steps on sample i alone, one at each checkpoint, take off the
    validation loss, to first order. Positive is helpful. Nothing is divided by the number of train samples.

    Args:
        model_fn: `model_fn(params, batch) -> losses[B]`.
        checkpoints: parameters at each checkpoint: an iterable of dicts like `params`, or of paths to safetensors
            files, of which one is in memory at a time; or a stacked dict `{name: [K, *shape]}`.
        train: a pytree of tensors `[n, ...]`.
        val: a pytree of tensors `[m, ...]`.
        learning_rates: K numbers, one for each checkpoint: the sum of them times its dots. By default the mean.
        params: what `functionalize` gives: every checkpoint must have these names and shapes. By default the first
            checkpoint's, whose names are then not compared with the model's. Files go to the parameters' device, by
            default the train batch's.
        method: "vmap": all checkpoints at once; "loop": one after the other; "auto": vmap for checkpoints in memory
            (a stacked dict, a list or tuple of dicts) that fit `memory`, draw no random numbers and run under vmap.
        memory: bytes that "auto" lets vmap take, by an estimate from one forward.
        **options: of `ghost_grad_dot` at each checkpoint: `out`, `reduction`, `layers`, `group` and the others. With
            `has_aux`, the aux is dropped. With a group (or sharded parameters, whose ranks are one) it is the loop that
            runs, over the same checkpoints on every rank.

    Returns:
        `TracIn(dots, checkpoints, method)`, the dots in the axes of `out`.

    Raises:
        ValueError: for no checkpoint, names or shapes that differ, another number of learning rates, a file that is
            not safetensors, where method="vmap" meets a group or results that are not finite, or if ranks have
            different numbers of checkpoints.
        RuntimeError: from method="vmap", where the model does not run under vmap; see `ghost_grad_dot` for others.

    Example:
        >>> import torch, ghostfunc as gf
        >>> model_fn, params = gf.functionalize(torch.nn.Linear(4, 3), gf.classification_loss)
        >>> train = (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
        >>> val = (torch.randn(2, 4), torch.tensor([2, 0]))
        >>> checkpoints = [params, {name: 0.9 * p for name, p in params.items()}]
        >>> result = gf.tracin(model_fn, checkpoints, train, val, params=params, learning_rates=[0.1, 0.05])
        >>> result.dots.shape, result.checkpoints, result.method
        (torch.Size([5]), 2, 'vmap')
    """
    if method not in ("auto", "vmap", "loop"):
        raise ValueError(f"method={method!r}: expected 'auto', 'vmap' or 'loop'.")
    if isinstance(checkpoints, (str, PathLike)):
        raise ValueError(f"checkpoints is one path, {fspath(checkpoints)!r}; pass a list of safetensors files.")
    train, val = plain(train), plain(val)
    rates = None if learning_rates is None else _rates(learning_rates)
    device = _device(params, train)
    known = params or (_some(checkpoints) if _in_memory(checkpoints) else {})
    options["group"] = group_of(known, options.get("group"))
    ranks = Ranks.of(options["group"], device)
    if ranks is not None:
        if method == "vmap":
            raise ValueError(
                "method='vmap' with group=, or with sharded parameters: vmap does not see what ranks exchange. Use "
                "'loop' or 'auto'."
            )
        method = "loop"
    with _together(ranks):
        batch_size(train, "train")
        points = _points(checkpoints, params, device)

    def dots_of(point: Params) -> Dots:
        dots = ghost_grad_dot(model_fn, point, train, val, **options)
        return dots[0] if options.get("has_aux") else dots

    if method == "vmap" or (method == "auto" and _in_memory(checkpoints)):
        kept = list(points)
        _check_count(len(kept), rates)
        if method == "vmap" or _needed(model_fn, kept[0], train, len(kept)) <= memory:
            try:
                return TracIn(_by_vmap(dots_of, kept, rates), len(kept), "vmap")
            except (RuntimeError, _NotFinite):  # what vmap cannot run, and what ghostfunc cannot inside a transform
                if method == "vmap":
                    raise
        points = iter(kept)
    return _by_loop(dots_of, points, rates, ranks)


def _together(ranks: Ranks | None) -> AbstractContextManager[None]:
    return nullcontext() if ranks is None else ranks.together()


def _some(checkpoints: Any) -> Params:
    """The tensors of a stack of checkpoints, or of the first in a list; of an empty one none."""
    return checkpoints if isinstance(checkpoints, Mapping) else next(iter(checkpoints), {})


def _in_memory(checkpoints: Any) -> bool:
    if isinstance(checkpoints, Mapping):
        return True
    return isinstance(checkpoints, (list, tuple)) and all(isinstance(point, Mapping) for point in checkpoints)


class _NotFinite(ValueError):
    """Under vmap a result is not finite, and which loss made it so cannot be told."""


def _by_vmap(dots_of: Callable[[Params], Dots], points: list[Params], rates: list[float] | None) -> Dots:
    stacked = {name: torch.stack([point[name] for point in points]) for name in points[0]}
    dots = torch.func.vmap(dots_of, randomness="error")(stacked)
    if not all(bool(torch.isfinite(d).all()) for d in pytree.tree_leaves(dots)):
        raise _NotFinite("dot products of the checkpoints are not finite; method='loop' tells which losses are not.")
    if rates is None:
        return pytree.tree_map(lambda d: d.mean(0), dots)
    return pytree.tree_map(lambda d: torch.tensordot(torch.tensor(rates, dtype=torch.float64).to(d), d, 1), dots)


def _by_loop(
    dots_of: Callable[[Params], Dots], points: Iterator[Params], rates: list[float] | None, ranks: Ranks | None
) -> TracIn:
    total, count = None, 0
    while (point := _next(points, count, ranks)) is not None:
        if rates is not None and count >= len(rates):
            raise ValueError(f"learning_rates has {len(rates)} numbers, and there are more checkpoints.")
        rate = 1.0 if rates is None else rates[count]
        dots = pytree.tree_map(lambda d, rate=rate: rate * d, dots_of(point))
        total = dots if total is None else pytree.tree_map(torch.add, total, dots)
        count += 1
    _check_count(count, rates)
    return TracIn(pytree.tree_map(lambda d: d / count, total) if rates is None else total, count, "loop")


def _next(points: Iterator[Params], count: int, ranks: Ranks | None) -> Params | None:
    """The next checkpoint; None behind the last one, which must be the last on every rank."""
    with _together(ranks):
        point = next(points, None)
    if ranks is not None:
        ended = [rank for rank, more in enumerate(ranks.counts(int(point is not None))) if not more]
        if ended and len(ended) < ranks.size:
            raise ValueError(
                f"checkpoints: there are {count} on rank {', '.join(map(str, ended))}, and more on the other ranks. "
                "Pass the same ones to all ranks."
            )
    return point


def _rates(learning_rates: Sequence[float] | Tensor) -> list[float]:
    rates = [float(rate) for rate in learning_rates]
    if not all(map(math.isfinite, rates)):
        raise ValueError(f"learning_rates must be finite; they are {rates}.")
    return rates


def _device(params: Params | None, train: Any) -> torch.device:
    tensors = tensors_in(params.values() if params else pytree.tree_leaves(train))
    return tensors[0].device


def _points(
    checkpoints: Iterable[Checkpoint] | Params, params: Params | None, device: torch.device
) -> Iterator[Params]:
    """The checkpoints one after the other, as dicts that agree on names and shapes."""
    expected = None if params is None else {name: p.shape for name, p in params.items()}
    singles: Iterable[Any] = _unstacked(checkpoints) if isinstance(checkpoints, Mapping) else checkpoints
    for k, given in enumerate(singles):
        what = f"checkpoint {k}" if isinstance(given, Mapping) else f"checkpoint {k} ({fspath(given)})"
        point = given if isinstance(given, Mapping) else _read(given, device)
        shapes = {name: p.shape for name, p in point.items()}
        expected = shapes if expected is None else expected
        _check_alike(what, shapes, expected)
        yield {name: point[name] for name in expected}


def _unstacked(stacks: Mapping[Any, Tensor]) -> list[dict[str, Tensor]]:
    shapes = {name: tuple(stack.shape) for name, stack in stacks.items()}
    if len({shape[:1] for shape in shapes.values()}) > 1 or () in shapes.values():
        raise ValueError(
            f"a stacked dict of checkpoints has tensors [K, *shape] with one K; these are {shapes}. Pass a list for "
            "dicts of single checkpoints."
        )
    count = next((shape[0] for shape in shapes.values()), 0)
    return [{name: stack[k] for name, stack in stacks.items()} for k in range(count)]


def _read(path: str | PathLike, device: torch.device) -> dict[str, Tensor]:
    try:
        return load_file(path, device=str(device))
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{fspath(path)} is no safetensors file ({error}). Write checkpoints with "
            "safetensors.torch.save_file(params, path), or load them yourself and pass dicts; nothing is unpickled."
        ) from error


def _check_alike(what: str, shapes: Mapping[str, torch.Size], expected: Mapping[str, torch.Size]) -> None:
    missing, unknown = sorted(set(expected) - set(shapes)), sorted(set(shapes) - set(expected))
    if missing or unknown:
        wrong = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"also has {', '.join(unknown)}"] * bool(unknown)
        raise ValueError(
            f"{what} {' and '.join(wrong)}; every checkpoint must have the entries {', '.join(expected)}, and no "
            "others (what is no parameter stays in the module)."
        )
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ValueError(f"{what} has {name!r} of shape {tuple(shapes[name])}; expected {tuple(shape)}.")


def _check_count(count: int, rates: list[float] | None) -> None:
    if count == 0:
        raise ValueError("there is no checkpoint; pass at least one.")
    if rates is not None and len(rates) != count:
        raise ValueError(f"learning_rates has {len(rates)} numbers for {count} checkpoints.")


class _Allocated(TorchDispatchMode):
    """Counts the bytes that operations write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.bytes += sum(t.numel() * t.element_size() for t in tensors_in([out]) if not t._is_view())
        return out


def _needed(model_fn: ModelFn, point: Params, train: Any, count: int) -> int:
    """About how many bytes all checkpoints together would take under vmap."""
    before = RandomState.of(next(iter(point.values())).device)
    with torch.no_grad(), _Allocated() as forward:
        model_fn(dict(point), train)
    before.restore()
    weights = sum(p.numel() * p.element_size() for p in point.values())
    return count * _BACKWARD * (forward.bytes + weights)
