"""The projection example: options, rows that are projected gradients, and runs that are cut and continued."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import ghostfunc as gf
from ghostfunc.index import Store, load_model
from GradDotProd_LM.main import main as train
from GradProj_LM import compute_full_gradients, config_file, plot_error_with_rank
from GradProj_LM.main import build_parser, main
from shared.utils import DTYPES

TRAIN_SH = Path(config_file.__file__).with_name("train.sh")
VOCABULARY, BLOCK = 256, 16
DOMAINS = {"Github": 10, "Wikipedia_en": 7}  # blocks of each


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    for split, prefix in [(".", "train"), ("val", "validation"), ("test", "test")]:
        (folder / split).mkdir(exist_ok=True)
        for domain, blocks in DOMAINS.items():
            ids = draw.integers(0, VOCABULARY, BLOCK * blocks + 5)  # and what is less than a block
            ids.astype("<u2").tofile(folder / split / f"{prefix}-{domain}.bin")
    (folder / "meta.json").write_text(json.dumps({"vocab_size": VOCABULARY, "eot": 0}))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model folder, dropout and all."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(3)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=32, n_positions=32, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def options(data, checkpoint, tmp_path):
    """The options of a run of seconds, and more of them in a call; a later option wins over an earlier one."""

    def build(*more):
        fixed = {
            "checkpoint": checkpoint,
            "data_dir": data,
            "output_dir": tmp_path / "run",
            "device": "cpu",
            "block_size": BLOCK,
            "proj_rank_total": 16,
            "proj_save_interval": 2,
        }
        return [text for name, value in fixed.items() for text in (f"--{name}", str(value))] + [str(m) for m in more]

    return build


def content(run):
    """All that a run leaves but its measured seconds."""
    files = (path for path in run.rglob("*") if path.is_file() and path.name not in ("statistics.json", "config.json"))
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


@pytest.mark.slow
def test_train_sh_on_data_of_the_piles_names_killed_outright_continues_to_the_same_bytes(
    data, tmp_path, monkeypatch, capsys
):
    assert os.access(TRAIN_SH, os.X_OK)
    arguments = f"--architecture GPT2-Nano --block_size {BLOCK} --batch_size 2 --max_samples 1000".split()
    arguments += ["--device", "cpu", "--proj_save_interval", "1"]
    monkeypatch.setenv("PILE_DATA_DIR", str(data))
    monkeypatch.setenv("RESULTS_DIR", str(tmp_path / "cut"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LAUNCHER", sys.executable)
    process = subprocess.Popen([TRAIN_SH, *arguments], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("cut/*/shards/*.json")):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before its first shard"
        time.sleep(0.002)
    process.kill()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL and b"untrained" in output
    (run,) = (tmp_path / "cut").iterdir()
    assert run.name.startswith("GradProj-GPT2-Nano-")
    assert 0 < len(Store(run).missing_shards) < 9

    assert main(arguments) == run
    assert "continuing after" in capsys.readouterr().out
    store = Store(run)
    assert store.rows == sum(DOMAINS.values()) and store.dtype == "bfloat16"
    assert set(store.slices) == {
        f"transformer.h.{block}.{name}.weight"
        for block in range(4)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    monkeypatch.setenv("RESULTS_DIR", str(tmp_path / "whole"))
    assert content(run) == content(main(arguments))


def test_rows_are_the_projected_gradients_of_the_blocks_in_order(options, data, checkpoint, capsys):
    run = main(options("--proj_dtype", "float32", "--proj_layers", "mlp", "--batch_size", 3))
    assert "untrained" not in capsys.readouterr().out
    store = Store(run)
    samples = store.samples().to_pylist()
    expected = [(domain, BLOCK * block) for domain, blocks in DOMAINS.items() for block in range(blocks)]
    assert [(sample["domain"], sample["sample_id"]) for sample in samples] == expected

    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    projection = gf.KroneckerProjection.load(run / "projection.safetensors")
    assert set(projection.slices) == {n for n, _ in model.named_parameters() if ".mlp." in n and n.endswith("weight")}
    for row in (0, 9, 10, 16):
        domain, offset = expected[row]
        ids = np.fromfile(data / f"train-{domain}.bin", "<u2")[offset : offset + BLOCK].astype(np.int64)
        tokens = torch.from_numpy(ids)[None]
        loss = model(input_ids=tokens, labels=tokens).loss
        gradients = dict(
            zip(projection.slices, torch.autograd.grad(loss, [model.get_parameter(n) for n in projection.slices]),
                strict=True)
        )  # fmt: skip
        projected = projection.project(gradients)
        assert (store.read(row, row + 1)[0] - projected).norm() <= 1e-4 * projected.norm()
        assert samples[row]["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_a_run_leaves_its_statistics_and_metadata(options, capsys):
    run = main(options("--verbose", "--max_samples", 5))
    statistics = json.loads((run / "statistics.json").read_text())
    metadata = json.loads((run / "metadata.json").read_text())
    assert statistics["samples"] == Store(run).rows == 5
    assert statistics["dim"] == metadata["dim"] == Store(run).dim
    assert statistics["ranks"] == {name: [layer["k_i"], layer["k_o"]] for name, layer in metadata["layers"].items()}
    measured = statistics["since_last_start"]
    assert measured["samples_per_second"] * measured["seconds"] == pytest.approx(5)
    assert measured["tokens_per_second"] == pytest.approx(BLOCK * measured["samples_per_second"])
    assert measured["peak_memory_bytes"] > 1e8
    assert "transformer.h.1.mlp.c_fc.weight" in capsys.readouterr().out  # the table of ranks
    assert main(options("--max_samples", 5)) == run
    assert "complete" in capsys.readouterr().out
    assert json.loads((run / "statistics.json").read_text()) == statistics


def test_a_run_of_graddotprod_is_a_checkpoint(options, data, checkpoint, tmp_path, capsys):
    trained = train(
        [*f"--model {checkpoint} --data_dir {data} --block_size {BLOCK} --max_steps 2 --batch_size 2".split(),
         *f"--results_dir {tmp_path / 'trained'} --device cpu --method Regular --eval_interval 9".split()]
    )  # fmt: skip
    run = main(options("--checkpoint", trained, "--max_samples", 2))
    assert "untrained" not in capsys.readouterr().out
    (newest,) = (trained / "checkpoint").iterdir()
    assert Store(run).manifest["model"]["fingerprint"] == load_model(newest).fingerprint
    assert load_model(newest).fingerprint != load_model(checkpoint).fingerprint


def test_a_signal_stops_between_batches_and_the_run_continues_to_the_same_bytes(options, tmp_path, monkeypatch, capsys):
    collect = gf.GradProjEngine.collect_batch

    def interrupted(engine, *args, **kwargs):
        if engine.rows_written == 4:
            signal.raise_signal(signal.SIGTERM)
        return collect(engine, *args, **kwargs)

    monkeypatch.setattr(gf.GradProjEngine, "collect_batch", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(options("--output_dir", tmp_path / "cut"))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "SIGTERM, 4 samples are written" in capsys.readouterr().out
    assert [shard.start for _, shard in Store(tmp_path / "cut").missing_shards] == [4, 8, 12, 16]
    monkeypatch.undo()
    run = main(options("--output_dir", tmp_path / "cut"))
    assert "continuing after 4 samples" in capsys.readouterr().out
    assert content(run) == content(main(options("--output_dir", tmp_path / "whole")))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--proj_seed", 1), "proj_seed"),
        (("--batch_size", 3), "batch_size"),
        (("--train_set", "Github"), "other data"),
        (("--max_samples", 3), "other data"),
        (("--model_dtype", "bfloat16"), r"model\.fingerprint"),
        (("--proj_layers", "mpl"), "mpl.*transformer.h.0.mlp.c_fc.weight"),
    ],
    ids=str,
)
def test_a_folder_of_another_run_is_refused_and_left_alone(options, capsys, more, named):
    run = main(options("--max_samples", 2, "--architecture", "GPT2-Nano"))
    before = content(run)
    with pytest.raises(SystemExit) as refused:
        main(options("--max_samples", 2, "--architecture", "GPT2-Nano", *more))
    assert refused.value.code == 2
    assert re.search(named, capsys.readouterr().err, re.DOTALL)
    assert content(run) == before


def test_options_that_have_no_meaning_are_refused(options, capsys, monkeypatch):
    cases = {
        ("--max_samples", "some"): "--max_samples",
        ("--batch_size", "0"): "--batch_size",
        ("--proj_dtype", "int3"): "--proj_dtype",
        ("--model_dtype", "float16", "--train_dtype", "bfloat16"): "autocast",
        ("--device", "abacus"): "no such device",
        ("--block_size", "33"): "32 positions",
        ("--data_dir", "nowhere"): "nowhere",
        ("--checkpoint", "nobody/nothing"): "nobody/nothing",
    }
    for more, named in cases.items():
        with pytest.raises(SystemExit) as refused:
            main(options(*more))
        assert refused.value.code == 2
        assert named in capsys.readouterr().err, more
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(SystemExit):
        main(options())
    assert "MASTER_ADDR must say" in capsys.readouterr().err


def test_a_layer_below_the_rank_is_named(options):
    with pytest.warns(UserWarning, match=r"transformer\.h\.0\.attn\.c_proj\.weight.*proj_rank_total=1500"):
        main(options("--proj_rank_total", 1500, "--max_samples", 1))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_and_lower_precision_agree_with_float32(options, tmp_path, dtype):
    small = ("--max_samples", 4, "--proj_dtype", "float32")
    exact = Store(main(options(*small))).read(0, 4)
    for name, more in {"cast": ("--train_dtype", dtype), "model": ("--model_dtype", dtype)}.items():
        found = Store(main(options(*small, *more, "--output_dir", tmp_path / name))).read(0, 4)
        error = (found - exact).norm(dim=1) / exact.norm(dim=1)
        assert 0 < error.max() < 16 * torch.finfo(DTYPES[dtype]).eps, (name, error)


def test_all_samples_embeddings_and_orthonormal_matrices(options):
    run = main(
        options("--max_samples", "all", "--include_embeddings", "--proj_row_orthonormal", "--proj_layers", "h.1")
    )
    assert Store(run).rows == sum(DOMAINS.values())
    projection = gf.KroneckerProjection.load(run / "projection.safetensors")
    assert projection.kind == "orthonormal"
    names = list(projection.slices)
    assert names[:2] == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert all(".h.1." in name for name in names[2:])


def test_defaults():
    found = vars(build_parser().parse_args([]))
    expected = {
        "architecture": "GPT2-Small",
        "seed": 42,
        "batch_size": 2,
        "max_samples": 1000,
        "block_size": 1024,
        "proj_layers": "mlp,attn",
        "proj_rank_total": 256,
        "proj_rank_min": 4,
        "proj_seed": 42,
        "proj_dtype": "bfloat16",
        "proj_row_orthonormal": False,
        "include_embeddings": False,
        "train_set": "pile",
        "verbose": False,
    }
    assert {name: found[name] for name in expected} == expected


def test_where_data_and_results_are(tmp_path, monkeypatch):
    for variable in ("PILE_DATA_DIR", "RESULTS_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(config_file, "PILE_DATA_DIR", tmp_path / "edited")
    monkeypatch.setattr(config_file, "RESULTS_DIR", tmp_path / "edited")
    assert config_file.data_dir() == tmp_path / "edited"
    assert config_file.output_dir(None, "run") == tmp_path / "edited" / "run"
    monkeypatch.setenv("PILE_DATA_DIR", str(tmp_path / "variable"))
    monkeypatch.setenv("RESULTS_DIR", str(tmp_path / "variable"))
    assert config_file.data_dir() == tmp_path / "variable"
    assert config_file.output_dir(None, "run") == tmp_path / "variable" / "run"
    assert config_file.data_dir(tmp_path / "flag") == tmp_path / "flag"
    assert config_file.output_dir(tmp_path / "flag", "run") == tmp_path / "flag"


# ---------------------------------------------------------------- full gradients, and the error against rank


def test_full_gradients_and_the_error_against_rank(options, checkpoint, capsys, monkeypatch):
    run = main(options("--proj_dtype", "float32"))
    with pytest.raises(SystemExit):
        plot_error_with_rank.main([str(run)])
    assert "compute_full_gradients.py" in capsys.readouterr().err
    assert compute_full_gradients.main([str(run), "--num_samples", "3"]) < 1e-4
    files = sorted((run / "full_gradients").iterdir())
    assert [file.name for file in files] == [f"sample-00000{i}.safetensors" for i in range(3)]
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert {n: g.shape for n, g in load_file(files[0]).items()} == {n: p.shape for n, p in model.named_parameters()}

    everything = 32 * 128
    rows = plot_error_with_rank.main([str(run), "--ranks", "1", "64", str(everything), "--seeds", "0", "1"])
    with (run / "error_with_rank.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [float(row["rms_error"]) for row in written] == [row["rms_error"] for row in rows]
    assert json.loads((run / "error_with_rank.json").read_text())["errors"] == rows
    assert (run / "error_with_rank.png").read_bytes().startswith(b"\x89PNG")

    def error(kind, rank):
        found = [row["rms_error"] for row in rows if (row["kind"], row["rank"]) == (kind, rank)]
        assert len(found) == 2
        return sum(found) / 2

    assert error("orthonormal", everything) < 1e-5  # a rotation
    for kind in ("gaussian", "orthonormal"):
        assert error(kind, everything) < error(kind, 64) < error(kind, 1)

    monkeypatch.setitem(compute_full_gradients.TOLERANCES, "float32", 0.0)
    with pytest.raises(SystemExit) as failed:
        compute_full_gradients.main([str(run), "--num_samples", "1"])
    assert failed.value.code == 1


def test_full_gradients_of_a_model_that_has_changed_are_refused(options, checkpoint, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "model")
    run = main(options("--checkpoint", tmp_path / "model", "--max_samples", 2))
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit) as refused:
        compute_full_gradients.main([str(run)])
    assert refused.value.code == 2
    assert "model" in capsys.readouterr().err
