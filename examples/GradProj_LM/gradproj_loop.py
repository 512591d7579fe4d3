"""The loop over a corpus: batches in the data's order, their projections, a shard every few batches.

A run can be killed anywhere. Shards are whole or not there, and a shard is always of the same batches, so that the same
command goes on after the last one and ends with the same bytes.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import ghostfunc as gf
from shared.dataloader import TokenCorpus
from shared.utils import DTYPES, Stopped, peak_memory, stop_request, wait_for, write_whole

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
        device: where the model is.
        corpus: the data.
        samples: how many of its blocks are projected, from the first on.
        model: whose gradients are projected.
    """

    options: Any
    configuration: dict[str, Any]
    folder: Path
    device: torch.device
    corpus: TokenCorpus
    samples: int
    model: PreTrainedModel


def autocast_of(run: Run) -> torch.autocast:
    """The context of the forward passes."""
    train_dtype = DTYPES[run.options.train_dtype]
    return torch.autocast(run.device.type, train_dtype, enabled=train_dtype != run.model.dtype)


class Projector:
    """Projects a run from where its folder says it was.

    Args:
        run: what to project.

    Raises:
        ValueError: if `--proj_layers` matches nothing.
        StoreError: if the folder holds another run, or is damaged.
    """

    def __init__(self, run: Run) -> None:
        options = run.options
        self.run = run
        self.autocast = autocast_of(run)
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
        )
        with self.autocast:
            self.engine.attach(run.corpus.in_order(0, 1).tokens)
        self.done = self.engine.rows_written
        write_whole(run.folder / "config.json", json.dumps(vars(options), indent=2) + "\n")
        print(f"{self.engine.metadata['dim']:,} numbers a sample, of {len(self.engine.metadata['layers'])} weights")
        if options.verbose:
            print(self.engine.projection)

    def project(self) -> None:
        """Project what is left; on SIGTERM or Ctrl-C stop after the current batch.

        Raises:
            SystemExit: after a signal, with the shell's code for it.
            StoreError: if a shard cannot be written.
            FloatingPointError: if a sample's loss or gradient is not finite.
        """
        run, batch_size = self.run, self.run.options.batch_size
        if self.done == run.samples:
            print(f"complete: {run.folder}")
            return
        if self.done:
            print(f"continuing after {self.done} samples")
        bar = tqdm(
            initial=self.done,
            total=run.samples,
            unit="sample",
            desc="GradProj",
            mininterval=0.5 if sys.stderr.isatty() else 10,
        )
        start = self._clock()
        with bar, stop_request() as stop:
            try:
                for first in range(self.done, run.samples, batch_size):
                    stop.check()
                    batch = run.corpus.in_order(first, min(first + batch_size, run.samples))
                    with self.autocast:
                        self.engine.collect_batch(batch.tokens, batch.offsets, domains=batch.domains)
                    bar.update(len(batch.offsets))
            except Stopped as stopped:
                # What no shard holds yet is computed again: a shard of fewer batches would be another file.
                bar.write(
                    f"{stopped}, {self.engine.rows_written} samples are written; the same command continues from there"
                )
                raise SystemExit(128 + stopped.signum) from None
        self.engine.detach()
        self._write_statistics(self._clock() - start)
        print(f"results: {run.folder}")

    def _write_statistics(self, seconds: float) -> None:
        samples = self.run.samples - self.done
        metadata = self.engine.metadata
        statistics = {
            "samples": self.run.samples,
            "dim": metadata["dim"],
            "ranks": {name: [layer["k_i"], layer["k_o"]] for name, layer in metadata["layers"].items()},
            "since_last_start": {
                "samples": samples,
                "seconds": seconds,
                "samples_per_second": samples / seconds,
                "tokens_per_second": samples * self.run.options.block_size / seconds,
                "peak_memory_bytes": peak_memory(self.run.device),
                "device": str(self.run.device),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            },
        }
        write_whole(self.run.folder / "statistics.json", json.dumps(statistics, indent=2) + "\n")

    def _clock(self) -> float:
        wait_for(self.run.device)
        return time.perf_counter()
