"""What an index is, in the words of a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ghostfunc._call import Params
from ghostfunc._kronecker import KroneckerProjection
from ghostfunc.index import Store, StoreError, model_fingerprint
from ghostfunc.report._data import Highlights, Query

RANKED_BY = {"dot": "inner product", "cosine": "cosine"}
TIMES = " \N{MULTIPLICATION SIGN} "
DISAGREEMENT = 0.1
SHOWN_DIGITS = 12  # of a fingerprint


def _disagrees(highlights: Highlights) -> bool:
    carried = sum(map(abs, highlights.scores)) + abs(highlights.elsewhere)
    return abs(highlights.remainder) > DISAGREEMENT * carried


def check_identity(store: Store, params: Params, projection: KroneckerProjection) -> None:
    """Refuse a projection or a model that is not the store's.

    Raises:
        StoreError: if a fingerprint or the dimension is another.
    """
    stored = store.manifest["projection"].get("fingerprint", projection.fingerprint)
    if store.dim != projection.dim or stored != projection.fingerprint:
        raise StoreError(
            f"{store.folder} holds rows of {store.dim} numbers by the projection {stored[:SHOWN_DIGITS]}; the "
            f"given one makes {projection.dim} and is {projection.fingerprint[:SHOWN_DIGITS]}. Load the store's own: "
            "KroneckerProjection.load(folder / 'projection.safetensors')."
        )
    indexed = store.manifest["model"].get("fingerprint")
    if indexed and indexed != (given := model_fingerprint(params)):
        raise StoreError(
            f"{store.folder} is an index of the model {indexed[:SHOWN_DIGITS]}; the given parameters are "
            f"{given[:SHOWN_DIGITS]}. Load the same checkpoint in the same dtype."
        )


def facts_of(
    store: Store,
    samples: pa.Table,
    projection: KroneckerProjection,
    model: Mapping[str, Any],
    metric: str,
    preconditioned: str,
) -> tuple[tuple[str, str], ...]:
    """Names with values for the head of a page."""
    described = projection.describe()
    facts = {
        "model": str(model.get("name") or "not named"),
        "weights": _weights(model),
        "data": ", ".join(f"{name} ({len(rows):,})" for name, rows in store.sources.items()),
        "rows": f"{store.rows:,}",
        "tokens": f"{tokens.sum():,}" if len(tokens := _known(samples, "tokens")) else "",
        "mean loss": f"{losses.mean():.3f}" if len(losses := _known(samples, "loss")) else "",
        "projection": f"{projection.kind}, rank {described['rank']}, seed {projection.seed}",
        "numbers per row": f"{store.dim:,} from {len(projection.parts)} parameters, as {store.dtype}",
        "ranked by": RANKED_BY[metric],
        "queries preconditioned": preconditioned,
        "written by": f"ghostfunc {store.manifest['ghostfunc']}",
    }
    return tuple((name, value) for name, value in facts.items() if value)


def _known(samples: pa.Table, column: str) -> np.ndarray:
    """What is known of the samples in a column, which some sources may not have."""
    return samples[column].drop_null().to_numpy() if column in samples.column_names else np.empty(0)


def _weights(model: Mapping[str, Any]) -> str:
    fingerprint = str(model.get("fingerprint", ""))[:SHOWN_DIGITS]
    known = "" if model.get("trained") is None else "trained" if model["trained"] else "untrained"
    return ", ".join(part for part in (known, f"fingerprint {fingerprint}" if fingerprint else "") if part)


def parameters_of(projection: KroneckerProjection) -> tuple[tuple[str, str, str], ...]:
    """Each projected parameter with its shape and what is kept of it."""
    found = []
    for name, part in projection.describe()["parameters"].items():
        blocks = f"{part['blocks']}{TIMES}" if part["blocks"] > 1 else ""
        clipped = ", clipped to the layer" if part["clipped"] else ""
        shape = TIMES.join(map(str, part["shape"])) or "1"
        found.append((name, shape, f"{blocks}{part['k_in']}{TIMES}{part['k_out']}{clipped}"))
    return tuple(found)


def notices_of(
    store: Store,
    projection: KroneckerProjection,
    model: Mapping[str, Any],
    without_text: Sequence[str],
    queries: Sequence[Query],
) -> tuple[str, ...]:
    """What a reader must know before reading on."""
    found = []
    if model.get("trained") is False:
        found.append(
            "The model's weights are untrained. Scores describe how random weights respond to texts, not what a model "
            "has learned."
        )
    if without_text and len(without_text) == len(store.sources):
        found.append("No corpus was given: passages have numbers and places, but no text and no colours.")
    elif without_text:
        found.append(f"No corpus was given for {', '.join(without_text)}: passages from there have no text.")
    if projection.clipped:
        count = len(projection.clipped)
        found.append(
            f"{count} of {len(projection.parts)} parameters {'is' if count == 1 else 'are'} smaller than the rank that "
            "was asked for, and kept with as many numbers as they have."
        )
    passages = [passage for query in queries for passage in (*query.most, *query.least)]
    marked = [passage.highlights for passage in passages if passage.highlights is not None]
    if doubtful := sum(map(_disagrees, marked)):
        found.append(
            f"In {doubtful} of {len(marked)} passages the stored row differs by more than a tenth from what the "
            "tokens carry: rounding is coarse, or these rows are not of this model."
        )
    return tuple(found)
