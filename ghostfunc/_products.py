"""Dot products of per-sample gradients with a validation direction or with validation samples, one parameter at a time.

    dots[i, k] = sum over uses s of <G_i^s, V_k>,    V_k = sum over uses t of val factors

The gradient of a parameter with several uses is the sum of their factors, so the cross terms between uses belong to
every dot product. A weight with one use is contracted inside its backward (`fuse`); a tied head and embedding exchange
gathered columns instead of the head's grad-output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ghostfunc._contract import along, contract_outer, pair, pair_sum, total
from ghostfunc._directions import FromRows, Given
from ghostfunc._factors import Factor, Gather, Outer, Own
from ghostfunc._planner import Budget
from ghostfunc._run_result import Run
from ghostfunc._sample_axis import SampleAxis
from ghostfunc._sites import Site


@dataclass(frozen=True, eq=False)
class Joint:
    """The validation rows are samples `train` and later of the same run.

    Attributes:
        names: parameters whose dot products are wanted.
        train: the number of train samples, n.
        val: the number of validation samples, m.
        each: one direction for each validation sample, rather than their sum.
        fuse: whether contractions may run inside the backward; not where uses may show only after it (their cross terms
            with the fused ones would be missing).
        budget: the working memory of a contraction.
    """

    names: frozenset[str]
    train: int
    val: int
    each: bool
    fuse: bool = True
    budget: Budget = field(default_factory=Budget)

    @property
    def count(self) -> int:
        """The number of columns, k."""
        return self.val if self.each else 1

    def more_taps(self, site: Site) -> set[str]:
        """The contraction of a linear map."""
        return {"dots"} if self.fuse and site.kind == "outer" and self.names.intersection(site.tracked.names) else set()

    def plan(self, sites: list[Site]) -> None:
        """Fuse every linear map whose weight, or part of one, has no other use, or only look-ups before it."""
        self.budget.resolve(lambda: bytes_of_plain_step(sites))
        by_name = sites_by_name(sites)
        for site in sites:
            if site.kind != "outer" or "dots" not in site.taps or site.tracked.root is None:
                continue
            others = [s for s in by_name[site.tracked.names[0]] if s is not site and meet(s, site)]
            look_ups = site.look_ups = look_ups_before(site)
            if others and (site.tracked.derivation is not None or any(s not in look_ups for s in others)):
                continue
            site.treatment = "fused"
            site.contract = self._contract(site, look_ups)

    def _contract(
        self, site: Site, look_ups: list[Site]
    ) -> Callable[[Factor], tuple[Tensor | None, dict[str, Tensor]]]:
        n = self.train

        def contract(factor: Factor) -> tuple[Tensor | None, dict[str, Tensor]]:
            assert isinstance(factor, Outer)
            train, val = factor.part(0, n), factor.part(n, n + self.val)
            grad, values = self._contract_rows(site, train, val)
            for index, look_up in enumerate(look_ups):
                ids = look_up.sample_rows_of_ids()  # [S, R']
                values[f"train columns {index}"] = train.left_at(ids[n:].flatten()).flatten(0, 1)
                values[f"val columns {index}"] = val.left_at(ids[:n].flatten()).flatten(0, 1)
            if look_ups:
                site.fused_right = factor.right
            return None if grad is None else grad.view(site.tracked.real.shape), values

        return contract

    def _contract_rows(self, site: Site, train: Outer, val: Outer) -> tuple[Tensor | None, dict[str, Tensor]]:
        """A linear map's gradient, where it is wanted, and the taps' cotangents."""
        directions = FromRows(val, self.each)
        dots, grad = contract_outer(train, directions, want_grad=site.wants_grad, budget=self.budget.bytes)
        return grad, {"dots": dots}

    def products(self, result: Run, name: str) -> Tensor:
        """Dot products of a parameter, `[n, k]`, on the scale of the run's weights."""
        n, stop = self.train, self.train + self.val
        shares, factors = _fused_and_kept(result, name)
        if not _pairable(factors, factors):
            shares.append(self._through_directions(result, name, factors))
            return _sum(shares, result, name, n, self.count)
        heads = [site for site in result.sites(name) if site in result.fused and site.look_ups]
        for site, factor in factors.items():
            train = factor.part(0, n)
            shares += [self._pair(train, val.part(n, stop)) for other, val in factors.items() if meet(site, other)]
            for head in heads:
                if site in head.look_ups:
                    shares.append(self._cross(head, result.fused[head], head.look_ups.index(site), factor))
        return _sum(shares, result, name, n, self.count)

    def _pair(self, train: Factor, val: Factor) -> Tensor:
        return pair(train, val) if self.each else pair_sum(train, val)

    def _cross(self, head: Site, values: Mapping[str, Tensor], index: int, look_up: Factor) -> Tensor:
        """Cross terms of a fused linear map with a look-up of the same weight, out of the gathered columns.

        <H_i, E_j> = sum_rs g_i[r, ids_j[s]] (a_i[r] · ge_j[s]) and <E_i, H_j> likewise.
        """
        assert isinstance(look_up, Gather) and head.fused_right is not None
        n, m = self.train, self.val
        right = head.fused_right  # [n + m, R, d]
        g = look_up.g  # [n + m, R', d]
        by_head = values[f"train columns {index}"] * (right[:n].flatten(0, 1) @ g[n:].flatten(0, 1).t())  # [n R, m R']
        by_table = values[f"val columns {index}"] * (right[n:].flatten(0, 1) @ g[:n].flatten(0, 1).t())  # [m R, n R']
        rows, ids = right.shape[1], g.shape[1]
        cross = by_head.view(n, rows, m, ids).sum((1, 3)) + by_table.view(m, rows, n, ids).sum((1, 3)).t()
        return cross if self.each else cross.sum(1, keepdim=True)

    def _through_directions(self, result: Run, name: str, factors: Mapping[Site, Factor]) -> Tensor:
        n, stop = self.train, self.train + self.val
        directions = sum_directions(result, name, {s: f.part(n, stop) for s, f in factors.items()}, self.each)
        return along_sites(result, name, {s: f.part(0, n) for s, f in factors.items()}, directions)


def sum_directions(result: Run, name: str, factors: Mapping[Site, Factor], each: bool) -> Tensor:
    """The directions `[k, *shape]` that validation factors make: one for each sample, or their sum."""
    directions: Tensor | None = None
    for site, factor in factors.items():
        shape = site.tracked.real.shape
        dense = factor.dense(shape) if each else total(factor, shape).unsqueeze(0)
        pulled = result.pull(site.tracked, name, dense)
        directions = pulled if directions is None else directions + pulled
    assert directions is not None
    return directions


def along_sites(result: Run, name: str, factors: Mapping[Site, Factor], directions: Tensor) -> Tensor:
    """Dot products `[n, k]` of the samples' gradients, over all sites, with directions `[k, *shape]`."""
    dots: Tensor | None = None
    for site, factor in factors.items():
        pushed = torch.stack([result.push(site.tracked, name, d) for d in directions])
        here = along(factor, pushed.to(site.dtype))
        dots = here if dots is None else dots + here
    assert dots is not None
    return dots


@dataclass(frozen=True, eq=False)
class Along:
    """The directions are given: k tensors for each parameter.

    Attributes:
        names: parameters whose dot products are wanted.
        train: the number of samples.
        directions: `{name: [k, *shape]}`.
        count: k.
        budget: the working memory of a contraction.
    """

    names: frozenset[str]
    train: int
    directions: Mapping[str, Tensor]
    count: int
    budget: Budget = field(default_factory=Budget)

    def more_taps(self, site: Site) -> set[str]:
        """The contraction of a linear map."""
        if site.kind != "outer" or not self.names.intersection(site.tracked.names) or site.tracked.root is None:
            return set()
        return {"dots"}

    def plan(self, sites: list[Site]) -> None:
        """Fuse every linear map whose weight is a parameter: with given directions uses do not meet."""
        self.budget.resolve(lambda: bytes_of_plain_step(sites))
        for site in sites:
            if "dots" in site.taps:
                site.treatment = "fused"
                site.contract = self._contract(site)

    def _contract(self, site: Site) -> Callable[[Factor], tuple[Tensor | None, dict[str, Tensor]]]:
        def contract(factor: Factor) -> tuple[Tensor | None, dict[str, Tensor]]:
            assert isinstance(factor, Outer)
            (name,) = site.tracked.names
            given = self.directions[name]
            if site.tracked.derivation is not None:
                with torch.no_grad():
                    given = torch.stack([site.tracked.replay({name: d}) for d in given])
            grad, values = self._contract_given(site, factor, given)
            return None if grad is None else grad.view(site.tracked.real.shape), values

        return contract

    def _contract_given(self, site: Site, factor: Outer, given: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
        """A linear map's gradient, where it is wanted, and the taps' cotangents."""
        directions = Given(given.flatten(2).to(site.dtype))
        dots, grad = contract_outer(factor, directions, want_grad=site.wants_grad, budget=self.budget.bytes)
        return grad, {"dots": dots}

    def products(self, result: Run, name: str) -> Tensor:
        """Dot products of a parameter, `[n, k]`, on the scale of the run's weights."""
        shares, factors = _fused_and_kept(result, name)
        if factors:
            shares.append(along_sites(result, name, factors, self.directions[name]))
        return _sum(shares, result, name, self.train, self.count)


@dataclass(frozen=True, eq=False)
class WithSamples:
    """The directions are the samples of another run, kept as factors: one column for each.

    Attributes:
        names: parameters whose dot products are wanted.
        train: the number of samples, n.
        val: the other run.
        count: the number of its samples, m.
        budget: the working memory of a contraction.
    """

    names: frozenset[str]
    train: int
    val: Run
    count: int
    budget: Budget = field(default_factory=Budget)

    def more_taps(self, site: Site) -> set[str]:
        """The contraction of a linear map."""
        return set() if self._rows(site) is None else {"dots"}

    def _rows(self, site: Site) -> FromRows | None:
        """The validation rows of a weight that is used once, by a linear map."""
        if site.kind != "outer" or not self.names.intersection(site.tracked.names):
            return None
        sites = [s for s in self.val.sites(site.tracked.names[0]) if meet(s, site)]
        factor = self.val.factors.get(sites[0]) if len(sites) == 1 else None
        if not isinstance(factor, Outer) or not same(sites[0], site):
            return None
        return FromRows(factor, each=True)

    def plan(self, sites: list[Site]) -> None:
        """Fuse every linear map whose weight is used once, in both runs."""
        self.budget.resolve(lambda: bytes_of_plain_step(sites))
        for site in sites:
            rows = self._rows(site)
            if "dots" in site.taps and rows is not None:
                site.treatment = "fused"
                site.contract = self._contract(site, rows)

    def _contract(self, site: Site, rows: FromRows) -> Callable[[Factor], tuple[Tensor | None, dict[str, Tensor]]]:
        def contract(factor: Factor) -> tuple[Tensor | None, dict[str, Tensor]]:
            assert isinstance(factor, Outer)
            dots, grad = contract_outer(factor, rows, want_grad=site.wants_grad, budget=self.budget.bytes)
            return None if grad is None else grad.view(site.tracked.real.shape), {"dots": dots}

        return contract

    def products(self, result: Run, name: str) -> Tensor:
        """Dot products of a parameter, `[n, m]`, on the scale of the runs' weights."""
        shares, train = _fused_and_kept(result, name)
        val = {s: self.val.factors[s] for s in self.val.sites(name)}
        if train and val and not _pairable(train, val):
            directions = sum_directions(self.val, name, val, each=True)
            shares.append(along_sites(result, name, train, directions))
        else:
            pairs = [(f, v) for site, f in train.items() for other, v in val.items() if meet(site, other)]
            shares += [pair(factor, of_val) for factor, of_val in pairs]
        return _sum(shares, result, name, self.train, self.count)


Products = Joint | Along | WithSamples


def bytes_of_plain_step(sites: list[Site]) -> int:
    """What a plain step takes beside the parameters: their gradients, and the results of operations that use them."""
    gradients = {id(t.real): t.real.numel() * t.real.element_size() for t in (site.tracked for site in sites)}
    of_results = 0
    for site in sites:
        samples = site.axis.samples if isinstance(site.axis, SampleAxis) else 1
        of_results += samples * site.positions * site.width * site.tracked.real.element_size()
    return sum(gradients.values()) + of_results


def sites_by_name(sites: list[Site]) -> dict[str, list[Site]]:
    """The uses of each parameter."""
    by_name: dict[str, list[Site]] = {}
    for site in sites:
        for name in site.tracked.names:
            by_name.setdefault(name, []).append(site)
    return by_name


def same(a: Site, b: Site) -> bool:
    """Whether two sites use the same entries of a parameter, in the same layout."""
    if a.tracked.derivation is None and b.tracked.derivation is None:
        return a.tracked.names == b.tracked.names
    return a.tracked.part is not None and a.tracked.part == b.tracked.part


def meet(a: Site, b: Site) -> bool:
    """Whether two sites may use a common entry of a parameter."""
    if a.tracked is b.tracked:
        return True
    if not set(a.tracked.names) & set(b.tracked.names):
        return False
    one, other = a.tracked.part, b.tracked.part
    return one is None or other is None or not one.apart_from(other)


def _pairable(train: Mapping[Site, Factor], val: Mapping[Site, Factor]) -> bool:
    """Whether every use is of the same entries as another, or of none of them: no direction has to be formed."""
    if any(isinstance(factor, Own) for factor in (*train.values(), *val.values())):
        return False
    return all(same(a, b) or not meet(a, b) for a in train for b in val)


def look_ups_before(site: Site) -> list[Site]:
    """Look-ups of a linear map's weight that ran before it."""
    if site.tracked.derivation is not None:
        return []
    before: list[Site] = []
    for other in site.tracked.sites:
        if other is site:
            break
        if other.kind == "gather":
            before.append(other)
    return before


def _fused_and_kept(result: Run, name: str) -> tuple[list[Tensor], dict[Site, Factor]]:
    """The products `[n, k]` that the backward has made of a parameter, and the factors that are left to contract."""
    sites = result.sites(name)
    made = [result.fused[site]["dots"] for site in sites if site in result.fused]
    return made, {site: result.factors[site] for site in sites if site in result.factors}


def _sum(shares: list[Tensor], result: Run, name: str, n: int, count: int) -> Tensor:
    """The shares' sum, `[n, k]`; zeros where there are none."""
    if shares:
        return sum(shares[1:], shares[0])
    leaf = result.leaves[name]
    return torch.zeros(n, count, dtype=torch.promote_types(leaf.dtype, torch.float32), device=leaf.device)
