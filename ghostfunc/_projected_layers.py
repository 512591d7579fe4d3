"""Which parameters a projection is of: what each parameter is, and which of them patterns and kinds choose."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import astuple
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ghostfunc._axes import match_layers
from ghostfunc._batch import batch_size
from ghostfunc._blocks import Blocks, FirstUse, first_use
from ghostfunc._call import Call, Layers
from ghostfunc._factors import Dense, Factor, Gather, Outer
from ghostfunc._randomness import RandomState
from ghostfunc._ranks import Ranks
from ghostfunc._sites import Site

INCLUDE = ("embedding", "norm", "bias", "head")
_ADDS = frozenset("linear addmm matmul mm add iadd sub isub rsub cat stack where".split())


class Uses(NamedTuple):
    """What one forward and backward show of the parameters.

    Attributes:
        first: the first use of each parameter that has one.
        kinds: what each parameter is: any of "linear", "embedding", "norm", "bias", "head".
    """

    first: dict[str, FirstUse]
    kinds: dict[str, frozenset[str]]


def uses_of(call: Call, batch: Any) -> Uses:
    """Run a batch forward and backward once, and see how it uses each parameter."""
    uses = _in_order(call, batch)
    linear = [site for site, use in uses if use.kind == "outer" or use.maps is not None]
    first, kinds = {}, {}
    for name, parameter in call.params.items():
        of_name = [(site, use) for site, use in uses if name in site.tracked.names]
        direct = [pair for pair in of_name if pair[1].entries is not None] or of_name
        if direct:
            first[name] = direct[0][1]
            kinds[name] = frozenset(
                _kind(name, parameter.shape, use, last=bool(linear) and site is linear[-1]) for site, use in direct
            )
    kinds |= {name: _unused(p) for name, p in call.params.items() if name not in kinds and p.numel()}
    return Uses(first, {name: kinds[name] for name, p in call.params.items() if p.numel()})


def kinds_of_all_ranks(ranks: Ranks, uses: Uses) -> dict[str, frozenset[str]]:
    """What each parameter is on any of the ranks whose samples use it."""
    mine = {name: sorted(kinds) for name, kinds in uses.kinds.items() if name in uses.first}
    of_ranks = [json.loads(text) for text in ranks.texts(json.dumps(mine))]
    found = {name: frozenset(kind for of in of_ranks for kind in of.get(name, ())) for name in uses.kinds}
    return {name: kinds or uses.kinds[name] for name, kinds in found.items()}


def blocks_of_all_ranks(ranks: Ranks, uses: Uses, blocks: Mapping[str, Blocks]) -> dict[str, Blocks]:
    """Each parameter's blocks, as on the first of the ranks whose samples use it."""
    mine = {name: astuple(of) for name, of in blocks.items() if name in uses.first}
    of_ranks = [json.loads(text) for text in ranks.texts(json.dumps(mine))]
    found = {name: next((of[name] for of in of_ranks if name in of), None) for name in blocks}
    return {
        name: blocks[name] if plan is None else Blocks(tuple(plan[0]), tuple(plan[1]), *plan[2:])
        for name, plan in found.items()
    }


def _in_order(call: Call, batch: Any) -> list[tuple[Site, FirstUse]]:
    """Every use that the losses depend on, in the order of the forward. The backward keeps nothing of their factors."""
    samples = batch_size(batch, "given")
    order: list[Site] = []
    found: dict[Site, FirstUse] = {}

    def record(site: Site, factor: Factor) -> tuple[None, dict[str, Tensor]]:
        rows_in = isinstance(factor, Gather) or (isinstance(factor, (Outer, Dense)) and factor.transposed)
        found[site] = first_use(site, rows_in=rows_in, maps=factor.maps if isinstance(factor, Dense) else None)
        return None, {}

    def plan(sites: list[Site]) -> None:
        for site in sites:
            order.append(site)
            site.treatment, site.contract = "fused", partial(record, site)

    before = RandomState.of(call.device)
    try:
        result = call.run(batch, samples, train=samples, factors=call.names, dropout=False, plan=plan)
    finally:
        before.restore()
    for site, factor in result.factors.items():  # of samples that had to be probed, or uses without a rule
        record(site, factor)
    return [(site, found[site]) for site in dict.fromkeys([*order, *result.factors]) if site in found]


def _kind(name: str, shape: torch.Size, use: FirstUse, *, last: bool) -> str:
    numbers = sum(size != 1 for size in shape)
    named_bias = "bias" in name.rpartition(".")[2]  # tells the biases of experts from a table of positions
    if use.kind == "outer" or use.maps is not None:
        if numbers < 2 and use.entries is None:  # the gain of a weight norm
            return "norm"
        return "head" if last else "linear"
    if use.kind == "gather" and not named_bias:
        return "embedding"
    if "norm" in use.op or not (named_bias or use.op in _ADDS or "conv" in use.op):
        return "norm"
    return "bias" if numbers < 2 or named_bias else "embedding"


def chosen(kinds: Mapping[str, frozenset[str]], layers: Layers, include: Iterable[str]) -> list[str]:
    """The parameters of a projection, in the order of `kinds`, which has what each parameter is."""
    names, include = list(kinds), list(include)
    unknown = [kind for kind in include if kind not in INCLUDE]
    if unknown:
        raise ValueError(f"include={unknown}: expected any of {', '.join(map(repr, INCLUDE))}, as a tuple.")
    found = {name for name in names if kinds[name] & set(include)}
    if not isinstance(layers, str):
        found |= match_layers(layers, names)
    elif not layers.strip(", "):
        found |= {name for name in names if "linear" in kinds[name]}
    else:
        for part in layers.split(","):
            matched = match_layers(part, names) if part.strip() else []
            of_kind = ([name for name in matched if kind in kinds[name]] for kind in ("linear", "head"))
            found.update(next(filter(None, of_kind), matched))
    if not found:
        what = "; ".join(f"{name}: {', '.join(sorted(kinds[name]))}" for name in names)
        raise ValueError(
            f"layers={layers!r}, include={tuple(include)} choose no parameter ({what}). Name some with layers=, or "
            "their kind with include=."
        )
    return [name for name in names if name in found]


def _unused(parameter: Tensor) -> frozenset[str]:
    """What a parameter may be that the losses of this batch do not depend on: its shape is all there is to go by."""
    return frozenset({"linear"} if parameter.dim() > 1 else {"norm", "bias"})
