"""Where the projection engine's rows go: into a store that grows with a loop, or that a pass over known data fills.

A loop's ranks are in step: the rows of a step follow each other rank by rank, and rank 0 writes them. In a pass sample
i is row i: a shard is of the same batches whichever rank writes it, and ranks exchange no rows.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ghostfunc._kronecker import KroneckerProjection
from ghostfunc._parquet import import_pyarrow
from ghostfunc._ranks import Ranks

SECONDS_TO_SEE_A_FILE = 60.0  # NFS remembers for up to half a minute that a file was not there


class Collected(NamedTuple):
    """A batch's rows, as they are stored, and their samples.

    Attributes:
        rows: `[n, k]`.
        losses: `[n]`.
        sample_ids: `[n]`.
        domains: `[n]`.
    """

    rows: Tensor
    losses: Tensor
    sample_ids: list[int]
    domains: list[str]

    def of_all(self, ranks: Ranks) -> Collected:
        """All ranks' batches as one, in the order of the ranks, on the CPU."""
        mine = {"rows": self.rows, "losses": self.losses, "ids": torch.tensor(self.sample_ids, dtype=torch.int64)}
        whole = ranks.batch({name: tensor.to(ranks.device) for name, tensor in mine.items()}, "projected")
        domains = [domain for text in ranks.texts(json.dumps(self.domains)) for domain in json.loads(text)]
        return Collected(whole["rows"].cpu(), whole["losses"].cpu(), whole["ids"].tolist(), domains)


def _as_stored(batches: Sequence[Collected]) -> tuple[Tensor, Any]:
    """The rows of batches one after the other, and the table of their samples."""
    pyarrow = import_pyarrow("a GradProjEngine with proj_dir")
    losses = torch.cat([batch.losses.float().cpu() for batch in batches])
    samples = pyarrow.table(
        {
            "sample_id": pyarrow.array([i for batch in batches for i in batch.sample_ids], pyarrow.int64()),
            "domain": pyarrow.array([d for batch in batches for d in batch.domains], pyarrow.string()),
            "loss": pyarrow.array(losses.numpy(), pyarrow.float32()),
        }
    )
    return torch.cat([batch.rows for batch in batches]), samples


def layers_of(projection: KroneckerProjection) -> dict[str, Any]:
    """What each layer's numbers are, for people and for JSON."""
    return {
        name: {
            "shape": part["shape"],
            "blocks": part["blocks"],
            "d_i": part["d_in"],
            "d_o": part["d_out"],
            "k_i": part["k_in"],
            "k_o": part["k_out"],
            "slice": part["columns"],
            "clipped": part["clipped"],
        }
        for name, part in projection.describe()["parameters"].items()
    }


def open_source(
    folder: Path,
    projection: KroneckerProjection,
    dtype: str,
    model: str,
    config: Mapping[str, Any],
    samples: int | None,
    shard_rows: int | None,
) -> Any:
    """The store of a projection's rows, begun or gone on with, and in it the source of the data that `config` names.

    Args:
        folder: of the store.
        projection: whose rows they are.
        dtype: in which they are stored.
        model: what the model is called where `config` does not say it.
        config: what else decides the rows.
        samples: how many the data have; None for a source that grows.
        shard_rows: rows of a shard; None for a source that grows.

    Raises:
        StoreError: if the folder holds something else, or is damaged.
    """
    from ghostfunc.index import StoreWriter

    data = config.get("data", {})
    writer = StoreWriter(
        folder,
        dim=projection.dim,
        dtype=dtype,
        slices=projection.slices,
        model=config.get("model", {"name": model}),
        projection={**projection.describe(), "fingerprint": projection.fingerprint},
        settings={name: value for name, value in config.items() if name not in ("model", "data")},
    )
    name, fingerprint = data.get("name", "collected"), data.get("fingerprint", "")
    if samples is None or shard_rows is None:
        return writer.source(name, fingerprint=fingerprint, rows=None)
    return writer.source(name, fingerprint=fingerprint, rows=samples, shard_rows=shard_rows)


def require_same(ranks: Ranks, decided: Mapping[str, Any]) -> None:
    """Raise ValueError on every rank, naming those that would fill a store with something else than the first."""
    of_ranks = [json.loads(text) for text in ranks.texts(json.dumps(decided, default=str))]
    differing = [
        f"{name} is {there.get(name)!r} on rank {rank} and {of_ranks[0].get(name)!r} on rank 0"
        for rank, there in enumerate(of_ranks)
        for name in of_ranks[0] | there
        if there.get(name) != of_ranks[0].get(name)
    ]
    if differing:
        raise ValueError(
            f"the ranks would fill one store with different rows: {'; '.join(differing[:8])}. Give all of them the "
            "same model and the same options."
        )


class Loop:
    """Rows of an ordinary loop, in the order in which they come; of several ranks one step's after the other's.

    Args:
        source: a `ghostfunc.index.Source` that grows; None on ranks other than the first, or where nothing is stored.
        stores: whether anything is.
        interval: write a shard after so many batches.
        ranks: those that are in step; None for one process.

    Attributes:
        rows_written: rows of the store, the same on every rank.
    """

    def __init__(self, source: Any, stores: bool, interval: int, ranks: Ranks | None) -> None:
        self._source = source
        self._stores = stores
        self._interval = interval
        self._ranks = ranks
        written = 0 if source is None else source.rows_written
        self.rows_written: int = written if ranks is None else ranks.counts(written)[0]
        self._rows = self.rows_written
        self._of_step = 0  # samples of all ranks in this step
        self._unsaved: list[Collected] = []  # on the rank that writes
        self._batches = 0

    def together(self) -> AbstractContextManager[None]:
        """Around this rank's share of a step: what one rank raises, all raise."""
        return nullcontext() if self._ranks is None else self._ranks.together()

    def first_row(self, n: int) -> int:
        """The row of the first of this rank's n samples."""
        counts, rank = ([n], 0) if self._ranks is None else (self._ranks.counts(n), self._ranks.rank)
        self._of_step = sum(counts)
        return self._rows + sum(counts[:rank])

    def add(self, batch: Collected) -> None:
        """Keep this rank's rows of a step, and save when it is time."""
        self._rows += self._of_step
        if not self._stores:
            return
        whole = batch if self._ranks is None else batch.of_all(self._ranks)
        if self._source is not None:
            self._unsaved.append(whole)
        self._batches += 1
        if self._batches >= self._interval:
            self.save()

    def save(self) -> None:
        """Write what was added since the last time as one shard."""
        if self._batches == 0:
            return
        with self.together():
            if self._source is not None:
                self._source.append(*_as_stored(self._unsaved))
        self.rows_written = self._rows
        self._unsaved, self._batches = [], 0


class Pass:
    """Rows of a pass over data of known length, whose shards ranks write each for itself.

    Ranks go from shard to shard together, so that none works on after another has failed; what a rank has written is
    there for the next run, whatever its number of ranks.

    Args:
        source: a `ghostfunc.index.Source` of that length.
        batch_size: samples of a batch; the last of a shard may have fewer.
        ranks: those that share the pass; None for one process.
    """

    def __init__(self, source: Any, batch_size: int, ranks: Ranks | None) -> None:
        self._source = source
        self._batch_size = batch_size
        self._ranks = ranks
        self._expected: range | None = None
        self._collected: list[Collected] = []
        self._others_wait = False  # for this rank's part of a shard each, in `batches`

    @property
    def rows_written(self) -> int:
        """Rows of the store, whichever rank has written them."""
        return self._source.rows_written

    def together(self) -> AbstractContextManager[None]:
        """Nothing: ranks have different numbers of batches, and `batches` tells them of errors."""
        return nullcontext()

    def first_row(self, n: int) -> int:
        """The row of the first sample of the batch that is expected."""
        if self._expected is None:
            raise RuntimeError("collect_batch: this is a pass, so collect the samples that engine.batches() gives.")
        if n != len(self._expected):
            raise ValueError(
                f"collect_batch: the batch has {n} samples; samples {self._expected.start} to {self._expected.stop} "
                "are expected, as engine.batches() gave them."
            )
        return self._expected.start

    def add(self, batch: Collected) -> None:
        """Keep the rows of the batch that was expected."""
        self._collected.append(batch)
        self._expected = None

    def save(self) -> None:
        """Nothing: shards are written when they are whole."""

    @contextmanager
    def batches(self) -> Iterator[Iterator[range]]:
        """This rank's share of the samples that the store lacks, batch by batch; inside, errors are every rank's."""
        missing = self._missing()
        self._require_there(missing)
        size, rank = (1, 0) if self._ranks is None else (self._ranks.size, self._ranks.rank)
        rounds = [missing[first : first + size] for first in range(0, len(missing), size)]
        self._others_wait, self._expected, self._collected = bool(rounds), None, []
        try:
            yield self._batches_of(rounds, rank)
            if self._others_wait and size > 1:
                raise RuntimeError(f"rank {rank} has left engine.batches() before its end, and the others need it.")
        except Exception as error:
            if self._others_wait:
                self._tell(error)
            raise
        finally:
            self._others_wait, self._expected = False, None

    def _batches_of(self, rounds: list[list[Any]], rank: int) -> Iterator[range]:
        for number, shards in enumerate(rounds):
            self._others_wait = True
            if rank < len(shards):
                yield from self._batches_of_shard(shards[rank])
            self._others_wait = False
            self._tell(None)
            if number == 0:
                self._require_there(missing=[shard for later in rounds[1:] for shard in later])

    def _batches_of_shard(self, shard: Any) -> Iterator[range]:
        self._collected = []
        for start in range(shard.start, shard.stop, self._batch_size):
            batch = self._expected = range(start, min(start + self._batch_size, shard.stop))
            yield batch
            if self._expected is not None:
                raise RuntimeError(f"samples {batch.start} to {batch.stop} were given by engine.batches(), and not "
                                   "collected: call collect_batch once with each.")  # fmt: skip
        self._source.write(shard, *_as_stored(self._collected))

    def _missing(self) -> list[Any]:
        """The shards that are not there, the same on every rank; each of the others was checked by a rank."""
        if self._ranks is None:
            return self._source.missing()
        with self._ranks.together():
            mine = self._source.missing(self._ranks.rank, self._ranks.size)
        numbers = {int(n) for text in self._ranks.texts(" ".join(str(s.number) for s in mine)) for n in text.split()}
        return [shard for shard in self._source.shards if shard.number in numbers]

    def _tell(self, error: Exception | None) -> None:
        """Raise this rank's error, or that of another rank."""
        with nullcontext() if self._ranks is None else self._ranks.together():
            if error is not None:
                raise error

    def _require_there(self, missing: list[Any]) -> None:
        """Raise on all ranks if one of them does not find every shard but these: then they do not share a disk."""
        if self._ranks is None:
            return
        from ghostfunc.index import StoreError

        expected = self._source.rows - sum(shard.rows for shard in missing)
        with self._ranks.together():
            deadline = time.monotonic() + SECONDS_TO_SEE_A_FILE
            while self._source.rows_written < expected and time.monotonic() < deadline:
                time.sleep(0.1)
            if (found := self._source.rows_written) < expected:
                raise StoreError(
                    f"rank {self._ranks.rank} finds {found} rows in the store, and the ranks have written {expected}: "
                    "is proj_dir on a disk that all ranks share? A pass needs one. Put it there, or start the ranks on "
                    "one machine."
                )
