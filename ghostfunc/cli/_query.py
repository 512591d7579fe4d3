"""`ghostfunc query`: the samples of an index whose gradients agree most with a query's."""

from __future__ import annotations

from typing import Annotated, Any

from torch import Tensor

from ghostfunc.cli import _options as options
from ghostfunc.cli._console import print_json, results, say, stdout_is_for_results
from ghostfunc.cli._failures import ends_well
from ghostfunc.cli._hits import HELPS, Sample, hit_table, listed, samples_of, text_of
from ghostfunc.cli._open_index import Index, open_corpora, open_index, open_queries
from ghostfunc.cli._precondition import check_precondition, preconditioner
from ghostfunc.cli._progress import progress
from ghostfunc.index import Hits, Store, faiss_search, project_queries, rows_of_domain, search, search_layers
from ghostfunc.text import Corpus

EACH = "each"


@ends_well(resumable=False)
def query(
    folder: options.Folder,
    prompts: options.Prompts = None,
    file: options.QueryFile = None,
    k: Annotated[
        int, options.option(options.SEARCH, "Samples for each query.", "-k", "--k", default=10, min=1, metavar="N")
    ] = 10,
    metric: options.Metric = "dot",
    layers: Annotated[
        str,
        options.option(
            options.SEARCH,
            "Parts of parameter names whose gradients count, such as mlp or h.0; each ranks by each parameter alone.",
            metavar="A,B|each",
        ),
    ] = "",
    least: Annotated[
        bool, options.option(options.SEARCH, "The samples with the lowest scores, the most opposing.", "--least")
    ] = False,
    domain: Annotated[
        list[str] | None,
        options.option(options.SEARCH, "Only samples of this domain; may be given several times.", metavar="NAME"),
    ] = None,
    precondition: options.Precondition = None,
    damping: options.Damping = 0.1,
    faiss: Annotated[
        bool,
        options.option(options.SEARCH, "Approximate search; its index is made by the first such query.", "--faiss"),
    ] = False,
    model: options.MovedModel = None,
    data: options.MovedData = None,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Find the samples of an index whose gradients agree most with those of queries.

    A positive score: a gradient step on the sample lowers the query's loss. Scores are inner products of projected
    gradients (or cosines), so estimates of the true ones; `ghostfunc score` gives those.

    Examples:
        ghostfunc query my-index "The derivative of x squared is"
        ghostfunc query my-index --file validation.jsonl -k 5 --metric cosine
        ghostfunc query my-index "def add(a, b):" --least --domain code
        ghostfunc query my-index "To be" --json | jq '.queries[0].hits[].text'
    """
    with stdout_is_for_results():
        check_precondition(precondition)
        index = open_index(folder, model=model, device=device or "auto")
        queries = open_queries(index, prompts or [], file)
        rows, losses = _project(index, queries)
        how: dict[str, Any] = {"metric": metric, "precondition": preconditioner(index.store, precondition, damping)}
        by_layer = _search(index.store, rows, k, layers, domain or [], how, least=least, faiss=faiss)
        corpora, missing = open_corpora(index, data or [])
        for sentence in missing:
            say(sentence)
        samples = samples_of(index.store, corpora, by_layer.values())
    found = _found(queries, losses, by_layer, samples)
    if json:
        print_json(
            {
                "index": str(index.store.folder),
                "metric": metric,
                "least": least,
                "layers": layers,
                "domains": domain or [],
                "precondition": precondition,
                "damping": damping if precondition else None,
                "approximate": faiss,
                "queries": found,
            }
        )
    else:
        _print(found)
        if precondition is None:  # which may turn the sign of a score
            print(HELPS)


def _project(index: Index, queries: Any) -> tuple[Tensor, Tensor]:
    """The projected gradients of queries `[Q, dim]`, and their losses `[Q]`."""
    budget = index.configs[0].token_budget
    with progress("queries", "queries") as report:
        return project_queries(
            index.opened.model_fn, index.opened.params, index.projection, queries, token_budget=budget, progress=report
        )


def _search(
    store: Store, rows: Tensor, k: int, layers: str, domains: list[str], how: dict, *, least: bool, faiss: bool
) -> dict[str, Hits]:
    """The hits of all queries by layer; "" is the name of all layers together."""
    if faiss:
        refused = [flag for flag, given in (("--layers", layers), ("--domain", domains), ("--least", least)) if given]
        if refused:
            raise ValueError(f"--faiss searches whole rows for the highest scores: leave {', '.join(refused)} away")
        return {"": faiss_search(store, rows, k, **how)}
    if domains:
        how = {**how, "rows": rows_of_domain(store, *domains)}
    if layers == EACH:
        return search_layers(store, rows, k, least=least, **how)
    return {"": search(store, rows, k, layers=layers, least=least, **how)}


def _found(queries: Corpus, losses: Tensor, by_layer: dict[str, Hits], samples: dict[int, Sample]) -> list[dict]:
    """Each query as JSON, with its `hits`, or with `layers` that have hits of their own."""
    found = []
    for number in range(len(queries)):
        hits = {layer: listed(best, number, samples) for layer, best in by_layer.items()}
        loss = float(losses[number])
        kept = {"hits": hits[""]} if list(hits) == [""] else {"layers": hits}
        found.append({"query": number, "text": text_of(queries, number), "loss": loss, **kept})
    return found


def _print(found: list[dict[str, Any]]) -> None:
    console = results()
    for each in found:
        for layer, hits in each.get("layers", {"": each.get("hits")}).items():
            console.print(hit_table(each, hits, f"(loss {each['loss']:.3f} nats per token)  {layer}"))
            console.print()
