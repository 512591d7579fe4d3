"""`ghostfunc report`: one HTML page of what an index says about some queries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ghostfunc.cli import _options as options
from ghostfunc.cli._console import print_json, say, stdout_is_for_results
from ghostfunc.cli._describe import size
from ghostfunc.cli._failures import ends_well
from ghostfunc.cli._held_out import held_out_samples
from ghostfunc.cli._open_index import Index, open_corpora, open_index, open_queries
from ghostfunc.cli._precondition import check_precondition, in_words, preconditioner
from ghostfunc.text import Corpus


@ends_well(resumable=False)
def report(
    folder: options.Folder,
    prompts: options.Prompts = None,
    file: options.QueryFile = None,
    held_out: Annotated[
        int | None,
        options.option(
            options.QUERIES,
            "So many passages of the data as queries, of documents that --limit left out of the index.",
            "--held-out",
            min=1,
            metavar="N",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        options.option(options.RUN, "The page.", "--out", "-o", default="FOLDER/report.html", metavar="FILE"),
    ] = None,
    k: Annotated[
        int,
        options.option(
            options.SEARCH, "Passages at each end of a query's ranking.", "--k", "-k", default=5, min=1, metavar="N"
        ),
    ] = 5,
    metric: options.Metric = "dot",
    precondition: options.Precondition = None,
    damping: options.Damping = 0.1,
    model: options.MovedModel = None,
    data: options.MovedData = None,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Write a self-contained HTML page about an index and some queries.

    Queries with the passages that support and oppose them most, the tokens that carried the scores, domains against
    each other, how scores are spread, and what they mean.

    Examples:
        ghostfunc report my-index "The derivative of x squared is" "To be, or not"
        ghostfunc report my-index --file validation.jsonl --out page.html
        ghostfunc report my-index --held-out 8
    """
    from ghostfunc.report import write_report

    with stdout_is_for_results():
        check_precondition(precondition)
        index = open_index(folder, model=model, device=device or "auto")
        queries = _queries(index, prompts or [], file, held_out)
        corpora, missing = open_corpora(index, data or [])
        for sentence in missing:
            say(sentence)
        say(f"report: {len(queries):,} queries against {index.store.rows:,} samples")
        page = write_report(
            out or index.store.folder / "report.html",
            store=index.store,
            queries=queries,
            model_fn=index.opened.model_fn,
            params=index.opened.params,
            projection=index.projection,
            corpora=list(corpora.values()),
            k=k,
            metric=metric,
            precondition=preconditioner(index.store, precondition, damping),
            preconditioned=in_words(precondition, damping),
            model={**index.store.manifest["model"], "trained": index.opened.model.trained},
            token_budget=index.configs[0].token_budget,
        )
    if json:
        print_json({"report": str(page), "queries": len(queries), "bytes": page.stat().st_size})
    else:
        print(f"{page} ({size(page.stat().st_size)}): open it in a browser")


def _queries(index: Index, prompts: list[str], file: str | None, held_out: int | None) -> Corpus:
    if held_out is None:
        return open_queries(index, prompts, file)
    if prompts or file is not None:
        raise ValueError("--held-out takes the queries from the data: leave prompts and --file away")
    return held_out_samples(index, held_out)
