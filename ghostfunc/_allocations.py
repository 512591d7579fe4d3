"""What a step allocates, operation by operation, and the moment at which most of it is alive.

It is recorded at the storages that operations make, so that it is the same for tensors that have values and for fake
tensors, whose storages have a size and no memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(eq=False)
class Allocation:
    """One storage.

    Attributes:
        bytes: its size.
        born: after how many operations it was there.
        died: after how many operations it was gone; None where it outlived the record.
    """

    bytes: int
    born: int
    died: int | None = None

    def alive(self, clock: int) -> bool:
        """Whether it was there after so many operations."""
        return self.born <= clock and (self.died is None or clock < self.died)


class Allocations(TorchDispatchMode):
    """Records the storages that operations make within it.

    Attributes:
        made: all of them, in order.
        clock: how many operations have run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Allocation] = []
        self.clock = 0
        self._alive: dict[int, tuple[weakref.ref, Allocation]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_key(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        self.clock += 1
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor) and (key := _key(leaf)) not in given and key not in self._alive:
                storage = leaf.untyped_storage()
                allocation = Allocation(storage.nbytes(), self.clock)
                self.made.append(allocation)
                self._alive[key] = weakref.ref(storage, self._ended(key, allocation)), allocation
        return out

    def of(self, tensor: Tensor) -> Allocation | None:
        """Where a tensor's storage is recorded; None where it was not made here."""
        _, allocation = self._alive.get(_key(tensor), (None, None))
        return allocation

    def _ended(self, key: int, allocation: Allocation) -> Callable[[Any], None]:
        def ended(_: Any) -> None:
            allocation.died = self.clock
            self._alive.pop(key, None)

        return ended


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Span(NamedTuple):
    """Bytes that are held from one operation to another, both included.

    Attributes:
        kind: what they are for.
        bytes: how many.
        start: the first operation after which they are held.
        stop: the last one; None for ever.
    """

    kind: str
    bytes: int
    start: int = 0
    stop: int | None = None


def at_peak(spans: Iterable[Span]) -> Mapping[str, int]:
    """The bytes of each kind at the moment when all together are most."""
    events: list[tuple[int, int, str, int]] = []
    for kind, size, start, stop in spans:
        events.append((start, 0, kind, size))  # before what ends at the same time: an operation holds what it takes
        if stop is not None:
            events.append((stop, 1, kind, -size))
    now: dict[str, int] = {}
    found, most, total = {}, -1, 0
    for _, _, kind, size in sorted(events):
        now[kind] = now.get(kind, 0) + size
        total += size
        if total > most:
            most, found = total, dict(now)
    return found
