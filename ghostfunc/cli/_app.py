"""The application: its commands, its help, its version."""

import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated

import typer

from ghostfunc.cli._explain import explain
from ghostfunc.cli._index import index
from ghostfunc.cli._query import query
from ghostfunc.cli._report import report
from ghostfunc.cli._score import score
from ghostfunc.cli._tokenize import tokenize

app = typer.Typer(
    name="ghostfunc",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> bool:
    if wanted:
        print(f"ghostfunc {version('ghostfunc')}")
        raise typer.Exit
    return wanted


def ghostfunc(
    wanted: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Which samples of a corpus shaped what a model does with a text?

    `index` keeps every sample's projected gradient in a folder; `query` and `report` ask that folder as often as you
    like. `score` gives exact scores for queries that are known beforehand, in one pass, and keeps nothing else.

    A positive score: a gradient step on the sample lowers the query's loss.
    """


def _help(command: Callable[..., None]) -> str:
    """A docstring as help: paragraphs without its line ends, the examples line by line."""
    text, _, examples = inspect.cleandoc(command.__doc__ or "").partition("\nExamples:\n")
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    if examples:
        paragraphs.append(f"[bold]Examples[/bold]\n{inspect.cleandoc(examples)}")
    return "\n\n".join(paragraphs)


app.callback(help=_help(ghostfunc))(ghostfunc)
for command in (index, query, score, report, explain, tokenize):
    app.command(help=_help(command))(command)
