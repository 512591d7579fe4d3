"""What ranks bring together outside of a call: the gradient of an optimizer step, and per-sample results.

gradient of the step    sum over ranks and micro-batches of sums of gradients / number of all their samples
results                 the rows of all ranks, in the order of the data
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ghostfunc._ranks import Group, Ranks
from ghostfunc._sharded import is_sharded


class MeanGradient(NamedTuple):
    """What `mean_gradient` returns.

    Attributes:
        grads: the gradient of the mean loss over all samples, by name.
        samples: how many these are, N: of all ranks and micro-batches.
    """

    grads: dict[str, Tensor]
    samples: int


def mean_gradient(sums: Mapping[str, Tensor], samples: int, *, group: Group | None = None) -> MeanGradient:
    """The gradient of an optimizer step, from each rank's sum over its micro-batches: one reduction for each step.

    With gradient accumulation a call with `group=` for every micro-batch would reduce a whole gradient each time. The
    validation gradient needs the group, once; the calls for micro-batches do not, and are this rank's alone:

        val = gf.val_gradient(model_fn, params, val_batch, group=group)
        sums, samples = {name: torch.zeros_like(p) for name, p in params.items()}, 0
        for batch in micro_batches:                                  # of any sizes, any number of them on each rank
            result = gf.value_and_grad_dot(model_fn, params, batch, val)           # no group: nothing is exchanged
            n = len(result.losses)
            for name, grad in result.grads.items():
                sums[name] += n * grad
            samples += n
        grads, N = gf.mean_gradient(sums, samples, group=group)

    The dots are those of one process; `lr / N * result.dots` are first-order values of the step.

    Sharded parameters need none of this: no rank can hold a sum of whole gradients, so that every call reduces its own
    to shards, and `result.grads` is the mean over all ranks' samples. There n is the number of these, and the step's
    gradient is `sums[name] / samples`, without a reduction.

    Args:
        sums: this rank's sums of its samples' gradients, by name; zeros on a rank without samples.
        samples: how many samples that are, on this rank.
        group: the data-parallel process group, or a mesh; None for one process.

    Returns:
        `MeanGradient(grads, samples)`, the same on every rank: new tensors.

    Raises:
        ValueError: on every rank, if ranks have gradients of other names, shapes or dtypes, or if there is no sample;
            for sharded gradients.

    Example:
        >>> import torch, ghostfunc as gf
        >>> gf.mean_gradient({"weight": torch.tensor([6.0, 3.0])}, 3)
        MeanGradient(grads={'weight': tensor([2., 1.])}, samples=3)
    """
    ranks = Ranks.of(group, next((t.device for t in sums.values()), torch.device("cpu")))
    with nullcontext() if ranks is None else ranks.together():
        _check_sums(sums)
    names = sorted(sums)  # a dict may be in another order on another rank
    found = {name: sums[name].detach() for name in names}
    if ranks is not None:
        samples = _samples_of_all(ranks, found, samples)
        found = ranks.sums(found)
    if samples < 1:
        raise ValueError(f"samples={samples}: there is no sample on any rank, and no mean over none.")
    return MeanGradient({name: found[name] / samples for name in sums}, samples)


def _check_sums(sums: Mapping[str, Tensor]) -> None:
    if not sums:
        raise ValueError("sums has no gradient. Start from zeros: {name: torch.zeros_like(p) for each parameter}.")
    for name, tensor in sums.items():
        if is_sharded(tensor):
            raise ValueError(
                f"sums[{name!r}] is sharded: gradients of sharded parameters are of all ranks' samples already. Add up "
                "n * grads with n the samples of all ranks in a micro-batch, and divide by the sum of these."
            )


def _samples_of_all(ranks: Ranks, tensors: Mapping[str, Tensor], samples: int) -> int:
    """The number of samples of all ranks, which must have the same tensors."""
    described = {name: f"{tuple(t.shape)} {t.dtype}" for name, t in tensors.items()}
    digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()
    told = [text.split() for text in ranks.texts(f"{samples} {digest}")]
    if len({theirs for _, theirs in told}) > 1:
        of_ranks = [json.loads(text) for text in ranks.texts(json.dumps(described))]
        name = next(n for of in of_ranks for n in of if len({other.get(n) for other in of_ranks}) > 1)
        shapes = ", ".join(f"rank {rank}: {of.get(name, 'missing')}" for rank, of in enumerate(of_ranks))
        raise ValueError(
            f"the gradients of the ranks are not of the same parameters: {name} is {shapes}. Start from zeros of every "
            "parameter on each rank."
        )
    return sum(int(count) for count, _ in told)


class GatheredSamples(NamedTuple):
    """What `gather_samples` returns.

    Attributes:
        ids: of the rows, in the order of the data: a tensor `[N]`, or a list, as they were given.
        values: the results of all ranks, built like those of one; tensors `[N, ...]`.
        repeated: ids that more than one row had, in order.
    """

    ids: Any
    values: Any
    repeated: tuple[Any, ...]


def gather_samples(
    values: Any,
    ids: Tensor | Sequence[int] | Sequence[str],
    group: Group | None = None,
    *,
    positions: Tensor | Sequence[int] | None = None,
    drop_repeated: bool = False,
    to: int | None = None,
) -> GatheredSamples | None:
    """Per-sample results of all ranks with their ids, in the order of the data.

    A `DistributedSampler` deals samples out in turns, shuffles them, and repeats some so that every rank has as many as
    the others; ids say which sample a row is about. Rows are sorted by `positions` where these are given, else by the
    ids: integers by size (the index in the dataset is a good id), strings as text. Rows that tie are in the order of
    the ranks.

    Args:
        values: this rank's results: a tensor `[n, ...]`, or a pytree of them: dicts, named tuples such as
            `BoundedDots`. Gradients are no results of samples: leave them out, and see `mean_gradient`.
        ids: of its samples, n of them: integers (a tensor or a list), or strings.
        group: the data-parallel process group, or a mesh; None for one process.
        positions: of its samples in the data, n integers; to be given where ids do not tell the order.
        drop_repeated: leave out all but the first row of an id: that of the lowest rank, and there the first. Repeated
            rows are equal where ranks had the same parameters and randomness.
        to: the rank of the group that gets the result; None for all of them. Others then send no more than their rows.

    Returns:
        `GatheredSamples(ids, values, repeated)`; None on other ranks than `to`.

    Raises:
        ValueError: on every rank, if a rank's results do not have a row for each id, or differ from another rank's in
            their shapes beyond the first dimension, their dtypes or the way they are built; the message names the rank.
        TypeError: on every rank, for results that are no tensors, or ids that are neither integers nor strings.

    Example:
        >>> import torch, ghostfunc as gf
        >>> gathered = gf.gather_samples({"dots": torch.tensor([0.3, 0.1, 0.2, 0.1])}, [5, 0, 2, 0], drop_repeated=True)
        >>> gathered.ids, gathered.values["dots"], gathered.repeated
        ([0, 2, 5], tensor([0.1000, 0.2000, 0.3000]), (0,))
    """
    leaves, spec = pytree.tree_flatten(values)
    device = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), torch.device("cpu"))
    ranks = Ranks.of(group, device)
    if ranks is None:
        if to not in (None, 0):
            raise ValueError(f"to={to}: without a group there is one process, 0.")
        keys, places = _checked(values, ids, positions)
    else:
        if to is not None and not 0 <= to < ranks.size:
            raise ValueError(f"to={to}: the ranks of the group are 0 to {ranks.size - 1}.")
        with ranks.together():
            keys, places = _checked(values, ids, positions)
        as_text = _check_alike(ranks, values, keys, places)
        counts = ranks.counts(len(keys))
        keys = _strings_of_all(ranks, keys) if as_text else _integers_of_all(ranks, keys, counts)
        places = None if places is None else _integers_of_all(ranks, places, counts)
        names = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(values)[0]]
        for place in sorted(range(len(names)), key=names.__getitem__):  # dicts may be in another order on another rank
            if isinstance(leaves[place], Tensor):
                leaves[place] = ranks.rows(leaves[place], counts, to)
        if to is not None and to != ranks.rank:
            return None
    by = keys if places is None else places
    order = sorted(range(len(keys)), key=by.__getitem__)  # ties stay in the order of the ranks
    times = Counter(keys)
    repeated = tuple(key for key in dict.fromkeys(keys[row] for row in order) if times[key] > 1)
    if drop_repeated:
        first = {key: row for row, key in reversed([*enumerate(keys)])}
        order = [row for row in order if first[keys[row]] == row]
    rows = torch.tensor(order, dtype=torch.int64, device=device)
    found = [leaf.detach()[rows] if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    kept: Any = [keys[row] for row in order]
    if isinstance(ids, Tensor):
        kept = torch.tensor(kept, dtype=ids.dtype, device=ids.device)
    return GatheredSamples(kept, pytree.tree_unflatten(found, spec), repeated)


def _checked(values: Any, ids: Any, positions: Any) -> tuple[list[int] | list[str], list[int] | None]:
    """The ids and the positions as lists, once every result has a row for each."""
    keys = _listed(ids, "ids")
    places = None if positions is None else _listed(positions, "positions")
    if places is not None and (len(places) != len(keys) or any(isinstance(place, str) for place in places)):
        raise ValueError(f"positions: expected an integer for each of {len(keys)} ids, not {len(places)} values.")
    for path, leaf in pytree.tree_flatten_with_path(values)[0]:
        what = f"values{pytree.keystr(path)}"
        if leaf is None:
            continue
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{what} is a {type(leaf).__name__}; expected tensors with a row for each sample.")
        if is_sharded(leaf):
            raise TypeError(f"{what} is a DTensor; per-sample results are whole on their rank.")
        if leaf.dim() == 0 or len(leaf) != len(keys):
            raise ValueError(
                f"{what} has shape {tuple(leaf.shape)} for {len(keys)} ids: it needs a row for each. What is no result "
                "of samples (a gradient, say) is to be left out."
            )
    return keys, places  # type: ignore[return-value]


def _listed(given: Any, what: str) -> list[int] | list[str]:
    if isinstance(given, Tensor):
        if given.dim() != 1 or given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
            raise TypeError(f"{what} is a tensor of shape {tuple(given.shape)}, {given.dtype}; expected [n], integers.")
        return given.tolist()
    found = list(given)
    if all(isinstance(key, str) for key in found):
        return found
    if all(isinstance(key, Integral) and not isinstance(key, bool) for key in found):
        return [int(key) for key in found]
    raise TypeError(f"{what} has {', '.join(sorted({type(key).__name__ for key in found}))}; expected integers or str.")


def _check_alike(ranks: Ranks, values: Any, keys: Sequence[Any], places: Sequence[int] | None) -> bool:
    """Raise unless the ranks' results go together; whether their ids are strings."""
    mine = {f"values{pytree.keystr(path)}": leaf for path, leaf in pytree.tree_flatten_with_path(values)[0]}
    described = {
        name: f"[n, {', '.join(map(str, leaf.shape[1:]))}] {leaf.dtype}" if isinstance(leaf, Tensor) else str(leaf)
        for name, leaf in mine.items()
    }
    described["positions"] = "given" if places is not None else "not given"
    kind = "none" if not len(keys) else "strings" if isinstance(keys[0], str) else "integers"
    of_ranks = [json.loads(text) for text in ranks.texts(json.dumps([described, kind]))]
    kinds = [kind for _, kind in of_ranks]
    for name in dict.fromkeys(name for of, _ in of_ranks for name in of):
        theirs = [of.get(name, "missing") for of, _ in of_ranks]
        if len(set(theirs)) > 1:
            raise ValueError(f"the results of the ranks do not go together: {name} is {_by_rank(theirs)}.")
    if len({*kinds} - {"none"}) > 1:
        raise ValueError(f"the ids of the ranks do not go together: {_by_rank(kinds)}.")
    return "strings" in kinds


def _by_rank(of_ranks: Sequence[str]) -> str:
    return ", ".join(f"rank {rank}: {text}" for rank, text in enumerate(of_ranks))


def _integers_of_all(ranks: Ranks, integers: Sequence[Any], counts: list[int]) -> list[int]:
    found = ranks.rows(torch.tensor(integers, dtype=torch.int64, device=ranks.device), counts)
    assert found is not None
    return found.tolist()


def _strings_of_all(ranks: Ranks, strings: Sequence[Any]) -> list[str]:
    return [key for text in ranks.texts(json.dumps(list(strings))) for key in json.loads(text)]
