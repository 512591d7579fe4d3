"""The demo's last step on a small run folder: what it reads there, what it says, and what it leaves."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from demo import report, run
from ghostfunc.dotlog import DotLog
from ghostfunc.text import Document
from GradDotProd_LM.main import build_parser, parse

WORDS = [f"w{i}" for i in range(30)] + ["<script>"]
BLOCK = 4


@pytest.fixture
def data(tmp_path):
    """Two domains of ten blocks; the first block of prose says `<script>`."""
    folder = tmp_path / "demo" / "data"
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "tokenizer")
    code = np.arange(10 * BLOCK) % 30
    prose = code[::-1].copy()
    prose[:BLOCK] = 30
    for domain, ids in (("code", code), ("prose", prose)):
        ids.astype("<u2").tofile(folder / f"train-{domain}.bin")
    return folder


@pytest.fixture
def run_folder(tmp_path):
    """Five steps of two samples, the same two each time: code helps, prose harms."""
    folder = tmp_path / "demo" / "results" / "a-run"
    log = DotLog(folder / "dot_log", config={})
    for step in range(5):
        log.append(
            iteration=step,
            sample_ids=[2 * BLOCK, 0],
            domains=["code", "prose"],
            losses=torch.ones(2),
            learning_rate=1e-3,
            dots=torch.tensor([2.0, -1.0]),
        )
    log.save()
    config = {"val_set": "code", "block_size": BLOCK, "batch_size": 2, "val_batch_size": 1}
    config |= {"architecture": "GPT2-Nano", "optimizer": "adamw", "learning_rate": 1e-3}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evaluations.csv").write_text("iteration,train_loss,val_loss,test_loss\n2,5,4.5,6\n5,4,3.25,5\n")
    interleaved = {"steps": 3, "ghost_step_seconds": 0.6, "plain_step_seconds": 0.4, "ratio": 1.5}
    timing = {"device": "cpu", "threads": 2, "steps": 5, "interleaved": interleaved}
    (folder / "timing.json").write_text(json.dumps(timing))
    return folder


def test_report_of_a_run(run_folder, data, monkeypatch):
    demo = data.parent
    monkeypatch.chdir(demo)
    said = run.make_report(run_folder, data, demo)

    page = (demo / "report.html").read_text()
    assert (demo / "value_per_domain.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in demo.iterdir()} == {"data", "results", "report.html", "value_per_domain.png"}
    for text in (said, page):
        assert "w8 w9 w10 w11" in text  # the block of code at token 8
        assert "5 steps of 2 samples of 4 tokens" in text
        assert "4.500 after 2 steps, 3.250 after 5" in text
        assert "took 0.600 s" in text and "0.400 s: 1.50 times" in text and "2 threads" in text
        assert "+5000.0" in text and "-2500.0" in text  # 5 steps of 1e-3 / 2 * 2, and of 1e-3 / 2 * -1
    assert "<script>" not in page and "&lt;script&gt; &lt;script&gt;" in page
    assert "report.html" in said and "train.sh" in said.splitlines()[-1]


def test_report_of_a_run_resumed_too_late_for_a_plain_step_says_so(run_folder, data, monkeypatch):
    timing = json.loads((run_folder / "timing.json").read_text())
    del timing["interleaved"]
    (run_folder / "timing.json").write_text(json.dumps(timing))
    monkeypatch.chdir(data.parent)
    assert "No plain step was timed" in run.make_report(run_folder, data, data.parent)


def test_samples_look_up_their_own_domain(data):
    samples = [report.SampleValue("prose", 0, -1.0, 1), report.SampleValue("code", 4 * BLOCK, 1.0, 1)]
    first, second = run.read_passages(samples, data, BLOCK)
    assert first.text == " ".join(["<script>"] * BLOCK) and first.sample is samples[0]
    assert second.text == "w16 w17 w18 w19"


def test_training_options_are_those_of_the_language_model_example(data, monkeypatch):
    monkeypatch.chdir(data.parent)
    options = parse(build_parser(), run.training_options(data))
    assert options.method == "GradDotProd" and options.val_set == run.VAL_DOMAIN
    assert {name: getattr(options, name) for name in run.TRAINING} == run.TRAINING
    assert options.train_set == options.data_dir == "data"


def test_passages_are_of_all_domains_in_turn_and_queries_are_none_of_them():
    texts = {"code": [f"c{i}" for i in range(5)], "prose": [f"p{i} " * 400 for i in range(3)]}
    documents = [Document(text, domain, "") for domain, of in texts.items() for text in of]
    passages, queries = run.split_passages(documents)
    assert [p["domain"] for p in passages] == ["code", "prose", "code", "code"]
    assert [p["text"][:2] for p in passages] == ["c0", "p0", "c1", "c2"]
    assert [q["text"][:2] for q in queries] == ["c3", "c4", "p1", "p2"]
    assert len(passages[1]["text"]) == run.PASSAGE_CHARACTERS and len(queries[2]["text"]) == run.QUERY_CHARACTERS


def test_a_failed_command_stops_the_demo():
    with pytest.raises(SystemExit, match=r"ghostfunc index failed \(exit status 2\)"):
        run._ghostfunc("index", ["--no-such-flag"])


def test_a_failed_stage_stops_the_demo_and_names_the_script():
    with pytest.raises(SystemExit, match=r"no_such_script\.py failed \(exit status 2\)"):
        run._run("examples/demo/no_such_script.py", [])
