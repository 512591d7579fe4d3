"""What low precision costs: errors of dots and gradients of a small GPT-2, in each precision that a model may run in.

    python benchmarks/precision.py        # a minute on one core

Two references, both by plain backward passes, one for each sample: the same step in the same precision (what is left is
the rounding of the two ways to sum), and the step in float64 (what the precision itself costs, with any method). Error:
|d - d*| / (|g_i| |V|) of a dot, the largest, and |G - G*| / |G*| of the gradient, over all parameters.
"""

import json
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import ghostfunc as gf

RESULTS = Path(__file__).parent / "results" / "precision.json"
COLUMNS = [
    "dots, same precision",
    "gradient, same precision",
    "dots, float64",
    "gradient, float64",
]
TRAIN, VAL, POSITIONS, VOCABULARY = 8, 4, 64, 211
Grads = dict[str, Tensor]


class Setting(NamedTuple):
    """A precision: of the model's parameters, of autocast inside it, and of the contractions (`dtype=`)."""

    name: str
    model: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    dtype: torch.dtype | None = None


SETTINGS = [
    Setting("float64 model", torch.float64),
    Setting("float32 model"),
    Setting("bfloat16 autocast", autocast=torch.bfloat16),
    Setting("float16 autocast", autocast=torch.float16),
    Setting("bfloat16 model", torch.bfloat16),
    Setting("float16 model", torch.float16),
    Setting("float32 model, dtype=torch.bfloat16", dtype=torch.bfloat16),
    Setting("float32 model, dtype=torch.float16", dtype=torch.float16),
    Setting("bfloat16 autocast, dtype=torch.bfloat16", autocast=torch.bfloat16, dtype=torch.bfloat16),
    Setting("bfloat16 model, dtype=torch.bfloat16", torch.bfloat16, dtype=torch.bfloat16),
]


def gpt2() -> GPT2LMHeadModel:
    """GPT-2 with two layers of width 64, in eval mode."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=4, n_embd=64, vocab_size=VOCABULARY, n_positions=POSITIONS, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def tokens(samples: int, seed: int) -> dict[str, Tensor]:
    """Random token ids `[samples, POSITIONS]`."""
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(VOCABULARY, (samples, POSITIONS), generator=generator)}


def by_sample(model_fn: Callable, params: Grads, batch: Any) -> Tensor:
    """Per-sample gradients `[B, all entries]` of one forward, in float64."""
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    losses = model_fn(leaves, batch)
    return torch.stack([_flat(torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)) for loss in losses])


def whole(model_fn: Callable, params: Grads, batch: Any) -> Tensor:
    """The gradient of the mean loss `[all entries]`, in float64."""
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    return _flat(torch.autograd.grad(model_fn(leaves, batch).mean(), list(leaves.values())))


def _flat(grads: Any) -> Tensor:
    return torch.cat([g.double().flatten() for g in grads])


def errors(setting: Setting, exact: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """The four errors of a setting."""
    module = gpt2().to(setting.model)  # pyright: ignore[reportArgumentType]
    plain_fn, params = gf.functionalize(module, gf.causal_lm_loss)
    train, val = tokens(TRAIN, 1), tokens(VAL, 2)
    autocast: Callable[[], AbstractContextManager] = nullcontext
    if setting.autocast is not None:
        autocast = partial(torch.autocast, "cpu", dtype=setting.autocast)

    def model_fn(params: Grads, batch: Any) -> Tensor:
        with autocast():
            return plain_fn(params, batch)

    result = gf.value_and_grad_dot(model_fn, params, train, val, dtype=setting.dtype)
    gradient, dots = _flat(result.grads.values()), result.dots.double()
    found: list[float] = []
    same = by_sample(model_fn, params, train), by_sample(model_fn, params, val)
    for (g, v), mean in ((same, whole(model_fn, params, train)), (exact, exact[0].mean(0))):
        direction = v.mean(0)
        found.append(float(((dots - g @ direction).abs() / (g.norm(dim=1) * direction.norm())).max()))
        found.append(float((gradient - mean).norm() / mean.norm()))
    return {"setting": setting.name, **dict(zip(COLUMNS, found, strict=True))}


def main() -> None:
    """Measure every setting, print the table, and write it."""
    torch.set_num_threads(1)
    double_fn, params = gf.functionalize(gpt2().double(), gf.causal_lm_loss)
    exact = by_sample(double_fn, params, tokens(TRAIN, 1)), by_sample(double_fn, params, tokens(VAL, 2))
    rows = [errors(setting, exact) for setting in SETTINGS]
    print(f"| setting | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for row in rows:
        print(f"| {row['setting']} | {' | '.join(f'{row[column]:.1e}' for column in COLUMNS)} |")
    environment = {"torch": torch.__version__, "python": platform.python_version(), "device": "cpu", "threads": 1}
    RESULTS.write_text(json.dumps({"environment": environment, "columns": COLUMNS, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
