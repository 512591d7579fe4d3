"""What every training loop needs: optimizer, learning rate, evaluation, and checkpoints that survive a kill."""

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from transformers import PreTrainedModel

import ghostfunc as gf
from shared.dataloader import Corpora, TokenCorpus
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
) -> dict[str, float]:
    """Mean loss of each split over the same `batches` batches every time, in evaluation mode without dropout.

    Args:
        model: left in the mode in which it came.
        corpora: the splits.
        batch_size: samples in a batch; a split with fewer is taken whole.
        batches: batches of each split.
        seed: chooses the batches.
        device: where the model is.
        autocast: the context of the forward passes.
        stop: asked between batches.

    Returns:
        `{"train_loss": ..., "val_loss": ..., "test_loss": ...}`.

    Raises:
        Stopped: if a stop was requested.
    """
    was_training = model.training
    model.eval()
    try:
        means = {}
        for split, corpus in corpora._asdict().items():
            total = 0.0
            for tokens in _evaluation_batches(corpus, batch_size, batches, seed):
                stop.check()
                with autocast:
                    total += lm_losses(model, tokens.to(device)).mean().item()
            means[f"{split}_loss"] = total / batches
        return means
    finally:
        model.train(was_training)


def _evaluation_batches(corpus: TokenCorpus, batch_size: int, batches: int, seed: int) -> Iterator[Tensor]:
    for number in range(batches):
        yield corpus.sample(min(batch_size, corpus.blocks), seed=seed, step=number).tokens  # [B, T]


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


_STEP = "step-"


def save_checkpoint(
    folder: Path, step: int, model: PreTrainedModel, optimizer: Optimizer, scaler: torch.GradScaler
) -> None:
    """Write `folder/step-<step>` whole or not at all, then remove older ones.

    It holds a model folder that transformers loads (`config.json`, `model.safetensors`), and `training.pt` with the
    optimizer, the loss scaler and torch's random numbers.
    """
    final = folder / f"{_STEP}{step:08d}"
    if final.exists():  # the run was stopped where it had resumed
        return
    draft = folder / ".draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    model.config.save_pretrained(draft)
    save_model(model, str(draft / "model.safetensors"), metadata={"format": "pt"})
    state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "random": _random_state()}
    torch.save(state, draft / "training.pt")
    os.rename(draft, final)
    for older in _checkpoints(folder):
        if older != final:
            shutil.rmtree(older)


def load_checkpoint(folder: Path, model: nn.Module, optimizer: Optimizer, scaler: torch.GradScaler) -> int:
    """Load the newest checkpoint in place.

    Returns:
        The steps it has behind it; 0 where there is no checkpoint, and then nothing is changed.
    """
    checkpoints = _checkpoints(folder)
    if not checkpoints:
        return 0
    newest = checkpoints[-1]
    load_model(model, newest / "model.safetensors")
    state = torch.load(newest / "training.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    _restore_random_state(state["random"])
    return int(newest.name.removeprefix(_STEP))


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{_STEP}*"))


def _random_state() -> dict[str, Any]:
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": devices}


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
