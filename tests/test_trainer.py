"""`GhostTrainer` trains as `Trainer` does, and its values are the samples' shares of each step."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("accelerate")
pytest.importorskip("transformers", "5.23")

from safetensors.torch import load_file
from trainer_world import Texts, arguments, bert, difference, gpt2, llama, weights
from transformers import Trainer, TrainerCallback

import ghostfunc as gf
from ghostfunc.trainer import GhostTrainer

TRAIN, VAL = Texts(11, 1), Texts(5, 2)  # 11 samples in batches of 3: the last one has 2
PLAIN = 1e-6  # of weights after a run, against the Trainer's


class Steps(TrainerCallback):
    """Keeps what a step leaves behind: its gradient as the optimizer sees it, and what it owes to samples."""

    def __init__(self, trainer: Trainer | None = None) -> None:
        self.trainer = trainer
        self.gradients: list[dict[str, Tensor]] = []
        self.parameters: list[dict[str, Tensor]] = []
        self.values: list[Any] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        self.parameters.append(weights(model))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.values.append(getattr(self.trainer, "last_step", None))


def ran(model: nn.Module, args: Any, train: Any = TRAIN, **ghost: Any) -> tuple[GhostTrainer, Steps]:
    """A finished run."""
    trainer = GhostTrainer(model, args, train_dataset=train, **{"val_batch": VAL, **ghost})
    steps = Steps(trainer)
    trainer.add_callback(steps)
    trainer.train()
    return trainer, steps


def plain(model: nn.Module, args: Any, train: Any = TRAIN, kind: type[Trainer] = Trainer, **options: Any) -> Steps:
    trainer = kind(model, args, train_dataset=train, **options)
    steps = Steps()
    trainer.add_callback(steps)
    trainer.train()
    return steps


def same_run(make: Callable[[], nn.Module], folder: Path, train: Any = TRAIN, **options: Any) -> tuple[Any, Steps]:
    """The same run with and without values: gradients and weights must be the same."""
    ghost = {name: options.pop(name) for name in ("val_batch", "precondition", "select") if name in options}
    model, other = make(), make()
    start = weights(model)
    trainer, steps = ran(model, arguments(folder / "ghost", **options), train, **ghost)
    expected = plain(other, arguments(folder / "plain", **options), train)
    assert len(steps.gradients) == len(expected.gradients) > 0
    for found, gradient in zip(steps.gradients, expected.gradients, strict=True):
        assert difference(found, gradient) < 2e-5  # of single entries, some of which cancel
    assert difference(weights(model), weights(other)) < PLAIN
    assert difference(weights(model), start) > 1e-3
    return trainer, steps


def val_gradient(model: nn.Module, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the book: the gradient of the mean over samples of a sample's mean loss over its tokens."""
    leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    losses = [loss_sum(model, leaves, VAL[i]) / targets(VAL[i]) for i in range(len(VAL))]
    gradients = torch.autograd.grad(torch.stack(losses).mean(), list(leaves.values()))
    return dict(zip(leaves, gradients, strict=True))


def loss_sum(model: nn.Module, parameters: dict[str, Tensor], item: dict[str, Any]) -> Tensor:
    """The sum of a sample's token losses."""
    inputs = {"input_ids": item["input_ids"][None], "attention_mask": item["attention_mask"][None]}
    logits = torch.func.functional_call(model, parameters, kwargs=inputs).logits[0, :-1]
    return F.cross_entropy(logits, item["labels"][1:], reduction="sum", ignore_index=-100)


def targets(item: dict[str, Any]) -> int:
    return int((item["labels"][1:] != -100).sum())


def dot(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return float(sum((one[name] * other[name]).sum() for name in one))


# ---------------------------------------------------------------- training stays what it is


# With the usual epsilon, Adam makes a whole step of a gradient that is rounding alone, as that of GPT-2's key biases.
ADAM = {"optim": "adamw_torch", "learning_rate": 2e-3, "adam_epsilon": 1e-3}


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (gpt2, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "num_train_epochs": 2}),
        (lambda: gpt2(0.2), {"gradient_accumulation_steps": 3, **ADAM}),
        pytest.param(llama, {"train_sampling_strategy": "group_by_length", "max_grad_norm": 0}, marks=pytest.mark.slow),
        pytest.param(
            llama, {"activation_checkpointing": True, "gradient_accumulation_steps": 2}, marks=pytest.mark.slow
        ),
    ],
    ids=["clipped", "dropout", "by length", "checkpointing"],
)
def test_trains_as_without_values(make: Callable[[], nn.Module], options: dict[str, Any], tmp_path: Path) -> None:
    trainer, _ = same_run(make, tmp_path, **options)
    visits = trainer.ledger.by_sample()
    assert visits["sample_id"].to_pylist() == list(range(len(TRAIN)))
    assert set(visits["visits"].to_pylist()) == {int(options.get("num_train_epochs", 1))}


@pytest.mark.slow
def test_bfloat16(tmp_path: Path) -> None:
    """Gradients under autocast are no further from the Trainer's than bfloat16 takes these from float32."""
    options = {"gradient_accumulation_steps": 2, "max_steps": 1, "max_grad_norm": 0}
    _, steps = ran(gpt2(), arguments(tmp_path, bf16=True, **options))
    low, full = (plain(gpt2(), arguments(tmp_path, **options, **kind)).gradients[0] for kind in ({"bf16": True}, {}))
    found = steps.gradients[0]

    def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
        return float(sum((one[name] - other[name]).square().sum() for name in one)) ** 0.5

    assert found.keys() == low.keys() and all(gradient.dtype == torch.float32 for gradient in found.values())
    assert 0 < distance(found, low) < 1.5 * distance(low, full)
    assert distance(found, full) < 1.5 * distance(low, full) < 0.02 * dot(full, full) ** 0.5


@pytest.mark.parametrize("accumulation", [1, 2])
def test_classification(tmp_path: Path, accumulation: int) -> None:
    """Some models divide by the number of items that they are told, others, as BERT's classifiers, by their own."""
    train, val = Texts(7, 1, classes=3), Texts(4, 2, classes=3)
    trainer, steps = same_run(
        bert, tmp_path, train, val_batch=val, gradient_accumulation_steps=accumulation, max_grad_norm=0
    )
    assert len(steps.values[0].dots) == 3 * accumulation
    evaluated = trainer.evaluate(val)["eval_loss"]
    assert evaluated == pytest.approx(float(trainer.model(**rows(val, [0, 1, 2, 3])).loss.detach()), rel=1e-5)


def rows(data: Texts, indices: list[int]) -> dict[str, Tensor]:
    return {name: torch.stack([data[i][name] for i in indices]) for name in ("input_ids", "attention_mask", "labels")}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
def test_adapters_alone_are_trained(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def with_adapters() -> nn.Module:
        config = peft.LoraConfig(
            r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
        )
        return peft.get_peft_model(llama(), config)

    trainer, steps = same_run(with_adapters, tmp_path, gradient_accumulation_steps=2)
    assert steps.gradients[0].keys() == {n for n, p in trainer.model.named_parameters() if "lora" in n}
    assert trainer.ledger.by_sample().num_rows == len(TRAIN)


# ---------------------------------------------------------------- what the values are


def test_values_are_shares_of_the_step(tmp_path: Path) -> None:
    """Token losses over all tokens of the step, dotted with the validation gradient; clipping is in the values."""
    model, rate, limit = gpt2(), 0.05, 0.1
    args = arguments(tmp_path, gradient_accumulation_steps=2, max_grad_norm=limit, lr_scheduler_type="constant")
    trainer, steps = ran(model, args)
    found = {}
    for step, parameters, gradient in zip(steps.values, steps.parameters, steps.gradients, strict=True):
        items = [TRAIN[int(i)] for i in step.sample_ids]
        # For GPT-2, whose class does not say that its loss shifts labels, the Trainer counts every sample's first too.
        direction, tokens = val_gradient(model, parameters), sum(targets(item) + 1 for item in items)
        shares = []
        for item in items:
            leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
            gradients = torch.autograd.grad(loss_sum(model, leaves, item) / tokens, list(leaves.values()))
            shares.append(dict(zip(leaves, gradients, strict=True)))
        dots = torch.tensor([dot(share, direction) for share in shares])
        torch.testing.assert_close(step.dots, dots, rtol=1e-4, atol=1e-6)
        norm = torch.stack([sum(share[n] for share in shares).norm() for n in direction]).norm()
        assert norm > limit
        torch.testing.assert_close(step.values, rate * limit / norm * dots, rtol=1e-4, atol=1e-8)
        assert float(step.values.sum()) == pytest.approx(rate * dot(gradient, direction), rel=1e-4)
        found |= dict(zip(step.sample_ids.tolist(), step.values.tolist(), strict=True))
    in_ledger = trainer.ledger.by_sample().to_pylist()
    assert {row["sample_id"]: row["value"] for row in in_ledger} == pytest.approx(found)


@pytest.mark.parametrize("exact", [False, True])
def test_metric_of_the_optimizer(tmp_path: Path, exact: bool) -> None:
    """Values under AdamW are those of `gf.adam`; at the first step, and if exact, it is about the step's gradient."""
    model = gpt2()

    def metric(optimizer: Any, model: nn.Module) -> Any:
        return gf.adam(optimizer, model, exact=exact)

    args = arguments(tmp_path, optim="adamw_torch", gradient_accumulation_steps=2, learning_rate=0.01, max_grad_norm=0)
    trainer = GhostTrainer(model, args, train_dataset=TRAIN, val_batch=VAL, precondition=metric)
    steps = Steps(trainer)
    directions = []

    class Directions(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            P = gf.adam(optimizer.optimizer, model, exact=exact)
            gradient = {name: p.grad for name, p in model.named_parameters()}
            V = val_gradient(model, weights(model))
            directions.append((P(V, gradient) if P.about_train_gradient else P(V), optimizer.param_groups[0]["lr"]))

    trainer.add_callback(steps)
    trainer.add_callback(Directions())
    trainer.train()
    assert len(directions) == 2
    for step, gradient, (direction, rate) in zip(steps.values, steps.gradients, directions, strict=True):
        assert float(step.values.sum()) == pytest.approx(rate * dot(gradient, direction), rel=5e-3)
        assert step.dots.std() > 0


def test_values_foretell_the_validation_loss(tmp_path: Path) -> None:
    args = arguments(tmp_path, learning_rate=1e-3, gradient_accumulation_steps=2, num_train_epochs=3)
    trainer, steps = ran(gpt2(), args, VAL)
    losses = [step.val_loss for step in steps.values]
    fallen = losses[0] - losses[-1]
    assert sum(float(step.values.sum()) for step in steps.values[:-1]) == pytest.approx(fallen, rel=0.03)
    assert sum(trainer.ledger.by_sample()["value"].to_pylist()) > fallen > 0


# ---------------------------------------------------------------- samples


@pytest.mark.slow
def test_ids_from_a_column(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{k: v.tolist() if isinstance(v, Tensor) else v for k, v in item.items()}
                                        for item in TRAIN.items])  # fmt: skip
    trainer, _ = same_run(gpt2, tmp_path, table, val_batch=rows(VAL, list(range(5))))
    assert trainer.ledger.by_sample()["sample_id"].to_pylist() == list(range(len(TRAIN)))
    by_column, _ = ran(gpt2(), arguments(tmp_path), table, sample_ids="sample_id")
    found = {row["sample_id"]: row["value"] for row in by_column.ledger.by_sample().to_pylist()}
    by_place = {row["sample_id"]: row["value"] for row in trainer.ledger.by_sample().to_pylist()}
    assert found == {100 - 3 * place: value for place, value in by_place.items()}


@pytest.mark.parametrize(
    ("column", "message"), [("idx", "of the train dataset has input_ids"), ("text", "has the id 't'")]
)
def test_ids_that_are_none(tmp_path: Path, column: str, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        ran(gpt2(), arguments(tmp_path), Texts(9, 0), sample_ids=column)


@pytest.mark.slow
def test_selection(tmp_path: Path) -> None:
    """All samples: as without. Some: the gradient of these, which stand for their micro-batch. None: no gradient."""
    same_run(lambda: gpt2(0.2), tmp_path, select=lambda dots: dots > -100, gradient_accumulation_steps=2)
    seen = []

    def helpful(dots: Tensor) -> Tensor:
        seen.append(dots)
        return dots.topk(1).indices if len(seen) == 1 else dots > 100

    model = gpt2()
    args = arguments(tmp_path, gradient_accumulation_steps=2, max_steps=1, max_grad_norm=0)
    trainer, steps = ran(model, args, select=helpful)
    (step,), (gradient,) = steps.values, steps.gradients
    assert len(seen) == 2 and len(step.sample_ids) == 1
    plain_ids = ran(gpt2(), args)[1].values[0].sample_ids.tolist()
    assert int(step.sample_ids) == plain_ids[int(seen[0].argmax())]
    tokens = [targets(TRAIN[i]) for i in plain_ids]
    item = TRAIN[int(step.sample_ids)]
    leaves = {name: p.clone().requires_grad_() for name, p in steps.parameters[0].items()}
    loss = loss_sum(model, leaves, item) / targets(item) * sum(tokens[:3]) / sum(n + 1 for n in tokens)
    expected = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    assert difference(gradient, expected) < 1e-5
    assert trainer.ledger.by_sample().num_rows == 1


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda dots: dots, "select gave torch.float32"),
        (lambda dots: torch.tensor([True]), "a mask of 1 for 3"),
        (lambda dots: torch.tensor([0, 0]), r"select gave \[0, 0\]"),
        (lambda dots: torch.tensor([0, 3]), r"select gave \[0, 3\]"),
    ],
)
def test_rules_that_are_none(rule: Any, message: str) -> None:
    from ghostfunc._trainer_checks import kept_rows

    with pytest.raises(ValueError, match=message):
        kept_rows(rule, torch.zeros(3))


# ---------------------------------------------------------------- checkpoints


def test_a_resumed_run_has_the_ledger_of_an_uninterrupted_one(tmp_path: Path) -> None:
    options = {"num_train_epochs": 3, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3}
    options |= {"optim": "adamw_torch", "learning_rate": 0.01}

    class Killed(RuntimeError):
        pass

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise Killed

    def trainer(folder: str, *callbacks: TrainerCallback) -> GhostTrainer:
        args = arguments(tmp_path / folder, **options)
        return GhostTrainer(
            gpt2(0.2), args, train_dataset=TRAIN, val_batch=VAL, ledger=tmp_path / folder / "values",
            precondition=gf.adam, callbacks=list(callbacks),
        )  # fmt: skip

    whole = trainer("whole")
    whole.train()
    interrupted = trainer("interrupted", Kill())
    with pytest.raises(Killed):
        interrupted.train()
    interrupted.ledger.save()  # as a process that is killed after the next save would have it: steps 3 and 4 too
    with pytest.raises(ValueError, match=r"has the values of an earlier run.*resume_from_checkpoint"):
        trainer("interrupted").train()
    resumed = trainer("interrupted")
    resumed.train(resume_from_checkpoint=True)
    assert difference(weights(resumed.model), weights(whole.model)) == 0
    assert resumed.ledger.by_sample().equals(whole.ledger.by_sample())
    again = gf.InRunShapley(tmp_path / "interrupted" / "values").by_sample()
    assert again.equals(whole.ledger.by_sample()) and set(again["visits"].to_pylist()) == {3}


# ---------------------------------------------------------------- refusals


class Adds(Trainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch) + 0.5


class AddsAndDots(GhostTrainer, Adds):
    pass


def test_losses_that_do_not_add_up(tmp_path: Path) -> None:
    trainer = AddsAndDots(gpt2(), arguments(tmp_path), train_dataset=TRAIN, val_batch=VAL)
    with pytest.raises(ValueError, match=r"first batch's loss add up to 2\.59.*the Trainer's loss is 3\.09"):
        trainer.train()


@pytest.mark.parametrize(
    ("error", "message", "ghost", "options"),
    [
        (ValueError, "pass loss=, each sample's smoothed loss", {}, {"label_smoothing_factor": 0.1}),
        (ValueError, "pass loss= too", {"compute_loss_func": lambda *_, **__: None}, {}),
        (TypeError, "val_batch is a int", {"val_batch": 3}, {}),
        (ValueError, "val_batch has no samples", {"val_batch": []}, {}),
    ],
)
def test_refusals(
    tmp_path: Path, error: type[Exception], message: str, ghost: dict[str, Any], options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=message):
        GhostTrainer(gpt2(), arguments(tmp_path, **options), train_dataset=TRAIN, **{"val_batch": VAL, **ghost})


def test_streams_are_refused(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(TRAIN.items)

    with pytest.raises(TypeError, match="a stream without a length"):
        ran(gpt2(), arguments(tmp_path, max_steps=2), Stream())


def test_a_loss_that_is_not_finite_names_its_samples(tmp_path: Path) -> None:
    model, train, val = llama(), Texts(3, 1), Texts(5, 2)
    for item in (*train.items, *val.items):
        item["input_ids"].clamp_(max=20)
    train[1]["input_ids"][0] = 23
    with torch.no_grad():
        model.model.embed_tokens.weight[23] = float("nan")
    with pytest.raises(ValueError, match=r"the losses of samples .* are not finite") as raised:
        ran(model, arguments(tmp_path), train, val_batch=val)
    (place,) = re.findall(r"samples \[(\d)\]", str(raised.value))
    (ids,) = re.findall(r"in order, \[(.*)\]", raised.value.__notes__[0])
    assert ids.split(", ")[int(place)] == "1"


# ---------------------------------------------------------------- processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes under torchrun have done."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("trainer_worker.py")), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def trained(folder: Path, what: str, rank: int = 0) -> dict[str, Tensor]:
    found = load_file(folder / f"weights-{rank}.safetensors")
    return {name.removeprefix(what + "/"): t for name, t in found.items() if name.startswith(what + "/")}


@pytest.mark.slow
def test_two_processes_train_as_without_values(two_processes: Path) -> None:
    expected = trained(two_processes, "Trainer")
    for rank in range(2):
        assert difference(trained(two_processes, "GhostTrainer", rank), expected) < PLAIN
        assert difference(trained(two_processes, "resumed", rank), expected) < PLAIN
        assert difference(trained(two_processes, "engine True", rank), trained(two_processes, "engine False")) < PLAIN
    assert difference(expected, weights(gpt2())) > 1e-3


@pytest.mark.slow
def test_the_ledger_of_two_processes(two_processes: Path) -> None:
    """Every sample once an epoch, and after a resumption the same again."""
    told = [json.loads((two_processes / f"told-{rank}.json").read_text()) for rank in range(2)]
    for rank in range(2):
        assert told[rank]["after"] == told[rank]["before"] == told[0]["before"]
    assert [row["sample_id"] for row in told[0]["before"]] == list(range(12))
    assert {row["visits"] for row in told[0]["before"]} == {2}


@pytest.mark.slow
def test_what_one_process_raises_both_raise(two_processes: Path) -> None:
    first, second = (json.loads((two_processes / f"told-{rank}.json").read_text())["error"] for rank in range(2))
    assert second.startswith("IndexError: Target 99 is out of bounds")
    assert first.startswith("RankFailed: another rank's share of this call failed. rank 1: IndexError: Target 99")


@pytest.mark.slow
def test_values_of_two_processes(two_processes: Path, tmp_path: Path) -> None:
    """One process that takes both processes' batches at once has the same values: here a step is the whole data."""
    args = arguments(tmp_path, per_device_train_batch_size=6, num_train_epochs=2, gradient_accumulation_steps=2)
    alone, _ = ran(gpt2(), args, Texts(12, 1))
    found = json.loads((two_processes / "told-0.json").read_text())["before"]
    values = (torch.tensor([row["value"] for row in rows]) for rows in (found, alone.ledger.by_sample().to_pylist()))
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-7)
