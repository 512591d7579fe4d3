"""Does a dot product say what AdamW makes of a sample? Predictions against really leaving the sample out of the step.

    python benchmarks/adam_leave_one_out.py        # seven minutes on one core

A small GPT-2 learns Python's standard library, code and documentation by halves, byte by byte; the validation batch is
documentation. In each of twenty steps (three times: the first twenty, the next, and twenty after 300; and in step 0 of
twelve other models), for each sample i of the batch, in float64:

    truth        validation loss after AdamW's step on g - g_i / n, less that after its step on g; positive: i helps
    prediction   lr / n <P g_i, V>, and to second order, with P one of
                     plain       the identity: the formula of In-Run Data Shapley for gradient descent
                     diagonal    gf.adam(optimizer, model)
                     derivative  gf.adam(optimizer, model, exact=True)

"second" are the in-run Shapley values, which give half of the interaction of two samples to each. What leaving one out
changes has all of it: "leave-one-out" is lr / n <P g_i, V - lr H U>, U the step over -lr (its square with itself, of
order 1 / n^2, is left out). Correlations are Pearson's and Spearman's; the slope is of truth on prediction through the
origin, 1 for values in the loss's own unit.
"""

import copy
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GPT2Config, GPT2LMHeadModel

import ghostfunc as gf

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from demo.build_corpus import code, documentation

RESULTS = Path(__file__).parent / "results" / "adam_leave_one_out.json"
METRICS = ("plain", "diagonal", "derivative")
ORDERS = ("first", "second", "leave-one-out")
METHODS = [f"{metric}, {order}" for metric in METRICS for order in ORDERS]
Grads = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """What is trained, and when it is looked at."""

    layers: int = 4
    width: int = 64
    heads: int = 4
    tokens: int = 64
    train: int = 16
    val: int = 16
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    stretches: tuple[int, ...] = (0, 20, 300)
    steps: int = 20
    first_steps: int = 12
    seed: int = 0


class Text:
    """Passages of bytes, drawn from two texts."""

    def __init__(self, setting: Setting) -> None:
        self._code, self._documentation = _bytes(code), _bytes(documentation)
        self._generator = torch.Generator().manual_seed(setting.seed)
        self._tokens = setting.tokens

    def train(self, count: int) -> Tensor:
        """`[count, T]`, half of it code."""
        return torch.cat([self._draw(self._code, count // 2), self._draw(self._documentation, count - count // 2)])

    def val(self, count: int) -> Tensor:
        """`[count, T]` of documentation."""
        return self._draw(self._documentation, count)

    def _draw(self, text: Tensor, count: int) -> Tensor:
        starts = torch.randint(len(text) - self._tokens, (count, 1), generator=self._generator)
        return text[starts + torch.arange(self._tokens)]


@cache
def _bytes(documents: Callable[[Path], Sequence[str]]) -> Tensor:
    return torch.frombuffer(bytearray("\n\n".join(documents(Path())).encode()), dtype=torch.uint8).long()


def build(setting: Setting) -> tuple[GPT2LMHeadModel, torch.optim.AdamW]:
    """The model in float64, and AdamW that decays matrices only."""
    torch.manual_seed(setting.seed)
    config = GPT2Config(
        n_layer=setting.layers, n_embd=setting.width, n_head=setting.heads, n_positions=setting.tokens, vocab_size=256,
        bos_token_id=0, eos_token_id=0, use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).double()  # pyright: ignore[reportCallIssue]
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": setting.weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return model, torch.optim.AdamW(groups, lr=setting.lr, betas=setting.betas)


def take_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, gradient: Grads) -> None:
    for name, p in model.named_parameters():
        p.grad = gradient[name]
    optimizer.step()
    optimizer.zero_grad()


def predictions(model_fn: Callable, params: Grads, train: Tensor, val: Tensor, lr: float, metric: Any) -> list[Tensor]:
    """The three predictions `[n]` with one metric, in the order of `ORDERS`."""
    values = gf.in_run_values(model_fn, params, train, val, lr=lr, order=2, precondition=metric)
    update = values.grads if metric is None else metric.update(values.grads)
    slope, curved = gradient_and_product(model_fn, params, val, update)
    direction = {name: v - lr * curved[name] for name, v in slope.items()}
    if metric is not None:
        direction = metric(direction, values.grads)
    alone = lr / len(train) * gf.ghost_grad_along(model_fn, params, train, direction)
    return [values.first, values.values, alone]


def gradient_and_product(model_fn: Callable, params: Grads, batch: Tensor, direction: Grads) -> tuple[Grads, Grads]:
    """The gradient of the mean loss, and its Hessian times a direction, by double backward."""
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    with sdpa_kernel(SDPBackend.MATH):
        loss = model_fn(leaves, batch).mean()
    gradient = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
    product = torch.autograd.grad(gradient, list(leaves.values()), [direction[name] for name in leaves])
    return {n: g.detach() for n, g in zip(leaves, gradient, strict=True)}, dict(zip(leaves, product, strict=True))


def leaving_out(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, grads: Grads, mean: Grads, val_loss: Callable
) -> tuple[Tensor, float]:
    """The truth `[n]`, and the validation loss after the whole step."""

    def after(gradient: Grads) -> Tensor:
        stepped, its_optimizer = copy.deepcopy((model, optimizer))
        take_step(stepped, its_optimizer, gradient)
        return val_loss({name: p.detach() for name, p in stepped.named_parameters()})

    whole, n = after(mean), len(next(iter(grads.values())))
    without = [after({name: mean[name] - g[i] / n for name, g in grads.items()}) for i in range(n)]
    return torch.stack(without) - whole, float(whole)


def one_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    model_fn: Callable,
    params: Grads,
    train: Tensor,
    val: Tensor,
) -> dict[str, Any]:
    """Truth and predictions of a step, which is taken."""
    lr = optimizer.param_groups[0]["lr"]

    def val_loss(at: Grads) -> Tensor:
        with torch.no_grad():
            return model_fn(at, val).mean()

    metrics = (None, gf.adam(optimizer, model), gf.adam(optimizer, model, exact=True))
    found = [p for metric in metrics for p in predictions(model_fn, params, train, val, lr, metric)]
    with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the other kernels
        grads = gf.per_sample_grad(model_fn, params, train)
    mean = {name: g.mean(0) for name, g in grads.items()}
    before = float(val_loss(params))
    truth, after = leaving_out(model, optimizer, grads, mean, val_loss)
    take_step(model, optimizer, mean)
    values = {method: _short(prediction) for method, prediction in zip(METHODS, found, strict=True)}
    return {"val_loss": [before, after], "truth": _short(truth), "predictions": values}


def _short(values: Tensor) -> list[float]:
    return [float(f"{value:.6e}") for value in values.tolist()]


def agreement(predicted: Sequence[float], truth: Sequence[float]) -> dict[str, float]:
    """Pearson's and Spearman's correlation, and the slope of truth on prediction through the origin."""
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (predicted, truth))
    found = {"pearson": _correlation(x, y), "spearman": _correlation(_ranks(x), _ranks(y)), "slope": x @ y / (x @ x)}
    return {name: round(float(value), 4) for name, value in found.items()}


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    x, y = x - x.mean(), y - y.mean()
    return x @ y / (x.norm() * y.norm())


def _ranks(x: Tensor) -> Tensor:
    return x.argsort().argsort().double()


def summary(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """How well each method agrees with the truth: over all samples of a stretch, and step by step."""
    truth = [value for step in steps for value in step["truth"]]
    pooled = {m: agreement([value for step in steps for value in step["predictions"][m]], truth) for m in METHODS}
    by_step = {m: [agreement(step["predictions"][m], step["truth"]) for step in steps] for m in METHODS}
    return {"pooled": pooled, "by_step": by_step}


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Train, and look at the steps of each stretch."""
    text = Text(setting)
    model, optimizer = build(setting)
    model_fn, params = gf.functionalize(model, gf.causal_lm_loss)
    val = text.val(setting.val)
    stretches = []
    for start in setting.stretches:
        while start > _steps_taken(optimizer):
            mean = model_fn(dict(model.named_parameters()), text.train(setting.train)).mean()
            mean.backward()
            optimizer.step()
            optimizer.zero_grad()
        steps = []
        for number in range(start, start + setting.steps):
            found = one_step(model, optimizer, model_fn, params, text.train(setting.train), val)
            steps.append({"step": number, **found})
            print(f"step {number}: validation loss {found['val_loss'][1]:.4f}", flush=True)
        stretches.append({"what": f"steps {start} to {start + setting.steps - 1}", **summary(steps), "steps": steps})
    return stretches


def first_steps(setting: Setting) -> dict[str, Any]:
    """The first step of several models, each with other weights and batches; "step" is the model's seed."""
    steps = []
    for seed in range(setting.first_steps):
        text = Text(replace(setting, seed=seed))
        model, optimizer = build(replace(setting, seed=seed))
        model_fn, params = gf.functionalize(model, gf.causal_lm_loss)
        val = text.val(setting.val)
        steps.append({"step": seed} | one_step(model, optimizer, model_fn, params, text.train(setting.train), val))
        print(f"step 0 of model {seed}", flush=True)
    return {"what": f"step 0 of {setting.first_steps} models", **summary(steps), "steps": steps}


def _steps_taken(optimizer: torch.optim.Optimizer) -> int:
    state = optimizer.state.get(optimizer.param_groups[0]["params"][0])
    return int(state["step"]) if state else 0


def table(stretch: dict[str, Any]) -> str:
    """A stretch's agreement, method by method."""
    lines = [
        stretch["what"].capitalize(),
        "| method | Pearson, pooled | Spearman, pooled | slope, pooled | Pearson by step: median | lowest |",
        "|---|---|---|---|---|---|",
    ]
    for method, pooled in stretch["pooled"].items():
        by_step = sorted(found["pearson"] for found in stretch["by_step"][method])
        cells = (*pooled.values(), median(by_step), by_step[0])
        lines.append(f"| {method} | {' | '.join(f'{cell:.3g}' for cell in cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the tables, and write them with every number they come from."""
    torch.set_num_threads(1)
    setting, begin = Setting(), time.process_time()
    stretches = [*measure(setting), first_steps(setting)]
    for stretch in stretches:
        print(f"\n{table(stretch)}")
    environment = {
        "torch": torch.__version__, "python": platform.python_version(), "device": "cpu", "dtype": "float64",
        "threads": 1, "cpu_seconds": round(time.process_time() - begin),
        "text": "code and documentation of this Python's standard library, as bytes (examples/demo/build_corpus.py)",
    }  # fmt: skip
    result = {"environment": environment, "setting": asdict(setting), "stretches": stretches}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
