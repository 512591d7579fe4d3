"""The log: a kill at any moment leaves what is saved readable, and a resumed run neither loses nor repeats a row."""

import builtins
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ghostfunc.dotlog import DotLog, read_dot_log

pa = pytest.importorskip("pyarrow")
ROOT = Path(__file__).parents[1]
COLUMNS = ["iteration", "micro_step", "sample_id", "domain", "loss", "learning_rate", "dot"]


def rows(iteration: int, micro_step: int = 0) -> dict[str, Any]:
    """What a deterministic run logs in a micro-step: three samples."""
    base = 100 * iteration + 10 * micro_step
    return {
        "iteration": iteration,
        "micro_step": micro_step,
        "sample_ids": [base + 2, base, base + 1],
        "domains": ["law", "code", "law"],
        "losses": torch.tensor([1.0, 2.0, 3.0]) + iteration,
        "learning_rate": 1e-3 * (iteration + 1),
        "dots": torch.tensor([0.5, -0.25, 0.125], dtype=torch.float64) * (base + 1),
    }


def write(folder: Path, iterations: range, *, save_every: int, micro_steps: int = 1) -> DotLog:
    log = DotLog(folder, config={"seed": 1})
    for iteration in iterations:
        for micro_step in range(micro_steps):
            log.append(**rows(iteration, micro_step))
        if iteration % save_every == save_every - 1:
            log.save()
    log.save()
    return log


def expected(iterations: range, micro_steps: int = 1) -> list[dict[str, Any]]:
    table = []
    for iteration in iterations:
        for micro_step in range(micro_steps):
            r = rows(iteration, micro_step)
            for i in range(3):
                values = (
                    iteration,
                    micro_step,
                    r["sample_ids"][i],
                    r["domains"][i],
                    r["losses"][i].item(),
                    r["learning_rate"],
                    r["dots"][i].item(),
                )
                table.append(dict(zip(COLUMNS, values, strict=True)))
    return table


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, text=True, capture_output=True, timeout=120)


def test_a_table_has_every_row_in_the_order_of_the_run(tmp_path: Path) -> None:
    write(tmp_path, range(7), save_every=3, micro_steps=2)
    assert len(list(tmp_path.glob("dots-*.parquet"))) == 3
    table = read_dot_log(tmp_path)
    assert table.column_names == COLUMNS
    types = ["int64", "int32", "int64", "string", "float", "double", "double"]
    assert [str(field.type) for field in table.schema] == types
    assert table.to_pylist() == expected(range(7), 2)


def test_file_names_sort_as_their_rows_do(tmp_path: Path) -> None:
    log = DotLog(tmp_path, config={})
    for iteration in (9, 10, 99, 100, 1_000_000):
        log.append(**rows(iteration))
        log.save()
    files = sorted(tmp_path.glob("dots-*.parquet"))
    assert [pa.parquet.read_table(file)["iteration"][0].as_py() for file in files] == [9, 10, 99, 100, 1_000_000]


def test_saving_an_empty_buffer_writes_nothing(tmp_path: Path) -> None:
    log = DotLog(tmp_path, config={})
    assert log.save() is None
    log.append(**rows(0))
    assert log.save() == tmp_path / "dots-000000000000-000000.parquet"
    assert log.save() is None
    assert read_dot_log(tmp_path).num_rows == 3


def test_a_run_folder_with_its_own_config_is_read_through_dot_log(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    write(tmp_path / "dot_log", range(2), save_every=1)
    assert read_dot_log(tmp_path).to_pylist() == expected(range(2))


def of_rank(rank: int, **row: Any) -> dict[str, Any]:
    """The rows that a rank has of a micro-step of two ranks: one or two of three samples."""
    mine = slice(0, 1) if rank == 0 else slice(1, 3)
    return {name: value if np.isscalar(value) else value[mine] for name, value in row.items()}


def write_as_ranks(folders: list[Path], iterations: range, *, save_every: int) -> list[DotLog]:
    """A log of two ranks, which do not save at the same time."""
    logs = [DotLog(folder, config={"seed": 1}, rank=rank) for rank, folder in enumerate(folders)]
    for iteration in iterations:
        for micro_step in range(2):
            for rank, log in enumerate(logs):
                log.append(**of_rank(rank, **rows(iteration, micro_step)))
                if (iteration + rank) % save_every == save_every - 1:
                    log.save()
    for log in logs:
        log.save()
    return logs


@pytest.mark.parametrize("disks", ["one", "two"])
def test_the_files_of_all_ranks_are_one_table(tmp_path: Path, disks: str) -> None:
    folders = [tmp_path] * 2 if disks == "one" else [tmp_path / "a", tmp_path / "b"]
    write_as_ranks(folders, range(7), save_every=3)
    assert list(tmp_path.rglob("dots-*-rank0001.parquet"))
    table = read_dot_log(tmp_path if disks == "one" else [folders[1], folders[0]])
    assert table.column_names == COLUMNS
    assert table.to_pylist() == expected(range(7), 2)


def test_folders_that_are_no_parts_of_one_log_are_refused(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / name, range(2), save_every=1)
    with pytest.raises(ValueError, match=r"both have iteration [01], micro_step 0 of rank 0"):
        read_dot_log([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(FileNotFoundError, match="nowhere is not a dot log"):
        read_dot_log([tmp_path / "a", tmp_path / "nowhere"])


def test_a_resumed_run_may_have_fewer_ranks(tmp_path: Path) -> None:
    write_as_ranks([tmp_path] * 2, range(8), save_every=3)
    log = DotLog(tmp_path, config={"seed": 1}, rank=0)
    log.resume(4)
    assert read_dot_log(tmp_path).to_pylist() == expected(range(4), 2)
    for micro_step in range(2):
        log.append(**rows(4, micro_step))
    log.save()
    assert read_dot_log(tmp_path).to_pylist() == expected(range(5), 2)


def test_a_rank_goes_on_after_its_own_rows_and_leaves_the_files_of_others(tmp_path: Path) -> None:
    first, second = write_as_ranks([tmp_path] * 2, range(3), save_every=1)
    first.append(**of_rank(0, **rows(3)))
    first.save()
    being_written = tmp_path / "dots-000000000003-000000.parquet.tmp"
    being_written.write_bytes(b"by rank 0")
    second = DotLog(tmp_path, config={"seed": 1}, rank=1)
    assert being_written.exists()
    second.append(**of_rank(1, **rows(3)))
    with pytest.raises(ValueError, match="already goes up to iteration 3"):
        first.append(**of_rank(0, **rows(3)))
    second.save()
    assert read_dot_log(tmp_path).to_pylist() == expected(range(3), 2) + expected(range(4))[-3:]
    DotLog(tmp_path, config={"seed": 1}, rank=0)
    assert not being_written.exists()


def test_a_folder_named_like_a_partition_adds_no_column(tmp_path: Path) -> None:
    folder = tmp_path / "lr=0.1"
    write(folder, range(1), save_every=1)
    assert read_dot_log(folder).column_names == COLUMNS


def test_a_folder_without_a_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a dot log"):
        read_dot_log(tmp_path / "absent")


@pytest.mark.parametrize("kind", ["tensor", "bfloat16", "numpy", "list"])
def test_columns_may_be_tensors_arrays_or_lists(tmp_path: Path, kind: str) -> None:
    make = {
        "tensor": torch.tensor,
        "bfloat16": lambda values: torch.tensor(values, dtype=torch.bfloat16),
        "numpy": np.array,
        "list": list,
    }[kind]
    ids = [3, 4] if kind == "bfloat16" else make([3, 4])
    log = DotLog(tmp_path, config={})
    log.append(
        iteration=0,
        sample_ids=ids,
        domains=["", ""],
        losses=make([1.5, 2.5]),
        learning_rate=0.5,
        dots=make([float("nan"), -0.5]),
    )
    log.save()
    table = read_dot_log(tmp_path).to_pydict()
    assert table["sample_id"] == [3, 4]
    assert table["loss"] == [1.5, 2.5]
    assert np.isnan(table["dot"][0])  # stored, not hidden as a null
    assert table["dot"][1] == -0.5


def test_an_empty_micro_batch_leaves_no_row(tmp_path: Path) -> None:
    log = DotLog(tmp_path, config={})
    log.append(iteration=0, sample_ids=[], domains=[], losses=torch.zeros(0), learning_rate=0.1, dots=torch.zeros(0))
    assert log.save() is None


def test_columns_of_different_lengths_are_refused(tmp_path: Path) -> None:
    log = DotLog(tmp_path, config={})
    with pytest.raises(ValueError, match="sample_id 3, domain 1, loss 3, dot 3"):
        log.append(**rows(0) | {"domains": ["law"]})


def test_fractional_sample_ids_are_refused(tmp_path: Path) -> None:
    log = DotLog(tmp_path, config={})
    with pytest.raises(TypeError, match="float"):
        log.append(**rows(0) | {"sample_ids": [0.5, 1.0, 2.0]})


def test_a_micro_step_cannot_be_logged_twice(tmp_path: Path) -> None:
    log = write(tmp_path, range(4), save_every=2)
    message = r"append\(iteration=2, micro_step=0\).*iteration 3, micro_step 0.*resume\(2\)"
    with pytest.raises(ValueError, match=message):
        log.append(**rows(2))
    with pytest.raises(ValueError, match=message):  # nor by a run that starts again in the same folder
        DotLog(tmp_path, config={"seed": 1}).append(**rows(2))


def test_the_configuration_is_stored_once_and_never_replaced(tmp_path: Path) -> None:
    config = {"seed": 1, "folder": Path("data"), "dtype": torch.bfloat16, "layers": (1, 2)}
    DotLog(tmp_path, config=config)
    DotLog(tmp_path, config=config)
    stored = {"seed": 1, "folder": "data", "dtype": "torch.bfloat16", "layers": [1, 2]}
    assert json.loads((tmp_path / "config.json").read_text()) == stored
    with pytest.raises(FileExistsError, match=r"config\.json.*another configuration \(seed: 1 there, 2 now\)"):
        DotLog(tmp_path, config=config | {"seed": 2})
    assert json.loads((tmp_path / "config.json").read_text()) == stored


def test_a_configuration_that_json_cannot_hold_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="cannot hold a Linear"):
        DotLog(tmp_path, config={"model": torch.nn.Linear(1, 1)})


def test_the_validation_batch_is_stored_once_and_never_replaced(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    ids = torch.arange(6).view(2, 3)
    DotLog(tmp_path, config={}, val_batch={"input_ids": ids, "labels": ids})  # one memory, two names
    DotLog(tmp_path, config={}, val_batch={"input_ids": ids.clone(), "labels": ids})
    stored = load_file(tmp_path / "val_batch.safetensors")
    assert torch.equal(stored["input_ids"], ids)
    assert torch.equal(stored["labels"], ids)
    with pytest.raises(FileExistsError, match=r"val_batch\.safetensors holds another validation batch"):
        DotLog(tmp_path, config={}, val_batch={"input_ids": ids + 1, "labels": ids})


@pytest.mark.parametrize("cut", [0, 1, 3, 4, 6, 9, 100])
def test_resuming_leaves_exactly_the_rows_before_the_cut_and_goes_on(tmp_path: Path, cut: int) -> None:
    write(tmp_path, range(7), save_every=3, micro_steps=2)
    log = DotLog(tmp_path, config={"seed": 1})
    log.resume(cut)
    assert read_dot_log(tmp_path).to_pylist() == expected(range(min(cut, 7)), 2)
    write(tmp_path, range(min(cut, 7), 9), save_every=2, micro_steps=2)
    assert read_dot_log(tmp_path).to_pylist() == expected(range(9), 2)


def test_resuming_drops_buffered_rows_too(tmp_path: Path) -> None:
    log = DotLog(tmp_path, config={})
    for iteration in range(4):
        log.append(**rows(iteration))
    log.resume(2)
    log.append(**rows(2))
    log.save()
    assert read_dot_log(tmp_path).to_pylist() == expected(range(3))


def test_leftover_temporary_files_are_ignored_and_then_removed(tmp_path: Path) -> None:
    write(tmp_path, range(2), save_every=1)
    leftover = tmp_path / "dots-000000000002-000000.parquet.tmp"
    leftover.write_bytes(b"half a fi")
    assert read_dot_log(tmp_path).to_pylist() == expected(range(2))
    DotLog(tmp_path, config={"seed": 1})
    assert not leftover.exists()


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped"])
def test_a_damaged_file_is_named_and_resuming_before_it_mends_the_log(tmp_path: Path, damage: str) -> None:
    log = write(tmp_path, range(6), save_every=2)
    path = tmp_path / "dots-000000000002-000000.parquet"
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[40] ^= 0xFF
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "flipped": content}[damage])
    with pytest.raises(ValueError, match=r"dots-000000000002-000000\.parquet is damaged .*resumes from iteration 2"):
        read_dot_log(tmp_path)
    log.resume(2)
    assert read_dot_log(tmp_path).to_pylist() == expected(range(2))


def test_a_foreign_parquet_file_is_named(tmp_path: Path) -> None:
    write(tmp_path, range(1), save_every=1)
    path = tmp_path / "dots-000000000001-000000.parquet"
    pa.parquet.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(
        ValueError, match=r"dots-000000000001-000000\.parquet is not a file of a dot log.*columns are x"
    ):
        read_dot_log(tmp_path)


def test_a_failed_write_keeps_the_rows_for_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = DotLog(tmp_path, config={})
    log.append(**rows(0))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk is full"):
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk is full")))
        log.save()
    assert read_dot_log(tmp_path).num_rows == 0
    log.save()
    assert read_dot_log(tmp_path).to_pylist() == expected(range(1))


RUN = """
import sys
from pathlib import Path
from test_dotlog import rows
from ghostfunc.dotlog import DotLog
log = DotLog(Path(sys.argv[1]), config={"seed": 1})
for iteration in range(100_000):
    log.append(**rows(iteration))
    if iteration % 3 == 2:
        log.save()
        print(iteration, flush=True)
"""


def test_a_run_killed_while_it_writes_leaves_every_saved_row_and_resumes(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    with subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path)], env=environment, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        saved = [int(run.stdout.readline()) for _ in range(20)][-1]
        run.send_signal(signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL
    table = read_dot_log(tmp_path).to_pylist()
    assert len(table) >= 3 * (saved + 1)
    assert table == expected(range(len(table) // 3))
    log = DotLog(tmp_path, config={"seed": 1})
    log.resume(saved - 1)  # a checkpoint in the midst of a saved file
    for iteration in range(saved - 1, saved + 4):
        log.append(**rows(iteration))
    log.save()
    assert read_dot_log(tmp_path).to_pylist() == expected(range(saved + 4))


KILLED_AT = """
import os, signal, sys
from pathlib import Path
from test_dotlog import rows
from ghostfunc.dotlog import DotLog
folder, function, at, action = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
log = DotLog(folder, config={"seed": 1})
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
    log.append(**rows(8))
    log.save()
else:
    log.resume(3)
"""


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_kill_inside_a_save_leaves_the_log_as_it_was(tmp_path: Path, function: str) -> None:
    write(tmp_path, range(8), save_every=2)
    run = run_python(KILLED_AT, tmp_path, function, 1, "save")
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert len(list(tmp_path.glob("*.tmp"))) == 1
    assert read_dot_log(tmp_path).to_pylist() == expected(range(8))


@pytest.mark.parametrize(("function", "at", "left"), [("unlink", 1, 8), ("unlink", 2, 6), ("replace", 1, 4)])
def test_a_kill_inside_a_resume_leaves_no_gap_and_a_second_resume_ends_it(
    tmp_path: Path, function: str, at: int, left: int
) -> None:
    write(tmp_path, range(8), save_every=2)
    run = run_python(KILLED_AT, tmp_path, function, at, "resume")
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert read_dot_log(tmp_path).to_pylist() == expected(range(left))
    DotLog(tmp_path, config={"seed": 1}).resume(3)
    assert read_dot_log(tmp_path).to_pylist() == expected(range(3))


def test_without_pyarrow_the_message_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_pyarrow(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "pyarrow":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(ImportError, match=r'pip install "ghostfunc\[log\]"'):
        DotLog(tmp_path / "log", config={})
    with pytest.raises(ImportError, match=r'pip install "ghostfunc\[log\]"'):
        read_dot_log(tmp_path)


def test_importing_the_package_does_not_import_pyarrow() -> None:
    run = run_python("import sys, ghostfunc, ghostfunc.engine, ghostfunc.dotlog; sys.exit('pyarrow' in sys.modules)")
    assert run.returncode == 0, run.stderr
