"""Choose each batch out of a larger pool: greedy (GREATS), top-k and random, on the demo's text.

    python examples/select_batches.py                    # one seed, some minutes on one core
    python examples/select_batches.py --seeds 0 1 2 --json benchmarks/results/selection.json --figure docs/selection.png

At each step 32 samples of all domains are drawn, and 8 of them are trained on: those that help a validation batch of
one domain most. Every method starts from the same model and sees the same candidates. The held-out loss is that of the
domain's test split, which no choice has seen. Choosing costs several plain steps, so that random selection goes on
until it has used as much arithmetic as the greedy one.

The greedy rule weighs redundancy by the learning rate of a plain gradient step. It is tried with AdamW's learning rate,
as in the paper, and with the rate at which a plain step would be as long as AdamW's last one, which is far higher.
"""

import argparse
import io
import json
import math
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import ghostfunc as gf
from demo.run import prepare_data
from shared.dataloader import TOKEN, TokenCorpus, load_corpora
from shared.model_setup import DataVocabulary, build_model, model_config, quiet_transformers
from shared.training_utils import build_optimizer
from shared.utils import pick_device, seed_everything, wait_for, write_whole

LAYERS = 2
GRADIENT_CLIP = 1.0
NOT_A_LABEL = -100
ROUNDS = 7  # of timed steps


class Look(NamedTuple):
    """How a method is called and drawn."""

    label: str
    color: str
    linestyle: Any = "-"
    linewidth: float = 1.8


METHODS = {
    "random": Look("random", "0.45"),
    "top-k": Look("top-k dots", "#0072b2", linewidth=4.0),  # broad, since greedy often lies on it
    "greedy": Look("greedy, AdamW's learning rate", "#e69f00", linestyle=(0, (2.5, 2.5))),
    "greedy-length": Look("greedy, AdamW's step length", "#009e73"),
}

Batch = dict[str, Tensor]


class Texts:
    """The token files of a folder, with the vocabulary cut to the commonest tokens of the training text.

    A small model spends most of its arithmetic on a vocabulary of 50,257. Rare tokens become one, which is read but
    never a label.

    Attributes:
        train, val, test: the corpora; `val` and `test` are of one domain, and of different documents.
    """

    def __init__(self, data_dir: Path, val_domain: str, *, block_size: int, vocabulary: int) -> None:
        self.train, self.val, self.test = load_corpora(data_dir, str(data_dir), val_domain, block_size=block_size)
        counts = sum(np.bincount(np.fromfile(file, TOKEN), minlength=1 << 16) for file in self.train.files.values())
        commonest = np.argsort(-np.asarray(counts), kind="stable")[: vocabulary - 1]
        self.rare = vocabulary - 1
        self._new_id = torch.full((1 << 16,), self.rare)
        self._new_id[torch.from_numpy(commonest)] = torch.arange(self.rare)

    def draw(self, corpus: TokenCorpus, samples: int, seed: int, step: int) -> tuple[Batch, list[str]]:
        """Samples `[B, T]` with their labels, and their domains: a function of the seed and the step."""
        drawn = corpus.sample(samples, seed=seed, step=step)
        ids = self._new_id[drawn.tokens]  # [B, T]
        return {"input_ids": ids, "labels": ids.masked_fill(ids == self.rare, NOT_A_LABEL)}, drawn.domains


class Training:
    """A model in training on the batches that one method chooses.

    Attributes:
        picked: the domain of every sample that was trained on.
        shared: of each step's choice, the part that top-k would have chosen too.
    """

    def __init__(self, method: str, options: argparse.Namespace, texts: Texts, seed: int) -> None:
        self.method, self.options, self.texts, self.seed = method, options, texts, seed
        self.device = pick_device(options.device)
        seed_everything(seed, self.device)
        config = model_config("GPT2-Nano", None, DataVocabulary(options.vocabulary, texts.rare), options.block_size)
        config.n_layer = LAYERS
        self.model = build_model(config, None, torch.float32).to(self.device)  # type: ignore[arg-type]
        self.model_fn, self.params = gf.functionalize(self.model, gf.causal_lm_loss)
        self.optimizer = build_optimizer("adamw", self.model, options.learning_rate)
        self.as_plain = 0.0  # the learning rate at which a plain gradient step is as long as AdamW's last one
        self.steps = 0
        self.picked: list[str] = []
        self.shared: list[float] = []

    def step(self) -> None:
        """Choose a batch and train on it."""
        options = self.options
        rate = options.learning_rate * min(1.0, (self.steps + 1) / options.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        pool, domains = self.texts.draw(self.texts.train, options.candidates, self.seed, self.steps)
        pool = self._here(pool)
        chosen = self._choose(pool, rate)  # [k]
        self._update({name: tensor[chosen] for name, tensor in pool.items()})
        self.picked += [domains[i] for i in chosen.tolist()]
        self.steps += 1

    def _choose(self, pool: Batch, rate: float) -> Tensor:
        k = self.options.batch_size
        if self.method == "random":
            return torch.arange(k, device=self.device)  # the pool itself is in random order
        val, _ = self.texts.draw(self.texts.val, self.options.val_batch_size, self.seed, self.steps)
        val = self._here(val)
        if self.method == "top-k":
            return gf.ghost_grad_dot(self.model_fn, self.params, pool, val).topk(k).indices
        dots, gram = dots_and_gram(self.model_fn, self.params, pool, val)
        chosen = gf.greedy_select(dots, gram, k, lr=rate if self.method == "greedy" else self.as_plain)
        self.shared.append(torch.isin(chosen, dots.topk(k).indices).float().mean().item())
        return chosen

    def _update(self, batch: Batch) -> None:
        parameters = list(self.model.parameters())
        self.model_fn(dict(self.model.named_parameters()), batch).mean().backward()
        length = torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_CLIP)  # of the gradient, before it is clipped
        if self.method == "greedy-length":
            before = [p.detach().clone() for p in parameters]
            self.optimizer.step()
            moved = torch.nn.utils.get_total_norm([p.detach() - q for p, q in zip(parameters, before, strict=True)])
            self.as_plain = (moved / length).item()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """The mean loss of the whole test split, in nats per token."""
        batch, _ = self.texts.draw(self.texts.test, self.texts.test.blocks, 0, 0)
        losses = [
            gf.causal_lm_loss(self.model(input_ids=part["input_ids"]), part)
            for part in (
                self._here({name: tensor[start : start + 32] for name, tensor in batch.items()})
                for start in range(0, self.texts.test.blocks, 32)
            )
        ]
        return torch.cat(losses).mean().item()

    def _here(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.device) for name, tensor in batch.items()}


def dots_and_gram(model_fn: Callable, params: dict[str, Tensor], pool: Batch, val: Batch) -> tuple[Tensor, Tensor]:
    """All that the greedy rule reads, from one forward and backward.

    Args:
        model_fn: as from `functionalize`.
        params: likewise.
        pool: n candidates.
        val: the validation batch.

    Returns:
        The dots `[n]` with the mean validation gradient, and the candidates' Gram matrix `[n, n]`.
    """
    both = {name: torch.cat([pool[name], val[name]]) for name in pool}
    products = gf.ghost_grad_gram(model_fn, params, both)  # [n + m, n + m]
    n = len(pool["input_ids"])
    return products[:n, n:].mean(1), products[:n, :n]


def measure_costs(options: argparse.Namespace, texts: Texts) -> dict[str, dict[str, float]]:
    """What a step of each method costs: counted products, and seconds as a ratio to the plain step of the same round.

    Returns:
        By method `flops`, `relative_flops` (to "random", a plain step), and `relative_seconds`, a median.
    """
    trainings = {method: Training(method, options, texts, seed=0) for method in METHODS}
    flops = {}
    for method, training in trainings.items():
        training.step()
        with FlopCounterMode(display=False) as counter:
            training.step()
        flops[method] = counter.get_total_flops()
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(ROUNDS):
        for method, training in trainings.items():
            wait_for(training.device)
            start = time.perf_counter()
            training.step()
            wait_for(training.device)
            seconds[method].append(time.perf_counter() - start)
    return {
        method: {
            "flops": flops[method],
            "relative_flops": flops[method] / flops["random"],
            "relative_seconds": statistics.median(map(float.__truediv__, seconds[method], seconds["random"])),
        }
        for method in METHODS
    }


def train(training: Training, steps: int, every: int) -> dict[str, Any]:
    """Train for so many steps, and look at the held-out loss at every `every`-th.

    Returns:
        The run as JSON holds it; `share` is the part of the picks since the step before that are of the validation
        domain, `shared_with_top_k` the part of all picks that top-k would have made too.
    """
    run: dict[str, Any] = {"method": training.method, "seed": training.seed, "steps": [], "losses": [], "share": []}
    (domain,) = training.texts.val.domains
    while training.steps < steps:
        training.step()
        if training.steps % every == 0:
            run["steps"].append(training.steps)
            run["losses"].append(training.held_out_loss())
            recent = training.picked[-every * training.options.batch_size :]
            run["share"].append(recent.count(domain) / len(recent))
    if training.shared:
        run["shared_with_top_k"] = statistics.mean(training.shared)
    return run


def table(results: dict[str, Any]) -> str:
    """The outcome, method by method, averaged over the seeds."""
    steps, domain = results["setting"]["steps"], results["setting"]["val_domain"]
    lines = [
        f"{'method':<32} {'held-out loss after':>24} {'picks of':>14} {'as top-k':>9} {'cost of a step':>18}",
        f"{'':<32} {f'{steps} steps':>14} {'the end':>9} {domain:>14} {'':>9} {'FLOPs':>9} {'seconds':>8}",
    ]
    for method, look in METHODS.items():
        runs = [run for run in results["runs"] if run["method"] == method]
        place = runs[0]["steps"].index(steps)
        common = [run["shared_with_top_k"] for run in runs if "shared_with_top_k" in run]
        cost = results["costs"][method]
        mean = {
            "then": statistics.mean(run["losses"][place] for run in runs),
            "end": statistics.mean(run["losses"][-1] for run in runs),
            "share": statistics.mean(statistics.mean(run["share"][: place + 1]) for run in runs),
        }
        lines.append(
            f"{look.label:<32} {mean['then']:14.3f} {mean['end']:9.3f} {mean['share']:14.0%} "
            f"{f'{statistics.mean(common):.0%}' if common else '':>9} {cost['relative_flops']:8.2f}x "
            f"{cost['relative_seconds']:7.2f}x"
        )
    return "\n".join(lines)


def draw(results: dict[str, Any]) -> bytes:
    """Draw the losses by step and by arithmetic, and what was chosen.

    Returns:
        A PNG; lines are means over the seeds, bands reach from the lowest seed to the highest; the inset is the later
        part of the first panel.
    """
    setting = results["setting"]
    figure = Figure(figsize=(12, 4.2), dpi=100, layout="constrained")
    by_step, by_cost, picks = figure.subplots(1, 3)
    late = by_step.inset_axes((0.36, 0.36, 0.62, 0.6))
    for method, look in METHODS.items():
        runs = [run for run in results["runs"] if run["method"] == method]
        steps = np.array(runs[0]["steps"])
        losses, share = np.array([run["losses"] for run in runs]), 100 * np.array([run["share"] for run in runs])
        shown = steps <= setting["steps"]
        last = shown & (steps >= 0.4 * setting["steps"])
        cost = steps * results["costs"][method]["relative_flops"]
        for axes, x, values in (
            (by_step, steps[shown], losses[:, shown]),
            (late, steps[last], losses[:, last]),
            (by_cost, cost, losses),
            (picks, steps[shown], share[:, shown]),
        ):
            axes.plot(x, values.mean(0), **look._asdict())
            axes.fill_between(x, values.min(0), values.max(0), color=look.color, alpha=0.15, linewidth=0)
    domain = setting["val_domain"]
    by_step.set(xlabel="training step", ylabel=f"held-out loss on {domain} [nats per token]", title="For equal steps")
    by_cost.set(
        xlabel="arithmetic [plain steps]", ylabel=f"held-out loss on {domain} [nats per token]",
        title="For equal arithmetic",
    )  # fmt: skip
    picks.set(xlabel="training step", ylabel=f"picks from {domain} [%]", title="What is chosen")
    late.tick_params(labelsize="small")
    for axes in (by_step, late, by_cost, picks):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.legend(*by_step.get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS), frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", pil_kwargs={"optimize": True})
    return buffer.getvalue()


def build_parser() -> argparse.ArgumentParser:
    """All options and their defaults."""
    parser = argparse.ArgumentParser(
        description="Train on batches chosen out of a larger pool: greedy, top-k and random selection.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0], help="each is a model's start and a stream of candidates")
    add("--steps", type=int, default=150, help="of the methods that select; random goes on to equal arithmetic")
    add("--evaluate_every", type=int, default=15, help="steps; --steps is a multiple of it")
    add("--candidates", type=int, default=32, help="samples drawn at each step")
    add("--batch_size", type=int, default=8, help="samples chosen of them")
    add("--val_batch_size", type=int, default=8, help="validation samples of a step, drawn anew each time")
    add("--val_domain", default="code", help="the domain to become good at")
    add("--block_size", type=int, default=64, help="tokens of a sample")
    add("--vocabulary", type=int, default=4096, help="the commonest tokens are kept, the others become one")
    add("--learning_rate", type=float, default=1e-3, help="of AdamW, constant after the warm-up")
    add("--warmup_steps", type=int, default=15)
    add("--device", default="auto")
    add("--data_dir", type=Path, help="tokenized data; by default the demo's, which is made if it is not there")
    add("--json", type=Path, default=Path("results/selection.json"), help="where the numbers go")
    add("--figure", type=Path, default=Path("results/selection.png"), help="where the picture goes")
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run every method with every seed; write numbers and picture after each run.

    Args:
        argv: the options; None takes those of the command line.

    Returns:
        The results as the JSON file holds them.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.steps % options.evaluate_every or not 0 < options.evaluate_every <= options.steps:
        parser.error("--steps must be a multiple of --evaluate_every")
    if not 0 < options.batch_size <= options.candidates:
        parser.error("--batch_size must be from 1 to --candidates")
    quiet_transformers()
    begin = time.monotonic()
    try:
        data_dir = options.data_dir or prepare_data()
        texts = Texts(data_dir, options.val_domain, block_size=options.block_size, vocabulary=options.vocabulary)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    costs = measure_costs(options, texts)
    outside = ("seeds", "device", "data_dir", "json", "figure")
    results: dict[str, Any] = {
        "script": "examples/select_batches.py",
        "command": shlex.join(["python", "examples/select_batches.py", *argv]),
        "environment": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": str(pick_device(options.device)),
            "threads": torch.get_num_threads(),
        },
        "setting": {name: value for name, value in vars(options).items() if name not in outside},
        "held_out": {"blocks": texts.test.blocks, "of": options.val_domain},
        "costs": costs,
        "runs": [],
    }
    for seed in options.seeds:
        for method in METHODS:
            steps = options.steps
            if method == "random":
                each = costs["greedy"]["relative_flops"]
                steps = math.ceil(steps * each / options.evaluate_every) * options.evaluate_every
            run = train(Training(method, options, texts, seed), steps, options.evaluate_every)
            print(f"seed {seed}, {METHODS[method].label}: {run['losses'][-1]:.3f} after {steps} steps", flush=True)
            results["runs"].append(run)
            write_whole(options.json, json.dumps(results, indent=1) + "\n")
    options.figure.parent.mkdir(parents=True, exist_ok=True)
    options.figure.write_bytes(draw(results))
    print(f"\n{table(results)}\n\nNumbers: {options.json}, picture: {options.figure}")
    print(f"All of this took {time.monotonic() - begin:.0f} s.")
    return results


if __name__ == "__main__":
    main()
