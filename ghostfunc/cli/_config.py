"""Settings of a run: from a YAML file, from flags (which win), and saved beside the result so that it can be repeated.

Relative paths on the command line are meant from where the command runs, those in a file from the file's folder. What
is saved has absolute paths, but for `out`, which is "." there: a result that is moved is still where its settings say.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Set
from dataclasses import MISSING, asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_type_hints

import yaml

Config = TypeVar("Config", bound="RunConfig")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every run over a corpus takes; the names are those of the flags, with underscores.

    Attributes:
        data: the corpus, as `open_corpus` takes it.
        model: as `load_model` takes it.
        out: the folder of the result.
        tokenizer: as `load_tokenizer` takes it; None is the model's own.
        model_dtype: of the model's parameters.
        device: where the model runs; "auto" is a GPU where there is one.
        block_size: tokens of a sample at most.
        limit: samples at most; None is all.
        text_field: the field or column of the text.
        domain_field: that of the domain.
        token_budget: tokens of a batch at most, padding included.
        shard_rows: rows of a shard, which is what an interruption can lose.
    """

    data: str
    model: str
    out: str
    tokenizer: str | None = None
    model_dtype: str = "float32"
    device: str = "auto"
    block_size: int = 1024
    limit: int | None = None
    text_field: str = "text"
    domain_field: str | None = None
    token_budget: int = 2048
    shard_rows: int = 1024

    command: ClassVar[str]
    paths: ClassVar[frozenset[str]] = frozenset({"data", "out"})
    paths_or_names: ClassVar[frozenset[str]] = frozenset({"model", "tokenizer"})
    # What may be elsewhere now, as data and models are known by their fingerprints, or decides nothing but the memory.
    movable: ClassVar[frozenset[str]] = frozenset({"data", "model", "out", "tokenizer", "device", "token_budget"})

    @classmethod
    def of(cls: type[Config], flags: Mapping[str, Any], file: Path | None) -> Config:
        """Settings from a file and flags.

        Args:
            flags: by name, None where one is not given; what is no setting is passed over.
            file: YAML, a flat mapping.

        Returns:
            The settings.

        Raises:
            ValueError: if a key is unknown, a value has the wrong type, or one that has no default is missing.
        """
        settings = {} if file is None else cls._read(file)
        names = {field.name for field in fields(cls)}
        settings.update({name: value for name, value in flags.items() if name in names and value is not None})
        missing = [field.name for field in fields(cls) if field.default is MISSING and field.name not in settings]
        if missing:
            raise ValueError(f"missing: {', '.join(map(as_flag, missing))}, here or in the file of --config")
        return cls(**settings)

    @classmethod
    def _read(cls, file: Path) -> dict[str, Any]:
        settings = read_yaml(file)
        hints = get_type_hints(cls)
        known = [field.name for field in fields(cls)]
        for key, value in settings.items():
            if key not in known:
                nearest = get_close_matches(str(key), known, n=1)
                meant = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"
                raise ValueError(f"{file}: unknown setting {key}: {meant}")
            if type(value) not in (get_args(hints[key]) or (hints[key],)):
                raise ValueError(f"{file}: {key} is {value!r}, expected {_called(hints[key])}")
        for key in (cls.paths | cls.paths_or_names) & settings.keys():
            there = file.parent / str(settings[key])
            if settings[key] is not None and (key in cls.paths or there.exists()):
                settings[key] = os.path.normpath(there)
        return settings

    def as_yaml(self) -> str:
        """The settings as the text of a file that is to lie in `out`."""
        settings = asdict(self)
        for key in self.paths | self.paths_or_names:
            if settings[key] is not None and (key in self.paths or Path(settings[key]).exists()):
                settings[key] = os.path.abspath(settings[key])
        return yaml.safe_dump({**settings, "out": "."}, sort_keys=False, allow_unicode=True)

    def difference(self, other: RunConfig, free: Set[str] = frozenset()) -> tuple[str, Any, Any] | None:
        """The first setting `(name, ours, theirs)` that differs, but for what may have moved and those in `free`."""
        for field in fields(self):
            ours, theirs = getattr(self, field.name), getattr(other, field.name)
            if field.name not in self.movable | free and ours != theirs:
                return field.name, ours, theirs
        return None


@dataclass(frozen=True, kw_only=True)
class IndexConfig(RunConfig):
    """What `ghostfunc index` takes beside.

    Attributes:
        layers: patterns of the layers that are projected.
        rank: numbers that a parameter's gradient becomes.
        min_rank: smallest rank of a side.
        kind: of the projection's matrices.
        seed: of the projection's matrices.
        include: kinds of parameters beside the linear maps, between commas.
        dtype: of the rows on disk.
        append: whether the data is added to an index of other data.
    """

    layers: str = ""
    rank: int = 256
    min_rank: int = 8
    kind: str = "gaussian"
    seed: int = 0
    include: str = ""
    dtype: str = "float32"
    append: bool = False

    command = "index"


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(RunConfig):
    """What `ghostfunc score` takes beside.

    Attributes:
        file: the queries, as `open_corpus` takes them.
        layers: patterns of the layers whose gradients count.
    """

    file: str
    layers: str = ""

    command = "score"
    paths = RunConfig.paths | {"file"}
    movable = RunConfig.movable | {"file"}


def read_yaml(file: Path) -> dict[Any, Any]:
    """A YAML file that holds a mapping.

    Raises:
        ValueError: if it is no YAML, or another thing than a mapping.
        OSError: if it cannot be read.
    """
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds no settings: expected lines such as `rank: 256`")
    return settings


def as_flag(name: str) -> str:
    """A setting as it is written on the command line.

    Example:
        >>> as_flag("block_size"), as_flag("data")
        ('--block-size', 'DATA')
    """
    return "DATA" if name == "data" else "--" + name.replace("_", "-")


def _called(hint: Any) -> str:
    names = {str: "text", int: "a whole number", bool: "true or false", type(None): "null"}
    return " or ".join(names[kind] for kind in get_args(hint) or (hint,))
