"""Where the token file of a domain lies, and what a domain is called in file names."""

from pathlib import Path

import numpy as np

SPLITS = ("train", "validation", "test")
TOKEN = np.dtype("<u2")

_FILE_NAME_RULE = str.maketrans({"/": "-", " ": "_"} | dict.fromkeys("()[]{}"))
_LONGEST_NAME = 200  # bytes; file systems allow 255 with the prefix, the suffix and a temporary name's ending


def domain_file_name(domain: str) -> str:
    """The name that a domain has in file names: `/` as `-`, spaces as `_`, brackets dropped.

    Args:
        domain: a domain's name as the data set gives it.

    Returns:
        The name for files; a name that already follows the rule is returned as it is.

    Raises:
        ValueError: if nothing is left of the name, or if no file could bear it.

    Example:
        >>> domain_file_name("Gutenberg (PG-19)")
        'Gutenberg_PG-19'
    """
    name = domain.translate(_FILE_NAME_RULE)
    if not name.strip("_.-") or not name.isprintable() or len(name.encode("utf-8", "replace")) > _LONGEST_NAME:
        raise ValueError(f"the domain name {domain!r} cannot name a file (empty, unprintable or too long)")
    return name


def split_folder(data_dir: Path, split: str) -> Path:
    """The folder of a split's token files: `data_dir` itself for train, `val` and `test` inside it for the others."""
    return data_dir / {"train": "", "validation": "val", "test": "test"}[split]


def domain_file(data_dir: Path, split: str, domain: str) -> Path:
    """The token file of a domain.

    Args:
        data_dir: the folder that `tokenize` wrote.
        split: one of `SPLITS`.
        domain: the domain's name, in the data set's form or in that of `domain_file_name`.

    Returns:
        The file's path, whether it exists or not.

    Example:
        >>> domain_file(Path("data"), "validation", "Wikipedia (en)").as_posix()
        'data/val/validation-Wikipedia_en.bin'
    """
    return split_folder(data_dir, split) / f"{split}-{domain_file_name(domain)}.bin"
