"""The README's table of what was measured, from the results of `run.py`, between its marks.

python benchmarks/readme_table.py           # writes it
python benchmarks/readme_table.py --check   # says whether it is what the results give
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import measuring
from tables import caption, claims_table, load, of_models

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results" / "run.json"
BEGIN, END = "<!-- bench -->", "<!-- /bench -->"


def block(results: Any) -> str:
    """What stands between the marks: the claims about times of the tied model, and all methods on each model."""
    claims = claims_table(results, lambda claim: claim.of == "times" and claim.part != "claims-untied")
    models = of_models(results)
    heading = "Time over that of a plain step on the train batch, and memory of a step:"
    return "\n\n".join([claims, heading, models, caption(results)])


def with_block(text: str, results: Any) -> str:
    """The README with the block of these results.

    Raises:
        ValueError: if it lacks the marks.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md: expected a line {BEGIN} and, below it, a line {END}.")
    return f"{before}{begin}\n{block(results)}\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    old = README.read_text(encoding="utf-8")
    new = with_block(old, load(RESULTS))
    if arguments.check:
        sys.exit(None if new == old else "README.md: run python benchmarks/readme_table.py")
    measuring.write(README, new)


if __name__ == "__main__":
    main()
