"""Rows as they are stored, and back.

    int8:  stored = round(row / scale),  scale = max |row| / 127 over one slice of one row

A scale of its own for each row and slice keeps a small layer apart from a large one: an entry is off by at most 1/254
of the largest entry of its row in its slice.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ghostfunc.index._manifest import StoreError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
ROWS, SCALES = "rows", "scales"


def check_slices(slices: Mapping[str, slice], dim: int) -> None:
    """Raise unless the slices, in their order, are the columns 0 to dim."""
    stop = 0
    for name, part in slices.items():
        if part.start != stop or part.stop <= stop or part.step not in (None, 1):
            raise StoreError(
                f"slices[{name!r}] is {part}, and it should begin at column {stop}, where the last one ends."
            )
        stop = part.stop
    if slices and stop != dim:
        raise StoreError(f"The slices are of {stop} columns, and the rows have dim={dim}.")


def encode(rows: Tensor, dtype: str, slices: Mapping[str, slice]) -> dict[str, Tensor]:
    """Rows `[n, dim]` as the tensors that a shard stores; entries too large for the dtype become infinite."""
    rows = rows.detach().to("cpu")
    if dtype != "int8":
        return {ROWS: rows.to(DTYPES[dtype]).contiguous()}
    rows = rows.float()
    stored = torch.empty(rows.shape, dtype=torch.int8)
    scales = torch.empty(len(rows), max(len(slices), 1))
    for number, part in enumerate(slices.values() or [slice(0, rows.shape[1])]):
        values = rows[:, part]
        scale = (values.abs().amax(dim=1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)  # [n, 1]
        stored[:, part] = (values / scale).round()
        scales[:, number] = scale[:, 0]
    return {ROWS: stored, SCALES: scales}


def decode(rows: Tensor, scales: Tensor | None, columns: slice, slices: Mapping[str, slice]) -> Tensor:
    """Stored columns `[n, c]` of rows as new float32 numbers; `scales` `[n, slices]` are all of int8's."""
    decoded = rows.to(torch.float32, copy=True)
    if scales is not None:
        for number, part in enumerate(slices.values() or [slice(0, columns.stop)]):
            start, stop = max(part.start, columns.start), min(part.stop, columns.stop)
            if start < stop:
                decoded[:, start - columns.start : stop - columns.start] *= scales[:, number, None]
    return decoded
