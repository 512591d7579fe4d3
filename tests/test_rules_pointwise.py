"""A parameter beside data: entry by entry, in a concatenation, in distances, picked by the data. Always exact."""

import pytest
import torch
import torch.nn.functional as F
from cases import Params
from exact import Spelling, assert_exact, assert_has_rule, built
from torch import Tensor

import ghostfunc as gf

X = (3, 4)
W = {"w": (4,)}


def entries(name: str, body, **params: tuple[int, ...]) -> Spelling:
    """An operation on `[B, 3, 4]`."""
    return Spelling(name, body, X, params or W)


def signs(x: Tensor) -> Tensor:
    """Which of 16 rows each position picks, by its four signs."""
    return ((x > 0) * torch.tensor([1, 2, 4, 8], device=x.device)).sum(-1)


def in_place(p: Params, x: Tensor) -> Tensor:
    """Every in-place operation, and on a part."""
    h = x * 2
    h += p["w"]
    h *= p["v"]
    h.sub_(p["w"], alpha=2)
    h.div_(2 + p["v"] ** 2)
    h[:, 1] -= p["w"]
    h[..., 1:].mul_(p["v"][1:])
    return h


def written(p: Params, x: Tensor) -> Tensor:
    """A parameter written to parts of the data: one position, some columns, wherever a mask says, everywhere."""
    h = x * 2
    h[:, 0] = p["w"]
    h[:, 1:, :2] = p["v"]
    h[:, 2] *= p["w"]
    h[x > 1] = p["number"]
    g = x * 3
    g[(x[..., 0] > 0).nonzero(as_tuple=True)] = p["w"]
    k = x.clone()
    k.copy_(p["w"])
    k[:, 1].copy_(x[:, 0])
    return h + g * k


def more_in_place(p: Params, x: Tensor) -> Tensor:
    """In-place operations beside arithmetic."""
    h = x * 2
    h.lerp_(p["w"], 0.5).addcmul_(x, p["v"], value=2).clamp_(max=p["w"] + 1).masked_fill_(x > 1, p["number"])
    return h.pow_(2).remainder_(2 + p["w"] ** 2)


SPELLINGS = [
    entries("written", written, w=(4,), v=(1, 2, 2), number=()),
    entries("more in place", more_in_place, w=(4,), v=(3, 4), number=()),
    entries("add with alpha", lambda p, x: torch.add(x, p["w"], alpha=2)),
    entries("sub from with alpha", lambda p, x: torch.sub(p["w"], x, alpha=3)),
    entries("quotients", lambda p, x: p["w"] / (2 + x.tanh()) + x / (2 + p["w"] ** 2)),
    entries("a batch dimension of its own", lambda p, x: x * p["w"] + p["v"], w=(1, 1, 4), v=(1, 3, 1)),
    entries("a number", lambda p, x: x * p["w"] + p["v"] * x**2, w=(), v=()),
    entries("wider than the data", lambda p, x: (x.unsqueeze(1) * p["w"]).mean(1), w=(2, 3, 4)),
    entries("an expanded parameter", lambda p, x: x * p["w"].expand_as(x)),
    entries("powers", lambda p, x: (2 + x.tanh()).pow(p["w"]) + (2 + p["w"] ** 2) ** x),
    entries("where", lambda p, x: torch.where(x > 0, p["w"], p["v"]) * x, w=(4,), v=(3, 1)),
    entries("where a number", lambda p, x: torch.where(x > 0, x, p["w"]), w=()),
    entries("masked_fill", lambda p, x: x.masked_fill(x > 0, p["w"]), w=()),
    entries("lerp", lambda p, x: torch.lerp(x, p["w"], 0.3) + torch.lerp(p["w"], x, p["w"].sigmoid())),
    entries("lerp between data", lambda p, x: torch.lerp(x, x**2, p["w"].sigmoid())),
    entries("addcmul", lambda p, x: torch.addcmul(p["w"], x, p["v"], value=0.5), w=(4,), v=(3, 4)),
    entries("addcdiv", lambda p, x: torch.addcdiv(x, p["w"], 2 + x.tanh(), value=0.5)),
    entries("bounds", lambda p, x: torch.maximum(x, p["w"]) + x.clamp(max=p["w"]) + torch.min(x, p["w"])),
    entries("angles", lambda p, x: torch.atan2(x, p["w"]) + torch.hypot(p["w"], x)),
    entries("exponents", lambda p, x: torch.logaddexp(x, p["w"]) + torch.xlogy(x, 2 + p["w"] ** 2)),
    entries("remainders", lambda p, x: torch.remainder(x, 2 + p["w"] ** 2) + torch.fmod(p["w"], 2 + x**2)),
    entries("in place", in_place, w=(4,), v=(4,)),
    entries("positions first", lambda p, x: torch.where(x.mT > 0, p["w"], x.mT).mT, w=(3,)),
    entries("positions and samples", lambda p, x: torch.maximum(x.mT, p["w"]).mT, w=(1, 4, 3)),
    entries("complex", lambda p, x: torch.view_as_real(
        torch.complex(x, x**2) * torch.view_as_complex(p["w"])
    ).flatten(1), w=(4, 2)),
    entries("prompt", lambda p, x: torch.cat([p["w"].expand(len(x), -1, -1), x], 1), w=(1, 2, 4)),
    entries("repeated prompt", lambda p, x: torch.cat([x, p["w"].repeat(len(x), 1, 1), x], dim=1), w=(2, 4)),
    entries("columns", lambda p, x: torch.concat([x, p["w"].expand(len(x), 3, 4)], axis=-1)),  # pyright: ignore
    entries("prompt, positions first", lambda p, x: torch.cat([
        p["w"].unsqueeze(1).expand(-1, len(x), -1), x.transpose(0, 1)
    ]).transpose(0, 1), w=(2, 4)),
    entries("stack", lambda p, x: torch.stack([x, p["w"].expand_as(x)], -1)),
    entries("stack in front", lambda p, x: torch.stack([p["w"].expand_as(x), x]).transpose(0, 1)),
    entries("cdist", lambda p, x: torch.cdist(x, p["w"]), w=(5, 4)),
    entries("cdist from the parameter", lambda p, x: torch.cdist(p["w"], x, p=1.0), w=(5, 4)),
    entries("cdist, a codebook for each head", lambda p, x: torch.cdist(x.unsqueeze(1), p["w"]), w=(2, 5, 4)),
    Spelling("cdist of samples", lambda p, x: torch.cdist(x, p["w"]), (4,), {"w": (5, 4)}),
    Spelling("cdist to samples", lambda p, x: torch.cdist(p["w"], x).T, (4,), {"w": (5, 4)}),
    entries("cosine_similarity", lambda p, x: F.cosine_similarity(x.unsqueeze(2), p["w"], dim=-1), w=(5, 4)),
    entries("cosine_similarity of columns", lambda p, x: F.cosine_similarity(x, p["w"]), w=(3, 1)),
    entries("triangular solve of data", lambda p, x: torch.linalg.solve_triangular(
        torch.eye(3, dtype=x.dtype, device=x.device) + (x @ x.mT).tril(-1), x * p["w"], upper=False
    )),
    entries("rows of a table", lambda p, x: p["w"][signs(x)], w=(16, 2)),
    entries("numbers of a table", lambda p, x: p["w"][signs(x) - 16], w=(16,)),
    entries("one row a sample", lambda p, x: p["w"][signs(x)[:, 0]], w=(16, 2, 3)),
    entries("entries of two indices", lambda p, x: p["w"][signs(x) // 4, signs(x) % 4 - 4], w=(4, 4, 2)),
    entries("rows by an index and constants", lambda p, x: p["w"][
        torch.arange(3, device=x.device), signs(x)
    ], w=(3, 16)),
    entries("columns of a table", lambda p, x: p["w"][:, signs(x)].permute(1, 2, 0), w=(5, 16)),
    entries("index_select", lambda p, x: p["w"].index_select(1, signs(x)[:, 1]).T, w=(5, 16)),
    entries("take_along_dim", lambda p, x: torch.take_along_dim(p["w"], x.argsort(-1), -1), w=(1, 3, 4)),
    entries("gather", lambda p, x: p["w"].expand(len(x), 3, 4).gather(2, x.argsort(-1)), w=(3, 4)),
]  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.name)
def test_entries(spelling, device, monkeypatch):
    """Every operation is exact, and has a rule."""
    model_fn, params, batch = built(spelling, device)
    assert_exact(model_fn, params, batch(4, 1), batch(3, 2))
    assert_has_rule(monkeypatch, model_fn, params, batch(4, 1))


def test_a_row_of_every_sample_is_refused(device):
    """A parameter's row among the samples' rows: it is no sample's, and not lost."""

    def model_fn(p: Params, x: Tensor) -> Tensor:
        rows = torch.cat([x, p["w"]])  # [B + 1, 4]
        return (rows[:-1] * rows[-1]).pow(2).sum(1)

    params = {"w": torch.ones(1, 4, dtype=torch.float64, device=device)}
    with pytest.raises((gf.InteractingSamples, gf.UnsupportedUse)):
        gf.ghost_factors(model_fn, params, torch.randn(3, 4, dtype=torch.float64, device=device))


def test_a_row_for_each_sample_among_the_rows_of_samples(device):
    """Rows of a parameter that the samples' rows are joined with, one for each sample: found by a probe."""

    def body(p: Params, x: Tensor) -> Tensor:
        rows = torch.cat([x, p["w"].expand(len(x), -1)])  # [2 B, 4]
        return (rows[: len(x)] * rows[len(x) :]).tanh()

    model_fn, params, batch = built(Spelling("rows", body, (4,), {"w": (4,)}), device)
    assert_exact(model_fn, params, batch(4, 1), batch(3, 2))


def test_a_number_has_no_say_in_the_dtype(device):
    """A float64 number beside float32 data gives float32, as without ghostfunc."""
    seen = []

    def model_fn(p: Params, x: Tensor) -> Tensor:
        out = torch.where(x > 0, p["w"], x * p["w"])
        seen.append(out.dtype)
        return out.sum(1)

    x = torch.randn(3, 4, device=device)
    params = {"w": torch.tensor(2.0, dtype=torch.float64, device=device)}
    (factor, *_) = gf.ghost_factors(model_fn, params, x)[1]["w"]
    assert set(seen) == {torch.float32}
    assert model_fn(params, x).dtype == torch.float32
    assert factor.dense(()).shape == (3,)


@pytest.mark.parametrize("index", [(16,), (3, 4), (-5, 0)])
def test_indices_outside_a_table(index, device):
    """An index outside of a table raises, also where its place in the flattened table would exist."""

    def model_fn(p: Params, x: Tensor) -> Tensor:
        places = tuple(x.new_full((len(x),), i, dtype=torch.long) + (0 * x[:, 0]).long() for i in index)
        return p["w"][places].flatten(1).sum(1)

    params = {"w": torch.ones(4, 4, 2, device=device)}
    with pytest.raises(IndexError):
        gf.ghost_factors(model_fn, params, torch.randn(3, 4, device=device))
