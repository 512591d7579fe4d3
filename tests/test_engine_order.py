"""The engine's values of both orders: as in the equation, in the log, and refused where they would be wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import TASKS, Task, batches, dots_by_loop, flat_grad, gpt2, mlp, validation
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ghostfunc import classification_loss
from ghostfunc.dotlog import DotLog, read_dot_log
from ghostfunc.engine import GhostEngineManager, GradDotProdEngine
from ghostfunc.ledger import InRunShapley

LR = 0.3


def sgd(model: nn.Module, lr: Any = LR) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def engine_of(task: Task, model: nn.Module, *, order: int = 2, lr: Any = LR, **options: Any) -> GradDotProdEngine:
    return GradDotProdEngine(model, validation(task), loss=task.loss, optimizer=sgd(model, lr), order=order, **options)


def interactions_by_loop(task: Task, model: nn.Module, X: Tensor, Y: Tensor) -> Tensor:
    """g_i^T H sum_j g_j by one plain backward per sample and a double backward of the validation loss."""
    parameters = list(model.parameters())
    rows = [flat_grad(model, task.losses(model, X[i : i + 1], Y[i : i + 1]).mean()) for i in range(len(X))]
    with sdpa_kernel(SDPBackend.MATH):
        val_loss = task.losses(model, *validation(task)).mean()
        first = torch.cat([g.flatten() for g in torch.autograd.grad(val_loss, parameters, create_graph=True)])
        product = torch.autograd.grad(first @ sum(rows), parameters)
    return torch.stack(rows) @ torch.cat([p.flatten() for p in product])


@pytest.mark.parametrize("name", TASKS)
def test_values_are_those_of_the_equation_and_the_gradient_stays_the_plain_one(name: str) -> None:
    task = TASKS[name]
    model = task.make()
    X, Y, _ = next(batches(task))
    engine = engine_of(task, model)
    output = engine(X, Y)
    output.loss.backward()
    n = len(X)
    dots, h = dots_by_loop(task, model, X, Y), interactions_by_loop(task, model, X, Y)
    torch.testing.assert_close(engine.dots, dots, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(engine.second_order, -0.5 * (LR / n) ** 2 * h, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(engine.values, LR / n * dots + engine.second_order, rtol=1e-10, atol=1e-12)
    assert (engine.second_order.abs() > 1e-3 * engine.values.abs()).any()  # or the above would say nothing of it
    assert output.values is engine.values and output.second_order is engine.second_order
    deposited = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(deposited, flat_grad(model, task.losses(model, X, Y).mean()), rtol=1e-10, atol=1e-12)


def test_order_one_has_first_order_values_and_no_second() -> None:
    task = TASKS["mlp"]
    model = task.make()
    X, Y, _ = next(batches(task))
    engine = engine_of(task, model, order=1)
    output = engine(X, Y)
    torch.testing.assert_close(engine.values, LR / len(X) * engine.dots)
    assert engine.second_order is None and output.second_order is None
    for out in ("param train", "train val"):
        other = engine_of(task, model, order=1, out=out)
        other(X, Y)
        torch.testing.assert_close(other.values, engine.values)
    without = GradDotProdEngine(model, validation(task), loss=task.loss)
    assert without(X, Y).values is None and without.values is None


def test_the_values_of_a_step_foretell_what_it_does_better_to_second_order() -> None:
    task = TASKS["mlp"]
    model = task.make()
    X, Y, _ = next(batches(task))
    engine = engine_of(task, model)
    before = task.losses(model, *validation(task)).mean().item()
    engine(X, Y).loss.backward()
    assert engine.optimizer is not None
    engine.optimizer.step()
    decrease = before - task.losses(model, *validation(task)).mean().item()
    assert engine.values is not None and engine.second_order is not None
    first, both = (engine.values - engine.second_order).sum().item(), engine.values.sum().item()
    assert abs(both - decrease) < 0.2 * abs(first - decrease)


def test_the_learning_rate_is_read_at_each_call_and_may_be_a_tensor_or_zero() -> None:
    task = TASKS["mlp"]
    model = task.make()
    X, Y, _ = next(batches(task))
    engine = engine_of(task, model, lr=torch.tensor(LR))
    engine(X, Y)
    first, second = engine.values - engine.second_order, engine.second_order
    engine.optimizer.param_groups[0]["lr"] = torch.tensor(2 * LR)
    engine(X, Y)
    torch.testing.assert_close(engine.values, 2 * first + 4 * second, rtol=1e-5, atol=0)
    engine.optimizer.param_groups[0]["lr"] = 0.0
    engine(X, Y)
    assert (engine.values == 0).all() and (engine.dots != 0).all()


def test_a_parameter_that_the_loss_does_not_depend_on_keeps_no_gradient() -> None:
    task = TASKS["mlp"]

    class WithSpare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.spare = mlp(), nn.Linear(2, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    model = WithSpare()
    X, Y, _ = next(batches(task))
    engine_of(task, model)(X, Y).loss.backward()
    assert model.spare.weight.grad is None
    assert model.body[0].weight.grad is not None


def test_a_precondition_is_in_the_values() -> None:
    task = TASKS["mlp"]
    model = task.make()
    X, Y, _ = next(batches(task))
    plain = engine_of(task, model)
    halved = engine_of(task, model, precondition=lambda v: {name: 0.5 * t for name, t in v.items()})
    plain(X, Y), halved(X, Y)
    torch.testing.assert_close(halved.dots, 0.5 * plain.dots)
    torch.testing.assert_close(halved.second_order, 0.25 * plain.second_order)
    torch.testing.assert_close(halved.values, 0.5 * (LR / len(X)) * plain.dots + 0.25 * plain.second_order)


def test_micro_batches_are_refused_where_the_engine_can_tell() -> None:
    task = TASKS["mlp"]
    model = task.make()
    engine = engine_of(task, model)
    X, Y, ids = next(batches(task))
    for iteration in range(2):
        engine.attach_train_batch(X, Y, iteration, ids)
        engine(X, Y)
    engine.attach_train_batch(X, Y, 1, ids)
    with pytest.raises(ValueError, match=r"order=2 needs the whole batch .* second call of one iteration"):
        engine(X, Y)


def test_what_order_two_cannot_do_is_refused() -> None:
    task = TASKS["mlp"]
    model = task.make()
    with pytest.raises(ValueError, match="order=3: expected 1"):
        engine_of(task, model, order=3)
    with pytest.raises(ValueError, match="order=2 needs optimizer="):
        GradDotProdEngine(model, validation(task), loss=task.loss, order=2)
    for options in ({"out": "train val"}, {"schedule": "joint"}):
        with pytest.raises(ValueError, match="order=2 takes neither"):
            engine_of(task, model, **options)
    X, Y, _ = next(batches(task))
    with (
        torch.autocast("cpu", dtype=torch.float16),
        pytest.raises(NotImplementedError, match="order=2 under float16 autocast"),
    ):
        engine_of(task, model)(X, Y)


def test_bfloat16_autocast_gives_values_to_its_precision() -> None:
    task = TASKS["gpt2"]
    model = gpt2(torch.float32)
    X, Y, _ = next(batches(task))
    engine = engine_of(task, model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        engine(X, Y)
    rough = engine.values, engine.second_order
    engine(X, Y)
    for found, exact in zip(rough, (engine.values, engine.second_order), strict=True):
        assert (found - exact).norm() < 0.05 * exact.norm()
        assert not torch.equal(found, exact)


@pytest.mark.parametrize("where", ["training", "validation"])
def test_a_loss_that_is_not_finite_names_its_sample(where: str) -> None:
    task = TASKS["mlp"]
    X, Y, _ = next(batches(task))
    (X if where == "training" else (val := validation(task))[0])[1, 0] = float("nan")
    model = task.make()
    batch = validation(task) if where == "training" else val
    engine = GradDotProdEngine(model, batch, loss=task.loss, optimizer=sgd(model), order=2)
    engine.attach_train_batch(X, Y, 0, [("law", i) for i in range(4)])
    with pytest.raises(FloatingPointError, match="sample 1 of law" if where == "training" else "position 1"):
        engine(X, Y)
    assert engine.values is None


def test_the_log_has_the_second_order_and_becomes_a_ledger(tmp_path: Path) -> None:
    task = TASKS["mlp"]
    model = task.make()
    engine = engine_of(task, model, log=DotLog(tmp_path, config={"order": 2}))
    direct = InRunShapley()
    for iteration, (X, Y, _) in zip(range(3), batches(task), strict=False):
        ids = [("law", (iteration + i) % 5) for i in range(len(X))]
        engine.attach_train_batch(X, Y, iteration, ids)
        engine(X, Y).loss.backward()
        direct.add(ids, engine.values, iteration=iteration, second_order=engine.second_order)
        engine.optimizer.step()
        engine.optimizer.zero_grad()
    engine.cleanup()
    table = read_dot_log(tmp_path)
    assert table.column_names[-1] == "second_order" and str(table.schema.field("second_order").type) == "double"
    assert table["second_order"].to_pylist()[-4:] == engine.second_order.tolist()
    logged = InRunShapley.from_dot_log(tmp_path).by_sample()
    for column in ("value", "second_order"):
        assert logged[column].to_pylist() == pytest.approx(direct.by_sample()[column].to_pylist(), rel=1e-12)
    assert logged["visits"].equals(direct.by_sample()["visits"])
    assert any(logged["second_order"].to_pylist())


def test_a_log_with_the_column_in_some_files_has_nulls_in_the_others(tmp_path: Path) -> None:
    row = {"sample_ids": [1], "domains": [""], "losses": [0.0], "learning_rate": 1.0, "dots": [2.0]}
    log = DotLog(tmp_path, config={})
    log.append(iteration=0, **row)
    log.save()
    assert "second_order" not in read_dot_log(tmp_path).column_names  # as logs always were
    log.append(iteration=1, **row)
    log.append(iteration=2, **row, second_order=torch.tensor([-0.5]))
    log.save()
    assert read_dot_log(tmp_path)["second_order"].to_pylist() == [None, None, -0.5]
    assert InRunShapley.from_dot_log(tmp_path).by_sample()["value"].to_pylist() == [5.5]
    log.resume(2)
    assert read_dot_log(tmp_path)["second_order"].to_pylist() == [None, None]
    with pytest.raises(ValueError, match="dot 1, second_order 2"):
        log.append(iteration=3, **row, second_order=[0.0, 0.0])


def test_the_manager_reads_the_order(tmp_path: Path) -> None:
    task = TASKS["mlp"]
    model = task.make()
    X, Y, ids = next(batches(task))
    config = {"order": 2, "result_dir": tmp_path}
    manager = GhostEngineManager(config, model, sgd(model), val_data=validation(task), loss=classification_loss)
    manager.attach_train_batch(X, Y, 0, ids)
    manager(X, Y).loss.backward()
    manager.cleanup()
    assert read_dot_log(tmp_path)["second_order"].to_pylist() == manager.second_order.tolist()
    regular = GhostEngineManager(config | {"method": "Regular"}, model, sgd(model), loss=classification_loss)
    assert regular(X, Y).values is None and regular.values is None
