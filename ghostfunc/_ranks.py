"""Data parallel calls: each rank has its share of the samples, and what is a sum or a mean is one over all ranks.

    mean over all samples = sum over ranks of a rank's own sum / sum over ranks of its number of samples

Averages of the ranks' means would be wrong for unequal shares. What belongs to a sample stays with its rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _pytree as pytree

from ghostfunc._nesting import functorch_level

Group = dist.ProcessGroup | DeviceMesh

_BUCKET = 64 << 20  # bytes that are reduced at a time


class RankFailed(RuntimeError):
    """Another rank's share of a call raised, and the message has its rank and its error; or the rank is lost."""


class OutOfStep(RuntimeError):
    """Ranks that must use the same sharded parameters in the same order did not."""


class Ranks:
    """The ranks of a group, and what they tell each other. Every rank makes the same calls in the same order.

    Args:
        group: the process group.
        device: of the tensors that are exchanged.

    Attributes:
        group: the process group.
        size: how many ranks.
        rank: which of them this is.
        device: of the tensors that are exchanged.
        directions: how many sharded directions there are in the call.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group = group
        self.directions = 0
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.device = device
        if self.rank < 0:
            raise ValueError("group= is a process group that this rank is not in: pass the one that it is in.")

    @classmethod
    def of(cls, group: Group | None, device: torch.device) -> Ranks | None:
        """The ranks of a process group or of a mesh of one dimension; None for None.

        Raises:
            ValueError: for a group that this rank is not in.
            RuntimeError: inside a functorch transform, which cannot see what ranks exchange.
        """
        if group is None:
            return None
        if functorch_level() is not None:
            raise RuntimeError("group= inside a functorch transform: make the call outside, or without a group.")
        if isinstance(group, DeviceMesh):
            group = group.get_group() if group.ndim == 1 else _flat(group)
        return cls(group, device)

    def counts(self, count: int) -> list[int]:
        """Each rank's count."""
        mine = torch.tensor([count], dtype=torch.int64, device=self.device)
        return [int(t) for t in self._gathered(mine)]

    def total(self, count: int) -> int:
        """The sum of all ranks' counts."""
        return sum(self.counts(count))

    def sums(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums over all ranks of tensors that every rank has, by name: new tensors, some MB at a time."""
        found: dict[str, Tensor] = {}
        waiting: list[str] = []
        size = 0

        def reduce() -> None:
            flat = torch.cat([tensors[name].detach().reshape(-1) for name in waiting])
            with self._answered():
                dist.all_reduce(flat, group=self.group)
            parts = flat.split([tensors[name].numel() for name in waiting])
            found.update({name: part.view(tensors[name].shape) for name, part in zip(waiting, parts, strict=True)})

        for name, tensor in tensors.items():
            if waiting and (size + tensor.nbytes > _BUCKET or tensor.dtype != tensors[waiting[0]].dtype):
                reduce()
                waiting, size = [], 0
            waiting.append(name)
            size += tensor.nbytes
        if waiting:
            reduce()
        return found

    def batch(self, batch: Any, what: str) -> Any:
        """All ranks' samples as one batch, in the order of the ranks.

        Raises:
            ValueError: on every rank, if their tensors differ beyond the first dimension.
        """
        leaves, spec = pytree.tree_flatten(batch)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        described = "; ".join(f"{tuple(t.shape[1:])} {t.dtype}" for t in tensors)
        of_ranks = self.texts(described)
        if len(set(of_ranks)) > 1:
            raise ValueError(
                f"the {what} batches of the ranks differ beyond their first dimension, so that no rank can take all "
                f"samples: {', '.join(f'rank {rank}: {text}' for rank, text in enumerate(of_ranks))}. Pad them to one "
                "length."
            )
        counts = self.counts(len(tensors[0]))
        whole = iter([self._all(t, counts) for t in tensors])
        return pytree.tree_unflatten([next(whole) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)

    def in_step(self, place: int, what: str) -> None:
        """Wait until every rank is at the same place of a run, before they exchange what belongs there.

        Args:
            place: a number for it, 0 or more.
            what: it is, for messages.

        Raises:
            OutOfStep: if a rank is at another place, or has left its run.
        """
        places = self.counts(-1 - place)  # below 0, for ranks that have left to tell it from the size of what they say
        if left := [rank for rank, found in enumerate(places) if found >= 0]:
            raise OutOfStep(
                f"rank {self.rank} needs {what}, and {_ranks_named(left)} ended this part of the call without it: each "
                "rank must use the same sharded parameters. A mixture of experts uses those that the data picks: leave "
                "its experts unsharded, or run all of them on all rows."
            )
        if len(set(places)) > 1:
            others = [rank for rank, found in enumerate(places) if found != places[self.rank]]
            raise OutOfStep(
                f"rank {self.rank} needs {what}, and {_ranks_named(others)} another parameter: every rank must use the "
                "same sharded parameters in the same order. Is there anything in model_fn that the data or the rank "
                "decides?"
            )

    def texts(self, text: str) -> list[str]:
        """Each rank's text; a rank that waits in a run for this one learns that it has ended."""
        data = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8).to(self.device)
        counts = self.counts(len(data))
        while min(counts) < 0:
            counts = self.counts(len(data))
        parts = self._all(data, counts).cpu().split(counts)
        return [bytes(part.tolist()).decode().strip("\0") for part in parts]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What one rank raises inside, every rank raises: none waits for another that has left.

        Raises:
            RankFailed: if another rank raised.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        said = self.texts("" if error is None else f"{type(error).__name__}: {error}")
        why = [f"rank {rank}: {text}" for rank, text in enumerate(said) if text and not text.startswith("OutOfStep")]
        if error is not None and not (isinstance(error, OutOfStep) and why):
            raise error
        if why or any(said):
            raise RankFailed(f"another rank's share of this call failed. {'; '.join(why or filter(None, said))}")

    def rows(self, tensor: Tensor, counts: list[int], to: int | None = None) -> Tensor | None:
        """All ranks' tensors `[count, ...]`, one after the other: on every rank, or on one and None on the others."""
        if to is None:
            return self._all(tensor, counts)
        padded = _padded(tensor, max(counts))
        parts = [torch.empty_like(padded) for _ in counts] if to == self.rank else None
        with self._answered():
            dist.gather(padded, parts, dst=dist.get_global_rank(self.group, to), group=self.group)
        if parts is None:
            return None
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(tensor.dtype)

    def _all(self, tensor: Tensor, counts: list[int]) -> Tensor:
        """All ranks' tensors `[count, ...]`, one after the other."""
        parts = self._gathered(_padded(tensor, max(counts)))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(tensor.dtype)

    def _gathered(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        with self._answered():
            dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return parts

    @contextmanager
    def _answered(self) -> Iterator[None]:
        """Around an exchange: says what it means that one fails."""
        try:
            yield
        except RuntimeError as error:
            raise RankFailed(
                f"rank {self.rank} of {self.size} lost another rank in this call: its process ended, or did not come "
                f"to the same exchange within the group's timeout. Its own output says why. ({error})"
            ) from error


def _padded(tensor: Tensor, rows: int) -> Tensor:
    """A tensor as ranks exchange it: with so many rows, and bytes for bools."""
    plain = tensor.detach().to(torch.uint8) if tensor.dtype == torch.bool else tensor.detach()
    return torch.cat([plain, plain.new_zeros(rows - len(plain), *plain.shape[1:])])


def own_rank() -> int:
    """This process's rank in the default process group; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Ranks of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _flat(mesh: DeviceMesh) -> dist.ProcessGroup:
    """All ranks of a mesh of several dimensions."""
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD  # type: ignore[return-value]
    return mesh._flatten().get_group()


def _ranks_named(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
