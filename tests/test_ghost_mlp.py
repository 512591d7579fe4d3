"""The smallest example runs, and prints what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]


def run(*arguments: str) -> str:
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / "ghost_mlp.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, text=True, capture_output=True, check=True, timeout=120).stdout


def numbers(line: str) -> list[float]:
    return [float(number) for number in re.search(r"\[(.*)\]", line)[1].split(",")]


def test_ten_steps_print_each_parameter_s_dots_their_sum_and_a_validation_loss() -> None:
    printed = run()
    lines = printed.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("step")] == [f"step {i}" for i in range(10)]
    for start in (i for i, line in enumerate(lines) if line.startswith("step")):
        dots = lines[start + 1 : start + 7]
        assert [line.split()[0] for line in dots] == NAMES
        total = [sum(column) for column in zip(*map(numbers, dots), strict=True)]
        assert lines[start + 7].split()[0] == "sum"
        assert numbers(lines[start + 7]) == pytest.approx(total, abs=4e-4)  # seven roundings to four digits
        assert len(total) == 8
    first_loss = float(lines[0].split()[-1])
    final_loss = float(re.fullmatch(r"final validation loss: (\d+\.\d+)", lines[-1])[1])
    assert 0 < final_loss < first_loss
    assert run() == printed
