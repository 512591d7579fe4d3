"""The token files' loader: what a sample is, what a set names, and errors that say what mends them."""

import doctest
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from shared import dataloader, domain_list
from shared.dataloader import TOKEN, Corpora, TokenCorpus, load_corpora, load_corpus
from shared.domain_list import PILE_DOMAINS, SPLITS, domain_file, domain_file_name

BLOCK = 8
LENGTHS = {"code": 8 * 40 + 5, "prose": 8 * 20, "Wikipedia (en)": 8 * 10 + 7}
FIRST_ID = {"code": 0, "prose": 1000, "Wikipedia (en)": 2000}


def write(path: Path, ids: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    ids.astype(TOKEN).tofile(path)
    return path


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Every domain counts up from a number of its own, so that a token tells its file and its place."""
    for domain, length in LENGTHS.items():
        for split in SPLITS:
            write(domain_file(tmp_path, split, domain), FIRST_ID[domain] + np.arange(length))
    return tmp_path


def load(data_dir: Path, train_set: str = "code,prose", val_set: str = "prose", **options) -> Corpora:
    return load_corpora(data_dir, train_set, val_set, **{"block_size": BLOCK} | options)


@pytest.mark.parametrize("module", [dataloader, domain_list], ids=lambda module: module.__name__)
def test_examples_in_docstrings(module):
    assert doctest.testmod(module).failed == 0


def test_file_names():
    assert domain_file_name("Gutenberg (PG-19)") == "Gutenberg_PG-19"
    assert domain_file_name("a/b [c]") == "a-b_c"
    assert all(domain_file_name(domain_file_name(domain)) == domain_file_name(domain) for domain in PILE_DOMAINS)
    assert len({domain_file_name(domain) for domain in PILE_DOMAINS}) == 22
    for impossible in ("", "()", "../..", "a\nb", "x" * 300):
        with pytest.raises(ValueError, match="cannot name a file"):
            domain_file_name(impossible)


def test_blocks_in_order_go_through_one_domain_after_the_other(data_dir):
    corpus = load_corpus(data_dir, "train", "prose,code", block_size=BLOCK)
    assert corpus.blocks == 60
    expected = [("prose", BLOCK * i) for i in range(20)] + [("code", BLOCK * i) for i in range(40)]
    tokens, offsets, domains = corpus.in_order(18, 23)
    assert list(zip(domains, offsets, strict=True)) == expected[18:23]
    assert tokens[:, 0].tolist() == [FIRST_ID[domain] + offset for domain, offset in expected[18:23]]
    for start, stop in ((0, 61), (5, 5), (-1, 3)):
        with pytest.raises(ValueError, match="among the 60"):
            corpus.in_order(start, stop)


def test_a_fingerprint_is_of_the_first_blocks_alone(data_dir, monkeypatch):
    def fingerprint(blocks, wanted="prose,code", block_size=BLOCK):
        return load_corpus(data_dir, "train", wanted, block_size=block_size).fingerprint(blocks)

    found = fingerprint(25)
    assert len({found, fingerprint(24), fingerprint(25, "code,prose"), fingerprint(25, block_size=BLOCK // 2)}) == 4
    monkeypatch.setattr(dataloader, "_TOKENS_READ_AT_ONCE", 3)
    assert fingerprint(25) == found
    code = domain_file(data_dir, "train", "code")
    ids = np.fromfile(code, TOKEN)
    ids[BLOCK * 5] += 1  # the first token of what 25 blocks leave out
    ids.tofile(code)
    assert fingerprint(25) == found
    ids[BLOCK * 5 - 1] += 1
    ids.tofile(code)
    assert fingerprint(25) != found


def test_samples_are_blocks_of_their_domain(data_dir):
    train = load(data_dir, "code,prose,Wikipedia (en)").train
    seen = set()
    for step in range(50):
        tokens, offsets, domains = train.sample(16, seed=1, step=step)
        assert tokens.dtype == torch.int64 and tokens.shape == (16, BLOCK)
        for row, offset, domain in zip(tokens, offsets, domains, strict=True):
            first = {domain_file_name(name): first for name, first in FIRST_ID.items()}[domain] + offset
            assert row.tolist() == list(range(first, first + BLOCK))  # one domain, one place
            assert torch.equal(train.at(domain, offset), row)
            seen.add((domain, offset))
    assert len(seen) == train.blocks == 40 + 20 + 10


def test_a_batch_repeats_nothing_and_can_hold_all(data_dir):
    train = load(data_dir).train
    batch = train.sample(train.blocks, seed=0, step=0)
    assert len(set(zip(batch.domains, batch.offsets, strict=True))) == train.blocks == 60


def test_sampling_is_a_function_of_seed_and_step(data_dir):
    train, again = load(data_dir).train, load(data_dir).train
    for step in (3, 0, 3):
        assert torch.equal(train.sample(5, seed=7, step=step).tokens, again.sample(5, seed=7, step=step).tokens)
    for seed, step in ((7, 4), (8, 3)):
        assert not torch.equal(train.sample(5, seed=7, step=3).tokens, train.sample(5, seed=seed, step=step).tokens)


def test_ranks_draw_together_what_one_draws(data_dir):
    corpus = load(data_dir).train
    whole = corpus.sample(6, seed=3, step=4)
    parts = [corpus.sample(2, seed=3, step=4, rank=rank, ranks=3) for rank in range(3)]
    assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
    assert [offset for part in parts for offset in part.offsets] == whole.offsets
    assert [domain for part in parts for domain in part.domains] == whole.domains
    with pytest.raises(ValueError, match="not 30 in each of 3 processes: lower --batch_size"):
        corpus.sample(30, seed=3, step=4, rank=0, ranks=3)


def test_domains_are_drawn_in_proportion_to_their_blocks(data_dir):
    train = load(data_dir).train
    drawn = Counter(domain for step in range(500) for domain in train.sample(6, seed=0, step=step).domains)
    assert drawn["code"] / 3000 == pytest.approx(2 / 3, abs=0.03)  # three standard deviations


def test_files_are_mapped_not_read(data_dir):
    train = load(data_dir).train
    before = train.at("code", 0)
    with domain_file(data_dir, "train", "code").open("r+b") as file:
        file.write(np.array([77], dtype=TOKEN).tobytes())
    assert before[0] == 0 and train.at("code", 0)[0] == 77


def test_pile_takes_its_domains_that_exist(data_dir, capsys):
    write(domain_file(data_dir, "train", "Github"), np.arange(BLOCK - 1))
    corpora = load(data_dir, "pile", "pile")
    assert corpora.train.domains == corpora.val.domains == corpora.test.domains == ["Wikipedia_en"]
    assert corpora.train.tokens == LENGTHS["Wikipedia (en)"]
    out = capsys.readouterr().out
    assert (
        "train: 87 tokens, 10 blocks of 8 from 1 domain: Wikipedia_en (left out, with less than one block: Github)"
        in out
    )


def test_a_set_can_be_the_data_folder_itself(data_dir, capsys):
    corpora = load(data_dir, str(data_dir), str(data_dir))
    assert [corpus.domains for corpus in corpora] == [["Wikipedia_en", "code", "prose"]] * 3
    assert corpora.val.files["code"] == data_dir / "val" / "validation-code.bin"
    assert corpora.test.files["code"] == data_dir / "test" / "test-code.bin"
    assert "these are the validation files" not in capsys.readouterr().out
    beside = load(data_dir, "code", str(data_dir / "val"))
    assert beside.test.files["code"] == data_dir / "test" / "test-code.bin"


def test_a_folder_may_hold_any_names(data_dir, tmp_path, capsys):
    write(tmp_path / "mine" / "letters.bin", np.arange(40))
    write(tmp_path / "mine" / "train-odd.bin", np.arange(50))
    corpora = load(data_dir, "code", str(tmp_path / "mine"))
    assert corpora.val.domains == corpora.test.domains == ["letters", "train-odd"]
    assert "(no test folder: these are the validation files)" in capsys.readouterr().out


def test_missing_data(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"has no train file of any of the Pile's domains.*tokenize_pile_by_domain"
    ):
        load(tmp_path, "pile", "pile")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"a folder without \.bin files.*tokenize_pile_by_domain"):
        load(tmp_path, str(tmp_path / "empty"))


def test_pile_without_its_domains_names_those_that_are_there(data_dir):
    domain_file(data_dir, "train", "Wikipedia (en)").unlink()
    with pytest.raises(FileNotFoundError, match="It has code, prose: name those with --train_set"):
        load(data_dir, "pile")


@pytest.mark.parametrize("train_set", ["cod", "code,cod", "cod,"])
def test_unknown_domain(data_dir, train_set):
    with pytest.raises(
        FileNotFoundError, match=r"file for cod\. Domains there: Wikipedia_en, code, prose.*--output_dir"
    ):
        load(data_dir, train_set)


def test_a_split_that_is_missing(data_dir):
    domain_file(data_dir, "test", "prose").unlink()
    with pytest.raises(FileNotFoundError, match=r"--val_set 'prose' is no folder.*no test file for prose"):
        load(data_dir)


def test_empty_set(data_dir):
    with pytest.raises(FileNotFoundError, match="--train_set ''"):
        load(data_dir, "")


def test_too_short_files(data_dir):
    with pytest.raises(
        ValueError, match=r"validation-prose\.bin has 160 tokens, fewer than one block of 161.*block_size"
    ):
        load(data_dir, "code", "prose", block_size=161)
    with pytest.raises(ValueError, match=r"none of the train files.*has one block of 200.*lower --block_size"):
        load(data_dir, "pile", "pile", block_size=200)
    write(domain_file(data_dir, "train", "code"), np.arange(0))
    with pytest.raises(ValueError, match="has 0 tokens"):
        load(data_dir)


def test_odd_number_of_bytes(data_dir):
    path = domain_file(data_dir, "train", "code")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"train-code\.bin has 649 bytes, an odd number.*delete it and write it again"):
        load(data_dir)


def test_id_outside_the_vocabulary(data_dir, monkeypatch):
    load(data_dir, vocab_size=1160)
    message = r"validation-prose\.bin holds the id 1100 at token 100, outside.*vocabulary of 1100.*--tokenizer"
    with pytest.raises(ValueError, match=message):
        load(data_dir, "code", vocab_size=1100)
    monkeypatch.setattr(dataloader, "_TOKENS_CHECKED_AT_LOAD", 8)  # files too long to be read at once
    val = load(data_dir, "code", vocab_size=1100).val
    with pytest.raises(ValueError, match=message):
        val.at("prose", 96)


def test_wrong_calls(data_dir):
    train = load(data_dir).train
    with pytest.raises(ValueError, match=r"from 1 to the number of blocks, 60 .* not 61"):
        train.sample(61, seed=0, step=0)
    with pytest.raises(ValueError, match="not -1 and 0"):
        train.sample(1, seed=-1, step=0)
    with pytest.raises(ValueError, match="no domain 'cod'"):
        train.at("cod", 0)
    for offset in (4, 320, -8):
        with pytest.raises(ValueError, match="multiples of block_size=8 from 0 to 312"):
            train.at("code", offset)
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        load(data_dir, block_size=0)
    with pytest.raises(FileNotFoundError, match=r"absent\.bin does not exist"):
        TokenCorpus({"absent": data_dir / "absent.bin"}, block_size=8)
    with pytest.raises(ValueError, match="at least one domain"):
        TokenCorpus({}, block_size=8)
