"""Where the examples read their data and write their results.

Edit the two constants, or leave them and override them for one run. A flag (`--data_dir`, `--results_dir`) goes before
an environment variable (`PILE_DATA_DIR`, `RESULTS_DIR`), and that before the constant.
"""

import os
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]

RESULTS_DIR = CHECKOUT / "results"
PILE_DATA_DIR = CHECKOUT / "data" / "pile"


def results_dir(flag: str | os.PathLike[str] | None = None) -> Path:
    """The folder that holds the run folders.

    Args:
        flag: the value of `--results_dir`, None where it was not given.
    """
    return Path(flag or os.environ.get("RESULTS_DIR") or RESULTS_DIR).expanduser().resolve()


def data_dir(flag: str | os.PathLike[str] | None = None) -> Path:
    """The folder of tokenized domains, which the tokenizer script fills and the loaders read.

    Args:
        flag: the value of `--data_dir` (`--output_dir` of the tokenizer script), None where it was not given.
    """
    return Path(flag or os.environ.get("PILE_DATA_DIR") or PILE_DATA_DIR).expanduser().resolve()
