"""Every architecture of the tests' zoo: what counts its parameters, how exactly, and what composes with what.

    python benchmarks/models.py                  # all of it: benchmarks/results/models.json, then docs/models.md
    python benchmarks/models.py --only Llama     # the cases whose name has this part; the others keep their results
    python benchmarks/models.py --page           # docs/models.md again, from the results

Errors are in float64, against a loop over single samples: the largest over all parameters of the dot products, of the
training gradient, of the matrix of pairs, and of each sample's gradient. FLOPs are those of `value_and_grad_dot` of
4 train samples and 1 validation sample over those of a plain training step on the 5 samples together, as
`torch.utils.flop_counter` counts them.
"""

import argparse
import json
import platform
import sys
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import ghostfunc as gf

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "models.json"
PAGE = ROOT / "docs" / "models.md"
CPU = torch.device("cpu")
ROUNDING = 1e-12  # of the whole gradient: what is left of a gradient that is zero
EXACT = 1e-9

sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "benchmarks"))
zoo, oracle, language, others, convolutions, composition = map(
    import_module, ("zoo", "oracle", "zoo_language", "zoo_others", "test_rules_conv", "composition")
)

Row = dict[str, Any]
Sections = dict[str, list[Any]]


def sections() -> Sections:
    """The zoo's cases under the page's headings."""
    experts = {*language.MIXTURES, "GptOss", "DeepseekV3", "Qwen3Next", "Unfused experts"}
    states = {*language.MASKED_STATES, *language.UNMASKED_STATES}
    dense = [case for case in language.LANGUAGE if case.family not in experts | states]
    return {
        "Language models": dense,
        "Mixtures of experts": [case for case in language.LANGUAGE if case.family in experts],
        "State-space and recurrent language models": [case for case in language.LANGUAGE if case.family in states],
        "Encoders": others.ENCODERS,
        "Encoder-decoder models": others.SEQUENCE_TO_SEQUENCE,
        "Vision, audio and both with text": others.VISION_AND_AUDIO,
        "LoRA": others.LORA,
        "Modules of torch.nn": others.MODULES,
    }


# --- one case ---------------------------------------------------------------------------------------------------------


class Everything:
    """A module tracker without modules: torch's hooks every module's inputs, and leaves there break `autograd.grad`."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def flops(run: Callable[[], Any]) -> int:
    of_groups = {torch.ops.aten.convolution_backward: convolutions.backward_flops}
    counter = FlopCounterMode(display=False, custom_mapping=of_groups)
    counter.mod_tracker = Everything()  # pyright: ignore[reportAttributeAccessIssue]
    with counter:
        run()
    return counter.get_total_flops()


def plain_step(model_fn: Any, params: dict[str, Tensor], batch: Any) -> None:
    leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    torch.autograd.grad(model_fn(leaves, batch).mean(), list(leaves.values()), allow_unused=True)


def flops_ratio(case: Any) -> float | None:
    """None where torch's counter does not see the plain step: fused kernels of `torch.nn` modules."""
    if case in others.MODULES:
        return None
    model_fn, params, batch = case.make(torch.float32, CPU)
    train, val, both = batch(4, 1), batch(1, 2), batch(5, 1)
    plain = flops(lambda: plain_step(model_fn, params, both))
    return flops(lambda: gf.value_and_grad_dot(model_fn, params, train, val, schedule="joint")) / plain


def relative(actual: Tensor, reference: tuple[Tensor, Tensor]) -> float:
    value, scale = reference
    return float(((actual - value).abs() / scale).max())


def error(case: Any) -> float:
    """The largest error of any parameter in any of the ways to its per-sample gradients."""
    model_fn, params, batch = zoo.in_double(case, CPU)
    train, val = batch(4, 1), batch(3, 2)
    g, v = (oracle.per_sample_grads(model_fn, params, b) for b in (train, val))
    whole = torch.stack([grad.norm() for grad in g.values()]).norm()
    counted = [name for name, grad in g.items() if grad.norm() > ROUNDING * whole]

    joint = gf.value_and_grad_dot(model_fn, params, train, val, out="param train", schedule="joint")
    of_each = oracle.expected("param train", g, v)
    found = [relative(joint.dots[name], of_each[name]) for name in counted]
    found += [float((joint.grads[name] - g[name].mean(0)).norm() / g[name].mean(0).norm()) for name in counted]
    found.append(relative(gf.ghost_grad_dot(model_fn, params, train, val, out="train val", schedule="two-phase"),
                          oracle.matrix(g, v)))  # fmt: skip
    _, factors = gf.ghost_factors(model_fn, params, train)
    for name in counted:
        of_samples = sum((use.dense(params[name].shape) for use in factors[name]), torch.zeros_like(g[name]))
        found.append(float((of_samples - g[name]).norm() / g[name].norm()))
    return max(found)


def coverage(case: Any) -> Row:
    """Which rules count the parameters, from the plan."""
    model_fn, params, batch = zoo.in_double(case, CPU)
    plan = gf.explain(model_fn, params, batch(4, 1), batch(3, 2))
    uses = Counter((use.factor, use.op) for of_parameter in plan.uses.values() for use in of_parameter)
    factors: dict[str, dict[str, int]] = {}
    for (factor, op), count in sorted(uses.items()):
        factors.setdefault(factor, {})[op] = count
    return {
        "tensors": len(params),
        "counted": sum(bool(of_parameter) for of_parameter in plan.uses.values()),
        "factors": factors,
        "fallback": plan.coverage.get("fallback", 0.0),
        "probe": plan.probe,
    }


def measure(case: Any) -> Row:
    try:
        return {**coverage(case), "error": error(case), "flops": flops_ratio(case)}
    except Exception as raised:  # a refusal or a failure is the row
        return {"raised": composition.message(raised)}


# --- the page ---------------------------------------------------------------------------------------------------------


def by_rule(factors: dict[str, dict[str, int]]) -> str:
    return "; ".join(
        f"{factor}: {', '.join(f'{op} {count}' for op, count in of_op.items())}" for factor, of_op in factors.items()
    )


def line(name: str, row: Row) -> str:
    if "raised" in row:
        return f"| {name} | no: {row['raised']} | | | | | |"
    counted = f"{row['counted']} of {row['tensors']}"
    fallback = f"{row['fallback']:.1%}" if row["fallback"] else ""
    flops = "" if row["flops"] is None else f"{row['flops']:.2f}"
    probe = "yes" if row["probe"] else ""
    cells = [name, counted, by_rule(row["factors"]), fallback, probe, f"{row['error']:.0e}", flops]
    return f"| {' | '.join(cells)} |"


def page(results: dict[str, Any]) -> str:
    """docs/models.md, from the results."""
    environment = results["environment"]
    rows = [row for section in results["sections"].values() for row in section.values()]
    exact = sum(row.get("error", 1) < EXACT for row in rows)
    blocks = [
        "# Models",
        "Generated by `python benchmarks/models.py` from `benchmarks/results/models.json`; do not edit. "
        f"{exact} of {len(rows)} cases are exact (error below {EXACT:.0e}). torch {environment['torch']}, "
        f"transformers {environment['transformers']}, Python {environment['python']}, CPU, float64.",
        INTRODUCTION,
    ]
    for heading, section in results["sections"].items():
        blocks.append(f"## {heading}")
        lines = [line(name, row) for name, row in section.items()]
        blocks.append("\n".join([COLUMNS, "|---|---|---|---|---|---|---|", *lines]))
    blocks += ["## What composes with what", COMPOSITION_INTRODUCTION]
    blocks.append(
        "\n".join(["| with | model | outcome |", "|---|---|---|", *(composed(row) for row in results["composition"])])
    )
    blocks += ["## Not in the tables", NOT_COVERED]
    return "\n\n".join(blocks) + "\n"


COLUMNS = "| case | parameters counted | uses by factor and operation | fallback | probe | error | FLOPs |"
INTRODUCTION = """\
Each case is a tiny random model in eval mode; the tests run the same table (`tests/test_zoo.py`).

- *parameters counted*: trainable tensors with at least one use that a rule accounts for, of all. The rest do not
  influence the losses; a use that nothing accounts for is an error, not a row.
- *uses by factor and operation*: how many uses of parameters each operation has, and what their per-sample gradients
  are kept as.
- *fallback*: the share of the parameters' entries with a use that has no rule: exact, by a backward of that operation
  for each sample.
- *probe*: a second backward told the samples apart, because an operation is not known to keep them apart.
- *error*: the largest relative error of any parameter against a loop over single samples: dot products, training
  gradient, matrix of pairs, per-sample gradients.
- *FLOPs*: `value_and_grad_dot` of 4 train and 1 validation samples over a plain step on the 5 together. At these sizes
  (16 wide, 6 positions) the contractions weigh more than in a real model, where the ratio is near 1 (README). Empty
  for modules, some of whose kernels torch's counter does not see."""
NOT_COVERED = """\
- Flex attention: torch has no backward of it on a CPU.
- `sdpa` with Gemma 2, BLOOM and MPT: transformers has none for them.
- The grouped product of experts in float64: torch's kernel has no float64, and the table runs the operator that
  transformers takes in its place. `tests/test_zoo.py` holds the kernel itself, in float32, to experts in a loop.
- RWKV and RecurrentGemma padded on the left: their states read the padding, whatever computes the gradients.
- Auxiliary losses over the batch, such as a router's load balancing: the samples interact, and the call is refused."""
COMPOSITION_INTRODUCTION = """\
Each line was run on the tiny model, with padded batches unless it says otherwise. The error is that of the dot products
(or of their derivatives), relative, against a loop over single samples in the same dtype. Activation checkpointing is
held to a loop in float64 without it, with parameters that are not the module's; compiled is with
`backend="aot_eager"`, against the eager loop. *no* stands before what is raised instead."""


def composed(row: Row) -> str:
    if "raised" in row:
        outcome = f"no: {row['raised']}"
    else:
        right = "yes" if row["error"] < row["tolerance"] else "WRONG"
        outcome = f"{right}: error {row['error']:.0e}, at most {row['tolerance']:.0e} allowed"
    return f"| {row['what']} | {row['model']} | {outcome} |"


# --- running ----------------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}


def save(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def run(only: str) -> dict[str, Any]:
    known = json.loads(RESULTS.read_text()) if only and RESULTS.exists() else {"sections": {}}
    results = {"environment": environment(), "sections": {}}
    for heading, cases in sections().items():
        before = known["sections"].get(heading, {})
        rows = results["sections"][heading] = {}
        for case in cases:
            if only in case.name or case.name not in before:
                rows[case.name] = measure(case)
                print(line(case.name, rows[case.name]), flush=True)
            else:
                rows[case.name] = before[case.name]
    return {**results, "composition": composition.rows()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a part of the names of the cases to run")
    parser.add_argument("--page", action="store_true", help="write docs/models.md from the results, and run nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.page:
        save(RESULTS, json.dumps(run(arguments.only), indent=1) + "\n")
    save(PAGE, page(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
