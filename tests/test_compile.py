"""torch.compile of a step that calls ghostfunc: one graph, no recompilation, the same numbers, no use missed."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.func import functional_call
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode
from zoo_language import module_of

import ghostfunc as gf
from ghostfunc._compile import RECORDS
from ghostfunc._contract import tile_loop
from ghostfunc._directions import FromRows, Given
from ghostfunc._factors import Outer

TOLERANCE = 1e-9

pytestmark = [
    pytest.mark.skipif(not RECORDS, reason="this torch is too old"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),  # inductor's own
]


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=False):
        yield
    torch._dynamo.reset()


def compiled(step: Callable, backend: Any = "aot_eager") -> Callable:
    """The step as one graph, or an error."""
    return torch.compile(step, backend=backend, fullgraph=True)


def graphs() -> int:
    """How many graphs have been recorded."""
    return counters["stats"]["unique_graphs"]


def assert_same(found: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    """The same structure of tensors with the same values, relative to each tensor's norm."""
    mine, spec = pytree.tree_flatten(found)
    others, other_spec = pytree.tree_flatten(expected)
    assert spec == other_spec
    for a, b in zip(mine, others, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).norm() <= tolerance * b.norm()


def tokens(n: int, seed: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 37, (n, 6), generator=torch.Generator().manual_seed(seed))}


def images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 8, 8, dtype=torch.float64, generator=generator)
    return x, torch.randint(5, (n,), generator=generator)


def points(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, dtype=torch.float64, generator=generator), torch.randint(3, (n,), generator=generator)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, groups=2), nn.GroupNorm(2, 8), nn.GELU(), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


MODELS: dict[str, tuple[Callable[[], nn.Module], Any, Callable[[int, int], Any]]] = {
    "GPT-2, tied": (lambda: module_of("GPT2", n_layer=1), gf.causal_lm_loss, tokens),
    "Llama": (lambda: module_of("Llama", num_hidden_layers=1), gf.causal_lm_loss, tokens),
    "Mixtral, experts by index": (
        lambda: module_of("Mixtral", num_hidden_layers=1, experts_implementation="batched_mm"),
        gf.causal_lm_loss,
        tokens,
    ),
    "convolutions": (convolutions, gf.classification_loss, images),
}


def check_training(name: str, backend: str, tolerance: float) -> None:
    """Three steps, each with new batches, an optimizer's step between them."""
    make, loss, batch = MODELS[name]
    module = make().double().eval()
    model_fn, params = gf.functionalize(module, loss)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)

    def step(params: Any, train: Any, val: Any) -> gf.ValueAndGradDot:
        return gf.value_and_grad_dot(model_fn, params, train, val, out="param train")

    run = compiled(step, backend)
    for k in range(3):
        train, val = batch(4, 2 * k), batch(2, 2 * k + 1)
        found, expected = run(params, train, val), step(params, train, val)
        assert_same(tuple(found), tuple(expected), tolerance)
        assert found.unused == expected.unused
        assert graphs() == 1
        for key, p in module.named_parameters():
            p.grad = found.grads[key]
        before = {key: p.clone() for key, p in params.items()}
        optimizer.step()
        assert all(not torch.equal(before[key], params[key]) for key in params)


SLOW = {"Llama", "Mixtral, experts by index"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in MODELS])
def test_a_training_step_is_one_graph(name):
    with torch._dynamo.config.patch(error_on_recompile=True):
        check_training(name, "aot_eager", TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT-2, tied", "convolutions"])
def test_a_training_step_through_inductor(name):
    with torch._dynamo.config.patch(error_on_recompile=True):
        check_training(name, "inductor", 1e-7)


@pytest.mark.slow
def test_the_example_of_the_docs():
    page = (Path(__file__).parents[1] / "docs" / "compile.md").read_text()
    names: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    expected = gf.value_and_grad_dot(names["model_fn"], names["params"], names["train"], names["val"])
    assert_same(tuple(names["result"]), tuple(expected), 1e-5)


CALLS: dict[str, Callable] = {
    "matrix": lambda f, p, train, val: gf.ghost_grad_dot(f, p, train, val, out="train val"),
    "matrix by parameter, turned": lambda f, p, train, val: gf.ghost_grad_dot(f, p, train, val, out="param val train"),
    "two-phase": lambda f, p, train, val: gf.value_and_grad_dot(f, p, train, val, schedule="two-phase")[:],
    "sum over val, keywords": lambda f, p, train, val: gf.ghost_grad_dot(
        model_fn=f, params=p, train=train, val=val, reduction="sum", dtype=torch.float64
    ),
    "layers by a function": lambda f, p, train, val: gf.ghost_grad_dot(
        f, p, train, val, layers=lambda name: name.endswith("weight")
    ),
    "along the parameters": lambda f, p, train, val: gf.ghost_grad_along(f, p, train, p, out="param sample"),
    "a backward for each sample": lambda f, p, train, val: gf.ghost_grad_dot(f, p, train, val, on_unsupported="dense"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_transform_and_option(call):
    model_fn, params = gf.functionalize(perceptron(), gf.classification_loss)
    step = compiled(lambda params, train, val: call(model_fn, params, train, val))
    for seed in (0, 5):
        train, val = points(5, seed), points(3, seed + 1)
        assert_same(step(params, train, val), call(model_fn, params, train, val))
    assert graphs() == 1


def test_aux_and_work_around_the_call():
    """The auxiliary output comes back, and the graph has what the step does before and after the call."""
    base, params = gf.functionalize(perceptron(), gf.classification_loss)

    def model_fn(params: Any, batch: Any) -> Any:
        return base(params, batch), {"mean": batch[0].mean(1)}

    def step(params: Any, train: Any, val: Any) -> Any:
        train = (train[0] * 2, train[1])
        values, aux = gf.value_and_grad_dot(model_fn, params, train, val, has_aux=True)
        kept = values.dots > 0
        return values.dots.masked_fill(~kept, 0), {k: p - 0.1 * values.grads[k] for k, p in params.items()}, aux

    assert_same(compiled(step)(params, points(5, 0), points(2, 1)), step(params, points(5, 0), points(2, 1)))
    assert graphs() == 1


def test_an_unused_parameter_is_named():
    module = perceptron()
    module.register_parameter("idle", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    model_fn, params = gf.functionalize(module, gf.classification_loss)
    found = compiled(lambda p, a, b: gf.value_and_grad_dot(model_fn, p, a, b))(params, points(4, 0), points(2, 1))
    assert found.unused == ("idle",)
    assert type(found) is gf.ValueAndGradDot and not found.grads["idle"].any()


# ---------------------------------------------------------------- what the graph depends on


class WithState(nn.Module):
    """A frozen layer, a buffer, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.norm(self.frozen(x))))


def by_functionalize(module: nn.Module) -> tuple[Any, dict[str, Tensor]]:
    return gf.functionalize(module, gf.classification_loss)


def by_hand(module: nn.Module) -> tuple[Any, dict[str, Tensor]]:
    def model_fn(params: Any, batch: Any) -> Tensor:
        return F.cross_entropy(functional_call(module, params, batch[:1]), batch[1], reduction="none")

    return model_fn, {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("make", [by_functionalize, by_hand])
def test_frozen_parameters_buffers_and_modes_are_not_baked_in(make):
    module = WithState().double().eval()
    model_fn, params = make(module)
    step = compiled(lambda p, train, val: gf.ghost_grad_dot(model_fn, p, train, val))

    def check(recorded: int) -> None:
        train, val = points(5, 0), points(2, 1)
        torch.manual_seed(3)
        found = step(params, train, val)
        torch.manual_seed(3)
        assert_same(found, gf.ghost_grad_dot(model_fn, params, train, val))
        assert graphs() == recorded

    check(1)
    module.frozen.weight.mul_(2)
    module.norm.running_mean += 1  # type: ignore[operator]
    check(1)
    module.frozen.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.float64), requires_grad=False)
    check(graphs())
    module.dropout.train()
    before = graphs()
    check(before + 1)  # anew, with dropout, which draws what eager draws


def test_another_model_is_another_graph():
    def step(model_fn: Any, params: Any, train: Any, val: Any) -> Tensor:
        return gf.ghost_grad_dot(model_fn, params, train, val)

    run = compiled(step)
    for seed in (0, 1):
        torch.manual_seed(seed)
        model_fn, params = gf.functionalize(perceptron(), gf.classification_loss)
        train, val = points(5, 0), points(2, 1)
        assert_same(run(model_fn, params, train, val), step(model_fn, params, train, val))
    assert graphs() == 2


def test_another_batch_size_is_recorded_anew():
    model_fn, params = gf.functionalize(perceptron(), gf.classification_loss)

    def step(params: Any, train: Any, val: Any) -> Tensor:
        return gf.ghost_grad_dot(model_fn, params, train, val)

    run = compiled(step)
    for n, m in ((5, 2), (6, 3), (5, 2)):
        train, val = points(n, n), points(m, m)
        assert_same(run(params, train, val), step(params, train, val))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_module_runs_as_it_was_written(in_place):
    """The interpreter has to see its operations; the step is what can be compiled."""
    module = WithState().double().eval()
    expected = gf.value_and_grad_dot(*gf.functionalize(module, gf.classification_loss), points(5, 0), points(2, 1))
    if in_place:
        module.compile(backend="aot_eager", fullgraph=True)
        made: Any = module
    else:
        made = torch.compile(module, backend="aot_eager", fullgraph=True)
    found = gf.value_and_grad_dot(*gf.functionalize(made, gf.classification_loss), points(5, 0), points(2, 1))
    assert graphs() == 0
    assert_same([*found.grads.values(), found.dots], [*expected.grads.values(), expected.dots])
    made(points(2, 1)[0])
    assert graphs() == 1  # and is compiled elsewhere as before


# ---------------------------------------------------------------- what is refused, and when


class Hidden(torch.autograd.Function):
    """A product that no rule sees."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        return grad @ weight.t(), x.t() @ grad


def hidden_use(params: Any, x: Tensor) -> Tensor:
    return (torch.tanh(x @ params["seen"]) + Hidden.apply(x, params["hidden"])).sum(1)


def mixing(params: Any, x: Tensor) -> Tensor:
    return ((x - x.mean(0)) @ params["seen"]).sum(1)


def unfollowed(params: Any, x: Tensor) -> Tensor:
    order = x[:, 0].argsort()
    return ((x[order] @ params["seen"])[order.argsort()]).sum(1)


def deciding(params: Any, x: Tensor) -> Tensor:
    return (x @ params["seen"]).sum(1) * (2 if x.sum().item() > 0 else 1)


def drawing(params: Any, x: Tensor) -> Tensor:
    return (x @ F.dropout(params["seen"], 0.5)).sum(1)


REFUSED: dict[str, tuple[Callable, type[Exception], str]] = {
    "a use that no rule sees": (hidden_use, gf.UnsupportedUse, r"hidden \(4, 3\): used by an operation"),
    "samples that meet": (mixing, gf.InteractingSamples, "depends on the others of its batch"),
    "rows in an order of their own": (unfollowed, gf.UnsupportedUse, "while torch.compile records .* outside"),
    "a decision by a value": (deciding, gf.UnsupportedUse, "cannot be compiled(.|\n)*in deciding"),
    "a drawn parameter": (drawing, gf.UnsupportedUse, "same random numbers are needed again"),
    "a scalar loss": (lambda p, x: (x @ p["seen"]).sum(), ValueError, "scalar loss"),
}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("model_fn", "error", "match"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_is_the_compiled_calls_error(model_fn, error, match, backend):
    """The error is eager's, at the call, whatever the step does with the result."""
    params = {"seen": torch.randn(4, 3, dtype=torch.float64), "hidden": torch.randn(4, 3, dtype=torch.float64)}

    def step(params: Any, train: Tensor, val: Tensor) -> Any:
        values = gf.value_and_grad_dot(model_fn, params, train, val, out="param train")
        return values.losses + values.dots["seen"], {k: params[k] - g for k, g in values.grads.items()}

    run = compiled(step, backend)
    for _ in range(2):
        with pytest.raises(error, match=match):
            run(params, points(4, 0)[0], points(2, 1)[0])
    if error is gf.UnsupportedUse and "hidden" in match:
        with pytest.raises(error) as refusal:
            run(params, points(4, 0)[0], points(2, 1)[0])
        assert refusal.value.parameters == ("hidden",)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("out", ["train", "train val"])
def test_losses_that_are_not_finite_are_refused_when_they_come(out, backend):
    model_fn, params = gf.functionalize(perceptron(), gf.classification_loss)
    step = compiled(lambda p, train, val: gf.ghost_grad_dot(model_fn, p, train, val, out=out), backend)
    train, val = points(5, 0), points(3, 1)
    expected = gf.ghost_grad_dot(model_fn, params, train, val, out=out)
    assert_same(step(params, train, val), expected)
    bad = (val[0].clone(), val[1])
    bad[0][1] = torch.nan
    with pytest.raises(ValueError, match=r"val batch: the losses of samples \[1\] are not finite"):
        step(params, train, bad)
    assert_same(step(params, train, val), expected)
    assert graphs() == 1


def test_a_precondition_is_refused():
    model_fn, params = gf.functionalize(perceptron(), gf.classification_loss)
    step = compiled(lambda p, train, val: gf.ghost_grad_dot(model_fn, p, train, val, precondition=unchanged))
    with pytest.raises(gf.UnsupportedUse, match="ghost_grad_along"):
        step(params, points(4, 0), points(2, 1))


@pytest.mark.parametrize("axis", ["token", "layer", "head"])
def test_an_axis_is_refused(axis):
    model_fn, params = gf.functionalize(perceptron(), gf.classification_loss)
    step = compiled(lambda p, a, b: gf.ghost_grad_dot(model_fn, p, a, b, out=f"train {axis}"))
    with pytest.raises(gf.UnsupportedUse, match=f"does not record the axis '{axis}'"):
        step(params, points(4, 0), points(2, 1))


def test_a_bound_method_is_refused():
    model_fn, params = gf.functionalize(perceptron(), gf.classification_loss)

    class Holder:
        def losses(self, params: Any, batch: Any) -> Tensor:
            return model_fn(params, batch)

    holder = Holder()
    with pytest.raises(RuntimeError, match="bound method"):
        compiled(lambda p, a, b: gf.ghost_grad_dot(holder.losses, p, a, b))(params, points(4, 0), points(2, 1))


def unchanged(direction: dict[str, Tensor]) -> dict[str, Tensor]:
    return direction


OTHER_CALL = """
import torch, ghostfunc as gf
model_fn, params = gf.functionalize(torch.nn.Linear(4, 3), gf.classification_loss)
batch = torch.randn(4, 4), torch.tensor([0, 1, 2, 0])
factors = lambda params, batch: gf.ghost_factors(model_fn, params, batch)[1]["weight"][0].g.sum()
norms = lambda params, batch: gf.ghost_grad_norm(model_fn, params, batch)
for step, fullgraph in ((factors, True), (factors, False), (norms, True), (norms, False)):
    torch._dynamo.reset()
    try:
        torch.compile(step, backend="aot_eager", fullgraph=fullgraph)(params, batch)
    except RuntimeError as error:
        assert "and no other call" in str(error), error
    else:
        raise AssertionError("not refused")
"""


@pytest.mark.slow
def test_another_call_is_refused():
    """In a process of its own: Dynamo would read the annotation checks that tests put around every function."""
    done = subprocess.run([sys.executable, "-c", OTHER_CALL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_step_with_a_break_in_its_graph():
    model_fn, params = gf.functionalize(perceptron(), gf.classification_loss)

    def step(params: Any, train: Any, val: Any) -> Any:
        torch._dynamo.graph_break()
        return gf.ghost_grad_dot(model_fn, params, train, val) * 2

    for backend in ("aot_eager", "eager"):
        torch._dynamo.reset()
        run = torch.compile(step, backend=backend)
        for seed in (0, 3):
            train, val = points(5, seed), points(2, seed + 1)
            assert_same(run(params, train, val), step(params, train, val))


# ---------------------------------------------------------------- the tile stream as an operator


def streamed(params: Any, x: Tensor) -> Tensor:
    return (x @ params["up"]).tanh().sum((1, 2))


def test_the_graph_has_the_tile_stream_as_one_operator():
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch._aot_autograd.utils import make_boxed_func

    recorded = []

    def keep(graph: Any, inputs: Any) -> Any:
        recorded.append(graph)
        return make_boxed_func(graph.forward)

    params = {"up": torch.randn(64, 96, dtype=torch.float64)}
    train, val = (torch.randn(n, 128, 64, dtype=torch.float64) for n in (3, 1))
    for schedule in ("joint", "two-phase"):

        def step(params: Any, train: Tensor, val: Tensor, schedule: str = schedule) -> Any:
            return gf.value_and_grad_dot(streamed, params, train, val, schedule=schedule)[:]

        torch._dynamo.reset()
        assert_same(compiled(step, aot_autograd(fw_compiler=keep))(params, train, val), step(params, train, val))
        called = [node.target for node in recorded[-1].graph.nodes if node.op == "call_function"]
        assert called.count(torch.ops.ghostfunc.tile_stream.default) == 1


STREAMS = {
    "given": lambda d: Given(d.normal(2, 7, 5)),
    "each validation sample": lambda d: FromRows(Outer(d.normal(3, 4, 5), d.normal(3, 4, 7)), each=True),
    "their sum": lambda d: FromRows(Outer(d.normal(3, 4, 5), d.normal(3, 4, 7)), each=False),
}


@pytest.mark.parametrize("want_grad", [True, False])
@pytest.mark.parametrize("directions", STREAMS.values(), ids=STREAMS)
def test_the_operator_is_its_loop(directions, want_grad, device):
    """The same values, shapes without values, and the FLOPs that the counter sees in the loop."""
    from cases import Draw

    draw = Draw(torch.float64, device)
    left, right, along = draw.normal(2, 6, 7), draw.normal(2, 6, 5), directions(draw)
    given, rows = (along.tensor, (None, None)) if isinstance(along, Given) else (None, (along.left, along.right))
    arguments = (left, right, given, *rows, getattr(along, "each", False), want_grad)
    operator = torch.ops.ghostfunc.tile_stream
    with FlopCounterMode(display=False) as in_loop:
        dots, grad = tile_loop(left, right, along, want_grad)
    with FlopCounterMode(display=False) as in_operator:
        found = operator(*arguments)
    assert_same(found[0], dots)
    assert_same(found[1], left.new_empty(0) if grad is None else grad)
    assert in_operator.get_total_flops() == in_loop.get_total_flops() > 0
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
