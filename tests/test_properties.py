"""Identities over shapes that hypothesis chooses, in float64 against the loop."""

import torch
import torch.nn.functional as F
from cases import Draw, sequence_first, squared
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_dots, assert_dots_by_name, assert_grads, dots, expected, mean, per_sample_grads
from torch import Tensor

import ghostfunc as gf

CPU = torch.device("cpu")
OUTS = st.sampled_from(["train", "train val", "param train", "param train val"])
SCHEDULES = st.sampled_from(["joint", "two-phase", "auto"])
sizes = st.integers(1, 5)
repeatable = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def check(model_fn, params, train, val, out: str, schedule: str, layers: str = "") -> None:
    g, v = per_sample_grads(model_fn, params, train), per_sample_grads(model_fn, params, val)
    result = gf.value_and_grad_dot(model_fn, params, train, val, out=out, schedule=schedule, layers=layers)
    chosen = [name for name in params if not layers or name in layers.split(",")]
    want = expected(out, {k: g[k] for k in chosen}, {k: v[k] for k in chosen})
    (assert_dots_by_name if out.startswith("param") else assert_dots)(result.dots, want, 1e-10, out)
    assert_grads(result.grads, mean(g), 1e-10, "grads")


@repeatable
@given(
    n=sizes, m=sizes, positions=st.lists(sizes, min_size=0, max_size=2), width=sizes, hidden=sizes,
    reuse=st.integers(1, 3), out=OUTS, schedule=SCHEDULES,
)  # fmt: skip
def test_a_reused_layer(n, m, positions, width, hidden, reuse, out, schedule):
    """`[B, *positions, d]` through two layers that are used `reuse` times, by `linear` and by the transpose."""

    def model_fn(p: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        h = batch["x"]
        for _ in range(reuse):
            h = F.linear(h, p["up"], p["up_b"]).tanh() * (1 + p["scale"])
            h = h @ p["up"] + p["down_b"]
        return squared(h, batch["x"])

    params = Draw(torch.float64, CPU).params(up=(hidden, width), up_b=(hidden,), scale=(hidden,), down_b=(width,))

    def batch(k: int, seed: int) -> dict[str, Tensor]:
        return {"x": Draw(torch.float64, CPU, seed).normal(k, *positions, width)}

    check(model_fn, params, batch(n, 1), batch(m, 2), out, schedule)


@repeatable
@given(
    n=sizes, m=sizes, length=sizes, vocabulary=st.integers(1, 9), width=st.integers(3, 6), lookups=st.integers(1, 3),
    out=OUTS, schedule=SCHEDULES, layers=st.sampled_from(["", "emb", "emb,norm", "pos"]), masked=st.booleans(),
)  # fmt: skip
def test_a_tied_language_model(n, m, length, vocabulary, width, lookups, out, schedule, layers, masked):
    """A table that is looked up `lookups` times and is the head, with repeated ids and masked labels.

    Widths start at 3: a normalised vector of one or two entries has no gradient but rounding.
    """

    def model_fn(p: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        ids, _ = batch
        h = F.embedding(torch.arange(length)[None], p["pos"])
        for _ in range(lookups):
            h = h + F.embedding(ids, p["emb"]).cumsum(1).tanh()
        h = F.layer_norm(h, (width,), p["norm"], p["norm_b"])
        return gf.causal_lm_loss(F.linear(h, p["emb"]), batch)

    shapes = {"emb": (vocabulary, width), "pos": (length, width), "norm": (width,), "norm_b": (width,)}
    params = Draw(torch.float64, CPU).params(**shapes)

    def batch(k: int, seed: int) -> tuple[Tensor, Tensor]:
        draw = Draw(torch.float64, CPU, seed)
        ids = draw.ids(vocabulary, k, length)
        return ids, ids.masked_fill(draw.ids(3, k, length) == 0, -100) if masked else ids

    check(model_fn, params, batch(n, 1), batch(m, 2), out, schedule, layers)


@repeatable
@given(n=sizes, m=sizes, positions=st.integers(1, 10), out=OUTS, schedule=SCHEDULES)
def test_sequence_first(n, m, positions, out, schedule):
    """`[T, B, d]` for every relation of T to the train, the val and the concatenated batch."""
    model_fn, params, batch = sequence_first(positions)(torch.float64, CPU)
    check(model_fn, params, batch(n, 1), batch(m, 2), out, schedule)


@repeatable
@given(
    n=sizes, equation=st.sampled_from(["btd,de->bte", "btd,ed->bte", "de,btd->bte", "btd,de->be", "btd,hde->bthe",
                                       "btd,td->bt", "btd,dd->bt", "btd,tde->bte", "btd,d->bt", "btd,e->bted"]),
    t=sizes, d=sizes, e=sizes, h=sizes,
)  # fmt: skip
def test_einsum(n, equation, t, d, e, h):
    """An einsum with a weight, for equations that are a matrix product and for those that are not."""
    dims = {"t": t, "d": d, "e": e, "h": h}
    terms = equation.split("->")[0].split(",")
    place = 1 if "b" in terms[0] else 0
    shape = [dims[axis] for axis in terms[place]]

    def model_fn(p: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        operands = [batch["x"], p["w"]] if place else [p["w"], batch["x"]]
        return torch.einsum(equation, *operands).sin().flatten(1).sum(1)

    params = Draw(torch.float64, CPU).params(w=tuple(shape))
    x = {"x": Draw(torch.float64, CPU, 1).normal(n, t, d)}
    direction = Draw(torch.float64, CPU, 2).params(w=tuple(shape))
    want = dots(per_sample_grads(model_fn, params, x), direction)
    assert_dots(gf.ghost_grad_along(model_fn, params, x, direction), want, 1e-10, equation)


@repeatable
@given(
    n=sizes, m=sizes, shape=st.lists(st.integers(1, 3), min_size=1, max_size=3), data=st.data(),
    operation=st.sampled_from(["add", "mul", "sub", "div"]), out=OUTS,
)  # fmt: skip
def test_broadcasting(n, m, shape, data, operation, out):
    """Parameters of every shape that broadcasts to the data's."""
    kept = data.draw(st.integers(0, len(shape)))
    weight_shape = tuple(s if data.draw(st.booleans()) else 1 for s in shape[len(shape) - kept :])

    def model_fn(p: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        h = getattr(torch, operation)(batch["x"], 2 + p["w"].tanh() if operation == "div" else p["w"])
        return h.sin().flatten(1).sum(1)

    params = Draw(torch.float64, CPU).params(w=weight_shape)
    train, val = ({"x": Draw(torch.float64, CPU, seed).normal(k, *shape)} for k, seed in ((n, 1), (m, 2)))
    check(model_fn, params, train, val, out, "auto")
