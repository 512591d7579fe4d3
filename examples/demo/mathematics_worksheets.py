"""Worksheets of school mathematics from the generator behind DeepMind's Mathematics Dataset, as JSON lines.

Run by `build_corpus.py` in processes of their own: `python mathematics_worksheets.py PACKAGES FIRST STEP` prints the
worksheets FIRST, FIRST + STEP, ... The generator dates from 2019. In a copy of it, a few spellings are replaced that
later numpy and sympy do not know, or that make two runs differ.
"""

import json
import random
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import sympy.core.random

_SHEETS_PER_TOPIC = 2
_QUESTIONS_PER_SHEET = 50
_SLOW_TOPICS = ("probability", "polynomial roots", "simplify surd")  # most of the time for a few of the questions
_SPELLINGS = {
    "sample/polynomials.py": {
        "np.object": "object",
        "from sympy.solvers.diophantine import": "from sympy.solvers.diophantine.diophantine import",
        "expanded_coefficients.itemset(power, coeffs)": "expanded_coefficients[power] = coeffs",
        "coeffs.itemset(index, value)": "coeffs[index] = value",
    },
    "util/composition.py": {  # a set of objects has another order in every process
        "entities = set(context.child_entities)": "entities = dict.fromkeys(context.child_entities)",
        "entities.add(maybe_entity)": "entities[maybe_entity] = None",
    },
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
    for name, spellings in _SPELLINGS.items():
        module = folder / "mathematics_dataset" / name
        code = module.read_text()
        for old, new in spellings.items():
            if old not in code:
                raise ValueError(f"mathematics-dataset is another version than expected: no {old!r} in {name}")
            code = code.replace(old, new)
        module.write_text(code)
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
    sympy.core.random.seed(seed)
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
