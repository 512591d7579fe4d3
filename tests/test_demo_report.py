"""The demo's report: its numbers against plain numpy, and a page that hostile text leaves whole."""

import re
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest

from demo import report

HOSTILE = "<script>alert('x')</script> & \"quotes\" \x1b[31mred"
DOMAINS = ("code", "scripture", "prose")


@pytest.fixture(scope="module")
def log() -> pa.Table:
    """Sixty steps of six samples, in two micro-steps; the learning rate warms up and ids repeat."""
    rng = np.random.default_rng(0)
    steps, samples = 60, 6
    rows = steps * samples
    shift = np.array([3.0, 0.5, -1.0])
    of_domain = rng.integers(0, 3, rows)
    return pa.table(
        {
            "iteration": np.repeat(np.arange(steps), samples),
            "micro_step": np.tile(np.repeat(np.arange(2, dtype=np.int32), 3), steps),
            "sample_id": rng.integers(0, 50, rows) * 128,
            "domain": [DOMAINS[d] for d in of_domain],
            "loss": rng.uniform(2, 10, rows).astype(np.float32),
            "learning_rate": np.repeat(np.linspace(1e-4, 1e-3, steps), samples),
            "dot": shift[of_domain] + rng.normal(size=rows),
        }
    )


def rows_of(log: pa.Table) -> list[dict]:
    return log.to_pylist()


def page(log: pa.Table, **changes) -> str:
    passage = report.Passage(report.sample_values(log)[0], HOSTILE)
    given = {
        "domains": report.domain_values(log),
        "val_domain": "code",
        "helpful": [passage],
        "harmful": [passage],
        "figure": report.draw_values(log, "code"),
        "facts": {"steps": 60},
        "cost": ["One step took 1.2 times a plain step."],
        "command": "./train.sh --train_set <folder>",
    }
    return report.render_html(**given | changes)


class Tags(HTMLParser):
    """Collects a page's start tags and its text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_a_value_is_the_learning_rate_over_the_samples_of_the_whole_step_times_the_dot(log):
    expected = [row["learning_rate"] / 6 * row["dot"] for row in rows_of(log)]
    np.testing.assert_allclose(report.values_of(log), expected, rtol=1e-12)


def test_the_samples_of_an_uneven_step_are_counted(log):
    short = log.slice(0, 6 + 2)  # a whole step and two samples of the next
    expected = [row["learning_rate"] / n * row["dot"] for row, n in zip(rows_of(short), [6] * 6 + [2] * 2, strict=True)]
    np.testing.assert_allclose(report.values_of(short), expected, rtol=1e-12)


def test_domain_table_equals_numpy(log):
    rows = report.domain_values(log)
    assert [row.total for row in rows] == sorted((row.total for row in rows), reverse=True)
    assert {row.domain for row in rows} == set(DOMAINS)
    for row in rows:
        own = np.array([r["learning_rate"] / 6 * r["dot"] for r in rows_of(log) if r["domain"] == row.domain])
        assert row.samples == len(own)
        np.testing.assert_allclose(row.total, own.sum(), rtol=1e-12)
        np.testing.assert_allclose(row.mean, own.mean(), rtol=1e-12)
        np.testing.assert_allclose(row.standard_error, np.sqrt(own.var(ddof=1) / len(own)), rtol=1e-12)
        np.testing.assert_allclose(row.quartiles, np.quantile(own, [0.25, 0.5, 0.75]), rtol=1e-12)
        assert row.harmful == np.count_nonzero(own < 0) / len(own)


def test_a_domain_with_one_sample_has_no_standard_error(log):
    (row,) = report.domain_values(log.slice(0, 1))
    assert row.samples == 1 and np.isnan(row.standard_error)


def test_sample_values_sum_repetitions_and_keep_domains_apart(log):
    expected: dict[tuple, list[float]] = {}
    for row in rows_of(log):
        expected.setdefault((row["domain"], row["sample_id"]), []).append(row["learning_rate"] / 6 * row["dot"])
    samples = report.sample_values(log)
    assert len(samples) == len(expected) < len(log)  # ids repeat, within and across domains
    for sample in samples:
        values = expected[sample.domain, sample.sample_id]
        assert sample.seen == len(values)
        np.testing.assert_allclose(sample.value, sum(values), rtol=1e-9)
    assert [s.value for s in samples] == sorted((s.value for s in samples), reverse=True)


def test_page_escapes_what_comes_from_data(log):
    source = page(log, val_domain="<b>code</b>", facts={"<i>": "<u>"}, cost=["<em>"])
    parsed = Tags(source)
    assert not {"script", "b", "i", "u", "em", "folder"} & {tag for tag, _ in parsed.tags}
    assert "&lt;script&gt;" in source
    assert "<script>alert('x')</script>" in parsed.text  # shown as it is


def test_page_needs_nothing_beside_itself(log):
    source = page(log)
    assert "http" not in source and "url(" not in source and "@import" not in source
    tags = Tags(source).tags
    assert not {"script", "link", "iframe"} & {tag for tag, _ in tags}
    sources = [attrs["src"] for _, attrs in tags if "src" in attrs]
    assert len(sources) == 1 and sources[0].startswith("data:image/png;base64,iVBOR")


def test_page_shows_each_number_of_the_table_and_marks_the_validation_domain(log):
    source = page(log)
    for row in report.domain_values(log):
        assert f"{row.total:.4f}" in source and f"{row.mean * 1e6:.1f} ± {row.standard_error * 1e6:.1f}" in source
    assert len(re.findall(r'<tr class="validation">\s*<td>code \(validation\)</td>', source)) == 1


def test_figure_is_a_png_that_changes_with_the_values(log):
    figure = report.draw_values(log, "code")
    assert figure.startswith(b"\x89PNG\r\n\x1a\n")
    negated = log.set_column(log.schema.get_field_index("dot"), "dot", pa.array(-log["dot"].to_numpy()))
    assert report.draw_values(negated, "code") != figure
    assert report.draw_values(log, "prose") != figure


def test_figure_of_a_single_step(log):
    assert report.draw_values(log.slice(0, 6), "code").startswith(b"\x89PNG")


def test_terminal_table_and_passages(log):
    rows = report.domain_values(log)
    lines = report.format_table(rows, "code").splitlines()
    assert [line.split()[0] for line in lines[2:]] == [row.domain for row in rows]
    assert [line.split()[0] for line in lines if " * " in line] == ["code"]
    assert len({len(line) for line in lines[2:]}) == 1

    text = report.format_passages([report.Passage(report.sample_values(log)[0], HOSTILE + "\n" + "x" * 500)], width=80)
    assert "\x1b" not in text and "\n" not in text and text.endswith("…")
