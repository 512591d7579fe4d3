"""The training loop: one step is the same for both methods but for where its gradient comes from.

A run is a sequence of steps that can be cut between any two of them. Batches are a function of (seed, step), so that a
checkpoint of model, optimizer and random numbers, with the log's rows and the ledger's values up to it, is the state.
Each of several processes takes its part of every batch, and writes its own files of the log and the ledger.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import ghostfunc as gf
from shared.dataloader import Batch, Corpora
from shared.distributed import Launch
from shared.training_utils import (
    Evaluations,
    build_optimizer,
    evaluate,
    learning_rate_at,
    load_checkpoint,
    save_checkpoint,
)
from shared.utils import DTYPES, Stopped, StopRequest, stop_request, wait_for, write_whole

try:
    from tqdm import tqdm
except ImportError as error:
    raise ImportError('the training loop needs tqdm: pip install "ghostfunc[examples]"') from error

GRADIENT_CLIP = 1.0


@dataclass
class Run:
    """One configuration, ready to train.

    Attributes:
        options: the parsed options of `main.py`.
        configuration: what decides the run's numbers, as `config.json` holds it.
        folder: the run's own folder.
        launch: the processes, and where the model of this one is.
        corpora: the data.
        model: the model at its start.
    """

    options: Any
    configuration: dict[str, Any]
    folder: Path
    launch: Launch
    corpora: Corpora
    model: PreTrainedModel


@dataclass
class Timings:
    """Seconds of steps, and of the same steps done plainly."""

    steps: list[float] = field(default_factory=list)
    interleaved: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)

    def summary(self, launch: Launch, tokens_per_step: int) -> dict[str, Any]:
        """Medians. The first step, which warms up caches and allocators, is left out where there is another."""
        seconds = statistics.median(self.steps[1:] or self.steps)
        summary = {
            "device": str(launch.device),
            "processes": launch.size,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "steps": len(self.steps),
            "step_seconds": seconds,
            "tokens_per_second": tokens_per_step / seconds,
        }
        if self.plain:
            ghost, plain = statistics.median(self.interleaved), statistics.median(self.plain)
            summary["interleaved"] = {
                "steps": len(self.plain),
                "ghost_step_seconds": ghost,
                "plain_step_seconds": plain,
                "ratio": ghost / plain,
            }
        return summary


def as_text(losses: dict[str, float]) -> str:
    """The losses of an evaluation in one line."""
    return ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())


class Trainer:
    """Trains a run from where its folder says it was.

    Args:
        run: what to train.
    """

    def __init__(self, run: Run) -> None:
        options, device = run.options, run.launch.device
        self.run = run
        self.launch = run.launch
        self.options = options
        self.model = run.model
        self.optimizer = build_optimizer(options.optimizer, self.model, options.learning_rate)
        train_dtype = DTYPES[options.train_dtype]
        self.autocast = torch.autocast(device.type, train_dtype, enabled=train_dtype != self.model.dtype)
        self.scaler = torch.GradScaler(device.type, enabled=train_dtype == torch.float16)
        self.checkpoints = run.folder / "checkpoint"
        self.done = load_checkpoint(self.checkpoints, self.model, self.optimizer, self.scaler)
        if self.done:
            print(f"continuing after {self.done} steps")
        self.val = run.corpora.val.sample(options.val_batch_size, seed=options.seed, step=0).tokens  # [m, T]
        self.engine = self._build_engine()
        self.ledger: gf.InRunShapley | None = None
        self.evaluations: Evaluations | None = None  # the first process's
        # The first process cuts what all have written after the checkpoint, before the others look.
        for turn in (True, False):
            with self.launch.together():
                if self.launch.is_first == turn:
                    self._open_results()
        self.evaluated = self.launch.gathered(self.evaluations and self.evaluations.iterations)[0]
        self.timings = Timings()

    def _build_engine(self) -> gf.GhostEngineManager:
        options, launch = self.options, self.launch
        # Fewer samples than processes: all of them take all, whose mean is the same.
        val = self.val.tensor_split(launch.size)[launch.rank] if len(self.val) >= launch.size else self.val
        # exact: with a frozen second moment, values of the first steps come out orders of magnitude too large.
        metric = gf.adam(self.optimizer, self.model, exact=True) if options.metric == "adam" else None
        return gf.GhostEngineManager(options, self.model, self.optimizer, val_data=(val, val), precondition=metric)

    def _open_results(self) -> None:
        """Open what this process writes; the first one cuts all of it at the checkpoint."""
        options, folder = self.options, self.run.folder
        if self.launch.is_first:
            resume_at = None if options.eval_only else self.done
            self.evaluations = Evaluations(folder / "evaluations.csv", resume_at=resume_at)
        if options.method == "Regular" or options.eval_only:
            return
        val_batch = {"input_ids": self.val, "labels": self.val} if self.launch.is_first else None
        log = gf.DotLog(folder / "dot_log", config=self.run.configuration, val_batch=val_batch)
        ledger = gf.InRunShapley(folder / "values")
        if self.launch.is_first:
            log.resume(self.done)
            ledger.resume(self.done)
        self.engine.log, self.ledger = log, ledger

    @property
    def is_complete(self) -> bool:
        """Whether the last step is done, and evaluated where that is due."""
        return self.done == self.options.max_steps and not self._evaluation_is_due()

    def train(self) -> None:
        """Train to the last step; on SIGTERM or Ctrl-C save everything after the current step and exit.

        Raises:
            SystemExit: after a signal, with the shell's code for it.
        """
        options = self.options
        bar = tqdm(
            initial=self.done,
            total=options.max_steps,
            unit="step",
            desc=options.method,
            mininterval=0.5 if sys.stderr.isatty() else 10,
            disable=not self.launch.is_first,
        )
        with bar, stop_request(self.launch.highest if self.launch.size > 1 else None) as stop:
            try:
                while True:
                    stop.check()
                    if self._evaluation_is_due():
                        losses = self.evaluate(stop)
                        bar.write(f"after {self.done} steps: {as_text(losses)}")
                    if self.done == options.max_steps:
                        break
                    self._step(bar)
                    if self.done % options.checkpoint_interval == 0:
                        self._checkpoint()
                self._checkpoint()
            except Stopped as stopped:
                self._checkpoint()
                bar.write(f"{stopped} after {self.done} steps; the same command continues from there")
                raise SystemExit(128 + stopped.signum) from None
            finally:
                self._flush()

    def evaluate(self, stop: StopRequest | None = None) -> dict[str, float]:
        """Evaluate the model as it is, and write the result down.

        Returns:
            The mean loss of each split, as `shared.training_utils.evaluate` gives it.
        """
        options = self.options
        self.engine.detach_for_evaluation()
        try:
            losses = evaluate(
                self.model,
                self.run.corpora,
                batch_size=options.eval_bs,
                batches=options.eval_iter,
                seed=options.seed + 1,  # other draws than the training's
                device=self.launch.device,
                autocast=self.autocast,
                stop=stop or StopRequest(),
                launch=self.launch,
            )
        finally:
            self.engine.reattach_after_evaluation()
        if self.evaluations is not None and self.done not in self.evaluated:
            self.evaluations.append(self.done, losses)
        self.evaluated.add(self.done)
        return losses

    def _evaluation_is_due(self) -> bool:
        at_interval = self.done > 0 and self.done % self.options.eval_interval == 0
        return at_interval and self.done not in self.evaluated

    def _step(self, bar: tqdm) -> None:
        options, iteration = self.options, self.done
        batches = [
            self.run.corpora.train.sample(
                options.batch_size,
                seed=options.seed,
                step=iteration * options.gradient_accumulation_steps + micro_step,
                rank=self.launch.rank,
                ranks=self.launch.size,
            )
            for micro_step in range(options.gradient_accumulation_steps)
        ]
        learning_rate = learning_rate_at(
            iteration, peak=options.learning_rate, warmup_steps=options.warmup_step, max_steps=options.max_steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        interleave = options.interleave_plain and iteration % options.interleave_plain == options.interleave_plain - 1
        plain_seconds = self._time_plain_gradient(batches) if interleave else 0.0

        start = self._clock()
        loss = self._gradient(batches, iteration)
        before_update = self._clock()
        self._update()
        update_seconds = self._clock() - before_update
        self._log(iteration)
        seconds = self._clock() - start

        self.timings.steps.append(seconds)
        if interleave:
            self.timings.interleaved.append(seconds)
            self.timings.plain.append(plain_seconds + update_seconds)
        self.done += 1
        tokens = sum(batch.tokens.numel() for batch in batches) * self.launch.size
        bar.set_postfix_str(f"loss {loss:.3f}, {tokens / seconds:,.0f} tokens/s", refresh=False)
        bar.update()

    def _gradient(self, batches: list[Batch], iteration: int) -> float:
        """Leave the mean gradient of all processes' samples in `.grad`, and return their mean loss."""
        losses = []
        for micro_step, batch in enumerate(batches):
            X = Y = batch.tokens.to(self.launch.device)  # [B, T]; the loss shifts the labels
            self.engine.attach_train_batch(X, Y, iteration, batch.offsets, domains=batch.domains)
            X_forward, Y_forward = self.engine.prepare_forward_input(X, Y)
            with self.autocast:
                loss = self.engine(X_forward, Y_forward).loss
            self._backward(loss)
            losses.append(loss.detach())
            if self.ledger is not None:
                self._count_values(batch, iteration, micro_step)
        self.engine.prepare_gradients()
        return statistics.fmean(self.launch.gathered(torch.stack(losses).mean().item()))

    def _count_values(self, batch: Batch, iteration: int, micro_step: int) -> None:
        assert self.ledger is not None and self.engine.values is not None
        self.ledger.add(
            batch.offsets,
            self.engine.values / self.options.gradient_accumulation_steps,
            domains=batch.domains,
            iteration=iteration,
            micro_step=micro_step,
            second_order=self.engine.second_order,
            skipped=self.engine.skipped,
        )

    def _backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss / self.options.gradient_accumulation_steps).backward()

    def _update(self) -> None:
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_CLIP)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _log(self, iteration: int) -> None:
        self.engine.aggregate_and_log()
        if self.engine.should_save_metrics(iteration):
            self.engine.save_metrics(iteration)
        self.engine.clear_gradients()
        self.optimizer.zero_grad()

    def _time_plain_gradient(self, batches: list[Batch]) -> float:
        """Seconds of a plain step's gradient on the same batches; nothing of it stays, random numbers included."""
        device = self.launch.device
        plain = gf.GhostEngineManager({"method": "Regular"}, self.model, None)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            start = self._clock()
            for batch in batches:
                X = batch.tokens.to(device)
                with self.autocast:
                    loss = plain(X, X).loss
                self._backward(loss)
            plain.prepare_gradients()
            seconds = self._clock() - start
        self.optimizer.zero_grad()
        return seconds

    def _clock(self) -> float:
        wait_for(self.launch.device)
        return time.perf_counter()

    def _checkpoint(self) -> None:
        self._save_scores()  # first: a checkpoint vouches for the log and the ledger up to it
        save_checkpoint(self.checkpoints, self.done, self.model, self.optimizer, self.scaler)

    def _save_scores(self) -> None:
        self.engine.save_metrics(self.done)
        if self.ledger is not None:
            self.ledger.save()

    def _flush(self) -> None:
        self._save_scores()
        self.engine.cleanup()
        if self.timings.steps and self.launch.is_first:
            samples = self.options.batch_size * self.options.gradient_accumulation_steps * self.launch.size
            summary = self.timings.summary(self.launch, samples * self.options.block_size)
            write_whole(self.run.folder / "timing.json", json.dumps(summary, indent=2) + "\n")
