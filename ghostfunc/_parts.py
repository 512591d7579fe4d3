"""Which entries of a parameter a view of it holds: experts, heads and halves of a fused weight do not meet.

Two uses of the same part contract with each other as two uses of one weight do; uses of disjoint parts have no cross
terms; anything else goes through directions of the whole parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ghostfunc._nesting import functorch_level, readable

SELECTIONS = frozenset("getitem select narrow chunk split split_with_sizes tensor_split unbind diagonal".split())


@dataclass(frozen=True)
class Part:
    """A box of a parameter's entries, laid out as a view.

    Attributes:
        box: `(start, stop)` along each dimension of the parameter.
        shape: of the view.
        stride: of the view.
    """

    box: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, tensor: Tensor) -> Tensor:
        """The part of a tensor like the parameter."""
        whole = tensor if tensor.is_contiguous() else tensor.contiguous()
        offset = sum(start * stride for (start, _), stride in zip(self.box, whole.stride(), strict=True))
        return whole.as_strided(self.shape, self.stride, whole.storage_offset() + offset)

    def apart_from(self, other: Part) -> bool:
        """Whether no entry is in both."""
        return any(a[1] <= b[0] or b[1] <= a[0] for a, b in zip(self.box, other.box, strict=True))


def part_of(parameter: Tensor, view: Tensor) -> Part | None:
    """The part of a parameter that a view of it holds; None where it is no box."""
    if functorch_level() is not None or not readable(parameter):
        return None
    if parameter.untyped_storage().data_ptr() != view.untyped_storage().data_ptr() or not parameter.is_contiguous():
        return None
    rest = view.storage_offset() - parameter.storage_offset()
    box = []
    dims = dict(zip(view.stride(), view.shape, strict=True))
    for size, stride in zip(parameter.shape, parameter.stride(), strict=True):
        start = int(rest) // int(stride) if size > 1 else 0
        rest = int(rest) - start * int(stride)
        extent = dims.pop(stride, 1) if size > 1 else 1
        if start < 0 or start + extent > size:
            return None
        box.append((start, start + extent))
    if rest or any(size > 1 for size in dims.values()) or len(set(view.stride())) != view.dim():
        return None
    return Part(tuple(box), tuple(view.shape), view.stride())
