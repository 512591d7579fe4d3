"""The language-model example in several processes: the numbers of one, and runs that are stopped and continued."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_world import evaluations, options_of, values, weights, write_data, write_model

from ghostfunc.dotlog import read_dot_log
from GradDotProd_LM import config_file
from GradDotProd_LM.main import main
from shared import distributed
from shared.distributed import Launch

TRAIN_SH = Path(config_file.__file__).with_name("train.sh")
TORCHRUN = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def options(data, tiny, tmp_path):
    # SGD: under Adam, rounding decides the sign of whole steps where a gradient is zero but for rounding, and dots in
    # its exact metric are as sensitive (in float64 they are compared in tests/test_engine_ranks.py).
    sgd = ("--optimizer", "sgd", "--learning_rate", 0.3)
    return partial(options_of, data, tiny, tmp_path / "one", *sgd)


def start(arguments, launcher=f"{TORCHRUN} 2", **environment):
    return subprocess.Popen(
        [TRAIN_SH, *map(str, arguments)],
        env=os.environ | {"LAUNCHER": launcher, "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process, expected=0):
    output, _ = process.communicate(timeout=500)
    assert process.returncode == expected, output
    return output


def run_in(folder):
    (run,) = folder.iterdir()
    return run


def assert_same_numbers(run, other):
    """The same to float32's rounding."""
    for name, weight in weights(run).items():
        assert (weight - weights(other)[name]).norm() <= 1e-6 * weight.norm(), name
    for row, expected in zip(evaluations(run), evaluations(other), strict=True):
        assert row == pytest.approx(expected, rel=1e-6)
    assert (run / "config.json").read_text() == (other / "config.json").read_text() and run.name == other.name


def assert_same_scores(run, other):
    log, others = read_dot_log(run), read_dot_log(other)
    for column in ("iteration", "micro_step", "sample_id", "domain", "learning_rate"):
        assert log[column].equals(others[column]), column
    close(log["dot"], others["dot"])
    ledger, expected = values(run), values(other)
    for column in ("domain", "sample_id", "visits"):
        assert ledger[column].equals(expected[column]), column
    for column in ("value", "second_order"):
        close(ledger[column], expected[column])


def close(column, expected):
    found, expected = column.to_numpy(), expected.to_numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.linalg.norm(expected))


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["--method", "Regular"],
        ["--gradient_accumulation_steps", 2, "--interleave_plain", 2],
        ["--method", "Regular", "--gradient_accumulation_steps", 2],
        ["--order", 2, "--val_batch_size", 3],
        ["--val_batch_size", 1],
    ],
    ids=lambda arguments: " ".join(map(str, arguments[:2])),
)
def test_two_processes_have_the_numbers_of_one(options, tmp_path, arguments):
    more = ["--max_steps", 4, *arguments]
    output = finished(start([*options(*more), "--batch_size", 2, "--results_dir", tmp_path / "two"]))
    assert output.count("results:") == 1 and "in 2 processes" in output
    run, other = run_in(tmp_path / "two"), main(options(*more))
    assert_same_numbers(run, other)
    if "Regular" not in arguments:
        assert {path.name for path in (run / "dot_log").glob("*.safetensors")} == {"val_batch.safetensors"}
        assert_same_scores(run, other)
    assert json.loads((run / "timing.json").read_text())["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_in_two_processes(options, tmp_path, dtype):
    more = ["--train_dtype", dtype, "--gradient_accumulation_steps", 2, "--dot_prod_save_interval", 2]
    finished(start([*options(*more), "--batch_size", 2, "--results_dir", tmp_path / "two"]))
    run, other = run_in(tmp_path / "two"), main(options(*more))
    for name, weight in weights(run).items():
        assert weight.isfinite().all() and (weight - weights(other)[name]).norm() <= 1e-2 * weight.norm(), name
    dots, expected = (read_dot_log(folder)["dot"].to_numpy() for folder in (run, other))
    np.testing.assert_allclose(dots, expected, rtol=0, atol=0.02 * np.abs(expected).max())


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks in /proc")
def test_a_signal_to_one_rank_stops_both_at_one_step_and_either_number_goes_on(options, tmp_path):
    long = options("--max_steps", 60, "--eval_interval", 6, "--eval_iter", 1, "--dot_prod_save_interval", 4)
    cut = [*long, "--batch_size", 2, "--results_dir", tmp_path / "cut"]
    process = start(cut)
    deadline = time.monotonic() + 300
    while not any(file.read_text().count("\n") > 2 for file in tmp_path.glob("cut/*/evaluations.csv")):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before its second evaluation"
        time.sleep(0.01)
    os.kill(children_of(process.pid)[-1], signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0 and "stopped by SIGTERM after" in output and output.count("stopped by SIGTERM") == 1
    run = run_in(tmp_path / "cut")
    (checkpoint,) = (run / "checkpoint").iterdir()
    done = int(checkpoint.name.removeprefix("step-"))
    assert 12 <= done < 60
    assert read_dot_log(run).num_rows == done * 4

    middle = start([*cut, "--max_steps", 60])
    deadline = time.monotonic() + 300
    while not any(file.read_text().count("\n") > 6 for file in tmp_path.glob("cut/*/evaluations.csv")):
        assert middle.poll() is None and time.monotonic() < deadline, "the run ended before its sixth evaluation"
        time.sleep(0.01)
    middle.send_signal(signal.SIGTERM)  # to torchrun, which hands it on
    output, _ = middle.communicate(timeout=300)
    assert f"continuing after {done} steps" in output and "stopped by SIGTERM after" in output
    assert main([*long, "--results_dir", str(tmp_path / "cut")]) == run  # in one process, with the batch of both
    whole = main(long)
    assert_same_numbers(run, whole)
    assert_same_scores(run, whole)


@pytest.mark.slow
def test_srun_says_who_a_process_is(options, tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    started = [
        start(
            [*options("--max_steps", 2), "--batch_size", 2, "--results_dir", tmp_path / "two"],
            launcher=sys.executable,
            SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), SLURM_STEP_NUM_TASKS="2",
            MASTER_ADDR="localhost", MASTER_PORT=str(port),
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [finished(process) for process in started]
    assert "in 2 processes" in outputs[0] and "parameters" not in outputs[1]
    run, other = run_in(tmp_path / "two"), main(options("--max_steps", 2))
    assert_same_numbers(run, other)
    assert_same_scores(run, other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "message"),
    [
        ('exec {python} "$@" --learning_rate 0.$((RANK + 1))', "different options or data: learning_rate: 0.1 in"),
        ('RESULTS_DIR={folder}/$RANK exec {python} "$@"', "is another folder for process 1 on"),
        ('[ $RANK = 0 ] || set -- "$@" --data_dir nowhere; exec {python} "$@"', "process 1: "),
    ],
    ids=["options", "disks", "data"],
)
def test_processes_that_do_not_fit_each_other_are_refused(options, tmp_path, script, message):
    wrapper = tmp_path / "wrapper.sh"
    wrapper.write_text("#!/bin/sh\n" + script.format(python=sys.executable, folder=tmp_path) + "\n")
    wrapper.chmod(0o755)
    arguments = options()
    if "RESULTS_DIR" in script:
        at = arguments.index("--results_dir")
        del arguments[at : at + 2]
    process = start(arguments, launcher=f"{TORCHRUN} 2 --no-python {wrapper}")
    output = finished(process, expected=1)
    assert message in output, output
    assert "Traceback (most recent call last)" not in output.split("error:")[0]


def test_who_a_process_is(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    assert distributed._place() == (0, 1, 0)
    monkeypatch.setenv("SLURM_PROCID", "5")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert distributed._place() == (0, 1, 0)  # a batch script: srun has not started it
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert distributed._place() == (5, 8, 1)
    for name, value in (("RANK", "2"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert distributed._place() == (2, 4, 0)  # torchrun in a step of srun's
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match=r"MASTER_ADDR.*where process 0 of 4 is"), distributed.launched("cpu", 1.0):
        pass


def test_one_process_is_a_launch_too(tmp_path):
    launch = Launch(torch.device("cpu"))
    assert launch.is_first and launch.gathered("x") == ["x"] and launch.highest(3) == 3
    launch.require_same("options", {"a": 1})
    launch.require_shared(tmp_path / "new")
    with pytest.raises(ZeroDivisionError), launch.together():
        _ = 1 / 0
