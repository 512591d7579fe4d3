"""`make demo`: build a corpus, train a small GPT-2 with gradient dot products, report them, and index the corpus.

    python examples/demo/run.py

What an earlier run left in `demo/` is used again; remove the folder to start over.
"""

import csv
import json
import os
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/, for the packages in it

import pyarrow as pa
from transformers import PreTrainedTokenizerFast

from demo import report
from ghostfunc.dotlog import read_dot_log
from ghostfunc.text import Document, open_sources
from GradDotProd_LM.main import main as train
from shared.dataloader import TokenCorpus
from shared.domain_list import domain_file
from shared.utils import write_whole

CHECKOUT = Path(__file__).resolve().parents[2]
DEMO = CHECKOUT / "demo"
COMMAND = Path(sys.executable).with_name("ghostfunc")
VAL_DOMAIN = "code"
PASSAGES = 5
TRAINING = {
    "architecture": "GPT2-Nano",
    "block_size": 64,
    "batch_size": 16,
    "val_batch_size": 8,
    "learning_rate": 1e-3,
    "warmup_step": 15,
    "max_steps": 120,
    "eval_interval": 40,
    "eval_iter": 2,
}
PLAIN_STEP_EVERY = 10
PASSAGE_CHARACTERS = 700  # of each document, so that every domain has about as many samples in the index
INDEXED = 800
INDEX_OPTIONS = ["--block-size", "64", "--layers", "attn,mlp", "--rank", "256", "--dtype", "bfloat16"]
HELD_OUT, QUERY_CHARACTERS = 2, 90  # documents of each domain that are queries, and what of each


def main() -> None:
    """Do what is not done yet, then report."""
    start = time.monotonic()
    data = prepare_data()
    options = [*training_options(data), "--results_dir", _shown(DEMO / "results")]
    options += ["--interleave_plain", str(PLAIN_STEP_EVERY)]
    with _stage(["python", _shown(CHECKOUT / "examples/GradDotProd_LM/main.py"), *options]):
        run = train(options)
    print("\n== Report")
    print(make_report(run, data, DEMO))
    index_passages(run)
    print(f"\nAll of this took {time.monotonic() - start:.0f} s.")


def prepare_data() -> Path:
    """Build the corpus and tokenize it, where that is not done yet; the folder of token files."""
    corpus, data = DEMO / "corpus", DEMO / "data"
    _run("examples/demo/build_corpus.py", ["--output", _shown(corpus)])
    if (data / "meta.json").is_file():
        print(f"\n== The tokens in {_shown(data)} are used again.")
    else:
        tokenizer = "examples/shared/data_processing/tokenize_pile_by_domain.py"
        _run(tokenizer, ["--input", _shown(corpus), "--output_dir", _shown(data)])
    return data


def index_passages(run: Path) -> None:
    """Index passages of all domains by the trained model, and write a page about queries that are not among them."""
    passages, queries = DEMO / "passages.jsonl", DEMO / "queries.jsonl"
    index, page = DEMO / "index", DEMO / "index.html"
    (source,) = open_sources(str(DEMO / "corpus"))
    documents = [document for batch in source.batches(None, 64) for document in batch.documents]
    for path, records in zip((passages, queries), split_passages(documents), strict=True):
        write_whole(path, "".join(json.dumps(record) + "\n" for record in records))
    options = [_shown(passages), "--model", _shown(run), "--out", _shown(index), "--limit", str(INDEXED)]
    _ghostfunc("index", [*options, *INDEX_OPTIONS])
    _ghostfunc("report", [_shown(index), "--file", _shown(queries), "--metric", "cosine", "--out", _shown(page)])
    print(f"\nThe page about the index: {_shown(page)}\nAsk it yourself:")
    print(f"  {_shown(COMMAND)} query {_shown(index)} 'def main():' -k 3")


def split_passages(documents: Sequence[Document]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The beginnings of documents as records: one of each domain after the other, and a few of each as queries."""
    of_domain: dict[str, list[str]] = defaultdict(list)
    for document in documents:
        of_domain[document.domain].append(document.text)
    turns = zip_longest(*(texts[:-HELD_OUT] for texts in of_domain.values()))
    passages = [
        {"text": text[:PASSAGE_CHARACTERS], "domain": domain}
        for turn in turns
        for domain, text in zip(of_domain, turn, strict=True)
        if text is not None
    ]
    queries = [
        {"text": text[:QUERY_CHARACTERS], "domain": domain}
        for domain, texts in of_domain.items()
        for text in texts[-HELD_OUT:]
    ]
    return passages, queries


def training_options(data: Path) -> list[str]:
    """The options that train on the demo's data as the demo does."""
    options = TRAINING | {"train_set": _shown(data), "val_set": VAL_DOMAIN, "data_dir": _shown(data)}
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def make_report(run: Path, data: Path, folder: Path) -> str:
    """Write `report.html` and its figure into `folder`.

    Args:
        run: a run folder of GradDotProd_LM.
        data: the tokenized data that it was trained on.
        folder: where the report goes.

    Returns:
        The report's table, passages and cost, and where it lies, as text for a terminal.
    """
    log = read_dot_log(run / "dot_log")
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    timing = json.loads((run / "timing.json").read_text(encoding="utf-8"))
    val_domain = config["val_set"]

    domains = report.domain_values(log)
    samples = report.sample_values(log)
    helpful = read_passages(samples[:PASSAGES], data, config["block_size"])
    harmful = read_passages(samples[: -PASSAGES - 1 : -1], data, config["block_size"])
    figure = report.draw_values(log, val_domain)
    facts = describe_run(log, config, run / "evaluations.csv")
    cost = describe_cost(timing, config)
    command = shlex.join([_shown(CHECKOUT / "examples" / "GradDotProd_LM" / "train.sh"), *training_options(data)])

    page = report.render_html(
        domains=domains,
        val_domain=val_domain,
        helpful=helpful,
        harmful=harmful,
        figure=figure,
        facts=facts,
        cost=cost,
        command=command,
    )
    (folder / "value_per_domain.png").write_bytes(figure)
    write_whole(folder / "report.html", page)
    return "\n".join(
        [
            *(f"{name}: {value}" for name, value in facts.items()),
            "",
            report.format_table(domains, val_domain),
            "",
            *report.EXPLANATION,
            "",
            "Most helpful passages [10⁻⁶ nats]:",
            report.format_passages(helpful),
            "",
            "Most harmful passages [10⁻⁶ nats]:",
            report.format_passages(harmful),
            "",
            *cost,
            "",
            f"The report: {_shown(folder / 'report.html')} (its figure: {_shown(folder / 'value_per_domain.png')})",
            "To train on the demo's data yourself:",
            f"  {command}",
        ]
    )


def read_passages(samples: Sequence[report.SampleValue], data: Path, block_size: int) -> list[report.Passage]:
    """Look up the text of samples in the data that they were drawn from."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(data / "tokenizer")
    files = {sample.domain: domain_file(data, "train", sample.domain) for sample in samples}
    corpus = TokenCorpus(files, block_size=block_size)
    return [
        report.Passage(sample, tokenizer.decode(corpus.at(sample.domain, sample.sample_id).tolist()))
        for sample in samples
    ]


def describe_run(log: pa.Table, config: dict[str, Any], evaluations: Path) -> dict[str, str]:
    """What the run was, name by name."""
    steps = len(log["iteration"].unique())
    facts = {
        "Model": f"{config['architecture']} from scratch, {config['optimizer']}, learning rate up to "
        f"{config['learning_rate']:g}",
        "Training": f"{steps} steps of {len(log) // steps} samples of {config['block_size']} tokens",
        "Validation batch": f"{config['val_batch_size']} samples of {config['val_set']}",
    }
    with evaluations.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if rows:
        first, last = rows[0], rows[-1]
        facts["Validation loss"] = (
            f"{float(first['val_loss']):.3f} after {first['iteration']} steps, "
            f"{float(last['val_loss']):.3f} after {last['iteration']} (nats per token, on {config['val_set']})"
        )
    return facts


def describe_cost(timing: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """What a step with dot products cost beside plain steps on the same batches, in sentences."""
    if "interleaved" not in timing:
        return ["No plain step was timed, because the run was resumed shortly before its end."]
    took = timing["interleaved"]
    train_samples, val_samples = config["batch_size"], config["val_batch_size"]
    return [
        f"A step with dot products took {took['ghost_step_seconds']:.3f} s, a plain training step on the same batch "
        f"{took['plain_step_seconds']:.3f} s: {took['ratio']:.2f} times (medians of {took['steps']} steps each, "
        f"interleaved in this run; {timing['threads']} threads on {timing['device']}).",
        f"The arithmetic of {val_samples} validation samples beside {train_samples} training samples alone makes it "
        f"{1 + val_samples / train_samples:.2f} times.",
    ]


def _run(script: str, options: Sequence[str]) -> None:
    with _stage(["python", _shown(CHECKOUT / script), *options]):
        ended = subprocess.run([sys.executable, CHECKOUT / script, *options], check=False)
    if ended.returncode:
        sys.exit(f"the demo stops here: {script} failed (exit status {ended.returncode}); its message is above")


def _ghostfunc(command: str, options: Sequence[str]) -> None:
    with _stage([_shown(COMMAND), command, *options]):
        ended = subprocess.run([COMMAND, command, *options], check=False)
    if ended.returncode:
        sys.exit(f"the demo stops here: ghostfunc {command} failed (exit status {ended.returncode}); see above")


@contextmanager
def _stage(command: Sequence[str]) -> Iterator[None]:
    """Show the command that does the same as the block, then how long it took."""
    print(f"\n== {shlex.join(command)}", flush=True)
    start = time.monotonic()
    yield
    print(f"({time.monotonic() - start:.0f} s)", flush=True)


def _shown(path: Path) -> str:
    """A path as one would type it here."""
    return os.path.relpath(path)


if __name__ == "__main__":
    main()
