"""The engine in the seeds' loops, line for line: `.grad` is a plain step's, and every micro-batch's dots are kept."""

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from ghostfunc import causal_lm_loss, classification_loss
from ghostfunc.dotlog import DotLog, read_dot_log
from ghostfunc.engine import GhostEngineManager, GradDotProdEngine

VOCAB, BLOCK, CLASSES = 64, 8, 3


class Task(NamedTuple):
    """A model with its data, and its per-sample losses written without ghostfunc."""

    make_model: Callable[[], nn.Module]
    draw_samples: Callable[[torch.Generator, int], tuple[Tensor, Tensor]]
    losses: Callable[[nn.Module, Tensor, Tensor], Tensor]
    loss: Callable[[Any, Any], Tensor]
    device: torch.device = torch.device("cpu")

    def make(self) -> nn.Module:
        return self.make_model().to(self.device)

    def draw(self, generator: torch.Generator, n: int) -> tuple[Tensor, Tensor]:
        X, Y = self.draw_samples(generator, n)
        return X.to(self.device), Y.to(self.device)


def gpt2(dtype: torch.dtype = torch.float64, **config: Any) -> nn.Module:
    torch.manual_seed(1)
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": VOCAB, "n_positions": BLOCK}
    return GPT2LMHeadModel(GPT2Config(**(sizes | dropout | {"bos_token_id": 0, "eos_token_id": 0} | config))).to(dtype)


def mlp(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, CLASSES)).to(dtype)


def draw_text(generator: torch.Generator, n: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(VOCAB, (n, BLOCK), generator=generator)
    return ids, ids.clone()


def draw_points(generator: torch.Generator, n: int) -> tuple[Tensor, Tensor]:
    X = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return X, torch.randint(CLASSES, (n,), generator=generator)


def text_losses(model: nn.Module, X: Tensor, Y: Tensor) -> Tensor:
    logits = model(input_ids=X).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), Y[:, 1:], reduction="none").mean(1)


def point_losses(model: nn.Module, X: Tensor, Y: Tensor) -> Tensor:
    return F.cross_entropy(model(X), Y, reduction="none")


TASKS = {
    "gpt2": Task(gpt2, draw_text, text_losses, causal_lm_loss),
    "mlp": Task(mlp, draw_points, point_losses, classification_loss),
}


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest, device: torch.device) -> Task:
    return TASKS[request.param]._replace(device=device)


def batches(task: Task, n: int = 4) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless (X, Y, batch_idx), the same for every caller."""
    generator = torch.Generator().manual_seed(2)
    while True:
        X, Y = task.draw(generator, n)
        yield X, Y, torch.randint(1000, (n,), generator=generator)


def validation(task: Task, m: int = 3) -> tuple[Tensor, Tensor]:
    return task.draw(torch.Generator().manual_seed(3), m)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def manager(task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, **config: Any) -> GhostEngineManager:
    return GhostEngineManager(
        config=argparse.Namespace(**({"method": "GradDotProd"} | config)),
        model=model,
        optimizer=optimizer,
        ddp_info={"master_process": True},
        val_data=validation(task),
        loss=task.loss,
    )


def flat_grad(model: nn.Module, loss: Tensor) -> Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def dots_by_loop(task: Task, model: nn.Module, X: Tensor, Y: Tensor) -> Tensor:
    """One plain backward per training sample, and one for the validation batch."""
    direction = flat_grad(model, task.losses(model, *validation(task)).mean())
    rows = [flat_grad(model, task.losses(model, X[i : i + 1], Y[i : i + 1]).mean()) for i in range(len(X))]
    return torch.stack(rows) @ direction


def assert_same_parameters(model: nn.Module, other: nn.Module, atol: float) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


# The seeds' loops


def short_loop(task: Task, model: nn.Module, steps: int, call: str = "keywords", **config: Any) -> GhostEngineManager:
    optimizer = adamw(model)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=steps)
    get_batch = batches(task).__next__
    val_data = validation(task)
    config = argparse.Namespace(**({"method": "GradDotProd"} | config))

    ghost_engine = GhostEngineManager(
        config=config, model=model, optimizer=optimizer, val_data=val_data, loss=task.loss
    )
    for iteration in range(steps):
        X_train, Y_train, batch_idx = get_batch()
        ghost_engine.attach_train_batch(X_train, Y_train, iteration, batch_idx)
        X_forward, Y_forward = ghost_engine.prepare_forward_input(X_train, Y_train)
        if call == "keywords":
            outputs = ghost_engine(input_ids=X_forward, labels=Y_forward)
            loss = outputs.loss
        else:
            loss = ghost_engine(X_forward, Y_forward).loss
        loss.backward()
        ghost_engine.prepare_gradients()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        ghost_engine.aggregate_and_log()
        ghost_engine.clear_gradients()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        if ghost_engine.should_save_metrics(iteration):
            ghost_engine.save_metrics(iteration)
    ghost_engine.cleanup()
    return ghost_engine


def plain_short_loop(task: Task, model: nn.Module, steps: int) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
    """The loop without an engine; yields each batch and learning rate while the model is as the engine saw it."""
    optimizer = adamw(model)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=steps)
    source = batches(task)
    for _ in range(steps):
        X, Y, batch_idx = next(source)
        yield X, Y, batch_idx, optimizer.param_groups[0]["lr"]
        task.losses(model, X, Y).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()


@pytest.mark.parametrize("call", ["keywords", "positions"])
def test_twenty_steps_of_the_short_loop_equal_twenty_plain_steps(task: Task, call: str, tmp_path: Path) -> None:
    model, plain = task.make(), task.make()
    short_loop(task, model, 20, call, result_dir=str(tmp_path), dot_prod_save_interval=3)

    log = read_dot_log(tmp_path)
    logged = log.to_pydict()
    for iteration, (X, Y, batch_idx, learning_rate) in enumerate(plain_short_loop(task, plain, 20)):
        rows = slice(4 * iteration, 4 * iteration + 4)
        assert logged["iteration"][rows] == [iteration] * 4
        assert logged["sample_id"][rows] == batch_idx.tolist()
        assert logged["learning_rate"][rows] == [learning_rate] * 4
        losses = torch.tensor(logged["loss"][rows], dtype=torch.float64, device=task.device)
        torch.testing.assert_close(losses, task.losses(plain, X, Y).detach(), rtol=1e-6, atol=0)  # stored as float32
        dots = torch.tensor(logged["dot"][rows], dtype=torch.float64, device=task.device)
        torch.testing.assert_close(dots, dots_by_loop(task, plain, X, Y), rtol=1e-7, atol=1e-8)
    assert log.num_rows == 80
    assert_same_parameters(model, plain, atol=1e-8)


@pytest.mark.parametrize("aggregate", ["before prepare_gradients", "after prepare_gradients"])
def test_the_long_loop_accumulates_scales_and_evaluates(task: Task, aggregate: str, tmp_path: Path) -> None:
    k, steps = 3, 4
    model, plain = task.make(), task.make()
    optimizer = adamw(model)
    scaler = torch.amp.GradScaler(task.device.type)
    source = batches(task)

    ghost_engine = manager(task, model, optimizer, result_dir=tmp_path, dot_prod_save_interval=2)
    evaluations = []
    for iteration in range(steps):
        if iteration % 2 == 0:
            ghost_engine.detach_for_evaluation()
            model.eval()
            with torch.no_grad():
                evaluations.append(task.losses(model, *validation(task)).mean().item())
            model.train()
            ghost_engine.reattach_after_evaluation()
        for _ in range(k):
            X, Y, batch_idx = next(source)
            ghost_engine.attach_train_batch(X, Y, iteration, batch_idx)
            Xf, Yf = ghost_engine.prepare_forward_input(X, Y)
            outputs = ghost_engine(input_ids=Xf, labels=Yf)
            loss = outputs.loss / k
            scaler.scale(loss).backward()
            if aggregate == "before prepare_gradients":
                ghost_engine.aggregate_and_log()
        ghost_engine.prepare_gradients()
        if aggregate == "after prepare_gradients":
            ghost_engine.aggregate_and_log()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        ghost_engine.clear_gradients()
        optimizer.zero_grad(set_to_none=True)
        if ghost_engine.should_save_metrics(iteration):
            ghost_engine.save_metrics(iteration)
    ghost_engine.cleanup()
    ghost_engine.cleanup()  # a second time changes nothing

    optimizer = adamw(plain)
    source = batches(task)
    reference = []
    for _ in range(steps):
        for _ in range(k):
            X, Y, _ = next(source)
            reference.append(dots_by_loop(task, plain, X, Y))
            (task.losses(plain, X, Y).mean() / k).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert_same_parameters(model, plain, atol=1e-8)
    assert len(evaluations) == 2

    log = read_dot_log(tmp_path / "dot_log").to_pydict()
    assert log["iteration"] == [i for i in range(steps) for _ in range(k * 4)]
    assert log["micro_step"] == [j for _ in range(steps) for j in range(k) for _ in range(4)]
    dots = torch.tensor(log["dot"], dtype=torch.float64, device=task.device)
    torch.testing.assert_close(dots, torch.cat(reference), rtol=1e-7, atol=1e-8)  # neither scaled nor divided by k


def test_regular_runs_the_same_loops_without_dots(task: Task, tmp_path: Path) -> None:
    model, plain = task.make(), task.make()
    ghost_engine = short_loop(task, model, 5, method="Regular", result_dir=str(tmp_path))
    for _ in plain_short_loop(task, plain, 5):
        pass
    assert_same_parameters(model, plain, atol=1e-12)
    assert ghost_engine.dots is None
    assert not ghost_engine.should_save_metrics(0)
    assert list(tmp_path.iterdir()) == []


# The gradient and the dots of one call


@pytest.mark.parametrize("name", TASKS)
def test_grad_in_float32_is_a_plain_step_s(name: str) -> None:
    task = TASKS[name]
    model = task.make().float()
    X, Y, _ = next(batches(task))
    X, X_val = (x if name == "gpt2" else x.float() for x in (X, validation(task)[0]))
    engine = GradDotProdEngine(model, (X_val, validation(task)[1]), loss=task.loss)
    engine(X, Y).loss.backward()
    deposited = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    task.losses(model, X, Y).mean().backward()
    for (name, p), grad in zip(model.named_parameters(), deposited, strict=True):
        assert (grad - p.grad).norm() <= 1e-6 * p.grad.norm() + 1e-8, name


def test_the_output_and_the_engine_hold_the_same_results(task: Task) -> None:
    model = task.make()
    engine = GradDotProdEngine(model, validation(task), loss=task.loss)
    assert engine.dots is None
    X, Y, _ = next(batches(task))
    output = engine(X, Y)
    torch.testing.assert_close(output.losses, task.losses(model, X, Y).detach())
    torch.testing.assert_close(output.val_losses, task.losses(model, *validation(task)).detach())
    torch.testing.assert_close(output.loss.detach(), output.losses.mean())
    assert engine.dots is output.dots
    assert engine.losses is output.losses
    assert not output.dots.requires_grad


def test_dots_by_parameter_are_logged_as_their_sum(task: Task, tmp_path: Path) -> None:
    model = task.make()
    engine = manager(task, model, adamw(model), out="param train", result_dir=tmp_path)
    X, Y, batch_idx = next(batches(task))
    engine.attach_train_batch(X, Y, 0, batch_idx)
    output = engine(X, Y)
    engine.save_metrics(0)
    assert output.dots.keys() == {name for name, _ in model.named_parameters()}
    total = torch.stack(list(output.dots.values())).sum(0)
    torch.testing.assert_close(total, dots_by_loop(task, model, X, Y), rtol=1e-7, atol=1e-8)
    assert read_dot_log(tmp_path)["dot"].to_pylist() == total.tolist()


def test_dots_by_validation_sample_are_logged_as_their_mean(task: Task, tmp_path: Path) -> None:
    model = task.make()
    engine = manager(task, model, adamw(model), out="train val", result_dir=tmp_path)
    X, Y, batch_idx = next(batches(task))
    engine.attach_train_batch(X, Y, 0, batch_idx)
    output = engine(X, Y)
    engine.save_metrics(0)
    assert output.dots.shape == (4, 3)
    torch.testing.assert_close(output.dots.mean(1), dots_by_loop(task, model, X, Y), rtol=1e-7, atol=1e-8)
    assert read_dot_log(tmp_path)["dot"].to_pylist() == output.dots.mean(1).tolist()


def test_layers_restrict_the_dots_and_not_the_gradient() -> None:
    task = TASKS["mlp"]
    model = task.make()
    engine = GradDotProdEngine(model, validation(task), loss=task.loss, out="param train", layers="2")
    X, Y, _ = next(batches(task))
    output = engine(X, Y)
    output.loss.backward()
    assert output.dots.keys() == {"2.weight", "2.bias"}
    grad = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(grad, flat_grad(model, task.losses(model, X, Y).mean()))


def test_keywords_of_a_model_with_a_mask_reach_it() -> None:
    model = gpt2()
    ids = torch.randint(VOCAB, (3, BLOCK))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    engine = GradDotProdEngine(model, {"input_ids": ids[:2], "attention_mask": mask[:2], "labels": labels[:2]})
    by_keywords = engine(input_ids=ids, attention_mask=mask, labels=labels)
    as_dict = engine({"input_ids": ids, "attention_mask": mask}, labels)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].transpose(1, 2)
    token_losses = F.cross_entropy(logits, labels[:, 1:], reduction="none", ignore_index=-100)
    expected = token_losses.sum(1) / (labels[:, 1:] != -100).sum(1)
    torch.testing.assert_close(by_keywords.losses, expected.detach())
    torch.testing.assert_close(as_dict.dots, by_keywords.dots)


def test_a_loss_and_a_call_of_ones_own() -> None:
    task = TASKS["mlp"]
    model = task.make()
    X = next(batches(task))[0]
    engine = GradDotProdEngine(
        model,
        X[:2],  # no labels: an autoencoder's batch, a plain tensor
        loss=lambda output, batch: ((output - batch[:, :CLASSES]) ** 2).sum(1),
        call=lambda module, batch: module(2 * batch),
    )
    torch.testing.assert_close(engine(X).losses, ((model(2 * X) - X[:, :CLASSES]) ** 2).sum(1).detach())


def test_freezing_and_moving_between_calls_are_seen() -> None:
    task = TASKS["mlp"]
    model = task.make()
    engine = GradDotProdEngine(model, validation(task), loss=task.loss)
    X, Y, _ = next(batches(task))
    engine(X, Y)
    model[0].requires_grad_(False)
    engine(X, Y).loss.backward()
    assert model[0].weight.grad is None
    assert model[2].weight.grad is not None
    torch.testing.assert_close(engine.dots, dots_by_loop(task, model, X, Y))
    model.zero_grad()
    model.float()
    engine.update_validation_batch(validation(task)[0].float(), validation(task)[1])
    engine(X.float(), Y).loss.backward()
    assert engine.dots.dtype == model[2].weight.grad.dtype == torch.float32


def test_update_validation_batch_changes_the_direction() -> None:
    task = TASKS["mlp"]
    model = task.make()
    X, Y, _ = next(batches(task))
    engine = GradDotProdEngine(model, (X, Y), loss=task.loss)
    before = engine(X, Y).dots
    engine.update_validation_batch(*validation(task))
    after = engine(X, Y).dots
    torch.testing.assert_close(after, dots_by_loop(task, model, X, Y))
    assert not torch.allclose(before, after)


def test_dropout_draws_what_a_plain_step_draws() -> None:
    task = TASKS["gpt2"]
    model = gpt2(resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    assert model.train().training
    X, Y, _ = next(batches(task))
    engine = GradDotProdEngine(model, validation(task))
    torch.manual_seed(5)
    engine(X, Y).loss.backward()
    torch.manual_seed(5)
    plain = flat_grad(model, task.losses(model, X, Y).mean())
    deposited = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (deposited - plain).norm() <= 1e-6 * plain.norm()


# Precision


def test_bfloat16_autocast_around_the_call_simply_works() -> None:
    model = gpt2(torch.float32)
    task = TASKS["gpt2"]
    X, Y, _ = next(batches(task))
    seen = []

    def call(module: nn.Module, batch: Any) -> Any:
        output = module(input_ids=batch["input_ids"])
        seen.append(output.logits.dtype)
        return output

    engine = GradDotProdEngine(model, validation(task), call=call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = engine(X, Y).loss
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")
    loss.backward()
    assert set(seen) == {torch.bfloat16}
    deposited = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert deposited.dtype == torch.float32

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = task.losses(model, X, Y).mean()
    plain = flat_grad(model, loss)
    assert (deposited - plain).norm() < 1e-2 * plain.norm()
    exact = dots_by_loop(task, model, X, Y)
    scale = flat_grad(model, task.losses(model, X, Y).mean()).norm() ** 2
    assert (engine.dots - exact).abs().max() < 2e-2 * scale


@pytest.mark.parametrize("size", [1e-7, 1e3])
def test_float16_autocast_neither_loses_small_gradients_nor_overflows(size: float) -> None:
    task = TASKS["mlp"]
    model = mlp(torch.float32)
    X, Y, _ = next(batches(task))
    X, X_val = X.float(), validation(task)[0].float()
    engine = GradDotProdEngine(
        model,
        (X_val, validation(task)[1]),
        loss=lambda output, batch: size * classification_loss(output.float(), batch),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu")
    with torch.autocast("cpu", dtype=torch.float16):
        output = engine(X, Y)
    scaler.scale(output.loss).backward()
    scaler.unscale_(optimizer)
    deposited = torch.cat([p.grad.flatten() for p in model.parameters()])
    exact = size * flat_grad(model, task.losses(model, X, Y).mean())
    assert (deposited - exact).norm() < 1e-2 * exact.norm()
    direction = size * flat_grad(model, task.losses(model, X_val, validation(task)[1]).mean())
    rows = [size * flat_grad(model, task.losses(model, X[i : i + 1], Y[i : i + 1]).mean()) for i in range(len(X))]
    for dot, row in zip(output.dots, rows, strict=True):
        assert abs(dot - row @ direction) < 1e-2 * row.norm() * direction.norm()
    torch.testing.assert_close(output.losses, size * task.losses(model, X, Y).detach(), rtol=1e-2, atol=0)


# The log


def test_domains_come_as_names_or_as_pairs(tmp_path: Path) -> None:
    task = TASKS["mlp"]
    model = task.make()
    engine = manager(task, model, adamw(model), result_dir=tmp_path)
    X, Y, _ = next(batches(task))
    engine.attach_train_batch(X, Y, 0, [("law", 7), ("code", 5), ("law", 0), ("law", 1)])
    engine(X, Y)
    engine.attach_train_batch(X, Y, 1, torch.arange(4), domains=["a", "b", "c", "d"])
    engine(X, Y)
    engine.attach_train_batch(X, Y, 2, range(4))
    engine(X, Y)
    engine.cleanup()
    log = read_dot_log(tmp_path).to_pydict()
    assert log["domain"] == ["law", "code", "law", "law", "a", "b", "c", "d", "", "", "", ""]
    assert log["sample_id"] == [7, 5, 0, 1, 0, 1, 2, 3, 0, 1, 2, 3]


def test_the_log_keeps_the_configuration_and_the_validation_batch(tmp_path: Path) -> None:
    import json

    from safetensors.torch import load_file

    task = TASKS["gpt2"]

    @dataclasses.dataclass
    class Config:
        result_dir: Path = tmp_path
        learning_rate: float = 0.1
        model_dtype: torch.dtype = torch.float32
        anything: object = dataclasses.field(default_factory=object)

    model = task.make()
    GhostEngineManager(Config(), model, adamw(model), val_data=validation(task))
    stored = json.loads((tmp_path / "dot_log" / "config.json").read_text())
    assert stored == {"result_dir": str(tmp_path), "learning_rate": 0.1, "model_dtype": "torch.float32"}
    val_batch = load_file(tmp_path / "dot_log" / "val_batch.safetensors")
    assert torch.equal(val_batch["input_ids"], validation(task)[0])
    assert torch.equal(val_batch["labels"], validation(task)[1])


def test_a_process_that_is_not_the_master_writes_no_log(tmp_path: Path) -> None:
    task = TASKS["mlp"]
    model = task.make()
    config = {"method": "GradDotProd", "result_dir": tmp_path}
    ddp_info = {"master_process": False}
    engine = GhostEngineManager(config, model, adamw(model), ddp_info, validation(task), loss=task.loss)
    engine(*next(batches(task))[:2]).loss.backward()
    engine.cleanup()
    assert list(tmp_path.iterdir()) == []


def test_metrics_are_saved_at_multiples_of_the_interval(tmp_path: Path) -> None:
    task = TASKS["mlp"]
    short_loop(task, task.make(), 7, result_dir=str(tmp_path), dot_prod_save_interval=3)
    files = sorted(path.name for path in (tmp_path / "dot_log").glob("*.parquet"))
    assert files == [f"dots-{first:012d}-000000.parquet" for first in (0, 1, 4)]


# Misuse


@pytest.fixture
def ready(tmp_path: Path) -> tuple[GhostEngineManager, Tensor, Tensor]:
    """An MLP's engine with a log, and a batch of four that is not attached."""
    task = TASKS["mlp"]
    model = task.make()
    engine = manager(task, model, adamw(model), result_dir=tmp_path)
    return engine, *next(batches(task))[:2]


Ready = tuple[GhostEngineManager, Tensor, Tensor]


def test_a_call_without_an_attached_batch_is_refused_when_there_is_a_log(ready: Ready) -> None:
    engine, X, Y = ready
    with pytest.raises(RuntimeError, match=r"no attached batch: call attach_train_batch\("):
        engine(X, Y)
    engine.attach_train_batch(X, Y, 0, range(4))
    engine(X, Y)
    with pytest.raises(RuntimeError, match="micro-steps included"):
        engine(X, Y)


def test_a_batch_unlike_the_attached_one_is_refused(ready: Ready) -> None:
    engine, X, Y = ready
    engine.attach_train_batch(X, Y, 0, range(4))
    with pytest.raises(ValueError, match="called with 3 samples, but attach_train_batch was given 4"):
        engine(X[:3], Y[:3])


def test_ids_unlike_the_batch_in_number_are_refused(ready: Ready) -> None:
    engine, X, Y = ready
    with pytest.raises(ValueError, match="4 samples, but there are 3 ids in batch_idx and 3 domains"):
        engine.attach_train_batch(X, Y, 0, range(3))
    with pytest.raises(ValueError, match="4 ids in batch_idx and 1 domains"):
        engine.attach_train_batch(X, Y, 0, range(4), domains=["law"])
    with pytest.raises(ValueError, match=r"in batch_idx, as \(domain, offset\), or as domains="):
        engine.attach_train_batch(X, Y, 0, [("law", 1)] * 4, domains=["law"] * 4)


def test_preparing_gradients_that_are_not_there_is_refused(ready: Ready) -> None:
    engine, X, Y = ready
    with pytest.raises(RuntimeError, match="has not been called since"):
        engine.prepare_gradients()
    engine.attach_train_batch(X, Y, 0, range(4))
    engine(X, Y).loss.backward()
    engine.attach_train_batch(X, Y, 0, range(4))
    engine(X, Y)
    with pytest.raises(RuntimeError, match=r"loss\.backward\(\) ran 1 times for 2 engine calls"):
        engine.prepare_gradients()
    engine.clear_gradients()
    with pytest.raises(RuntimeError, match="has not been called since"):
        engine.prepare_gradients()


def test_a_second_backward_is_refused(ready: Ready) -> None:
    engine, X, Y = ready
    engine.attach_train_batch(X, Y, 0, range(4))
    loss = engine(X, Y).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran a second time"):
        loss.backward()


def test_a_call_while_detached_is_refused(ready: Ready) -> None:
    engine, X, Y = ready
    engine.detach_for_evaluation()
    with pytest.raises(RuntimeError, match="detached for evaluation"):
        engine(X, Y)
    engine.reattach_after_evaluation()
    engine.attach_train_batch(X, Y, 0, range(4))
    engine(X, Y)


def test_samples_that_are_not_finite_are_named_and_nothing_is_kept(ready: Ready) -> None:
    engine, X, Y = ready
    X = X.clone()
    X[2] = float("nan")
    engine.attach_train_batch(X, Y, 6, [("law", 11), ("law", 12), ("code", 13), ("law", 14)])
    with pytest.raises(FloatingPointError, match=r"training loss of 1 of 4 samples .* iteration 6: sample 13 of code"):
        engine(X, Y)
    assert engine.dots is None
    engine.cleanup()
    assert read_dot_log(engine.log.folder).num_rows == 0
    engine.log = None
    with pytest.raises(FloatingPointError, match=r"training loss .* not finite: position 2 \(nan\)"):
        engine(X, Y)


def test_validation_samples_and_dots_that_are_not_finite_are_told_apart(ready: Ready) -> None:
    engine, X, Y = ready
    engine.log = None
    X_val = X.clone()
    X_val[1] = float("inf")
    engine.update_validation_batch(X_val * 0, Y)
    with pytest.raises(
        FloatingPointError, match=r"validation loss of 1 of 4 samples is not finite: position 1 \(nan\)"
    ):
        engine(X, Y)
    with torch.no_grad():
        engine.module[2].weight.mul_(1e-150)  # a loss that is finite, with gradients whose product is not
    steep = GradDotProdEngine(
        engine.module, (X, Y), loss=lambda output, batch: 1e200 * classification_loss(output, batch)
    )
    with pytest.raises(FloatingPointError, match="the dot of 4 of 4 samples is not finite"):
        steep(X, Y)


def test_labels_of_a_wrong_shape_are_refused_with_both_shapes(ready: Ready) -> None:
    engine, X, Y = ready
    with pytest.raises(ValueError, match=r"shapes \[\(4, 5\), \(3,\)\]"):
        engine.attach_train_batch(X, Y[:3], 0, range(4))
    text = GradDotProdEngine(gpt2(), validation(TASKS["gpt2"]))
    ids = torch.zeros(2, BLOCK, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=r"labels of shape \(2, 7\) do not fit token ids of shape \(2, 8\).*not shifted"
    ):
        text(ids, ids[:, 1:])


def test_positions_and_keywords_together_are_refused(ready: Ready) -> None:
    engine, X, Y = ready
    with pytest.raises(TypeError, match="either X and Y or the model's keywords"):
        engine(X, labels=Y)


def test_a_missing_validation_batch_is_refused() -> None:
    task = TASKS["mlp"]
    model = task.make()
    with pytest.raises(ValueError, match=r"GradDotProd needs val_data=\(X_val, Y_val\)"):
        GhostEngineManager({"method": "GradDotProd"}, model, adamw(model))
    with pytest.raises(ValueError, match="no validation batch: pass val_batch"):
        GradDotProdEngine(model, None, loss=task.loss)(*next(batches(task))[:2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "GradDot"}, "unknown method 'GradDot'; expected one of 'GradDotProd', 'Regular'"),
        ({"out": "val train"}, "unknown out 'val train'; expected one of 'train', 'param train', 'train val'"),
        ({"schedule": "cosine"}, "unknown schedule 'cosine'; expected one of 'auto', 'joint', 'two-phase'"),
        ({"dot_prod_save_interval": 0}, "save_interval=0: expected"),
    ],
)
def test_unknown_options_are_refused_with_the_known_ones(options: dict[str, Any], message: str) -> None:
    task = TASKS["mlp"]
    model = task.make()
    with pytest.raises(ValueError, match=message):
        manager(task, model, adamw(model), **options)


def test_another_validation_batch_under_a_log_is_refused(ready: Ready) -> None:
    engine, X, Y = ready
    with pytest.raises(ValueError, match="stores one validation batch"):
        engine.update_validation_batch(X, Y)
    engine.log = DotLog(engine.log.folder.parent / "second", config={})
    with pytest.raises(ValueError, match="second stores one validation batch"):
        engine.update_validation_batch(X, Y)
    engine.log = None
    engine.update_validation_batch(X, Y)


def test_the_same_folder_with_another_configuration_is_refused(ready: Ready) -> None:
    engine, *_ = ready
    task = TASKS["mlp"]
    config = {"method": "GradDotProd", "result_dir": engine.log.folder.parent, "seed": 2}
    with pytest.raises(FileExistsError, match="seed: 'absent' there, 2 now"):
        GhostEngineManager(config, engine.module, engine.optimizer, val_data=validation(task), loss=task.loss)


@pytest.mark.parametrize("where", ["call", "loss"])
def test_an_exception_leaves_parameters_module_and_global_state_alone(where: str) -> None:
    model = gpt2(torch.float32)
    task = TASKS["gpt2"]
    model.transformer.h[0].eval()  # a mixture of modes, to see that each is left alone
    fails = True

    def fail(*_: Any) -> None:
        if fails:
            raise KeyError("out of luck")

    def call(module: nn.Module, batch: Any) -> Any:
        output = module(input_ids=batch["input_ids"])
        if where == "call":
            fail()
        return output

    def loss(output: Any, batch: Any) -> Tensor:
        if where == "loss":
            fail()
        return causal_lm_loss(output, batch)

    def state() -> Any:
        return {
            "parameters": [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()],
            "modes": [(name, m.training, sorted(vars(m)), len(m._forward_hooks)) for name, m in model.named_modules()],
            "grad": torch.is_grad_enabled(),
            "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
            "cache": torch.is_autocast_cache_enabled(),
            "torch function modes": torch._C._len_torch_function_stack(),
        }

    engine = GradDotProdEngine(model, {"input_ids": validation(task)[0]}, loss=loss, call=call)
    X, Y, _ = next(batches(task))
    before = state()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for context in (contextlib.nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with pytest.raises(KeyError, match="out of luck"), context:
            engine({"input_ids": X}, Y)
        assert state() == before
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    fails = False
    engine({"input_ids": X}, Y).loss.backward()
    engine.prepare_gradients()


def test_a_parameter_without_use_keeps_no_gradient():
    """As after a plain step: an optimizer with weight decay would move a parameter whose gradient is zero."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(4, 3), "idle": torch.nn.Linear(4, 3)})
    batch = (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
    engine = GradDotProdEngine(
        model, batch, loss=classification_loss, call=lambda module, batch: module["used"](batch[0])
    )
    engine(*batch).loss.backward()
    assert all(p.grad is None for p in model["idle"].parameters())
    assert all(p.grad is not None for p in model["used"].parameters())


def test_micro_batches_share_the_validation_gradient() -> None:
    """Once the engine has seen how many there are, a step of k micro-batches runs k·n + m samples, not k·(n + m)."""
    torch.manual_seed(0)
    model, n, m, k = torch.nn.Linear(4, 3), 5, 2, 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    val = torch.randn(m, 4), torch.randint(3, (m,))
    engine = GradDotProdEngine(model, val, loss=classification_loss)
    ran: list[int] = []
    for iteration in range(3):
        for _ in range(k):
            batch = torch.randn(n, 4), torch.randint(3, (n,))
            engine.attach_train_batch(*batch, iteration, range(n))
            (engine(*batch).loss / k).backward()
            ran.append(sum(rows))
            rows.clear()
            expected = dots_of_linear(model, batch, val)
            torch.testing.assert_close(engine.dots, expected, rtol=1e-4, atol=1e-6)
            rows.clear()
        optimizer.step()  # no prepare_gradients: the parameters' versions tell that they moved
        optimizer.zero_grad()
    assert ran == [n + m, m + n, n] + 2 * [m + n, n, n]


def dots_of_linear(model: torch.nn.Linear, batch: Any, val: Any) -> Tensor:
    def gradient(x: Tensor, y: Tensor) -> Tensor:
        loss = torch.nn.functional.cross_entropy(model(x), y)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    return torch.stack([gradient(x[None], y[None]) @ gradient(*val) for x, y in zip(*batch, strict=True)])
