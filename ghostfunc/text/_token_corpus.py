"""Token files as samples: the blocks of uint16 files, one file per domain, in order."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from ghostfunc._parquet import import_pyarrow
from ghostfunc.text._corpus import Corpus
from ghostfunc.text._layout import TOKEN

_FORMAT = "ghostfunc token blocks 1"
_AT_ONCE = 1 << 22  # tokens read together


class TokenCorpus(Corpus):
    """Memory-mapped token files, cut into blocks of `block_size` tokens that never cross files.

    What is left behind a file's last whole block is no sample, as in training on these files.

    Args:
        files: the file of each domain, little-endian uint16; samples are in this order.
        block_size: tokens of every sample.
        name: the corpus's.
        tokenizer: what the ids mean; None where that is not known, and then there is no text.
        vocab_size: refuse ids from this on; None accepts all.
        limit: keep at most so many samples.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if there is no file, a file has an odd number of bytes, no file has a whole block, or an id is
            outside the vocabulary.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "train-code.bin"
        >>> np.arange(10, dtype=TOKEN).tofile(file)
        >>> corpus = TokenCorpus({"code": file}, block_size=4)
        >>> len(corpus), corpus.tokens(1)
        (2, array([4, 5, 6, 7]))
    """

    def __init__(
        self,
        files: dict[str, Path],
        *,
        block_size: int = 1024,
        name: str = "tokens",
        tokenizer: Any = None,
        vocab_size: int | None = None,
        limit: int | None = None,
    ) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {block_size}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1 sample, not {limit}")
        if not files:
            raise ValueError("a TokenCorpus needs the token file of at least one domain")
        self.name = name
        self.block_size = block_size
        self.tokenizer = tokenizer
        self.files = dict(files)
        self._ids = {domain: _mapped(path) for domain, path in files.items()}
        stops = np.cumsum([ids.size // block_size for ids in self._ids.values()])  # [files] of samples
        self._stops = stops if limit is None else np.minimum(stops, limit)
        samples = int(self._stops[-1])
        if samples == 0:
            sizes = ", ".join(f"{path} {self._ids[domain].size}" for domain, path in files.items())
            raise ValueError(
                f"no token file has a whole block of {block_size} tokens (tokens: {sizes}): lower block_size"
            )
        self.lengths = np.full(samples, block_size, dtype=np.int64)
        self._largest = (-1, 0)
        self.fingerprint = self._read_all(vocab_size)

    def tokens(self, i: int) -> np.ndarray:
        """The token ids of sample i, int64 `[block_size]`."""
        domain, block = self._place(self._checked(i))
        return self._ids[domain][block * self.block_size : (block + 1) * self.block_size].astype(np.int64)

    def text(self, i: int) -> str:
        """The text of sample i; a character that is cut at the block's edge shows as U+FFFD.

        Raises:
            ValueError: without a tokenizer.
        """
        return "".join(self.token_texts(i))

    def token_texts(self, i: int) -> list[str]:
        """The text of each token of sample i; one after the other they are `text(i)`.

        Raises:
            ValueError: without a tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError(
                f"{self.name}: the token files have no tokenizer folder beside them, so that their text is not known; "
                "name their tokenizer"
            )
        return _pieces(self.tokens(i).tolist(), self.tokenizer)

    def samples(self, start: int, stop: int) -> Any:
        """What is known about the samples from `start` to before `stop`, as a `pyarrow.Table`."""
        pyarrow = import_pyarrow("a table of samples")
        ids = range(*slice(start, stop).indices(len(self)))
        places = [self._place(i) for i in ids]
        starts = [block * self.block_size for _, block in places]
        return pyarrow.table(
            {
                "sample_id": pyarrow.array(ids, pyarrow.int64()),
                "document": pyarrow.array([self.files[domain].name for domain, _ in places], pyarrow.string()),
                "domain": pyarrow.array([domain for domain, _ in places], pyarrow.string()),
                "start": pyarrow.array(starts, pyarrow.int64()),
                "stop": pyarrow.array([first + self.block_size for first in starts], pyarrow.int64()),
                "tokens": pyarrow.array([self.block_size] * len(ids), pyarrow.int32()),
            }
        )

    def largest_id(self) -> tuple[int, int]:
        """The largest token id, and the first sample that has it."""
        return self._largest

    def _place(self, i: int) -> tuple[str, int]:
        """The domain of sample i, and the number of its block there."""
        file = int(np.searchsorted(self._stops, i, side="right"))
        return list(self._ids)[file], i - (int(self._stops[file - 1]) if file else 0)

    def _read_all(self, vocab_size: int | None) -> str:
        """Read every sample once: the fingerprint, and whether all ids are in the vocabulary."""
        digest = hashlib.sha256()
        first = 0
        for (domain, ids), stop in zip(self._ids.items(), self._stops.tolist(), strict=True):
            used = ids[: (stop - first) * self.block_size]
            header = [_FORMAT, self.block_size, self.files[domain].name, domain, stop - first]
            digest.update(json.dumps(header).encode() + b"\n")
            for start in range(0, used.size, _AT_ONCE):
                some = used[start : start + _AT_ONCE]
                digest.update(some.tobytes())
                at = int(some.argmax())
                largest = int(some[at])
                if vocab_size is not None and largest >= vocab_size:
                    raise ValueError(
                        f"{self.files[domain]} holds the id {largest} at token {start + at}, outside the vocabulary of "
                        f"{vocab_size}: it was written with another tokenizer, or is damaged; write it again"
                    )
                if largest > self._largest[0]:
                    self._largest = (largest, first + (start + at) // self.block_size)
            first = stop
        return digest.hexdigest()


def _mapped(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: write it with `ghostfunc tokenize`")
    size = path.stat().st_size
    if size % TOKEN.itemsize:
        raise ValueError(
            f"{path} has {size} bytes, an odd number, so it is no whole file of uint16 token ids: write it again"
        )
    return np.asarray(np.memmap(path, dtype=TOKEN, mode="r")) if size else np.zeros(0, dtype=TOKEN)


def _pieces(ids: list[int], tokenizer: Any) -> list[str]:
    """The text of each token. What several tokens spell together is the first one's; the others have ""."""

    def decoded(start: int, stop: int) -> str:
        return tokenizer.decode(ids[start:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    pieces = [""] * len(ids)
    context, done = 0, 0  # a token's text may depend on the one before: a space at the very beginning is dropped
    before = ""
    for stop in range(1, len(ids) + 1):
        now = decoded(context, stop)
        if now.endswith("\ufffd") and stop < len(ids):  # within a character
            continue
        pieces[done] = now[len(before) :]
        context, done = done, stop
        before = decoded(context, done)
    return pieces
