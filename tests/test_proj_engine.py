"""The projection engine in a loop: rows are projected gradients, training is untouched, the store is whole."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import TASKS, Task, batches, flat_grad, gpt2, mlp
from torch import Tensor, nn

import ghostfunc as gf
from ghostfunc.index import Store, StoreError

N = 4


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest, device: torch.device) -> Task:
    return TASKS[request.param]._replace(device=device)


def engine_of(model: nn.Module, task: Task, **options: Any) -> gf.GradProjEngine:
    return gf.GradProjEngine(model, **{"loss": task.loss, "proj_rank_total": 16, **options})


def row_by_hand(engine: gf.GradProjEngine, task: Task, X: Tensor, Y: Tensor) -> Tensor:
    """P_in^T G P_out of one sample's plain gradient."""
    parameters = dict(engine.module.named_parameters())
    loss = task.losses(engine.module, X[None], Y[None]).mean()
    grads = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    assert engine.projection is not None
    return engine.projection.project(grads)


def test_rows_are_projected_gradients_at_the_parameters_of_the_moment(task: Task) -> None:
    model = task.make()
    engine = engine_of(model, task)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    first = None
    for (X, Y, ids), _ in zip(batches(task, N), range(3), strict=False):
        rows = engine.collect_batch((X, Y), ids)
        expected = torch.stack([row_by_hand(engine, task, x, y) for x, y in zip(X, Y, strict=True)])
        assert rows.shape == (N, engine.metadata["dim"]) and rows.device == X.device
        assert (rows - expected).norm() <= 1e-10 * expected.norm()
        torch.testing.assert_close(engine.losses, task.losses(model, X, Y).detach())
        first = rows if first is None else first
        task.losses(model, X, Y).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert first is not None and (rows - first).norm() > 1e-3 * first.norm()


def test_embeddings_and_layers_by_name() -> None:
    model = gpt2()
    (X, Y, _) = next(batches(TASKS["gpt2"]))
    engine = engine_of(model, TASKS["gpt2"], proj_layers="h.1", include_embeddings=True)
    rows = engine.collect_batch(X)
    names = list(engine.metadata["layers"])
    assert {"transformer.wte.weight", "transformer.wpe.weight"} < set(names)
    assert {n.split(".")[2] for n in names if ".h." in n} == {"1"}
    expected = torch.stack([row_by_hand(engine, TASKS["gpt2"], x, y) for x, y in zip(X, Y, strict=True)])
    assert (rows - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.parametrize("kind", ["gaussian", "orthonormal"])
def test_options_reach_the_projection(kind: str) -> None:
    model, task = mlp(), TASKS["mlp"]
    engine = engine_of(model, task, proj_rank_total=20, proj_rank_min=3, proj_seed=7,
                       proj_row_orthonormal=kind == "orthonormal")  # fmt: skip
    X, Y, _ = next(batches(task))
    engine.attach((X, Y))
    model_fn, params = gf.functionalize(model, gf.classification_loss)
    expected = gf.kronecker_projection(model_fn, params, (X, Y), rank=20, min_rank=3, seed=7, kind=kind)
    assert engine.projection is not None and engine.projection.fingerprint == expected.fingerprint
    described = expected.describe()["parameters"]["0.weight"]
    layer = engine.metadata["layers"]["0.weight"]
    assert (layer["k_i"], layer["k_o"], layer["slice"]) == (
        described["k_in"],
        described["k_out"],
        described["columns"],
    )
    assert layer["slice"] == [0, layer["k_i"] * layer["k_o"]] and engine.metadata["dim"] == layer["slice"][1]


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layers(x - y)


@pytest.mark.parametrize("kind", ["tuple", "list", "dict"])
def test_batches_of_several_inputs(kind: str) -> None:
    x, y, labels = torch.randn(N, 5).double(), torch.randn(N, 5).double(), torch.tensor([0, 1, 2, 0])
    batch = {"tuple": (x, y, labels), "list": [x, y, labels], "dict": {"x": x, "y": y, "labels": labels}}[kind]
    model = TwoInputs()
    engine = gf.GradProjEngine(model, loss=gf.classification_loss, proj_rank_total=16)
    rows = engine.collect_batch(batch)
    assert engine.projection is not None
    losses = torch.nn.functional.cross_entropy(model(x, y), labels, reduction="none")
    for row, loss in zip(rows, losses, strict=True):
        (gradient,) = torch.autograd.grad(loss, [model.layers[0].weight], retain_graph=True)
        expected = engine.projection.project({"layers.0.weight": gradient})
        assert (row - expected).norm() <= 1e-10 * expected.norm()


# ---------------------------------------------------------------- non-interference


class Restless(nn.Module):
    """Dropout, batch statistics, one part kept in evaluation mode, and a random number drawn in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 16)
        self.norm = nn.BatchNorm1d(16)
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5)).requires_grad_(False).eval()
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand(()) * 1e-3
        return self.last(self.frozen(self.dropout(self.norm(self.first(x))).tanh())) * (1 + noise)


def restless() -> nn.Module:
    torch.manual_seed(1)
    return Restless().double()


def train(model: nn.Module, steps: int, engine: gf.GradProjEngine | None) -> tuple[list[Tensor], Tensor]:
    """Gradients of every step, and a random number drawn at the end."""
    task = TASKS["mlp"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    torch.manual_seed(5)
    gradients = []
    for (X, Y, ids), _ in zip(batches(task, N), range(steps), strict=False):
        loss = task.losses(model, X, Y).mean()
        if engine is not None:
            engine.collect_batch((X, Y), ids)  # while the loop's graph is alive
        loss.backward()
        if engine is not None:
            engine.collect_batch((X, Y), ids)  # and while .grad is full
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        optimizer.step()
        optimizer.zero_grad()
    return gradients, torch.rand(3)


def test_the_loop_trains_as_it_does_without_the_engine(tmp_path: Path) -> None:
    plain, watched = restless(), restless()
    engine = engine_of(watched, TASKS["mlp"], proj_dir=tmp_path)
    attributes = {name: set(m.__dict__) for name, m in watched.named_modules()}
    modes = {name: m.training for name, m in watched.named_modules()}
    expected, drawn = train(plain, 4, None)
    found, drawn_too = train(watched, 4, engine)
    for gradient, other in zip(found, expected, strict=True):
        assert torch.equal(gradient, other)
    assert torch.equal(drawn, drawn_too)
    for (name, tensor), other in zip(watched.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    assert {name: m.training for name, m in watched.named_modules()} == modes
    assert {name: set(m.__dict__) for name, m in watched.named_modules()} == attributes
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    assert not any(getattr(m, kind) for m in watched.modules() for kind in hooks)
    assert not any(p._backward_hooks for p in watched.parameters())


def test_a_failed_call_leaves_modes_and_random_numbers_alone() -> None:
    model = restless()
    engine = engine_of(
        model, TASKS["mlp"], call=lambda module, batch: module(batch[0]) if torch.rand(()) < 0 else 1 / 0
    )
    X, Y, _ = next(batches(TASKS["mlp"]))
    before, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    with pytest.raises(ZeroDivisionError):
        engine.collect_batch((X, Y))
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in model.modules()] == modes


def test_rows_are_those_of_evaluation_mode() -> None:
    model, task = gpt2(resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3).train(), TASKS["gpt2"]
    X, Y, _ = next(batches(task))
    engine = engine_of(model, task)
    found = engine.collect_batch((X, Y))
    assert torch.equal(found, engine.collect_batch((X, Y)))
    model.eval()
    assert torch.equal(found, engine.collect_batch((X, Y)))
    assert not torch.equal(flat_grad(model.train(), task.losses(model, X, Y).mean()),
                           flat_grad(model.eval(), task.losses(model, X, Y).mean()))  # fmt: skip


def test_collecting_under_no_grad_is_the_same() -> None:
    model, task = mlp(), TASKS["mlp"]
    X, Y, _ = next(batches(task))
    engine = engine_of(model, task)
    with torch.no_grad():
        found = engine.collect_batch((X, Y))
    assert torch.equal(found, engine.collect_batch((X, Y)))


# ---------------------------------------------------------------- autocast


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_under_autocast(dtype: torch.dtype, tolerance: float) -> None:
    model, task = gpt2(torch.float32), TASKS["gpt2"]
    X, Y, _ = next(batches(task))
    engine = engine_of(model, task)
    expected = engine.collect_batch((X, Y))
    with torch.autocast("cpu", dtype):
        found = engine.collect_batch((X, Y))
    assert found.dtype == torch.float32
    error = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert 0 < error.max() < tolerance


@pytest.mark.parametrize("factor", [1e-7, 1e4])
def test_small_and_large_gradients_survive_float16(factor: float) -> None:
    model, task = mlp(torch.float32), TASKS["mlp"]
    X, Y, _ = next(batches(task))
    batch = (X.float(), Y)
    engine = gf.GradProjEngine(
        model, loss=lambda output, b: factor * gf.classification_loss(output, b), proj_rank_total=16
    )
    expected = engine.collect_batch(batch)
    with torch.autocast("cpu", torch.float16):
        found = engine.collect_batch(batch)
        assert torch.equal(found, engine.collect_batch(batch))
    assert (found - expected).norm() < 4e-3 * expected.norm()


# ---------------------------------------------------------------- the store


def collect(folder: Path, steps: range, **options: Any) -> gf.GradProjEngine:
    """Steps of one fixed model's loop; ids say which samples they were."""
    task = TASKS["mlp"]
    engine = engine_of(mlp(torch.float32), task, proj_dir=folder, **{"proj_save_interval": 2, **options})
    for step, (X, Y, _) in zip(range(steps.stop), batches(task, N), strict=False):
        if step in steps:
            engine.collect_batch((X.float(), Y), range(N * step, N * step + N), domains=["a", "b"] * (N // 2))
    return engine


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_store_holds_every_row_with_its_sample(tmp_path: Path, dtype: str) -> None:
    task = TASKS["mlp"]
    engine = engine_of(mlp(torch.float32), task, proj_dir=tmp_path, proj_dtype=dtype, proj_save_interval=2)
    rows, losses = [], []
    for step, (X, Y, _) in zip(range(5), batches(task, N), strict=False):
        rows.append(engine.collect_batch((X.float(), Y), [("code", 10 * step + i) for i in range(N)]))
        losses.append(engine.losses)
        assert engine.rows_written == (step + 1) // 2 * 2 * N
    engine.detach()
    store = Store(tmp_path)
    assert store.rows == engine.rows_written == 5 * N and store.dtype == dtype
    store.verify()
    expected = torch.cat(rows).to(getattr(torch, dtype)).float()
    assert torch.equal(store.read(0, store.rows), expected)
    samples = store.samples()
    assert samples["sample_id"].to_pylist() == [10 * step + i for step in range(5) for i in range(N)]
    assert set(samples["domain"].to_pylist()) == {"code"}
    assert samples["loss"].to_pylist() == torch.cat([loss for loss in losses if loss is not None]).tolist()
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) == 3
    assert json.loads((tmp_path / "metadata.json").read_text()) == engine.metadata
    assert engine.projection is not None
    assert gf.KroneckerProjection.load(tmp_path / "projection.safetensors").fingerprint == engine.projection.fingerprint
    assert store.slices == {name: slice(*layer["slice"]) for name, layer in engine.metadata["layers"].items()}


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_loop_that_was_killed_goes_on_to_the_same_bytes(tmp_path: Path, stop: int) -> None:
    collect(tmp_path / "whole", range(7)).detach()
    collect(tmp_path / "cut", range(stop))  # and no detach
    X, Y, _ = next(batches(TASKS["mlp"], N))
    again = engine_of(mlp(torch.float32), TASKS["mlp"], proj_dir=tmp_path / "cut", proj_save_interval=2)
    again.attach((X.float(), Y))
    assert again.rows_written == stop // 2 * 2 * N
    collect(tmp_path / "cut", range(again.rows_written // N, 7)).detach()
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_samples_without_ids_are_numbered_by_their_rows(tmp_path: Path) -> None:
    for _ in range(2):
        engine = engine_of(mlp(), TASKS["mlp"], proj_dir=tmp_path)
        for (X, Y, _), _ in zip(batches(TASKS["mlp"], N), range(2), strict=False):
            engine.collect_batch((X, Y))
        engine.detach()
    assert Store(tmp_path).samples()["sample_id"].to_pylist() == list(range(4 * N))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"proj_seed": 1}, "projection"),
        ({"proj_dtype": "float32"}, "dtype"),
        ({"config": {"batch_size": 8}}, "batch_size"),
        ({"config": {"model": {"fingerprint": "ab"}}}, "model"),
        ({"config": {"data": {"fingerprint": "ab"}}}, "other data"),
    ],
    ids=str,
)
def test_a_store_of_something_else_is_refused_and_left_alone(
    tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    collect(tmp_path, range(2)).detach()
    before = content(tmp_path)
    with pytest.raises(StoreError, match=named):
        collect(tmp_path, range(2), **options)
    assert content(tmp_path) == before


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    collect(tmp_path, range(2)).detach()
    (shard,) = (tmp_path / "shards").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x77")
    with pytest.raises(StoreError, match=shard.name):
        collect(tmp_path, range(2, 4))


def test_without_a_folder_nothing_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    engine = engine_of(mlp(), TASKS["mlp"])
    X, Y, _ = next(batches(TASKS["mlp"]))
    engine.collect_batch((X, Y))
    engine.save()
    engine.detach()
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="proj_dir"):
        _ = engine.rows_written


# ---------------------------------------------------------------- verbs and refusals


def test_a_detached_engine_refuses_batches_until_it_is_attached(tmp_path: Path) -> None:
    engine = collect(tmp_path, range(1))
    assert engine.rows_written == 0
    engine.detach()
    assert engine.rows_written == N
    X, Y, _ = next(batches(TASKS["mlp"], N))
    with pytest.raises(RuntimeError, match="attach"):
        engine.collect_batch((X.float(), Y))
    engine.attach()
    engine.collect_batch((X.float(), Y))
    engine.detach()
    assert Store(tmp_path).rows == 2 * N


def test_a_layer_smaller_than_the_rank_is_clipped_and_said_so_once() -> None:
    engine = engine_of(mlp(), TASKS["mlp"], proj_rank_total=1000)
    X, Y, _ = next(batches(TASKS["mlp"]))
    with pytest.warns(UserWarning, match=r"0\.weight.*1000") as warned:
        engine.collect_batch((X, Y))
        engine.collect_batch((X, Y))
    assert len(warned) == 1
    layer = engine.metadata["layers"]["0.weight"]
    assert layer["clipped"] and (layer["k_i"], layer["k_o"]) == (5, 16)


def test_what_is_not_finite_is_named_and_nothing_of_the_batch_kept(tmp_path: Path) -> None:
    engine = collect(tmp_path, range(1))
    X, Y, _ = next(batches(TASKS["mlp"], N))
    X = X.float()
    X[2, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="sample 12 of b"):
        engine.collect_batch((X, Y), [10, 11, 12, 13], domains=["a", "a", "b", "b"])
    engine.detach()
    assert Store(tmp_path).samples()["sample_id"].to_pylist() == list(range(N))


def test_what_float16_cannot_hold_is_named(tmp_path: Path) -> None:
    def loss(output: Any, batch: Any) -> Tensor:
        return gf.classification_loss(output, batch) * torch.tensor([1.0, 1e7, 1.0, 1.0])

    engine = engine_of(mlp(torch.float32), TASKS["mlp"], loss=loss, proj_dir=tmp_path, proj_dtype="float16")
    X, Y, _ = next(batches(TASKS["mlp"], N))
    with pytest.raises(FloatingPointError, match="1 of 4 samples does not fit into float16: sample 1"):
        engine.collect_batch((X.float(), Y))


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (X, Y, _) = mlp(), next(batches(TASKS["mlp"], N))
    engine = engine_of(model, TASKS["mlp"])
    with pytest.raises(RuntimeError, match="attach"):
        _ = engine.metadata
    with pytest.raises(ValueError, match="4 samples, but there are 3 ids"):
        engine.collect_batch((X, Y), [1, 2, 3])
    with pytest.raises(ValueError, match=r"nothing.*0\.weight"):
        engine_of(model, TASKS["mlp"], proj_layers="nothing").attach((X, Y))
    with pytest.raises(ValueError, match="proj_dtype"):
        engine_of(model, TASKS["mlp"], proj_dtype="float64")
    with pytest.raises(ValueError, match="proj_save_interval=0"):
        engine_of(model, TASKS["mlp"], proj_save_interval=0)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"one of 2, .* pass group="):
        engine_of(model, TASKS["mlp"], proj_dir=tmp_path)


def test_a_full_disk_leaves_what_is_written_and_the_same_loop_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect(tmp_path / "whole", range(4)).detach()
    engine = collect(tmp_path / "cut", range(3))
    shutil.copytree(tmp_path / "cut", tmp_path / "before")

    def no_room(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ghostfunc.index._shards.write_atomically", no_room)
    with pytest.raises(StoreError, match="disk is full"):
        engine.detach()
    monkeypatch.undo()
    assert content(tmp_path / "cut") == content(tmp_path / "before")
    collect(tmp_path / "cut", range(2, 4)).detach()
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
