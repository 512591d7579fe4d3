"""A world for the language-model example: tokens of two domains, a tiny model, and the options of a short run."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config

from ghostfunc.ledger import InRunShapley

VOCABULARY = 512


def write_data(folder: Path) -> Path:
    draw = np.random.default_rng(0)
    for split, prefix, size in [(".", "train", 4000), ("val", "validation", 800), ("test", "test", 800)]:
        (folder / split).mkdir(exist_ok=True)
        for domain, stride in [("code", 3), ("prose", 7)]:
            ids = (np.arange(size) * stride + draw.integers(0, 3, size)) % VOCABULARY
            ids.astype("<u2").tofile(folder / split / f"{prefix}-{domain}.bin")
    (folder / "meta.json").write_text(json.dumps({"vocab_size": VOCABULARY, "eot": 0}))
    return folder


def write_model(folder: Path) -> Path:
    GPT2Config(
        n_layer=2,
        n_head=2,
        n_embd=32,
        n_positions=64,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ).save_pretrained(folder)
    return folder


def options_of(data: Path, model: Path, results: Path, *more: object) -> list[str]:
    """The options of a run of seconds, and more of them; a later option wins over an earlier one."""
    fixed = {
        "model": model,
        "model_init": "fresh",
        "data_dir": data,
        "results_dir": results,
        "train_set": "code,prose",
        "val_set": "prose",
        "device": "cpu",
        "block_size": 16,
        "batch_size": 4,
        "val_batch_size": 2,
        "learning_rate": 1e-2,
        "warmup_step": 2,
        "max_steps": 3,
        "eval_interval": 3,
        "eval_iter": 2,
        "eval_bs": 4,
    }
    return [text for name, value in fixed.items() for text in (f"--{name}", str(value))] + [str(m) for m in more]


def weights(run: Path) -> dict[str, Tensor]:
    (checkpoint,) = (run / "checkpoint").iterdir()
    return load_file(checkpoint / "model.safetensors")


def values(run: Path) -> pyarrow.Table:
    return InRunShapley(run / "values").by_sample()


def evaluations(run: Path) -> list[list[float]]:
    with (run / "evaluations.csv").open(newline="") as file:
        return [[float(value) for value in row.values()] for row in csv.DictReader(file)]
