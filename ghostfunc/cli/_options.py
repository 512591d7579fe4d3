"""The flags that commands share. None means that a flag is not given; the defaults shown are those of the settings."""

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from ghostfunc.cli._config import IndexConfig
from ghostfunc.cli._share import RANKS, WORLDS

DATA, MODEL, PROJECTION, QUERIES, SEARCH, RUN = "Data", "Model", "Projection", "Queries", "Search", "Run"
_DEFAULTS = {field.name: field.default for field in fields(IndexConfig) if field.default is not MISSING}


def option(panel: str, text: str, *flags: str, of: str = "", default: Any = None, **how: Any) -> Any:
    """An option that shows a default: a setting's (`of`), or the one given."""
    shown = _DEFAULTS[of] if of else default
    text = f"{text} [dim]\\[default: {shown}][/dim]" if shown not in (None, "", False) else text
    return typer.Option(*flags, help=text, rich_help_panel=panel, show_default=False, **how)


Data = Annotated[
    str | None,
    typer.Argument(
        metavar="DATA",
        show_default=False,
        help="The corpus: JSON lines (.jsonl, .jsonl.zst, .jsonl.gz) in the Pile's format or with `text` and `domain`; "
        "Parquet; one .txt, or a folder of them (the sub-folder is the domain); or a folder of token files.",
    ),
]
ModelName = Annotated[
    str | None,
    option(
        MODEL,
        "A folder of transformers, a name on the hub, a GGUF file, or the folder of a GradDotProd_LM run.",
        "--model",
        "-m",
        metavar="MODEL",
    ),
]
Tokenizer = Annotated[
    str | None, option(MODEL, "A folder or a name on the hub, if not the model's own.", metavar="NAME")
]
ModelDtype = Annotated[
    str | None,
    option(MODEL, "Of the parameters: float32, bfloat16, float16, float64.", of="model_dtype", metavar="DTYPE"),
]
Device = Annotated[
    str | None,
    option(MODEL, "cpu, cuda, cuda:1, ...; auto is a GPU where there is one.", of="device", metavar="DEVICE"),
]
BlockSize = Annotated[int | None, option(DATA, "Tokens of a sample at most.", of="block_size", min=1, metavar="TOKENS")]
Limit = Annotated[int | None, option(DATA, "So many samples at most, the first of the data.", min=1, metavar="N")]
TextField = Annotated[str | None, option(DATA, "The field or column of the text.", of="text_field", metavar="NAME")]
DomainField = Annotated[
    str | None, option(DATA, "The field or column of the domain, if not one of the usual.", metavar="NAME")
]
TokenBudget = Annotated[
    int | None,
    option(RUN, "Tokens of a batch at most, padding included.", of="token_budget", min=1, metavar="TOKENS"),
]
ShardRows = Annotated[
    int | None,
    option(RUN, "Samples of a shard: what an interruption loses at most.", of="shard_rows", min=1, metavar="N"),
]
Dtype = Annotated[
    str | None, option(RUN, "Of the rows on disk: float32, bfloat16, float16, int8.", of="dtype", metavar="DTYPE")
]
Process = Annotated[
    int,
    option(RUN, "Which of --world-size processes this is, from 0.", "--rank-of", min=0, envvar=RANKS, metavar="N"),
]
Processes = Annotated[
    int,
    option(
        RUN,
        "How many processes share the work, at the same time or one after the other.",
        "--world-size",
        min=1,
        envvar=WORLDS,
        metavar="N",
    ),
]
ConfigFile = Annotated[
    Path | None,
    option(
        RUN, "A YAML file of settings, such as an earlier run's run.yaml; flags win.", "--config", "-c", metavar="FILE"
    ),
]
Folder = Annotated[str, typer.Argument(metavar="FOLDER", show_default=False, help="The folder of an index.")]
Prompts = Annotated[
    list[str] | None,
    typer.Argument(metavar="PROMPT", show_default=False, help="Texts, each a query."),
]
QueryFile = Annotated[
    str | None,
    option(QUERIES, "Queries from a file, in any format that the corpus may have.", "--file", "-f", metavar="FILE"),
]
Metric = Annotated[str, option(SEARCH, "dot (inner products) or cosine.", default="dot", metavar="METRIC")]
Precondition = Annotated[
    str | None,
    option(
        SEARCH,
        "inverse-gram: the queries are multiplied by the damped inverse of the Gram matrix of the index's rows.",
        metavar="NAME",
    ),
]
Damping = Annotated[
    float,
    option(SEARCH, "Of the Gram matrix, as a share of its mean diagonal.", default=0.1, min=0.0, metavar="SHARE"),
]
MovedModel = Annotated[
    str | None, option(MODEL, "Where the model of the index is, if it has moved.", "--model", "-m", metavar="MODEL")
]
MovedData = Annotated[
    list[str] | None,
    option(DATA, "Where data of the index is, if it has moved; for the text.", "--data", metavar="DATA"),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; everything else goes to stderr.")]
