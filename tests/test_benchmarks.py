"""benchmarks/run.py: what it makes of measurements, a run in miniature, and the pages against the committed results."""

import json
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
figures, page, parts, readme, run, tables, workloads = map(
    import_module, ("figures", "page", "parts", "readme_table", "run", "tables", "workloads")
)
SMALL = parts.GPT2_SMALL
ENVIRONMENT = {
    "torch": "9", "transformers": "9", "python": "9", "cpu": "a CPU", "cores": 2, "threads": 2,
    "load_average_before": 0.1, "commit": "abc",
}  # fmt: skip


def measured(kind: str, part: str, case: Any, methods: dict[str, Any], results: dict | None = None) -> dict:
    """Results with one case more."""
    row = {"environment": ENVIRONMENT, "rounds": 3, "measured": asdict(case), "methods": methods}
    results = results or {}
    results.setdefault(kind, {}).setdefault(part, {})[case.name] = row
    return results


def seconds(**taken: list[float]) -> dict[str, Any]:
    return {method: {"seconds": values} for method, values in taken.items()}


def the_claim(part: str, case: Any, of: str = "times", above: str = "dots") -> Any:
    (claim,) = (c for c in parts.claims() if (c.part, c.case, c.of) == (part, case, of) and above in c.above)
    return claim


# --- claims -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slowest", "verdict"), [(1.04, "yes"), (1.06, "**no**")])
def test_a_claim_holds_by_its_median_of_ratios_of_the_same_round(slowest, verdict):
    """The plain step takes 1, 2 and 4 seconds: the median of ratios is not the ratio of medians."""
    results = measured("times", "claims-dots", SMALL, seconds(both=[1, 2, 4], dots=[1.01, 2 * slowest, 4 * slowest]))
    found = tables.outcome(the_claim("claims-dots", SMALL), results)
    assert found.spread.median == pytest.approx(slowest)
    assert found.spread.low == pytest.approx((1.01 + slowest) / 2)
    assert found.spread.rounds == 3
    assert found.verdict == verdict


def test_eight_micro_batches():
    taken = seconds(plain=[10, 10], val=[2, 2], along=[10.5, 11])
    results = measured("times", "claims-quantities", SMALL, taken)
    found = tables.outcome(the_claim("claims-quantities", SMALL, above="along"), results)
    assert found.spread.median == pytest.approx((86 + 90) / 2 / 82)
    assert found.verdict == "**no**"


def test_memory_and_flops():
    peaks = {"both": {"peak_bytes": 100}, "dots": {"peak_bytes": 110}}
    results = measured("peaks", "claims-dots", SMALL, peaks)
    measured("counts", "claims-dots", SMALL, {"both": {"flops": 1000}, "dots": {"flops": 1004}}, results)
    of_peaks = tables.outcome(the_claim("claims-dots", SMALL, "peaks"), results)
    assert (of_peaks.spread.median, of_peaks.flops, of_peaks.verdict) == (pytest.approx(1.1), None, "yes")
    of_times = tables.outcome(the_claim("claims-dots", SMALL), results)
    assert (of_times.spread, of_times.flops, of_times.verdict) == (None, pytest.approx(1.004), "not measured")


def test_what_failed_and_what_was_measured_on_something_else_are_no_measurements():
    rows = seconds(both=[1, 1]) | {"dots": {"raised": "RuntimeError: broken"}}
    claim = the_claim("claims-dots", SMALL)
    assert tables.outcome(claim, measured("times", "claims-dots", SMALL, rows)).verdict == "RuntimeError: broken"
    results = measured("times", "claims-dots", SMALL, seconds(both=[1, 1], dots=[1, 1]))
    results["times"]["claims-dots"][SMALL.name]["measured"] = asdict(SMALL.tiny())
    assert tables.outcome(claim, results).verdict == "not measured"


def test_every_claim_is_about_something_that_its_part_measures():
    for claim in parts.claims():
        methods = dict(parts.PARTS[claim.part].cases)[claim.case]
        assert {*claim.above, *claim.below} <= {*methods}, claim
    names = [case.name for part in parts.PARTS.values() for case in {case for case, _ in part.cases}]
    assert len(names) == sum(len(part.cases) for part in parts.PARTS.values())


@pytest.mark.parametrize(
    ("vmap", "ours", "held"),
    [
        ({"raised": "RuntimeError: can't allocate memory"}, {"peak_bytes": 2**20}, "yes"),
        ({"raised": "RuntimeError: something else"}, {"peak_bytes": 2**20}, "**no**"),
        ({"peak_bytes": 2**20}, {"peak_bytes": 2**20}, "**no**"),
        ({"raised": "can't allocate memory"}, {"raised": "can't allocate memory"}, "**no**"),
    ],
)
def test_vmap_has_to_run_out_of_the_memory_in_which_ghostfunc_runs(vmap, ours, held):
    line = tables.limit_line({"case": "c", "allowed_bytes": 2**21, "methods": {"dots": ours, "vmap": vmap}})
    assert line[-1] == held


def test_beside_others():
    case = parts.MLP
    results = measured("times", "compare", case, seconds(plain=[1, 1], dots=[2, 2], vmap=[4, 8], direct=[1, 1]))
    peaks = {name: {"peak_bytes": size} for name, size in {"dots": 10, "vmap": 5, "direct": 40, "opacus": 1}.items()}
    measured("peaks", "compare", case, peaks | {"backpack": {"raised": "TypeError: no"}}, results)
    measured("counts", "compare", case, {"opacus": {"flops": 1, "error": 0.3}}, results)
    lines = [line for line in tables.against_others(results).splitlines() if case.architecture in line]
    cells = {line.split(" | ")[2]: line.strip("| ").split(" | ")[3:] for line in lines}
    assert cells["vmap"] == ["0.375 (0.312 to 0.438)", "2.00", "yes", "**no**"]
    assert cells["a loop over samples"] == ["2.000 (2.000 to 2.000)", "0.25", "**no**", "yes"]
    assert cells["Opacus"][0].startswith("other numbers: error 3e-01")
    assert cells["BackPACK"][0].startswith("cannot: TypeError: no")


# --- a run ------------------------------------------------------------------------------------------------------------


class Recorded:
    """Stands for the processes: writes down who was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def ask(self, method: str, **message: Any) -> dict[str, Any]:
        self.asked.append(method)
        return {"seconds": 0.5} if method != "c" or len(self.asked) < 4 else {"raised": "ended"}


def test_methods_take_turns_and_the_order_rotates():
    workers = Recorded()
    taken = run.times(
        {"a": {"seconds": 1}, "b": {"seconds": 1}, "c": {"seconds": 1}, "d": {"raised": "no"}}, 2, workers
    )
    assert "".join(workers.asked) == "abcbca"
    assert taken == {**seconds(a=[0.5, 0.5], b=[0.5, 0.5]), "c": {"raised": "ended"}, "d": {"raised": "no"}}


def test_results_are_kept_beside_new_ones(tmp_path):
    path = tmp_path / "results.json"
    run.store(path, ("times", "part", "first"), 1)
    run.store(path, ("times", "part", "second"), 2)
    run.store(path, ("times", "part", "first"), 3)
    assert tables.load(path) == {"times": {"part": {"first": 3, "second": 2}}}
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_in_miniature(tmp_path, monkeypatch):
    """Real processes: every kind of result, exact dots, and a peer that is not here."""
    path = tmp_path / "bench.json"
    monkeypatch.setattr(run, "PARTS", {"compare": parts.Part(2, ((parts.MLP, ("plain", "dots", "direct", "dattri")),))})
    run.main(["--tiny", "--threads", "1", "--only", "compare", "--results", str(path)])
    kinds = [tables.load(path)[kind]["compare"][parts.MLP.name] for kind in tables.KINDS]
    peaks, counts, times = (kind["methods"] for kind in kinds)
    assert kinds[0]["measured"] == asdict(parts.MLP.tiny())
    for method in ("plain", "dots", "direct"):
        assert peaks[method]["held_bytes"] > 0 and counts[method]["flops"] > 0
        assert len(times[method]["seconds"]) == 2
    for method in ("dots", "direct"):
        assert counts[method]["error"] < 1e-6
    for rows in (peaks, counts, times):
        assert rows["dattri"] == {"raised": "not asked for: it needs --peers-venv"}


def test_a_step_has_no_more_memory_than_it_is_given(tmp_path):
    workers = run.Workers(1, None, tmp_path)
    try:
        message = {"do": "prepare", "case": asdict(parts.MLP)}
        assert "alloc" in workers.ask("plain", **message, bytes=2**20)["raised"]
        assert workers.ask("plain", **message, bytes=2**30)["peak_bytes"] > 2**20
        with pytest.raises(RuntimeError, match="stopped after 0 seconds"):
            workers._running["plain"].ask({"do": "times", "calls": 10**6}, limit=0.1)
    finally:
        workers._running.clear()


def test_tiny_results_do_not_go_to_the_committed_file(capsys):
    with pytest.raises(SystemExit):
        run.main(["--tiny", "--results", str(run.RESULTS)])
    assert "give another --results" in capsys.readouterr().err


# --- pages ------------------------------------------------------------------------------------------------------------


def test_the_block_of_the_readme_is_what_stands_between_the_marks():
    results = measured("times", "claims-dots", SMALL, seconds(both=[1, 1], dots=[1.25, 1.25]))
    text = readme.with_block(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n", results)
    assert text == f"before\n{readme.BEGIN}\n{readme.block(results)}\n{readme.END}\nafter\n"
    assert "1.250 (1.250 to 1.250) | 2 |  | **no** |" in text
    with pytest.raises(ValueError, match="expected a line <!-- bench -->"):
        readme.with_block("no marks", results)


def test_figures_show_what_was_measured(tmp_path):
    cases = [case for case, _ in parts.PARTS["sweep-batch"].cases if case.model == "mlp"]
    results: dict[str, Any] = {"planner": {"lengths": [1, 4], "widths": [32], "plans": {"a": [["Gram", "new order"]]}}}
    for case in cases:
        measured("times", "sweep-batch", case, seconds(both=[1, 1], dots=[1 + case.n, 1 + case.n]), results)
        measured("peaks", "sweep-batch", case, {"dots": {"peak_bytes": case.n * 2**20}}, results)
    drawn = figures.drawn(results)
    (line, _) = drawn["bench_overhead.png"].axes[0].lines
    assert list(line.get_xdata()) == list(parts.POWERS) and list(line.get_ydata()) == [1 + n for n in parts.POWERS]
    (line,) = drawn["bench_memory.png"].axes[1].lines
    assert list(line.get_ydata()) == list(parts.POWERS)
    figures.save(drawn, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(drawn)
    assert len(drawn) == 3


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return json.loads(run.RESULTS.read_text(encoding="utf-8"))


def test_the_readme_shows_the_committed_results(results):
    text = readme.README.read_text(encoding="utf-8")
    assert readme.with_block(text, results) == text, "run python benchmarks/readme_table.py"


def test_the_page_shows_the_committed_results(results):
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.page(results, figures.drawn(results)) == text, "run python benchmarks/run.py --page"
    for name in figures.drawn(results):
        assert (page.PAGE.parent / name).is_file()
