"""What a Trainer must be for in-run values, and what a rule that selects samples may give."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ghostfunc._functionalize import LossFn

if TYPE_CHECKING:
    from transformers import Trainer

_TOLERANCE = 1e-3  # of a sum of float32 losses against the model's own
_ROUGH_TOLERANCE = 5e-2  # where the model computes in less than float32


def check_losses(found: Tensor, expected: Tensor, mixed_precision: str) -> None:
    """Raise ValueError where the samples' shares do not add up to the Trainer's loss of a batch."""
    rough = mixed_precision != "no" or torch.finfo(expected.dtype).eps > torch.finfo(torch.float32).eps
    tolerance = _ROUGH_TOLERANCE if rough else _TOLERANCE
    if expected.isfinite() and not torch.isclose(found, expected.to(found.dtype), rtol=tolerance, atol=1e-6):
        raise ValueError(
            f"the samples' shares of the first batch's loss add up to {float(found):.6g}, and the Trainer's loss is "
            f"{float(expected):.6g}: the model or compute_loss adds something (an auxiliary loss), computes another "
            "loss than its class's, or loss= is not each sample's mean over its own targets. Pass the loss of each "
            "sample as loss=, or switch off what is added."
        )


def kept_rows(select: Callable[[Tensor], Tensor], dots: Tensor) -> Tensor:
    """The rows that a rule keeps, in their order."""
    chosen = select(dots)
    if not isinstance(chosen, Tensor) or chosen.dim() != 1 or chosen.is_floating_point():
        described = f"{chosen.dtype} {tuple(chosen.shape)}" if isinstance(chosen, Tensor) else type(chosen).__name__
        raise ValueError(f"select gave {described}: expected a mask [{len(dots)}] or the indices to keep, [k].")
    if chosen.dtype == torch.bool:
        if chosen.shape != dots.shape:
            raise ValueError(f"select gave a mask of {len(chosen)} for {len(dots)} samples.")
        return chosen.nonzero().flatten()
    rows = chosen.unique()
    if len(rows) < len(chosen) or (len(rows) and not 0 <= int(rows[0]) <= int(rows[-1]) < len(dots)):
        raise ValueError(f"select gave {chosen.tolist()}: expected different indices from 0 to {len(dots) - 1}.")
    return rows


def refuse(trainer: Trainer, loss: LossFn | None) -> None:
    """Raise for what does not go with per-sample gradients, or is not supported."""
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    within = parallel is not None and max(trainer.get_tp_size(), trainer.get_cp_size(), trainer.get_sp_size()) > 1
    unsupported = {
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "FSDP": trainer.is_fsdp_enabled or bool(trainer.args.fsdp),
        "DataParallel (start a process per device: torchrun, accelerate launch)": trainer.args.n_gpu > 1,
        "float16, whose small gradients vanish without the Trainer's loss scale (use bf16=True)": trainer.args.fp16,
        "tensor, context or sequence parallelism, which split a sample over ranks": within,
    }
    for what, is_on in unsupported.items():
        if is_on:
            raise NotImplementedError(f"GhostTrainer does not work with {what}.")
    if loss is None and trainer.compute_loss_func is not None:
        raise ValueError("compute_loss_func is one loss for a batch: pass loss= too, the loss of each sample [B].")
    if loss is None and trainer.label_smoother is not None:
        raise ValueError(
            "label_smoothing_factor: pass loss=, each sample's smoothed loss [B], averaged over its own targets; or "
            "leave smoothing out."
        )
