"""Sharded parameters: gathered where an operation uses them, their gradients made shards as soon as they are complete.

    use        full = all-gather of the shards             freed after the operation, gathered again in the backward
    gradient   shard of the sum over ranks of full ones    reduce-scatter, once for each parameter

A sharded parameter is a `DTensor` over the ranks that also split the samples. Neither autograd nor the graph keeps its
full values: what an operation would save of them is kept as the shard, and the tensor that stands for the parameter in
the graph has its shape, no memory of its own, and no values: it is full of NaN, lest what reads it passes for a result.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import DeviceMesh
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ghostfunc._nesting import functorch_level
from ghostfunc._operations import READS
from ghostfunc._ranks import Group, Ranks

_AT_ONCE = sys.maxsize  # the number of a node that the backward runs as soon as it is ready
_SMALL = 1 << 16  # numbers of a parameter (a bias, a scale) that stays gathered during a call


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a `DTensor`: spread over ranks."""
    module = sys.modules.get("torch.distributed.tensor")  # importing it takes half a second, and who has one has it
    kind = getattr(module, "DTensor", None)  # before torch 2.5 the module has none
    return kind is not None and isinstance(tensor, kind)


def gathered(tensor: Tensor) -> Tensor:
    """A tensor whole on this rank, without a graph; a plain one as it is."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad(), torch._C.DisableTorchFunction():  # an interpreter is not to see how
        return tensor.detach().full_tensor()  # type: ignore[attr-defined]


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The sum over ranks of a full tensor, in the shards of another; for a plain `like` the tensor as it is."""
    if is_sharded(tensor) or not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor, Partial

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    with torch.no_grad(), torch._C.DisableTorchFunction():
        sums = DTensor.from_local(tensor.contiguous(), mesh, [Partial("sum")] * mesh.ndim, run_check=False)
        return sums.redistribute(placements=placements)


def group_of(params: Mapping[str, Tensor], group: Group | None) -> Group | None:
    """The group of a call: as it was given, or the ranks that sharded parameters are spread over.

    Raises:
        ValueError: if the group's ranks are not those of every sharded parameter.
        RuntimeError: for sharded parameters inside a functorch transform, which does not see what ranks exchange.
    """
    spread: dict[str, Any] = {name: p for name, p in params.items() if is_sharded(p)}
    if not spread:
        return group
    if functorch_level() is not None:
        raise RuntimeError("sharded parameters inside a functorch transform: make the call outside.")
    first = next(iter(spread))
    given: Group = spread[first].device_mesh if group is None else group
    ranks = _members(given)
    for name, parameter in spread.items():
        there = _members(parameter.device_mesh)
        if there != ranks:
            raise ValueError(
                f"{name} is sharded over ranks {there}, and the samples are split over ranks {ranks}: with sharded "
                "parameters both must be the same. Pass as group= the ranks of the mesh that all parameters are on."
            )
    return given


def _members(group: Group) -> list[int]:
    if isinstance(group, DeviceMesh):
        return sorted(group.mesh.flatten().tolist())
    return sorted(dist.get_process_group_ranks(group))


class Shard:
    """One sharded tensor in one run.

    Args:
        name: of the parameter, for messages.
        leaf: the sharded tensor; of a parameter what the backward differentiates with respect to.
        shards: of the run.

    Attributes:
        leaf: as it was given: sharded, as its gradient will be.
        dtype: of the gathered values.
    """

    def __init__(self, name: str, leaf: Tensor, shards: Shards) -> None:
        self.name = name
        self.leaf = leaf
        self.dtype = leaf.dtype
        self._shards = shards
        self._place = len(shards.all)
        self._kept: Tensor | None = None
        self._given: list[weakref.ref[Tensor]] = []

    def stand_in(self, dtype: torch.dtype) -> Tensor:
        """A tensor of the parameter's shape that takes no memory: NaN everywhere."""
        return torch.full((), torch.nan, dtype=dtype, device=self.leaf.device).expand(self.leaf.shape)

    def in_graph(self) -> Tensor:
        """What stands for the parameter in the graph: the cotangents of all its uses add up there."""
        with torch.enable_grad():
            stand_in: Tensor = _Unshard.apply(self.leaf, self)  # type: ignore[assignment]
        # Of the nodes that are ready the backward takes the newest, and would hold all whole gradients to the end.
        renumber: Any = getattr(stand_in.grad_fn, "_set_sequence_nr", None)
        if renumber is not None:
            renumber(_AT_ONCE)
        return stand_in

    def values(self, dtype: torch.dtype | None = None) -> Tensor:
        """The whole tensor, for one operation: what the operation saves of it is the shard."""
        dtype = dtype or self.dtype
        if self._kept is not None and self._kept.dtype == dtype:
            return self._kept
        self.step(self.name)
        whole = gathered(self.leaf.detach().to(dtype))
        if whole.numel() <= _SMALL:
            self._kept = whole
        else:
            self._shards.lend(whole, self)
        return whole

    def with_graph(self, stand_in: Tensor) -> Tensor:
        """The whole tensor as a function of what stands for it."""
        whole: Tensor = _Whole.apply(stand_in, self)  # type: ignore[assignment]
        self._given = [ref for ref in self._given if ref() is not None] + [weakref.ref(whole)]
        return whole

    def gave(self, tensor: Tensor | None) -> bool:
        """Whether a tensor is the whole one, as a function of what stands for it."""
        return tensor is not None and any(ref() is tensor for ref in self._given)

    def step(self, what: str) -> None:
        """Wait for the other ranks to come to the same place; they must, before anything is exchanged."""
        if self._shards.ranks is not None:
            self._shards.ranks.in_step(self._place, what)


class _Unshard(Function):
    """From the shard to what stands for the parameter; backward, from the sum of all cotangents to a shard."""

    @staticmethod
    def forward(ctx, leaf, shard):
        ctx.shard = shard
        return shard.stand_in(leaf.dtype)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        shard: Shard = ctx.shard
        shard.step(f"the gradient of {shard.name}")
        return sharded_like(grad, shard.leaf), None


class _Whole(Function):
    """The values of a parameter for what stands for it."""

    @staticmethod
    def forward(ctx, stand_in, shard):
        return shard.values().detach()

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None


class _Saved(NamedTuple):
    """What autograd keeps in place of a view of gathered values."""

    shard: Shard
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Shards:
    """The sharded tensors of one run, and which of their values are lent to operations.

    Args:
        ranks: those that have the shards.
    """

    def __init__(self, ranks: Ranks | None) -> None:
        self.ranks = ranks
        self.all: list[Shard] = []
        self.hooks = (self._pack, self._unpack)
        self._lent: dict[int, tuple[StorageWeakRef, Shard, torch.dtype]] = {}
        self._frozen: dict[int, tuple[Tensor, Shard]] = {}

    def add(self, name: str, leaf: Tensor) -> Shard:
        """A sharded tensor that the run will use."""
        shard = Shard(name, leaf, self)
        self.all.append(shard)
        return shard

    def frozen(self, tensor: Tensor) -> Shard:
        """A sharded tensor that is no parameter of the call."""
        if id(tensor) not in self._frozen:
            shard = self.add(f"a frozen tensor of shape {tuple(tensor.shape)}", tensor.detach())
            self._frozen[id(tensor)] = tensor, shard
        return self._frozen[id(tensor)][1]

    def lend(self, whole: Tensor, shard: Shard) -> None:
        """Whole values are in some operation's hands."""
        self._lent = {key: lent for key, lent in self._lent.items() if not lent[0].expired()}
        storage = whole.untyped_storage()
        self._lent[storage._cdata] = StorageWeakRef(storage), shard, whole.dtype

    def saved_as_shards(self) -> AbstractContextManager:
        """Around the forward: autograd keeps shards where it would keep whole parameters."""
        return saved_tensors_hooks(*self.hooks)

    def _pack(self, tensor: Tensor) -> Any:
        if tensor.layout != torch.strided or is_sharded(tensor):
            return tensor
        lent = self._lent.get(tensor.untyped_storage()._cdata)
        if lent is None:
            return tensor
        weak, shard, dtype = lent
        if weak.expired() or tensor.dtype != dtype:
            return tensor
        return _Saved(shard, dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, kept: Any) -> Tensor:
        if not isinstance(kept, _Saved):
            return kept
        with torch._C.DisableTorchFunction():
            return kept.shard.values(kept.dtype).as_strided(kept.size, kept.stride, kept.offset)


class ShardedDirection(Mapping[str, Tensor]):
    """A direction in shards, `{name: [*shape]}`: an entry is whole while it is the last that was asked for.

    Args:
        tensors: the direction, sharded where the parameters are.
        dtype: of the entries.
        ranks: those that have the shards.
        stacked: whether an entry is `[1, *shape]`.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype, ranks: Ranks | None, *, stacked: bool = False
    ) -> None:
        self.stacked = stacked
        self.tensors = dict(tensors)
        self.dtype = dtype
        self.ranks = ranks
        self._places = {name: place for place, name in enumerate(self.tensors)}
        self._number = 1  # apart from the places of parameters and of other directions
        if ranks is not None:
            ranks.directions += 1
            self._number = ranks.directions
        self._last: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if self._last is None or self._last[0] != name:
            self._last = None  # one at a time
            tensor = self.tensors[name]
            if self.ranks is not None and is_sharded(tensor):
                self.ranks.in_step((self._number << 32) + self._places[name], f"the direction of {name}")
            whole = gathered(tensor).to(self.dtype)
            self._last = name, whole.unsqueeze(0) if self.stacked else whole
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def ends_in(output: Tensor, leaves: Iterable[Tensor]) -> list[int]:
    """Places of the leaves that the graph of a tensor has."""
    ids = {id(leaf): place for place, leaf in enumerate(leaves)}
    waiting, seen, found = [output.grad_fn], set(), []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        place = ids.get(id(getattr(node, "variable", None)))
        if place is not None:
            found.append(place)
        waiting += [after for after, _ in node.next_functions]
    return found


class GatheredAtUse(TorchFunctionMode):
    """Runs operations on sharded tensors with these whole, where no interpreter does; each rank has its own samples."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in READS and any(is_sharded(leaf) for leaf in pytree.tree_leaves((args, kwargs))):
            args, kwargs = pytree.tree_map(_whole, (args, kwargs))
        return func(*args, **kwargs)


def _whole(leaf: Any) -> Any:
    """A sharded tensor whole, with its graph: its gradient is the sum over ranks."""
    if not is_sharded(leaf):
        return leaf
    from torch.distributed.tensor import Partial

    return leaf.full_tensor(grad_placements=[Partial("sum")] * leaf.device_mesh.ndim)
