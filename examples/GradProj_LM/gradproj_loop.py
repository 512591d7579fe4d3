"""The pass over a corpus: this process's share of the batches that the store lacks, and a shard every few of them.

A run can be killed anywhere. Shards are whole or not there, and a shard is always of the same batches, so that the same
command goes on with those that are missing and ends with the same bytes, whatever its number of processes.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

import ghostfunc as gf
from shared.dataloader import TokenCorpus
from shared.distributed import Launch
from shared.utils import DTYPES, Stopped, StopRequest, peak_memory, stop_request, wait_for, write_whole

try:
    from tqdm import tqdm
except ImportError as error:
    raise ImportError('the projection loop needs tqdm: pip install "ghostfunc[examples]"') from error


@dataclass
class Run:
    """One configuration, ready to be projected.

    Attributes:
        options: the parsed options of `main.py`.
        configuration: what decides the run's numbers.
        folder: the run's own folder, a store.
        launch: the processes that share the run, and this one's device.
        corpus: the data.
        samples: how many of its blocks are projected, from the first on.
        model: whose gradients are projected.
    """

    options: Any
    configuration: dict[str, Any]
    folder: Path
    launch: Launch
    corpus: TokenCorpus
    samples: int
    model: PreTrainedModel


def autocast_of(run: Run) -> torch.autocast:
    """The context of the forward passes."""
    train_dtype = DTYPES[run.options.train_dtype]
    return torch.autocast(run.launch.device.type, train_dtype, enabled=train_dtype != run.model.dtype)


class Projector:
    """Projects a run from where its folder says it was; every process of the launch makes one.

    Args:
        run: what to project.

    Raises:
        ValueError: if `--proj_layers` matches nothing, processes project different things, or their disks are not one.
        StoreError: if the folder holds another run, or is damaged.
        RankFailed: if another process raised one of these.
    """

    def __init__(self, run: Run) -> None:
        options, launch = run.options, run.launch
        self.run = run
        self.autocast = autocast_of(run)
        launch.require_shared(run.folder)
        self.engine = gf.GradProjEngine(
            run.model,
            proj_layers=options.proj_layers,
            proj_rank_total=options.proj_rank_total,
            proj_rank_min=options.proj_rank_min,
            proj_seed=options.proj_seed,
            proj_dtype=options.proj_dtype,
            proj_row_orthonormal=options.proj_row_orthonormal,
            include_embeddings=options.include_embeddings,
            proj_dir=run.folder,
            proj_save_interval=options.proj_save_interval,
            config=run.configuration,
            group=dist.group.WORLD if launch.size > 1 else None,
        )
        with self.autocast:
            example = run.corpus.in_order(0, 1).tokens
            self.engine.attach(example, samples=run.samples, batch_size=options.batch_size)
        self.done = self.engine.rows_written
        if launch.is_first:
            write_whole(run.folder / "config.json", json.dumps(vars(options), indent=2) + "\n")
        print(f"{self.engine.metadata['dim']:,} numbers a sample, of {len(self.engine.metadata['layers'])} weights")
        if options.verbose:
            print(self.engine.projection)

    def project(self) -> None:
        """Project what is left; on SIGTERM or Ctrl-C stop after the current batch.

        Raises:
            SystemExit: after a signal, with the shell's code for it.
            StoreError: if a shard is damaged or cannot be written.
            FloatingPointError: if a sample's loss or gradient is not finite.
            RankFailed: if another process raised, or was stopped.
        """
        run = self.run
        if 0 < self.done < run.samples:
            print(f"continuing after {self.done} samples")
        start = self._clock()
        with stop_request() as stop:
            try:
                self._project_share(stop)
            except Stopped as stopped:
                # What no shard holds yet is computed again: a shard of fewer batches would be another file.
                print(
                    f"{stopped}, {self.engine.rows_written} samples are written; the same command continues from there"
                )
                raise SystemExit(128 + stopped.signum) from None
        self.engine.detach()
        if self.done == run.samples:
            print(f"complete: {run.folder}")
            return
        self._write_statistics(self._clock() - start)
        print(f"results: {run.folder}")

    def _project_share(self, stop: StopRequest) -> None:
        """Every batch that this process has to project. The bar is of the first process, which stands for all."""
        run = self.run
        with (
            self.engine.batches() as batches,
            tqdm(
                initial=self.done,
                total=run.samples,
                unit="sample",
                desc="GradProj",
                mininterval=0.5 if sys.stderr.isatty() else 10,
                disable=not run.launch.is_first or self.done == run.samples,
            ) as bar,
        ):
            for rows in batches:
                stop.check()
                batch = run.corpus.in_order(rows.start, rows.stop)
                with self.autocast:
                    self.engine.collect_batch(batch.tokens, batch.offsets, domains=batch.domains)
                bar.update(min(len(rows) * run.launch.size, run.samples - bar.n))

    def _write_statistics(self, seconds: float) -> None:
        run, samples = self.run, self.run.samples - self.done
        metadata = self.engine.metadata
        peaks = run.launch.gathered(peak_memory(run.launch.device))
        statistics = {
            "samples": run.samples,
            "dim": metadata["dim"],
            "ranks": {name: [layer["k_i"], layer["k_o"]] for name, layer in metadata["layers"].items()},
            "since_last_start": {
                "samples": samples,
                "seconds": seconds,
                "samples_per_second": samples / seconds,
                "tokens_per_second": samples * run.options.block_size / seconds,
                "peak_memory_bytes": max(peaks, key=lambda peak: peak or 0),
                "processes": run.launch.size,
                "device": str(run.launch.device),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            },
        }
        if run.launch.is_first:
            write_whole(run.folder / "statistics.json", json.dumps(statistics, indent=2) + "\n")

    def _clock(self) -> float:
        wait_for(self.run.launch.device)
        return time.perf_counter()
