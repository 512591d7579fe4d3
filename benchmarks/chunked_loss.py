"""Memory, FLOPs and time of `chunked_causal_lm_loss` beside `causal_lm_loss`, in a plain step and in transforms.

    python benchmarks/chunked_loss.py           # vocabularies of 50257 and 151936; some minutes
    python benchmarks/chunked_loss.py --page    # write docs/large_vocabularies.md from the JSON, and run nothing

Each pair of methods computes the same numbers, which is checked. Time: the methods take turns in one process, and a
figure is the median over the rounds of the ratio to the plain step with logits of the same round. Memory: one step in a
process of its own, the high-water mark of resident memory above what the process held before the step, on a GPU the
allocator's.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import measuring
import torch
from torch import Tensor, nn

import ghostfunc as gf

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "chunked_loss.json"
PAGE = ROOT.parent / "docs" / "large_vocabularies.md"
ALLOWED = 1e-5  # relative difference of the two losses' results, in float32


class Work(NamedTuple):
    """A model under both losses, with its batches."""

    with_logits: Callable[..., Tensor]
    chunked: Callable[..., Tensor]
    params: dict[str, Tensor]
    train: Any
    val: Any
    description: dict[str, Any]


class Size(NamedTuple):
    """A GPT-2 of some vocabulary, its head tied to its embedding as by default."""

    layers: int
    heads: int
    width: int
    vocabulary: int
    positions: int
    n: int
    m: int


SIZES = {
    "gpt2-small": Size(12, 12, 768, 50257, 256, 4, 1),
    "large-vocabulary": Size(4, 8, 512, 151936, 512, 4, 1),
}


def build(name: str, device: torch.device) -> Work:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    size = SIZES[name]
    config = GPT2Config(
        n_layer=size.layers, n_head=size.heads, n_embd=size.width, vocab_size=size.vocabulary,
        n_positions=size.positions, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    module = nn.Module.to(GPT2LMHeadModel(config), device)
    with_logits, params = gf.functionalize(module, gf.causal_lm_loss)
    chunked, _ = gf.functionalize(module, gf.chunked_causal_lm_loss)
    train, val = (
        {"input_ids": torch.randint(size.vocabulary, (k, size.positions)).to(device)} for k in (size.n, size.m)
    )
    model = f"GPT-2 {size.layers} x {size.width}, vocabulary {size.vocabulary}, tied"
    description = {"model": model, "B": size.n, "Bv": size.m, "T": size.positions, "V": size.vocabulary}
    return Work(with_logits, chunked, params, train, val, description)


def plain_step(work: Work, model_fn: Callable[..., Tensor]) -> dict[str, Tensor]:
    leaves = {name: p.detach().requires_grad_() for name, p in work.params.items()}
    grads = torch.autograd.grad(model_fn(leaves, work.train).mean(), list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))


def dots(work: Work, model_fn: Callable[..., Tensor]) -> dict[str, Tensor]:
    found = gf.value_and_grad_dot(model_fn, work.params, work.train, work.val)
    assert isinstance(found.dots, Tensor)
    return {**found.grads, "dots": found.dots}


def clipped(work: Work, model_fn: Callable[..., Tensor]) -> dict[str, Tensor]:
    found = gf.ghost_clipped_grad(model_fn, work.params, work.train, 1.0)
    return {**found.grads, "norms": found.norms}


STEPS: dict[str, tuple[str, Callable[[Work, Callable[..., Tensor]], dict[str, Tensor]]]] = {
    "plain": ("plain step", plain_step),
    "dots": ("`value_and_grad_dot`", dots),
    "clipped": ("`ghost_clipped_grad`", clipped),
}
METHODS: dict[str, Callable[[Work], dict[str, Tensor]]] = {
    name + suffix: lambda work, step=step, chunked=bool(suffix): step(
        work, work.chunked if chunked else work.with_logits
    )
    for name, (_, step) in STEPS.items()
    for suffix in ("", " chunked")
}


def difference(work: Work, name: str) -> float:
    """The largest relative difference of a result with the chunked loss from the same with logits."""
    found, wanted = METHODS[f"{name} chunked"](work), METHODS[name](work)
    return max(float((found[key] - value).norm() / value.norm()) for key, value in wanted.items())


def measure(size: str, arguments: Any) -> dict[str, Any]:
    started = measuring.environment(arguments)
    peaks = {name: measuring.peak(__file__, size, name, arguments) for name in METHODS}
    work = build(size, torch.device(arguments.device))
    differences = {name: difference(work, name) for name in STEPS}
    if max(differences.values()) > ALLOWED:
        raise RuntimeError(f"{size}: the two losses differ by {differences}, more than {ALLOWED:g}.")
    counted = {name: measuring.flops(lambda method=method: method(work)) for name, method in METHODS.items()}
    taken = measuring.times(work, METHODS, arguments.rounds, torch.device(arguments.device))
    methods = {
        name: {**taken[name], "flops_ratio": counted[name] / counted["plain"], "peak_bytes": peaks[name]}
        for name in METHODS
    }
    about = {**work.description, "environment": started, "rounds": arguments.rounds, "differences": differences}
    return {**about, "methods": methods}


# --- the page ---------------------------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    lines = ["| | vocabulary | memory, logits | memory, chunked | FLOPs | time |", "|---" * 6 + "|"]
    for result in results.values():
        for name, (label, _) in STEPS.items():
            whole, chunked = result["methods"][name], result["methods"][f"{name} chunked"]
            flops, times = (f"{chunked[key]:.2f} for {whole[key]:.2f}" for key in ("flops_ratio", "median_ratio"))
            memory = " | ".join(f"{row['peak_bytes'] / 2**20:.0f} MiB" for row in (whole, chunked))
            lines.append(f"| {label} | {result['V']} | {memory} | {flops} | {times} |")
    return "\n".join(lines)


def caption(results: dict[str, Any]) -> str:
    """What was measured, on what."""
    sizes = "; ".join(
        f"{r['model']}, " + ", ".join(f"{key}={r[key]}" for key in ("B", "Bv", "T")) for r in results.values()
    )
    first = next(iter(results.values()))
    environment, threads = first["environment"], first["environment"]["threads"]
    load = max(r["environment"]["load_average_before"] for r in results.values())
    apart = max(max(r["differences"].values()) for r in results.values())
    return (
        f"{sizes}. Memory is what a step adds to what the process holds; FLOPs and times are in plain steps with "
        f"logits. Results of the two losses differ by at most {apart:.0e}. torch {environment['torch']}, "
        f"{environment['dtype']}, {environment['device']}, {threads} thread{'s' * (threads > 1)}, load average up to "
        f"{load:.0f}; medians of {first['rounds']} interleaved rounds. Raw numbers: "
        "[benchmarks/results/chunked_loss.json](../benchmarks/results/chunked_loss.json)."
    )


def page(text: str) -> str:
    """The page with the table of the results between its marks."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    return measuring.with_figures(text, "chunked_loss.py", f"{caption(results)}\n\n{table(results)}")


def main() -> None:
    parser = measuring.arguments_of(__doc__, SIZES, list(SIZES), METHODS, RESULTS)
    parser.add_argument("--page", action="store_true", help="write the page from the JSON, and run nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak_of:
        device = torch.device(arguments.device)
        measuring.print_peak(build(arguments.size[0], device), METHODS[arguments.peak_of], device)
        return
    for size in [] if arguments.page else arguments.size:
        result = measure(size, arguments)
        measuring.save(arguments.results, {size: result})
        for name, row in result["methods"].items():
            ratios = f"{row['flops_ratio']:8.3f}{row['median_ratio']:8.2f}"
            print(f"{size:18}{name:16}{row['peak_bytes'] / 2**20:8.0f} MiB{ratios}", flush=True)
    if arguments.results == RESULTS:
        measuring.write(PAGE, page(PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
