"""The ledger: every value is counted once, whatever is interrupted, resumed, split over ranks or merged."""

import builtins
import os
import signal
import subprocess
import sys
from collections import defaultdict
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ghostfunc.dotlog import DotLog
from ghostfunc.ledger import InRunShapley

pa = pytest.importorskip("pyarrow")
ROOT = Path(__file__).parents[1]

Row = tuple[str, int, float, float]  # domain, sample_id, value, second_order


def part(iteration: int, micro_step: int = 0, rank: int = 0) -> list[Row]:
    """What a deterministic run says of one micro-batch: four samples, one of them twice."""
    draw = np.random.default_rng([iteration, micro_step, rank])
    ids = draw.integers(0, 9, 3).tolist()
    values = (draw.standard_normal(4) * 10.0 ** draw.integers(-9, 3)).tolist()
    return [(["law", "code"][i % 2], i, value, value / 3) for i, value in zip([*ids, ids[0]], values, strict=True)]


def add(ledger: InRunShapley, rows: list[Row], iteration: int, micro_step: int = 0) -> bool:
    domains, ids, values, second = zip(*rows, strict=True)
    return ledger.add(ids, values, domains=domains, iteration=iteration, micro_step=micro_step, second_order=second)


def filled(iterations: range, *, folder: Path | None = None, micro_steps: int = 1, rank: int = 0) -> InRunShapley:
    ledger = InRunShapley(folder, rank=rank)
    for iteration in iterations:
        for micro_step in range(micro_steps):
            add(ledger, part(iteration, micro_step, rank), iteration, micro_step)
    return ledger


def expected(parts: list[list[Row]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Sums without rounding."""
    sums: dict[tuple[str, int], dict[str, Any]] = defaultdict(lambda: {"value": 0, "second_order": 0, "visits": 0})
    for rows in parts:
        for domain, sample_id, value, second in rows:
            entry = sums[domain, sample_id]
            entry["value"] += Fraction(value)
            entry["second_order"] += Fraction(second)
            entry["visits"] += 1
    return sums


def assert_holds(ledger: InRunShapley, parts: list[list[Row]]) -> None:
    table, sums = ledger.by_sample().to_pylist(), expected(parts)
    assert [(row["domain"], row["sample_id"]) for row in table] == sorted(sums)
    scale = max((abs(value) for rows in parts for _, _, value, _ in rows), default=0)
    for row in table:
        exact = sums[row["domain"], row["sample_id"]]
        assert row["visits"] == exact["visits"]
        assert row["value"] == pytest.approx(float(exact["value"]), rel=1e-13, abs=1e-13 * scale)
        assert row["second_order"] == pytest.approx(float(exact["second_order"]), rel=1e-13, abs=1e-13 * scale)
        assert row["first_order"] == row["value"] - row["second_order"]


def same(one: InRunShapley, other: InRunShapley) -> bool:
    """The same to the last bit."""
    return one.by_sample().equals(other.by_sample()) and one.by_domain().equals(other.by_domain())


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, text=True, capture_output=True, timeout=120)


def test_samples_domains_and_the_top_of_a_small_ledger() -> None:
    ledger = InRunShapley()
    ledger.add([3, 1], [1.0, -2.0], domains=["law", "code"], iteration=0, second_order=[0.25, -0.5])
    ledger.add([("code", 1), ("code", 3)], torch.tensor([0.5, 4.0]), iteration=1)
    samples = ledger.by_sample()
    types = ["string", "int64", "double", "double", "double", "int64"]
    assert [str(field.type) for field in samples.schema] == types
    assert samples.to_pylist() == [
        {"domain": "code", "sample_id": 1, "value": -1.5, "first_order": -1.0, "second_order": -0.5, "visits": 2},
        {"domain": "code", "sample_id": 3, "value": 4.0, "first_order": 4.0, "second_order": 0.0, "visits": 1},
        {"domain": "law", "sample_id": 3, "value": 1.0, "first_order": 0.75, "second_order": 0.25, "visits": 1},
    ]
    assert ledger.by_domain().to_pylist() == [
        {"domain": "code", "value": 2.5, "first_order": 3.0, "second_order": -0.5, "visits": 3, "samples": 2},
        {"domain": "law", "value": 1.0, "first_order": 0.75, "second_order": 0.25, "visits": 1, "samples": 1},
    ]
    assert ledger.top(2)["value"].to_pylist() == [4.0, 1.0]
    assert ledger.top(2, harmful=True)["value"].to_pylist() == [-1.5, 1.0]
    assert ledger.top(9).num_rows == 3
    with pytest.raises(ValueError, match="k=0"):
        ledger.top(0)


def test_ties_at_the_top_are_in_the_order_of_domain_and_id() -> None:
    ledger = InRunShapley()
    ledger.add([9, 2, 5, 1], [1.0] * 4, domains=["a", "b", "a", "b"], iteration=0)
    for harmful in (False, True):
        top = ledger.top(3, harmful=harmful)
        assert list(zip(top["domain"].to_pylist(), top["sample_id"].to_pylist(), strict=True)) == [
            ("a", 5),
            ("a", 9),
            ("b", 1),
        ]


def test_an_empty_ledger_answers(tmp_path: Path) -> None:
    ledger = InRunShapley(tmp_path / "new")
    assert ledger.save() is None
    assert not (tmp_path / "new").exists()  # reading leaves no trace
    assert ledger.by_sample().num_rows == ledger.by_domain().num_rows == ledger.top(1).num_rows == 0
    assert ledger.add([], [], iteration=0)


@pytest.mark.parametrize("kind", ["float64", "float32", "bfloat16", "numpy", "list"])
def test_values_may_be_tensors_arrays_or_lists(kind: str) -> None:
    make = {
        "float64": lambda v: torch.tensor(v, dtype=torch.float64),
        "float32": lambda v: torch.tensor(v, requires_grad=True),
        "bfloat16": lambda v: torch.tensor(v, dtype=torch.bfloat16),
        "numpy": np.array,
        "list": list,
    }[kind]
    ids = {"numpy": np.array, "list": list}.get(kind, torch.tensor)([3, 4])
    ledger = InRunShapley()
    ledger.add(ids, make([0.5, -1.5]), iteration=0)
    assert ledger.by_sample()["value"].to_pylist() == [0.5, -1.5]


def test_float32_values_are_summed_in_float64() -> None:
    ledger = InRunShapley()
    for iteration in range(100):
        ledger.add([0], torch.tensor([1e8 if iteration == 0 else 1.0]), iteration=iteration)
    assert ledger.by_sample()["value"].to_pylist() == [1e8 + 99]


def test_what_is_saved_is_there_for_the_next_process(tmp_path: Path) -> None:
    ledger = filled(range(4), folder=tmp_path, micro_steps=2)
    first = ledger.save()
    assert first == tmp_path / "values-00000000-rank0000.parquet"
    assert ledger.save() is None
    add(ledger, part(4), 4)
    assert ledger.save() == tmp_path / "values-00000001-rank0000.parquet"
    assert same(InRunShapley(tmp_path), ledger)
    assert_holds(ledger, [*(part(i, m) for i in range(4) for m in range(2)), part(4)])


def test_a_resumed_run_counts_no_part_twice(tmp_path: Path) -> None:
    filled(range(6), folder=tmp_path).save()
    ledger = InRunShapley(tmp_path)
    counted = [add(ledger, part(iteration), iteration) for iteration in range(3, 9)]  # from a checkpoint at 3
    assert counted == [False, False, False, True, True, True]
    ledger.save()
    assert same(InRunShapley(tmp_path), filled(range(9)))


def test_an_opened_ledger_refuses_other_samples_under_a_known_part(tmp_path: Path) -> None:
    filled(range(3), folder=tmp_path).save()
    ledger = InRunShapley(tmp_path)
    before = ledger.by_sample()
    with pytest.raises(ValueError, match=r"already has iteration 2, .*, of other samples.*resume\(2\)"):
        ledger.add([100], [1.0], iteration=2)
    assert ledger.by_sample().equals(before)


def test_a_part_added_twice_is_refused_and_the_message_thinks_of_micro_steps(tmp_path: Path) -> None:
    ledger = filled(range(2), folder=tmp_path)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"iteration 1, micro_step 0, rank 0 has been added.*micro_step="):
            add(ledger, part(1), 1)
        ledger.save()  # saved or not
    assert same(ledger, filled(range(2)))


@pytest.mark.parametrize("cut", [0, 1, 3, 4, 7, 50])
def test_resume_drops_what_comes_again_and_takes_other_values_for_it(tmp_path: Path, cut: int) -> None:
    ledger = InRunShapley(tmp_path)
    for iteration in range(7):
        for micro_step in range(2):
            add(ledger, part(iteration, micro_step), iteration, micro_step)
        if iteration % 3 == 2:
            ledger.save()
    ledger.resume(cut)
    kept = [part(i, m) for i in range(min(cut, 7)) for m in range(2)]
    assert_holds(ledger, kept)
    if cut < 7:
        assert ledger.add([100], [1.0], iteration=cut)
        ledger.save()
        assert_holds(InRunShapley(tmp_path), [*kept, [("", 100, 1.0, 0.0)]])


def test_resume_is_about_all_ranks_and_leaves_other_runs_alone(tmp_path: Path) -> None:
    for rank in range(2):
        filled(range(4), folder=tmp_path, rank=rank).save()
    other = InRunShapley(tmp_path, run="other", rank=2)
    add(other, part(3), 3)
    other.save()
    InRunShapley(tmp_path, rank=0).resume(2)
    assert_holds(InRunShapley(tmp_path), [*(part(i, 0, r) for i in range(2) for r in range(2)), part(3)])


def test_ranks_that_share_a_folder_are_one_ledger(tmp_path: Path) -> None:
    ranks = [filled(range(5), folder=tmp_path, rank=rank) for rank in range(3)]
    for ledger in reversed(ranks):
        ledger.save()
    parts = [part(i, 0, r) for i in range(5) for r in range(3)]
    for ledger in ranks:
        assert_holds(ledger, parts)
    assert same(InRunShapley.merge([filled(range(5), rank=rank) for rank in range(3)]), ranks[0])


def test_merged_ranks_are_the_ledger_of_one_process() -> None:
    """The same samples in one process's batch, and dealt out to two ranks, each sample to one of them."""
    whole, ranks = InRunShapley(), [InRunShapley(rank=0), InRunShapley(rank=1)]
    for iteration in range(6):
        rows = part(iteration)
        add(whole, rows, iteration)
        for rank in range(2):
            dealt = [row for row in rows if row[1] % 2 == rank]
            if dealt:
                add(ranks[rank], dealt, iteration)
    assert same(ranks[1] + ranks[0], whole)


def test_merging_takes_a_part_once_and_refuses_two_versions_of_it() -> None:
    early, late = filled(range(4)), filled(range(2, 7))
    assert same(early + late, filled(range(7)))
    assert same(early + early, early)
    other = InRunShapley()
    add(other, [(d, i, v + 1, s) for d, i, v, s in part(3)], 3)
    with pytest.raises(ValueError, match=r"run '', iteration 3, .*, with different samples or values"):
        early + other
    named = InRunShapley(run="seed 2")
    add(named, part(3), 3)
    assert_holds(early + named, [*map(part, range(4)), part(3)])


def test_a_merged_ledger_goes_to_a_folder_and_on(tmp_path: Path) -> None:
    merged = InRunShapley.merge([filled(range(3)), filled(range(2), rank=1)], folder=tmp_path)
    assert not list(tmp_path.iterdir())
    merged.save()
    again = InRunShapley.merge([filled(range(4))], folder=tmp_path)
    again.save()
    assert_holds(InRunShapley(tmp_path), [*map(part, range(4)), *(part(i, 0, 1) for i in range(2))])
    assert not add(again, part(2), 2)
    assert add(again, part(4), 4)
    assert not add(filled(range(3)) + filled(range(5, 6)), part(5), 5)


def test_an_operand_of_a_merge_stays_as_it_is() -> None:
    one, other = filled(range(3)), filled(range(3, 5))
    merged = one + other
    add(merged, part(9), 9)
    assert same(one, filled(range(3)))
    assert add(one, part(3), 3)


@settings(max_examples=60, deadline=None)
@given(
    order=st.permutations(range(12)),
    cuts=st.sets(st.integers(1, 11), max_size=3),
    overlap=st.integers(0, 3),
    data=st.data(),
)
def test_the_order_of_adds_and_merges_changes_no_bit(order: list[int], cuts: set[int], overlap: int, data: Any) -> None:
    keys = [(iteration, micro_step, rank) for iteration in range(3) for micro_step in range(2) for rank in range(2)]
    ledgers = []
    for start, stop in pairwise([0, *sorted(cuts), 12]):
        ranks = [InRunShapley(rank=rank) for rank in range(2)]
        for place in order[max(start - overlap, 0) : stop]:
            iteration, micro_step, rank = keys[place]
            add(ranks[rank], part(*keys[place]), iteration, micro_step)
        ledgers += ranks
    merged = InRunShapley()
    for ledger in data.draw(st.permutations(ledgers)):
        merged = merged + ledger
    reference = InRunShapley.merge([filled(range(3), micro_steps=2, rank=rank) for rank in range(2)])
    assert same(merged, reference)
    assert same(InRunShapley.merge(ledgers), reference)
    assert_holds(merged, [part(*key) for key in keys])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_by_name_and_nothing_is_lost(tmp_path: Path, bad: float) -> None:
    ledger = filled(range(2), folder=tmp_path)
    with pytest.raises(FloatingPointError, match=rf"1 of 2 samples .* iteration 2: sample 8 of law \({bad:g}\)"):
        ledger.add([7, 8], [1.0, bad], domains=["law", "law"], iteration=2)
    with pytest.raises(FloatingPointError, match=r"sample 7 \("):
        ledger.add([7, 8], [1.0, 1.0], second_order=[bad, 0.0], iteration=2)
    assert add(ledger, part(2), 2)
    ledger.save()
    assert same(InRunShapley(tmp_path), filled(range(3)))


def test_bad_arguments_are_named() -> None:
    ledger = InRunShapley()
    with pytest.raises(ValueError, match=r"sample_id \[2\], domain \[2\], value \[3\], second_order \[2\]"):
        ledger.add([1, 2], [1.0, 2.0, 3.0], iteration=0)
    with pytest.raises(ValueError, match=r"sample_id \[2\], domain \[1\]"):
        ledger.add([1, 2], [1.0, 2.0], domains=["law"], iteration=0)
    for values in (torch.ones(1, 2), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"value \[1(, 2)?\]"):
            ledger.add([1, 2], values, iteration=0)
    with pytest.raises(FloatingPointError, match=r"sample 2 \(nan\)"):
        ledger.add([1, 2], [1.0, None], iteration=0)
    with pytest.raises(ValueError, match="sample_ids: 9223372036854775808 does not fit into 64 bits"):
        ledger.add([2**63], [1.0], iteration=0)
    with pytest.raises(TypeError, match=r"integers or \(domain, offset\) pairs, not 0\.5"):
        ledger.add([0.5, 2], [1.0, 2.0], iteration=0)
    with pytest.raises(ValueError, match="give domains in sample_ids"):
        ledger.add([("law", 1)], [1.0], domains=["law"], iteration=0)
    with pytest.raises(ValueError, match="iteration=-1"):
        ledger.add([1], [1.0], iteration=-1)
    with pytest.raises(ValueError, match="in memory"):
        ledger.save()
    assert ledger.by_sample().num_rows == 0


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path = filled(range(5), folder=tmp_path).save()
    assert path is not None
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[40] ^= 0xFF
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "flipped": content}[damage])
    with pytest.raises(ValueError, match=r"values-00000000-rank0000\.parquet is damaged"):
        InRunShapley(tmp_path)


def test_a_foreign_file_is_named(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"x": [1]}), tmp_path / "values-00000000-rank0000.parquet")
    with pytest.raises(ValueError, match=r"rank0000\.parquet is not a file of a ledger: its columns are x"):
        InRunShapley(tmp_path)


def test_a_file_in_the_folders_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "values").touch()
    with pytest.raises(NotADirectoryError, match="values is a file"):
        InRunShapley(tmp_path / "values")


def test_a_copied_file_is_not_counted_twice_in_silence(tmp_path: Path) -> None:
    path = filled(range(2), folder=tmp_path).save()
    assert path is not None
    (tmp_path / "values-00000007-rank0000.parquet").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"values-00000007.* and values-00000000.* both have iteration 0"):
        InRunShapley(tmp_path)


def test_a_failed_write_keeps_the_values_for_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = filled(range(2), folder=tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk is full"):
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk is full")))
        ledger.save()
    assert InRunShapley(tmp_path).by_sample().num_rows == 0
    ledger.save()
    assert same(InRunShapley(tmp_path), filled(range(2)))


RUN = """
import sys
from pathlib import Path
from test_ledger import add, part
from ghostfunc.ledger import InRunShapley
ledger = InRunShapley(Path(sys.argv[1]))
for iteration in range(100_000):
    add(ledger, part(iteration), iteration)
    if iteration % 3 == 2:
        ledger.save()
        print(iteration, flush=True)
"""


def test_a_run_killed_while_it_writes_keeps_what_was_saved_and_goes_on(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    with subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path)], env=environment, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        saved = [int(run.stdout.readline()) for _ in range(15)][-1]
        run.send_signal(signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL
    ledger = InRunShapley(tmp_path)
    counted = [add(ledger, part(iteration), iteration) for iteration in range(saved + 200)]
    survived = counted.index(True)
    assert survived > saved and survived % 3 == 0 and all(counted[survived:])
    ledger.save()
    assert same(InRunShapley(tmp_path), filled(range(saved + 200)))


KILLED_AT = """
import os, signal, sys
from pathlib import Path
from test_ledger import add, part
from ghostfunc.ledger import InRunShapley
folder, function, at, action = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
ledger = InRunShapley(folder)
module = os if hasattr(os, function) else Path
original, calls = getattr(module, function), 0
def dying(*args, **kwargs):
    global calls
    calls += 1
    if calls == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(module, function, dying)
if action == "save":
    add(ledger, part(6), 6)
    ledger.save()
else:
    ledger.resume(1)
"""


@pytest.mark.parametrize(
    ("action", "function", "at", "left"),
    [
        ("save", "fsync", 1, range(6)),
        ("save", "replace", 1, range(6)),
        ("save", "fsync", 2, range(7)),
        ("resume", "replace", 1, range(6)),
        ("resume", "unlink", 1, [0, 2, 3, 4, 5]),
        ("resume", "unlink", 2, [0, 4, 5]),
    ],
)
def test_a_kill_inside_leaves_a_ledger_and_the_next_process_ends_the_work(
    tmp_path: Path, action: str, function: str, at: int, left: Any
) -> None:
    ledger = InRunShapley(tmp_path)
    for iteration in range(6):
        add(ledger, part(iteration), iteration)
        if iteration % 2:
            ledger.save()
    run = run_python(KILLED_AT, tmp_path, function, at, action)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert_holds(InRunShapley(tmp_path), [part(iteration) for iteration in left])
    ledger = InRunShapley(tmp_path)
    ledger.resume(1)
    for iteration in range(1, 9):
        assert add(ledger, part(iteration), iteration)
    ledger.save()
    assert same(InRunShapley(tmp_path), filled(range(9)))


def dot_log(folder: Path, *, learning_rate: float = 0.5, dots: tuple[float, float] = (2.0, -4.0)) -> Path:
    log = DotLog(folder, config={})
    for iteration, micro_step in [(0, 0), (0, 1), (1, 0)]:
        log.append(
            iteration=iteration,
            micro_step=micro_step,
            sample_ids=[4, 5],
            domains=["law", "code"],
            losses=[1.0, 1.0],
            learning_rate=learning_rate,
            dots=dots,
        )
    log.save()
    return folder


def test_a_dot_log_becomes_a_ledger(tmp_path: Path) -> None:
    ledger = InRunShapley.from_dot_log(dot_log(tmp_path))
    # 4 samples in iteration 0 and 2 in iteration 1: lr / n * dot.
    weight = 0.5 / 4 + 0.5 / 4 + 0.5 / 2
    assert ledger.by_sample().to_pylist() == [
        {"domain": domain, "sample_id": i, "value": v, "first_order": v, "second_order": 0, "visits": 3}
        for domain, i, v in [("code", 5, -4 * weight), ("law", 4, 2 * weight)]
    ]
    assert same(ledger + InRunShapley.from_dot_log(tmp_path), ledger)
    assert (ledger + InRunShapley.from_dot_log(tmp_path, run="2")).by_sample()["visits"].to_pylist() == [6, 6]


def test_a_dot_log_without_values_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="learning rate of iteration 0 is not in the log"):
        InRunShapley.from_dot_log(dot_log(tmp_path / "rate", learning_rate=float("nan")))
    with pytest.raises(FloatingPointError, match="sample 5 of code"):
        InRunShapley.from_dot_log(dot_log(tmp_path / "dot", dots=(1.0, float("inf"))))
    with pytest.raises(FileNotFoundError, match="is not a dot log"):
        InRunShapley.from_dot_log(tmp_path / "absent")
    DotLog(tmp_path / "empty", config={})
    assert InRunShapley.from_dot_log(tmp_path / "empty").by_sample().num_rows == 0


def test_without_pyarrow_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_pyarrow(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "pyarrow":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(ImportError, match=r'the ledger of values needs pyarrow.*pip install "ghostfunc\[log\]"'):
        InRunShapley()
