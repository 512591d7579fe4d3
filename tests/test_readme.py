"""The README's Python runs as it stands, block after block in one session, and its links lead to files."""

import re
from pathlib import Path

import pytest
import torch

import ghostfunc as gf

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    assert len(BLOCKS) >= 2
    session: dict = {}
    for number, block in enumerate(BLOCKS, 1):
        exec(compile(block, f"README.md, block {number}", "exec"), session)
    assert session["result"].dots.shape == (8,)


def test_the_table_of_public_names_is_complete_and_true():
    section = README.partition("## Public names")[2].partition("\n## ")[0]
    first_cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = {name for cell in first_cells for name in re.findall(r"`(\w+)", cell)}
    assert named == {name for name in gf.__all__ if name not in RESULT_TYPES}


RESULT_TYPES = {  # what a function in the table returns, or hands to one of the user's
    "ValueAndGradDot", "EngineOutput", "Outer", "Gather", "Dense", "ClippedGrad", "Quantities", "Tile", "InRunValues",
    "TracIn", "KroneckerProjection", "FisherPreconditioner", "BoundedDots", "ValGradient", "MeanGradient",
    "GatheredSamples", "StepPlan",
}  # fmt: skip


@pytest.mark.parametrize("page", ["README.md", "examples/README.md"])
def test_links_lead_to_files(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("https://")]
    assert links
    for link in links:
        assert (ROOT / page).parent.joinpath(link).is_file(), link


def test_make_targets_that_the_readme_names_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"^make ([\w-]+)", README, flags=re.MULTILINE))
    assert named and named <= targets
