"""`ghostfunc index`: every sample's projected gradient in a folder."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Annotated

from ghostfunc.cli import _options as options
from ghostfunc.cli._config import IndexConfig
from ghostfunc.cli._console import print_json, say, stdout_is_for_results
from ghostfunc.cli._describe import describe, print_description
from ghostfunc.cli._failures import ends_well
from ghostfunc.cli._library import open_model, open_own_data, projection_of
from ghostfunc.cli._progress import progress
from ghostfunc.cli._run_files import file_of, run_file, run_files, save
from ghostfunc.cli._share import LastWord, Share, share_done, wait_for_rank_0
from ghostfunc.index import Store, build_index
from ghostfunc.index._manifest import read_sources
from ghostfunc.text import Corpus

_PROJECTION = options.PROJECTION


@ends_well(resumable=True)
def index(
    data: options.Data = None,
    model: options.ModelName = None,
    out: Annotated[
        str | None, options.option(options.RUN, "The folder of the index.", "--out", "-o", metavar="FOLDER")
    ] = None,
    layers: Annotated[
        str | None,
        options.option(
            _PROJECTION,
            "Parts of parameter names, matched at dots, such as mlp,attn or h.0; all linear layers if not given.",
            metavar="A,B",
        ),
    ] = None,
    rank: Annotated[
        int | None,
        options.option(_PROJECTION, "Numbers that a parameter's gradient becomes.", of="rank", min=1, metavar="N"),
    ] = None,
    min_rank: Annotated[
        int | None, options.option(_PROJECTION, "Smallest rank of a side.", of="min_rank", min=1, metavar="N")
    ] = None,
    kind: Annotated[
        str | None,
        options.option(
            _PROJECTION,
            "Of the matrices: gaussian, rademacher, orthonormal, sparse, mask, pca.",
            of="kind",
            metavar="KIND",
        ),
    ] = None,
    seed: Annotated[int | None, options.option(_PROJECTION, "Of the matrices.", of="seed", metavar="N")] = None,
    include: Annotated[
        str | None,
        options.option(_PROJECTION, "Beside the linear layers, of embedding, norm, bias and head.", metavar="A,B"),
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
    dtype: options.Dtype = None,
    append: Annotated[
        bool | None,
        options.option(
            options.RUN, "Add this data to the index in --out; settings that are not given are the index's.", "--append"
        ),
    ] = None,
    process: options.Process = 0,
    processes: options.Processes = 1,
    config: options.ConfigFile = None,
    json: options.Json = False,
) -> None:
    """Keep the projected gradient of every sample of a corpus in a folder.

    The same command goes on after an interruption, and ends with the same bytes. The settings are saved as run.yaml.

    Examples:
        ghostfunc index corpus.jsonl.zst --model gpt2 --out my-index
        ghostfunc index texts -m gpt2 -o my-index --layers mlp,attn --rank 256
        ghostfunc index more.jsonl --out my-index --append
        ghostfunc index --config my-index/run.yaml
        torchrun --no-python --nproc-per-node 8 ghostfunc index corpus.jsonl.zst -m gpt2 -o my-index
    """
    given = dict(locals())
    share = Share.of(process, processes)
    if append and config is None and out is not None and run_file(Path(out)).exists():
        settings = replace(IndexConfig.of(given, run_file(Path(out))), limit=limit)
    else:
        settings = IndexConfig.of(given, config)
    began = time.monotonic()
    with stdout_is_for_results():
        file = file_of(settings)
        last = LastWord(settings.out, share)
        tokens = _build(settings, file, share, last)
    store = Store(settings.out)
    seconds = time.monotonic() - began
    if not last.is_ours(store):
        say(share_done(share, store, tokens, seconds))
        return
    if json:
        print_json({**describe(store), "run": {"tokens": tokens, "seconds": round(seconds, 3)}})
        return
    print_description(describe(store))
    print(f"  {'this run':<12}{tokens:,} tokens in {seconds:,.1f} s")
    if store.complete:
        folder = quote(str(store.folder))
        print(f"\nAsk it:      ghostfunc query {folder} 'A prompt'")
        print(f"Look at it:  ghostfunc report {folder} 'A prompt'")


def _build(settings: IndexConfig, file: Path, share: Share, last: LastWord) -> int:
    """Build the index.

    Returns:
        How many tokens this run computed.
    """
    opened = open_model(settings.model, dtype=settings.model_dtype, device=settings.device, share=share)
    corpus = open_own_data(settings, opened)
    wait_for_rank_0(share, file)
    if settings.append:
        corpus.name = _name_among(Path(settings.out), corpus)
    projection = projection_of(settings, opened, corpus, begun=bool(run_files(Path(settings.out))))
    computed = -1
    with progress("indexing", share=share) as report:

        def told(done: int, total: int, tokens: int) -> None:
            nonlocal computed
            if computed < 0:  # from here on the folder is an index of these settings
                save(settings, file, share.rank)
                last.begin(work=done < total)
            computed = tokens
            report(done, total, tokens)

        build_index(
            settings.out,
            corpus,
            opened.model_fn,
            opened.params,
            projection,
            model=opened.model.name,
            dtype=settings.dtype,
            token_budget=settings.token_budget,
            shard_rows=settings.shard_rows,
            rank=share.rank,
            world=share.world,
            append=settings.append,
            progress=told,
        )
    return max(computed, 0)


def _name_among(folder: Path, corpus: Corpus) -> str:
    """The name of a corpus in an index: the one that it has there, or one that no other has."""
    there = {source.fingerprint: source.name for source in read_sources(folder)}
    names = (corpus.name, *(f"{corpus.name}-{number}" for number in range(2, len(there) + 2)))
    return there.get(corpus.fingerprint) or next(name for name in names if name not in there.values())
