"""Checkpoints: what comes back is what went in, to the bit; nothing is unpickled; what is damaged is named."""

import copy
import json
import pickle
from collections import Counter, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_worker import Tied
from processes import run_ranks
from torch import Tensor, nn

from ghostfunc import InRunShapley
from ghostfunc._plain_state import as_json, from_json, tensors_in
from ghostfunc.checkpoint import TrainingCheckpoints

WORKER = Path(__file__).with_name("checkpoint_worker.py")


class Mixed(nn.Module):
    """Layouts and dtypes: tied weights, channels last, bfloat16, a number without dimensions, an extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.tied = Tied()
        self.picture = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.norm = nn.BatchNorm1d(3)
        self.short = nn.Parameter(torch.randn(3, dtype=torch.bfloat16))
        self.note: Any = None

    def get_extra_state(self) -> Any:
        return {"note": self.note}

    def set_extra_state(self, state: Any) -> None:
        self.note = state["note"]

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tied(ids)
        picture = self.picture(x.new_ones(2, 3, 4, 4).to(memory_format=torch.channels_last))
        return x.square().sum() + picture.square().sum() + self.norm(x[:, :3]).pow(3).sum() + self.short.float().sum()


def built(seed: int) -> tuple[Any, torch.optim.Optimizer, Any]:
    torch.manual_seed(seed)
    model = Mixed()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2, 4], gamma=0.5)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    # Not Python's generator: beartype, which checks annotations here, draws from it. The workers' tests have it.
    model(torch.randint(5, (4,)) * np.random.randint(2)).backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def state_of(*things: Any) -> list[Any]:
    return copy.deepcopy([thing.state_dict() for thing in things])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of step 3 in its folder."""
    model, optimizer, scheduler = built(0)
    for _ in range(3):
        step(model, optimizer, scheduler)
    TrainingCheckpoints(tmp_path, model, optimizer, also={"scheduler": scheduler}).save(3)
    return tmp_path


def test_a_run_goes_on_to_the_same_numbers_and_nothing_is_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("unpickled")

    model, optimizer, scheduler = built(0)
    model.note = "first"
    for _ in range(3):
        step(model, optimizer, scheduler)
    extra = {"best": (1, 0.5), 3: [torch.arange(3), None], "inf": float("inf")}
    also = {"scheduler": scheduler, "scaler": torch.GradScaler("cpu", init_scale=512.0)}
    checkpoints = TrainingCheckpoints(tmp_path, model, optimizer, also=also)
    for module, name in [(pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load"), (torch, "save")]:
        monkeypatch.setattr(module, name, refuse)
    folder = checkpoints.save(3, extra)
    expected = state_of(model, optimizer, scheduler, also["scaler"])
    for _ in range(3):
        step(model, optimizer, scheduler)
    later = state_of(model, optimizer, scheduler)

    other, again, rates = built(5)
    again_also = {"scheduler": rates, "scaler": torch.GradScaler("cpu")}
    weight = other.picture.weight
    resumed = TrainingCheckpoints(tmp_path, other, again, also=again_also).load()
    assert (resumed.step, resumed.folder) == (3, folder) and same(resumed.extra, extra)
    assert same(state_of(other, again, rates, again_also["scaler"]), expected)
    assert other.note == "first" and other.picture.weight is weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert other.tied.head.weight is other.tied.embedding.weight
    assert isinstance(rates.milestones, Counter)
    for _ in range(3):
        step(other, again, rates)
    assert same(state_of(other, again, rates), later)


def test_files_are_safetensors_and_json(saved: Path) -> None:
    files = [path for path in saved.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    assert sorted(path.name for path in saved.iterdir()) == ["step-00000003"]


def test_saving_before_the_first_step_leaves_the_optimizer_alone(tmp_path: Path) -> None:
    model, optimizer, scheduler = built(0)
    TrainingCheckpoints(tmp_path, model, optimizer).save(0)
    assert not optimizer.state
    other, again, rates = built(1)
    TrainingCheckpoints(tmp_path, other, again).load()
    for trained in ((model, optimizer, scheduler), (other, again, rates)):
        torch.manual_seed(0)
        np.random.seed(0)
        step(*trained)
    assert same(state_of(model, optimizer), state_of(other, again))


def test_states_keep_their_own_dtype(tmp_path: Path) -> None:
    """torch's own `Optimizer.load_state_dict` casts them to the parameter's."""

    def pair() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(2, 2, dtype=torch.bfloat16)
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    (model, optimizer), (other, again) = pair(), pair()
    for param in model.parameters():
        optimizer.state[param] = {"master": param.detach().float() + 1e-5}
    TrainingCheckpoints(tmp_path, model, optimizer).save(1)
    TrainingCheckpoints(tmp_path, other, again).load()
    assert same(state_of(other, again), state_of(model, optimizer))


def test_a_parameter_without_a_gradient_has_no_state_and_gets_none(tmp_path: Path) -> None:
    def pair() -> tuple[nn.ModuleDict, torch.optim.Optimizer]:
        model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
        return model, torch.optim.AdamW(model.parameters())

    model, optimizer = pair()
    model["used"](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    TrainingCheckpoints(tmp_path, model, optimizer).save(1)
    other, again = pair()
    TrainingCheckpoints(tmp_path, other, again).load()
    assert same(state_of(other, again), state_of(model, optimizer))
    assert {tuple(p.shape) for p in again.state} == {(2, 2), (2,)} and len(again.state) == 2


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "short":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[-1] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["missing", "short", "one bit"])
@pytest.mark.parametrize("name", ["state.json", "checksums.json", "tensors/*.safetensors"])
def test_a_damaged_checkpoint_is_named_and_nothing_changes(saved: Path, name: str, how: str) -> None:
    (path,) = (saved / "step-00000003").glob(name)
    damage(path, how)
    model, optimizer, scheduler = built(1)
    before = state_of(model, optimizer, scheduler)
    checkpoints = TrainingCheckpoints(saved, model, optimizer, also={"scheduler": scheduler})
    with pytest.raises(ValueError, match=r"step-00000003 is damaged.*Restore step-00000003, or move it away"):
        checkpoints.load()
    assert same(state_of(model, optimizer, scheduler), before)


def test_a_half_written_one_is_ignored_and_swept(saved: Path) -> None:
    draft = saved / ".draft-step-00000006"
    (draft / "tensors").mkdir(parents=True)
    (draft / "tensors" / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    model, optimizer, scheduler = built(1)
    checkpoints = TrainingCheckpoints(saved, model, optimizer, also={"scheduler": scheduler})
    assert checkpoints.load().step == 3
    checkpoints.save(6)
    assert sorted(path.name for path in saved.iterdir()) == ["step-00000006"]


def test_a_save_that_fails_leaves_what_was_there(saved: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "config.json").touch()
        raise OSError("no space left")

    model, optimizer, scheduler = built(1)
    also = {"scheduler": scheduler}
    with pytest.raises(OSError, match="no space left"):
        TrainingCheckpoints(saved, model, optimizer, also=also, beside=fail).save(6)
    assert TrainingCheckpoints(saved, model, optimizer, also=also).load().step == 3


def test_the_last_ones_are_kept_and_one_that_is_there_stays(tmp_path: Path) -> None:
    model, optimizer, _ = built(0)
    checkpoints = TrainingCheckpoints(tmp_path, model, optimizer, keep=2, beside=lambda f: (f / "config.json").touch())
    for number in (1, 2, 3):
        checkpoints.save(number)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    assert (tmp_path / "step-00000003" / "config.json").exists()
    written = (tmp_path / "step-00000003" / "state.json").stat().st_mtime_ns
    checkpoints.save(3)
    assert (tmp_path / "step-00000003" / "state.json").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="keep=0"):
        TrainingCheckpoints(tmp_path, model, keep=0)


def test_records_are_saved_with_it_and_cut_back_to_it(tmp_path: Path) -> None:
    model, _, _ = built(0)
    ledger = InRunShapley(tmp_path / "values")
    checkpoints = TrainingCheckpoints(tmp_path / "checkpoints", model, records=[ledger])
    ledger.add([1], [0.5], iteration=0)
    checkpoints.save(1)
    ledger.add([2], [0.25], iteration=1)
    ledger.save()
    again = InRunShapley(tmp_path / "values")
    assert TrainingCheckpoints(tmp_path / "checkpoints", model, records=[again]).load().step == 1
    assert again.by_sample()["sample_id"].to_pylist() == [1]
    assert TrainingCheckpoints(tmp_path / "elsewhere", model, records=[again]).load() == (0, None, None)
    assert again.by_sample().num_rows == 0


def other_shape(model: Any) -> None:
    model.tied.middle = nn.Linear(3, 4)


def other_names(model: Any) -> None:
    model.added = nn.Linear(1, 1)


def other_dtype(model: Any) -> None:
    model.tied.middle.double()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_shape, r"tied.middle.weight is \[3, 3\] torch.float32 there, and \[4, 3\] torch.float32"),
        (other_names, "only there: nothing; only in this one: added.bias, added.weight"),
        (other_dtype, r"tied.middle.weight is \[3, 3\] torch.float32 there, and \[3, 3\] torch.float64"),
    ],
)
def test_another_model_is_refused(saved: Path, change: Any, message: str) -> None:
    model, _, _ = built(0)
    change(model)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=message):
        TrainingCheckpoints(saved, model, optimizer).load()


def test_another_optimizer_and_other_objects_are_refused(saved: Path) -> None:
    model, optimizer, scheduler = built(0)
    split = torch.optim.AdamW([{"params": [p]} for p in model.parameters()])
    with pytest.raises(ValueError, match="other parameter groups: 9 from"):
        TrainingCheckpoints(saved, model, split, also={"scheduler": scheduler}).load()
    with pytest.raises(ValueError, match=r"has the states of \['scheduler'\], and also= has \[\]"):
        TrainingCheckpoints(saved, model, optimizer).load()
    with pytest.raises(ValueError, match="has the state of an optimizer, and none was given"):
        TrainingCheckpoints(saved, model).load()
    strange = torch.optim.SGD([nn.Parameter(torch.ones(4, 2))])
    with pytest.raises(ValueError, match=r"parameters that the model does not have, of shapes \[\[4, 2\]\]"):
        TrainingCheckpoints(saved, model, strange).load()


def test_what_is_neither_plain_nor_a_tensor_is_refused_by_place(tmp_path: Path) -> None:
    model, optimizer, _ = built(0)
    checkpoints = TrainingCheckpoints(tmp_path, model, optimizer)
    with pytest.raises(TypeError, match=r"cannot hold extra/what/1, a collections\.deque"):
        checkpoints.save(1, extra={"what": [0, deque()]})
    assert checkpoints.load().step == 0


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, None, True, "text"], "b": {"c": (1, (2,))}},
        {1: "one", (2, 3): "pair", "$tensor": "a name that looks like a tag"},
        Counter({5: 2, 11: 1}),
        {"t": torch.arange(3), "n": [torch.tensor(2.5, dtype=torch.bfloat16), torch.zeros(0, 2)]},
    ],
)
def test_plain_states_come_back(value: Any) -> None:
    tensors: dict[str, Tensor] = {}
    text = json.dumps(as_json(value, "here", tensors))
    found = from_json(json.loads(text), tensors)
    assert same(found, value) and type(found) is type(value)
    assert {at.name: (at.shape, at.dtype) for at in tensors_in(json.loads(text))} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
    }


class Ranks:
    """Starts workers, and reads what they said."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, ranks: int, what: str, kind: str) -> list[dict[str, Any]]:
        (self.folder / f"store-{what}-{kind}-{ranks}").unlink(missing_ok=True)
        run_ranks(WORKER, ranks, self.folder, what, kind)
        names = [f"said-{what}-{kind}-{ranks}-{rank}.json" for rank in range(ranks)]
        return [json.loads((self.folder / name).read_text()) for name in names]


def assert_loaded(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for of_rank in found:
        assert (of_rank["step"], of_rank["order"], of_rank["best"]) == (2, [0, 1, 2, 3], [1, 0.5])
        assert of_rank["numbers"] == expected["numbers"]


def test_two_ranks_save_shards_and_see_what_is_wrong(tmp_path: Path) -> None:
    first, second = Ranks(tmp_path).run(2, "save", "sharded")
    assert first["numbers"] == second["numbers"] and first["draws"] != second["draws"]
    for said in (first, second):
        assert "RuntimeError: rank 1 does not see what rank 0 writes" in said["apart"]
    assert second["unstorable"].startswith("TypeError: a checkpoint cannot hold extra, a builtins.object")
    assert first["unstorable"].startswith("RankFailed") and "rank 1: TypeError: a checkpoint" in first["unstorable"]
    assert [path.name for path in (tmp_path / "bad").iterdir() if path.name.startswith("step")] == []
    model, optimizer = Tied(), None
    with pytest.raises(ValueError, match="has the state of an optimizer"):
        TrainingCheckpoints(tmp_path / "sharded", model, optimizer).load()
    again = torch.optim.AdamW(model.parameters())
    assert TrainingCheckpoints(tmp_path / "sharded", model, again).load().step == 2
    assert model.embedding.weight.flatten().tolist() == pytest.approx(first["numbers"]["embedding.weight"], rel=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sharded", "wrapped", "plain"])
def test_any_number_of_ranks_loads_what_any_number_has_saved(tmp_path: Path, kind: str) -> None:
    workers = Ranks(tmp_path)
    saved = workers.run(2, "save", kind)
    same_ranks = workers.run(2, kind, kind)
    assert_loaded(same_ranks, saved[0])
    assert [said["draws"] for said in same_ranks] == [said["draws"] for said in saved]
    for ranks, other in [(4, "sharded"), (1, "plain"), (3, "wrapped")]:
        found = workers.run(ranks, kind, other)
        assert_loaded(found, saved[0])
        draws = [tuple(said["draws"]) for said in found]
        assert len(set(draws)) == ranks and not set(draws) & {tuple(said["draws"]) for said in saved}
    again = [workers.run(4, kind, "sharded") for _ in range(2)]
    assert again[0] == again[1]


@pytest.mark.slow
def test_what_one_process_has_saved_several_shard(tmp_path: Path) -> None:
    workers = Ranks(tmp_path)
    (saved,) = workers.run(1, "save", "plain")
    found = workers.run(3, "plain", "sharded")
    assert_loaded(found, saved)
    assert [said["draws"] for said in found] == [saved["draws"]] * 3  # all (one) ranks had the same states
