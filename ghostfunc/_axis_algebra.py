"""Sample axes of operands and results: how they agree, broadcast and reshape; what an operation's row is given."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ghostfunc._sample_axis import Lost, SampleAxis, Samples, following_positions, samples_of, scattered


def mixed(name: str) -> Lost:
    """Samples met: the loss of one depends on another."""
    return Lost(f"samples meet in `{name}`", mixed=True)


def unknown(name: str) -> Lost:
    """An operation whose samples a probe has to find."""
    return Lost(f"`{name}` is not known to keep samples apart", mixed=False)


def agree(name: str, found: Iterable[Samples]) -> Samples:
    """One sample axis for a result out of those that its operands give it; of positions, the first."""
    result: Samples = None
    if following_positions():
        carried = [samples for samples in found if samples is not None]
        return next((s for s in carried if isinstance(s, SampleAxis)), carried[0] if carried else None)
    for samples in found:
        if isinstance(samples, Lost):
            return samples
        if samples is not None and result is not None:
            samples = _merged(samples, result)
            if samples is None:
                return mixed(name)
        result = samples or result
    return result


def _merged(a: SampleAxis, b: SampleAxis) -> SampleAxis | None:
    """One axis for two operands; an index that holds no data in one of them has the other's owner."""
    if a == b:
        return a
    if (a.dim, a.samples, a.size) != (b.dim, b.samples, b.size) or (a.owners is None and b.owners is None):
        return None
    first, second = a.of_index(), b.of_index()
    device = first.device if a.owners is not None else second.device
    first, second = first.to(device), second.to(device)
    if bool(((first != second) & (first >= 0) & (second >= 0)).any()):
        return None
    return scattered(a.dim, a.samples, torch.maximum(first, second))


def aligned(axis: Samples, tensor: Tensor, out: Tensor) -> Samples:
    """The axis of an operand in a result that broadcasts it: dimensions count from the right."""
    if not isinstance(axis, SampleAxis):
        return axis
    dim = axis.dim + out.dim() - tensor.dim()
    if dim < 0 or out.size(dim) != axis.size:
        return unknown("broadcasting")
    return axis.at(dim)


def row_major(name: str, axis: SampleAxis, before: torch.Size, after: torch.Size) -> Samples:
    """The axis after a reshape that keeps the row-major order of the entries."""
    if axis.owners is not None:
        return _rows_reshaped(name, axis, axis.owners, before, after)
    if axis.samples > 1 and before[: axis.dim + 1] == after[: axis.dim + 1]:
        return axis
    outer = math.prod(before[: axis.dim]) * axis.outer
    inner = axis.inner * math.prod(before[axis.dim + 1 :])
    ahead = 1
    for dim, size in enumerate(after):
        behind = math.prod(after[dim + 1 :])
        if outer % ahead == 0 and inner % behind == 0:
            new = SampleAxis(dim, axis.samples, outer // ahead, inner // behind)
            if new.size == size:
                return new
        ahead *= size
    return unknown(name)


def _rows_reshaped(name: str, axis: SampleAxis, owners: Tensor, before: torch.Size, after: torch.Size) -> Samples:
    """The same for scattered rows: their dimension is kept, merged with others, or split where the owners allow it."""
    outer, inner = math.prod(before[: axis.dim]), math.prod(before[axis.dim + 1 :])
    ahead = 1
    for dim, size in enumerate(after):
        behind = math.prod(after[dim + 1 :])
        if behind and outer % ahead == 0 and inner % behind == 0:
            runs = owners.repeat_interleave(inner // behind).repeat(outer // ahead)
            if len(runs) == size:
                return scattered(dim, axis.samples, runs)
        ahead *= size
    in_order = [
        row_major(name, whole, before, after)
        for whole in _whole_axes(axis)
        if bool(((whole.of_index().to(owners.device) == owners) | (owners < 0)).all())
    ]
    return in_order[0] if len(in_order) == 1 else unknown(name)


def _whole_axes(axis: SampleAxis) -> list[SampleAxis]:
    """The axes, sample by sample or position by position, that scattered rows may be a part of."""
    if axis.size % axis.samples:
        return []
    per_sample = axis.size // axis.samples
    found = [SampleAxis(axis.dim, axis.samples, 1, per_sample)]
    return found if per_sample == 1 else [*found, SampleAxis(axis.dim, axis.samples, per_sample, 1)]


def ints(values: Iterable[Any]) -> list[int]:
    """The integers among arguments, inside lists and tuples too."""
    found: list[int] = []
    for value in values:
        if isinstance(value, bool):
            continue
        if isinstance(value, int):
            found.append(value)
        elif isinstance(value, (tuple, list, torch.Size)):
            found += ints(value)
    return found


def argument(args: Sequence[Any], kwargs: dict[str, Any], position: int, *names: str, default: Any = None) -> Any:
    """An argument by its names or its position."""
    for name in names:
        if name in kwargs:
            return kwargs[name]
    return args[position] if len(args) > position else default


class Op(NamedTuple):
    """One call of an operation, and one of its results."""

    name: str
    args: Sequence[Any]
    kwargs: dict[str, Any]
    tensors: list[Tensor]
    out: Tensor
    index: int  # of the result
    results: list[Tensor]
    notes: list[str]  # why integers of the whole batch decided what a sample goes through

    @property
    def axis(self) -> Samples:
        """What the first argument carries."""
        return samples_of(self.args[0] if self.args else self.tensors[0])
