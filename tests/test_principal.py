"""Matrices from data, explicit projections and their adjoints, and projections in files."""

import json
from typing import Any

import pytest
import torch
from cases import BY_NAME
from hard import HARD
from oracle import per_sample_grads
from torch import Tensor

import ghostfunc as gf
from ghostfunc import _principal

CPU = torch.device("cpu")
ALL = {**BY_NAME, **{case.name: case for case in HARD}}
USES = [  # one use, several, derived, side by side, tables, vectors
    "mlp", "gpt2 tied", "gpt2 untied", "convolution", "embeddings", "weight twice", "norms", "recurrent", "products",
    "experts", "lstm", "weight norm", "samples as columns",
]  # fmt: skip


def built(name: str) -> tuple[Any, dict[str, Tensor], Any]:
    case = ALL[name].make(torch.float64, CPU)
    return case.model_fn, case.params, case.batch(4, 0)


def every(name: str) -> bool:
    return True


def blocks(projection: gf.KroneckerProjection, name: str, grads: Tensor) -> Tensor:
    return projection.parts[name].blocks.of(grads).flatten(0, 1)  # [samples * blocks, d_in, d_out]


def energy(matrices: Tensor, basis: Tensor) -> Tensor:
    """The share of sum_n |M_n|^2 that is left when the columns of M_n are projected on a basis."""
    return (basis.t() @ matrices).square().sum()


@pytest.mark.parametrize("name", USES)
def test_columns_are_the_leading_eigenvectors_of_explicit_gradients(name: str) -> None:
    model_fn, params, batch = built(name)
    projection = gf.kronecker_projection(model_fn, params, batch, rank=6, min_rank=2, layers=every, kind="pca")
    grads = per_sample_grads(model_fn, params, batch)
    for parameter in projection.parts:
        p_in, p_out = projection.matrices(parameter)
        matrices = blocks(projection, parameter, grads[parameter])
        for side, found in ((matrices, p_in), (matrices.transpose(1, 2), p_out)):
            flat = side.transpose(0, 1).flatten(1)
            values = torch.linalg.eigvalsh(flat @ flat.t()).flip(0)[: found.shape[1]]
            torch.testing.assert_close(found.t() @ found, torch.eye(found.shape[1]).double(), rtol=0, atol=1e-10)
            moments = (found.t() @ flat).square().sum(1)
            torch.testing.assert_close(moments, values, rtol=1e-6, atol=1e-9 * float(values[0]))


def test_all_batches_enter_and_the_order_of_batches_does_not_matter() -> None:
    model_fn, params, batch = built("mlp")
    other = tuple(t.flip(0) + t.flip(0).is_floating_point() for t in batch)
    of = [
        gf.kronecker_projection(model_fn, params, batch, rank=16, min_rank=2, layers=every, kind="pca", batches=data)
        for data in ([batch], [batch, other], [other, batch])
    ]
    for name in of[0].parts:
        for alone, first, second in zip(*(p.matrices(name) for p in of), strict=True):
            torch.testing.assert_close(first, second, rtol=1e-7, atol=1e-7)
            assert len(alone) == 1 or not torch.allclose(alone, first, atol=1e-3)


@pytest.mark.parametrize("name", ["gpt2 untied", "embeddings", "mlp"])
def test_a_large_side_keeps_the_entries_with_the_largest_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_principal, "LARGEST", 5)
    model_fn, params, batch = built(name)
    projection = gf.kronecker_projection(model_fn, params, batch, rank=6, min_rank=2, layers=every, kind="pca")
    grads = per_sample_grads(model_fn, params, batch)
    large = 0
    for parameter in projection.parts:
        matrices = blocks(projection, parameter, grads[parameter])
        for side, found in zip((matrices, matrices.transpose(1, 2)), projection.matrices(parameter), strict=True):
            if len(found) > 5:
                large += 1
                expected = side.square().sum((0, 2)).topk(found.shape[1]).indices.sort().values
                assert torch.equal(found.argmax(0), expected)
                assert torch.equal(found.sum(0), torch.ones(found.shape[1]).double())
    assert large


def test_pca_keeps_inner_products_better_than_random_matrices() -> None:
    model_fn, params, batch = built("gpt2 untied")
    grads = per_sample_grads(model_fn, params, batch)
    projections = {
        kind: gf.kronecker_projection(model_fn, params, batch, rank=16, min_rank=4, kind=kind)
        for kind in ("pca", "gaussian", "orthonormal")
    }
    exact = sum(g.flatten(1) @ g.flatten(1).t() for n, g in grads.items() if n in projections["pca"].parts)
    errors = {}
    for kind, projection in projections.items():
        rows = gf.ghost_grad_proj(model_fn, params, batch, projection)
        errors[kind] = float((rows @ rows.t() - exact).norm() / exact.norm())
    assert errors["pca"] < 0.5 * min(errors["gaussian"], errors["orthonormal"])


def test_pca_says_what_it_cannot_do() -> None:
    model_fn, params, batch = built("mlp")
    with pytest.raises(ValueError, match="batches= has none"):
        gf.kronecker_projection(model_fn, params, batch, kind="pca", batches=[])
    with pytest.raises(ValueError, match="'gaussian' matrices are drawn at random"):
        gf.kronecker_projection(model_fn, params, batch, batches=[batch])

    def flat(params: dict[str, Tensor], batch: Any) -> Tensor:
        return 0.0 * model_fn(params, batch)

    with pytest.raises(ValueError, match="no sample of the data has a gradient there"):
        gf.kronecker_projection(flat, params, batch, kind="pca")


# ---------------------------------------------------------------- explicit projections, and back


@pytest.mark.parametrize("kind", ["gaussian", "mask", "pca"])
@pytest.mark.parametrize("name", USES)
def test_explicit_projections_are_those_of_the_backward(name: str, kind: str) -> None:
    model_fn, params, batch = built(name)
    projection = gf.kronecker_projection(model_fn, params, batch, rank=6, min_rank=2, layers=every, kind=kind)
    rows = gf.ghost_grad_proj(model_fn, params, batch, projection)
    grads = per_sample_grads(model_fn, params, batch)
    query = torch.randn(projection.dim, dtype=torch.float64)
    direction = projection.adjoint(query)
    assert {n: d.shape for n, d in direction.items()} == {n: params[n].shape for n in projection.parts}
    for sample, row in enumerate(rows):
        gradient = {n: g[sample] for n, g in grads.items()}
        torch.testing.assert_close(projection.project(gradient), row, rtol=1e-10, atol=1e-10 * float(row.norm()))
        along = sum((direction[n] * gradient[n]).sum() for n in direction)
        scale = float(query.norm() * row.norm())
        torch.testing.assert_close(along, row @ query, rtol=0, atol=1e-10 * scale)


def test_explicit_projections_say_what_is_missing() -> None:
    model_fn, params, batch = built("mlp")
    projection = gf.kronecker_projection(model_fn, params, batch)
    name = next(iter(projection.parts))
    with pytest.raises(ValueError, match="the gradient has no"):
        projection.project({n: p for n, p in params.items() if n != name})
    with pytest.raises(ValueError, match="the gradient has shape"):
        projection.project({n: p[:1] for n, p in params.items()})
    with pytest.raises(ValueError, match=rf"expected \[{projection.dim}\]"):
        projection.adjoint(torch.zeros(projection.dim + 1))


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("kind", ["orthonormal", "pca"])
@pytest.mark.parametrize("name", ["gpt2 tied", "convolution"])
def test_a_saved_projection_is_the_same(name: str, kind: str, tmp_path: Any) -> None:
    model_fn, params, batch = built(name)
    options = {"rank": 6, "min_rank": 2, "layers": every, "kind": kind}
    projection = gf.kronecker_projection(model_fn, params, batch, **options)
    projection.save(tmp_path / "projection.safetensors")
    again = gf.KroneckerProjection.load(tmp_path / "projection.safetensors")
    assert again.fingerprint == projection.fingerprint
    assert (str(again), again.slices, again.describe()) == (str(projection), projection.slices, projection.describe())
    rows = gf.ghost_grad_proj(model_fn, params, batch, projection)
    assert torch.equal(gf.ghost_grad_proj(model_fn, params, batch, again), rows)
    assert json.loads(json.dumps(again.describe())) == again.describe()
    (tmp_path / "again.safetensors").write_bytes((tmp_path / "projection.safetensors").read_bytes())
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "projection.safetensors").read_bytes()


def test_a_fingerprint_is_of_all_that_decides_the_numbers() -> None:
    model_fn, params, batch = built("mlp")
    options: list[dict[str, Any]] = [{}, {"seed": 1}, {"rank": 100}, {"kind": "mask"}, {"include": ("bias",)}]
    found = [gf.kronecker_projection(model_fn, params, batch, **o).fingerprint for o in options]
    assert len(set(found)) == len(found)
    assert gf.kronecker_projection(model_fn, params, batch).fingerprint == found[0]


def test_damaged_files_are_named(tmp_path: Any) -> None:
    model_fn, params, batch = built("mlp")
    path = tmp_path / "projection.safetensors"
    gf.kronecker_projection(model_fn, params, batch).save(path)
    data = path.read_bytes()
    spoiled = bytearray(data)
    spoiled[-3] ^= 1
    for content in (data[:-5], bytes(spoiled), b"", b"nothing"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"projection\.safetensors is damaged or no projection"):
            gf.KroneckerProjection.load(path)
    with pytest.raises(FileNotFoundError):
        gf.KroneckerProjection.load(tmp_path / "none.safetensors")
