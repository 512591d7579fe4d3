"""Follows packed sequences: rows `[N, d]` step by step, of which step t has one for each of the `sizes[t]` longest.

The states of a recurrent layer have a row for each sample in the same order, longest first, so that the places of the
samples among the rows and among the states tell each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ghostfunc._axis_algebra import Op, mixed, unknown
from ghostfunc._sample_axis import SampleAxis, Samples, samples_of, scattered


def rows_axis(states: Samples, sizes: Sequence[int]) -> Samples:
    """Where the samples are among packed rows, from where they are in a dimension with one index for each."""
    if not isinstance(states, SampleAxis) or states.samples == 1:
        return states
    owners = states.of_index()
    return scattered(0, states.samples, torch.cat([owners[:size] for size in sizes]))


def states_axis(name: str, rows: Samples, sizes: Sequence[int], dim: int) -> Samples:
    """Where the samples are in a dimension with one index for each, from where they are among packed rows."""
    if not isinstance(rows, SampleAxis) or rows.samples == 1:
        return rows
    owners = rows.of_index()
    states = scattered(dim, rows.samples, owners[: sizes[0]])
    return states if rows_axis(states, sizes) == rows else mixed(name)  # a row would go on from another sample's


def is_packed(args: Sequence[Any]) -> bool:
    """Whether a recurrent layer is called as `(rows, sizes, hx, ...)` instead of `(x, hx, weights, ...)`."""
    return isinstance(args[1], Tensor) and not args[1].is_floating_point()


def _pack(op: Op) -> Samples:
    """`_pack_padded_sequence(x, lengths, batch_first) -> (rows, sizes)`."""
    axis, batch_first = op.axis, op.args[2]
    if op.index == 1:
        return None  # the sizes of all samples together; each of them enters by its own rows
    if not isinstance(axis, SampleAxis):
        return axis
    return rows_axis(axis, op.results[1].tolist()) if axis.dim == (0 if batch_first else 1) else unknown(op.name)


def _pad(op: Op) -> Samples:
    """`_pad_packed_sequence(rows, sizes, batch_first, padding, total_length) -> (x, lengths)`."""
    batch_first = op.args[2]
    return states_axis(op.name, op.axis, op.args[1].tolist(), 0 if batch_first or op.index == 1 else 1)


def packed_recurrent(op: Op) -> Samples:
    """A recurrent layer of packed rows: `(rows, sizes, hx, ...) -> (rows, *states)`."""
    sizes = op.args[1].tolist()
    states = states_axis(op.name, op.axis, sizes, 1)
    for part in op.args[2] if isinstance(op.args[2], (tuple, list)) else [op.args[2]]:
        given = samples_of(part)
        if given is not None and given != (states := states or given):
            return mixed(op.name)
    return rows_axis(states, sizes) if op.index == 0 else states


PACKING: dict[str, Callable[[Op], Samples]] = {"pack_padded_sequence": _pack, "pad_packed_sequence": _pad}
