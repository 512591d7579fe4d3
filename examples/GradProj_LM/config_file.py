"""Where this example reads its data and writes its results: where GradDotProd_LM does, unless the constants are edited.

A flag (`--data_dir`, `--output_dir`) goes before an environment variable (`PILE_DATA_DIR`, `RESULTS_DIR`), and that
before the constant.
"""

import os
from pathlib import Path

from GradDotProd_LM import config_file as of_training

RESULTS_DIR = of_training.RESULTS_DIR
PILE_DATA_DIR = of_training.PILE_DATA_DIR


def output_dir(flag: str | os.PathLike[str] | None, run_name: str) -> Path:
    """The folder of a run.

    Args:
        flag: the value of `--output_dir`, the folder itself; None where it was not given.
        run_name: the folder's name in `RESULTS_DIR` otherwise.
    """
    if flag:
        return Path(flag).expanduser().resolve()
    return of_training.results_dir(os.environ.get("RESULTS_DIR") or RESULTS_DIR) / run_name


def data_dir(flag: str | os.PathLike[str] | None = None) -> Path:
    """The folder of tokenized domains, which the tokenizer script fills and the loaders read.

    Args:
        flag: the value of `--data_dir`, None where it was not given.
    """
    return of_training.data_dir(flag or os.environ.get("PILE_DATA_DIR") or PILE_DATA_DIR)
