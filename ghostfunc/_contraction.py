"""Runs whose weights are contracted for any set of quantities: inside the backward where possible, else behind it.

Inside the backward each weight's factors are contracted for all quantities together, and let go. A weight whose uses
are not all known there (a tied head and embedding), and every weight where gradients are clipped (the norm of the whole
gradient is known at the end), keep their factors until the backward has run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ghostfunc._accumulate import Accumulator, Setting, accumulate
from ghostfunc._batch import batch_size, cannot_join, join
from ghostfunc._call import Call, Units
from ghostfunc._contract import scaled, total
from ghostfunc._factors import Factor, Outer
from ghostfunc._nesting import readable, unrecorded
from ghostfunc._products import bytes_of_plain_step, look_ups_before, meet, same, sites_by_name
from ghostfunc._projection import TAP, Projected
from ghostfunc._quantities import Dots
from ghostfunc._randomness import DrewRandomNumbers, RandomState
from ghostfunc._run_result import Run
from ghostfunc._seen import Seen
from ghostfunc._sharded import sharded_like
from ghostfunc._sites import Site
from ghostfunc._tiles import Block, blocks_of


@dataclass(eq=False)
class Contraction:
    """Contracts what can be inside the backward of the train samples, and the rest behind it.

    Attributes:
        call: the shared arguments.
        train: units of the train batch.
        val: validation samples that follow them in the same run.
        accumulators: quantities that are summed up weight by weight.
        projected: the projection that is wanted.
        val_run: the run of the validation samples, where it is another.
        fuse: whether anything is contracted inside the backward.
    """

    call: Call
    train: int
    val: int
    accumulators: list[Accumulator]
    projected: Projected | None = None
    val_run: Run | None = None
    fuse: bool = True
    seen: dict[Site, Factor] = field(default_factory=dict, init=False)  # what look-ups need of tied heads

    def more_taps(self, site: Site) -> set[str]:
        """The projection, where one is wanted."""
        return set() if self.projected is None or not self.fuse else self.projected.more_taps(site)

    def plan(self, sites: list[Site]) -> None:
        """Fuse every linear map whose weight, or part of one, has no other use, or only look-ups before it."""
        self.call.budget.resolve(lambda: bytes_of_plain_step(sites))
        by_name = sites_by_name(sites)
        for site in sites:
            others = [s for s in by_name[site.tracked.names[0]] if s is not site and meet(s, site)]
            block = self._alone(site) if self.fuse and site.kind == "outer" and not others else None
            if block is None and self._is_tied_head(site, others):
                site.look_ups = others
                block = self._alone(site)
            if block is not None and site.tracked.root is not None:
                site.treatment = "fused"
                site.contract = partial(self._contract, site, block)

    def _is_tied_head(self, site: Site, others: list[Site]) -> bool:
        """Whether a linear map can be contracted at once, and its products with look-ups of its weight later."""
        can = self.fuse and self.projected is None and all(a.adds_up for a in self.accumulators)
        before = look_ups_before(site)
        if not (can and site.kind == "outer" and others and all(s in before for s in others)):
            return False
        if self.val_run is not None and any(a.val for a in self.accumulators):
            return False
        return all(s.ids is not None and readable(s.ids) for s in others)

    def _alone(self, site: Site) -> Callable[[Factor], Block] | None:
        """How the block of a site that meets no other is made of its factor."""
        (name, *others), tracked = site.tracked.names, site.tracked
        part = None if tracked.derivation is None else tracked.part
        if others or (tracked.derivation is not None and part is None):
            return None
        vals: tuple[Factor, ...] = ()
        if self.val_run is not None:
            theirs = [s for s in self.val_run.sites(name) if meet(s, site)]
            if not all(same(s, site) for s in theirs):
                return None
            vals = tuple(self.val_run.factors[s] for s in theirs)

        def block(factor: Factor) -> Block:
            val = (factor.part(self.train, self.train + self.val),) if self.val else vals
            return Block(name, tuple(tracked.real.shape), part, (factor.part(0, self.train),), val)

        return block

    def _contract(
        self, site: Site, block: Callable[[Factor], Block], factor: Factor
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        budget = self.call.budget.bytes
        grad = accumulate(block(factor), self.accumulators, want_grad=site.wants_grad, budget=budget)
        if site.look_ups and isinstance(factor, Outer):
            self.seen[site] = Seen.of(factor, [s.sample_rows_of_ids() for s in site.look_ups])
        values: dict[str, Tensor] = {}
        if self.projected is not None and TAP in site.taps:
            values[TAP] = self.projected.project(site, factor)
        return None if grad is None else grad.view(site.tracked.real.shape), values

    def finish(self, result: Run) -> None:
        """Contract the factors that were kept."""
        result.add_factors(self.seen)
        with unrecorded(), torch.autocast(result.losses.device.type, enabled=False):
            for name in self.call.params:
                if name in self.call.names:
                    for block in blocks_of(result, name, self.train, self.val, self.val_run):
                        accumulate(block, self.accumulators, want_grad=False, budget=self.call.budget.bytes)

    def projections(self, result: Run) -> Tensor:
        """The projections `[n, k]`."""
        assert self.projected is not None
        with unrecorded(), torch.autocast(result.losses.device.type, enabled=False):
            columns = [self.projected.products(result, name) for name in self.projected.projection.parts]
        return torch.cat(columns, 1)[: self.train]

    def weighted(self, result: Run, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sum of the train samples' gradients, with weights `[n]` for each parameter."""
        sums: dict[str, Tensor] = {}
        with unrecorded(), torch.autocast(result.losses.device.type, enabled=False):
            for name, leaf in result.leaves.items():
                if name not in self.call.names:
                    continue
                shares = []
                for site in result.sites(name):
                    factor = scaled(result.factors[site].part(0, self.train), weights[name])
                    share = total(factor, site.tracked.real.shape)
                    shares.append(result.pull(site.tracked, name, share.unsqueeze(0))[0])
                gradient = sum(shares[1:], shares[0]) if shares else torch.zeros_like(leaf)
                sums[name] = sharded_like(gradient.to(leaf.dtype), leaf)
        return sums


def collected(
    call: Call,
    train: Any,
    val: Any,
    units: Units,
    start: Callable[[Setting], list[Accumulator]],
    *,
    grads: bool,
    fuse: bool,
    projection: Any = None,
    mean: bool = False,
) -> tuple[Contraction, Run, Tensor, Tensor | None]:
    """Run the batches and accumulate: `(contraction, run, losses, val_losses)`.

    The run's gradients are sums over train samples; with `mean` the means, and the quantities' values take the division
    of the losses out again.
    """
    with call.together():
        n = batch_size(train, "train" if val is not None else "given")
        m = 0 if val is None else batch_size(val, "val")
    all_m = call.over_ranks(m)
    names = tuple(name for name in call.params if name in call.names)
    divisor = call.over_ranks(n) if mean else 1
    accumulators = start(Setting(call.params, names, call.dtype, units.runs, all_m, divisor, call.ranks))
    joint = m > 0 and not cannot_join(train, val) and not call.has_aux and units.segments is None
    joint = joint and call.ranks is None

    def contraction(val_here: int, val_run: Run | None) -> Contraction:
        rows = units.runs + val_here
        projected = None
        if projection is not None:
            projected = Projected(call.names, rows, projection, call.dtype, call.device)
        fused = fuse and not call.lenient
        return Contraction(call, units.runs, val_here, accumulators, projected, val_run, fused)

    def run_of(products: Contraction, batch: Any, samples: int, **want: Any) -> Run:
        more = {"more_taps": products.more_taps, "plan": products.plan, "segments": units.segments}
        if mean:
            more["weights"] = torch.cat([call.weights(n, 1.0 / divisor), call.weights(samples - n, 1.0)])
        return call.run(batch, samples, train=units.runs, grads=grads, factors=call.names, **more, **want)

    before = RandomState.of(call.device)
    if joint:
        products = contraction(m, None)
        try:
            batches = (("train", n), ("val", m))
            result = run_of(products, join(train, val), n + m, refuse_random=True, batches=batches)
        except DrewRandomNumbers:
            before.restore()
        else:
            products.finish(result)
            return products, result, result.losses[:n], result.losses[n:]
    val_run = val_losses = None
    if m:
        each, here = any(a.val == "each" for a in accumulators), slice(0, m)
        if each and call.ranks is not None:  # every rank's train samples meet all ranks' validation samples
            before_mine = sum(call.ranks.counts(m)[: call.ranks.rank])
            val, m, here = call.ranks.batch(val, "val"), all_m, slice(before_mine, before_mine + m)
        how = {"factors": call.names} if each else {"grads": True}
        with call.together():
            first = call.run(val, m, train=m, dropout=False, batches=(("val", m),), **how)
        val_run, val_losses = first if each else None, first.losses[here]
        direction = call.sums(first.grads)
        for a in accumulators:
            if isinstance(a, Dots) and not each:
                a.along(direction)
        before.restore()
    products = contraction(0, val_run)
    with call.together():
        result = run_of(products, train, n, batches=(("train" if m else "given", n),))
        products.finish(result)
    result.grads, result.unused = call.sums(result.grads), call.unused(result.unused)
    return products, result, result.losses, val_losses
