"""The benchmark of search runs, and the table in docs/index.md is that of its committed results."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "search.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_search", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_it_runs_on_twenty_thousand_rows(script: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = "--rows 20000 --dim 32 --shard_rows 4096 --queries 4 --kinds ivf --threads 1".split()
    command = [sys.executable, str(SCRIPT), *options, "--folder", str(tmp_path), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert script.table(results) in done.stdout
    assert [row["what"] for row in results["searches"]] == [
        "exact, dot", "exact, cosine", "exact, both ends", "FAISS ivf", "FAISS ivf", "FAISS ivf",
    ]  # fmt: skip
    recalls = [row["recall"] for row in results["searches"] if "recall" in row]
    assert recalls == sorted(recalls) and recalls[-1] > 0.7
    assert all(row["memory"] > 0 and row["again"][0] > 0 for row in results["searches"])
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"], "the store was left behind"


def test_the_table_in_the_docs_is_that_of_the_results(script: ModuleType) -> None:
    results = json.loads(script.RESULTS.read_text())
    assert results["store"]["rows"] == 10_000_000
    assert script.table(results) in (ROOT / "docs" / "index.md").read_text()


def test_the_table_of_reading_speed_is_that_of_its_results() -> None:
    spec = importlib.util.spec_from_file_location("benchmark_store", ROOT / "benchmarks" / "store.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    results = json.loads((ROOT / "benchmarks" / "results" / "store.json").read_text())
    assert module.table(results) in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert set(results["megabytes_a_second"]) == set(module.DTYPES)
