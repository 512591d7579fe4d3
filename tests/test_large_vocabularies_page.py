"""docs/large_vocabularies.md: its code runs, and its figures are those of the results."""

import re
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "large_vocabularies.md").read_text(encoding="utf-8")


def test_the_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    shapes = []
    for block in blocks:
        exec(block, names)
        shapes.append(names["dots"].shape)
    assert shapes == [torch.Size([8])] * 2


def test_the_figures_are_the_results(monkeypatch):
    """No number on the page was typed: without results there is none."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "chunked_loss", raising=False)
    import chunked_loss  # pyright: ignore[reportMissingImports]

    if chunked_loss.RESULTS.exists():
        assert chunked_loss.page(PAGE) == PAGE
    else:
        assert "--page -->\n<!-- end of figures -->" in PAGE
