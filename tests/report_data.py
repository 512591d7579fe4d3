"""A report's data made up for the tests of its rendering: no store, no model."""

from dataclasses import replace

import numpy as np

from ghostfunc.report import Distribution, DomainMeans, Highlights, Passage, Query, ReportData, Spread

DOMAINS = ("code", "prose", "scripture")
PIECES = ("And", " he", " said", "\n", " un", "to", " them", ",", " go", ".")
HOSTILE = (
    "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"
    "</style></title>\"'><svg onload=alert(1)> {{ 7 * 7 }} &"
    " \u202egnp.exe\u2066 zero\u200bwidth\ufeff \x1b[31m\x00 \ud800"
)


def highlights(rng: np.random.Generator, pieces: tuple[str, ...] = PIECES) -> Highlights:
    return Highlights(pieces, tuple(rng.normal(size=len(pieces)).tolist()), elsewhere=0.25, remainder=-1e-5)


def passage(rng: np.random.Generator, score: float, pieces: tuple[str, ...] = PIECES) -> Passage:
    marked = highlights(rng, pieces)
    dot = sum(marked.scores) + marked.elsewhere + marked.remainder
    domain = DOMAINS[rng.integers(len(DOMAINS))]
    row = int(rng.integers(10**6))
    return Passage(row, f"{domain}.jsonl:{row}", domain, 3.25, score, dot, score / 10, "".join(pieces), marked)


def report_data(queries: int = 3, k: int = 2, domains: tuple[str, ...] = DOMAINS, **changes) -> ReportData:
    """A report of made-up numbers."""
    rng = np.random.default_rng(0)
    asked = []
    for number in range(queries):
        most = tuple(passage(rng, score) for score in (0.9, 0.5, 0.2, 0.1)[:k])
        least = tuple(passage(rng, score) for score in (-0.8, -0.3, -0.1, 0.0)[:k])
        domain = domains[number % len(domains)]
        asked.append(Query("What is merged?", f"asked.jsonl:{number}", domain, 4.5, most, least, 0.01, 0.1, 0.55))
    used = tuple(sorted({query.domain for query in asked}))
    counts = tuple(sum(query.domain == domain for query in asked) for domain in used)
    table = tuple(tuple(rng.normal(size=len(domains)).tolist()) for _ in used)
    distributions = tuple(
        Distribution(domain, 40, (-0.4, -0.1, 0.05, 0.2, 0.5), 0.6, tuple(rng.integers(0, 9, 60).tolist()))
        for domain in domains
    )
    data = ReportData(
        title="What supports these queries?",
        facts=(("model", "GPT2-Nano"), ("rows", "120")),
        parameters=(("h.0.mlp.weight", "16 by 64", "4 by 8"),),
        notices=("The weights are untrained.",),
        metric="dot",
        dim=2304,
        random=True,
        preconditioned="",
        queries=tuple(asked),
        means=DomainMeans(used, counts, domains, tuple([40] * len(domains)), table, table),
        spreads=tuple(Spread(domain, -0.6, 0.8, distributions) for domain in used),
        examined=0,
        untokened=("wpe.weight",),
    )
    return replace(data, **changes)


def hostile_data() -> ReportData:
    """A report in which every text that comes from data is hostile."""
    rng = np.random.default_rng(1)
    pieces = tuple(HOSTILE[start : start + 7] for start in range(0, len(HOSTILE), 7))
    marked = replace(passage(rng, 0.5, pieces), document=HOSTILE, domain=HOSTILE)
    plain = replace(marked, highlights=None)
    query = Query(HOSTILE, HOSTILE, HOSTILE, 1.0, (marked, plain), (plain,), 0.0, 1.0, 0.5)
    spread = Spread(HOSTILE, -1.0, 1.0, (Distribution(HOSTILE, 3, (-1.0, -0.5, 0.0, 0.5, 1.0), 0.5, (1, 2)),))
    return ReportData(
        title=HOSTILE,
        facts=((HOSTILE, HOSTILE),),
        parameters=((HOSTILE, HOSTILE, HOSTILE),),
        notices=(HOSTILE,),
        metric="dot",
        dim=4,
        random=True,
        preconditioned=HOSTILE,
        queries=(query,),
        means=DomainMeans((HOSTILE,), (1,), (HOSTILE,), (3,), ((1.0,),), ((0.5,),)),
        spreads=(spread, replace(spread, low=-2.0)),
        examined=3,
        untokened=(HOSTILE,),
    )
