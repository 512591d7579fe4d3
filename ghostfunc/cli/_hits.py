"""The samples that a search found, as JSON and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from rich.table import Table

from ghostfunc.cli._console import number, one_line, table
from ghostfunc.index import Hits, Store
from ghostfunc.text import Corpus

HELPS = "A positive score: a gradient step on the sample lowers the query's loss."
_COLUMNS = (
    ("", "right"),
    ("score", "right"),
    ("row", "right"),
    ("domain", "left"),
    ("document", "left"),
    ("text", "left"),
)


def text_of(corpus: Corpus, sample: int) -> str | None:
    """The text of a sample; None where it is token ids of which nobody knows the tokenizer."""
    try:
        return corpus.text(sample)
    except ValueError:
        return None


class Sample(NamedTuple):
    """A row of a store, for people.

    Attributes:
        about: what the store knows of it: row, source, sample_id, document, domain, start, stop, tokens, loss.
        text: of the sample; None where its data is not to be had.
    """

    about: dict[str, Any]
    text: str | None


def samples_of(store: Store, corpora: Mapping[str, Corpus], hits: Iterable[Hits]) -> dict[int, Sample]:
    """What is known of the rows that were found, by their numbers.

    Args:
        store: the store.
        corpora: those that are at hand, by the name of their source.
        hits: what was found.
    """
    rows = sorted({row for each in hits for row in each.rows.flatten().tolist() if row >= 0})
    samples = {}
    for about in store.sample_rows(rows).to_pylist():
        source = next(name for name, span in store.sources.items() if about["row"] in span)
        text = text_of(corpora[source], about["sample_id"]) if source in corpora else None
        samples[about["row"]] = Sample({**about, "source": source}, text)
    return samples


def listed(hits: Hits, query: int, samples: Mapping[int, Sample]) -> list[dict[str, Any]]:
    """The hits of one query as JSON, best first."""
    pairs = zip(hits.scores[query].tolist(), hits.rows[query].tolist(), strict=True)
    return [
        {"rank": rank, "score": score, **samples[row].about, "text": samples[row].text}
        for rank, (score, row) in enumerate(pairs, 1)
        if row >= 0  # approximate search may find fewer than were asked for
    ]


def hit_table(query: Mapping[str, Any], hits: Iterable[Mapping[str, Any]], beside: str = "") -> Table:
    """Hits of a query for people, under its text and what is said beside it; texts are cut to the line."""
    asked = "(token ids)" if query["text"] is None else one_line(query["text"], 80)
    title = f"{query['query'] + 1}. {asked}  {beside}".rstrip()
    rows = [
        (
            str(hit["rank"]),
            number(hit["score"]),
            str(hit["row"]),
            one_line(hit["domain"] or "", 24),
            one_line(hit["document"] or "", 28),
            one_line(hit["text"] or ""),
        )
        for hit in hits
    ]
    return table(title, _COLUMNS, rows)
