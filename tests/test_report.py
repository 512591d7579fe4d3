"""From an index to a page: scores, both ends of the ranking, domains and spreads against plain numpy."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import ghostfunc as gf
from ghostfunc.index import Store, StoreError, build_index, inverse_gram, project_queries
from ghostfunc.report import _survey, collect_report, render, write_report
from ghostfunc.text import Document, TextCorpus

CLOSE = {"rel": 1e-4, "abs": 1e-7}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, so that some characters are several tokens."""
    model = models.BPE(
        vocab={letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def corpus(texts: list[tuple[str, str]], name: str) -> TextCorpus:
    documents = [Document(text, domain, f"{name}:{line}") for line, (text, domain) in enumerate(texts, 1)]
    return TextCorpus(documents, tokenizer=byte_tokenizer(), block_size=30, name=name)


class Case:
    """A small GPT-2, an index of two sources, and queries."""

    def __init__(self, folder: Path) -> None:
        config = GPT2Config(
            n_layer=2, n_head=2, n_embd=16, vocab_size=256, n_positions=32, bos_token_id=0, eos_token_id=0
        )  # with its dropout
        torch.manual_seed(0)
        self.model_fn, self.params = gf.functionalize(GPT2LMHeadModel(config).eval(), gf.causal_lm_loss)
        prose = [
            (f"It was the {word} of times, and the age of {word} <b>foolishness</b>.", "prose") for word in "abcdefg"
        ]
        code = [(f"def {word}(x):\n    return x + {place}\n", "code") for place, word in enumerate("pqrst")]
        self.first = corpus(list(itertools.chain(*zip(prose, code, strict=False))), "first")
        self.second = corpus([("四 and 十, a line\u202e.", "prose"), ("x = 3", "numbers")], "second")
        self.queries = corpus(
            [("The best of times", "prose"), ("def f(x): return", "code"), ("It was", "prose")], "asked"
        )
        self.projection = gf.kronecker_projection(
            self.model_fn, self.params, self.first.batch([0, 1]), rank=16, min_rank=2, include=("norm",)
        )
        self.given = {"model_fn": self.model_fn, "params": self.params, "projection": self.projection}
        build_index(folder, self.first, **self.given, shard_rows=4)
        self.store = build_index(folder, self.second, **self.given, shard_rows=4, append=True)
        self.rows = self.store.read(0, self.store.rows).double().numpy()
        self.asked = project_queries(self.model_fn, self.params, self.projection, self.queries).rows.double().numpy()
        self.samples = self.store.samples().to_pylist()

    def collect(self, **changes):
        given = {"store": self.store, "queries": self.queries, "corpora": [self.second, self.first], "k": 3}
        return collect_report(**self.given | given | changes)


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    return Case(tmp_path_factory.mktemp("index") / "two")


def test_both_ends_are_those_of_a_full_sort(case):
    scores = case.asked @ case.rows.T
    lengths = np.linalg.norm(case.asked, axis=1)[:, None] * np.linalg.norm(case.rows, axis=1)
    for metric, table in (("dot", scores), ("cosine", scores / lengths)):
        for number, query in enumerate(case.collect(metric=metric, highlights=False).queries):
            order = np.argsort(-table[number], kind="stable")
            assert [passage.row for passage in query.most] == order[:3].tolist()
            assert [passage.row for passage in query.least] == np.argsort(table[number], kind="stable")[:3].tolist()
            for passage in (*query.most, *query.least):
                assert passage.score == pytest.approx(table[number, passage.row], **CLOSE)
                assert passage.dot == pytest.approx(scores[number, passage.row], **CLOSE)
                assert passage.cosine == pytest.approx(
                    scores[number, passage.row] / lengths[number, passage.row], **CLOSE
                )
            assert query.mean == pytest.approx(table[number].mean(), **CLOSE)
            assert query.deviation == pytest.approx(table[number].std(), **CLOSE)
            assert query.positive == (table[number] > 0).mean()


def test_passages_and_queries_carry_what_their_corpus_says(case):
    data = case.collect()
    texts = [case.first.text(i) for i in range(len(case.first))] + [
        case.second.text(i) for i in range(len(case.second))
    ]
    for number, query in enumerate(data.queries):
        assert query.text == case.queries.text(number)
        assert query.document == f"asked:{number + 1}" and query.domain == ("prose", "code", "prose")[number]
        for passage in (*query.most, *query.least):
            sample = case.samples[passage.row]
            assert passage.text == texts[passage.row]
            assert (passage.document, passage.domain, passage.loss) == tuple(
                sample[name] for name in ("document", "domain", "loss")
            )


def test_highlights_add_up_to_the_stored_inner_product(case):
    data = case.collect(k=case.store.rows)  # every passage of both sources
    lengths = np.linalg.norm(case.rows, axis=1)
    for number, query in enumerate(data.queries):
        assert {passage.row for passage in query.most} == set(range(case.store.rows))
        for passage in query.most:
            marked = passage.highlights
            assert marked is not None and "".join(marked.pieces) == passage.text
            assert sum(marked.scores) + marked.elsewhere + marked.remainder == pytest.approx(passage.dot, abs=1e-12)
            assert abs(marked.remainder) <= 1e-5 * lengths[passage.row] * np.linalg.norm(case.asked[number])
    assert data.untokened == ()


def test_the_remainder_is_what_the_store_rounded(case, tmp_path):
    store = build_index(tmp_path / "int8", case.second, **case.given, dtype="int8")
    stored = store.read(0, store.rows).double().numpy()
    exact = case.rows[len(case.first) :]
    (query, *_) = case.collect(store=store, corpora=[case.second]).queries
    for passage in query.most:
        expected = (stored - exact)[passage.row] @ case.asked[0]
        assert passage.highlights.remainder == pytest.approx(expected, rel=1e-2, abs=1e-6)
    assert max(abs(passage.highlights.remainder) for passage in query.most) > 1e-5


def test_preconditioned_queries_divide_over_tokens_too(case):
    precondition = inverse_gram(case.store, damping=0.1)
    data = case.collect(precondition=precondition, preconditioned="inverse Gram")
    asked = precondition(torch.from_numpy(case.asked).float()).double().numpy()
    for number, query in enumerate(data.queries):
        scores = case.rows @ asked[number]
        assert [passage.row for passage in query.most] == np.argsort(-scores)[:3].tolist()
        for passage in query.most:
            scale = np.linalg.norm(case.rows[passage.row]) * np.linalg.norm(asked[number])
            assert sum(passage.highlights.scores) == pytest.approx(scores[passage.row], abs=1e-4 * scale)
    assert data.preconditioned == "inverse Gram" and ("queries preconditioned", "inverse Gram") in data.facts
    assert case.collect(precondition=precondition).preconditioned != ""


def test_queries_that_are_projected_already(case):
    projected = project_queries(case.model_fn, case.params, case.projection, case.queries)
    assert case.collect(projected=projected) == case.collect()
    with pytest.raises(ValueError, match="1 rows; 'asked' has 3"):
        case.collect(projected=type(projected)(projected.rows[:1], projected.losses[:1]))


def test_domain_means_and_spreads_equal_numpy(case):
    data = case.collect(highlights=False)
    scores = case.asked @ case.rows.T
    cosines = scores / np.linalg.norm(case.asked, axis=1)[:, None] / np.linalg.norm(case.rows, axis=1)
    domains = np.array([sample["domain"] for sample in case.samples])
    means = data.means
    assert means.query_domains == ("code", "prose") and means.queries == (1, 2)
    assert means.domains == ("code", "numbers", "prose")
    assert means.rows == tuple((domains == domain).sum() for domain in means.domains)
    of_query = {"code": [1], "prose": [0, 2]}
    for i, asked in enumerate(means.query_domains):
        for j, domain in enumerate(means.domains):
            own = np.ix_(of_query[asked], domains == domain)
            assert means.dots[i][j] == pytest.approx(scores[own].mean(), **CLOSE)
            assert means.cosines[i][j] == pytest.approx(cosines[own].mean(), **CLOSE)
            found = data.spreads[i].distributions[j]
            assert found.domain == domain and found.count == scores[own].size
            np.testing.assert_allclose(
                found.quantiles, np.percentile(scores[own], (5, 25, 50, 75, 95)), rtol=1e-3, atol=1e-6
            )
            assert found.positive == (scores[own] > 0).mean()
            inside = (scores[own] >= data.spreads[i].low) & (scores[own] <= data.spreads[i].high)
            assert abs(sum(found.histogram) - inside.sum()) <= 1  # one may lie on the edge
    assert data.examined == 0
    assert all(spread.low <= 0 <= spread.high for spread in data.spreads)


def test_of_many_rows_some_are_examined_from_each_domain(case, monkeypatch):
    monkeypatch.setattr(_survey, "EXAMINED_ROWS", 9)
    data = case.collect(highlights=False)
    counts = [found.count for found in data.spreads[0].distributions]
    rows = case.collect(highlights=False).means.rows
    assert counts == [min(3, count) for count in rows]
    assert data.examined == sum(counts) < case.store.rows
    assert f"at most {data.examined} rows" in render(data)


def test_a_source_without_its_corpus_has_no_text_and_the_page_says_so(case):
    data = case.collect(corpora=[case.first], k=case.store.rows)
    assert any("No corpus was given for second" in notice for notice in data.notices)
    for passage in data.queries[0].most:
        assert (passage.text is None) == (passage.highlights is None) == (passage.row >= len(case.first))
    nothing = case.collect(corpora=())
    assert any("No corpus was given: " in notice for notice in nothing.notices)
    assert "No text: its corpus was not given." in render(nothing)
    assert not any("No corpus" in notice for notice in case.collect().notices)


def test_facts_say_what_the_index_is(case):
    data = case.collect(model={"name": "Nano", "trained": False})
    facts = dict(data.facts)
    assert facts["model"] == "Nano" and facts["weights"].startswith("untrained, fingerprint ")
    assert facts["data"] == f"first ({len(case.first)}), second ({len(case.second)})"
    assert facts["rows"] == str(case.store.rows)
    assert facts["tokens"] == str(int(case.first.lengths.sum() + case.second.lengths.sum()))
    assert facts["projection"] == "gaussian, rank 16, seed 0" and str(case.projection.dim) in facts["numbers per row"]
    assert any("untrained" in notice for notice in data.notices)
    assert not any("untrained" in notice for notice in case.collect(model={"trained": True}).notices)
    assert [name for name, _, _ in data.parameters] == list(case.projection.parts)


def test_writes_a_page_whole_and_the_same_each_time(case, tmp_path):
    given = case.given | {"store": case.store, "queries": case.queries, "corpora": [case.first, case.second]}
    path = write_report(tmp_path / "report.html", **given)
    source = path.read_text(encoding="utf-8")
    assert source == render(case.collect(k=5)) and source.startswith("<!doctype html>")
    write_report(path, **given)
    assert path.read_text(encoding="utf-8") == source
    assert list(tmp_path.iterdir()) == [path]
    assert "<b>" not in source and "\u202e" not in source


def test_an_index_without_domains_or_losses(case, tmp_path):
    """One that was written by hand, and has nothing but rows."""
    from ghostfunc.index import StoreWriter

    describe = case.projection.describe() | {"fingerprint": case.projection.fingerprint}
    writer = StoreWriter(
        tmp_path / "bare", dim=case.projection.dim, dtype="float32", slices=case.projection.slices, projection=describe
    )
    source = writer.source("rows", fingerprint="0f", rows=None)
    source.append(torch.from_numpy(case.rows).float(), pa.table({"number": list(range(len(case.rows)))}))
    data = case.collect(store=Store(tmp_path / "bare"), corpora=())
    assert data.means.domains == ("no domain",)
    assert all(passage.loss is None and passage.document == "" for passage in data.queries[0].most)
    assert "None" not in render(data)


def test_rows_of_another_model_are_told(case, tmp_path):
    """Where a store has no fingerprint of its model to tell by."""
    from ghostfunc.index import StoreWriter

    def notices(rows):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        writer = StoreWriter(folder, dim=case.projection.dim, dtype="float32", slices=case.projection.slices)
        source = writer.source("first", fingerprint=case.first.fingerprint, rows=None)
        source.append(torch.from_numpy(rows).float(), case.first.samples(0, len(case.first)))
        return " ".join(case.collect(store=Store(folder), corpora=[case.first]).notices)

    rows = case.rows[: len(case.first)]
    assert "rows are not of this model" not in notices(rows)
    told = re.search(r"In (\d+) of 18 passages the stored row differs", notices(np.roll(rows, 1, axis=1)))
    assert told is not None and int(told[1]) > 9


def test_what_does_not_belong_to_the_index_is_refused(case):
    other = gf.kronecker_projection(case.model_fn, case.params, case.first.batch([0, 1]), rank=9, min_rank=2)
    with pytest.raises(StoreError, match=r"projection .*Load the store's own"):
        case.collect(projection=other)
    moved = {name: parameter + 1 for name, parameter in case.params.items()}
    with pytest.raises(StoreError, match=r"index of the model .*same checkpoint"):
        case.collect(params=moved)
    with pytest.raises(ValueError, match=r"'asked' .* none of the sources .*'first'.*'second'"):
        case.collect(corpora=[case.queries])
    with pytest.raises(ValueError, match="metric='l2'"):
        case.collect(metric="l2")


def test_data_can_be_changed_before_it_is_rendered(case):
    data = replace(case.collect(highlights=False), title="Mine")
    assert "<h1>Mine</h1>" in render(data)
