"""Token files that grow out of sight and appear under their names when they are whole.

Files grow in `<output_dir>/.tokenizing`. A resume point there records their lengths and the place in the input, so that
a run that was interrupted cuts off what was written after it and goes on.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ghostfunc.text._layout import SPLITS, TOKEN, domain_file, domain_file_name, split_folder

_WORK_FOLDER = ".tokenizing"


class TokenWriter:
    """The token files of one run, resumed where there is a resume point.

    Args:
        output_dir: where the finished files go.
        settings: what decides the output beside the input.
        sources: the name of each source and what changes when its content does, in reading order.

    Raises:
        FileExistsError: if the folder holds the data of a run with other settings, of another input, or of an input
            that has changed where it was read already, or token files that no run of the tokenizer script left.
    """

    def __init__(self, output_dir: Path, settings: dict[str, Any], sources: list[list]) -> None:
        self.output_dir = output_dir
        self.folder = output_dir / _WORK_FOLDER
        self.settings = settings
        self.sources = sources
        self.sources_done = 0
        self.position: Any = None  # within the first source that is not done
        self.lengths: dict[str, int] = {}  # bytes of each file, by its final path within output_dir
        self.names: dict[str, str] = {}  # the domain that each file name stands for
        self._complete = False
        self._unwritten: dict[str, list[bytes]] = {}
        self._read_resume_point()
        self._tokens = {split: sum(self.count(split, name) for name in self.names) for split in SPLITS}

    @property
    def resumed(self) -> bool:
        """Whether an interrupted run left something to go on from."""
        return self.sources_done > 0 or self.position is not None

    def tokens(self, split: str | None = None) -> int:
        """The number of tokens of a split, or of all."""
        return sum(self._tokens.values()) if split is None else self._tokens[split]

    def count(self, split: str, name: str) -> int:
        """The number of tokens in the file of a domain, given by its name in file names."""
        return self.lengths.get(_path(split, name), 0) // TOKEN.itemsize

    def add(self, split: str, domain: str, ids: bytes) -> None:
        """Append a document to its domain's file.

        Args:
            split: its split.
            domain: its domain as the data set gives it.
            ids: its token ids as little-endian uint16.

        Raises:
            ValueError: if no file can bear the domain's name, or if another domain's file has it.
        """
        name = domain_file_name(domain)
        if self.names.setdefault(name, domain) != domain:
            raise ValueError(f"the domains {self.names[name]!r} and {domain!r} would share the file name {name!r}")
        path = _path(split, name)
        self._unwritten.setdefault(path, []).append(ids)
        self.lengths[path] = self.lengths.get(path, 0) + len(ids)
        self._tokens[split] += len(ids) // TOKEN.itemsize

    def flush(self) -> None:
        """Hand what was added to the operating system."""
        for path, pieces in self._unwritten.items():
            with self._growing(path).open("ab") as file:
                file.writelines(pieces)
        self._unwritten.clear()

    def save_resume_point(self) -> None:
        """Make everything up to `position` survive a crash: the tokens first, then the record of how many there are."""
        self.flush()
        for path in self.lengths:
            if self._growing(path).exists():  # else published before an interruption
                with self._growing(path).open("rb+") as file:
                    os.fsync(file.fileno())
        progress = {
            "settings": self.settings,
            "sources": self.sources,
            "sources_done": self.sources_done,
            "position": self.position,
            "lengths": self.lengths,
            "names": self.names,
            "complete": self._complete,
        }
        _write_json(self.folder / "progress.json", progress)

    def publish(self, tokenizer_folder: Path, meta: dict[str, Any]) -> dict[str, Any]:
        """Move the finished files to their names; `meta.json`, written last, says that all are there.

        Args:
            tokenizer_folder: what becomes `<output_dir>/tokenizer`.
            meta: what `meta.json` holds beside the settings and the sources.

        Returns:
            All that `meta.json` holds.
        """
        self._complete = True
        self.save_resume_point()
        for path in self.lengths:
            final = self.output_dir / path
            final.parent.mkdir(exist_ok=True)
            if self._growing(path).exists():
                os.replace(self._growing(path), final)
        final_tokenizer = self.output_dir / "tokenizer"
        shutil.rmtree(final_tokenizer, ignore_errors=True)
        os.replace(tokenizer_folder, final_tokenizer)
        meta = meta | {"settings": self.settings, "sources": self.sources}
        _write_json(self.output_dir / "meta.json", meta)
        return meta

    def _read_resume_point(self) -> None:
        progress_file = self.folder / "progress.json"
        if progress_file.exists():
            progress = json.loads(progress_file.read_text())
            _refuse_other_data(self.output_dir, progress, self.settings, self.sources, progress["sources_done"])
            self.sources_done = progress["sources_done"]
            self.position = progress["position"]
            self.lengths = progress["lengths"]
            self.names = progress["names"]
            self._complete = progress["complete"]
        if not self._complete:
            self._refuse_files_of_others()
            self._cut_to_resume_point()

    def _refuse_files_of_others(self) -> None:
        for split in SPLITS:
            for file in split_folder(self.output_dir, split).glob("*.bin"):
                raise FileExistsError(
                    f"{file} is there already, and no run of the tokenizer script is recorded in {self.output_dir}: "
                    "name another output folder, or move that data away"
                )

    def _cut_to_resume_point(self) -> None:
        recorded = {self._growing(path): length for path, length in self.lengths.items()}
        for file in self.folder.glob("*.bin"):
            if file not in recorded:
                file.unlink()
        for file, length in recorded.items():
            os.truncate(file, length)

    def _growing(self, path: str) -> Path:
        return self.folder / Path(path).name  # the split's prefix keeps the names apart


def finished_run(output_dir: Path, settings: dict[str, Any], sources: list[list]) -> dict[str, Any] | None:
    """The record of a run that has finished already.

    Args:
        output_dir: where its files are.
        settings: as for `TokenWriter`.
        sources: as for `TokenWriter`.

    Returns:
        What its `meta.json` holds; None where there is none.

    Raises:
        FileExistsError: if the folder holds data of other settings or another input.
    """
    meta_file = output_dir / "meta.json"
    if not meta_file.exists():
        return None
    meta = json.loads(meta_file.read_text())
    _refuse_other_data(output_dir, meta, settings, sources, len(sources))
    return meta


@contextmanager
def only_writer(output_dir: Path) -> Iterator[None]:
    """Keep other processes from writing to a folder, and remove the work folder when everything is published.

    Args:
        output_dir: the folder.

    Yields:
        Nothing.

    Raises:
        FileExistsError: if another process is writing there.
    """
    import fcntl  # here, because not every system has it, and reading token files does not need it

    folder = output_dir / _WORK_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(f"another process is writing to {output_dir}: let it end first") from error
        yield
        shutil.rmtree(folder)


def _refuse_other_data(
    output_dir: Path, record: dict[str, Any], settings: dict[str, Any], sources: list[list], sources_done: int
) -> None:
    remedy = f"name another output folder, or delete {output_dir} to begin anew"
    for name, value in settings.items():
        if (recorded := record.get("settings", {}).get(name)) != value:
            raise FileExistsError(
                f"{output_dir} holds tokens of a run with {name}={recorded!r}, not {value!r}: {remedy}"
            )
    recorded = record.get("sources", [])
    if [name for name, *_ in recorded] != [name for name, *_ in sources]:
        raise FileExistsError(f"{output_dir} holds tokens of another input: {remedy}")
    for then, now in zip(recorded[:sources_done], sources, strict=False):
        if then != now:
            raise FileExistsError(f"{output_dir} holds tokens of {now[0]}, which has changed since: {remedy}")


def _path(split: str, name: str) -> str:
    return domain_file(Path(), split, name).as_posix()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
