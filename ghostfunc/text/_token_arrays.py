"""A tokenized corpus as arrays: in memory, or as .npy files in a folder that is written once and then mapped."""

import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.lib import format as npy

from ghostfunc._parquet import sync_folder

SAMPLE = np.dtype([("token", "<i8"), ("document", "<i8"), ("start", "<i8"), ("stop", "<i8"), ("byte", "<i8")])
DOCUMENT = np.dtype([("name_stop", "<i8"), ("domain", "<i8")])
_DTYPES = {
    "ids": np.dtype("<i4"),
    "ends": np.dtype("<i4"),
    "samples": SAMPLE,
    "documents": DOCUMENT,
    "text": np.dtype("u1"),
    "names": np.dtype("u1"),
}
_RECORD = "corpus.json"


class TokenArrays(NamedTuple):
    """A corpus of N samples. Samples lie one behind the other in `ids`, `ends` and `text`.

    Attributes:
        ids: int32 `[tokens]`.
        ends: int32 `[tokens]`: the characters of its sample up to and with each token's own.
        samples: `[N]`: the first token, the document, where it starts and stops in it (characters), its first byte.
        documents: `[D]`: where each name ends in `names`, and the domain's number.
        text: UTF-8 of all samples.
        names: UTF-8 of all documents' names.
        domains: by number.
        fingerprint: of the content.
    """

    ids: np.ndarray
    ends: np.ndarray
    samples: np.ndarray
    documents: np.ndarray
    text: np.ndarray
    names: np.ndarray
    domains: list[str]
    fingerprint: str


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Let other processes that would write the same folder wait; a killed one lets the next go on."""
    import fcntl  # here, because not every system has it, and a corpus in memory does not need it

    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class ArrayWriter:
    """Arrays that grow; nothing of them is kept in memory where there is a folder.

    Args:
        folder: where the files appear, all at once, when `finish` is called; None keeps them in memory. One process
            writes it at a time (`only_process`); what a killed one left is removed.

    Attributes:
        counts: how long each array is.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._draft = None if folder is None else folder.with_name(f".{folder.name}.tmp")
        if self._draft is not None:
            shutil.rmtree(self._draft, ignore_errors=True)
            self._draft.mkdir(parents=True)
        self._files: dict[str, BinaryIO] = {}
        self.counts = dict.fromkeys(_DTYPES, 0)
        for name in _DTYPES:
            file = io.BytesIO() if self._draft is None else (self._draft / f"{name}.npy").open("w+b")
            self._files[name] = file
            self._write_header(name)

    def append(self, name: str, values: Any) -> None:
        """Append to one of the arrays of `TokenArrays`."""
        array = np.asarray(values, dtype=_DTYPES[name])
        self._files[name].write(array.tobytes())
        self.counts[name] += array.size

    def finish(self, domains: list[str], fingerprint: str) -> TokenArrays:
        """Close the arrays and hand them out."""
        for name in _DTYPES:
            self._write_header(name)
        if self._folder is None or self._draft is None:
            arrays = {name: self._in_memory(name) for name in _DTYPES}
            return TokenArrays(**arrays, domains=domains, fingerprint=fingerprint)
        record = (self._draft / _RECORD).open("w+b")
        record.write(json.dumps({"domains": domains, "fingerprint": fingerprint}).encode())
        for file in (*self._files.values(), record):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        sync_folder(self._draft)
        os.rename(self._draft, self._folder)
        sync_folder(self._folder.parent)
        arrays = read_arrays(self._folder)
        assert arrays is not None
        return arrays

    def discard(self) -> None:
        """Leave nothing of what was written."""
        for file in self._files.values():
            file.close()
        if self._draft is not None:
            shutil.rmtree(self._draft, ignore_errors=True)

    def _write_header(self, name: str) -> None:
        """The header leaves room for any length, so that it can be written again over the first."""
        file, dtype = self._files[name], _DTYPES[name]
        file.seek(0)
        header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": (self.counts[name],)}
        npy.write_array_header_1_0(file, header)

    def _in_memory(self, name: str) -> np.ndarray:
        file = self._files[name]
        assert isinstance(file, io.BytesIO)
        return np.frombuffer(file.getbuffer(), _DTYPES[name], self.counts[name], file.tell())


def read_arrays(folder: Path) -> TokenArrays | None:
    """The arrays of a folder, mapped; None where there are none.

    Raises:
        ValueError: if a file is damaged; the message names it.
    """
    if not (folder / _RECORD).is_file():
        return None
    arrays = {}
    for name, dtype in _DTYPES.items():
        path = folder / f"{name}.npy"
        try:
            arrays[name] = _mapped(path)
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete {folder}, and it is written again") from error
        if arrays[name].dtype != dtype or arrays[name].ndim != 1:
            raise ValueError(f"{path} holds other data than a tokenized corpus: delete {folder}, or name another cache")
    record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    return TokenArrays(**arrays, domains=record["domains"], fingerprint=record["fingerprint"])


def _mapped(path: Path) -> np.ndarray:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return np.asarray(array)  # a view without the subclass, whose slices are slow
