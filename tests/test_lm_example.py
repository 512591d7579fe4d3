"""The language-model example: both methods, options, and runs that are cut and continued to the same numbers."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_world import VOCABULARY, evaluations, options_of, values, weights, write_data, write_model
from transformers import AutoModelForCausalLM, GPT2Config

from ghostfunc.dotlog import read_dot_log
from ghostfunc.ledger import InRunShapley
from GradDotProd_LM import config_file
from GradDotProd_LM.main import build_parser, main
from GradDotProd_LM.training_loop import Trainer
from shared.dataloader import load_corpora
from shared.model_setup import ARCHITECTURES, DataVocabulary, build_model, model_config
from shared.training_utils import Evaluations, build_optimizer, evaluate, learning_rate_at
from shared.utils import Stopped, StopRequest, pick_device, stop_request

TRAIN_SH = Path(config_file.__file__).with_name("train.sh")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def options(data, tiny, tmp_path):
    return partial(options_of, data, tiny, tmp_path / "results")


def assert_same_run(run, other):
    """The same numbers, bit for bit."""
    for name, weight in weights(run).items():
        assert torch.equal(weight, weights(other)[name]), name
    assert (run / "evaluations.csv").read_text() == (other / "evaluations.csv").read_text()
    assert read_dot_log(run).equals(read_dot_log(other))
    assert values(run).equals(values(other))


def assert_same_training(run, other):
    for name, weight in weights(run).items():
        assert (weight - weights(other)[name]).abs().max() <= 1e-5, name
    for row, expected in zip(evaluations(run), evaluations(other), strict=True):
        assert row == pytest.approx(expected, abs=1e-5)


def start(arguments, **environment):
    return subprocess.Popen(
        [TRAIN_SH, *arguments],
        env=os.environ | {"LAUNCHER": sys.executable, "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_train_sh_runs_both_methods_from_any_folder(options, tmp_path):
    assert os.access(TRAIN_SH, os.X_OK)
    processes = [start(options("--method", method)) for method in ("GradDotProd", "Regular")]
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    ghost, regular = sorted((tmp_path / "results").iterdir())
    assert ghost.name.startswith("GradDotProd-") and regular.name.startswith("Regular-")
    assert read_dot_log(ghost).num_rows == 3 * 4
    assert not (regular / "dot_log").exists() and not (regular / "values").exists()
    assert (ghost / "timing.json").exists() and (regular / "timing.json").exists()
    assert_same_training(ghost, regular)


@pytest.mark.filterwarnings("ignore:.*determinis")  # GPU operations of which torch has only one kind
def test_both_methods_leave_the_same_weights_and_evaluations(options, device, tmp_path):
    # Under Adam, rounding decides the sign of whole steps where a gradient is zero but for rounding.
    common = options("--device", device.type, "--optimizer", "sgd", "--learning_rate", 1)
    ghost, regular = main([*common, "--method", "GradDotProd"]), main([*common, "--method", "Regular"])
    assert_same_training(ghost, regular)
    start = main([*common, "--method", "Regular", "--eval_only", "--results_dir", str(tmp_path / "start")])
    assert abs(evaluations(regular)[0][2] - evaluations(start)[0][2]) > 0.01


def test_the_log_names_its_samples_and_its_dots_are_those_of_the_losses(options, data):
    run = main(options("--max_steps", 1, "--gradient_accumulation_steps", 2))
    rows = read_dot_log(run).to_pylist()
    corpora = load_corpora(data, "code,prose", "prose", block_size=16)
    drawn = [corpora.train.sample(4, seed=42, step=step) for step in (0, 1)]
    assert [row["micro_step"] for row in rows] == [0] * 4 + [1] * 4
    assert [row["sample_id"] for row in rows] == drawn[0].offsets + drawn[1].offsets
    assert [row["domain"] for row in rows] == drawn[0].domains + drawn[1].domains
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-2 / 3] * 8)

    torch.manual_seed(42)
    model = build_model(model_config("", options()[1], None, 16), None, torch.float32)
    val = corpora.val.sample(2, seed=42, step=0).tokens

    def gradient(tokens):
        loss = model(input_ids=tokens, labels=tokens).loss
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())])

    direction = gradient(val)
    for row in rows:
        own = gradient(corpora.train.at(row["domain"], row["sample_id"])[None])
        assert row["dot"] == pytest.approx((own @ direction).item(), abs=1e-5 * (own.norm() * direction.norm()).item())


def test_a_folder_is_the_same_configuration_however_it_is_written(options, data, monkeypatch):
    run = main(options("--train_set", data, "--val_set", data, "--max_steps", 1))
    monkeypatch.chdir(data.parent)
    assert main(options("--train_set", f"./{data.name}", "--val_set", data.name, "--max_steps", 1)) == run


def test_one_seed_gives_one_run_and_another_seed_another(options, tmp_path):
    first, second = (main(options("--results_dir", tmp_path / name)) for name in ("first", "second"))
    assert_same_run(first, second)
    other = main(options("--seed", 43))
    assert other.name != first.name
    assert any(not torch.equal(weight, weights(other)[name]) for name, weight in weights(first).items())


@pytest.mark.slow
def test_a_run_stopped_by_sigterm_continues_to_the_same_numbers(options, tmp_path):
    long = options("--max_steps", 60, "--eval_interval", 6, "--eval_iter", 1, "--dot_prod_save_interval", 4)
    process = start([*long, "--results_dir", tmp_path / "cut"])
    deadline = time.monotonic() + 120
    while not any(file.read_text().count("\n") > 2 for file in tmp_path.glob("cut/*/evaluations.csv")):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before its second evaluation"
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "SIGTERM" in output and "Traceback" not in output

    (run,) = (tmp_path / "cut").iterdir()
    (checkpoint,) = (run / "checkpoint").iterdir()
    done = int(checkpoint.name.removeprefix("step-"))
    assert 12 <= done < 60
    assert read_dot_log(run).num_rows == done * 4  # what was not saved yet, too

    assert main([*long, "--results_dir", str(tmp_path / "cut")]) == run
    assert_same_run(run, main([*long, "--results_dir", str(tmp_path / "whole")]))


def test_ctrl_c_saves_after_the_step(options, monkeypatch, capsys):
    update = Trainer._update

    def interrupted_update(trainer):
        if trainer.done == 1:
            signal.raise_signal(signal.SIGINT)
        update(trainer)

    monkeypatch.setattr(Trainer, "_update", interrupted_update)
    with pytest.raises(SystemExit) as stopped:
        main(options("--max_steps", 5))
    assert stopped.value.code == 128 + signal.SIGINT
    assert "SIGINT after 2 steps" in capsys.readouterr().out
    monkeypatch.undo()
    run = main(options("--max_steps", 5))
    assert "continuing after 2 steps" in capsys.readouterr().out
    assert read_dot_log(run).num_rows == 5 * 4


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_run_that_failed_keeps_its_rows_and_continues_from_its_checkpoint(
    options, tiny, tmp_path, monkeypatch, dropout
):
    model = tmp_path / "model"
    GPT2Config.from_pretrained(tiny, resid_pdrop=dropout).save_pretrained(model)
    long = options("--model", model, "--max_steps", 8, "--checkpoint_interval", 3, "--optimizer", "adamw")
    update = Trainer._update

    def failing_update(trainer):
        if trainer.done == 5:
            raise RuntimeError("the machine is on fire")
        update(trainer)

    monkeypatch.setattr(Trainer, "_update", failing_update)
    with pytest.raises(RuntimeError, match="on fire"):
        main(long)
    (run,) = (tmp_path / "results").iterdir()
    assert set(read_dot_log(run)["iteration"].to_pylist()) == set(range(6))
    monkeypatch.undo()
    assert main(long) == run
    assert_same_run(run, main([*long, "--results_dir", str(tmp_path / "whole")]))


def assert_ledger_is_that_of_the_log(run):
    ledger, logged = values(run), InRunShapley.from_dot_log(run).by_sample()
    for column in ("domain", "sample_id", "visits"):
        assert ledger[column].equals(logged[column])
    for column in ("value", "second_order"):
        found, expected = ledger[column].to_numpy(), logged[column].to_numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("arguments", [["--gradient_accumulation_steps", 3], ["--order", 2]], ids=str)
def test_the_ledger_has_the_values_that_the_log_leads_to(options, arguments):
    run = main(options("--max_steps", 4, "--checkpoint_interval", 2, *arguments))
    assert_ledger_is_that_of_the_log(run)
    assert sum(values(run)["visits"].to_pylist()) == read_dot_log(run).num_rows
    assert (np.abs(values(run)["second_order"].to_numpy()).max() > 0) == ("--order" in arguments)


@pytest.mark.parametrize("metric", ["sgd", "adam"])
def test_order_two_trains_as_order_one_does_and_its_first_order_values_are_the_same(options, metric):
    common = options("--metric", metric, "--optimizer", "sgd" if metric == "sgd" else "adam")
    first, second = (main([*common, "--order", order]) for order in ("1", "2"))
    assert_same_training(first, second)
    dots, others = (read_dot_log(run)["dot"].to_numpy() for run in (first, second))
    np.testing.assert_allclose(dots, others, rtol=0, atol=1e-4 * np.abs(dots).max())
    np.testing.assert_allclose(
        values(second)["first_order"].to_numpy(), values(first)["value"].to_numpy(), rtol=1e-3, atol=1e-6
    )
    assert np.abs(values(second)["second_order"].to_numpy()).max() > 0


@pytest.mark.slow
def test_a_run_of_order_two_killed_outright_continues_to_the_same_values(options, tmp_path):
    long = options("--max_steps", 24, "--eval_interval", 100, "--checkpoint_interval", 4, "--order", 2)
    process = start([*long, "--results_dir", tmp_path / "cut"])
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("cut/*/values/*.parquet"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before its second checkpoint"
        time.sleep(0.005)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    (run,) = (tmp_path / "cut").iterdir()
    assert len(set(values(run)["sample_id"].to_pylist())) >= 8 and sum(values(run)["visits"].to_pylist()) < 24 * 4
    assert main([*long, "--results_dir", str(tmp_path / "cut")]) == run
    assert_same_run(run, main([*long, "--results_dir", str(tmp_path / "whole")]))


def test_a_complete_run_is_reused_and_fresh_starts_over(options, capsys):
    run = main(options())
    before = (run / "timing.json").stat().st_mtime_ns
    assert main(options()) == run
    assert "complete" in capsys.readouterr().out
    assert (run / "timing.json").stat().st_mtime_ns == before
    (run / "mark").touch()
    assert main(options("--fresh")) == run
    assert not (run / "mark").exists()
    assert read_dot_log(run).num_rows == 12


def test_eval_only_evaluates_the_newest_checkpoint_and_leaves_the_log_alone(options, capsys):
    run = main(options("--eval_interval", 2))
    assert [int(row[0]) for row in evaluations(run)] == [2]
    assert main(options("--eval_interval", 2, "--eval_only")) == run
    assert "after 3 steps: train_loss" in capsys.readouterr().out
    assert [int(row[0]) for row in evaluations(run)] == [2, 3]
    assert read_dot_log(run).num_rows == 12


def test_the_checkpoint_is_a_model_folder(options, data):
    run = main(options())
    (checkpoint,) = (run / "checkpoint").iterdir()
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model.transformer.h[0].mlp.c_fc.weight, weights(run)["transformer.h.0.mlp.c_fc.weight"])
    tuned = main(options("--model", checkpoint, "--model_init", "pretrained", "--eval_only"))
    assert evaluations(tuned)[0][1:] == evaluations(run)[0][1:]


def test_architectures_are_gpt2_with_the_right_heads_and_no_dropout():
    assert {name: (s.n_layer, s.n_embd, s.n_head) for name, s in ARCHITECTURES.items() if name != "GPT2-Nano"} == {
        "GPT2-Small": (12, 768, 12),
        "GPT2-Medium": (24, 1024, 16),
        "GPT2-Large": (36, 1280, 20),
    }
    config = model_config("GPT2-Nano", None, None, 1024)
    assert (config.vocab_size, config.n_positions, config.resid_pdrop, config.attn_pdrop) == (50257, 1024, 0.0, 0.0)
    small = model_config("GPT2-Nano", None, DataVocabulary(VOCABULARY, 3), 1024)
    model = build_model(small, None, torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.training
    assert model.lm_head.weight.shape == (VOCABULARY, 128)


@pytest.mark.parametrize(
    "dtypes",
    [
        ["--model_dtype", "bfloat16"],
        ["--train_dtype", "bfloat16"],
        ["--train_dtype", "float16"],
    ],
    ids=" ".join,
)
def test_lower_precision_trains_and_its_dots_have_the_scale_of_float32(options, dtypes):
    exact = read_dot_log(main(options("--max_steps", 1)))["dot"].to_numpy()
    run = main(options("--max_steps", 2, *dtypes))
    dots = read_dot_log(run)["dot"].to_numpy()
    assert dots.shape == (8,)
    np.testing.assert_allclose(dots[:4], exact, atol=0.05 * np.abs(exact).max())
    expected = torch.bfloat16 if dtypes[0] == "--model_dtype" else torch.float32
    assert {weight.dtype for weight in weights(run).values()} == {expected}


def test_interleaved_plain_steps_are_timed_and_change_nothing(options, tmp_path):
    plain = main(options("--max_steps", 4, "--results_dir", tmp_path / "plain"))
    timed = main(options("--max_steps", 4, "--interleave_plain", 2))
    assert_same_run(plain, timed)
    timing = json.loads((timed / "timing.json").read_text())
    assert timing["steps"] == 4 and timing["interleaved"]["steps"] == 2
    assert timing["interleaved"]["ratio"] == pytest.approx(
        timing["interleaved"]["ghost_step_seconds"] / timing["interleaved"]["plain_step_seconds"]
    )
    assert timing["tokens_per_second"] == pytest.approx(4 * 16 / timing["step_seconds"])
    assert timing["torch"] == torch.__version__ and timing["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data_dir", "nowhere"], "tokenize_pile_by_domain.py"),
        (["--train_set", "pile"], "tokenize_pile_by_domain.py"),
        (["--train_set", "law"], "law"),
        (["--batch_size", "0"], "argument --batch_size: expected a whole number from 1 on, not '0'"),
        (["--batch_size", "9999"], "--batch_size"),
        (["--learning_rate", "-1"], "argument --learning_rate: expected a number above 0"),
        (["--optimizer", "lion"], "argument --optimizer: invalid choice: 'lion'"),
        (["--architecture", "GPT3"], "argument --architecture: invalid choice: 'GPT3'"),
        (["--no_such_option"], "unrecognized arguments: --no_such_option"),
        (["--block_size", "65"], "--block_size 65 is more than the 64 positions"),
        (["--device", "abacus"], "--device abacus: this machine has no such device"),
        (["--model", "no/such/folder"], "--model no/such/folder: neither a folder with a config.json"),
        (["--model_init", "pretrained"], "--model_init fresh"),
        (["--model_dtype", "float16"], "--model_dtype float32 --train_dtype float16"),
        (["--model_dtype", "bfloat16", "--train_dtype", "float32"], "autocast starts from float32 weights"),
        (["--method", "Regular", "--interleave_plain", "2"], "--interleave_plain compares with --method GradDotProd"),
        (["--method", "Regular", "--order", "2"], "--order and --metric are about --method GradDotProd"),
        (["--method", "Regular", "--on_nonfinite", "skip"], "--on_nonfinite skip is about --method GradDotProd"),
        (["--metric", "adam", "--optimizer", "sgd"], "use it with --optimizer adamw or adam"),
        (["--order", "3"], "argument --order: invalid choice: 3"),
        (["--order", "2", "--gradient_accumulation_steps", "2"], "Use a larger --batch_size, or --order 1"),
        (["--order", "2", "--train_dtype", "float16"], "Use bfloat16"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_name_the_option_and_the_remedy(options, capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refused:
        main(options(*arguments))
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


def test_a_model_with_too_small_a_vocabulary_is_refused(options, tiny, tmp_path, capsys):
    GPT2Config.from_pretrained(tiny, vocab_size=100).save_pretrained(tmp_path / "small")
    with pytest.raises(SystemExit):
        main(options("--model", tmp_path / "small"))
    error = capsys.readouterr().err
    assert "vocab_size 512" in error and "(100)" in error and "--tokenizer" in error


def test_defaults_are_the_seeds():
    defaults = vars(build_parser().parse_args([]))
    expected = {
        "method": "GradDotProd",
        "architecture": "GPT2-Small",
        "batch_size": 16,
        "val_batch_size": 1,
        "warmup_step": 2000,
        "learning_rate": 3e-4,
        "optimizer": "adamw",
        "max_steps": 50000,
        "seed": 42,
        "train_set": "pile",
        "val_set": "pile",
        "eval_only": False,
        "eval_interval": 200,
        "eval_iter": 20,
        "eval_bs": 16,
        "dot_prod_save_interval": 10,
        "model_dtype": "float32",
        "block_size": 1024,
        "gradient_accumulation_steps": 1,
        "device": "auto",
    }
    assert {name: defaults[name] for name in expected} == expected


def test_flag_goes_before_environment_before_constant(monkeypatch, tmp_path):
    for resolve, variable, constant in [
        (config_file.data_dir, "PILE_DATA_DIR", config_file.PILE_DATA_DIR),
        (config_file.results_dir, "RESULTS_DIR", config_file.RESULTS_DIR),
    ]:
        monkeypatch.delenv(variable, raising=False)
        assert resolve() == constant
        monkeypatch.setenv(variable, str(tmp_path / "environment"))
        assert resolve() == tmp_path / "environment"
        assert resolve(tmp_path / "flag") == tmp_path / "flag"


def test_only_matrices_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    matrices, rest = build_optimizer("adamw", model, 1e-3).param_groups
    assert [p.dim() for p in matrices["params"]] == [2] and matrices["weight_decay"] > 0
    assert [p.dim() for p in rest["params"]] == [1, 1, 1] and rest["weight_decay"] == 0
    with pytest.raises(ValueError, match="unknown optimizer 'lion': choose one of adamw, adam, sgd"):
        build_optimizer("lion", model, 1e-3)


def test_learning_rate_warms_up_and_decays_to_a_tenth():
    rates = [learning_rate_at(step, peak=1.0, warmup_steps=4, max_steps=20) for step in range(21)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[12] == pytest.approx(0.55) and rates[20] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate_at(0, peak=1.0, warmup_steps=0, max_steps=1) == 1.0


def test_evaluations_lose_a_line_cut_short_and_those_of_a_future_that_is_redone(tmp_path):
    path = tmp_path / "evaluations.csv"
    losses = {"train_loss": 0.1, "val_loss": 0.2, "test_loss": 1 / 3}
    written = Evaluations(path, resume_at=0)
    for iteration in (5, 10, 15):
        written.append(iteration, losses)
    path.write_text(path.read_text() + "20,0.1,0.")
    assert Evaluations(path, resume_at=None).iterations == {5, 10, 15}
    assert Evaluations(path, resume_at=10).iterations == {5, 10}
    line = "0.1,0.2,0.3333333333333333"
    assert path.read_text() == f"iteration,train_loss,val_loss,test_loss\n5,{line}\n10,{line}\n"


def test_evaluation_stops_where_asked_and_gives_the_mode_back(data, tiny):
    model = build_model(model_config("", str(tiny), None, 16), None, torch.float32)
    corpora = load_corpora(data, "code,prose", "prose", block_size=16)
    request = StopRequest()
    request.signum = signal.SIGTERM
    with pytest.raises(Stopped):
        evaluate(
            model,
            corpora,
            batch_size=4,
            batches=1,
            seed=0,
            device=torch.device("cpu"),
            autocast=torch.autocast("cpu", enabled=False),
            stop=request,
        )
    assert model.training


def test_only_the_first_signal_is_held_back():
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with stop_request() as stop:
            stop.check()
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            with pytest.raises(Stopped, match="SIGINT"):
                stop.check()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_auto_is_a_device_of_this_machine():
    torch.empty(1, device=pick_device("auto"))
