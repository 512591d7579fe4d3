"""`ghostfunc score`: exact scores for queries that are known beforehand, in one pass over the data."""

from __future__ import annotations

import time
from typing import Annotated, Any

import torch

from ghostfunc.cli import _options as options
from ghostfunc.cli._config import ScoreConfig
from ghostfunc.cli._console import print_json, results, say, stdout_is_for_results
from ghostfunc.cli._describe import describe
from ghostfunc.cli._failures import ends_well
from ghostfunc.cli._hits import HELPS, hit_table, listed, samples_of, text_of
from ghostfunc.cli._library import open_data, open_model, open_own_data
from ghostfunc.cli._progress import progress
from ghostfunc.cli._run_files import file_of, save
from ghostfunc.cli._share import LastWord, Share, share_done, wait_for_rank_0
from ghostfunc.index import Store, score_corpus, search
from ghostfunc.text import Corpus


@ends_well(resumable=True)
def score(
    data: options.Data = None,
    model: options.ModelName = None,
    file: Annotated[
        str | None,
        options.option(
            options.QUERIES,
            "The queries, in any format that the corpus may have; each of its samples is one.",
            "--file",
            "-f",
            metavar="FILE",
        ),
    ] = None,
    out: Annotated[
        str | None, options.option(options.RUN, "The folder of the scores.", "--out", "-o", metavar="FOLDER")
    ] = None,
    k: Annotated[
        int,
        options.option(
            options.QUERIES, "Samples that are shown for each query.", "--k", "-k", default=10, min=1, metavar="N"
        ),
    ] = 10,
    layers: Annotated[
        str | None,
        options.option(
            options.QUERIES, "Parts of parameter names whose gradients count; all if not given.", metavar="A,B"
        ),
    ] = None,
    tokenizer: options.Tokenizer = None,
    model_dtype: options.ModelDtype = None,
    device: options.Device = None,
    block_size: options.BlockSize = None,
    limit: options.Limit = None,
    text_field: options.TextField = None,
    domain_field: options.DomainField = None,
    token_budget: options.TokenBudget = None,
    shard_rows: options.ShardRows = None,
    process: options.Process = 0,
    processes: options.Processes = 1,
    config: options.ConfigFile = None,
    json: options.Json = False,
) -> None:
    """Score every sample of a corpus against queries, exactly, in one pass.

    A score is the inner product of whole gradients, of every parameter: nothing is projected, and nothing but the
    scores is kept. The same command goes on after an interruption. The settings are saved as run.yaml.

    Examples:
        ghostfunc score corpus.jsonl.zst -m gpt2 --file questions.jsonl --out scores
        ghostfunc score --config scores/run.yaml -k 50 --json
    """
    settings = ScoreConfig.of(locals(), config)
    share = Share.of(process, processes)
    began = time.monotonic()
    with stdout_is_for_results():
        last = LastWord(settings.out, share)
        store, corpus, queries, tokens = _score(settings, share, last)
        seconds = time.monotonic() - began
        if not last.is_ours(store):
            say(share_done(share, store, tokens, seconds))
            return
        found = _found(store, corpus, queries, k)
    if json:
        run = {"tokens": tokens, "seconds": round(seconds, 3)}
        print_json({**describe(store), "queries": found, "run": run})
        return
    console = results()
    for each in found:
        console.print(hit_table(each, each["hits"]))
        console.print()
    print(HELPS)
    print(f"{store.folder}: the scores of {store.rows:,} samples for {len(queries):,} queries")


def _score(settings: ScoreConfig, share: Share, last: LastWord) -> tuple[Store, Corpus, Corpus, int]:
    """Score what is not scored yet.

    Returns:
        The scores, the data, the queries, and how many tokens this run computed.
    """
    file = file_of(settings)
    opened = open_model(settings.model, dtype=settings.model_dtype, device=settings.device, share=share)
    corpus = open_own_data(settings, opened)
    queries = open_data(settings.file, settings, opened)
    wait_for_rank_0(share, file)
    computed = -1
    with progress("scoring", share=share) as report:

        def told(done: int, total: int, tokens: int) -> None:
            nonlocal computed
            if computed < 0:  # from here on the folder holds scores of these settings
                save(settings, file, share.rank)
                last.begin(work=done < total)
            computed = tokens
            report(done, total, tokens)

        store = score_corpus(
            settings.out,
            corpus,
            opened.model_fn,
            opened.params,
            queries,
            layers=settings.layers,
            model=opened.model.name,
            token_budget=settings.token_budget,
            shard_rows=settings.shard_rows,
            rank=share.rank,
            world=share.world,
            progress=told,
        )
    return store, corpus, queries, max(computed, 0)


def _found(store: Store, corpus: Corpus, queries: Corpus, k: int) -> list[dict[str, Any]]:
    """Each query with its best samples, as JSON."""
    hits = search(store, torch.eye(store.dim), k)  # a column of the scores is its product with a unit vector
    samples = samples_of(store, {corpus.name: corpus}, [hits])
    return [
        {"query": number, "text": text_of(queries, number), "hits": listed(hits, number, samples)}
        for number in range(len(queries))
    ]
