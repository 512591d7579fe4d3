"""What every training loop needs: optimizer, learning rate, evaluation, and checkpoints that survive a kill."""

import math
from pathlib import Path

import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from transformers import PreTrainedModel

import ghostfunc as gf
from ghostfunc.checkpoint import TrainingCheckpoints
from shared.dataloader import Corpora
from shared.distributed import Launch
from shared.utils import StopRequest, write_whole

WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
FINAL_LEARNING_RATE = 0.1  # of the peak

OPTIMIZERS = {
    "adamw": lambda groups, lr: AdamW(groups, lr=lr, betas=BETAS),
    "adam": lambda groups, lr: Adam(groups, lr=lr, betas=BETAS),
    "sgd": lambda groups, lr: SGD(groups, lr=lr),
}


def build_optimizer(name: str, model: nn.Module, learning_rate: float) -> Optimizer:
    """An optimizer with two groups: matrices decay (by `WEIGHT_DECAY`, with adamw), biases and scales do not.

    Args:
        name: a key of `OPTIMIZERS`.
        model: its trainable parameters are taken, tied ones once.
        learning_rate: of both groups.

    Raises:
        ValueError: if there is no such optimizer.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}: choose one of {', '.join(OPTIMIZERS)}")
    params = [p for p in model.parameters() if p.requires_grad]
    decay = WEIGHT_DECAY if name == "adamw" else 0.0
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return OPTIMIZERS[name](groups, learning_rate)


def learning_rate_at(step: int, *, peak: float, warmup_steps: int, max_steps: int) -> float:
    """Linear warm-up to `peak`, then half a cosine down to a tenth of it at `max_steps`.

    Args:
        step: the steps done so far.
        peak: the highest learning rate.
        warmup_steps: the steps until it; 0 starts at the peak.
        max_steps: the steps of the whole run.

    Example:
        >>> [round(learning_rate_at(s, peak=1.0, warmup_steps=3, max_steps=9), 2) for s in (0, 2, 3, 6, 9)]
        [0.25, 0.75, 1.0, 0.55, 0.1]
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return peak * (FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * 0.5 * (1 + math.cos(math.pi * progress)))


def lm_losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """The loss of each sample `[B]` of `tokens [B, T]`: mean cross-entropy of its next tokens."""
    return gf.causal_lm_loss(model(input_ids=tokens), tokens)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    corpora: Corpora,
    *,
    batch_size: int,
    batches: int,
    seed: int,
    device: torch.device,
    autocast: torch.autocast,
    stop: StopRequest,
    launch: Launch | None = None,
) -> dict[str, float]:
    """Mean loss of each split over the same `batches` batches every time, in evaluation mode without dropout.

    Several processes take turns with the batches, and all get the means, which are those of one process.

    Args:
        model: left in the mode in which it came.
        corpora: the splits.
        batch_size: samples in a batch; a split with fewer is taken whole.
        batches: batches of each split.
        seed: chooses the batches.
        device: where the model is.
        autocast: the context of the forward passes.
        stop: asked between batches.
        launch: the processes; None for this one alone.

    Returns:
        `{"train_loss": ..., "val_loss": ..., "test_loss": ...}`.

    Raises:
        Stopped: if a stop was requested.
    """
    was_training = model.training
    launch = launch or Launch(device)
    model.eval()
    try:
        means = {}
        for split, corpus in corpora._asdict().items():
            own: dict[int, float] = {}
            for turn in range(0, batches, launch.size):
                stop.check()
                number = turn + launch.rank
                if number < batches:
                    tokens = corpus.sample(min(batch_size, corpus.blocks), seed=seed, step=number).tokens  # [B, T]
                    with autocast:
                        own[number] = lm_losses(model, tokens.to(device)).mean().item()
            losses = dict(pair for of_rank in launch.gathered(own) for pair in of_rank.items())
            means[f"{split}_loss"] = sum(losses[number] for number in range(batches)) / batches
        return means
    finally:
        model.train(was_training)


class Evaluations:
    """The results file of a run: a line per evaluation, appended.

    Args:
        path: the CSV file, with columns `iteration,train_loss,val_loss,test_loss`.
        resume_at: drop the lines after so many steps, because a resumed run will write them again; None keeps all.

    Attributes:
        iterations: those that have a line.
    """

    COLUMNS = ("iteration", "train_loss", "val_loss", "test_loss")

    def __init__(self, path: Path, *, resume_at: int | None) -> None:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[1:] if path.is_file() else []
        # A kill may have cut the last line short.
        lines_of = {int(line.split(",")[0]): line for line in lines if line.endswith("\n")}
        kept = {step: line for step, line in sorted(lines_of.items()) if resume_at is None or step <= resume_at}
        write_whole(path, "".join([",".join(self.COLUMNS) + "\n", *kept.values()]))
        self.path = path
        self.iterations = set(kept)

    def append(self, iteration: int, losses: dict[str, float]) -> None:
        """Add the line of an evaluation after `iteration` steps."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(",".join([str(iteration), *(repr(losses[column]) for column in self.COLUMNS[1:])]) + "\n")
        self.iterations.add(iteration)


def save_checkpoint(
    folder: Path, step: int, model: PreTrainedModel, optimizer: Optimizer, scaler: torch.GradScaler
) -> None:
    """Write `folder/step-<step>` whole or not at all, then remove older ones; every rank calls it.

    It holds a model folder that transformers loads (`config.json`, `model.safetensors`), and the state of the training:
    model, optimizer, loss scaler, and the random numbers of each rank.
    """
    _checkpoints(folder, model, optimizer, scaler).save(step)


def load_checkpoint(folder: Path, model: PreTrainedModel, optimizer: Optimizer, scaler: torch.GradScaler) -> int:
    """Load the newest checkpoint in place; every rank calls it.

    Returns:
        The steps it has behind it; 0 where there is no checkpoint, and then nothing is changed.
    """
    return _checkpoints(folder, model, optimizer, scaler).load().step


def _checkpoints(
    folder: Path, model: PreTrainedModel, optimizer: Optimizer, scaler: torch.GradScaler
) -> TrainingCheckpoints:
    def add_model_folder(checkpoint: Path) -> None:
        model.config.save_pretrained(checkpoint)
        save_model(model, str(checkpoint / "model.safetensors"), metadata={"format": "pt"})

    return TrainingCheckpoints(folder, model, optimizer, also={"scaler": scaler}, beside=add_model_folder)
