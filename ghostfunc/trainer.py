"""In-run values inside `transformers.Trainer`: what each training sample does to a validation loss, step by step.

    loss of the step = sum_i s_i,   s_i = w_i l_i, sample i's share of it as the Trainer weighs samples
    dot_i            = <grad s_i, P V>,   V the gradient of the mean validation loss, P the optimizer's metric
    value_i          = learning rate * clipping * dot_i

The gradient, and with it everything that the Trainer does, stays what it is: the loss that `compute_loss` returns has
the same value and hands over the same gradient, made while the dots were. The dots of a step add up to <its gradient,
P V>.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ghostfunc._dots import ValGradient
from ghostfunc._engine_gradient import Pending, loss_with_gradient
from ghostfunc._engine_ranks import average_gradients, together
from ghostfunc._functionalize import LossFn
from ghostfunc._losses import causal_lm_loss
from ghostfunc._randomness import RandomState
from ghostfunc._ranks import Ranks
from ghostfunc._trainer_checks import check_losses, kept_rows, refuse
from ghostfunc._trainer_data import SAMPLE_IDS, Numbered, WithIds, own_parts, sample_count
from ghostfunc._trainer_loss import default_loss, rows_of, target_counts, val_sums, weighted
from ghostfunc._trainer_step import MicroBatch, Step, StepValues
from ghostfunc._transforms import ghost_grad_along, ghost_grad_dot, value_and_grad_dot
from ghostfunc.ledger import InRunShapley

_NEEDED = "ghostfunc.trainer needs accelerate and the Trainer of transformers 5.23: pip install 'ghostfunc[trainer]'"
try:
    import accelerate  # noqa: F401
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError(_NEEDED) from error
if not hasattr(Trainer, "_clip_grad_norm"):
    raise ImportError(_NEEDED)

_CLIP_EPS = 1e-6  # of torch.nn.utils.clip_grad_norm_

Metric = Callable[[Optimizer, nn.Module], Callable[..., dict[str, Tensor]]]


class GhostTrainer(Trainer):
    """A `transformers.Trainer` that keeps a ledger of what each training sample did to a validation loss.

    Takes everything that `Trainer` takes, trains as it does, and adds the values. In front of another Trainer it works
    as a mixin: `class Mine(GhostTrainer, Seq2SeqTrainer)`.

    Args:
        *args: as in `transformers.Trainer`.
        val_batch: the validation samples: a batch (a mapping of tensors `[m, ...]` with labels), or a dataset of items
            as the train dataset has them. Their mean loss (of each sample's mean over its targets) is what the values
            are about. They are run once per optimizer step, in batches of `per_device_eval_batch_size`, shared out
            among processes.
        ledger: the folder of the ledger (`InRunShapley`), written with every checkpoint and at the end; every process
            has the same. None keeps it in memory. It is at `trainer.ledger`.
        sample_ids: the column of the train dataset with integer ids; by default samples are named by their places.
        precondition: `gf.adam` or another function of `(optimizer, model)` that gives the metric of its steps. Without
            one the values are those of plain gradient descent with the optimizer's learning rate, which under AdamW
            rank samples badly.
        select: a rule by which each micro-batch is cut: `select(dots [n])` gives a mask `[n]`, or the indices to keep
            (`lambda dots: dots >= 0`). The kept samples take over the weight of the whole micro-batch; where none is
            kept it has no gradient. Costs a forward and a backward more.
        loss: `loss(output, batch) -> [B]`, each sample's mean over its own targets, for models with another loss than
            next-token prediction or classification.
        **kwargs: as in `transformers.Trainer`.

    Attributes:
        ledger: an `InRunShapley`; None before training.
        last_step: the last optimizer step's `StepValues`; None before. Callbacks find it at `on_step_end`.

    Raises:
        ImportError: without pyarrow (ledgers are Parquet).
        NotImplementedError: for DeepSpeed, FSDP, `DataParallel`, float16, and parallelism within a sample.
        TypeError: for a train dataset that is a stream, or sample ids that are no integers.
        ValueError: where the loss is one that this class does not know and `loss` is not given; in training, where the
            per-sample losses do not add up to the model's loss, where the ledger's folder holds another run, and where
            losses are not finite.

    The value of sample i in a step is lr * c * <grad s_i, P V>, in the validation loss's unit: lr the learning rate of
    the first parameter group, c what gradient clipping left of the step's gradient, s_i the sample's share of the loss
    whose gradient is the step's. Weight by token, as causal language models have it, makes long samples count more.
    Values add up over micro-batches and ranks to what the whole step does, to first order.

    The ledger is saved before each checkpoint, and cut back to it by `train(resume_from_checkpoint=...)`: a run that
    was killed and resumed has the ledger of one that was not.

    Example:
        >>> import tempfile, torch, ghostfunc as gf
        >>> from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments
        >>> from ghostfunc.trainer import GhostTrainer
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2))
        >>> texts = [{"input_ids": ids, "labels": ids} for ids in torch.randint(16, (8, 6))]
        >>> args = TrainingArguments(
        ...     tempfile.mkdtemp(), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        ...     use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no", save_strategy="no",
        ... )
        >>> trainer = GhostTrainer(model, args, train_dataset=texts[:6], val_batch=texts[6:], precondition=gf.adam)
        >>> result = trainer.train()  # doctest: +ELLIPSIS
        {'train_runtime': ...
        >>> trainer.ledger.by_sample()["sample_id"].to_pylist()
        [0, 1, 2, 3, 4, 5]
    """

    def __init__(
        self,
        *args: Any,
        val_batch: Any,
        ledger: str | os.PathLike | None = None,
        sample_ids: str | None = None,
        precondition: Metric | None = None,
        select: Callable[[Tensor], Tensor] | None = None,
        loss: LossFn | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        refuse(self, loss)
        sample_count(val_batch)
        self.ledger: InRunShapley | None = None
        self.last_step: StepValues | None = None
        self._ledger_folder = ledger
        self._val_batch = val_batch
        self._id_column = sample_ids
        self._metric_of = precondition
        self._select = select
        self._sample_loss = default_loss(self._module) if loss is None else loss
        self._shifts = self._sample_loss is causal_lm_loss or self._loss_shifts_labels
        self._ids: Tensor | None = None  # of the micro-batch that is in training_step
        self._divides: bool | None = None  # whether the model divides by the number of items that it is told
        self._metric: Callable[..., dict[str, Tensor]] | None = None
        self._ranks: Ranks | None = None
        self._step = Step()
        self.add_callback(_AtSteps(self))

    @property
    def _module(self) -> nn.Module:
        return cast(nn.Module, self.model)  # not the one wrapped for several processes

    @property
    def _torch_optimizer(self) -> Optimizer:
        return cast(Optimizer, getattr(self.optimizer, "optimizer", self.optimizer))  # in accelerate's wrapper

    # ---------------------------------------------------------------- samples and their ids

    def get_train_dataloader(self) -> Any:
        """The base class's, whose batches have the ids of their samples."""
        dataset, collator = self.train_dataset, self.data_collator
        if dataset is None:
            return super().get_train_dataloader()
        try:
            self.train_dataset = Numbered(dataset, self._id_column)
            self.data_collator = WithIds(self._get_collator_with_removed_columns(collator, "training"))
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator = dataset, collator

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The base class's, which may look into items."""
        return super()._get_train_sampler(
            train_dataset.dataset if isinstance(train_dataset, Numbered) else train_dataset
        )

    # ---------------------------------------------------------------- a micro-batch

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The base class's, with dots; the last of a step averages gradients over processes."""
        if SAMPLE_IDS not in inputs:
            raise RuntimeError(
                "the batch does not say which samples it has: an own get_train_dataloader must call "
                "super().get_train_dataloader(), with self.train_dataset and self.data_collator."
            )
        self._ids = inputs[SAMPLE_IDS]
        try:
            others = {name: value for name, value in inputs.items() if name != SAMPLE_IDS}
            loss = super().training_step(model, others, num_items_in_batch)
        finally:
            self._ids = None
        if self._ranks is not None and self.accelerator.sync_gradients:
            average_gradients(self._module, self._ranks)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """In a training step the sum of the samples' shares of the loss, with their gradient; else the base class's."""
        if self._ids is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        ids, inputs = self._ids, dict(inputs)
        before = RandomState.of(ids.device)
        with self._together():
            counts = target_counts(inputs, self._shifts)
            if len(counts) != len(ids):
                raise ValueError(
                    f"{len(ids)} samples came as a batch of {len(counts)} rows: a collator that packs or splits "
                    "samples leaves none of them a row of its own. Use one that pads."
                )
            expected = None if self._divides is not None else self._base_loss(inputs, num_items_in_batch, before)
            if expected is not None:
                self._divides = self._halves(expected, inputs, num_items_in_batch, before)
        batch = {"inputs": inputs, "weights": self._weights(counts, num_items_in_batch)}
        if self._step.val is None:
            self._begin_step()
        with self._together():
            try:
                loss = self._scored(ids, batch, before, expected)
            except ValueError as error:
                error.add_note(f"The samples of this batch are, in order, {ids.tolist()}.")
                raise
        return loss

    def _together(self) -> AbstractContextManager[None]:
        """Around a process's own work: what one process raises, all raise."""
        return together(self._ranks)

    def _weights(self, counts: Tensor, items: Any) -> Tensor:
        """Each sample's weight in its micro-batch's loss, times n, `[n]`: a mean over samples is that loss then."""
        dtype = torch.promote_types(next(self._module.parameters()).dtype, torch.float32)
        weights = counts.to(dtype) / (items if self._divides else counts.sum())
        told = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        if self.args.average_tokens_across_devices and told and items is not None:
            weights = weights * self.accelerator.num_processes
        return weights * len(counts)

    def _base_loss(self, inputs: dict[str, Any], items: Any, random: RandomState) -> Tensor:
        """The loss of a micro-batch as the base class has it."""

        def compute() -> Tensor:
            with torch.no_grad():
                loss = super(GhostTrainer, self).compute_loss(self._module, dict(inputs), num_items_in_batch=items)
            return cast(Tensor, loss)

        return random.replay(compute)

    def _halves(self, loss: Tensor, inputs: dict[str, Any], items: Any, random: RandomState) -> bool:
        """Whether the model divides its loss by the number of items that it is told: half as much for twice as many."""
        if items is None:
            return False
        twice = self._base_loss(inputs, 2 * items, random)
        return bool((2 * twice - loss).abs() < (twice - loss).abs())

    def _begin_step(self) -> None:
        """The validation gradient, before the first micro-batch of an optimizer step."""
        collate = self._get_collator_with_removed_columns(self.data_collator, "validation")
        m, ranks = sample_count(self._val_batch), self._ranks
        own_rank, count = (0, 1) if ranks is None else (ranks.rank, ranks.size)
        size = min(self.args.eval_batch_size, -(-m // count))
        with self._together():
            parts = own_parts(self._val_batch, collate, size, own_rank, count)
            loss, total = val_sums(self._module, self._sample_loss, map(self._prepare_inputs, parts))
        if ranks is not None:
            loss, total = ranks.sums({"": loss})[""], ranks.sums(total)
        direction = {name: gradient / m for name, gradient in total.items()}
        step = self._step
        step.val_loss = float(loss / m)
        if self._metric is not None:
            step.needs_gradient = getattr(self._metric, "about_train_gradient", False)
            direction = direction if step.needs_gradient else self._metric(direction)
        step.val = ValGradient(loss.reshape(1), direction)

    def _scored(self, ids: Tensor, batch: Any, random: RandomState, expected: Tensor | None) -> Tensor:
        """The loss of a micro-batch, whose backward hands over the gradient: 0 where none of its samples is kept."""
        model_fn, params = weighted(self._module, self._sample_loss)
        step, n = self._step, len(ids)
        assert step.val is not None
        if expected is not None:
            with torch.no_grad():
                check_losses(random.replay(model_fn, params, batch).mean(), expected, self.accelerator.mixed_precision)
        if self._select is not None:
            kept = kept_rows(self._select, ghost_grad_dot(model_fn, params, batch, step.val) / n)
            random.restore()  # the kept samples draw as they would alone
            if not batch["weights"][kept].any():
                nothing = {name: torch.zeros_like(p) for name, p in params.items()}
                return loss_with_gradient(batch["weights"].new_zeros(1), nothing, (), self._module, Pending())
            ids, batch = ids[kept], rows_of(batch, kept)
        found = value_and_grad_dot(model_fn, params, batch, step.val)
        micro_batch = MicroBatch(ids, found.dots / len(ids))
        if step.needs_gradient:
            micro_batch.batch, micro_batch.random = batch, random
        step.micro_batches.append(micro_batch)
        loss = loss_with_gradient(found.losses, found.grads, found.unused, self._module, Pending())
        loss.register_hook(micro_batch.keep_scale)
        return loss

    # ---------------------------------------------------------------- an optimizer step

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm: Any = super()._clip_grad_norm(model)
        self._step.clip = min(1.0, self.args.max_grad_norm / (float(norm) + _CLIP_EPS))
        return norm

    def _finish_step(self) -> None:
        """Put the values of a step into the ledger, when its gradient is complete and clipped."""
        step, ledger = self._step, self.ledger
        assert ledger is not None
        self._step = Step()
        if step.needs_gradient:
            self._dot_again(step)
        rate = float(self._torch_optimizer.param_groups[0]["lr"])
        self.last_step = step.values(rate, self.accelerator.num_processes)
        for place, micro_batch in enumerate(step.micro_batches):
            values = rate * step.clip * micro_batch.dots_of_step(self.accelerator.num_processes)
            ledger.add(micro_batch.sample_ids, values, iteration=self.state.global_step, micro_step=place)

    def _dot_again(self, step: Step) -> None:
        """Dots with a metric that is about the step's gradient, which is there now."""
        assert step.val is not None and self._metric is not None
        model_fn, params = weighted(self._module, self._sample_loss)
        parameters = dict(self._module.named_parameters())
        gradient = {name: parameters[name].grad for name in params}
        known = {name: torch.zeros_like(params[name]) if g is None else g for name, g in gradient.items()}
        direction = self._metric(step.val.direction, known)
        for micro_batch in step.micro_batches:
            assert micro_batch.random is not None
            along = micro_batch.random.replay(ghost_grad_along, model_fn, params, micro_batch.batch, direction)
            micro_batch.dots, micro_batch.batch = along / len(along), None

    # ---------------------------------------------------------------- a run

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in the base class; the ledger begins anew, or at the checkpoint."""
        self.ledger = None
        return super().train(*args, **kwargs)

    def _begin_run(self) -> None:
        device, processes = self.args.device, self.accelerator.num_processes
        self._ranks = Ranks.of(dist.group.WORLD, device) if processes > 1 else None
        self._step, self._divides, self.last_step = Step(), None, None
        if self._metric_of is not None:
            self._metric = self._metric_of(self._torch_optimizer, self._module)
        with self._together():
            if self._ledger_folder is not None and self.accelerator.is_main_process:
                self._cut_back(InRunShapley(self._ledger_folder, rank=0))
        if self._ledger_folder is not None or self.ledger is None:
            self.ledger = InRunShapley(self._ledger_folder, rank=self.accelerator.process_index)
        else:
            self.ledger.resume(self.state.global_step)

    def _cut_back(self, found: InRunShapley) -> None:
        """Let go of what the run will add again; `self.ledger` is there where the base class starts over by itself."""
        if self.state.global_step == 0 and self.ledger is None and found.by_sample().num_rows:
            raise ValueError(
                f"the ledger's folder {found.folder} has the values of an earlier run. To go on with that run pass "
                "resume_from_checkpoint=True to train(); for a new one give another folder, or remove this one."
            )
        found.resume(self.state.global_step)

    def _save_ledger(self) -> None:
        if self._ledger_folder is not None and self.ledger is not None:
            self.ledger.save()
            self.accelerator.wait_for_everyone()  # no checkpoint may be there before every process's values are

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._save_ledger()
        super()._save_checkpoint(model, trial)


class _AtSteps(TrainerCallback):
    """Tells a trainer where it is in its run."""

    def __init__(self, trainer: GhostTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._begin_run()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with self._trainer._together():
            self._trainer._finish_step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._save_ledger()
