"""What `explain` says of a call, and what is counted: FLOPs from both sides, each order, nothing hidden, a budget."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from itertools import pairwise, product
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases import Draw
from counting import Allocated, counted, flops, plain_step
from oracle import TOLERANCE, assert_dots, assert_grads, dots, losses_and_grads, mean
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

import ghostfunc as gf
from ghostfunc._planner import MEMORY_BOUND, ORDERS, forced

CPU = torch.device("cpu")
Params = dict[str, Tensor]


class Work(NamedTuple):
    """A model and its two batches."""

    model_fn: Callable[[Params, Any], Tensor]
    params: Params
    train: Any
    val: Any

    @property
    def both(self) -> Any:
        return pytree.tree_map(lambda a, b: torch.cat([a, b]), self.train, self.val)


def functionalized(module: nn.Module, loss: Any, dtype: torch.dtype) -> Any:
    return gf.functionalize(module.to(dtype), loss)


def mlp(n: int, m: int, width: int, hidden: int, dtype: torch.dtype) -> Work:
    torch.manual_seed(0)
    sizes = (width, hidden, hidden, 10)
    layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise(sizes)]
    model_fn, params = functionalized(nn.Sequential(*layers), gf.classification_loss, dtype)
    draw = Draw(dtype, CPU)
    train, val = ((draw.normal(k, width), draw.ids(10, k)) for k in (n, m))
    return Work(model_fn, params, train, val)


def two_layers(n: int, m: int, positions: int, width: int, hidden: int, dtype: torch.dtype) -> Work:
    """Linear maps at each position, the first with a bias, the second without."""

    def model_fn(p: Params, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, p["up"], p["shift"]).relu(), p["down"]).pow(2).mean((1, 2))

    draw = Draw(dtype, CPU)
    params = draw.params(up=(hidden, width), shift=(hidden,), down=(width, hidden))
    return Work(model_fn, params, draw.normal(n, positions, width), draw.normal(m, positions, width))


def gpt2(n: int, m: int, positions: int, width: int, vocabulary: int, tied: bool, dtype: torch.dtype) -> Work:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=1, n_head=2, n_embd=width, vocab_size=vocabulary, n_positions=positions, tie_word_embeddings=tied,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model_fn, params = functionalized(GPT2LMHeadModel(config), gf.causal_lm_loss, dtype)
    train, val = ({"input_ids": Draw(dtype, CPU, k).ids(vocabulary, k, positions)} for k in (n, m))
    return Work(model_fn, params, train, val)


def conv_net(n: int, m: int, side: int, channels: int, dtype: torch.dtype) -> Work:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), nn.GroupNorm(2, channels), nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, padding=1, stride=2), nn.ReLU(),
        nn.Conv2d(2 * channels, 2 * channels, 3, groups=2 * channels), nn.Conv2d(2 * channels, channels, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10),
    )  # fmt: skip
    model_fn, params = functionalized(module, gf.classification_loss, dtype)
    draw = Draw(dtype, CPU)
    train, val = ((draw.normal(k, 3, side, side), draw.ids(10, k)) for k in (n, m))
    return Work(model_fn, params, train, val)


MODELS: list[tuple[Callable[..., Work], tuple[Any, ...]]] = [
    (mlp, (64, 8, 48, 96)),
    (mlp, (8, 64, 96, 48)),
    (two_layers, (4, 1, 128, 64, 96)),
    (two_layers, (4, 4, 64, 32, 128)),
    (two_layers, (2, 8, 64, 64, 32)),
    (two_layers, (16, 2, 8, 96, 96)),
    (gpt2, (4, 1, 64, 48, 500, False)),
    (gpt2, (4, 1, 64, 48, 500, True)),
    (gpt2, (2, 4, 32, 32, 300, True)),
    (gpt2, (16, 1, 16, 32, 300, True)),
    (conv_net, (8, 2, 12, 16)),
    (conv_net, (2, 4, 12, 8)),
]


def identifier(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, tuple) else getattr(value, "__name__", str(value))


@pytest.fixture(autouse=True)
def _attention_as_plain_products():
    """As the plan counts it: a fused kernel makes the scores once more."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def within(counted: int, planned: int | None, share: float = 0.01) -> bool:
    assert planned is not None
    return (1 - share) * planned <= counted <= (1 + share) * planned


@pytest.mark.parametrize(("make", "sizes"), MODELS, ids=identifier)
def test_the_plan_is_what_is_counted(make, sizes):
    """The plain step, the concatenated batch and the call itself, each within 1% from above and from below.

    Of the schedules the cheaper one is taken, but for the few FLOPs that a second run is worth.
    """
    work = make(*sizes, torch.float32)
    plain, floor = (flops(lambda b=b: plain_step(work.model_fn, work.params, b)) for b in (work.train, work.both))
    found = {}
    for schedule in ("joint", "two-phase"):
        plan = gf.explain(*work, schedule=schedule)
        found[schedule] = flops(lambda s=schedule: gf.value_and_grad_dot(*work, schedule=s))
        assert plan.schedule == schedule
        assert within(plain, plan.plain_flops)
        assert within(floor, plan.floor_flops)
        assert within(found[schedule], plan.total_flops)
    assert found[gf.explain(*work).schedule] <= 1.05 * min(found.values())


@pytest.mark.parametrize(("make", "sizes"), MODELS, ids=identifier)
def test_the_plan_is_cheaper_than_any_one_order(make, sizes):
    """Each order in turn for every weight that it can serve: its FLOPs as planned, its cost no less than the plan's."""
    work = make(*sizes, torch.float32)
    costs = []
    for order in ("", *ORDERS):
        with forced(order) if order else nullcontext():
            plan = gf.explain(*work)
            found = counted(lambda: gf.value_and_grad_dot(*work))
        taken = {use.contraction for uses in plan.uses.values() for use in uses if use.factor == "Outer"}
        assert order in ("", "Gram") or any(order in contraction for contraction in taken)
        assert within(found.total_flops, plan.total_flops)
        costs.append(found.total_flops + MEMORY_BOUND * sum(made.written for made in found.products))
    assert costs[0] <= 1.01 * min(costs)


@pytest.mark.parametrize(("make", "sizes"), MODELS, ids=identifier)
def test_nothing_is_hidden_in_elementwise_products(make, sizes):
    """What is no product takes little more than in a plain step of the concatenated batch, and a pass over the tiles.

    The products of a plain convolution read windows that only its kernel sees; here they are entries.
    """
    work = make(*sizes, torch.float32)
    plain = counted(lambda: plain_step(work.model_fn, work.params, work.both))
    n, windows = sizes[0], 9 if make is conv_net else 1
    tiles = [n * p.numel() for p in work.params.values() if p.dim() > 1]
    for schedule, out in product(("joint", "two-phase"), ("train", "train val")):
        found = counted(lambda s=schedule, o=out: gf.value_and_grad_dot(*work, schedule=s, out=o))
        assert found.entries <= 1.4 * plain.entries + 2 * sum(tiles) + (windows - 1) * plain.entries / 2
        assert found.largest().count <= max(windows * plain.largest().count, *tiles)
        grown = found.by_op(grew=True)
        assert set(grown) <= {"eq"}, f"outer products: {grown}"  # look-ups meet look-ups where their ids are the same
        assert grown["eq"] <= plain.largest().count


FORCED = [(two_layers, (3, 2, 6, 5, 7)), (mlp, (4, 3, 5, 6)), (gpt2, (3, 2, 5, 4, 11, True)), (conv_net, (3, 2, 5, 4))]


@cache
def reference(make: Callable[..., Work], sizes: tuple[Any, ...]) -> tuple[Params, Params]:
    """Per-sample gradients of the train and val samples in float64."""
    work = make(*sizes, torch.float64)
    train, val = (losses_and_grads(work.model_fn, work.params, batch)[1] for batch in (work.train, work.val))
    return train, val


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("schedule", ["joint", "two-phase"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("make", "sizes"), FORCED, ids=identifier)
def test_every_order_is_exact(make, sizes, order, schedule, dtype):
    train, val = reference(make, sizes)
    work = make(*sizes, dtype)
    with forced(order):
        found = gf.value_and_grad_dot(*work, schedule=schedule)
    assert_dots(found.dots, dots(train, mean(val)), TOLERANCE[dtype], order)
    assert_grads(found.grads, mean(train), TOLERANCE[dtype], order)


@pytest.mark.parametrize("schedule", ["joint", "two-phase"])
@pytest.mark.parametrize(("make", "sizes"), MODELS[2:6], ids=identifier)
def test_a_budget(make, sizes, schedule):
    """The bytes of the largest weight: the same results, and no tensor above it but those of a plain step."""
    work = make(*sizes, torch.float32)
    with Allocated() as plain:
        plain_step(work.model_fn, work.params, work.both)
    budget = 4 * max(p.numel() for p in work.params.values())
    expected = gf.value_and_grad_dot(*work, schedule=schedule)
    with Allocated() as free:
        gf.value_and_grad_dot(*work, schedule=schedule)
    with Allocated() as bounded:
        found = gf.value_and_grad_dot(*work, schedule=schedule, memory=budget)
    torch.testing.assert_close(found.dots, expected.dots, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.grads, expected.grads)
    assert bounded.largest <= max(budget, plain.largest)
    assert bounded.peak <= plain.peak + 2 * budget
    assert bounded.peak <= free.peak
