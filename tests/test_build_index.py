"""Building an index: its rows are each sample's own, whatever the batches, the processes and the interruptions."""

import json
import multiprocessing
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import ghostfunc as gf
from ghostfunc.index import Store, StoreError, build_index, model_fingerprint, token_batches
from ghostfunc.text import TextCorpus, open_corpus

VOCABULARY = 40


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=words)


def documents(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{i}" for i in rng.integers(VOCABULARY, size=rng.integers(1, 12))) for _ in range(count)]


def tiny(dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"):
    """A GPT-2 as a pure function, its parameters, and a projection of them."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=VOCABULARY, n_positions=16, use_cache=False)
    model = GPT2LMHeadModel(config).to(device, dtype).eval()
    model_fn, params = gf.functionalize(model, gf.causal_lm_loss)
    ids = torch.tensor([[1, 2, 3]], device=device)
    batch = {"input_ids": ids, "labels": ids}
    include = ("embedding", "norm", "bias", "head")
    return model_fn, params, gf.kronecker_projection(model_fn, params, batch, rank=4, min_rank=2, include=include)


def corpus(count: int = 14, seed: int = 0, name: str = "prompts") -> TextCorpus:
    return TextCorpus.of(documents(count, seed), tokenizer=tokenizer(), block_size=8, name=name)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_row_is_the_samples_own(tmp_path):
    data, (model_fn, params, projection) = corpus(), tiny()
    assert data.lengths.min() == 1 and len(set(data.lengths.tolist())) >= 5
    store = build_index(tmp_path, data, model_fn, params, projection, token_budget=24, shard_rows=7)
    assert store.complete and store.rows == len(data) and store.dim == projection.dim
    rows, samples = store.read(0, store.rows).double(), store.samples().to_pylist()
    for i in range(len(data)):
        batch = data.batch([i])
        assert "attention_mask" not in batch
        exact = gf.ghost_grad_proj(model_fn, params, batch, projection)[0]
        assert ((rows[i] - exact).abs() <= 2**-23 * exact.abs() + 1e-10 * exact.norm()).all()  # as float32
        assert samples[i]["norm"] == pytest.approx(exact.norm().item(), rel=1e-6)
        assert samples[i]["loss"] == pytest.approx(model_fn(params, batch).item(), rel=1e-6)
        assert {key: samples[i][key] for key in samples[i] if key not in ("row", "loss", "norm")} == (
            data.samples(i, i + 1).to_pylist()[0]
        )
    alone = [i for i in range(len(data)) if data.lengths[i] == 1]
    assert (rows[alone] == 0).all() and all(samples[i]["loss"] == 0 for i in alone)
    assert all(samples[i]["norm"] > 0 for i in range(len(data)) if i not in alone)


def test_the_device_of_the_parameters(tmp_path, device):
    data, (model_fn, params, projection) = corpus(), tiny(torch.float32, device)
    here = build_index(tmp_path / "cpu", data, *tiny(torch.float32))
    there = build_index(tmp_path / "device", data, model_fn, params, projection.to("cpu"))
    assert here.manifest["identity"] == there.manifest["identity"]
    rows, same = here.read(0, len(data)), there.read(0, len(data))
    assert ((rows - same).norm(dim=1) <= 1e-5 * rows.norm(dim=1)).all()


def test_a_corpus_of_single_tokens(tmp_path):
    data = TextCorpus.of(["w1 w2 w3"], tokenizer=tokenizer(), block_size=1)
    store = build_index(tmp_path, data, *tiny())
    assert store.rows == 3 and (store.read(0, 3) == 0).all()


def test_the_budget_changes_no_more_than_rounding(tmp_path):
    data, (model_fn, params, projection) = corpus(), tiny(torch.float32)
    few, many = (
        build_index(tmp_path / str(budget), data, model_fn, params, projection, token_budget=budget)
        for budget in (8, 4096)
    )
    one, other = few.read(0, few.rows), many.read(0, many.rows)
    assert not torch.equal(one, other), "the same batches: the comparison would mean nothing"
    assert ((one - other).norm(dim=1) <= 1e-6 * other.norm(dim=1)).all()
    # One may go on where the other stopped.
    shutil.copytree(tmp_path / "8", tmp_path / "both")
    build_index(tmp_path / "both", data, model_fn, params, projection, token_budget=4096)
    assert content(tmp_path / "both") == content(tmp_path / "8")


def test_batches_keep_to_the_budget():
    lengths = np.random.default_rng(0).integers(1, 50, 200)
    batches = list(token_batches(lengths, 512))
    assert sorted(np.concatenate(batches).tolist()) == list(range(200))
    assert all(len(batch) * lengths[batch].max() <= 512 for batch in batches)
    assert sum(len(batch) * lengths[batch].max() for batch in batches) < 1.15 * lengths.sum()  # little padding
    assert [batch.tolist() for batch in token_batches(np.array([9, 2]), 4)] == [[0], [1]]
    with pytest.raises(ValueError, match="token_budget must be at least 1"):
        list(token_batches(lengths, 0))


def test_processes_in_any_order_write_the_same(tmp_path):
    data, parts = corpus(), tiny()
    build_index(tmp_path / "one", data, *parts, shard_rows=4)
    for rank in (2, 0, 1):
        store = build_index(tmp_path / "three", data, *parts, shard_rows=4, rank=rank, world=3)
        assert store.complete == (rank == 1)
    assert content(tmp_path / "three") == content(tmp_path / "one")


class Interruption(BaseException):
    """Not an Exception: nothing may swallow it."""


@pytest.mark.parametrize("batches", [1, 5])
def test_an_interrupt_leaves_whole_shards(tmp_path, batches):
    data, parts = corpus(), tiny()
    build_index(tmp_path / "whole", data, *parts, shard_rows=4, token_budget=16)
    calls = []

    def interrupt(*progress: int) -> None:
        calls.append(progress)
        if len(calls) > batches:
            raise Interruption

    options = {"shard_rows": 4, "token_budget": 16}
    with pytest.raises(Interruption):
        build_index(tmp_path / "cut", data, *parts, **options, progress=interrupt)
    whole = content(tmp_path / "whole")
    assert content(tmp_path / "cut").items() < whole.items()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut" / "shards").iterdir()}
    build_index(tmp_path / "cut", data, *parts, **options)
    assert content(tmp_path / "cut") == whole
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())


def test_progress(tmp_path):
    data, parts = corpus(), tiny()
    total = len(data)
    calls: list[tuple[int, int, int]] = []
    options = {"shard_rows": 4, "progress": lambda *progress: calls.append(progress)}
    build_index(tmp_path, data, *parts, **options, rank=1, world=2)
    share = sum(min(start + 4, total) - start for start in (4, 8, 20, 24) if start < total)  # shards 1, 2, 5 and 6
    assert calls[0] == (0, share, 0) and calls[-1][:2] == (share, share)
    assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)
    calls.clear()
    min((tmp_path / "shards").glob("*.json")).unlink()
    build_index(tmp_path, data, *parts, **options, rank=1, world=2)
    assert calls[0] == (share - 4, share, 0) and calls[-1] == (share, share, int(data.lengths[4:8].sum()))
    calls.clear()
    build_index(tmp_path, data, *parts, **options, rank=1, world=2)
    assert calls == [(share, share, 0)]


def test_appending_leaves_what_is_there(tmp_path):
    first, second, parts = corpus(), corpus(9, seed=1, name="more"), tiny()
    build_index(tmp_path, first, *parts, shard_rows=8)
    before = content(tmp_path)
    with pytest.raises(StoreError, match="holds other data"):
        build_index(tmp_path, second, *parts)
    store = build_index(tmp_path, second, *parts, shard_rows=8, append=True)
    assert before.items() < content(tmp_path).items()
    assert store.rows == len(first) + len(second)
    alone = build_index(tmp_path.parent / "alone", second, *parts, shard_rows=8)
    assert torch.equal(store.read(len(first), store.rows), alone.read(0, alone.rows))
    assert store.samples()["document"].to_pylist()[len(first) :] == alone.samples()["document"].to_pylist()
    shutil.rmtree(tmp_path.parent / "alone")


def test_what_the_index_is_of(tmp_path):
    data, (model_fn, params, projection) = corpus(), tiny()
    store = build_index(
        tmp_path, data, model_fn, params, projection, model="tiny", dtype="bfloat16", settings={"loss": "mean"}
    )
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["model"] == {"name": "tiny", "fingerprint": model_fingerprint(params)}
    assert manifest["projection"]["fingerprint"] == projection.fingerprint and store.dtype == "bfloat16"
    loaded = gf.KroneckerProjection.load(tmp_path / "projection.safetensors")
    assert loaded.fingerprint == projection.fingerprint and store.slices == projection.slices
    other = {name: value + (1e-9 if name.endswith("ln_f.weight") else 0) for name, value in params.items()}
    with pytest.raises(StoreError, match=r"model\.fingerprint"):
        build_index(tmp_path, data, model_fn, other, projection, dtype="bfloat16", settings={"loss": "mean"})
    with pytest.raises(StoreError, match=r"settings\.loss"):
        build_index(tmp_path, data, model_fn, params, projection, dtype="bfloat16", settings={"loss": "sum"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_named(tmp_path, value):
    data, (model_fn, params, projection) = corpus(), tiny()
    wrong = data.tokens(9).tolist()
    assert sum(data.tokens(i).tolist() == wrong for i in range(len(data))) == 1

    def breaking(params, batch):
        ids = batch["input_ids"]
        row = torch.tensor(wrong + [0] * (ids.shape[1] - len(wrong)))
        hit = (ids == row).all(1) if ids.shape[1] == len(row) else torch.zeros(len(ids), dtype=torch.bool)
        return torch.where(hit, value, 1.0) * model_fn(params, batch)

    document = data.samples(9, 10)["document"][0].as_py()
    with pytest.raises(ValueError, match=rf"prompts: the loss or gradient of sample 9 \({document}, loss .*not finite"):
        build_index(tmp_path, data, breaking, params, projection, shard_rows=5)
    assert {shard.number for _, shard in Store(tmp_path).missing_shards}.isdisjoint({0})  # the shard before is whole
    build_index(tmp_path, data, model_fn, params, projection, shard_rows=5)
    build_index(tmp_path.parent / "whole", data, model_fn, params, projection, shard_rows=5)
    assert content(tmp_path) == content(tmp_path.parent / "whole")
    shutil.rmtree(tmp_path.parent / "whole")


# ---------------------------------------------------------------- killed


def build_in_a_process(folder: str, text: str, ready) -> None:
    """What a command does: open the corpus, whose tokens are cached in the index, and build."""
    torch.set_num_threads(1)
    parts = tiny(torch.float32)
    ready.set()
    data = open_corpus(text, tokenizer=tokenizer(), block_size=8, cache=Path(folder) / "corpus")
    build_index(folder, data, *parts, shard_rows=8, token_budget=32)


def killed(server, folder: Path, text: Path, seconds: float) -> bool:
    """Build, but for a kill so many seconds after it began; whether it was killed."""
    ready = server.Event()
    process = server.Process(target=build_in_a_process, args=(str(folder), str(text), ready))
    process.start()
    assert ready.wait(120)
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.fixture(scope="module")
def server():
    """Processes that have imported everything already, and have run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ghostfunc.index", "transformers.models.gpt2.modeling_gpt2"])
    return context


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, 20])
def test_killed_at_random_moments(tmp_path, server, kills):
    text = tmp_path / "in.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents(60)))
    start = time.monotonic()
    assert not killed(server, tmp_path / "whole", text, 300)
    start = time.monotonic()
    assert not killed(server, tmp_path / "again", text, 300)
    seconds = time.monotonic() - start
    whole = content(tmp_path / "whole")
    assert content(tmp_path / "again") == whole and len(whole) > 25
    rng = np.random.default_rng(kills)
    deaths = 0
    for number, fraction in enumerate(rng.uniform(0, 0.9, kills)):
        folder = tmp_path / str(number)
        deaths += killed(server, folder, text, fraction * seconds)
        assert not killed(server, folder, text, 300)
        assert content(folder) == whole
        shutil.rmtree(folder)
    assert deaths >= kills / 2
