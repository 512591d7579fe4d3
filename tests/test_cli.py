"""The command from end to end, in this process: index, query, report, score, explain, tokenize."""

import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_world import DOCUMENTS, content, make_model, make_texts, text_of
from typer.testing import CliRunner

import ghostfunc as gf
from ghostfunc.cli import _index, main
from ghostfunc.cli._app import app
from ghostfunc.index import Store, load_model
from ghostfunc.text import TextCorpus, open_corpus

SMALL = ["--block-size", "64", "--rank", "16", "--min-rank", "2"]


def run(*arguments: object, status: int = 0) -> Any:
    """The result of a command that ends with a status."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, (result.stdout, result.stderr, result.exception)
    return result


def as_json(*arguments: object) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


def complaint(*arguments: object, status: int = 2) -> str:
    """The one line that a failing command says, with nothing on stdout."""
    result = run(*arguments, status=status)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and not result.stdout and "Traceback" not in result.stderr
    return last


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_model(folder / "model")
    make_texts(folder / "texts.jsonl")
    return folder


@pytest.fixture(scope="module")
def index(world: Path) -> Path:
    """An index of all but the last four documents."""
    kept = ("--limit", DOCUMENTS - 4, "--shard-rows", 8)
    run("index", world / "texts.jsonl", "-m", world / "model", "-o", world / "index", *SMALL, *kept)
    return world / "index"


def gradients(world: Path, texts: list[str]) -> list[dict[str, torch.Tensor]]:
    """Whole gradients in float64, one text at a time."""
    model = load_model(world / "model", dtype=torch.float64)
    model_fn, params = gf.functionalize(model.module, gf.causal_lm_loss)
    corpus = TextCorpus.of(texts, tokenizer=model.tokenizer, block_size=64)
    return [torch.func.grad(lambda p, b: model_fn(p, b).sum())(params, corpus.batch([i])) for i in range(len(corpus))]


# ---------------------------------------------------------------- index


def test_an_index_holds_the_projections_of_every_sample(world: Path, index: Path) -> None:
    store = Store(index)
    assert store.complete and store.rows == DOCUMENTS - 4
    projection = gf.KroneckerProjection.load(index / "projection.safetensors")
    oracle = [projection.project({n: g.float() for n, g in each.items()}) for each in gradients(world, [text_of(3)[1]])]
    torch.testing.assert_close(store.read(3, 4), torch.stack(oracle), rtol=1e-3, atol=1e-5)
    assert store.sample_rows([3]).to_pylist()[0]["domain"] == "code"


def test_the_summary_says_what_was_written_and_what_to_do_next(world: Path, index: Path) -> None:
    again = run("index", "--config", index / "run.yaml")
    assert f"{index}: 20 rows of" in again.stdout and "state       complete" in again.stdout
    assert "0 tokens in" in again.stdout, "nothing was left to do"
    assert f"ghostfunc query {index}" in again.stdout
    assert "indexing: 20 of 20 samples (100%)" in again.stderr

    summary = as_json("index", "--config", index / "run.yaml")
    assert summary["rows"] == 20 and summary["complete"] and summary["sources"] == {"texts": 20}
    assert summary["run"]["tokens"] == 0 and summary["bytes"] > 1000
    assert summary["projection"]["rank"] == 16 and summary["model"]["fingerprint"]


def test_the_saved_settings_repeat_the_run(world: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(index)
    monkeypatch.chdir(world)
    run("index", "-c", "index/run.yaml", "--out", "repeated")
    assert content(world / "repeated") == before == content(index)


def test_several_processes_write_what_one_writes(world: Path, index: Path) -> None:
    command = ("index", "-c", index / "run.yaml", "-o", world / "shared", "--world-size", 2, "--rank-of")
    half = run(*command, 1)
    assert not half.stdout and "rank 1 of 2: done" in half.stderr and "8 rows of other ranks are yet" in half.stderr
    assert "is not complete" in complaint("query", world / "shared", "def f")
    assert "complete" in run(*command, 0).stdout
    assert content(world / "shared") == content(index)
    assert "--rank-of 2 is none of 2 processes" in complaint(*command, 2)


def test_data_is_added_with_the_settings_of_the_index(world: Path, index: Path) -> None:
    grown = world / "grown"
    run("index", "-c", index / "run.yaml", "-o", grown)
    more = make_texts(world / "more.jsonl", range(100, 106))
    assert "append=True adds it" in complaint("index", more, "-c", index / "run.yaml", "-o", grown)
    assert "--rank is 8" in complaint("index", more, "-o", grown, "--append", "--rank", 8)
    summary = as_json("index", more, "-o", grown, "--append")
    assert summary["sources"] == {"texts": 20, "more": 6}, "the limit is the first data's alone"
    assert (grown / "run-2.yaml").exists()
    before = content(grown)
    run("index", more, "-o", grown, "--append")
    run("index", "-c", grown / "run-2.yaml")
    run("index", "-c", grown / "run.yaml")
    assert content(grown) == before

    hits = as_json("query", grown, text_of(102)[1], "-k", 26)["queries"][0]["hits"]
    texts = {hit["row"]: hit["text"] for hit in hits}
    assert texts[0] == text_of(0)[1] and texts[22] == text_of(102)[1]
    assert {hit["source"] for hit in hits} == {"texts", "more"}

    (world / "other").mkdir()
    namesake = make_texts(world / "other" / "more.jsonl", range(200, 203))
    assert as_json("index", namesake, "-o", grown, "--append")["sources"]["more-2"] == 3
    assert as_json("index", namesake, "-o", grown, "--append")["run"]["tokens"] == 0


def test_other_settings_for_a_folder_are_refused(world: Path, index: Path) -> None:
    said = complaint("index", "-c", index / "run.yaml", "--rank", 8)
    assert "--rank is 8" in said and "was begun with 16" in said and "run.yaml" in said
    run("index", "-c", index / "run.yaml", "--token-budget", 64)  # decides nothing but the memory
    run("index", "-c", index / "run.yaml", "--token-budget", 2048)


def test_settings_of_a_folder_without_an_index_are_not_kept(world: Path) -> None:
    command = ("index", world / "texts.jsonl", "-m", world / "model", "-o", world / "wrong", *SMALL)
    assert "nope" in complaint(*command, "--layers", "nope")
    assert not (world / "wrong" / "run.yaml").exists()
    assert "is not stored" in complaint(*command, "--dtype", "float8")
    run(*command, "--dtype", "int8", "--kind", "pca", "--include", "norm, bias", "--layers", "mlp", "--limit", 5)
    assert Store(world / "wrong").dtype == "int8"


# ---------------------------------------------------------------- query


def test_a_query_finds_its_own_document_first(world: Path, index: Path) -> None:
    found = as_json("query", index, text_of(6)[1], text_of(7)[1], "-k", 3, "--metric", "cosine")
    assert [each["hits"][0]["row"] for each in found["queries"]] == [6, 7]
    first = found["queries"][0]["hits"][0]
    assert first["score"] == pytest.approx(1.0, abs=1e-5)
    assert first["text"] == text_of(6)[1] and first["domain"] == "code" and first["document"] == "texts.jsonl:7"
    assert [hit["rank"] for hit in found["queries"][0]["hits"]] == [1, 2, 3]


def test_the_scores_are_inner_products_of_rows(world: Path, index: Path) -> None:
    store = Store(index)
    rows = store.read(0, store.rows)
    expected = rows @ rows[4]
    found = as_json("query", index, text_of(4)[1], "-k", 20)["queries"][0]
    scores = torch.zeros(20)
    for hit in found["hits"]:
        scores[hit["row"]] = hit["score"]
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)
    least = as_json("query", index, text_of(4)[1], "-k", 2, "--least")["queries"][0]["hits"]
    assert [hit["row"] for hit in least] == expected.argsort()[:2].tolist()
    assert found["loss"] == pytest.approx(store.sample_rows([4]).to_pylist()[0]["loss"], rel=1e-5)


def test_a_query_for_people(world: Path, index: Path) -> None:
    shown = run("query", index, "def f6(x)", "-k", 2).stdout
    assert re.search(r"1\. def f6\(x\)  \(loss \d\.\d+ nats per token\)", shown)
    assert "score" in shown and "texts.jsonl:" in shown
    assert "A positive score: a gradient step on the sample lowers the query's loss." in shown


def test_domains_layers_preconditioning_and_faiss(world: Path, index: Path) -> None:
    hits = as_json("query", index, "def f6(x)", "--domain", "math", "--domain", "poem", "-k", 20)["queries"][0]["hits"]
    assert len(hits) == 13 and {hit["domain"] for hit in hits} == {"math", "poem"}

    layers = as_json("query", index, "def f6(x)", "--layers", "each", "-k", 1)["queries"][0]["layers"]
    assert set(layers) == set(Store(index).slices)
    one = as_json("query", index, "def f6(x)", "--layers", "mlp.c_fc", "-k", 1)["queries"][0]["hits"]
    assert one == layers["transformer.h.0.mlp.c_fc.weight"]

    plain = as_json("query", index, "def f6(x)", "-k", 5)["queries"][0]["hits"]
    gram = as_json("query", index, "def f6(x)", "-k", 5, "--precondition", "inverse-gram", "--damping", 0.01)
    assert gram["damping"] == 0.01 and gram["queries"][0]["hits"] != plain

    assert "leave --layers, --least away" in complaint("query", index, "def", "--faiss", "--layers", "mlp", "--least")
    assert "choose inverse-gram" in complaint("query", index, "def", "--precondition", "inverse")
    assert "metric" in complaint("query", index, "def", "--metric", "l2")


def test_queries_from_a_file(world: Path, index: Path) -> None:
    file = make_texts(world / "questions.jsonl", range(3, 6))
    found = as_json("query", index, "--file", file, "-k", 1, "--metric", "cosine")["queries"]
    assert [each["hits"][0]["row"] for each in found] == [3, 4, 5]
    assert "name the queries" in complaint("query", index)
    assert "name the queries" in complaint("query", index, "def", "--file", file)
    assert "has one token" in complaint("query", index, "x")


def test_moved_data_and_models(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "model", tmp_path / "model")
    make_texts(tmp_path / "texts.jsonl")
    command = ("index", tmp_path / "texts.jsonl", "-m", tmp_path / "model", "-o", tmp_path / "index", *SMALL)
    run(*command, "--limit", 20, "--shard-rows", 8)
    (tmp_path / "elsewhere").mkdir()
    for name in ("texts.jsonl", "model", "index"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    moved = tmp_path / "elsewhere" / "index"
    assert "say where it is with --model" in complaint("query", moved, "def")
    result = run("query", moved, "def", "--model", tmp_path / "elsewhere" / "model", "--json")
    assert "Say where it is with --data" in result.stderr
    assert {hit["text"] for hit in json.loads(result.stdout)["queries"][0]["hits"]} == {None}

    where = ("--model", tmp_path / "elsewhere" / "model", "--data", tmp_path / "elsewhere" / "texts.jsonl")
    assert all(hit["text"] for hit in as_json("query", moved, "def", *where)["queries"][0]["hits"])

    other = make_model(tmp_path / "other", seed=1)
    said = complaint("query", moved, "def", "--model", other)
    assert "is not the model of" in said and "fingerprint" in said


# ---------------------------------------------------------------- report


def test_a_report_is_written_and_said(world: Path, index: Path) -> None:
    shown = run("report", index, text_of(6)[1], "-k", 2, "-o", world / "page.html").stdout
    assert shown.startswith(str(world / "page.html"))
    page = (world / "page.html").read_text(encoding="utf-8")
    assert "return x + 6" in page and "<html" in page
    said = as_json(
        "report", index, "--held-out", 3, "-k", 1, "-o", world / "held.html", "--precondition", "inverse-gram"
    )
    assert said["queries"] == 3 and said["bytes"] == (world / "held.html").stat().st_size


def test_held_out_passages_are_of_documents_outside_of_the_index(world: Path, index: Path) -> None:
    assert "has 4 samples of documents that are not in the index" in complaint("report", index, "--held-out", 5)
    assert "--held-out takes the queries from the data" in complaint("report", index, "def", "--held-out", 1)
    page = world / "four.html"
    run("report", index, "--held-out", 4, "-k", 1, "-o", page)
    assert all(f"texts.jsonl:{number + 1}" in page.read_text(encoding="utf-8") for number in range(20, 24))


# ---------------------------------------------------------------- score


def test_scores_are_exact_inner_products_of_whole_gradients(world: Path) -> None:
    file = make_texts(world / "two.jsonl", range(50, 52))
    command = ("score", world / "texts.jsonl", "-m", world / "model", "--file", file, "--block-size", 64)
    found = as_json(*command, "-o", world / "scores", "-k", DOCUMENTS, "--model-dtype", "float64")["queries"]
    samples = gradients(world, [text_of(number)[1] for number in range(DOCUMENTS)])
    queries = gradients(world, [text_of(number)[1] for number in range(50, 52)])
    for query, gradient in zip(found, queries, strict=True):
        assert [hit["score"] for hit in query["hits"]] == sorted((h["score"] for h in query["hits"]), reverse=True)
        for hit in query["hits"]:
            exact = sum((samples[hit["row"]][name] * gradient[name]).sum() for name in gradient)
            assert hit["score"] == pytest.approx(float(exact), rel=1e-5), "float32 on disk"
            assert hit["text"] == text_of(hit["row"])[1]
    shown = run("score", "--config", world / "scores" / "run.yaml", "-k", 1).stdout
    assert "the scores of 24 samples for 2 queries" in shown
    assert "--layers is 'mlp'" in complaint("score", "--config", world / "scores" / "run.yaml", "--layers", "mlp")


# ---------------------------------------------------------------- explain, tokenize


def test_explain_of_a_model_is_the_plan(world: Path) -> None:
    shown = run("explain", world / "model", "--batch-size", 2, "--block-size", 16).stdout
    model_fn, params = gf.functionalize(load_model(world / "model").module, gf.causal_lm_loss)
    ids = torch.randint(257, (2, 16), generator=torch.Generator().manual_seed(0))
    assert shown == f"{gf.explain(model_fn, params, {'input_ids': ids})}\n"
    plan = as_json("explain", world / "model", "--data", world / "texts.jsonl", "--batch-size", 3, "--layers", "mlp")
    assert plan["samples"] == 3 and set(plan["uses"]) == {n for n in params if ".mlp." in n}
    assert sum(plan["coverage"].values()) == pytest.approx(1.0)


def test_explain_of_an_index_is_its_manifest(world: Path, index: Path) -> None:
    shown = run("explain", index).stdout
    assert "gaussian, rank 16, seed 0" in shown and "texts (20)" in shown
    described = as_json("explain", index)
    assert described["model"] == Store(index).manifest["model"]
    assert described["clipped"] == [] and described["complete"]


def test_tokenize_writes_files_that_index_reads(world: Path) -> None:
    made = run("tokenize", world / "texts.jsonl", "--output_dir", world / "tokens", "--tokenizer", world / "model",
               "--num_proc", 1, "--max_length", 30)  # fmt: skip
    assert re.search(r"total +\d+", made.stdout) and "ghostfunc index" in made.stdout
    corpus = open_corpus(world / "tokens", block_size=32)
    summary = as_json("index", world / "tokens", "-m", world / "model", "-o", world / "of-tokens", *SMALL,
                      "--block-size", 32)  # fmt: skip
    assert summary["rows"] == len(corpus) > 0
    again = run("tokenize", world / "texts.jsonl", "--output_dir", world / "tokens", "--tokenizer", world / "model",
                "--num_proc", 1, "--max_length", 30)  # fmt: skip
    assert "is finished already" in again.stderr


def test_token_files_without_a_tokenizer_have_no_text(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "model", tmp_path / "model")
    for file in [*(tmp_path / "model").glob("tokenizer*"), *(tmp_path / "model").glob("special*")]:
        file.unlink()
    (tmp_path / "tokens").mkdir()
    np.arange(200, dtype="<u2").tofile(tmp_path / "tokens" / "train-numbers.bin")
    run("index", tmp_path / "tokens", "-m", tmp_path / "model", "-o", tmp_path / "index", *SMALL)
    found = as_json("query", tmp_path / "index", "--file", tmp_path / "tokens", "-k", 1, "--metric", "cosine")
    assert [each["hits"][0]["row"] for each in found["queries"]] == [0, 1, 2]
    assert found["queries"][0]["text"] is None is found["queries"][0]["hits"][0]["text"]
    assert "1. (token ids)" in run("query", tmp_path / "index", "--file", tmp_path / "tokens").stdout
    assert "comes without a tokenizer" in complaint("query", tmp_path / "index", "def")
    assert "--tokenizer" in complaint("index", world / "texts.jsonl", "-m", tmp_path / "model", "-o", tmp_path / "i")


# ---------------------------------------------------------------- how it ends


def test_every_command_has_help_with_examples() -> None:
    assert re.search(r"^ghostfunc \d", run("--version").stdout)
    for command in ("index", "query", "score", "report", "explain", "tokenize"):
        shown = run(command, "--help").stdout
        assert f"ghostfunc {command} " in shown.partition("Examples")[2]
        assert command in run("--help").stdout


def test_wrong_input_is_one_line_and_status_2(world: Path, tmp_path: Path) -> None:
    assert "nope.jsonl does not exist" in complaint("index", "nope.jsonl", "-m", world / "model", "-o", tmp_path / "i")
    assert "DATA, --out" in complaint("index", "-m", world / "model")
    assert "is no index" in complaint("query", world / "model", "def")
    assert "--model-dtype float1" in complaint("explain", world / "model", "--model-dtype", "float1")
    assert "--device nowhere" in complaint("explain", world / "model", "--device", "nowhere")
    assert "cannot be found" in complaint("explain", tmp_path / "nothing")
    assert run("query", status=2).stderr
    assert not (tmp_path / "i").exists()


def test_faults_of_the_machine_are_status_1(
    world: Path, index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def ending_with(error: BaseException) -> Any:
        def build(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(_index, "build_index", build)
        return "index", "--config", index / "run.yaml"

    assert "No space left" in complaint(*ending_with(OSError(28, "No space left on device")), status=1)
    assert "--token-budget" in complaint(*ending_with(torch.OutOfMemoryError("CUDA out of memory")), status=1)
    assert "pip install" in complaint(*ending_with(ImportError("pip install it")), status=1)
    stopped = run(*ending_with(KeyboardInterrupt()), status=130)
    assert stopped.stderr.endswith("interrupted: the same command goes on from what is written\n")
    fault = CliRunner().invoke(app, [str(each) for each in ending_with(RuntimeError("a fault of ours"))])
    assert isinstance(fault.exception, RuntimeError), "a fault of the program keeps its traceback"


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ghostfunc.cli._app")
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as end:
        main()
    assert str(end.value) == 'error: the command needs typer, which is an extra: pip install "ghostfunc[index]"'


def test_the_entry_point_writes_what_the_encoding_does_not_have(
    monkeypatch: pytest.MonkeyPatch, world: Path, index: Path
) -> None:
    binary = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(binary, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["ghostfunc", "query", str(index), "né à \x1b[31m", "-k", "1"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert b"1. n? ? ?[31m" in binary.getvalue() and b"\x1b" not in binary.getvalue()
