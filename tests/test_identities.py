"""Every quantity of every case against the loop over single samples: float64 to 1e-10, float32 to 1e-5."""

import copy

import pytest
import torch
from cases import BY_NAME, CASES, Built, Case
from oracle import (
    TOLERANCE,
    as_double,
    assert_dots,
    assert_dots_by_name,
    assert_grads,
    dots,
    expected,
    losses_and_grads,
    mean,
    per_sample_grads,
)
from torch import Tensor
from torch.utils import _pytree as pytree

import ghostfunc as gf

OUTS = ("train", "train val", "param train", "param train val")
SCHEDULES = ("joint", "two-phase", "auto")
DTYPES = (torch.float64, torch.float32)
N = 4
# The oracle runs attention kernels that have no batching rule of their own under vmap: slower, and exact.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def reference(case: Case, params: dict[str, Tensor], batch, device: torch.device):
    """Losses and per-sample gradients in float64, of exactly these parameters and this batch."""
    return losses_and_grads(case.make(torch.float64, device).model_fn, as_double(params), as_double(batch))


def check_dots(case: Case, dtype: torch.dtype, device: torch.device, n: int, m: int, schedules, outs=OUTS) -> None:
    model_fn, params, batch = case.make(dtype, device)
    train, val = batch(n, 1), batch(m, 2)
    (losses, g), (val_losses, v) = reference(case, params, train, device), reference(case, params, val, device)
    tolerance = TOLERANCE[dtype]
    for out in outs:
        want = expected(out, g, v)
        check = assert_dots_by_name if out.startswith("param") else assert_dots
        for schedule in schedules:
            what = f"{case.name} {dtype} m={m} out={out!r} {schedule}"
            check(gf.ghost_grad_dot(model_fn, params, train, val, out=out, schedule=schedule), want, tolerance, what)
            result = gf.value_and_grad_dot(model_fn, params, train, val, out=out, schedule=schedule)
            check(result.dots, want, tolerance, f"{what} with grads")
            assert_grads(result.grads, mean(g), tolerance, f"{what}: grads")
            torch.testing.assert_close(result.losses.double(), losses, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(result.val_losses.double(), val_losses, rtol=tolerance, atol=tolerance)


@each_case
@pytest.mark.parametrize("m", [1, 3])
def test_dots(case, m, device):
    """Every `out` and both schedules in float64."""
    check_dots(case, torch.float64, device, N, m, ("joint", "two-phase"))


@each_case
def test_dots_in_float32(case, device):
    """Float32 and a val batch that is larger than the train batch."""
    check_dots(case, torch.float32, device, N, 16, ("auto", "two-phase"), ("train", "param train val"))


@pytest.mark.parametrize("name", ["mlp", "gpt2 tied", "gpt2 untied"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 3, 16])
def test_dots_full_cross(name, dtype, m, device):
    """All combinations of dtype, val batch, schedule and `out`."""
    check_dots(BY_NAME[name], dtype, device, N, m, SCHEDULES)


@each_case
def test_one_sample(case, device):
    """A train batch and a val batch of one sample."""
    check_dots(case, torch.float64, device, 1, 1, SCHEDULES, ("train", "param train"))


def test_one_position(device):
    """One token a sample: labels beside the tokens, so that there is a loss."""
    _, params, _ = BY_NAME["tied by hand"].make(torch.float64, device)

    def make(dtype: torch.dtype, device: torch.device) -> Built:
        def model_fn(p, batch):
            h = torch.nn.functional.embedding(batch["ids"], p["emb"]) + p["pos"][:1]
            logits = (h + (h @ p["mix"]).tanh()) @ p["emb"].t()
            return torch.nn.functional.cross_entropy(logits.mT, batch["labels"], reduction="none").sum(1)

        def batch(n, seed):
            generator = torch.Generator().manual_seed(seed)
            ids = torch.randint(11, (n, 2), generator=generator).to(device)
            return {"ids": ids[:, :1], "labels": ids[:, 1:]}

        return Built(model_fn, params, batch)

    for n, m in ((4, 3), (1, 1)):
        check_dots(Case("one position", make), torch.float64, device, n, m, SCHEDULES)


@each_case
def test_per_sample_grad(case, device):
    """The package's own oracle equals the loop."""
    model_fn, params, batch = case.make(torch.float64, device)
    assert_grads(
        gf.per_sample_grad(model_fn, params, batch(N, 1)),
        per_sample_grads(model_fn, params, batch(N, 1)),
        1e-10,
        "per_sample_grad",
    )


@each_case
def test_grads_equal_torch_func_grad(case, device):
    """`grads` is what `torch.func.grad` of the mean train loss gives."""
    for dtype in DTYPES:
        model_fn, params, batch = case.make(dtype, device)
        train, val = batch(N, 1), batch(3, 2)
        plain = torch.func.grad(lambda p, f=model_fn, t=train: f(p, t).mean())(params)
        for schedule in ("joint", "two-phase"):
            result = gf.value_and_grad_dot(model_fn, params, train, val, schedule=schedule)
            assert_grads(result.grads, plain, TOLERANCE[dtype], f"{case.name} {dtype} {schedule}")


@each_case
def test_grad_along(case, device):
    """Along a random direction, in both dtypes, summed and by parameter."""
    for dtype in DTYPES:
        model_fn, params, batch = case.make(dtype, device)
        _, g = reference(case, params, batch(N, 1), device)
        generator = torch.Generator().manual_seed(3)
        direction = {k: torch.randn(p.shape, generator=generator).to(device, dtype) for k, p in params.items()}
        along = gf.ghost_grad_along(model_fn, params, batch(N, 1), direction)
        assert_dots(along, dots(g, as_double(direction)), TOLERANCE[dtype], f"{case.name} {dtype}")
        by_name = gf.ghost_grad_along(model_fn, params, batch(N, 1), direction, out="param sample")
        want = {k: dots({k: g[k]}, {k: direction[k].double()}) for k in g}
        assert_dots_by_name(by_name, want, TOLERANCE[dtype], f"{case.name} {dtype}")


@each_case
def test_factors(case, device):
    """The sum of a parameter's factors is its per-sample gradient, and each is one of the three kinds."""
    model_fn, params, batch = case.make(torch.float64, device)
    train = batch(N, 1)
    losses, factors = gf.ghost_factors(model_fn, params, train)
    want_losses, want = losses_and_grads(model_fn, params, train)
    torch.testing.assert_close(losses, want_losses, rtol=1e-10, atol=1e-10)
    assert list(factors) == list(params)
    assert all(isinstance(f, gf.Outer | gf.Gather | gf.Dense) for uses in factors.values() for f in uses)
    summed = {
        name: sum((f.dense(tuple(p.shape)) for f in factors[name]), torch.zeros(N, *p.shape).to(p))
        for name, p in params.items()
    }
    assert_grads(summed, want, 1e-10, "factors")


def test_kinds_of_factors(device):
    """A linear layer and HF's Conv1D give outer products, a lookup gives a gather, a tied weight both."""
    model_fn, params, batch = BY_NAME["gpt2 tied"].make(torch.float64, device)
    factors = gf.ghost_factors(model_fn, params, batch(N, 1))[1]
    kinds = {name: sorted(type(f).__name__ for f in uses) for name, uses in factors.items()}
    assert kinds["transformer.wte.weight"] == ["Gather", "Outer"]
    assert kinds["transformer.h.0.attn.c_attn.weight"] == ["Outer"]
    assert kinds["transformer.h.1.mlp.c_proj.weight"] == ["Outer"]


@each_case
@pytest.mark.parametrize("schedule", ["joint", "two-phase"])
def test_nothing_is_touched(case, schedule, device):
    """Parameters, batches, the direction of time: all as before the call."""
    model_fn, params, batch = case.make(torch.float64, device)
    inputs = params, batch(N, 1), batch(3, 2)
    before = copy.deepcopy(inputs)
    leaves = pytree.tree_leaves(inputs)
    versions = [t._version for t in leaves]
    random_state = torch.get_rng_state()
    gf.value_and_grad_dot(model_fn, *inputs, schedule=schedule)
    for t, old, version in zip(leaves, pytree.tree_leaves(before), versions, strict=True):
        assert torch.equal(t, old)
        assert t._version == version
        assert t.grad is None
        assert not t.requires_grad
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled()
    assert not torch.overrides._get_current_function_mode_stack()


def test_module_is_untouched(device):
    """Trainable parameters with a gradient of their own keep it."""
    torch.manual_seed(0)
    module = torch.nn.Linear(5, 3, device=device, dtype=torch.float64)
    module.weight.grad = torch.ones_like(module.weight)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    model_fn, params = gf.functionalize(module, gf.classification_loss)
    batch = BY_NAME["mlp"].make(torch.float64, device).batch
    gf.value_and_grad_dot(model_fn, params, batch(N, 1), batch(2, 2))
    assert torch.equal(module.weight.grad, torch.ones_like(module.weight))
    assert module.bias.grad is None
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name])
        assert p.requires_grad
        assert type(p) is torch.nn.Parameter


def test_parameters_that_require_grad(device):
    """`params` may be `dict(module.named_parameters())`: nothing lands in their `.grad`, and results have no graph."""
    model_fn, params, batch = BY_NAME["mlp"].make(torch.float64, device)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    result = gf.value_and_grad_dot(model_fn, leaves, batch(N, 1), batch(3, 2))
    want = gf.value_and_grad_dot(model_fn, params, batch(N, 1), batch(3, 2))
    assert torch.equal(result.dots, want.dots)
    assert all(p.grad is None for p in leaves.values())
    for t in pytree.tree_leaves(tuple(result)):
        assert not t.requires_grad


def test_under_no_grad(device):
    """A caller's `torch.no_grad` neither breaks the call nor is undone by it."""
    model_fn, params, batch = BY_NAME["mlp"].make(torch.float64, device)
    want = gf.ghost_grad_dot(model_fn, params, batch(N, 1), batch(3, 2))
    with torch.no_grad():
        assert torch.equal(gf.ghost_grad_dot(model_fn, params, batch(N, 1), batch(3, 2)), want)
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["mlp", "gpt2 tied"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_reduction_sum(name, schedule, device):
    """The direction is the sum of the val gradients instead of their mean."""
    model_fn, params, batch = BY_NAME[name].make(torch.float64, device)
    g, v = (per_sample_grads(model_fn, params, batch(n, seed)) for n, seed in ((N, 1), (3, 2)))
    direction = {k: t.sum(0) for k, t in v.items()}
    actual = gf.ghost_grad_dot(model_fn, params, batch(N, 1), batch(3, 2), reduction="sum", schedule=schedule)
    assert_dots(actual, dots(g, direction), 1e-10, "sum")


@pytest.mark.parametrize("name", ["mlp", "gpt2 tied"])
def test_precondition(name, device):
    """The direction passes through a function of a gradient dict before it meets the train samples."""
    model_fn, params, batch = BY_NAME[name].make(torch.float64, device)
    g, v = (per_sample_grads(model_fn, params, batch(n, seed)) for n, seed in ((N, 1), (3, 2)))

    def precondition(grads):
        return {k: t.sign() * t.abs().sqrt() for k, t in grads.items()}

    want = dots(g, precondition(mean(v)))
    for schedule in ("auto", "two-phase"):
        result = gf.value_and_grad_dot(
            model_fn, params, batch(N, 1), batch(3, 2), precondition=precondition, schedule=schedule
        )
        assert_dots(result.dots, want, 1e-9, schedule)  # the root amplifies rounding where an entry is near zero
        assert_grads(result.grads, mean(g), 1e-10, schedule)


@pytest.mark.parametrize("schedule", ["auto", "two-phase"])
def test_val_batch_of_another_length(schedule, device):
    """Train sequences of 6 tokens, val sequences of 2."""
    model_fn, params, batch = BY_NAME["gpt2 tied"].make(torch.float64, device)
    train, val = batch(N, 1), {"input_ids": batch(3, 2)["input_ids"][:, :2]}
    g, v = per_sample_grads(model_fn, params, train), per_sample_grads(model_fn, params, val)
    for out in OUTS:
        actual = gf.value_and_grad_dot(model_fn, params, train, val, out=out, schedule=schedule).dots
        check = assert_dots_by_name if out.startswith("param") else assert_dots
        check(actual, expected(out, g, v), 1e-10, out)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_layers(schedule, device):
    """`layers` restricts the dots to parameters matched at dots of their names; the gradient stays complete."""
    model_fn, params, batch = BY_NAME["gpt2 tied"].make(torch.float64, device)
    params_more = {name.replace("h.1.", "h.11."): p for name, p in params.items()}

    def more_fn(p, b):
        return model_fn({name.replace("h.11.", "h.1."): t for name, t in p.items()}, b)

    train, val = batch(N, 1), batch(3, 2)
    g, v = (per_sample_grads(more_fn, params_more, b) for b in (train, val))
    assert not [name for name in params_more if ".h.1." in name]
    for layers, chosen in {
        "h.11": [name for name in params_more if ".h.11." in name],
        "h.0.mlp,wpe": [name for name in params_more if ".h.0.mlp." in name or ".wpe." in name],
        "transformer.wte.weight": ["transformer.wte.weight"],
        "": list(params_more),
    }.items():
        assert chosen
        pick = lambda d, chosen=chosen: {name: d[name] for name in params_more if name in chosen}  # noqa: E731
        for out in OUTS:
            result = gf.value_and_grad_dot(more_fn, params_more, train, val, out=out, schedule=schedule, layers=layers)
            check = assert_dots_by_name if out.startswith("param") else assert_dots
            check(result.dots, expected(out, pick(g), pick(v)), 1e-10, f"layers={layers!r} {out}")
            assert_grads(result.grads, mean(g), 1e-10, f"layers={layers!r}")
    along = gf.ghost_grad_along(more_fn, params_more, train, mean(v), layers="h.11", out="param sample")
    assert list(along) == [name for name in params_more if ".h.11." in name]


@pytest.mark.parametrize("schedule", ["joint", "two-phase"])
def test_has_aux(schedule, device):
    """The auxiliary output is the train batch's own, rows of the val batch excluded."""
    model_fn, params, batch = BY_NAME["mlp"].make(torch.float64, device)

    def with_aux(p, b):
        return model_fn(p, b), {"first": b[0] @ p["0.weight"].T}

    train, val = batch(N, 1), batch(3, 2)
    want = gf.value_and_grad_dot(model_fn, params, train, val, schedule=schedule)
    result, aux = gf.value_and_grad_dot(with_aux, params, train, val, schedule=schedule, has_aux=True)
    torch.testing.assert_close(aux["first"], train[0] @ params["0.weight"].T, rtol=1e-12, atol=1e-12)
    assert not aux["first"].requires_grad
    torch.testing.assert_close(result.dots, want.dots, rtol=1e-12, atol=1e-12)
    dots_only, aux = gf.ghost_grad_dot(with_aux, params, train, val, schedule=schedule, has_aux=True)
    torch.testing.assert_close(dots_only, want.dots, rtol=1e-12, atol=1e-12)
    assert aux["first"].shape == (N, 8)


def test_low_precision_dots_accumulate_in_float32(device):
    """A bfloat16 model gives float32 dots, exact for the bfloat16 factors to a bfloat16 backward's rounding."""
    model_fn, params, batch = BY_NAME["mlp"].make(torch.bfloat16, device)
    train, val = batch(N, 1), batch(3, 2)
    actual = gf.ghost_grad_dot(model_fn, params, train, val)
    assert actual.dtype == torch.float32
    _, g = reference(BY_NAME["mlp"], params, train, device)
    _, v = reference(BY_NAME["mlp"], params, val, device)
    assert_dots(actual, dots(g, mean(v)), 3e-2, "bfloat16")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result_dtype(dtype, device):
    """Float32 dots of float32 parameters, float64 of float64, and what `dtype` asks for."""
    model_fn, params, batch = BY_NAME["mlp"].make(dtype, device)
    assert gf.ghost_grad_dot(model_fn, params, batch(N, 1), batch(1, 2)).dtype == dtype
    asked = gf.ghost_grad_dot(model_fn, params, batch(N, 1), batch(1, 2), dtype=torch.float64)
    assert asked.dtype == torch.float64


@each_case
def test_verify_and_explain(case, device):
    """`verify` passes on every case, and `explain` names every parameter."""
    model_fn, params, batch = case.make(torch.float64, device)
    assert str(gf.verify(model_fn, params, batch(N, 1)))
    plan = str(gf.explain(model_fn, params, batch(N, 1)))
    for name in params:
        assert name in plan


def test_one_validation_gradient_for_many_calls():
    """Micro-batches share the direction; with an axis "val" or another reduction it is refused."""
    model_fn, params, batch = BY_NAME["gpt2 tied"].make(torch.float64, torch.device("cpu"))
    train, val = batch(4, 1), batch(3, 2)
    whole = gf.value_and_grad_dot(model_fn, params, train, val)
    made = gf.val_gradient(model_fn, params, val)
    torch.testing.assert_close(made.losses, whole.val_losses)
    parts = [pytree.tree_map(lambda t, k=k: t[k : k + 2], train) for k in (0, 2)]
    found = [gf.value_and_grad_dot(model_fn, params, part, made) for part in parts]
    torch.testing.assert_close(torch.cat([f.dots for f in found]), whole.dots, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[0].val_losses, whole.val_losses)
    for name, gradient in whole.grads.items():
        torch.testing.assert_close((found[0].grads[name] + found[1].grads[name]) / 2, gradient, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="axis 'val' needs the val batch"):
        gf.ghost_grad_dot(model_fn, params, train, made, out="train val")
    with pytest.raises(ValueError, match="has its reduction already"):
        gf.ghost_grad_dot(model_fn, params, train, made, reduction="sum")
    with pytest.raises(ValueError, match="the validation gradient is there"):
        gf.ghost_grad_dot(model_fn, params, train, made, schedule="joint")
