"""The two small projection examples: what they store and print, and that their checks fail where they should."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import ghost_gradproj_lm as lm
import ghost_gradproj_mlp as mlp
import ghostfunc as gf
from ghostfunc.index import Store
from ghostfunc.text import PACKAGED_TOKENIZER, load_tokenizer


@pytest.fixture
def run(monkeypatch, capsys):
    """Run an example with arguments, and give what it printed."""

    def run_it(example: ModuleType, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [example.__name__, *map(str, arguments)])
        example.main()
        return capsys.readouterr().out

    return run_it


# ---------------------------------------------------------------- the MLP


def project(run, folder: Path, *arguments: object) -> str:
    return run(mlp, "--proj_dir", folder, "--num_steps", 7, "--test_steps", 3, *arguments)


def test_project_stores_every_batch_and_draws(run, tmp_path):
    printed = project(run, tmp_path / "store")
    store = Store(tmp_path / "store")
    assert store.rows == 7 * 8
    assert store.slices.keys() == {f"fc.{k}.weight" for k in range(3)}
    assert store.dtype == "float32"
    correlation = float(re.search(r"correlation (-?\d\.\d+);", printed)[1])
    assert 0.2 < correlation < 1
    with Image.open(tmp_path / "store" / "inner_products.png") as picture:
        assert min(picture.size) > 400
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20, "something is drawn"


def test_a_higher_rank_draws_nearer_to_the_line(run, tmp_path):
    """More numbers keep more of the inner products."""
    low = project(run, tmp_path / "low", "--proj_rank_total", 16)
    high = project(run, tmp_path / "high", "--proj_rank_total", 2048)
    low, high = (float(re.search(r"correlation (-?\d\.\d+);", text)[1]) for text in (low, high))
    assert low < high
    assert high > 0.9


def test_the_same_command_again_keeps_what_is_stored(run, tmp_path):
    first = project(run, tmp_path / "store")
    rows = Store(tmp_path / "store").read(0, 56)
    again = project(run, tmp_path / "store")
    assert "56 rows of this training, which are kept" in again
    assert Store(tmp_path / "store").rows == 56
    assert Store(tmp_path / "store").read(0, 56).equal(rows)
    assert re.search(r"correlation \S+;", again)[0] == re.search(r"correlation \S+;", first)[0]
    with pytest.raises(SystemExit, match="seed"):
        project(run, tmp_path / "store", "--seed", 7)


def test_a_longer_run_adds_to_a_shorter_one(run, tmp_path):
    project(run, tmp_path / "one")
    run(mlp, "--proj_dir", tmp_path / "two", "--num_steps", 3, "--test_steps", 2)
    project(run, tmp_path / "two")
    assert Store(tmp_path / "two").read(0, 56).equal(Store(tmp_path / "one").read(0, 56))


def test_checks_pass(run, tmp_path):
    assert run(mlp, "--mode", "non_interf", "--test_steps", 4).startswith("passed: after 4 steps and 32 stored rows")
    assert run(mlp, "--mode", "naive_check", "--test_steps", 3).startswith("passed: 24 stored rows")
    assert "2.0e-03" not in run(mlp, "--mode", "naive_check", "--proj_dtype", "bfloat16", "--test_steps", 2)
    assert not any(tmp_path.iterdir())


def disturbed_collect(disturb):
    original = gf.GradProjEngine.collect_batch

    def collect_batch(self, batch, *args, **kwargs):
        rows = original(self, batch, *args, **kwargs)
        disturb(self.module)
        return rows

    return collect_batch


FAULTS = {
    "a random number": (lambda module: torch.rand(1), "the losses"),
    "a gradient": (lambda module: gf.classification_loss(module(X), (X, Y)).sum().backward(), r"fc\.0\.weight"),
    "a mode": (lambda module: module.eval(), "the losses"),
    "a parameter's last bit": (
        lambda module: module.head.bias.data.copy_(module.head.bias.data.nextafter(torch.ones(()))),
        r"head\.bias",
    ),
}
X, Y = torch.ones(2, mlp.FEATURES), torch.tensor([0, 1])


@pytest.mark.parametrize("fault", FAULTS)
def test_non_interf_fails_when_training_is_disturbed(monkeypatch, run, fault):
    disturb, named = FAULTS[fault]
    monkeypatch.setattr(gf.GradProjEngine, "collect_batch", disturbed_collect(disturb))
    with pytest.raises(SystemExit, match=f"FAILED: projections change the training.*{named}") as stopped:
        run(mlp, "--mode", "non_interf", "--test_steps", 3)
    assert isinstance(stopped.value.code, str)  # Python prints it and exits with 1


@pytest.mark.parametrize("fault", ["scaled", "one sample", "another loss's scale"])
def test_naive_check_fails_when_projections_are_wrong(monkeypatch, run, fault):
    from ghostfunc import _proj_rows

    true = _proj_rows.ghost_grad_proj

    def wrong(*args, **kwargs):
        rows, losses = true(*args, **kwargs)
        factor = torch.ones(len(rows), 1)
        if fault == "scaled":
            factor *= 1.0001
        elif fault == "one sample":
            factor[3] = 0
        else:
            factor /= len(rows)
        return rows * factor, losses

    monkeypatch.setattr(_proj_rows, "ghost_grad_proj", wrong)
    with pytest.raises(SystemExit, match="FAILED: projections are not those of single samples' gradients"):
        run(mlp, "--mode", "naive_check", "--test_steps", 2)


def test_options_that_fit_nothing(run, tmp_path):
    with pytest.raises(SystemExit, match=r"no parameter matches 'f'.*fc\.0\.weight, fc\.0\.bias"):
        project(run, tmp_path, "--proj_layers", "f")
    with pytest.raises(SystemExit, match=r"--num_steps 0: expected 1 or more"):
        run(mlp, "--num_steps", 0)
    with pytest.raises(SystemExit, match=r"weights of linear maps.*fc\.0\.bias"):
        run(mlp, "--mode", "naive_check", "--proj_layers", "fc.0.bias")


# ---------------------------------------------------------------- the language model


@pytest.fixture(autouse=True)
def _short_passages(monkeypatch):
    monkeypatch.setattr(lm, "TOKENS", 12)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(3)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=50257, n_positions=32, bos_token_id=50256, eos_token_id=50256
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    load_tokenizer(PACKAGED_TOKENIZER).save_pretrained(folder)
    return folder


def project_texts(run, model: object, folder: Path, *arguments: object) -> str:
    options = ["--model_name", model, "--proj_dir", folder, "--num_batches", 2, "--batch_size", 3]
    return run(lm, *options, "--proj_rank_total", 16, "--proj_rank_min", 4, *arguments)


def test_similarities_are_those_of_the_stored_rows(run, model_folder, tmp_path):
    printed = project_texts(run, model_folder, tmp_path)
    store = Store(tmp_path)
    assert store.rows == 6
    assert store.dtype == "bfloat16"
    assert list(store.slices) == [
        f"transformer.h.{k}.{what}.weight" for k in (0, 1) for what in ("attn.c_attn", "mlp.c_fc")
    ]
    rows = nn.functional.normalize(store.read(0, 6))
    shown = [line for line in printed.splitlines() if re.match(r" +\d+ (manual|code|mathematics|characters)", line)]
    assert len(shown) == 6
    for row, line in zip(rows @ rows.T, shown, strict=True):
        assert [int(number) for number in line.split()[-6:]] == [round(100 * value) for value in row.tolist()]
    domains = [line.split()[1] for line in shown]
    assert (
        domains
        == store.samples()["domain"].to_pylist()
        == ["manual", "code", "mathematics", "characters", "manual", "code"]
    )
    assert "def dedent" in shown[1]


def test_rows_are_of_each_passage_alone(run, model_folder, tmp_path):
    """Padding changes nothing: a batch of one has the rows of a batch of three."""
    project_texts(run, model_folder, tmp_path / "three", "--proj_dtype", "float32")
    options = ["--model_name", model_folder, "--proj_dir", tmp_path / "one", "--num_batches", 6, "--batch_size", 1]
    run(lm, *options, "--proj_rank_total", 16, "--proj_rank_min", 4, "--proj_dtype", "float32")
    three, one = (Store(tmp_path / name).read(0, 6) for name in ("three", "one"))
    assert ((three - one).norm(dim=1) <= 1e-5 * one.norm(dim=1)).all()


def test_the_same_command_again_reads_what_is_stored(run, model_folder, tmp_path):
    first = project_texts(run, model_folder, tmp_path)
    again = project_texts(run, model_folder, tmp_path)
    assert f"6 rows are in {tmp_path} already" in again and "nats per token" not in again
    assert again.partition("Read back")[2] == first.partition("Read back")[2]


@pytest.mark.slow
def test_two_processes_leave_the_bytes_of_one(model_folder, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    printed = {}
    for name, launcher in {"one": [], "two": torchrun}.items():
        command = [sys.executable, *launcher, lm.__file__, "--model_name", model_folder, "--proj_dir", tmp_path / name]
        done = subprocess.run(
            [*map(str, command), "--num_batches", "3", "--batch_size", "2", "--proj_rank_total", "16"],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        printed[name] = done.stdout
    one, two = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two
    tables = {text.partition("cosine x 100")[2] for text in printed.values()}
    assert len(tables) == 1 and "Mean cosine" in tables.pop(), "the first process prints what one would"


def test_embeddings_on_request_and_patterns_at_dots(run, model_folder, tmp_path):
    project_texts(run, model_folder, tmp_path / "all", "--include_embeddings", "--proj_layers", "h.1")
    maps = [f"h.1.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    names = [name.removeprefix("transformer.") for name in Store(tmp_path / "all").slices]
    assert names == ["wte.weight", "wpe.weight", *maps]
    with pytest.raises(SystemExit, match=r"no parameter matches 'c_at'.*transformer\.h\.0\.attn\.c_attn\.weight"):
        project_texts(run, model_folder, tmp_path / "none", "--proj_layers", "c_at")


def test_a_name_that_cannot_be_had(run, monkeypatch, model_folder, tmp_path):
    """Then the demo's newest checkpoint, else a fresh model; what is taken is said."""
    monkeypatch.setattr(lm, "DEMO", tmp_path)
    printed = project_texts(run, "no-such/model", tmp_path / "fresh")
    assert "no-such/model cannot be had" in printed
    assert "a fresh GPT2-Nano" in printed
    assert "untrained" in printed
    assert Store(tmp_path / "fresh").rows == 6

    run_folder = tmp_path / "results" / "a run"
    checkpoint = run_folder / "checkpoint" / "step-00000007"
    checkpoint.mkdir(parents=True)
    for file in model_folder.iterdir():
        (checkpoint / file.name).write_bytes(file.read_bytes())
    (tmp_path / "data").mkdir()
    load_tokenizer(PACKAGED_TOKENIZER).save_pretrained(tmp_path / "data" / "tokenizer")
    (run_folder / "config.json").write_text(json.dumps({"data_dir": str(tmp_path / "data")}))
    printed = project_texts(run, "no-such/model", tmp_path / "of the demo")
    assert "that `make demo` trained (step-00000007)" in printed
    assert "untrained" not in printed
    project_texts(run, model_folder, tmp_path / "named")
    assert Store(tmp_path / "of the demo").read(0, 6).equal(Store(tmp_path / "named").read(0, 6))


def test_folders_that_hold_no_model(run, model_folder, tmp_path):
    with pytest.raises(SystemExit, match="--model_name"):
        project_texts(run, tmp_path, tmp_path / "store")
    with pytest.raises(SystemExit, match="--model_name"):
        project_texts(run, "./nothing", tmp_path / "store")
    without = tmp_path / "without"
    without.mkdir()
    for file in model_folder.iterdir():
        if not file.name.startswith("tokenizer"):
            (without / file.name).write_bytes(file.read_bytes())
    with pytest.raises(SystemExit, match="has no tokenizer beside its weights"):
        project_texts(run, without, tmp_path / "store")
    with pytest.raises(SystemExit, match="need 9999 passages; there are"):
        run(lm, "--num_batches", 9999, "--batch_size", 1)
