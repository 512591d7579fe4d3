"""Memory-mapped token files, one per domain, and the batches drawn from them.

A file holds uint16 little-endian token ids. A sample is a block `[offset, offset + block_size)` of one file with
`offset` a multiple of `block_size`, so that no sample crosses domains, and its offset is its id.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shared.domain_list import PILE_DOMAINS, SPLITS, domain_file, domain_file_name, split_folder

TOKEN = np.dtype("<u2")
_TOKENS_CHECKED_AT_LOAD = 1 << 24  # per file; every block is checked again when it is read
_TOKENS_READ_AT_ONCE = 1 << 24
_TOKENIZE = "python examples/shared/data_processing/tokenize_pile_by_domain.py"


class Batch(NamedTuple):
    """Samples with their origin; sample b is `domains[b]` from token `offsets[b]` on.

    Attributes:
        tokens: int64 `[B, T]`.
        offsets: the index of each sample's first token in its domain's file: the sample's id there.
        domains: each sample's domain, as in file names.
    """

    tokens: Tensor
    offsets: list[int]
    domains: list[str]


class Corpora(NamedTuple):
    """The three splits that a training run reads."""

    train: "TokenCorpus"
    val: "TokenCorpus"
    test: "TokenCorpus"


class TokenCorpus:
    """The memory-mapped token files of one split, cut into blocks that never cross domains.

    Args:
        files: the token file of each domain.
        block_size: tokens in a sample.
        vocab_size: refuse ids from this on, at load in the first 16.8 million tokens of a file and in every block as
            it is read; None accepts all.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if there is no file; if a file has an odd number of bytes, is shorter than a block or holds an id
            outside the vocabulary; if `block_size` is below 1.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "train-code.bin"
        >>> np.arange(10, dtype=TOKEN).tofile(file)
        >>> corpus = TokenCorpus({"code": file}, block_size=4)
        >>> corpus.at("code", 4)
        tensor([4, 5, 6, 7])
        >>> sorted(corpus.sample(2, seed=0, step=0).offsets)
        [0, 4]
    """

    def __init__(self, files: dict[str, Path], *, block_size: int, vocab_size: int | None = None) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {block_size}")
        if not files:
            raise ValueError("a TokenCorpus needs the token file of at least one domain")
        self.files = dict(files)
        self.block_size = block_size
        self.vocab_size = vocab_size
        self._ids = {domain: self._open(path) for domain, path in files.items()}
        # Block b of the corpus lies in the first domain whose running count of blocks exceeds b.
        self._blocks_up_to = np.cumsum([ids.size // block_size for ids in self._ids.values()])

    @property
    def domains(self) -> list[str]:
        """The domains, in the order of `files`."""
        return list(self._ids)

    @property
    def tokens(self) -> int:
        """The number of tokens in all files, those after a file's last whole block included."""
        return sum(ids.size for ids in self._ids.values())

    @property
    def blocks(self) -> int:
        """The number of samples that can be drawn."""
        return int(self._blocks_up_to[-1])

    def sample(self, batch_size: int, *, seed: int, step: int, rank: int = 0, ranks: int = 1) -> Batch:
        """Draw distinct blocks, each with the same probability: domains in proportion to their number of blocks.

        A pure function of `(seed, step)`: no state is kept, so that a resumed run draws what the first would have. N
        ranks draw together the N·B blocks that one draws with a batch size of N·B, each the next B of them.

        Args:
            batch_size: B; of all ranks at most the number of blocks.
            seed: 0 or more.
            step: 0 or more; another step draws another batch, which may repeat blocks of earlier ones.
            rank: which part of the draw this is, below `ranks`.
            ranks: N.

        Returns:
            The batch, tokens int64 `[B, T]` on the CPU.

        Raises:
            ValueError: if the corpus has fewer than `ranks * batch_size` blocks, or if an argument is negative.
        """
        if not 1 <= batch_size * ranks <= self.blocks:
            asked = f"{batch_size} in each of {ranks} processes" if ranks > 1 else batch_size
            raise ValueError(
                f"batch_size must be from 1 to the number of blocks, {self.blocks} of {self.block_size} tokens in "
                f"{', '.join(self.domains)}, not {asked}: lower --batch_size (or --val_batch_size, --eval_bs) or "
                f"--block_size, or tokenize more text: {_TOKENIZE} --input TEXT --output_dir NEW_FOLDER"
            )
        if seed < 0 or step < 0:
            raise ValueError(f"seed and step must be 0 or more, not {seed} and {step}")
        drawn = np.random.default_rng([seed, step]).choice(self.blocks, ranks * batch_size, replace=False)
        return self._batch_of(drawn[rank * batch_size : (rank + 1) * batch_size])

    def in_order(self, start: int, stop: int) -> Batch:
        """Blocks by their place in the corpus: one domain after the other, each from its file's beginning on.

        Args:
            start: the first block.
            stop: one after the last, at most the number of blocks.

        Returns:
            The batch, tokens int64 `[stop - start, T]` on the CPU.

        Raises:
            ValueError: if there are no such blocks.
        """
        if not 0 <= start < stop <= self.blocks:
            raise ValueError(f"blocks {start} to {stop} are not among the {self.blocks} of this corpus")
        return self._batch_of(np.arange(start, stop))

    def fingerprint(self, blocks: int) -> str:
        """Hexadecimal sha256 of the first blocks in order: of their tokens, their domains, and where they are cut.

        Args:
            blocks: how many, at most the number of blocks. They are read from disk for it.
        """
        digest = hashlib.sha256(f"{self.block_size}\n".encode())
        for domain, ids in self._ids.items():
            here = min(ids.size // self.block_size, blocks)
            digest.update(f"{domain}\n{here}\n".encode())
            for start in range(0, here * self.block_size, _TOKENS_READ_AT_ONCE):
                digest.update(ids[start : min(start + _TOKENS_READ_AT_ONCE, here * self.block_size)].tobytes())
            blocks -= here
        return digest.hexdigest()

    def at(self, domain: str, offset: int) -> Tensor:
        """One sample again, by its id.

        Args:
            domain: its domain.
            offset: the index of its first token in the domain's file, a multiple of `block_size`.

        Returns:
            int64 `[T]`.

        Raises:
            ValueError: if there is no such domain, or if no sample begins at `offset`.
        """
        if domain not in self._ids:
            raise ValueError(f"no domain {domain!r} in this corpus; it has {', '.join(self.domains)}")
        last = (self._ids[domain].size // self.block_size - 1) * self.block_size
        if offset % self.block_size or not 0 <= offset <= last:
            raise ValueError(
                f"no sample of {domain!r} begins at {offset}: offsets are the multiples of "
                f"block_size={self.block_size} from 0 to {last}"
            )
        return torch.from_numpy(self._block(domain, offset))

    def _batch_of(self, blocks: np.ndarray) -> Batch:
        places = np.searchsorted(self._blocks_up_to, blocks, side="right")  # [B]
        firsts = np.concatenate([[0], self._blocks_up_to[:-1]])[places]  # [B]
        offsets = ((blocks - firsts) * self.block_size).tolist()
        domains = [self.domains[place] for place in places]
        tokens = np.stack([self._block(domain, offset) for domain, offset in zip(domains, offsets, strict=True)])
        return Batch(torch.from_numpy(tokens), offsets, domains)

    def _open(self, path: Path) -> np.ndarray:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: make it with {_TOKENIZE} --output_dir {path.parent}")
        n_bytes = path.stat().st_size
        if n_bytes % TOKEN.itemsize:
            raise ValueError(
                f"{path} has {n_bytes} bytes, an odd number, so it is no whole file of uint16 token ids: delete it and "
                f"write it again with {_TOKENIZE}"
            )
        n_tokens = n_bytes // TOKEN.itemsize
        if n_tokens < self.block_size:
            raise ValueError(
                f"{path} has {n_tokens} tokens, fewer than one block of {self.block_size}: lower --block_size, "
                f"leave the domain out, or tokenize more text: {_TOKENIZE} --input TEXT --output_dir NEW_FOLDER"
            )
        ids = np.memmap(path, dtype=TOKEN, mode="r")
        self._refuse_unknown_ids(path, ids[:_TOKENS_CHECKED_AT_LOAD], 0)
        return ids

    def _block(self, domain: str, offset: int) -> np.ndarray:
        block = self._ids[domain][offset : offset + self.block_size]
        self._refuse_unknown_ids(self.files[domain], block, offset)
        return block.astype(np.int64)  # [T]

    def _refuse_unknown_ids(self, path: Path, ids: np.ndarray, offset: int) -> None:
        if self.vocab_size is None or int(ids.max()) < self.vocab_size:
            return
        position = int((ids >= self.vocab_size).argmax())
        raise ValueError(
            f"{path} holds the id {ids[position]} at token {offset + position}, outside the model's vocabulary of "
            f"{self.vocab_size}: give the model the tokenizer's vocabulary (vocab_size in the data's meta.json), or "
            f"tokenize again with the model's tokenizer: {_TOKENIZE} --tokenizer NAME_OR_FOLDER --output_dir NEW_FOLDER"
        )


def load_corpora(
    data_dir: str | Path, train_set: str, val_set: str, *, block_size: int, vocab_size: int | None = None
) -> Corpora:
    """Open the training, validation and test data of a run, and print which domains they hold.

    A set is, in this order:

    - `pile`: the Pile's domains whose files are in `data_dir`; those with less than one block are named and left out;
    - a folder with `.bin` files of any names (not looked for in sub-folders). A domain is then the file's name without
      `.bin`, and without the split's prefix (`train-`, `validation-`, `test-`) where all of them have it. Validation
      files are those in the folder's `val` if there are any, else the folder's own;
    - comma-separated domain names, in the data set's form or that of file names, whose files must be in `data_dir`.

    The test split has the validation set's domains; with a folder it is what lies in the folder's `test`, or, for a
    folder named `val`, in the `test` beside it. Where neither exists, the validation files serve as test files, and the
    printed line says so.

    Args:
        data_dir: the folder that the tokenizer script wrote.
        train_set: what to train on.
        val_set: what to validate on.
        block_size: tokens in a sample.
        vocab_size: refuse token ids from this on; None accepts all.

    Returns:
        The three corpora.

    Raises:
        FileNotFoundError: if there is no data, or none for a domain.
        ValueError: if a file is damaged, too short or holds ids outside the vocabulary; the message says what mends it.

    Example:
        >>> corpora = load_corpora("data", "code,prose", "prose", block_size=1024)  # doctest: +SKIP
        >>> corpora.train.sample(16, seed=42, step=0).tokens.shape  # doctest: +SKIP
        torch.Size([16, 1024])
    """
    sets = zip(SPLITS, (train_set, val_set, val_set), strict=True)
    return Corpora(
        *(load_corpus(data_dir, split, wanted, block_size=block_size, vocab_size=vocab_size) for split, wanted in sets)
    )


def load_corpus(
    data_dir: str | Path, split: str, wanted: str, *, block_size: int, vocab_size: int | None = None
) -> TokenCorpus:
    """Open the data of one split, and print which domains it holds.

    Args:
        data_dir: as in `load_corpora`.
        split: "train", "validation" or "test".
        wanted: a set, as in `load_corpora`.
        block_size: tokens in a sample.
        vocab_size: refuse token ids from this on; None accepts all.

    Returns:
        The corpus.

    Raises:
        FileNotFoundError: as in `load_corpora`.
        ValueError: as in `load_corpora`.
    """
    option = "--train_set" if split == "train" else "--val_set"
    files, note = _files_of(Path(data_dir), split, wanted, option, block_size)
    corpus = TokenCorpus(files, block_size=block_size, vocab_size=vocab_size)
    print(
        f"{split}: {corpus.tokens:,} tokens, {corpus.blocks:,} blocks of {block_size} from {len(files)} "
        f"domain{'s' * (len(files) != 1)}: {', '.join(files)}{note}"
    )
    return corpus


def _files_of(data_dir: Path, split: str, wanted: str, option: str, block_size: int) -> tuple[dict[str, Path], str]:
    """The token file of each domain of a set, and what the printed line should say beside."""
    if wanted == "pile":
        return _files_of_the_pile(data_dir, split, option, block_size)
    if wanted.strip() and Path(wanted).is_dir():
        return _files_of_a_folder(Path(wanted), split, option)
    files = {name: domain_file(data_dir, split, name) for name in map(domain_file_name, _names_in(wanted))}
    missing = [name for name, path in files.items() if not path.is_file()]
    if missing or not files:
        there = _domains_in(data_dir, split)
        raise FileNotFoundError(
            f"{option} {wanted!r} is no folder, and {split_folder(data_dir, split)} has no {split} file for "
            f"{', '.join(missing) or 'it'}. "
            + (f"Domains there: {', '.join(there)}. " if there else "")
            + _mend(data_dir)
        )
    return files, ""


def _names_in(wanted: str) -> list[str]:
    return [name.strip() for name in wanted.split(",") if name.strip()]


def _files_of_the_pile(data_dir: Path, split: str, option: str, block_size: int) -> tuple[dict[str, Path], str]:
    files = {domain_file_name(domain): domain_file(data_dir, split, domain) for domain in PILE_DOMAINS}
    files = {name: path for name, path in files.items() if path.is_file()}
    if not files:
        there = _domains_in(data_dir, split)
        other = f"It has {', '.join(there)}: name those with {option}. " if there else ""
        raise FileNotFoundError(
            f"{option} pile: {split_folder(data_dir, split)} has no {split} file of any of the Pile's domains. "
            + other
            + _mend(data_dir)
        )
    too_short = [name for name, path in files.items() if path.stat().st_size < block_size * TOKEN.itemsize]
    if len(too_short) == len(files):
        raise ValueError(
            f"{option} pile: none of the {split} files in {split_folder(data_dir, split)} ({', '.join(files)}) has one "
            f"block of {block_size} tokens: lower --block_size, or tokenize more text: {_TOKENIZE} --max_tokens MORE "
            f"--output_dir NEW_FOLDER"
        )
    note = f" (left out, with less than one block: {', '.join(too_short)})" if too_short else ""
    return {name: path for name, path in files.items() if name not in too_short}, note


def _files_of_a_folder(folder: Path, split: str, option: str) -> tuple[dict[str, Path], str]:
    candidates, note = [folder], ""
    if split != "train":
        candidates.insert(0, folder / "val")
    if split == "test":
        beside = [folder.resolve().parent / "test"] if folder.resolve().name == "val" else []
        candidates = [folder / "test", *beside, *candidates]
    for candidate in candidates:
        paths = sorted(candidate.glob("*.bin"))
        if paths:
            if split == "test" and candidate.name != "test":
                note = " (no test folder: these are the validation files)"
            prefix = f"{split}-"
            named_by_rule = all(path.stem.startswith(prefix) and path.stem != prefix for path in paths)
            return {path.stem.removeprefix(prefix) if named_by_rule else path.stem: path for path in paths}, note
    raise FileNotFoundError(f"{option} {folder} is a folder without .bin files. " + _mend(folder))


def _domains_in(data_dir: Path, split: str) -> list[str]:
    prefix = f"{split}-"
    return [path.stem.removeprefix(prefix) for path in sorted(split_folder(data_dir, split).glob(f"{prefix}*.bin"))]


def _mend(data_dir: Path) -> str:
    return (
        f"Write the data with: {_TOKENIZE} --output_dir {data_dir} (add --input FILE_OR_FOLDER for your own "
        "Pile-format text), or name another folder with --data_dir."
    )
