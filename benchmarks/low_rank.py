"""What a direction of rank r costs and how far its dot products are off, on a trained language model.

    python benchmarks/low_rank.py            # trains for a few minutes on one core, and writes the results
    python benchmarks/low_rank.py --times    # the results have times, too: for a quiet machine
    python benchmarks/low_rank.py --page     # the figure and the page, from the results

The model is a GPT-2 of 4 layers of 256 with tied embeddings, trained here on the demo's corpus, whose tokens are cut to
the 4,095 most frequent and one for all others. A step has 8 train samples, and 1 or 8 validation samples of one domain.
Over the train samples of several such steps, against dot products d of the model in float64:

    error       sqrt(mean of ((d_r - d) / (|g_i| |V|))^2)
    spearman    the rank correlation of d_r with d within a step, the mean over steps
    bound       sqrt(mean of (bound / (|g_i| |V|))^2); "loose": the median of bound / |d_r - d|

FLOPs are those of the call over those of a plain training step on the train samples alone, counted by torch, with those
of orthonormal bases, eigenvectors and products with vectors added, which torch does not count. FLOPs of GPT-2 small are
counted on tensors without values (`FakeTensorMode`): they depend on shapes alone.
"""

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from measuring import save, times
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

import ghostfunc as gf

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from demo.run import VAL_DOMAIN, prepare_data
from shared.dataloader import TokenCorpus
from shared.model_setup import quiet_transformers

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "low_rank.json"
FIGURE = ROOT / "docs" / "low_rank.png"
PAGE = ROOT / "docs" / "low_rank.md"

POSITIONS, VOCABULARY = 128, 4096
TRAIN, VALS, STEPS_MEASURED = 8, (1, 8), 4
RANKS = (1, 2, 4, 8, 16, 32, 64)
SMALL_RANKS = (1, 4, 16, 64)
SMALL_SHAPES = ((4, 1, 256), (2, 1, 1024), (4, 4, 256), (16, 1, 64))  # train and validation samples, positions
CALLS: dict[str, Callable] = {"with gradients": gf.value_and_grad_dot, "dots alone": gf.ghost_grad_dot}
aten = torch.ops.aten
UNCOUNTED = {
    aten.linalg_qr: lambda shape, *_, **__: 4 * shape[0] * shape[1] ** 2,
    aten._linalg_eigh: lambda shape, *_, **__: 9 * shape[0] ** 3,
    aten.mv: lambda matrix, *_, **__: 2 * matrix[0] * matrix[1],
    aten.dot: lambda vector, *_, **__: 2 * vector[0],
}


class Step(NamedTuple):
    """What is measured on: a model, and batches of train and validation samples."""

    model_fn: Any
    params: dict[str, Tensor]
    train: dict[str, Tensor]
    val: dict[str, Tensor]


# --- the model and the data -------------------------------------------------------------------------------------------


class Text:
    """Blocks of the demo's tokens, in a vocabulary cut to the most frequent ones."""

    def __init__(self) -> None:
        data = prepare_data()
        files = {path.stem.removeprefix("train-"): path for path in sorted(data.glob("train-*.bin"))}
        self.train = TokenCorpus(files, block_size=POSITIONS)
        self.val = TokenCorpus({VAL_DOMAIN: data / "val" / f"validation-{VAL_DOMAIN}.bin"}, block_size=POSITIONS)
        ids = torch.cat([torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint16) for path in files.values()])
        frequent = torch.bincount(ids.int(), minlength=1 << 16).argsort(descending=True, stable=True)
        self.place = torch.full((1 << 16,), VOCABULARY - 1)
        self.place[frequent[: VOCABULARY - 1]] = torch.arange(VOCABULARY - 1)

    def batch(self, corpus: TokenCorpus, samples: int, step: int) -> dict[str, Tensor]:
        """Blocks drawn for a step."""
        return {"input_ids": self.place[corpus.sample(samples, seed=0, step=step).tokens]}


def gpt2(layers: int, width: int, heads: int, vocabulary: int, positions: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=heads, vocab_size=vocabulary, n_positions=positions,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def trained(text: Text, steps: int) -> tuple[GPT2LMHeadModel, float]:
    """The model, and its mean loss over the last steps."""
    module = gpt2(4, 256, 4, VOCABULARY, POSITIONS)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=20)
    losses = []
    for step in range(steps):
        batch = text.batch(text.train, 8, step)
        loss = gf.causal_lm_loss(module(**batch), batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warm.step()
        losses.append(loss.item())
        if step % 25 == 24:
            print(f"step {step + 1}: loss {statistics.mean(losses[-25:]):.3f}", flush=True)
    return module.eval(), statistics.mean(losses[-25:])


# --- measuring --------------------------------------------------------------------------------------------------------


def flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def plain(step: Step) -> None:
    leaves = {name: p.detach().requires_grad_() for name, p in step.params.items()}
    torch.autograd.grad(step.model_fn(leaves, step.train).mean(), list(leaves.values()))


def call(step: Step, what: str, rank: int | None) -> Any:
    return CALLS[what](step.model_fn, step.params, step.train, step.val, schedule="joint", rank=rank)


def costs(step: Step, ranks: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """FLOPs of each call at each rank, and exact, over those of a plain step."""
    of_plain = flops(lambda: plain(step))
    wanted = {"exact": None, **{str(rank): rank for rank in ranks}}
    return {
        what: {name: flops(lambda r=r, w=what: call(step, w, r)) / of_plain for name, r in wanted.items()}
        for what in CALLS
    }


def spearman(one: Tensor, other: Tensor) -> float:
    ranks = [values.argsort().argsort().double() for values in (one, other)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def fidelity(steps: list[Step]) -> dict[str, Any]:
    """Errors and bounds at each rank, and of what is exact but for rounding, over the train samples of all steps."""
    exact, scales = [], []
    for step in steps:
        double = {name: p.double() for name, p in step.params.items()}
        direction = gf.value_and_grad_dot(step.model_fn, double, step.val, step.val).grads
        exact.append(gf.ghost_grad_along(step.model_fn, double, step.train, direction))
        length = torch.stack([g.norm() for g in direction.values()]).norm()
        scales.append(gf.ghost_grad_norm(step.model_fn, double, step.train) * length)
    size = torch.cat(exact) / torch.cat(scales)
    found: dict[str, Any] = {"dots": size.square().mean().sqrt().item(), "ranks": {}}
    for rank in (None, *RANKS):
        errors, bounds, correlations = [], [], []
        approximated = 0
        for step, d, scale in zip(steps, exact, scales, strict=True):
            given = gf.ghost_grad_dot(
                step.model_fn, step.params, step.train, step.val, schedule="joint", rank=rank, out="param train"
            )
            parts, bound = given if rank is not None else (given, {})
            dots = torch.stack(list(parts.values())).double().sum(0)
            correlations.append(spearman(dots, d))
            errors.append((dots - d) / scale)
            bounds.append(sum(bound.values(), torch.zeros_like(d)) / scale)
            approximated = sum(int(b.max() > 0) for b in bound.values())
        error, of_error = torch.cat(errors), torch.cat(bounds)
        found["ranks"]["exact" if rank is None else str(rank)] = {
            "error": error.square().mean().sqrt().item(),
            "largest error": error.abs().max().item(),
            "spearman": statistics.mean(correlations),
            "bound": of_error.square().mean().sqrt().item(),
            "loose": (of_error / error.abs()).median().item(),
            "beyond the bound": int((error.abs() > of_error + 1e-5).sum()),
            "approximated": approximated,
        }
        print(rank, found["ranks"]["exact" if rank is None else str(rank)], flush=True)
    return found


def steps_of(text: Text, module: GPT2LMHeadModel) -> Iterator[tuple[int, list[Step]]]:
    model_fn, params = gf.functionalize(module, gf.causal_lm_loss)
    for val in VALS:
        yield (
            val,
            [
                Step(model_fn, params, text.batch(text.train, TRAIN, 10_000 + k), text.batch(text.val, val, k))
                for k in range(STEPS_MEASURED)
            ],
        )


def small(train: int, val: int, positions: int) -> dict[str, dict[str, float]]:
    """The costs of GPT-2 small."""
    with FakeTensorMode():
        model_fn, params = gf.functionalize(gpt2(12, 768, 12, 50257, positions), gf.causal_lm_loss)
        batches = ({"input_ids": torch.randint(50257, (n, positions))} for n in (train, val))
        return costs(Step(model_fn, params, *batches), SMALL_RANKS)


def timed(step: Step, rounds: int) -> dict[str, float]:
    """Times of `value_and_grad_dot`, exact and at each rank, over a plain step's; the median of interleaved ratios."""
    methods: dict[str, Callable] = {"plain": plain}
    for name, rank in {"exact": None, **{str(rank): rank for rank in RANKS}}.items():
        for what in CALLS:
            methods[f"{what}, {name}"] = lambda s, w=what, r=rank: call(s, w, r)
    found = times(step, methods, rounds, torch.device("cpu"))
    return {name: of["median_ratio"] for name, of in found.items() if name != "plain"}


def trained_model(arguments: argparse.Namespace) -> dict[str, Any]:
    text = Text()
    module, loss = trained(text, arguments.steps)
    results: dict[str, Any] = {
        "environment": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": "cpu",
            "threads": arguments.threads,
            "cores": os.cpu_count(),
            "dtype": "float32",
        },
        "about": {
            "steps": arguments.steps,
            "loss": loss,
            "parameters": sum(p.numel() for p in module.parameters()),
            "tensors": sum(1 for _ in module.parameters()),
            "train": TRAIN,
            "positions": POSITIONS,
            "samples": TRAIN * STEPS_MEASURED,
        },
        "val": {},
    }
    for val, steps in steps_of(text, module):
        results["val"][str(val)] = {"costs": costs(steps[0], RANKS), **fidelity(steps)}
        if arguments.times:
            results["val"][str(val)]["times"] = timed(steps[0], arguments.rounds)
    return results


# --- showing ----------------------------------------------------------------------------------------------------------


def draw(results: dict[str, Any], path: Path) -> None:
    """Error and bound, and cost, against rank."""
    figure = Figure(figsize=(9.6, 3.8), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    for val, color in zip(results["val"], ("#0072B2", "#D55E00"), strict=True):
        of_val, plural = results["val"][val], "s" if int(val) > 1 else ""
        for what, look in (("bound", "--"), ("error", "-")):
            values = [of_val["ranks"][str(rank)][what] or float("nan") for rank in RANKS]  # 0: all is exact
            left.plot(
                RANKS, values, look, marker="o", markersize=4, color=color, label=f"{what}, {val} val sample{plural}"
            )
        left.axhline(of_val["dots"], color=color, linestyle=":", label=f"the dots themselves, {val}")
        for what, look in (("with gradients", "-"), ("dots alone", "--")):
            cost = of_val["costs"][what]
            right.plot(RANKS, [cost[str(r)] for r in RANKS], look, marker="o", markersize=4, color=color)
            right.axhline(cost["exact"], color=color, linestyle=":")
    left.set_yscale("log")
    left.set_ylabel("root mean square,\nof the product of the norms")
    right.set_ylabel("FLOPs over a plain step's\n(dotted: exact dot products)")
    right.plot([], [], "k-", label="value_and_grad_dot")
    right.plot([], [], "k--", label="ghost_grad_dot")
    for panel in (left, right):
        panel.set_xscale("log", base=2)
        panel.set_xticks(RANKS, [str(rank) for rank in RANKS])
        panel.set_xlabel("rank r")
        panel.grid(alpha=0.25)
        panel.legend(fontsize=7.5, frameon=False)
    figure.savefig(path)


def table(results: dict[str, Any]) -> str:
    """Error, bound and cost at each rank, for each number of validation samples."""
    head = ("val samples", "rank", "error", "largest", "spearman", "bound", "loose", *CALLS)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for val, of_val in results["val"].items():
        cost = of_val["costs"]
        first = f"{val} (dots: {of_val['dots']:.1e})"
        for name, at in of_val["ranks"].items():
            cells = [f"{at['error']:.1e}", f"{at['largest error']:.1e}", f"{at['spearman']:.4f}"]
            cells += [f"{at['bound']:.1e}", f"{at['loose']:.0f}"] if at["bound"] else ["", ""]
            cells += [f"{cost[what][name]:.3f}" for what in CALLS]
            lines.append(f"| {first} | {name} | {' | '.join(cells)} |")
            first = ""
    return "\n".join(lines)


def small_table(results: dict[str, Any]) -> str:
    names = ["exact", *(str(rank) for rank in SMALL_RANKS)]
    lines = [f"| GPT-2 small: train, val, tokens | FLOPs | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for shape, cost in results["gpt2 small"].items():
        lines += [f"| {shape} | {what} | {' | '.join(f'{cost[what][n]:.3f}' for n in names)} |" for what in CALLS]
    return "\n".join(lines)


def times_table(results: dict[str, Any]) -> str:
    if not all("times" in of_val for of_val in results["val"].values()):
        return ""
    names = ["exact", *(str(rank) for rank in RANKS)]
    lines = ["", "", f"| time over a plain step | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for val, of_val in results["val"].items():
        for what in CALLS:
            cells = [f"{of_val['times'][f'{what}, {name}']:.2f}" for name in names]
            lines.append(f"| {what}, {val} val | {' | '.join(cells)} |")
    return "\n".join(lines)


def caption(results: dict[str, Any]) -> str:
    about, environment = results["about"], results["environment"]
    return (
        f"GPT-2 of 4 layers of 256 with tied embeddings of {VOCABULARY} tokens, {about['parameters']:,} parameters, "
        f"{about['steps']} steps, loss {about['loss']:.2f} nats; {about['train']} train samples a step of "
        f"{about['positions']} tokens, {about['samples']} in all. torch {environment['torch']}, float32, CPU."
    )


def page(text: str, results: dict[str, Any]) -> str:
    """The page with the tables between its marks."""
    before, begin, rest = text.partition("<!-- low rank: benchmarks/low_rank.py --page -->\n")
    _, end, after = rest.partition("\n<!-- end of low rank -->")
    shown = f"{caption(results)}\n\n{table(results)}{times_table(results)}\n\n{small_table(results)}"
    return f"{before}{begin}{shown}{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("trained", "small"), default=["trained", "small"])
    parser.add_argument("--steps", type=int, default=200, help="of training")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--times", action="store_true", help="measure times, too")
    parser.add_argument("--rounds", type=int, default=7, help="of times")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="draw and write from the results, and measure nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    quiet_transformers()
    if not arguments.page and "trained" in arguments.parts:
        save(arguments.results, trained_model(arguments))
    if not arguments.page and "small" in arguments.parts:
        save(arguments.results, {"gpt2 small": {", ".join(map(str, shape)): small(*shape) for shape in SMALL_SHAPES}})
    if arguments.page:
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
        draw(results, FIGURE)
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
