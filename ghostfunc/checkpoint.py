"""Checkpoints of a training: model, optimizer, random numbers, and the ledger and log up to them, by all ranks.

`torch.distributed.checkpoint` (DCP) writes and reads the tensors: each rank its own shards, resharded where a later run
has other ranks. Its default format is a pickle: its reader unpickles `.metadata`, and its planner every object that is
not a tensor, and unpickling can run code. So tensors go through its safetensors writer and reader, whose metadata are
the files' headers, and everything else is JSON: no file is ever unpickled. (DCP's plans, which the ranks of a running
job tell each other, are pickled between these processes alone.)

A checkpoint is a folder `step-<step>`:

    tensors/shard-<rank + 1>-*.safetensors   what the rank has written; a tensor that all ranks have, one of them does
    state.json                               everything else
    checksums.json                           of these files

It is written beside its place, synced to disk, and moved there when all ranks are done: it is there whole, or not.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer

from ghostfunc._checkpoint_files import REMOVED, appears, checksum, remove, sync
from ghostfunc._generators import digest_of, generator_states, seed_generators, set_generator_states
from ghostfunc._parquet import sync_folder, write_atomically
from ghostfunc._plain_state import as_json, from_json, tensors_in
from ghostfunc._ranks import Group, Ranks
from ghostfunc._training_state import ModelState, OptimizerState

_STEP, _DRAFT = "step-", ".draft-"
_TENSORS, _STATE, _CHECKSUMS = "tensors", "state.json", "checksums.json"
_MARK = ".shared-"
_FORMAT = 1


@runtime_checkable
class Records(Protocol):
    """What a run writes down step by step: an `InRunShapley`, a `DotLog`."""

    def save(self) -> Any:
        """Write what is not written yet."""
        ...

    def resume(self, iteration: int, /) -> None:
        """Drop what was written of this step and later ones."""
        ...


class Resumed(NamedTuple):
    """What `TrainingCheckpoints.load` found.

    Attributes:
        step: the steps that are done; 0 where there is no checkpoint.
        extra: what was given to `save`.
        folder: the checkpoint; None where there is none.
    """

    step: int
    extra: Any
    folder: Path | None


class TrainingCheckpoints:
    """Checkpoints of a training run, from which it goes on as if it had never stopped, whatever killed it.

    A checkpoint holds the model (plain, in `DistributedDataParallel`, or sharded by `fully_shard`), the optimizer, the
    states of the random number generators of each rank, and whatever else is named here. It vouches for the run's
    records: these are saved before it, and cut back to it when it is loaded.

    Args:
        folder: where checkpoints live; made by the first `save`. All ranks need to share it.
        model: saved from where it is, and loaded in place; tied tensors once.
        optimizer: its parameters have to be the model's.
        also: other objects with a state, by name: a `GradScaler`, a scheduler. The state has to be numbers, text, None
            and tensors, in dicts, lists and tuples, and the same on every rank.
        records: ledgers and logs of this rank.
        keep: how many checkpoints stay; older ones are removed when a new one is complete.
        beside: `beside(folder)`, called by rank 0, writes further files into a checkpoint, for instance a model folder
            for another program; they are whole or not there, as the rest.
        group: the ranks of the run; None takes all ranks of torch.distributed, or where that is not set up this process
            alone.

    Every rank calls `save` and `load`, at the same steps. With NCCL each has to have its device set
    (`torch.accelerator.set_device_index`).

    With another number of ranks than at `save` tensors are resharded, and `also` and `extra` are as they were. Random
    states belong to a rank's place among the ranks, which is another one then: where all ranks had the same states, all
    have them again; otherwise each rank is seeded anew by rank 0's saved state and its own number, so that
    ranks draw different numbers, and two such resumptions the same.

    Example:
        >>> import tempfile, torch
        >>> from ghostfunc.checkpoint import TrainingCheckpoints
        >>> folder, model = tempfile.mkdtemp(), torch.nn.Linear(3, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> TrainingCheckpoints(folder, model, optimizer).save(5, extra={"best_loss": 0.5}).name
        'step-00000005'
        >>> other = torch.nn.Linear(3, 2)
        >>> checkpoints = TrainingCheckpoints(folder, other, torch.optim.AdamW(other.parameters()))
        >>> checkpoints.load()[:2]
        (5, {'best_loss': 0.5})
        >>> torch.equal(other.weight, model.weight)
        True
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        also: Mapping[str, Stateful] | None = None,
        records: Sequence[Records] = (),
        keep: int = 1,
        beside: Callable[[Path], object] | None = None,
        group: Group | None = None,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep}: expected 1 checkpoint or more.")
        self.folder = Path(folder)
        self.keep = keep
        self._model = ModelState(model)
        self._optimizer = None if optimizer is None else OptimizerState(optimizer, model)
        self._also = dict(also or {})
        self._records = list(records)
        self._beside = beside
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        self._ranks = Ranks.of(group, self._device)
        self._rank, self._size = (0, 1) if self._ranks is None else (self._ranks.rank, self._ranks.size)

    def save(self, step: int, extra: Any = None) -> Path:
        """Save the records, write the checkpoint whole or not at all, and then remove older ones.

        Args:
            step: the steps that are done, 0 or more. A checkpoint of this step that is there already stays as it is.
            extra: numbers, text, None and tensors, in dicts, lists and tuples; the same on every rank.

        Returns:
            The checkpoint's folder.

        Raises:
            TypeError: if a state holds anything that cannot be stored as JSON or a tensor; the message says where.
            RuntimeError: if ranks do not share the folder.
            RankFailed: if another rank failed; nothing is left of this checkpoint, and older ones stay.
            OSError: if the disk refuses.
        """
        final = self.folder / f"{_STEP}{step:08d}"
        with self._together():
            for records in self._records:
                records.save()
        if self._of_first_rank("there" if final.exists() else "new") == "there":
            return final
        draft = final.with_name(f"{_DRAFT}{final.name}")
        with self._together():
            if self._rank == 0:
                self._sweep()
                (draft / _TENSORS).mkdir(parents=True)
        with self._together():
            tensors: dict[str, Tensor] = {}
            state, mine = self._state(step, extra, tensors)
        writer = HuggingFaceStorageWriter(str(draft / _TENSORS), save_distributed=True)
        self._collectively(f"write {final}", dcp_save, tensors, storage_writer=writer, planner=_Contiguous())
        with self._together():
            own = sorted((draft / _TENSORS).glob(f"shard-{self._rank + 1:05d}-*"))
            mine["files"] = {f"{_TENSORS}/{path.name}": checksum(path) for path in own}
        of_ranks = [json.loads(text) for text in self._texts(json.dumps(mine))]
        with self._together():
            if self._rank == 0:
                self._complete(draft, final, state | {"random": [said["random"] for said in of_ranks]}, of_ranks)
        return final

    def load(self) -> Resumed:
        """Load the newest checkpoint in place, and cut the records back to it.

        Returns:
            The steps that are done, and what was saved beside them; without a checkpoint 0 steps, and then the records
            are emptied and everything else is left as it is.

        Raises:
            ValueError: if the newest checkpoint is damaged, or is of another model or optimizer; the message names it
                and what differs. Nothing is changed.
            RuntimeError: if ranks see different checkpoints.
            RankFailed: if another rank failed.
        """
        self._require_shared()
        found = sorted(path.name for path in self.folder.glob(f"{_STEP}*"))
        newest = found[-1] if found else ""
        seen = self._texts(newest)
        if len(set(seen)) > 1:
            listed = ", ".join(f"rank {rank}: {name or 'none'}" for rank, name in enumerate(seen))
            raise RuntimeError(f"the ranks see different checkpoints in {self.folder} ({listed}). {_SHARED}")
        if not newest:
            self._resume_records(0)
            return Resumed(0, None, None)
        path = self.folder / newest
        with self._together():
            state = self._checked(path)
            targets = self._targets(path, state)
        reader = HuggingFaceStorageReader(str(path / _TENSORS))
        self._collectively(f"read {path}", dcp_load, targets, storage_reader=reader, planner=DefaultLoadPlanner())
        with self._together():
            self._take(state, targets)
        self._resume_records(state["step"])
        return Resumed(state["step"], from_json(state["extra"], targets), path)

    def _state(self, step: int, extra: Any, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Everything as JSON, what is all ranks' and what is this rank's, with their tensors."""
        states = generator_states(self._device)
        shared = {
            "format": _FORMAT,
            "step": step,
            "ranks": self._size,
            "model": as_json(self._model.get(), "model", tensors),
            "optimizer": self._optimizer and as_json(self._optimizer.get(), "optimizer", tensors),
            "also": as_json({name: found.state_dict() for name, found in self._also.items()}, "also", tensors),
            "extra": as_json(extra, "extra", tensors),
        }
        own = {"digest": digest_of(states), "states": as_json(states, f"random/{self._rank}", tensors)}
        return shared, {"random": own}

    def _complete(self, draft: Path, final: Path, state: dict[str, Any], of_ranks: list[dict[str, Any]]) -> None:
        """Write what is not tensors, move the draft to its place, and remove older checkpoints."""
        checksums: dict[str, Any] = {}
        for rank, said in enumerate(of_ranks):
            for name, written in said["files"].items():
                if not (draft / name).is_file():
                    raise RuntimeError(f"rank {rank} wrote {name}, which rank 0 does not see in {draft}. {_SHARED}")
                checksums[name] = written
        if self._beside is not None:
            self._beside(draft)
            for path in draft.rglob("*"):
                if path.is_file() and path.parent != draft / _TENSORS:  # these, DCP has synced
                    sync(path)
        write_atomically(draft / _STATE, lambda file: file.write(json.dumps(state, indent=1).encode()))
        checksums[_STATE] = checksum(draft / _STATE)
        write_atomically(draft / _CHECKSUMS, lambda file: file.write(json.dumps(checksums, indent=1).encode()))
        sync_folder(draft / _TENSORS)
        os.rename(draft, final)
        sync_folder(self.folder)
        for older in sorted(self.folder.glob(f"{_STEP}*"))[: -self.keep]:
            remove(older)

    def _require_shared(self) -> None:
        """Raise, on every rank, unless all see the folder of rank 0: now, and not after hours at the first `save`."""
        if self._ranks is None:
            return
        mark = self.folder / f"{_MARK}{uuid.uuid4().hex}"
        with self._together():
            if self._rank == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                mark.touch()
        name = self._of_first_rank(mark.name)
        seen = self._texts("" if appears(self.folder / name) else "not")
        if self._rank == 0:
            mark.unlink()
        if strangers := [str(rank) for rank, text in enumerate(seen) if text]:
            raise RuntimeError(
                f"rank {', '.join(strangers)} does not see what rank 0 writes to {self.folder}. {_SHARED}"
            )

    def _sweep(self) -> None:
        """Remove what killed runs have left of their drafts and of checkpoints that they were removing."""
        for prefix in (_DRAFT, REMOVED):
            for leftover in self.folder.glob(f"{prefix}*"):
                shutil.rmtree(leftover)

    def _checked(self, path: Path) -> dict[str, Any]:
        """The state of a checkpoint, whose files this rank has checked its share of.

        Raises:
            ValueError: if a file is damaged or missing.
        """
        remedy = f"Restore {path.name}, or move it away: the run then goes on from the checkpoint before it, if any."
        try:
            checksums = json.loads((path / _CHECKSUMS).read_text())
            mine = sorted(set(checksums) - {_STATE})[self._rank :: self._size]
            for name in (_STATE, *mine):
                found, stored = checksum(path / name), checksums[name]
                if found != stored:
                    raise ValueError(f"{name} is {found}, and should be {stored}")
            state = json.loads((path / _STATE).read_text())
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {error}. {remedy}") from error
        if state["format"] != _FORMAT:
            raise ValueError(f"{path} has format {state['format']}; this version of ghostfunc reads format {_FORMAT}.")
        return state

    def _targets(self, path: Path, state: dict[str, Any]) -> dict[str, Tensor]:
        """Where the checkpoint's tensors belong, by name: the model's own tensors, and new ones for the rest.

        Raises:
            ValueError: if the checkpoint is of another model or optimizer, or of other objects.
        """
        targets = self._model.targets(state["model"], str(path))
        if (state["optimizer"] is None) != (self._optimizer is None):
            there, here = ("no optimizer", "one") if self._optimizer else ("the state of an optimizer", "none")
            raise ValueError(f"{path} has {there}, and {here} was given.")
        if self._optimizer is not None:
            targets |= self._optimizer.targets(state["optimizer"], str(path))
        if state["also"].keys() != self._also.keys():
            raise ValueError(f"{path} has the states of {sorted(state['also'])}, and also= has {sorted(self._also)}.")
        rest = [state["also"], state["extra"], self._random_states(state)]
        targets |= {name: torch.empty(shape, dtype=dtype) for name, shape, dtype in tensors_in(rest)}
        return targets

    def _take(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Hand everything over to where it belongs, once its tensors are read."""
        self._model.set(from_json(state["model"], tensors))
        if self._optimizer is not None:
            self._optimizer.set(from_json(state["optimizer"], tensors))
        for name, found in self._also.items():
            found.load_state_dict(from_json(state["also"][name], tensors))
        random = self._random_states(state)
        if random is None:
            seed_generators(f"{state['random'][0]['digest']} rank {self._rank} of {self._size}")
        else:
            set_generator_states(from_json(random, tensors), self._device)

    def _random_states(self, state: dict[str, Any]) -> Any:
        """The random states that are to be this rank's; None where it is to be seeded anew."""
        of_ranks = state["random"]
        if len(of_ranks) == self._size:
            return of_ranks[self._rank]["states"]
        return of_ranks[0]["states"] if len({found["digest"] for found in of_ranks}) == 1 else None

    def _resume_records(self, step: int) -> None:
        # One rank first: ranks may share a folder, where it cuts for all of them.
        for turn in (True, False):
            with self._together():
                if (self._rank == 0) == turn:
                    for records in self._records:
                        records.resume(step)

    def _collectively(self, what: str, call: Callable[..., Any], tensors: dict[str, Tensor], **options: Any) -> None:
        """Let DCP write or read the tensors on all ranks; what one raises, all raise."""
        group = None if self._ranks is None else self._ranks.group
        # Views: a slice of a safetensors file needs a dimension.
        tensors = {name: tensor.view(1) if tensor.dim() == 0 else tensor for name, tensor in tensors.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of one process without a group, and of deprecated calls of its own
            try:
                call(tensors, process_group=group, no_dist=group is None, **options)
            except CheckpointException as error:
                causes = "; ".join(f"rank {rank}: {type(e).__name__}: {e}" for rank, (e, _) in error.failures.items())
                raise RuntimeError(f"cannot {what}: {causes}") from error

    def _together(self) -> AbstractContextManager[None]:
        return nullcontext() if self._ranks is None else self._ranks.together()

    def _texts(self, text: str) -> list[str]:
        return [text] if self._ranks is None else self._ranks.texts(text)

    def _of_first_rank(self, text: str) -> str:
        return self._texts(text)[0]


_SHARED = "All ranks need the same folder, on a disk that they share."


class _Contiguous(DefaultSavePlanner):
    """DCP's planner for tensors of any layout: safetensors takes contiguous ones."""

    def transform_object(self, write_item: Any, object: Any) -> Any:
        """What is written of a tensor."""
        return super().transform_object(write_item, object).contiguous()
