"""Settings of the command: from files and flags, saved and read again; the progress that it shows."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from ghostfunc.cli import _progress
from ghostfunc.cli._app import app
from ghostfunc.cli._config import IndexConfig, RunConfig, ScoreConfig
from ghostfunc.cli._run_files import file_of, run_files, save
from ghostfunc.cli._share import Share


def config_of(folder: Path, **settings: object) -> IndexConfig:
    return IndexConfig.of({"data": "texts.jsonl", "model": "gpt2", "out": str(folder), **settings}, None)


def test_every_setting_is_a_flag_with_its_default_in_the_help() -> None:
    for kind in (IndexConfig, ScoreConfig):
        shown = " ".join(CliRunner().invoke(app, [kind.command, "--help"]).stdout.replace("│", " ").split())
        for field in fields(kind):
            assert field.name == "data" or f"--{field.name.replace('_', '-')}" in shown
            if isinstance(field.default, int) and not isinstance(field.default, bool) and field.name != "seed":
                assert f"default: {field.default}]" in shown


def test_settings_survive_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    config = config_of(Path("out"), rank=7, limit=3, domain_field="meta.kind", tokenizer="someone/hub", append=True)
    (tmp_path / "out").mkdir()
    save(config, Path("out/run.yaml"), 0)
    monkeypatch.chdir("/")
    absolute = replace(config, data=str(tmp_path / "texts.jsonl"), model=str(tmp_path / "gpt2"))
    assert IndexConfig.of({}, tmp_path / "out" / "run.yaml") == replace(absolute, out=str(tmp_path / "out"))

    (tmp_path / "out").rename(tmp_path / "moved")
    assert IndexConfig.of({}, tmp_path / "moved" / "run.yaml").out == str(tmp_path / "moved")
    assert IndexConfig.of({"rank": 9, "limit": None}, tmp_path / "moved" / "run.yaml").rank == 9, "flags win"


def test_a_saved_file_names_no_place_of_its_own(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save(config_of(tmp_path / name), tmp_path / name / "run.yaml", 0)
    assert (tmp_path / "a" / "run.yaml").read_bytes() == (tmp_path / "b" / "run.yaml").read_bytes()


def test_relative_paths_of_a_file_are_meant_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    file = tmp_path / "mine.yaml"
    file.write_text("data: texts\nmodel: models/tiny\nout: ../index\ntokenizer: gpt2\n", encoding="utf-8")
    config = IndexConfig.of({}, file)
    assert config.data == str(tmp_path / "texts") and config.model == str(tmp_path / "models" / "tiny")
    assert config.out == str(tmp_path.parent / "index") and config.tokenizer == "gpt2", "a name on the hub"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("rnak: 8", "unknown setting rnak: did you mean rank?"),
        ("block-size: 8", "did you mean block_size?"),
        ("zzz: 8", "known are data, model"),
        ("rank: many", "rank is 'many', expected a whole number"),
        ("rank: true", "rank is True, expected a whole number"),
        ("limit: '3'", "limit is '3', expected a whole number or null"),
        ("layers: [mlp, attn]", "expected text"),
        ("append: 1", "append is 1, expected true or false"),
        ("- rank", "holds no settings"),
        ("rank: [", "is no YAML"),
        ("", "holds no settings"),
        ("!!python/object/apply:os.getcwd []", "is no YAML"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        IndexConfig.of({"data": "d", "model": "m", "out": "o"}, file)
    assert complaint in str(error.value) and str(file) in str(error.value)


def test_missing_settings_are_named() -> None:
    with pytest.raises(ValueError, match="missing: DATA, --model, --out, --file"):
        ScoreConfig.of({}, None)


def test_the_file_of_a_run(tmp_path: Path) -> None:
    first = config_of(tmp_path)
    assert file_of(first) == tmp_path / "run.yaml"
    save(first, tmp_path / "run.yaml", 0)
    moved = replace(first, data="elsewhere.jsonl", device="cuda", token_budget=1)
    assert file_of(moved) == tmp_path / "run.yaml"
    with pytest.raises(ValueError, match=r"--rank is 3, and .* was begun with 256: ghostfunc index --config"):
        file_of(replace(first, rank=3))

    more = replace(first, data="more.jsonl", limit=5, append=True)
    assert file_of(more) == tmp_path / "run-2.yaml"
    save(more, tmp_path / "run-2.yaml", 0)
    assert file_of(more) == tmp_path / "run-2.yaml"
    assert file_of(replace(first, append=True)) == tmp_path / "run.yaml", "data that is there is not added again"
    assert file_of(replace(more, data="third.jsonl")) == tmp_path / "run-3.yaml"
    with pytest.raises(ValueError, match=r"--block-size is 2.*leave --block-size away"):
        file_of(replace(more, data="third.jsonl", block_size=2))
    assert run_files(tmp_path) == [tmp_path / "run.yaml", tmp_path / "run-2.yaml"]


def test_saving_leaves_nothing_behind(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    (tmp_path / "run.yaml.0.tmp").write_text("cut off")
    save(config, tmp_path / "run.yaml", 0)
    (tmp_path / "run.yaml.5.tmp").write_text("cut off")  # by a process that the next run does not have
    save(config, tmp_path / "run.yaml", 0)
    save(replace(config, token_budget=1), tmp_path / "run.yaml", 1)
    assert "token_budget: 1\n" in (tmp_path / "run.yaml").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
    assert set(yaml.safe_load((tmp_path / "run.yaml").read_text())) == {field.name for field in fields(IndexConfig)}


def test_scores_have_settings_of_their_own() -> None:
    own = {field.name for field in fields(ScoreConfig)} - {field.name for field in fields(RunConfig)}
    assert own == {"file", "layers"}


def test_progress_in_plain_lines(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(_progress.time, "monotonic", lambda: clock[0])
    with _progress.progress("indexing") as report:
        report(400, 1000, 0)
        for seconds, done, tokens in [(1, 401, 50), (10, 500, 5000), (12, 510, 5500), (60, 1000, 30000)]:
            clock[0] = 100.0 + seconds
            report(done, 1000, tokens)
        report(1000, 1000, 30000)
    assert capsys.readouterr().err.splitlines() == [
        "indexing: 400 of 1,000 samples (40%)",
        "indexing: 500 of 1,000 samples (50%), 500 tokens/s, 0:00:50 left",
        "indexing: 1,000 of 1,000 samples (100%), 500 tokens/s",
    ]


def test_the_more_processes_the_fewer_lines_of_each(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(_progress.time, "monotonic", lambda: clock[0])
    with _progress.progress("indexing", share=Share(2, 4)) as report:
        for seconds, done in [(0, 0), (12, 250), (39, 500), (41, 750), (50, 1000)]:
            clock[0] = 100.0 + seconds
            report(done, 1000, done)
    assert [line.split(" samples")[0] for line in capsys.readouterr().err.splitlines()] == [
        f"rank 2 of 4: indexing: {done} of 1,000" for done in ("0", "750", "1,000")
    ]


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from io import StringIO

    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    with _progress.progress("indexing") as report:
        report(400, 1000, 0)
        report(1000, 1000, 30000)
    shown = terminal.getvalue()
    assert "indexing" in shown and "1,000 of 1,000 samples (100%)" in shown and "tokens/s" in shown
