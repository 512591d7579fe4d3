"""Worksheets of school mathematics from the generator behind DeepMind's Mathematics Dataset, as JSON lines.

Run by `build_corpus.py` in processes of their own: `python mathematics_worksheets.py PACKAGES FIRST STEP` prints the
worksheets FIRST, FIRST + STEP, ... The generator dates from 2019; where it meets later numpy and sympy, four spellings
are replaced in a copy of it.
"""

import json
import random
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

_SHEETS_PER_TOPIC = 2
_QUESTIONS_PER_SHEET = 50
_SLOW_TOPICS = ("probability", "polynomial roots", "simplify surd")  # most of the time for a few of the questions
_SPELLINGS = {  # in sample/polynomials.py
    "np.object": "object",
    "from sympy.solvers.diophantine import": "from sympy.solvers.diophantine.diophantine import",
    "expanded_coefficients.itemset(power, coeffs)": "expanded_coefficients[power] = coeffs",
    "coeffs.itemset(index, value)": "coeffs[index] = value",
}


def unpack_generator(packages: Path, folder: Path) -> None:
    """Make the generator importable.

    Args:
        packages: the folder with the wheels of mathematics-dataset, six and absl-py.
        folder: where a copy of the generator goes.

    Raises:
        ValueError: if the generator's code is not the one that the replacements are for.
    """
    with zipfile.ZipFile(next(packages.glob("mathematics_dataset-*.whl"))) as wheel:
        wheel.extractall(folder)
    polynomials = folder / "mathematics_dataset" / "sample" / "polynomials.py"
    code = polynomials.read_text()
    for old, new in _SPELLINGS.items():
        if old not in code:
            raise ValueError(f"mathematics-dataset is another version than expected: no {old!r} in {polynomials.name}")
        code = code.replace(old, new)
    polynomials.write_text(code)
    sys.path[:0] = [str(folder), *(str(next(packages.glob(f"{name}-*.whl"))) for name in ("six", "absl_py"))]


def topics() -> dict[str, Callable]:
    """The generator's problem makers by name, at all difficulties, the slowest left out."""
    from mathematics_dataset.modules import modules  # pyright: ignore[reportMissingImports]

    def flatten(tree: dict, prefix: str) -> Iterator[tuple[str, Callable]]:
        for name, branch in tree.items():
            if isinstance(branch, dict):
                yield from flatten(branch, f"{prefix}{name}: ")
            else:
                yield (prefix + name).replace("_", " "), branch

    all_topics = sorted(flatten(modules.train(lambda entropy_range: entropy_range), ""))
    return {name: topic for name, topic in all_topics if not any(slow in name for slow in _SLOW_TOPICS)}


def worksheet(title: str, make_problem: Callable, seed: int) -> str:
    """A title, then questions, each with its answer on the next line; a function of the seed."""
    random.seed(seed)
    np.random.seed(seed)
    problems = (make_problem() for _ in range(_QUESTIONS_PER_SHEET))
    return "\n".join([title, "", *(f"{problem.question}\n{problem.answer}" for problem in problems)])


def main() -> None:
    """Print the worksheets that the command line asks for."""
    packages, first, step = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    with tempfile.TemporaryDirectory() as folder:
        unpack_generator(packages, Path(folder))
        sheets = [topic for topic in topics().items() for _ in range(_SHEETS_PER_TOPIC)]
        for number in range(first, len(sheets), step):
            print(json.dumps([number, worksheet(*sheets[number], seed=number)]), flush=True)


if __name__ == "__main__":
    main()
