"""The projection example under torchrun: the rows of one process, by any number of them, whatever is killed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from ghostfunc.index import Store
from GradProj_LM import config_file
from GradProj_LM.main import main

pytestmark = pytest.mark.slow
HERE = Path(config_file.__file__).parent
VOCABULARY, BLOCK, BLOCKS, BATCH = 256, 16, 150, 2
POISON = VOCABULARY - 1  # a token that no block has, unless a test puts it there
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A model and data of two domains."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(3)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32, "vocab_size": VOCABULARY}
    # Untied, so that a NaN in the embedding of a token reaches nothing but what reads the token.
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.wte.weight[POISON] = torch.nan
    model.save_pretrained(folder / "model")
    draw = np.random.default_rng(0)
    (folder / "data").mkdir()
    for domain, blocks in {"Github": BLOCKS - 40, "Wikipedia_en": 40}.items():
        ids = draw.integers(0, POISON, BLOCK * blocks + 5)
        ids.astype("<u2").tofile(folder / "data" / f"train-{domain}.bin")
    return folder


def arguments(world: Path, output: object, *more: object) -> list[str]:
    fixed = {
        "checkpoint": world / "model",
        "data_dir": world / "data",
        "output_dir": output,
        "device": "cpu",
        "block_size": BLOCK,
        "batch_size": BATCH,
        "proj_rank_total": 16,
        "proj_dtype": "float32",
        "proj_save_interval": 2,
        "timeout": 600,
    }
    return [text for name, value in fixed.items() for text in (f"--{name}", str(value))] + [str(m) for m in more]


def start(*command: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


def succeed(*command: object) -> str:
    status, output, errors = finish(start(*command))
    assert status == 0, errors
    return output


def content(run: Path) -> dict[str, bytes]:
    """All that a run leaves but its measured seconds and its options."""
    files = (path for path in run.rglob("*") if path.is_file() and path.name not in ("statistics.json", "config.json"))
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> Path:
    """The run of one process, without an interruption."""
    return main(arguments(world, tmp_path_factory.mktemp("whole") / "run"))


@pytest.fixture(scope="module")
def shared(world, tmp_path_factory) -> Path:
    """The run of two processes, by `train.sh`."""
    folder = tmp_path_factory.mktemp("two") / "run"
    launcher = " ".join([*TORCHRUN, "2"])
    succeed("env", f"LAUNCHER={launcher}", HERE / "train.sh", *arguments(world, folder))
    return folder


def test_two_processes_leave_the_bytes_of_one_with_their_batch_size(shared, whole):
    assert content(shared) == content(whole)
    store = Store(shared)
    assert store.complete and store.rows == BLOCKS
    samples = store.samples(["domain", "sample_id"]).to_pylist()
    assert [sample["sample_id"] for sample in samples] == [
        BLOCK * block for blocks in (BLOCKS - 40, 40) for block in range(blocks)
    ]
    assert [sample["domain"] for sample in samples] == ["Github"] * (BLOCKS - 40) + ["Wikipedia_en"] * 40


def test_two_processes_have_the_rows_of_one_with_twice_their_batch_size(shared, world, tmp_path):
    """To rounding: matrix products of more rows may add in another order."""
    one = Store(main(arguments(world, tmp_path / "one", "--batch_size", 2 * BATCH)))
    two = Store(shared)
    found, expected = (store.read(0, BLOCKS) for store in (two, one))
    assert ((found - expected).norm(dim=1) <= 1e-6 * expected.norm(dim=1)).all()
    found, expected = (store.samples().to_pydict() for store in (two, one))
    assert found.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-6)
    assert found == expected


def children(process: subprocess.Popen[str]) -> list[int]:
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in found.read_text().split()]


@pytest.fixture(scope="module")
def killed(world, tmp_path_factory) -> Iterator[Path]:
    """A run of two processes, the second of which was killed outright after its first shard."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    process = start(*TORCHRUN, 2, HERE / "main.py", *arguments(world, folder))
    deadline = time.monotonic() + 120
    while not (folder / "shards" / "0000-000001.json").exists():
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before its first shard"
        time.sleep(0.002)
    os.kill(children(process)[1], signal.SIGKILL)
    began = time.monotonic()
    status, _, errors = finish(process)
    assert status != 0 and "SIGKILL" in errors
    assert time.monotonic() - began < 120, "the others end with it, long before their timeout"
    missing = len(Store(folder).missing_shards)
    assert 0 < missing < BLOCKS // 4
    yield folder


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_after_a_kill_any_number_of_processes_go_on_to_the_same_bytes(killed, whole, world, tmp_path, ranks):
    shutil.copytree(killed, tmp_path / "run")
    there = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "shards").glob("*.json")}
    command = [sys.executable] if ranks == 1 else [*TORCHRUN, ranks]
    printed = succeed(*command, HERE / "main.py", *arguments(world, tmp_path / "run"))
    assert printed.count("continuing after") == 1, "the first process speaks for all"
    assert content(tmp_path / "run") == content(whole)
    assert all(path.stat().st_mtime_ns == time for path, time in there.items()), "what was there is not written again"


def test_a_sample_that_is_not_finite_ends_all_processes_with_its_name(world, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(world / "data", data)
    ids = np.memmap(data / "train-Github.bin", "<u2", "r+")
    ids[BLOCK * 6 + 3] = POISON  # in the second shard, so that the second process finds it
    ids.flush()
    status, _, errors = finish(start(*TORCHRUN, 2, HERE / "main.py", *arguments(world, tmp_path / "run"),
                                     "--data_dir", data))  # fmt: skip
    assert status != 0
    name = "the loss of 1 of 2 samples is not finite: sample 96 of Github"
    assert f"main.py: error: {name}" in errors
    assert f"main.py: error: another rank's share of this call failed. rank 1: FloatingPointError: {name}" in errors


def test_processes_without_a_shared_disk_are_refused(world, tmp_path):
    command = f'exec "{sys.executable}" "$0" "$@" --output_dir "{tmp_path}/disk-$RANK"'
    status, _, errors = finish(
        start(*TORCHRUN, 2, "--no-python", "bash", "-c", command, HERE / "main.py", *arguments(world, tmp_path))
    )
    assert status != 0
    lines = [line for line in errors.splitlines() if line.startswith("main.py: error:")]
    assert len(lines) == 2 and all("is another folder for process 1 on" in line for line in lines)
    assert not list(tmp_path.glob("disk-*/*"))


def test_full_gradients_by_two_processes_and_the_figure_by_one(shared, world, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(shared, run)
    printed = succeed(*TORCHRUN, 2, HERE / "compute_full_gradients.py", run, "--num_samples", 3)
    assert printed.count("the stored row is off by") == 3
    files = sorted((run / "full_gradients").iterdir())
    assert [file.name for file in files] == [f"sample-00000{i}.safetensors" for i in range(3)]
    by_two = [load_file(file) for file in files]
    succeed(sys.executable, HERE / "compute_full_gradients.py", run, "--num_samples", 3)
    for file, gradients in zip(files, by_two, strict=True):
        by_one = load_file(file)
        assert by_one.keys() == gradients.keys()
        assert all(torch.equal(by_one[name], gradient) for name, gradient in gradients.items())
    status, _, errors = finish(start(*TORCHRUN, 2, HERE / "plot_error_with_rank.py", run))
    assert status != 0 and "this runs in one process: start it with python" in errors
