"""Sharded parameters: gathered where an operation uses them, their gradients made shards as soon as they are complete.

    use        full = all-gather of the shards             freed after the operation, gathered again in the backward
    gradient   shard of the sum over ranks of full ones    reduce-scatter, once for each parameter

A sharded parameter is a `DTensor` over the ranks that also split the samples. Neither autograd nor the graph keeps its
full values: what an operation would save of them is kept as the shard, and the tensor that stands for the parameter in
the graph has its shape and no memory of its own.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
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

_SMALL = 1 << 16  # numbers of a parameter (a bias, a scale) that stays gathered during a call


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a `DTensor`: spread over ranks."""
    module = sys.modules.get("torch.distributed.tensor")  # importing it takes half a second, and who has one has it
    return module is not None and isinstance(tensor, module.DTensor)


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
        tensor: the sharded tensor.
        shards: of the run.

    Attributes:
        leaf: what the backward differentiates with respect to: sharded, as its gradient will be.
        dtype: of the gathered values.
    """

    def __init__(self, name: str, tensor: Tensor, shards: Shards) -> None:
        self.name = name
        self.leaf = tensor.detach().requires_grad_()
        self.dtype = tensor.dtype
        self._shards = shards
        self._place = len(shards.all)
        self._kept: Tensor | None = None
        self._given: list[weakref.ref[Tensor]] = []

    def stand_in(self, dtype: torch.dtype) -> Tensor:
        """A tensor of the parameter's shape that takes no memory: zeros."""
        return torch.zeros((), dtype=dtype, device=self.leaf.device).expand(self.leaf.shape)

    def in_graph(self) -> Tensor:
        """What stands for the parameter in the graph: the cotangents of all its uses add up there."""
        with torch.enable_grad():
            return _Unshard.apply(self.leaf, self)  # type: ignore[return-value]

    def values(self) -> Tensor:
        """The whole tensor, for one operation: what the operation saves of it is the shard."""
        if self._kept is not None and self._kept.dtype == self.dtype:
            return self._kept
        self.step(self.name)
        whole = gathered(self.leaf.detach().to(self.dtype))
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
        self._lent: dict[int, tuple[StorageWeakRef, Shard]] = {}
        self._frozen: dict[int, tuple[Tensor, Shard]] = {}

    def add(self, name: str, tensor: Tensor) -> Shard:
        """A sharded tensor that the run will use."""
        shard = Shard(name, tensor, self)
        self.all.append(shard)
        return shard

    def frozen(self, tensor: Tensor) -> Tensor:
        """The whole values of a sharded tensor that is no parameter of the call."""
        if id(tensor) not in self._frozen:
            self._frozen[id(tensor)] = tensor, self.add(f"a frozen tensor of shape {tuple(tensor.shape)}", tensor)
        return self._frozen[id(tensor)][1].values()

    def lend(self, whole: Tensor, shard: Shard) -> None:
        """Whole values are in some operation's hands."""
        self._lent = {key: lent for key, lent in self._lent.items() if not lent[0].expired()}
        storage = whole.untyped_storage()
        self._lent[storage._cdata] = StorageWeakRef(storage), shard

    def saved_as_shards(self) -> AbstractContextManager:
        """Around the forward: autograd keeps shards where it would keep whole parameters."""
        return saved_tensors_hooks(*self.hooks)

    def _pack(self, tensor: Tensor) -> Any:
        if tensor.layout != torch.strided or is_sharded(tensor):
            return tensor
        weak, shard = self._lent.get(tensor.untyped_storage()._cdata, (None, None))
        if weak is None or shard is None or weak.expired() or tensor.dtype != shard.dtype:
            return tensor
        return _Saved(shard, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, kept: Any) -> Tensor:
        if not isinstance(kept, _Saved):
            return kept
        with torch._C.DisableTorchFunction():
            return kept.shard.values().as_strided(kept.size, kept.stride, kept.offset)


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
        self._last: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if self._last is None or self._last[0] != name:
            self._last = None  # one at a time
            tensor = self.tensors[name]
            if self.ranks is not None and is_sharded(tensor):
                self.ranks.in_step(_DIRECTIONS + self._places[name], f"the direction of {name}")
            whole = gathered(tensor).to(self.dtype)
            self._last = name, whole.unsqueeze(0) if self.stacked else whole
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


_DIRECTIONS = 1 << 32  # apart from the places of parameters


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
