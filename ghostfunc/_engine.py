"""The engine: dot products inside an ordinary PyTorch loop.

A thin layer over `functionalize` and `value_and_grad_dot`. `engine(X, Y)` computes losses, gradients and dots at once;
the loss that it returns is tied to the module's parameters by one `autograd.Function` whose backward hands over the
gradients that are already there. So `.grad` gets the mean *training* gradient through autograd itself: it accumulates,
and loss scaling, clipping and any optimizer work unchanged. Nothing is hooked, patched or stored on the module.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ghostfunc._engine_batch import AttachedBatch, as_batch, positions, require_finite, require_one_of, size_of
from ghostfunc._engine_gradient import Pending, loss_with_gradient
from ghostfunc._engine_nonfinite import Kept, kept_scores, require_finite_gradients
from ghostfunc._engine_output import EngineOutput
from ghostfunc._engine_ranks import average_gradients, together
from ghostfunc._engine_scores import Scorer, Scores
from ghostfunc._functionalize import LossFn, _default_call
from ghostfunc._losses import causal_lm_loss
from ghostfunc._ranks import Group, Ranks
from ghostfunc._sample_ids import SampleIds, names_of, split_ids
from ghostfunc.dotlog import DotLog

_OUTS = ("train", "param train", "train val")
_SCHEDULES = ("auto", "joint", "two-phase")


class GradDotProdEngine:
    """Gradient dot products with a validation batch, at every step of a training loop that stays as it is.

    Replace `model(...)` by `engine(...)`; after `loss.backward()`, `.grad` holds the mean training gradient, as after a
    plain step, to rounding (None for a parameter that the loss does not depend on).
    The validation rows never enter it.

    Args:
        module: the model. Its trainable parameters are looked up at each call, so that freezing, `module.to(...)` and
            optimizer steps are seen.
        val_batch: what the dots refer to: a dict, or a tuple `(X, Y)`.
        loss: `loss(output, batch) -> losses[B]`, as in `functionalize`. Under `causal_lm_loss` (the default), X are
            token ids `[B, T]`, Y the labels beside them (`[B, T]`, *not* shifted: the loss shifts once), and the batch
            is `{"input_ids": X, "labels": Y}`. Under any other, it is `(X, Y)`. A dict X gives `{**X, "labels": Y}`.
        call: `call(module, batch) -> output`, as in `functionalize`.
        optimizer: read for the learning rate of the values and the log (its first group's, when the engine is called).
        log: a `DotLog` for the dots; None keeps the last micro-batch's at `engine.dots`, and stores nothing.
        save_interval: `should_save_metrics(iteration)` holds at its multiples.
        out: `"train"`, `"param train"` (dots by parameter; the log stores their sum) or `"train val"` (`[n, m]`; the
            log stores the mean over the validation samples).
        layers: restricts the dots, never the gradient, to matching parameters, as in `value_and_grad_dot`.
        schedule: `"auto"`, `"joint"` or `"two-phase"`, as in `value_and_grad_dot`.
        precondition: a function of the validation gradient, as in `value_and_grad_dot`.
        dtype: of the dots, as in `value_and_grad_dot`.
        order: 1, or 2 for the values' second-order part as well, by `in_run_values`: a Hessian-vector product of the
            validation loss at each call. Needs `optimizer`. Dots are the same to rounding.
        group: the process group whose ranks train together, as in `ghost_grad_dot`: every rank calls the engine with
            its share of the samples, and has the dots of these; the validation batch is this rank's share too, or on
            every rank the whole. By default the ranks that the module is wrapped for (`DistributedDataParallel`,
            `fully_shard`), or none.
        on_nonfinite: what becomes of samples whose loss or gradient is not finite. `"raise"` raises FloatingPointError,
            which names them. `"skip"` goes on without them, with a warning that names them: the mean is over the other
            samples of all ranks, and the log has their rows without a dot. Only where no sample is left it raises. The
            losses are then computed once more.

    Attributes:
        dots: the last call's dots, detached; None before.
        values: `[n]`, the last call's values, `lr / n * dot + second_order`: the decrease of the mean validation loss
            that the sample makes in a step on this micro-batch, in the loss's unit (In-Run Data Shapley, arXiv
            2406.11011, section 4); n counts the samples of all ranks. None before, and without an optimizer. Such a
            step is `lr * precondition(gradient)`: plain gradient descent, unless a `precondition` says otherwise
            (`gf.adam(optimizer, model)`); clipping, momentum and weight decay are in it only as far as the
            precondition has them. Under accumulation over k equal micro-batches divide first-order values by k.
        second_order: `[n]`, the second-order part of `values`; None for order 1. Its sum over j runs over the samples
            of one call, which therefore have to be the whole batch of the optimizer's step: micro-batches interact.
        losses: the last call's per-sample losses `[n]`, detached; None before.
        skipped: `[n]`, which samples the last call went on without; their dots and values are nan. None where it took
            all.

    Raises:
        ValueError: for an unknown `out`, `schedule`, `on_nonfinite` or `order`, or a `save_interval` below 1; for order
            2 without an optimizer, or with an `out` or a `schedule` other than the default.

    On several ranks `loss.backward()` leaves a share in `.grad`, and `prepare_gradients()`, which has to come before
    the optimizer's step, its mean over the ranks: the mean training gradient of all ranks' samples, reduced once for
    all micro-batches of a step. What backwards of other losses have left in `.grad` is averaged with it.

    Under autocast (`with torch.autocast(...)` around the call) forwards run in the autocast dtype, and backwards, as
    they do in a plain loop, outside it. Under float16 the engine scales losses inside and takes the scale out again,
    so that small gradients do not vanish and `torch.amp.GradScaler` sees a loss, and gradients, as it does without the
    engine.

    Example:
        >>> import torch, ghostfunc as gf
        >>> from ghostfunc.engine import GradDotProdEngine
        >>> model, draw = torch.nn.Linear(4, 3), lambda n: (torch.randn(n, 4), torch.randint(3, (n,)))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> engine = GradDotProdEngine(model, draw(2), loss=gf.classification_loss)
        >>> for _ in range(3):
        ...     engine(*draw(5)).loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> engine.dots.shape
        torch.Size([5])
    """

    def __init__(
        self,
        module: nn.Module,
        val_batch: Any,
        *,
        loss: LossFn = causal_lm_loss,
        call: Callable[[nn.Module, Any], Any] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        log: DotLog | None = None,
        save_interval: int = 10,
        out: str = "train",
        layers: str = "",
        schedule: str = "auto",
        precondition: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
        dtype: torch.dtype | None = None,
        order: int = 1,
        group: Group | None = None,
        on_nonfinite: str = "raise",
    ) -> None:
        require_one_of("out", out, _OUTS)
        require_one_of("on_nonfinite", on_nonfinite, ("raise", "skip"))
        require_one_of("schedule", schedule, _SCHEDULES)
        if save_interval < 1:
            raise ValueError(f"save_interval={save_interval}: expected a number of iterations, 1 or more.")
        if order not in (1, 2):
            raise ValueError(f"order={order!r}: expected 1 (dot products) or 2 (the Hessian too).")
        if order == 2 and optimizer is None:
            raise ValueError("order=2 needs optimizer=: the second-order part depends on the learning rate.")
        if order == 2 and (out, schedule) != ("train", "auto"):
            raise ValueError(f"order=2 takes neither out={out!r} nor schedule={schedule!r}: leave their defaults.")
        self.module = module
        self.loss_fn = loss
        self.call = call or _default_call
        self.optimizer = optimizer
        self.log = log
        self.save_interval = save_interval
        self.dots: Any = None
        self.losses: Tensor | None = None
        self.values: Tensor | None = None
        self.second_order: Tensor | None = None
        self.skipped: Tensor | None = None
        self.on_nonfinite = on_nonfinite
        options = {"layers": layers, "precondition": precondition, "dtype": dtype}
        self._order = order
        self._scorer = Scorer(
            loss, self.call, order, options if order == 2 else options | {"out": out, "schedule": schedule}, group
        )
        self._val_batch = None if val_batch is None else self._as_val_batch(val_batch)
        self._attached: AttachedBatch | None = None
        self._latest: tuple[int, int] | None = None  # (iteration, micro_step) of the last call with an attached batch
        self._micro_batches = 1  # of the step before
        self._unlogged: list[dict[str, Any]] = []
        self._pending = Pending()
        self._shares_at: int | None = None  # the parameters' version, where `.grad` has shares of several ranks
        self._detached = False

    def attach_train_batch(
        self, X: Any, Y: Any, iteration: int, batch_idx: SampleIds, *, domains: Sequence[str] | None = None
    ) -> None:
        """Say which samples the next call will see, for the log and for error messages.

        Args:
            X: the inputs, as in the call.
            Y: the labels, as in the call.
            iteration: the optimizer step. Micro-steps of an iteration are counted by the engine.
            batch_idx: `[n]` sample ids, integers or `(domain, offset)` pairs.
            domains: `[n]` domain names, where `batch_idx` are integers; otherwise empty strings are logged.

        Raises:
            ValueError: if the number of ids or domains is not the number of samples, or Y does not fit X.
        """
        n = size_of(self._as_batch(X, Y))
        sample_ids, names = split_ids("batch_idx", batch_idx, domains)
        if not len(sample_ids) == len(names) == n:
            raise ValueError(
                f"attach_train_batch: the batch has {n} samples, but there are {len(sample_ids)} ids in batch_idx and "
                f"{len(names)} domains; expected one of each per sample."
            )
        self._attached = AttachedBatch(iteration, sample_ids, names)

    def prepare_forward_input(self, X: Any, Y: Any) -> tuple[Any, Any]:
        """Return `(X, Y)` unchanged: whether validation rows join the batch is decided inside the call (`schedule`)."""
        return X, Y

    def __call__(self, X: Any = None, Y: Any = None, /, **inputs: Any) -> EngineOutput:
        """Compute losses, the mean training gradient and the dots of one micro-batch.

        Args:
            X: the inputs: a tensor `[n, ...]` or a dict of them.
            Y: the labels `[n, ...]`; None where `loss` needs none, or X holds them.
            **inputs: instead of X and Y, the model's keywords with `labels` for Y: `engine(input_ids=X, labels=Y)`.

        Returns:
            The losses and dots; `.loss.backward()` deposits the gradient.

        Raises:
            RuntimeError: if the engine is detached for evaluation, or has a log and no attached batch; on several
                ranks, if parameters changed without `prepare_gradients`, or the call of another rank raised.
            ValueError: if there is no validation batch, the batch differs in size from the attached one, or Y does not
                fit X; for order 2, at the second call with an attached batch of one iteration.
            NotImplementedError: for order 2 under float16 autocast.
            FloatingPointError: if a loss, a dot or a value is not finite, and is not to be skipped; the message names
                the samples. If the gradient of a parameter is not; the message names the parameters.
        """
        ranks = self._scorer.ranks(self.module)
        with together(ranks):
            batch = self._batch_of_call(X, Y, inputs)
            micro_step = self._check_call(size_of(batch))
            if ranks is not None:
                self._require_averaged()
        kept = self._kept(batch, micro_step, ranks)
        scores = kept.scores
        learning_rate = float(self.optimizer.param_groups[0]["lr"]) if self.optimizer else math.nan
        with together(ranks):
            found = self._finite_values(scores, learning_rate)
            require_finite_gradients(scores)
        dots = kept.of_all(found[0])
        values, second_order = (None if v is None else kept.of_all(v) for v in found[1:])
        self.dots = pytree.tree_map(kept.of_all, scores.dots)
        self.losses, self.values, self.second_order, self.skipped = kept.losses, values, second_order, kept.skipped
        if self._attached is not None:
            self._latest = (self._attached.iteration, micro_step)
        if self.log is not None:
            self._remember_rows(micro_step, learning_rate, dots)
        self._attached = None
        loss = loss_with_gradient(scores.losses, scores.grads, scores.unused, self.module, self._pending)
        return EngineOutput(loss, kept.losses, scores.val_losses, self.dots, values, second_order)

    def prepare_gradients(self) -> None:
        """Check, before the optimizer's step, that every call's `loss.backward()` has run. `.grad` is then complete.

        On several ranks, each calls it, and `.grad` becomes its mean over them.

        Raises:
            RuntimeError: if the engine was not called since the last `prepare_gradients`, or a backward is missing.
        """
        ranks = self._scorer.ranks(self.module)
        with together(ranks):
            self._require_backwards()
        if ranks is not None:
            average_gradients(self.module, ranks)
        self._pending = Pending()
        self._shares_at = None
        self._scorer.forget()

    def aggregate_and_log(self) -> None:
        """Hand the dots of all calls since the last time to the log, one row per sample.

        Call it once per micro-batch or once per iteration, before or after `prepare_gradients`. Without a log it does
        nothing: the last dots are at `engine.dots`.
        """
        if self.log is not None:
            while self._unlogged:
                self.log.append(**self._unlogged[0])
                self._unlogged.pop(0)

    def should_save_metrics(self, iteration: int) -> bool:
        """Whether there is a log and `iteration` is a multiple of `save_interval`."""
        return self.log is not None and iteration % self.save_interval == 0

    def save_metrics(self, iteration: int) -> Path | None:
        """Write everything logged so far to disk.

        Args:
            iteration: the current iteration; rows carry their own, so that it is not needed here.

        Returns:
            The new file, or None if there was nothing to write.
        """
        self.aggregate_and_log()
        return self.log.save() if self.log is not None else None

    def clear_gradients(self) -> None:
        """Forget calls whose `loss.backward()` has not run. `.grad` belongs to the optimizer: `zero_grad` clears it."""
        self._pending = Pending()

    def detach_for_evaluation(self) -> None:
        """Refuse calls until `reattach_after_evaluation`, so that no evaluation batch gets into the log.

        Evaluation calls the module itself. As nothing is attached to it there is nothing to take off, and its training
        or evaluation mode is left as it is: `module.eval()` and `module.train()` stay the loop's.
        """
        self._detached = True

    def reattach_after_evaluation(self) -> None:
        """Accept calls again."""
        self._detached = False

    def update_validation_batch(self, X_val: Any, Y_val: Any = None) -> None:
        """Let later dots refer to another validation batch.

        Args:
            X_val: the inputs, or a dict that holds all.
            Y_val: the labels.

        Raises:
            ValueError: if there is a log: its dots refer to the one validation batch that it stores; or Y does not
                fit X.
        """
        if self.log is not None:
            raise ValueError(
                f"the log in {self.log.folder} stores one validation batch, which its dots refer to. Before "
                "update_validation_batch, call save_metrics and set engine.log to None or a DotLog in another folder."
            )
        self._val_batch = self._as_batch(X_val, Y_val)
        self._scorer.forget()

    def cleanup(self) -> None:
        """Write what is not saved yet. Call it at the end, in a `finally` for runs that may fail."""
        self.aggregate_and_log()
        if self.log is not None:
            self.log.save()
        self._attached = None
        self._pending = Pending()

    def _batch_of_call(self, X: Any, Y: Any, inputs: dict[str, Any]) -> Any:
        if inputs:
            if X is not None or Y is not None:
                raise TypeError("the engine takes either X and Y or the model's keywords, not both.")
            Y = inputs.pop("labels", None)
            X = inputs["input_ids"] if inputs.keys() == {"input_ids"} else inputs
        return self._as_batch(X, Y)

    def _as_batch(self, X: Any, Y: Any) -> Any:
        return as_batch(X, Y, is_text=self.loss_fn is causal_lm_loss)

    def _as_val_batch(self, val_batch: Any) -> Any:
        return self._as_batch(*val_batch) if isinstance(val_batch, (tuple, list)) else self._as_batch(val_batch, None)

    def _check_call(self, n: int) -> int:
        """Raise where a call with n samples has no place; otherwise its micro-step."""
        if self._detached:
            raise RuntimeError(
                "the engine is detached for evaluation: call the module itself for evaluation losses, and "
                "reattach_after_evaluation() before the next training step."
            )
        if self.log is not None and self._attached is None:
            raise RuntimeError(
                "the engine has a log but no attached batch: call attach_train_batch(X, Y, iteration, batch_idx) "
                "before each engine(X, Y), micro-steps included, so that the log knows its samples."
            )
        if self._attached is not None and len(self._attached.sample_ids) != n:
            raise ValueError(
                f"the engine was called with {n} samples, but attach_train_batch was given "
                f"{len(self._attached.sample_ids)}; attach the batch that the call will see."
            )
        if self._val_batch is None:
            raise ValueError("no validation batch: pass val_batch, or call update_validation_batch(X_val, Y_val).")
        micro_step = self._micro_step()
        if self._order == 2 and micro_step > 0:
            raise ValueError(
                "order=2 needs the whole batch of an optimizer's step in one call, because its samples interact; this "
                "is the second call of one iteration. Enlarge the batch, or use order=1."
            )
        return micro_step

    def _require_averaged(self) -> None:
        """Raise if the optimizer has stepped on the shares of one rank."""
        version = sum(p._version for p in self.module.parameters())
        if self._shares_at not in (None, version):
            raise RuntimeError(
                "the parameters have changed since the engine's last call, without prepare_gradients(): it takes the "
                "mean of the gradients over the ranks, and must come before optimizer.step(), or the ranks drift apart."
            )
        self._shares_at = version

    def _require_backwards(self) -> None:
        calls, backwards = self._pending.calls, self._pending.backwards
        if calls == 0:
            raise RuntimeError("prepare_gradients: the engine has not been called since the last prepare_gradients().")
        if backwards < calls:
            raise RuntimeError(
                f"prepare_gradients: loss.backward() ran {backwards} times for {calls} engine calls; call it on the "
                "loss of every engine(X, Y) first, or there is no gradient to step with."
            )

    def _finite_values(self, scores: Scores, learning_rate: float) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Dots per sample, values, and the second-order part of these."""
        dots = scores.dots_per_sample
        names = self._sample_names(len(dots))  # those of samples that were skipped are not needed: all are finite then
        self._require_finite("dot", dots, names)
        if math.isnan(learning_rate):
            return dots, None, None
        values = learning_rate / scores.all_n * dots
        if scores.curved is None:
            return dots, values, None
        second_order = learning_rate**2 * scores.curved
        self._require_finite("second-order term", second_order, names)
        return dots, values + second_order, second_order

    def _kept(self, batch: Any, micro_step: int, ranks: Ranks | None) -> Kept:
        """The scores of all samples, or of those that have finite ones."""
        step = self._shared_step(micro_step)
        if self.on_nonfinite == "raise":
            scores = self._scores(batch, step, ranks)
            return Kept(scores, scores.losses, None)
        return kept_scores(
            lambda rows: self._scores(rows, step, ranks),
            lambda rows: self._scorer.losses(self.module, rows),
            batch,
            ranks,
            may_be_empty=self._scorer.takes_none(self.module),
            names=self._sample_names(size_of(batch)),
        )

    def _scores(self, batch: Any, step: int | None, ranks: Ranks | None) -> Scores:
        device = next(self.module.parameters()).device
        val_batch = pytree.tree_map_only(Tensor, lambda t: t.to(device), self._val_batch)
        try:
            return self._scorer.scores(self.module, batch, val_batch, step)
        except Exception as error:
            if self.on_nonfinite == "skip" or (ranks is None and not isinstance(error, ValueError)):
                raise
            # The transform knows rows of the batch; whoever attached the batch wants to read which samples they are.
            with together(ranks):
                try:
                    val_losses, losses = (self._scorer.losses(self.module, rows) for rows in (val_batch, batch))
                except Exception:
                    raise error from None
                self._require_finite("validation loss", val_losses, positions(len(val_losses)))
                self._require_finite("training loss", losses, self._sample_names(len(losses)))
            raise

    def _shared_step(self, micro_step: int) -> int | None:
        """The step whose micro-batches share one validation gradient; None where there is, or will be, but one."""
        if self._attached is None or not self._scorer.can_share():
            return None
        if micro_step == 0:  # as many as the step before had
            self._micro_batches = 1 if self._latest is None else self._latest[1] + 1
        return self._attached.iteration if micro_step > 0 or self._micro_batches > 1 else None

    def _micro_step(self) -> int:
        """The place of the attached batch among those of its iteration."""
        if self._attached is None or self._latest is None or self._latest[0] != self._attached.iteration:
            return 0
        return self._latest[1] + 1

    def _remember_rows(self, micro_step: int, learning_rate: float, dots: Tensor) -> None:
        assert self._attached is not None
        self._unlogged.append(
            {
                "iteration": self._attached.iteration,
                "micro_step": micro_step,
                "sample_ids": self._attached.sample_ids,
                "domains": self._attached.domains,
                "losses": self.losses,
                "dots": dots,
                "learning_rate": learning_rate,
                "second_order": self.second_order,
                "skipped": self.skipped,
            }
        )

    def _require_finite(self, what: str, values: Tensor, names: list[str]) -> None:
        require_finite(what, values, names, None if self._attached is None else self._attached.iteration)

    def _sample_names(self, n: int) -> list[str]:
        return positions(n) if self._attached is None else names_of(self._attached.sample_ids, self._attached.domains)
