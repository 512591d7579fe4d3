"""What composes with what: each line is a way to call ghostfunc, run on a tiny model against a loop over samples.

A line that does not work is a row too, with the message that the user gets.
"""

import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ghostfunc as gf

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
cases, oracle, zoo, language = map(import_module, ("cases", "oracle", "zoo", "zoo_language"))

CPU = torch.device("cpu")
Row = dict[str, Any]
CONVOLUTIONS = "convolutions"
CONFIGURED: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("GPT2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "Llama": ("Llama", {}),
    "Mixtral, a loop over experts": ("Mixtral", {"experts_implementation": "eager"}),
    "Mixtral, batched experts": ("Mixtral", {"experts_implementation": "batched_mm"}),
}
LANGUAGE_MODELS = tuple(CONFIGURED)
EVERY_MODEL = (*LANGUAGE_MODELS, CONVOLUTIONS)
Reference = tuple[Tensor, Tensor]  # dots [n], and |g_i| |V| [n]


class Subject(NamedTuple):
    """A model and its batches."""

    model_fn: Any
    params: dict[str, Tensor]
    train: Any
    val: Any


def subject(model: str, dtype: torch.dtype = torch.float64, padding: str = "right", **changes: Any) -> Subject:
    """A model of the tests and its batches, padded where they are tokens; in float64 without casts to float32."""
    if model == CONVOLUTIONS:
        case = cases.BY_NAME["convolution"]
    else:
        architecture, options = CONFIGURED[model]
        case = language.language(architecture, padding=padding, **options, **changes)
    made = zoo.in_double(case, CPU) if dtype == torch.float64 else case.make(dtype, CPU)
    return Subject(made.model_fn, made.params, made.batch(4, 1), made.batch(3, 2))


def reference(s: Subject) -> Reference:
    train, val = (oracle.per_sample_grads(s.model_fn, s.params, batch) for batch in (s.train, s.val))
    return oracle.dots(train, oracle.mean(val))


def error(actual: Tensor, expected: Reference) -> float:
    value, scale = expected
    return float(((actual.double() - value).abs() / scale).max())


def dots(s: Subject, **how: Any) -> Tensor:
    return gf.ghost_grad_dot(s.model_fn, s.params, s.train, s.val, **how)


def moved(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Other values than the module's own."""
    return {name: 1.1 * p + 0.01 for name, p in params.items()}


# --- the lines --------------------------------------------------------------------------------------------------------


def schedule(model: str, name: str) -> float:
    s = subject(model)
    return error(dots(s, schedule=name), reference(s))


def low_precision(model: str, dtype: torch.dtype) -> float:
    s = subject(model, dtype)
    return error(dots(s), reference(s))


def autocast(model: str) -> float:
    s = subject(model, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        return error(dots(s), reference(s))


def checkpointed(model: str, *, reentrant: bool) -> float:
    """With parameters that are not the module's: a recomputation with the module's own would be off."""
    plain = subject(model)

    architecture, options = CONFIGURED[model]
    module = language.module_of(architecture, **options)
    module.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model_fn, params = cases.functionalized(module.train(), gf.causal_lm_loss, torch.float32, CPU)
    s = Subject(model_fn, moved(params), plain.train, plain.val)
    return error(dots(s), reference(plain._replace(params=moved(plain.params))))


def compiled(model: str, padding: str) -> float:
    """One graph, and none other for other values."""
    s = subject(model, torch.float32, padding)
    other = s._replace(params=moved(s.params))
    torch._dynamo.reset()
    step = torch.compile(
        lambda p, train, val: gf.ghost_grad_dot(s.model_fn, p, train, val), fullgraph=True, backend="aot_eager"
    )
    errors = [error(step(s.params, s.train, s.val), reference(s))]
    with torch._dynamo.config.patch(error_on_recompile=True):
        errors.append(error(step(other.params, other.train, other.val), reference(other)))
    return max(errors)


def ensemble(model: str) -> float:
    s = subject(model)
    members = [s, s._replace(params=moved(s.params))]
    stacked = {name: torch.stack([m.params[name] for m in members]) for name in s.params}
    together = torch.func.vmap(lambda p: dots(s._replace(params=p)))(stacked)
    return max(error(of_one, reference(m)) for of_one, m in zip(together, members, strict=True))


def inner(left: Iterable[Tensor], right: Iterable[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()


def dots_by_autograd(s: Subject, params: dict[str, Tensor], train: Any) -> Tensor:
    """The dot products with a graph, by two backward passes of autograd."""

    def gradient(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, list(params.values()), create_graph=True)

    direction = gradient(s.model_fn(params, s.val).mean())
    of_samples = [gradient(loss) for loss in s.model_fn(params, train)]
    return torch.stack([inner(g, direction) for g in of_samples])


def distance(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    difference = torch.stack([(actual[name] - e).norm() for name, e in expected.items()])
    return float(difference.norm() / torch.stack([e.norm() for e in expected.values()]).norm())


def twice_differentiable(model: str) -> Subject:
    """Attention without a kernel that has no second derivative."""
    return subject(model) if model == CONVOLUTIONS else subject(model, attn_implementation="eager")


def derivative_in_params(model: str) -> float:
    s = twice_differentiable(model)
    leaves = {name: p.clone().requires_grad_() for name, p in s.params.items()}
    expected = torch.autograd.grad(dots_by_autograd(s, leaves, s.train).sum(), list(leaves.values()))
    actual = torch.func.grad(lambda p: dots(s._replace(params=p)).sum())(s.params)
    return distance(actual, dict(zip(leaves, expected, strict=True)))


def derivative_in_inputs(model: str) -> float:
    s = subject(model)
    x, y = s.train
    leaves = {name: p.clone().requires_grad_() for name, p in s.params.items()}
    x_leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(dots_by_autograd(s, leaves, (x_leaf, y)).sum(), [x_leaf])
    actual = torch.func.grad(lambda x: dots(s._replace(train=(x, y))).sum())(x)
    return distance({"x": actual}, {"x": expected})


def forward_derivative(model: str) -> float:
    s = twice_differentiable(model)
    tangent = moved(s.params)
    leaves = {name: p.clone().requires_grad_() for name, p in s.params.items()}
    expected = [
        inner(torch.autograd.grad(dot, list(leaves.values()), retain_graph=True), tangent.values())
        for dot in dots_by_autograd(s, leaves, s.train)
    ]
    actual = torch.func.jvp(lambda p: dots(s._replace(params=p)), (s.params,), (tangent,))[1]
    return distance({"": actual}, {"": torch.stack(expected)})


def packed(model: str) -> float:
    """Four documents in two rows; without a mask, transformers sees by the position ids where documents begin."""
    s = subject(model)
    lengths = (2, 4, 3, 3)
    texts = [cases.Draw(torch.float64, CPU, seed).ids(zoo.VOCABULARY, 1, n, low=3) for seed, n in enumerate(lengths)]
    rows = {
        "input_ids": torch.cat(texts, 1),
        "position_ids": torch.cat([torch.arange(n) for n in lengths]),
        "segments": torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
    }
    train = {name: t.view(2, zoo.POSITIONS) for name, t in rows.items()}
    alone = [oracle.per_sample_grads(s.model_fn, s.params, {"input_ids": text}) for text in texts]
    of_texts = {name: torch.cat([grads[name] for grads in alone]) for name in s.params}
    direction = oracle.mean(oracle.per_sample_grads(s.model_fn, s.params, s.val))
    return error(dots(s._replace(train=train), segments=train["segments"]), oracle.dots(of_texts, direction))


class Line(NamedTuple):
    """A way to call ghostfunc, the models that it is run on, and the error that counts as right."""

    what: str
    tolerance: float
    models: tuple[str, ...]
    run: Callable[[str], float]


LINES = [
    Line('`schedule="joint"`', 1e-9, EVERY_MODEL, lambda m: schedule(m, "joint")),
    Line('`schedule="two-phase"`', 1e-9, EVERY_MODEL, lambda m: schedule(m, "two-phase")),
    Line("`torch.autocast` to bfloat16", 1e-2, EVERY_MODEL, autocast),
    Line("a bfloat16 model", 1e-2, EVERY_MODEL, lambda m: low_precision(m, torch.bfloat16)),
    Line("a float16 model", 1e-3, EVERY_MODEL, lambda m: low_precision(m, torch.float16)),
    Line("activation checkpointing, float32", 1e-5, LANGUAGE_MODELS, lambda m: checkpointed(m, reentrant=False)),
    Line("reentrant checkpointing, float32", 1e-5, LANGUAGE_MODELS, lambda m: checkpointed(m, reentrant=True)),
    Line("packed documents, `segments=`", 1e-9, LANGUAGE_MODELS, packed),
    Line("`torch.compile(fullgraph=True)`, float32, called twice", 1e-5, EVERY_MODEL, lambda m: compiled(m, "")),
    Line("`torch.compile(fullgraph=True)`, padded batches", 1e-5, LANGUAGE_MODELS, lambda m: compiled(m, "right")),
    Line("`torch.func.vmap` over two sets of parameters", 1e-9, EVERY_MODEL, ensemble),
    Line("`torch.func.grad` of the dots in the parameters", 1e-9, EVERY_MODEL, derivative_in_params),
    Line("`torch.func.jvp` of the dots in the parameters", 1e-9, EVERY_MODEL, forward_derivative),
    Line("`torch.func.grad` of the dots in an input", 1e-9, (CONVOLUTIONS,), derivative_in_inputs),
]


def rows() -> list[Row]:
    """Every line on every model: its error, or what was raised instead."""
    return [row(line, model) for line in LINES for model in line.models]


def row(line: Line, model: str) -> Row:
    made: Row = {"model": model, "what": line.what, "tolerance": line.tolerance}
    try:
        made["error"] = line.run(model)
    except Exception as raised:  # whatever a user would get is the row
        made["raised"] = message(raised)
    return made


def message(raised: Exception) -> str:
    """The first line of an exception, as a cell of a table."""
    first = (str(raised).strip().splitlines() or [""])[0]
    return f"{type(raised).__name__}: {first}".replace("|", r"\|")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in LINES:
        for model in line.models:
            print(row(line, model), flush=True)
