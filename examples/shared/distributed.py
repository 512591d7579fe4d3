"""Several processes of one command, as torchrun or srun start them: who they are, and what they tell each other."""

import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from shared.utils import pick_device

_UNTIL_SEEN = 3.0  # seconds that a network file system may take to show another machine's file


class _Place(NamedTuple):
    rank: int
    size: int
    local_rank: int


@dataclass(frozen=True)
class Launch:
    """The processes of one command. All of them call its methods in the same order.

    Attributes:
        device: of this process.
        rank: which of them this is, from 0.
        size: how many there are; 1 without a launcher.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints, and writes what there is once."""
        return self.rank == 0

    def gathered(self, value: Any) -> list[Any]:
        """Each process's value, in the order of ranks: anything that can be pickled."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """What one process raises inside, all raise: none waits for another that has left. Inside, none may wait.

        Raises:
            ValueError: if another process raised; with its rank and its message.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        said = self.gathered("" if error is None else str(error) or type(error).__name__)
        if error is not None:
            raise error
        if any(said):
            raise ValueError("; ".join(f"process {rank}: {text}" for rank, text in enumerate(said) if text))

    def require_same(self, what: str, values: dict[str, Any]) -> None:
        """Raise on every process if they do not all have the same values.

        Raises:
            ValueError: with what differs.
        """
        for rank, others in enumerate(all_values := self.gathered(values)):
            first = all_values[0]
            differ = [name for name in first | others if first.get(name) != others.get(name)]
            if differ:
                shown = "; ".join(f"{n}: {first.get(n)!r} in process 0, {others.get(n)!r} in {rank}" for n in differ)
                raise ValueError(f"the processes of one run were started with different {what}: {shown}")

    def copy_first(self, model: nn.Module) -> None:
        """Give every process the parameters and buffers of the first, so that they cannot start from different ones."""
        if self.size > 1:
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.detach(), 0)

    def highest(self, value: int) -> int:
        """The highest of all processes' values."""
        return max(self.gathered(value))

    def require_shared(self, folder: Path) -> None:
        """Raise on every process if they do not find each other's files in a folder, which is made.

        Raises:
            ValueError: with who does not; an OSError in a process that cannot write there.
        """
        if self.size == 1:
            return
        token = self.gathered(uuid.uuid4().hex)[0]
        files = [folder / f".seen-{token}-{rank}" for rank in range(self.size)]
        with self.together():
            folder.mkdir(parents=True, exist_ok=True)
            files[self.rank].touch()
        deadline = time.monotonic() + _UNTIL_SEEN
        while not (is_seen := files[0].exists()) and time.monotonic() < deadline:
            time.sleep(0.1)
        found = self.gathered((is_seen, socket.gethostname()))
        files[self.rank].unlink()
        if apart := [f"{rank} on {host}" for rank, (is_seen, host) in enumerate(found) if not is_seen]:
            raise ValueError(
                f"{folder} is another folder for process {', '.join(apart)} than for process 0 on {found[0][1]}: name "
                "one that is on a disk of all machines, the same everywhere"
            )


@contextmanager
def launched(device: str, timeout: float) -> Iterator[Launch]:
    """Join the other processes of this command, if a launcher started several, and leave them at the end.

        with launched(options.device, options.timeout) as launch:
            print("once")
            losses = launch.gathered(own_loss)

    torchrun says through RANK, WORLD_SIZE and LOCAL_RANK who a process is, srun through SLURM_PROCID,
    SLURM_STEP_NUM_TASKS and SLURM_LOCALID. Standard output of other processes than the first is dropped meanwhile.

    Args:
        device: as for `pick_device`; "auto" and "cuda" are one GPU for each process of a machine.
        timeout: seconds that a process waits for another before it gives up.

    Raises:
        ValueError: if there is no such device for this process, or the launcher did not say where the first one is.
    """
    place = _place()
    if place.size == 1:
        yield Launch(pick_device(device))
        return
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise ValueError(
            f"{' and '.join(missing)} must say where process 0 of {place.size} is: torchrun sets them; with srun write "
            'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=29500 before it'
        )
    own = _device_of(device, place.local_rank)
    backend = "gloo" if own.type == "cpu" else f"cpu:gloo,{own.type}:{dist.get_default_backend_for_device(own)}"
    if own.type != "cpu":
        torch.accelerator.set_device_index(own)
    dist.init_process_group(backend, rank=place.rank, world_size=place.size, timeout=timedelta(seconds=timeout))
    launch = Launch(own, place.rank, place.size)
    with open(os.devnull, "w") as nowhere, nullcontext() if launch.is_first else redirect_stdout(nowhere):
        yield launch
    launch.gathered(None)  # none leaves while another still needs it; after an error it leaves as it is
    dist.destroy_process_group()


def _place() -> _Place:
    """Who this process is. A batch script of Slurm is no step of srun's, and there is one of it."""
    environment = os.environ
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    else:
        return _Place(0, 1, 0)
    return _Place(*(int(environment.get(name, "0")) for name in names))


def _device_of(name: str, local_rank: int) -> torch.device:
    """The device of one of a machine's processes."""
    device = pick_device(name)
    if device.type == "cpu":
        return device
    if device.index is not None:
        raise ValueError(f"--device {name}: several processes cannot have one device. Use --device {device.type}.")
    there = torch.accelerator.device_count()
    if local_rank >= there > 1:
        raise ValueError(
            f"process {local_rank} of this machine has no device: there are {there} of type {device.type}. Start one "
            "process for each, or use --device cpu."
        )
    return torch.device(device.type, local_rank if local_rank < there else 0)  # srun may show each process its own
