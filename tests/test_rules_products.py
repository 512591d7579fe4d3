"""Every spelling of a product of a parameter with data is exact, in one product or as linear maps."""

import pytest
import torch
import torch.nn.functional as F
from cases import Params
from exact import Spelling, assert_exact, assert_has_rule, built
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ghostfunc as gf

SIZES = {"c": 1, "d": 2, "e": 3, "f": 2}


def einsum(equation: str, x: tuple[int, ...], w: tuple[int, ...]) -> Spelling:
    """A weight and data in an einsum whose first letter is the samples'."""
    return Spelling(equation, lambda p, x: torch.einsum(equation, x, p["w"]), x, {"w": w})


def middle(
    equation: str, x: tuple[int, ...], w: tuple[int, ...], order: tuple[int, ...], back: tuple[int, ...]
) -> Spelling:
    """The same with the samples' dimension moved: the data permuted before, the result after."""
    return Spelling(
        f"{equation} after {order}",
        lambda p, x: torch.einsum(equation, x.permute(order), p["w"]).permute(back),
        x,
        {"w": w},
    )


SPELLINGS = [
    einsum("btd,de->bte", (3, 4), (4, 5)),
    einsum("btd,ed->bte", (3, 4), (5, 4)),
    einsum("btd,hde->bhte", (3, 4), (2, 4, 5)),
    einsum("bthd,hde->bthe", (3, 2, 4), (2, 4, 5)),
    einsum("bthd,hde->bthe", (1, 2, 4), (2, 4, 5)),
    einsum("bthd,ehd->bhet", (6, 2, 3), (5, 2, 3)),
    einsum("bhd,hde->bhe", (2, 4), (2, 4, 5)),
    einsum("bghd,hgde->bge", (3, 2, 4), (2, 3, 4, 5)),
    einsum("btd,d->btd", (3, 4), (4,)),
    einsum("btd,td->bt", (3, 4), (3, 4)),
    einsum("btd,d->b", (3, 4), (4,)),
    einsum("btd,e->bte", (3, 4), (5,)),
    einsum("btd,te->bte", (3, 4), (3, 5)),
    einsum("btd,kde->bte", (3, 4), (2, 4, 5)),
    einsum("btd,->btd", (3, 4), ()),
    einsum("btd,dd->bt", (3, 4), (4, 4)),
    einsum("btt,tde->btde", (3, 3), (3, 4, 5)),
    einsum("b...d,de->b...e", (3, 2, 4), (4, 5)),
    einsum("bd,...de->b...e", (4,), (2, 4, 5)),
    einsum("...ni,...ij->...nj", (1, 3, 4), (2, 4, 5)),
    einsum("...ni,...ij->...nj", (2, 3, 4), (1, 4, 5)),
    einsum("bij,jk", (3, 4), (4, 5)),
    middle("ebd,edf->ebf", (3, 4), (3, 4, 5), (1, 0, 2), (1, 0, 2)),
    middle("etbd,edf->tbef", (3, 2, 4), (3, 4, 5), (1, 2, 0, 3), (1, 0, 2, 3)),
    middle("tbd,tdf->tbf", (9, 4), (9, 4, 5), (1, 0, 2), (1, 0, 2)),
    Spelling(
        "three operands",
        lambda p, x: torch.einsum("bk,kde,btd->bte", x.mean(1)[:, :2], p["w"], x),
        (3, 4),
        {"w": (2, 4, 5)},
    ),
    Spelling(
        "three operands, two weights",
        lambda p, x: torch.einsum("dr,btd,er->bte", p["down"], x, p["up"]),
        (3, 4),
        {"down": (4, 2), "up": (5, 2)},
    ),
    Spelling("operands in a list", lambda p, x: torch.einsum("bd,de->be", [x, p["w"]]), (4,), {"w": (4, 5)}),
    Spelling("operands by numbers", lambda p, x: torch.einsum(x, [0, 1], p["w"], [1, 2], [0, 2]), (4,), {"w": (4, 5)}),
    Spelling(
        "bmm, samples in rows",
        lambda p, x: torch.bmm(x.transpose(0, 1), p["w"]).transpose(0, 1),
        (3, 4),
        {"w": (3, 4, 5)},
    ),
    Spelling(
        "bmm of an expanded weight", lambda p, x: torch.bmm(x, p["w"].expand(len(x), -1, -1)), (3, 4), {"w": (4, 5)}
    ),
    Spelling("bmm of a repeated weight", lambda p, x: torch.bmm(x, p["w"].repeat(len(x), 1, 1)), (3, 4), {"w": (4, 5)}),
    Spelling(
        "bmm of a weight on the left", lambda p, x: torch.bmm(p["w"].expand(len(x), -1, -1), x), (3, 4), {"w": (5, 3)}
    ),
    Spelling("matmul, a weight for each head", lambda p, x: x @ p["w"], (2, 3, 4), {"w": (2, 4, 5)}),
    Spelling(
        "matmul, a weight for each position",
        lambda p, x: (x.unsqueeze(-2) @ p["w"]).squeeze(-2),
        (3, 4),
        {"w": (3, 4, 5)},
    ),
    Spelling("matmul, the weight on the left", lambda p, x: p["w"] @ x, (2, 3, 4), {"w": (2, 5, 3)}),
    Spelling("matmul, a vector on the left", lambda p, x: p["w"] @ x, (3, 4), {"w": (3,)}),
    Spelling("matmul, a weight that broadcasts", lambda p, x: x.unsqueeze(1) @ p["w"], (3, 4), {"w": (2, 4, 5)}),
    Spelling(
        "baddbmm",
        lambda p, x: torch.baddbmm(p["b"], x, p["w"].expand(len(x), -1, -1), beta=0.5, alpha=2),
        (3, 4),
        {"w": (4, 5), "b": (1, 5)},
    ),
    Spelling(
        "addbmm",
        lambda p, x: torch.addbmm(p["b"], x.transpose(0, 1), p["w"], beta=2, alpha=0.5),
        (3, 4),
        {"w": (3, 4, 5), "b": (5,)},
    ),
    Spelling(
        "baddbmm without its first matrix",
        lambda p, x: torch.baddbmm(p["b"], x, p["w"].expand(len(x), -1, -1), beta=0),
        (3, 4),
        {"w": (4, 5), "b": (1, 5)},
    ),
    Spelling(
        "addmm of a matrix",
        lambda p, x: torch.addmm(p["b"], p["w"], x.flatten(1).T).T,
        (3, 4),
        {"w": (5, 12), "b": (5, 1)},
    ),
    Spelling(
        "addmm with factors",
        lambda p, x: torch.addmm(p["b"], x, p["w"], beta=3, alpha=0.5),
        (4,),
        {"w": (4, 5), "b": (5,)},
    ),
    Spelling("addmm to data", lambda p, x: torch.addmm(x, x, p["w"]), (4,), {"w": (4, 4)}),
    Spelling("addmv", lambda p, x: torch.addmv(p["b"], x, p["w"]).unsqueeze(1), (4,), {"w": (4,), "b": (1,)}),
    Spelling("mv", lambda p, x: torch.mv(x, p["w"]).unsqueeze(1), (4,), {"w": (4,)}),
    Spelling("tensordot", lambda p, x: torch.tensordot(x, p["w"], dims=2), (3, 4), {"w": (3, 4, 5)}),
    Spelling(
        "tensordot of dimensions",
        lambda p, x: torch.tensordot(x, p["w"], dims=([1, 2], [2, 0])),  # pyright: ignore
        (3, 4),
        {"w": (4, 5, 3)},
    ),
    Spelling(
        "tensordot of the weight",
        lambda p, x: torch.tensordot(p["w"], x, ([1], [2])).transpose(0, 1),  # pyright: ignore
        (3, 4),
        {"w": (5, 4)},
    ),
    Spelling("inner", lambda p, x: torch.inner(x, p["w"]), (3, 4), {"w": (2, 5, 4)}),
    Spelling("outer", lambda p, x: torch.outer(x, p["w"]), (), {"w": (4,)}),
    Spelling("linear of a weight by data", lambda p, x: F.linear(p["w"], x).T, (4,), {"w": (5, 4)}),
    Spelling(
        "bilinear, narrow", lambda p, x: F.bilinear(x[..., :3], x, p["w"], p["b"]), (2, 7), {"w": (5, 3, 7), "b": (5,)}
    ),
    Spelling(
        "bilinear, wide", lambda p, x: F.bilinear(x, x[..., 1:], p["w"], p["b"]), (2, 4), {"w": (5, 4, 3), "b": (5,)}
    ),
    Spelling("bilinear, no bias", lambda p, x: F.bilinear(x, x, p["w"]), (4,), {"w": (5, 4, 4)}),
    Spelling(
        "bilinear of positions and samples",
        lambda p, x: F.bilinear(*2 * [x.transpose(0, 1)], p["w"]).transpose(0, 1),  # pyright: ignore
        (3, 4),
        {"w": (3, 4, 4)},
    ),
    Spelling(
        "bilinear with a parameter",
        lambda p, x: F.bilinear(p["q"].expand(len(x), -1), x, p["w"]),
        (4,),
        {"w": (2, 3, 4), "q": (3,)},
    ),
]


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.name)
def test_products(spelling, device, monkeypatch):
    """Every spelling is exact, and has a rule."""
    model_fn, params, batch = built(spelling, device)
    assert_exact(model_fn, params, batch(4, 1), batch(3, 2))
    assert_has_rule(monkeypatch, model_fn, params, batch(4, 1))


@pytest.mark.parametrize(("positions", "op"), [(1, "linear"), (9, "einsum")])
def test_blocks_take_what_is_smaller(positions, op, device, monkeypatch):
    """Per-sample gradients in one product, unless these have more entries than the factors of each block."""
    spelling = einsum("bthd,hde->bthe", (positions, 2, 4), (2, 4, 5))
    model_fn, params, batch = built(spelling, device)
    assert_has_rule(monkeypatch, model_fn, params, batch(3, 1))
    assert {use.op for use in gf.explain(model_fn, params, batch(3, 1)).uses["w"]} == {op}
    assert_exact(model_fn, params, batch(3, 1), batch(2, 2))


@pytest.mark.parametrize("equation", ["btd,ed->bte", "btd,de->bte"])
def test_a_matrix_stays_a_parameter(equation, device):
    """An einsum with a matrix is a linear map of the parameter itself, contracted inside the backward."""
    w = (5, 4) if equation.startswith("btd,ed") else (4, 5)
    model_fn, params, batch = built(einsum(equation, (3, 4), w), device)
    (use,) = gf.explain(model_fn, params, batch(3, 1), batch(2, 2)).uses["w"]
    assert (use.factor, use.derived, use.bytes) == ("Outer", False, 0)


@pytest.mark.parametrize("equation", ["bthd,hde->bthe", "btd,kde->btke"])
def test_products_of_lost_rows(equation, device):
    """A product whose samples the interpreter loses sight of is exact by a probe."""
    x, w = ((3, 2, 4), (2, 4, 5)) if "h" in equation else ((3, 4), (2, 4, 5))

    def body(p: Params, x: Tensor) -> Tensor:
        return torch.einsum(equation, x.contiguous().as_strided(x.shape, x.stride()), p["w"])

    model_fn, params, batch = built(Spelling(equation, body, x, {"w": w}), device)
    assert "as_strided" in gf.explain(model_fn, params, batch(4, 1)).probe
    assert_exact(model_fn, params, batch(4, 1), batch(3, 2))


def test_a_block_for_each_sample(device, monkeypatch):
    """A weight that is made for each sample, and mixed with a parameter: no sample sees another's block."""

    def body(p: Params, x: Tensor) -> Tensor:
        return torch.bmm(x, (p["a"] * p["b"]).expand(len(x), 4, 5).sin())

    model_fn, params, batch = built(Spelling("blocks", body, (3, 4), {"a": (4, 5), "b": (5,)}), device)
    assert_exact(model_fn, params, batch(4, 1), batch(3, 2))
    assert_has_rule(monkeypatch, model_fn, params, batch(4, 1))


@st.composite
def equations(draw: st.DrawFn) -> tuple[str, str, str]:
    """Letters of data, of a weight (also twice the same), of a result; the samples are `b`, anywhere."""
    letters = st.lists(st.sampled_from("cdef"), max_size=3, unique=True)
    data = draw(letters.map(lambda found: [*found, "b"]).flatmap(st.permutations))
    weight = draw(st.lists(st.sampled_from("cdef"), min_size=1, max_size=3))
    kept = draw(st.lists(st.sampled_from(sorted({*data, *weight} - {"b"}) or ["b"]), max_size=3, unique=True))
    return "".join(data), "".join(weight), "".join(draw(st.permutations(sorted({*kept, "b"}))))


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(equations())
def test_every_einsum(letters):
    """Any einsum of a weight and data, with the samples anywhere, is exact."""
    data, weight, output = letters
    rest = data.replace("b", "")

    def body(p: Params, x: Tensor) -> Tensor:
        moved = torch.einsum(f"b{rest}->{data}", x)
        return torch.einsum(f"{data},{weight}->{output}", moved, p["w"]).movedim(output.index("b"), 0)

    shapes = {"w": tuple(SIZES[c] for c in weight)}
    spelling = Spelling("", body, tuple(SIZES[c] for c in rest), shapes)
    model_fn, params, batch = built(spelling, torch.device("cpu"))
    assert not gf.explain(model_fn, params, batch(3, 1)).probe
    assert_exact(model_fn, params, batch(3, 1), batch(2, 2))


@pytest.mark.parametrize("name", ["btd,de->bte", "bthd,hde->bthe", "bilinear, wide", "baddbmm", "inner"])
def test_products_under_vmap(name, device):
    """Scores of an ensemble of parameters are those of each."""
    spelling = next(s for s in SPELLINGS if s.name == name)
    model_fn, params, batch = built(spelling, device)
    train, val = batch(3, 1), batch(2, 2)
    ensemble = {key: torch.stack([p, 0.9 * p + 0.1]) for key, p in params.items()}
    found = torch.func.vmap(lambda p: gf.ghost_grad_dot(model_fn, p, train, val))(ensemble)
    for k, dots in enumerate(found):
        want = gf.ghost_grad_dot(model_fn, {key: p[k] for key, p in ensemble.items()}, train, val)
        torch.testing.assert_close(dots, want, rtol=1e-10, atol=1e-10)
