"""A training step with dot products, eager and compiled, beside the plain step, eager and compiled.

    python benchmarks/compiled.py              # benchmarks/results/compiled.json, then the table of docs/compile.md
    python benchmarks/compiled.py --size mlp   # one size; the others keep their results
    python benchmarks/compiled.py --page       # the table again, from the results

The sizes are ones where pointwise work matters: GELU and layer norms between products of moderate width, and a small
vocabulary. The plain step is forward and backward of the mean loss on train and validation samples together, the batch
that dot products need at the least; compiled, its loss is one graph, and AOTAutograd makes the backward of it. The
step with dot products, `value_and_grad_dot`, is compiled whole (`fullgraph=True`). The four take turns in one process;
a figure is the median over the rounds of the ratio to the plain eager step of the same round. The first call of a
compiled step, which compiles it, is timed apart. Errors are those of the compiled step's dots and gradients to the
eager step's, of the norms of both factors and of the gradient.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import ghostfunc as gf

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "compiled.json"
PAGE = ROOT / "docs" / "compile.md"
BEGIN, END = "<!-- benchmarks/compiled.py writes from here -->", "<!-- to here -->"

Work = tuple[Callable, dict[str, Tensor], Any, Any]  # model_fn, params, train batch, val batch


def gpt2(n: int, m: int, length: int, *, device: torch.device, **sizes: Any) -> Work:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_positions=length, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=False, **sizes)
    module: Any = GPT2LMHeadModel(config)
    model_fn, params = gf.functionalize(module.to(device), gf.causal_lm_loss)
    train, val = ({"input_ids": torch.randint(config.vocab_size, (k, length), device=device)} for k in (n, m))
    return model_fn, params, train, val


def mlp(n: int, m: int, width: int, depth: int, *, device: torch.device) -> Work:
    layers = [part for _ in range(depth) for part in (nn.Linear(width, width), nn.LayerNorm(width), nn.GELU())]
    model_fn, params = gf.functionalize(nn.Sequential(*layers, nn.Linear(width, 10)).to(device), gf.classification_loss)
    train, val = ((torch.randn(k, width, device=device), torch.randint(10, (k,), device=device)) for k in (n, m))
    return model_fn, params, train, val


SIZES: dict[str, tuple[str, Callable[[torch.device], Work]]] = {
    "gpt2": (
        "GPT-2, 4 layers of width 256, vocabulary 512, B=8, Bv=2, T=128",
        lambda device: gpt2(8, 2, 128, n_embd=256, n_layer=4, n_head=4, vocab_size=512, device=device),
    ),
    "mlp": (
        "MLP, 6 layers of width 256 with layer norm and GELU, B=512, Bv=64",
        lambda device: mlp(512, 64, 256, 6, device=device),
    ),
    "tiny": ("for trying this script", lambda device: mlp(16, 4, 32, 2, device=device)),
}


def joined(train: Any, val: Any) -> Any:
    return pytree.tree_map(lambda a, b: torch.cat([a, b]), train, val)


def steps(work: Work) -> dict[str, Callable[[Work], Any]]:
    """The four steps, each a function of the work; the two compiled ones have not been called yet."""
    model_fn = work[0]

    def mean_loss(params: dict[str, Tensor], batch: Any) -> Tensor:
        return model_fn(params, batch).mean()

    def with_dots(params: dict[str, Tensor], train: Any, val: Any) -> gf.ValueAndGradDot:
        return gf.value_and_grad_dot(model_fn, params, train, val)

    def plain_by(loss: Callable) -> Callable[[Work], Any]:
        def step(work: Work) -> Any:
            _, params, train, val = work
            leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
            return torch.autograd.grad(loss(leaves, joined(train, val)), list(leaves.values()))

        return step

    def dots_by(function: Callable) -> Callable[[Work], Any]:
        return lambda work: function(*work[1:])

    return {
        "plain": plain_by(mean_loss),
        "plain, compiled": plain_by(torch.compile(mean_loss, fullgraph=True)),
        "dots": dots_by(with_dots),
        "dots, compiled": dots_by(torch.compile(with_dots, fullgraph=True)),
    }


def errors(work: Work, found: gf.ValueAndGradDot, expected: gf.ValueAndGradDot) -> dict[str, float]:
    """Of dots relative to |g_i| |V|, of the gradient relative to its norm."""
    model_fn, params, train, val = work
    norms = gf.ghost_grad_norm(model_fn, params, train)
    direction = gf.value_and_grad_dot(model_fn, params, val, val).grads
    length = torch.stack([v.norm() for v in direction.values()]).norm()
    apart = torch.stack([(found.grads[name] - g).norm() for name, g in expected.grads.items()]).norm()
    size = torch.stack([g.norm() for g in expected.grads.values()]).norm()
    assert isinstance(found.dots, Tensor) and isinstance(expected.dots, Tensor)
    return {
        "dots": float(((found.dots - expected.dots).abs() / (norms * length)).max()),
        "gradient": float(apart / size),
    }


def measure(size: str, rounds: int, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    work = SIZES[size][1](device)
    methods = steps(work)
    compiling = {name: measuring.seconds(methods[name], work, device) for name in methods if "compiled" in name}
    return {
        "what": SIZES[size][0],
        "first_call_seconds": compiling,
        "errors": errors(work, methods["dots, compiled"](work), methods["dots"](work)),
        "times": measuring.times(work, methods, rounds, device),
    }


def table(results: dict[str, Any]) -> str:
    """The results as the page shows them."""
    lines = [
        "| | plain, eager | plain, compiled | dots, eager | dots, compiled | compiled: dots to plain | first call |",
        "|---|---|---|---|---|---|---|",
    ]
    for size, row in results["sizes"].items():
        if size == "tiny":
            continue
        of = {name: taken["median_ratio"] for name, taken in row["times"].items()}
        pairs = zip(row["times"]["dots, compiled"]["ratios"], row["times"]["plain, compiled"]["ratios"], strict=True)
        between = sorted(dots / plain for dots, plain in pairs)
        plain = row["times"]["plain"]["median_seconds"]
        lines.append(
            f"| {row['what']} | 1 ({1000 * plain:.0f} ms) | {of['plain, compiled']:.2f} | {of['dots']:.2f} "
            f"| {of['dots, compiled']:.2f} | {between[len(between) // 2]:.2f} "
            f"| {row['first_call_seconds']['dots, compiled']:.0f} s |"
        )
    shown = [row for size, row in results["sizes"].items() if size != "tiny"]
    worst = {what: max((row["errors"][what] for row in shown), default=0.0) for what in ("dots", "gradient")}
    machine = results["environment"]
    lines += [
        "",
        f"Float32, torch {machine['torch']}, {machine['cpu'] if machine['device'] == 'cpu' else machine['device']}, "
        f"{machine['threads']} threads. The compiled step's dots are within {worst['dots']:.0e} of the eager step's, "
        f"its gradient within {worst['gradient']:.0e}.",
    ]
    return "\n".join(lines)


def write_page() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    measuring.write(PAGE, f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{after}")


def main() -> None:
    parser = measuring.arguments_of(__doc__, SIZES, ["gpt2", "mlp"], {}, RESULTS)
    parser.add_argument("--page", action="store_true", help="only write the table of docs/compile.md again")
    arguments = parser.parse_args()
    if not arguments.page:
        torch.set_num_threads(arguments.threads)
        path: Path = arguments.results
        known = json.loads(path.read_text(encoding="utf-8"))["sizes"] if path.exists() else {}
        for size in arguments.size:
            start = time.perf_counter()
            known[size] = measure(size, arguments.rounds, torch.device(arguments.device))
            measuring.save(path, {"environment": measuring.environment(arguments), "sizes": known})
            ratios = {name: round(taken["median_ratio"], 3) for name, taken in known[size]["times"].items()}
            print(f"{size}: {ratios} in {time.perf_counter() - start:.0f} s")
    if arguments.page or arguments.results == RESULTS:
        write_page()


if __name__ == "__main__":
    main()
