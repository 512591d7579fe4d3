"""Dot products inside an ordinary PyTorch loop: `engine(X, Y).loss.backward()` where `model(X, Y).loss.backward()` was.

A thin layer over `functionalize` and `value_and_grad_dot`. `engine(X, Y)` computes losses, gradients and dots at once;
the loss that it returns is tied to the module's parameters by one `autograd.Function` whose backward hands over the
gradients that are already there. So `.grad` gets the mean *training* gradient through autograd itself: it accumulates,
and loss scaling, clipping and any optimizer work unchanged. Nothing is hooked, patched or stored on the module.
"""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from ghostfunc._functionalize import LossFn, _default_call, functionalize
from ghostfunc._losses import causal_lm_loss
from ghostfunc._transforms import ValueAndGradDot, value_and_grad_dot
from ghostfunc.dotlog import DotLog

METHODS = ("GradDotProd", "Regular")
OUTS = ("train", "param train", "train val")
SCHEDULES = ("auto", "joint", "two-phase")
_FLOAT16_LOSS_SCALE = 2.0**16

SampleIds = Tensor | np.ndarray | Sequence[Any]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class EngineOutput:
    """What `engine(X, Y)` returns.

    Attributes:
        loss: the mean training loss, a scalar whose `backward()` adds the mean training gradient to `.grad`.
        losses: `[n]`, the loss of each training sample.
        val_losses: `[m]`, the loss of each validation sample; None under `method="Regular"`.
        dots: `[n]`, <grad l_i, mean_j grad l_j>, i a training and j a validation sample (or what `out` asks for); None
            under `method="Regular"`. Free of the loss's scaling and of any division by micro-steps.
    """

    loss: Tensor
    losses: Tensor
    val_losses: Tensor | None
    dots: Any


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
        optimizer: read for the learning rate that the log stores (its first group's, when the engine is called).
        log: a `DotLog` for the dots; None keeps the last micro-batch's at `engine.dots`, and stores nothing.
        save_interval: `should_save_metrics(iteration)` holds at its multiples.
        out: `"train"`, `"param train"` (dots by parameter; the log stores their sum) or `"train val"` (`[n, m]`; the
            log stores the mean over the validation samples).
        layers: restricts the dots, never the gradient, to matching parameters, as in `value_and_grad_dot`.
        schedule: `"auto"`, `"joint"` or `"two-phase"`, as in `value_and_grad_dot`.
        precondition: a function of the validation gradient, as in `value_and_grad_dot`.
        dtype: of the dots, as in `value_and_grad_dot`.

    Attributes:
        dots: the last call's dots, detached; None before.
        losses: the last call's per-sample losses `[n]`, detached; None before.

    Raises:
        ValueError: for an unknown `out` or `schedule`, or a `save_interval` below 1.

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
    ) -> None:
        _require_one_of("out", out, OUTS)
        _require_one_of("schedule", schedule, SCHEDULES)
        if save_interval < 1:
            raise ValueError(f"save_interval={save_interval}: expected a number of iterations, 1 or more.")
        self.module = module
        self.loss_fn = loss
        self.call = call or _default_call
        self.optimizer = optimizer
        self.log = log
        self.save_interval = save_interval
        self.dots: Any = None
        self.losses: Tensor | None = None
        self._options = {
            "out": out,
            "layers": layers,
            "schedule": schedule,
            "precondition": precondition,
            "dtype": dtype,
        }
        self._val_batch = None if val_batch is None else self._as_val_batch(val_batch)
        self._attached: _AttachedBatch | None = None
        self._latest: tuple[int, int] | None = None  # (iteration, micro_step) of the last logged call
        self._unlogged: list[dict[str, Any]] = []
        self._pending = _Pending()
        self._loss_scale = _FLOAT16_LOSS_SCALE
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
        n = _batch_size(self._as_batch(X, Y))
        sample_ids, names = _split_ids(batch_idx, domains)
        if not len(sample_ids) == len(names) == n:
            raise ValueError(
                f"attach_train_batch: the batch has {n} samples, but there are {len(sample_ids)} ids in batch_idx and "
                f"{len(names)} domains; expected one of each per sample."
            )
        self._attached = _AttachedBatch(iteration, sample_ids, names)

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
            RuntimeError: if the engine is detached for evaluation, or has a log and no attached batch.
            ValueError: if there is no validation batch, the batch differs in size from the attached one, or Y does not
                fit X.
            FloatingPointError: if a loss or a dot is not finite; the message names the samples.
        """
        batch = self._batch_of_call(X, Y, inputs)
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
        n = _batch_size(batch)
        if self._attached is not None and len(self._attached.sample_ids) != n:
            raise ValueError(
                f"the engine was called with {n} samples, but attach_train_batch was given "
                f"{len(self._attached.sample_ids)}; attach the batch that the call will see."
            )
        if self._val_batch is None:
            raise ValueError("no validation batch: pass val_batch, or call update_validation_batch(X_val, Y_val).")
        result = self._value_and_grad_dot(batch)
        dots = _per_sample(result.dots)
        self._require_finite("dot", dots, self._sample_names(n))

        self.losses, self.dots = result.losses, result.dots
        if self.log is not None:
            self._remember_rows(result.losses, dots)
        self._attached = None
        return EngineOutput(self._loss_with_gradient(result), result.losses, result.val_losses, result.dots)

    def prepare_gradients(self) -> None:
        """Check, before the optimizer's step, that every call's `loss.backward()` has run. `.grad` is then complete.

        Raises:
            RuntimeError: if the engine was not called since the last `prepare_gradients`, or a backward is missing.
        """
        calls, backwards = self._pending.calls, self._pending.backwards
        if calls == 0:
            raise RuntimeError("prepare_gradients: the engine has not been called since the last prepare_gradients().")
        if backwards < calls:
            raise RuntimeError(
                f"prepare_gradients: loss.backward() ran {backwards} times for {calls} engine calls; call it on the "
                "loss of every engine(X, Y) first, or there is no gradient to step with."
            )
        self._pending = _Pending()

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
        self._pending = _Pending()

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

    def cleanup(self) -> None:
        """Write what is not saved yet. Call it at the end, in a `finally` for runs that may fail."""
        self.aggregate_and_log()
        if self.log is not None:
            self.log.save()
        self._attached = None
        self._pending = _Pending()

    def _batch_of_call(self, X: Any, Y: Any, inputs: dict[str, Any]) -> Any:
        if inputs:
            if X is not None or Y is not None:
                raise TypeError("the engine takes either X and Y or the model's keywords, not both.")
            Y = inputs.pop("labels", None)
            X = inputs["input_ids"] if inputs.keys() == {"input_ids"} else inputs
        return self._as_batch(X, Y)

    def _as_batch(self, X: Any, Y: Any) -> Any:
        """The batch that `functionalize` hands to the module and to the loss."""
        is_text = self.loss_fn is causal_lm_loss and isinstance(X, Tensor)
        if is_text and isinstance(Y, Tensor) and X.shape != Y.shape:
            raise ValueError(
                f"labels of shape {tuple(Y.shape)} do not fit token ids of shape {tuple(X.shape)}: expected one label "
                "beside each token, [B, T] and [B, T], not shifted (causal_lm_loss shifts once)."
            )
        if is_text:
            batch = {"input_ids": X} if Y is None else {"input_ids": X, "labels": Y}
        elif isinstance(X, Mapping):
            batch = dict(X) if Y is None else {**X, "labels": Y}
        else:
            batch = X if Y is None else (X, Y)
        _batch_size(batch)
        return batch

    def _as_val_batch(self, val_batch: Any) -> Any:
        return self._as_batch(*val_batch) if isinstance(val_batch, (tuple, list)) else self._as_batch(val_batch, None)

    def _value_and_grad_dot(self, batch: Any) -> ValueAndGradDot:
        device = next(self.module.parameters()).device
        val_batch = pytree.tree_map_only(Tensor, lambda t: t.to(device), self._val_batch)
        autocast_dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None

        def autocast() -> AbstractContextManager:
            # Without the cache of cast weights: what one forward caches must not reach the next one's graph.
            return torch.autocast(device.type, autocast_dtype, autocast_dtype is not None, cache_enabled=False)

        with torch.autocast(device.type, enabled=False):  # for the backwards: the forwards enter it themselves
            if autocast_dtype != torch.float16:
                return self._scaled_run(batch, val_batch, autocast, 1.0)
            # As GradScaler does, overflow halves the scale; unlike there, the step is tried again, not given up.
            result = self._scaled_run(batch, val_batch, autocast, self._loss_scale)
            while self._loss_scale > 1 and _overflowed(result):
                self._loss_scale /= 2
                result = self._scaled_run(batch, val_batch, autocast, self._loss_scale)
            return result

    def _scaled_run(
        self, batch: Any, val_batch: Any, autocast: Callable[[], AbstractContextManager], scale: float
    ) -> ValueAndGradDot:
        """Run the transform on losses times `scale`, which is out of the results again."""

        def call(module: nn.Module, batch: Any) -> Any:
            with autocast():
                return self.call(module, batch)

        def loss(output: Any, batch: Any) -> Tensor:
            with autocast():
                losses = self.loss_fn(output, batch)
            # In float32 at least: float16 has no room for scaled losses.
            return losses if scale == 1 else losses.to(torch.promote_types(losses.dtype, torch.float32)) * scale

        model_fn, params = functionalize(self.module, loss, call=call)
        try:
            result = value_and_grad_dot(model_fn, params, batch, val_batch, **self._options)
        except ValueError:
            # The transform knows rows of the batch; whoever attached the batch wants to read which samples they are.
            with torch.no_grad():
                val_losses, losses = model_fn(params, val_batch), model_fn(params, batch)
            self._require_finite("validation loss", val_losses, _positions(len(val_losses)))
            self._require_finite("training loss", losses, self._sample_names(len(losses)))
            raise
        return result if scale == 1 else _unscale(result, scale)

    def _loss_with_gradient(self, result: ValueAndGradDot) -> Tensor:
        parameters = dict(self.module.named_parameters())
        self._pending.calls += 1
        used = {name: grad for name, grad in result.grads.items() if name not in result.unused}
        handover = _Handover(list(used.values()), self._pending)
        return _TrainLoss.apply(result.losses.mean(), handover, *(parameters[name] for name in used))  # type: ignore[return-value]

    def _remember_rows(self, losses: Tensor, dots: Tensor) -> None:
        assert self._attached is not None
        iteration = self._attached.iteration
        same_iteration = self._latest is not None and self._latest[0] == iteration
        micro_step = self._latest[1] + 1 if self._latest is not None and same_iteration else 0
        self._latest = (iteration, micro_step)
        self._unlogged.append(
            {
                "iteration": iteration,
                "micro_step": micro_step,
                "sample_ids": self._attached.sample_ids,
                "domains": self._attached.domains,
                "losses": losses,
                "dots": dots,
                "learning_rate": self.optimizer.param_groups[0]["lr"] if self.optimizer else float("nan"),
            }
        )

    def _require_finite(self, what: str, values: Tensor, names: list[str]) -> None:
        if values.isfinite().all():
            return
        bad = (~values.isfinite()).nonzero().flatten().tolist()
        shown = "; ".join(f"{names[i]} ({values[i].item():g})" for i in bad[:8])
        when = f" in iteration {self._attached.iteration}" if self._attached is not None else ""
        raise FloatingPointError(
            f"the {what} of {len(bad)} of {len(values)} samples is not finite{when}: {shown}. Nothing was logged or "
            "deposited. Look at these samples, lower the learning rate, or clip gradients."
        )

    def _sample_names(self, n: int) -> list[str]:
        if self._attached is None:
            return _positions(n)
        pairs = zip(self._attached.domains, self._attached.sample_ids, strict=True)
        return [f"sample {sample_id} of {domain}" if domain else f"sample {sample_id}" for domain, sample_id in pairs]


class GhostEngineManager(GradDotProdEngine):
    """The engine under the seeds' entry: set up from a run's configuration, and harmless under `method="Regular"`.

    Args:
        config: an `argparse.Namespace`, a dataclass, a mapping or any object with attributes. Read, where there:
            `method` ("GradDotProd", the default, or "Regular"), `dot_prod_save_interval` (10), `result_dir` (the log
            goes to `<result_dir>/dot_log`; without it nothing is stored), `out`, `layers` and `schedule`. Its values
            are stored with the log, except those that JSON cannot hold.
        model: the module.
        optimizer: its optimizer.
        ddp_info: a mapping; where `master_process` is false, this process writes no log.
        val_data: `(X_val, Y_val)`.
        loss: as in `GradDotProdEngine`.
        call: as in `GradDotProdEngine`.

    Raises:
        ValueError: for an unknown method, or no `val_data` under GradDotProd.
        NotImplementedError: for GradDotProd in a process group of several ranks.

    Under `"Regular"`, `ghost_engine(X, Y)` is a plain forward with the same loss, and every other verb does nothing.

    Example:
        >>> import torch, ghostfunc as gf
        >>> from ghostfunc.engine import GhostEngineManager
        >>> model, X, Y = torch.nn.Linear(4, 3), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> ghost_engine = GhostEngineManager({"method": "GradDotProd"}, model, optimizer, val_data=(X[:2], Y[:2]),
        ...                                   loss=gf.classification_loss)
        >>> ghost_engine.attach_train_batch(X, Y, 0, range(5))
        >>> X_forward, Y_forward = ghost_engine.prepare_forward_input(X, Y)
        >>> ghost_engine(X_forward, Y_forward).loss.backward()
        >>> ghost_engine.prepare_gradients()
        >>> optimizer.step()
        >>> ghost_engine.dots.shape
        torch.Size([5])
    """

    def __init__(
        self,
        config: Any,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        ddp_info: Mapping[str, Any] | None = None,
        val_data: Any = None,
        *,
        loss: LossFn = causal_lm_loss,
        call: Callable[[nn.Module, Any], Any] | None = None,
    ) -> None:
        settings = _as_dict(config)
        self.method: str = settings.get("method", "GradDotProd")
        _require_one_of("method", self.method, METHODS)
        self.is_regular = self.method == "Regular"
        if not self.is_regular and val_data is None:
            raise ValueError("GradDotProd needs val_data=(X_val, Y_val), the batch that the dots refer to.")
        if not self.is_regular and _world_size() > 1:
            raise NotImplementedError(
                f"GradDotProd runs in one process; this one is of {_world_size()}, and gradients would not be reduced "
                'over them. Start one process, or use method="Regular".'
            )
        super().__init__(
            model,
            None if self.is_regular else val_data,
            loss=loss,
            call=call,
            optimizer=optimizer,
            save_interval=settings.get("dot_prod_save_interval", 10),
            out=settings.get("out", "train"),
            layers=settings.get("layers", ""),
            schedule=settings.get("schedule", "auto"),
        )
        result_dir = settings.get("result_dir")
        if not self.is_regular and result_dir is not None and (ddp_info or {}).get("master_process", True):
            storable = {key: value for key, value in settings.items() if _is_storable(value)}
            self.log = DotLog(Path(result_dir) / "dot_log", config=storable, val_batch=_by_name(self._val_batch))

    def __call__(self, X: Any = None, Y: Any = None, /, **inputs: Any) -> EngineOutput:
        """Under "Regular", run a plain forward with loss; otherwise as `GradDotProdEngine.__call__`."""
        if not self.is_regular:
            return super().__call__(X, Y, **inputs)
        batch = self._batch_of_call(X, Y, inputs)
        losses = self.loss_fn(self.call(self.module, batch), batch)  # [n]
        self.losses = losses.detach()
        return EngineOutput(losses.mean(), self.losses, None, None)

    def prepare_gradients(self) -> None:
        """Under "Regular", do nothing; otherwise as `GradDotProdEngine.prepare_gradients`."""
        if not self.is_regular:
            super().prepare_gradients()


@dataclasses.dataclass(frozen=True)
class _AttachedBatch:
    iteration: int
    sample_ids: list[int]
    domains: list[str]


@dataclasses.dataclass
class _Pending:
    """How many calls there were since the last `prepare_gradients`, and how many of their backwards have run."""

    calls: int = 0
    backwards: int = 0


class _Handover:
    """Gradients on their way to `.grad`, each let go as it is handed over."""

    def __init__(self, grads: list[Tensor], pending: _Pending) -> None:
        self.grads = grads
        self.pending = pending
        self.is_done = False

    def scaled(self, factor: Tensor) -> list[Tensor]:
        if self.is_done:
            raise RuntimeError(
                "backward ran a second time through the loss of one engine call: its gradient was handed over the "
                "first time. Call the engine again."
            )
        self.is_done = True
        self.pending.backwards += 1
        self.grads.reverse()
        return [self.grads.pop() * factor for _ in range(len(self.grads))]


class _TrainLoss(torch.autograd.Function):
    """The identity on a loss; its backward returns, for each parameter, the gradient computed before."""

    @staticmethod
    def forward(loss: Tensor, handover: _Handover, *parameters: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.handover = inputs[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, None, *ctx.handover.scaled(grad_output)


def _unscale(result: ValueAndGradDot, scale: float) -> ValueAndGradDot:
    """Take the losses' scale out: once out of what is linear in it, twice out of the dots."""
    unscaled = ValueAndGradDot(
        result.losses / scale,
        result.val_losses / scale,
        {name: grad / scale for name, grad in result.grads.items()},
        pytree.tree_map(lambda dots: dots / scale**2, result.dots),
    )
    unscaled.unused = result.unused
    return unscaled


def _overflowed(result: ValueAndGradDot) -> bool:
    tensors = [*result.grads.values(), *pytree.tree_leaves(result.dots)]
    return not torch.stack([tensor.isfinite().all() for tensor in tensors]).all()


def _per_sample(dots: Tensor | dict[str, Tensor]) -> Tensor:
    """One number per training sample `[n]`, whatever `out` asked for."""
    if isinstance(dots, dict):
        return torch.stack(list(dots.values())).sum(0)
    return dots.mean(1) if dots.dim() == 2 else dots


def _batch_size(batch: Any) -> int:
    shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    sizes = {shape[:1] for shape in shapes}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            f"the batch's tensors have shapes {shapes}; expected at least one tensor, and in all the same first "
            "dimension, the number of samples."
        )
    return sizes.pop()[0]


def _positions(n: int) -> list[str]:
    return [f"position {i}" for i in range(n)]


def _split_ids(batch_idx: SampleIds, domains: Sequence[str] | None) -> tuple[list[int], list[str]]:
    entries = batch_idx.tolist() if isinstance(batch_idx, (Tensor, np.ndarray)) else list(batch_idx)
    if any(isinstance(entry, (tuple, list)) for entry in entries):
        if domains is not None:
            raise ValueError("attach_train_batch: give domains in batch_idx, as (domain, offset), or as domains=.")
        return [operator.index(offset) for _, offset in entries], [str(domain) for domain, _ in entries]
    return [operator.index(entry) for entry in entries], list(domains) if domains is not None else [""] * len(entries)


def _by_name(batch: Any) -> dict[str, Tensor]:
    """The tensors of a batch under names, for the log."""
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    return dict(zip(("inputs", "labels"), batch if isinstance(batch, tuple) else (batch,), strict=False))


def _require_one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; expected one of {', '.join(map(repr, known))}.")


def _as_dict(config: Any) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
    if dataclasses.is_dataclass(config):
        return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return dict(vars(config))


def _world_size() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _is_storable(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_storable(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_storable, value))
    return value is None or isinstance(value, (str, int, float, bool, Path, torch.dtype, torch.device))
