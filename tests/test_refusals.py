"""What a refusal says: the parameter where there is one, the operation, the shapes, and what to do about it."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Case, Draw
from hard import HARD
from oracle import assert_dots, assert_grads, dots, mean, per_sample_grads
from torch import Tensor
from torch.utils import _pytree as pytree
from zoo import in_double
from zoo_others import REFUSED, Refused

import ghostfunc as gf

CPU = torch.device("cpu")
BY_NAME = {case.name: case for case in HARD}
SHAPE = r"\((\d+, )*\d*,?\)"
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:.*torch.jit.script.*")

Params = dict[str, Tensor]
Body = Callable[[Params, Tensor], Tensor]


def calls(model_fn: Any, params: Params, train: Any, val: Any) -> dict[str, Callable[[], Any]]:
    """Every transform that has to refuse in the same way."""
    return {
        "joint": lambda: gf.value_and_grad_dot(model_fn, params, train, val, schedule="joint"),
        "two-phase": lambda: gf.value_and_grad_dot(model_fn, params, train, val, schedule="two-phase"),
        "pairs": lambda: gf.ghost_grad_dot(model_fn, params, train, val, out="train val"),
        "along": lambda: gf.ghost_grad_along(model_fn, params, train, params),
        "factors": lambda: gf.ghost_factors(model_fn, params, train),
        "explain": lambda: gf.explain(model_fn, params, train, val),
    }


def of_rows(body: Body, **shapes: tuple[int, ...]) -> tuple[Any, Params, Any, Any]:
    """`(model_fn, params, train, val)` of a body that reads `x [B, 3, 4]`."""
    draw = Draw(torch.float64, CPU)

    def model_fn(p: Params, batch: dict[str, Tensor]) -> Tensor:
        return body(p, batch["x"]).tanh().flatten(1).square().mean(1)

    return model_fn, draw.params(**shapes), {"x": draw.normal(4, 3, 4)}, {"x": draw.normal(3, 3, 4)}


def needs_a_backward(explain: Callable[[], Any]) -> bool:
    """Whether the forward alone does not tell, and the plan says so."""
    try:
        return bool(explain().probe)
    except gf.InteractingSamples:
        return False


# --- samples that interact --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused.case.name)
def test_interacting_samples(refused: Refused) -> None:
    """Each transform refuses, and says which operation brings the samples together."""
    model_fn, params, batch = in_double(refused.case, CPU)
    together = calls(model_fn, params, batch(4, 1), batch(3, 2))
    if refused.error is ValueError:
        del together["explain"], together["factors"]
    for what, call in together.items():
        if what == "explain" and needs_a_backward(call):
            continue
        with pytest.raises(refused.error) as refusal:
            call()
        text = str(refusal.value)
        for words in refused.words:
            assert re.search(words, text), f"{what}: {words!r} is not in {text!r}"
        if refused.error is gf.InteractingSamples:
            assert re.search(r"`\w+", text), f"{what}: no operation in {text!r}"
            assert re.search(SHAPE, text), f"{what}: no shape in {text!r}"


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused.case.name)
def test_the_refused_do_interact(refused: Refused) -> None:
    """A case is refused for a reason: the last sample's loss changes with its neighbours, or there is one for all."""
    model_fn, params, batch = in_double(refused.case, CPU)
    samples, others = batch(4, 1), batch(4, 5)
    mixed = pytree.tree_map(lambda a, b: torch.cat([b[:-1], a[-1:]]), samples, others)
    losses, beside_others = model_fn(params, samples), model_fn(params, mixed)
    if losses.dim() == 0:
        assert refused.error is ValueError
    else:
        assert (losses[-1] - beside_others[-1]).abs() > 1e-6


# --- uses without a rule ----------------------------------------------------------------------------------------------


def refusal_of(case: Case) -> tuple[gf.UnsupportedUse | None, Params]:
    model_fn, params, batch = case.make(torch.float64, CPU)
    try:
        gf.value_and_grad_dot(model_fn, params, batch(4, 1), batch(3, 2))
    except gf.UnsupportedUse as refusal:
        return refusal, params
    return None, params


UNSEEN = ("autograd function", "autograd function on a shared weight", "vmap inside")


@pytest.mark.parametrize("name", UNSEEN)
def test_what_no_rule_can_see_is_refused(name: str) -> None:
    refusal, _ = refusal_of(BY_NAME[name])
    assert refusal is not None


@pytest.mark.parametrize("case", [case for case in HARD if case.name != "checkpointed"], ids=lambda case: case.name)
def test_a_refusal_says_what_to_do(case: Case) -> None:
    """Whichever of the hard cases is refused: its text has the parameter, its shape, the operation and the remedies."""
    refusal, params = refusal_of(case)
    if refusal is None:
        return
    text = str(refusal)
    for name in refusal.parameters:
        assert name in params
        assert re.search(rf"\b{name}\b", text)
    assert re.search(SHAPE, text)
    assert re.search(r"`\w+`|torch\.autograd\.Function|torch\.func", text)
    assert "requires_grad_(False)" in text
    assert "on_unsupported='dense'" in text


@pytest.mark.parametrize(
    "body",
    [
        lambda p, x: torch.func.vmap(lambda row: (row @ p["w"]).tanh())(x),
        lambda p, x: torch.func.grad(lambda y: (y @ p["w"]).tanh().sum())(x),
    ],
    ids=["vmap", "grad"],
)
def test_inside_a_transform_of_the_models_own(body: Body) -> None:
    """Refused with the operation and the reason; exact when asked for."""
    model_fn, params, train, val = of_rows(body, w=(4, 5))
    for call in (calls(model_fn, params, train, val)[what] for what in ("joint", "two-phase", "along")):
        with pytest.raises(gf.UnsupportedUse, match=r"w \(4, 5\): used by `matmul` inside a functorch transform"):
            call()
    g, v = (per_sample_grads(model_fn, params, b) for b in (train, val))
    result = gf.value_and_grad_dot(model_fn, params, train, val, on_unsupported="dense")
    assert_dots(result.dots, dots(g, mean(v)), 1e-10, "dense")
    assert_grads(result.grads, mean(g), 1e-10, "dense")


# --- tables -----------------------------------------------------------------------------------------------------------


def _ids(x: Tensor) -> Tensor:
    return (x[..., 0].abs() * 3).long().clamp(max=6)


TABLES: dict[str, Callable[..., Tensor]] = {
    "embedding": F.embedding,
    "embedding_bag": lambda ids, table, **options: F.embedding_bag(ids, table, mode="sum", **options),
}


@pytest.mark.parametrize("table", TABLES)
def test_a_table_that_renormalises_itself(table: str) -> None:
    """`max_norm` writes to the weight in the forward: refused by name, and the weight is left as it was."""
    model_fn, params, train, val = of_rows(lambda p, x: TABLES[table](_ids(x), p["words"], max_norm=0.5), words=(7, 4))
    before = params["words"].clone()
    for what, call in calls(model_fn, params, train, val).items():
        with pytest.raises(gf.UnsupportedUse, match=r"words(.|\n)*max_norm=0\.5") as refusal:
            call()
        assert refusal.value.parameters == ("words",), what
        assert re.search(r"freeze|without max_norm", str(refusal.value)), what
        assert torch.equal(params["words"], before), what


@pytest.mark.parametrize("table", TABLES)
def test_a_table_that_counts_over_the_batch(table: str) -> None:
    """`scale_grad_by_freq` divides by how often the whole batch has a word."""
    model_fn, params, train, val = of_rows(
        lambda p, x: TABLES[table](_ids(x), p["words"], scale_grad_by_freq=True), words=(7, 4)
    )
    for call in calls(model_fn, params, train, val).values():
        with pytest.raises(gf.InteractingSamples, match=r"words(.|\n)*scale_grad_by_freq"):
            call()


@pytest.mark.parametrize("table", TABLES)
def test_sparse_gradients_come_out_dense(table: str) -> None:
    """`sparse=True` is a layout of the gradient, not another gradient."""
    model_fn, params, train, val = of_rows(lambda p, x: TABLES[table](_ids(x), p["words"], sparse=True), words=(7, 4))
    plain, *_ = of_rows(lambda p, x: TABLES[table](_ids(x), p["words"]), words=(7, 4))
    g, v = (per_sample_grads(plain, params, b) for b in (train, val))
    result = gf.value_and_grad_dot(model_fn, params, train, val)
    assert_dots(result.dots, dots(g, mean(v)), 1e-10, table)
    assert_grads(result.grads, mean(g), 1e-10, table)


# --- writes -----------------------------------------------------------------------------------------------------------


def _divided(p: Params, x: Tensor) -> Tensor:
    h = F.linear(p["rows"], p["w"])  # DeBERTa's positions
    h /= 2.0
    return x @ h.t()


def _pruned(p: Params, x: Tensor) -> Tensor:
    w = p["w"].clone()
    w[0] = 0.0
    return x @ w + p["rows"].mean(0)


def _assembled(p: Params, x: Tensor) -> Tensor:
    w = x.new_zeros(4, 4)
    w[0] = p["rows"][0]
    w[1:] = p["w"][:3]
    return x @ w


@pytest.mark.parametrize("body", [_divided, _pruned, _assembled])
@pytest.mark.parametrize("schedule", ["joint", "two-phase"])
def test_writes_to_derived_tensors(body: Body, schedule: str) -> None:
    """Exact, or refused by name; and exact when asked for."""
    model_fn, params, train, val = of_rows(body, rows=(5, 4), w=(4, 4))
    g, v = (per_sample_grads(model_fn, params, b) for b in (train, val))
    for on_unsupported in ("raise", "dense"):
        try:
            result = gf.value_and_grad_dot(
                model_fn, params, train, val, schedule=schedule, on_unsupported=on_unsupported
            )
        except gf.UnsupportedUse as refusal:
            assert on_unsupported == "raise"
            assert set(refusal.parameters) <= set(params)
            assert refusal.parameters
        else:
            assert_dots(result.dots, dots(g, mean(v)), 1e-10, on_unsupported)
            assert_grads(result.grads, mean(g), 1e-10, on_unsupported)


# --- losses without the batch's tensors -------------------------------------------------------------------------------


WITHOUT_DATA: dict[str, Callable[[Params, Tensor], Tensor]] = {
    "a penalty alone": lambda p, x: p["w"].pow(2).sum().expand(len(x)),
    "features of lists": lambda p, x: (torch.tensor(x.tolist(), dtype=x.dtype) @ p["w"]).tanh().square().sum((1, 2)),
    "features of numpy": lambda p, x: (torch.from_numpy(x.numpy()) @ p["w"]).tanh().square().sum((1, 2)),
}


@pytest.mark.parametrize("on_unsupported", ["raise", "dense"])
@pytest.mark.parametrize("schedule", ["joint", "two-phase"])
@pytest.mark.parametrize("body", WITHOUT_DATA.values(), ids=WITHOUT_DATA.keys())
def test_losses_that_no_tensor_of_the_batch_enters(body: Body, schedule: str, on_unsupported: str) -> None:
    """Nothing tells the samples of such losses apart, and nothing may be lost of their gradients."""
    _, params, train, val = of_rows(body, w=(4, 4))

    def model_fn(p: Params, batch: dict[str, Tensor]) -> Tensor:
        return body(p, batch["x"])

    g, v = (per_sample_grads(model_fn, params, b) for b in (train, val))
    try:
        result = gf.value_and_grad_dot(model_fn, params, train, val, schedule=schedule, on_unsupported=on_unsupported)
    except gf.UnsupportedUse as refusal:
        assert on_unsupported == "raise"
        assert refusal.parameters == ("w",)
    else:
        assert_dots(result.dots, dots(g, mean(v)), 1e-10, schedule)
        assert_grads(result.grads, mean(g), 1e-10, schedule)


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex128, torch.bool])
def test_losses_of_another_dtype(dtype: torch.dtype) -> None:
    _, params, train, val = of_rows(lambda p, x: x @ p["w"], w=(4, 5))

    def model_fn(p: Params, batch: dict[str, Tensor]) -> Tensor:
        return (batch["x"] @ p["w"]).sum((1, 2)).to(dtype)

    for call in calls(model_fn, params, train, val).values():
        with pytest.raises(TypeError, match=rf"{dtype}(.|\n)*floating"):
            call()


def test_a_number_among_the_tensors_of_a_batch() -> None:
    """A tensor without a first dimension cannot belong to samples: the batch's shapes are shown."""
    model_fn, params, train, val = of_rows(lambda p, x: x @ p["w"], w=(4, 5))
    with pytest.raises(ValueError, match=r"train(.|\n)*\['scale'\]: \(\)"):
        gf.ghost_grad_dot(model_fn, params, {**train, "scale": torch.tensor(2.0)}, val)


def _scaled_without_grad(p: Params, x: Tensor) -> Tensor:
    with torch.no_grad():
        p["w"].mul_(2)
    return (x @ p["w"]).sum(1)


def _row_of_data(p: Params, x: Tensor) -> Tensor:
    p["w"][0] = x[0]
    return (x @ p["w"]).sum(1)


def _through_a_view(p: Params, x: Tensor) -> Tensor:
    p["w"].view(16).mul_(2)
    return (x @ p["w"]).sum(1)


@pytest.mark.parametrize("model_fn", [_scaled_without_grad, _row_of_data, _through_a_view])
@pytest.mark.parametrize("on_unsupported", ["raise", "dense"])
def test_a_write_to_a_parameter_is_refused_and_leaves_it_alone(model_fn, on_unsupported):
    params = {"w": torch.randn(4, 4).double()}
    before = params["w"].clone()
    with pytest.raises(
        gf.UnsupportedUse, match=r"w: `\w+` writes to a parameter, or a view of one, of shape \(.*clone"
    ):
        gf.ghost_grad_along(model_fn, params, torch.randn(5, 4).double(), params, on_unsupported=on_unsupported)
    assert torch.equal(params["w"], before)
