"""docs/report.md runs as it stands, and says what is so."""

import re
from pathlib import Path

import pytest

from ghostfunc.report import _survey, _text
from ghostfunc.report._write import write_report

PAGE = Path(__file__).parents[1] / "docs" / "report.md"
PYTHON = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> dict:
    names: dict = {}
    source = PAGE.read_text(encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("guide"))
        for block in PYTHON.finditer(source):
            line = source[: block.start(1)].count("\n")
            exec(compile("\n" * line + block[1], str(PAGE), "exec"), names)
        names["html"] = names["page"].read_text(encoding="utf-8")
    return names


def test_blocks_run_and_write_the_page(session):
    assert session["found"].tokens.shape == (2, max(session["corpus"].lengths[:2]))
    assert "The rest is silence." in re.sub(r"<[^>]*>", "", session["html"])
    assert "untrained" in session["html"]


def test_limits_are_those_of_the_code():
    text = PAGE.read_text(encoding="utf-8")
    assert f"Of more than {_survey.EXAMINED_ROWS:,} rows" in text
    assert f"more than {_text.MAX_CHARACTERS:,}\ncharacters" in text


def test_options_are_those_of_the_function():
    rows = re.findall(r"^\| (`.*?) \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)", row)]
    assert named and set(named) <= set(write_report.__annotations__)
    assert (PAGE.parent / "report.png").read_bytes().startswith(b"\x89PNG")
