"""Dots over checkpoints: vmap and loop against the oracle, files one at a time, and what is refused."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, Built, mlp
from oracle import TOLERANCE, assert_dots, assert_dots_by_name, expected, per_sample_grads
from safetensors.torch import save_file
from torch import Tensor, nn

import ghostfunc as gf

CPU, DOUBLE = torch.device("cpu"), torch.float64
N, M, RATES = 4, 3, [0.3, 0.02, 0.1]
Params = dict[str, Tensor]


def checkpoints_of(params: Params) -> list[Params]:
    generator = torch.Generator().manual_seed(3)
    moves = [{k: torch.randn(p.shape, generator=generator, dtype=DOUBLE) for k, p in params.items()} for _ in RATES]
    return [{k: p + 0.2 * move[k].to(p) for k, p in params.items()} for move in moves]


def stacked(points: list[Params]) -> Params:
    return {name: torch.stack([point[name] for point in points]) for name in points[0]}


def reference(case: Built, points: list[Params], weights: list[float], out: str = "train") -> Any:
    """The weighted sum over checkpoints of what `out` stands for, and of the scales of its errors."""
    train, val = case.batch(N, 1), case.batch(M, 2)
    found = [
        expected(out, per_sample_grads(case.model_fn, p, train), per_sample_grads(case.model_fn, p, val))
        for p in points
    ]

    def combined(at_each: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        value, scale = (torch.stack(part) for part in zip(*at_each, strict=True))
        return torch.tensordot(torch.tensor(weights, dtype=DOUBLE), value, 1), scale.sum(0)

    if isinstance(found[0], dict):
        return {name: combined([at[name] for at in found]) for name in found[0]}
    return combined(found)


@pytest.mark.parametrize("method", ["vmap", "loop"])
@pytest.mark.parametrize("name", ["mlp", "mlp frozen", "gpt2 tied", "convolution", "derived"])
def test_against_the_oracle(name: str, method: str) -> None:
    case = BY_NAME[name].make(DOUBLE, CPU)
    train, val, points = case.batch(N, 1), case.batch(M, 2), checkpoints_of(case.params)
    mean = gf.tracin(case.model_fn, points, train, val, params=case.params, method=method)
    assert (mean.checkpoints, mean.method) == (3, method)
    assert_dots(mean.dots, reference(case, points, [1 / 3] * 3), TOLERANCE[DOUBLE], "mean over checkpoints")
    weighted = gf.tracin(case.model_fn, stacked(points), train, val, learning_rates=RATES, method=method)
    assert weighted.method == method
    assert_dots(weighted.dots, reference(case, points, RATES), TOLERANCE[DOUBLE], "weighted by learning rates")


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_axes(method: str) -> None:
    case = mlp(DOUBLE, CPU)
    train, val, points = case.batch(N, 1), case.batch(M, 2), checkpoints_of(case.params)
    rates = torch.tensor(RATES, dtype=DOUBLE)
    each = {
        out: gf.tracin(case.model_fn, points, train, val, learning_rates=rates, method=method, out=out).dots
        for out in ("train val", "param train")
    }
    assert_dots(each["train val"], reference(case, points, RATES, "train val"), TOLERANCE[DOUBLE], "train val")
    by_name = reference(case, points, RATES, "param train")
    assert_dots_by_name(each["param train"], by_name, TOLERANCE[DOUBLE], "param train")
    one = gf.tracin(case.model_fn, points, train, val, learning_rates=rates, method=method, layers="2.weight").dots
    torch.testing.assert_close(one, each["param train"]["2.weight"])


def test_auto_takes_what_fits() -> None:
    case = mlp(DOUBLE, CPU)
    train, val, points = case.batch(N, 1), case.batch(M, 2), checkpoints_of(case.params)

    def method(given: Any, **options: Any) -> str:
        return gf.tracin(case.model_fn, given, train, val, **options).method

    assert method(points) == method(stacked(points)) == method(tuple(points)) == "vmap"
    assert method(points, memory=10_000) == "loop"
    assert method(iter(points)) == "loop"  # perhaps they do not fit together
    weights = sum(p.numel() * 8 for p in case.params.values())
    activations = N * (8 + 8 + 8 + 8 + 3) * 8  # each layer's result
    assert method(points, memory=3 * 3 * (weights + activations)) == "loop"  # the loss's own are beside these
    assert method(points, memory=2 * 3 * 3 * (weights + activations)) == "vmap"


def test_auto_falls_back_to_the_loop() -> None:
    """A model that looks at values, and one that draws random numbers."""

    def looks(p: Params, x: Tensor) -> Tensor:
        h = F.linear(x, p["w"])
        return (h if p["w"].detach().sum() > 0 else 2 * h).pow(2).sum(1)

    params, x = {"w": torch.ones(2, 4, dtype=DOUBLE)}, torch.randn(N, 4, dtype=DOUBLE)
    points = [params, {"w": -params["w"]}]
    result = gf.tracin(looks, points, x, x)
    assert result.method == "loop"
    single = [gf.ghost_grad_dot(looks, point, x, x) for point in points]
    torch.testing.assert_close(result.dots, (single[0] + single[1]) / 2)
    with pytest.raises(RuntimeError, match="vmap"):
        gf.tracin(looks, points, x, x, method="vmap")

    module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    model_fn, params = gf.functionalize(module, gf.classification_loss)
    batch = torch.randn(N, 4), torch.randint(3, (N,))
    torch.manual_seed(5)
    result = gf.tracin(model_fn, [params, params], batch, batch)
    assert result.method == "loop"
    torch.manual_seed(5)  # each checkpoint draws anew, and choosing the method drew nothing
    single = [gf.ghost_grad_dot(model_fn, params, batch, batch) for _ in range(2)]
    assert not torch.equal(*single)
    torch.testing.assert_close(result.dots, (single[0] + single[1]) / 2)


def test_files_one_at_a_time(tmp_path: Path) -> None:
    case = BY_NAME["gpt2 tied"].make(DOUBLE, CPU)
    train, val, points = case.batch(N, 1), case.batch(M, 2), checkpoints_of(case.params)
    paths = [tmp_path / f"{k}.safetensors" for k in range(3)]
    for path, point in zip(paths, points, strict=True):
        save_file(point, path)
    result = gf.tracin(case.model_fn, paths, train, val, params=case.params, learning_rates=RATES)
    assert (result.checkpoints, result.method) == (3, "loop")
    assert_dots(result.dots, reference(case, points, RATES), TOLERANCE[DOUBLE], "from files")

    def as_it_goes() -> Iterator[Any]:
        for path, point in zip(paths, points, strict=True):
            yield str(path)
            path.unlink()  # it has been used: no file is read again
            yield point

    mixed = gf.tracin(case.model_fn, as_it_goes(), train, val)
    assert mixed.checkpoints == 6
    assert_dots(mixed.dots, reference(case, points, [1 / 3] * 3), TOLERANCE[DOUBLE], "files and dicts")


def test_one_checkpoint_is_ghost_grad_dot() -> None:
    case = mlp(DOUBLE, CPU)
    train, val = case.batch(N, 1), case.batch(M, 2)
    before = {name: p.clone() for name, p in case.params.items()}

    def with_aux(p: Params, batch: Any) -> tuple[Tensor, Tensor]:
        losses = case.model_fn(p, batch)
        return losses, losses

    plain = gf.ghost_grad_dot(case.model_fn, case.params, train, val)
    for method in ("vmap", "loop"):
        torch.testing.assert_close(gf.tracin(case.model_fn, [case.params], train, val, method=method).dots, plain)
        options: dict[str, Any] = {"has_aux": True, "method": method}
        torch.testing.assert_close(gf.tracin(with_aux, [case.params], train, val, **options).dots, plain)
    assert all(torch.equal(p, before[name]) for name, p in case.params.items())


@pytest.mark.parametrize("method", ["auto", "vmap", "loop"])
def test_checkpoints_that_differ(method: str) -> None:
    case = mlp(DOUBLE, CPU)
    train, val, params = case.batch(N, 1), case.batch(M, 2), case.params

    def run(points: Any, **options: Any) -> Any:
        return gf.tracin(case.model_fn, points, train, val, method=method, **options)

    without = {name: p for name, p in params.items() if name != "2.bias"}
    with pytest.raises(ValueError, match=r"checkpoint 1 lacks 2\.bias; every checkpoint must have the entries 0\.weig"):
        run([params, without])
    with pytest.raises(ValueError, match=r"checkpoint 0 lacks 2\.bias"):
        run([without, params], params=params)
    with pytest.raises(ValueError, match=r"checkpoint 1 also has running_mean; .*stays in the module"):
        run([params, {**params, "running_mean": torch.zeros(3)}])
    with pytest.raises(ValueError, match=r"checkpoint 1 has '0\.bias' of shape \(9,\); expected \(8,\)"):
        run([params, {**params, "0.bias": torch.zeros(9)}])
    with pytest.raises(ValueError, match="there is no checkpoint"):
        run([])
    with pytest.raises(ValueError, match="there is no checkpoint"):
        run({})
    with pytest.raises(ValueError, match=r"learning_rates has 3 numbers for 2 checkpoints"):
        run([params, params], learning_rates=RATES)
    with pytest.raises(ValueError, match=r"learning_rates has 3 numbers"):
        run([params] * 4, learning_rates=RATES)
    with pytest.raises(ValueError, match="learning_rates must be finite"):
        run([params], learning_rates=[float("nan")])
    with pytest.raises(ValueError, match=r"\[K, \*shape\] with one K; .*Pass a list"):
        run(params)
    with pytest.raises(ValueError, match=r"has '0\.weight' of shape \(8, 5\); expected \(3, 5\)"):
        run(stacked([params, params]), params={**params, "0.weight": torch.zeros(3, 5)})


def test_files_that_are_none(tmp_path: Path) -> None:
    case = mlp(DOUBLE, CPU)
    train, val = case.batch(N, 1), case.batch(M, 2)
    path = tmp_path / "model.bin"
    with path.open("wb") as file:
        pickle.dump(Bomb(), file)
    with pytest.raises(ValueError, match=r"model\.bin is no safetensors file .*save_file.*nothing is unpickled"):
        gf.tracin(case.model_fn, [path], train, val)
    with pytest.raises(ValueError, match=r"checkpoints is one path, .*model\.bin'; pass a list"):
        gf.tracin(case.model_fn, str(path), train, val)
    with pytest.raises(FileNotFoundError, match="not_there"):
        gf.tracin(case.model_fn, [tmp_path / "not_there.safetensors"], train, val)
    with pytest.raises(ValueError, match="method='fast'"):
        gf.tracin(case.model_fn, [case.params], train, val, method="fast")


class Bomb:
    """Goes off when it is unpickled."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("a checkpoint was unpickled",)


def test_losses_that_are_not_finite() -> None:
    """The loop names the samples, and auto goes there; under vmap no value can be looked at but the result's."""
    case = mlp(DOUBLE, CPU)
    (x, y), val = case.batch(N, 1), case.batch(M, 2)
    x[2, 0] = float("nan")
    for method in ("auto", "loop"):
        with pytest.raises(ValueError, match=r"train batch: the losses of samples \[2\] are not finite"):
            gf.tracin(case.model_fn, [case.params] * 2, (x, y), val, method=method)
    with pytest.raises(ValueError, match="are not finite; method='loop' tells"):
        gf.tracin(case.model_fn, [case.params] * 2, (x, y), val, method="vmap")
