"""Kronecker projections: two small random matrices for each parameter, in place of a large one for its gradient.

    proj(G) = P_in^T G P_out,    G = A^T (grad-outputs) as [d_in, d_out],    E <proj(G), proj(H)> = <G, H>

The inner product is kept in expectation because E[P P^T] is the identity, for every kind of matrix here. (The two-sided
form is LoGra's, Choe et al., 2024, arXiv 2405.13954, section 3.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ghostfunc._axes import match_layers
from ghostfunc._batch import batch_size, plain
from ghostfunc._blocks import Blocks, FirstUse, blocks_of, first_use
from ghostfunc._call import Call, Layers, checked
from ghostfunc._factors import Dense, Factor, Gather, Outer
from ghostfunc._functionalize import ModelFn
from ghostfunc._randomness import RandomState
from ghostfunc._sites import Site

INCLUDE = ("embedding", "norm", "bias", "head")
_ADDS = frozenset("linear addmm matmul mm add iadd sub isub rsub cat stack where".split())


class Part(NamedTuple):
    """The share of a projection that one parameter has.

    Attributes:
        shape: the parameter's.
        blocks: the parameter as blocks `[d_in, d_out]`.
        p_in: `[d_in, k_in]`, the same for each block.
        p_out: `[d_out, k_out]`, the same for each block.
        clipped: whether a block has fewer entries than the rank that was asked for.
    """

    shape: tuple[int, ...]
    blocks: Blocks
    p_in: Tensor
    p_out: Tensor
    clipped: bool

    @property
    def size(self) -> int:
        """Numbers of one block's projection, k_in * k_out."""
        return self.p_in.shape[1] * self.p_out.shape[1]


@dataclass(frozen=True, eq=False, repr=False)
class KroneckerProjection:
    """A projection of per-sample gradients; print it.

    Attributes:
        parts: the parameters that it is of, by name, in the order of their slices.
        kind: of its matrices.
        seed: of its matrices.
    """

    parts: dict[str, Part]
    kind: str
    seed: int

    @cached_property
    def slices(self) -> dict[str, slice]:
        """The columns of each parameter, block after block, each block row-major over `[k_in, k_out]`."""
        found, start = {}, 0
        for name, part in self.parts.items():
            stop = start + part.blocks.count * part.size
            found[name], start = slice(start, stop), stop
        return found

    @property
    def dim(self) -> int:
        """How many numbers a sample's gradient becomes, k."""
        return sum(part.blocks.count * part.size for part in self.parts.values())

    @property
    def clipped(self) -> tuple[str, ...]:
        """The parameters that are too small for the rank that was asked for."""
        return tuple(name for name, part in self.parts.items() if part.clipped)

    def matrices(self, name: str) -> tuple[Tensor, Tensor]:
        """The matrices of a parameter: `(P_in[d_in, k_in], P_out[d_out, k_out])`, `[[1.]]` for a side of size 1.

        Args:
            name: the parameter's.

        Returns:
            Both matrices, on the parameters' device. A vector (a bias, a norm's scale) has `P_out = [[1.]]`.

        Raises:
            KeyError: if the projection is not of this parameter.
        """
        if name not in self.parts:
            raise KeyError(f"{name!r} is not in this projection; it is of {', '.join(self.parts)}.")
        return self.parts[name].p_in, self.parts[name].p_out

    def __str__(self) -> str:
        rows = [("parameter", "shape", "blocks", "d_in x d_out", "k_in x k_out", "")]
        for name, part in self.parts.items():
            note = "clipped: as many numbers as a block has" if part.clipped else ""
            rows.append(
                (
                    name,
                    "x".join(map(str, part.shape)) or "scalar",
                    str(part.blocks.count),
                    f"{part.blocks.d_in} x {part.blocks.d_out}",
                    f"{part.p_in.shape[1]} x {part.p_out.shape[1]}",
                    note,
                )
            )
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        small = f"; {len(self.clipped)} clipped to small layers" if self.clipped else ""
        head = f"{len(self.parts)} parameters to {self.dim} numbers, {self.kind} matrices of seed {self.seed}{small}"
        return "\n".join([head, *lines])

    __repr__ = __str__


# ---------------------------------------------------------------- matrices


def _gaussian(d: int, k: int, generator: torch.Generator) -> Tensor:
    return torch.randn(d, k, generator=generator, dtype=torch.float64) / sqrt(k)


def _rademacher(d: int, k: int, generator: torch.Generator) -> Tensor:
    return (2 * torch.randint(2, (d, k), generator=generator).double() - 1) / sqrt(k)


def _orthonormal(d: int, k: int, generator: torch.Generator) -> Tensor:
    """The columns are orthogonal; each has norm sqrt(d / k), without which inner products would shrink by k / d."""
    q, r = torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign() * sqrt(d / k)


def _sparse(d: int, k: int, generator: torch.Generator) -> Tensor:
    """One sign in each row, in a column at random (a count sketch, the sparsest SJLT)."""
    column = torch.randint(k, (d, 1), generator=generator)
    sign = 2 * torch.randint(2, (d, 1), generator=generator).double() - 1
    return torch.zeros(d, k, dtype=torch.float64).scatter_(1, column, sign)


def _mask(d: int, k: int, generator: torch.Generator) -> Tensor:
    """Of d coordinates k are kept, which are drawn without replacement."""
    kept = torch.randperm(d, generator=generator)[:k].sort().values
    return torch.zeros(d, k, dtype=torch.float64).index_put_(
        (kept, torch.arange(k)), torch.tensor(sqrt(d / k)).double()
    )


KINDS: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "gaussian": _gaussian,
    "rademacher": _rademacher,
    "orthonormal": _orthonormal,
    "sparse": _sparse,
    "mask": _mask,
}


def _matrix(kind: str, seed: int, name: str, side: str, d: int, k: int) -> Tensor:
    """One matrix `[d, k]`, drawn on the CPU in float64 from the seed, the parameter's name and the side alone."""
    if d == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    digest = hashlib.sha256(f"{seed}\n{name}\n{side}".encode()).digest()
    return KINDS[kind](d, k, torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1))


def ranks(d_in: int, d_out: int, rank: int, min_rank: int) -> tuple[int, int]:
    """The ranks of a layer: k_in / k_out near sqrt(d_out / d_in), k_in * k_out near `rank`, neither below `min_rank`.

    A side that is smaller than its rank is kept whole in number, and the other side has what it leaves.
    """
    ratio = sqrt(d_out / d_in)
    k_in = min(d_in, max(min_rank, round(sqrt(rank * ratio))))
    k_out = min(d_out, max(min_rank, round(rank / k_in)))
    return min(d_in, max(min_rank, round(rank / k_out))), k_out


def _part(name: str, shape: tuple[int, ...], blocks: Blocks, rank: int, min_rank: int, draw: Callable) -> Part:
    d_in, d_out = blocks.d_in, blocks.d_out
    k_in, k_out = ranks(d_in, d_out, rank, min_rank)
    p_in, p_out = draw(name, "in", d_in, k_in), draw(name, "out", d_out, k_out)
    return Part(shape, blocks, p_in, p_out, clipped=d_in * d_out < rank)


# ---------------------------------------------------------------- which parameters, and what they are


class _Uses(NamedTuple):
    """What one forward and backward show of the parameters.

    Attributes:
        first: the first use of each parameter that has one.
        kinds: what each parameter is: any of "linear", "embedding", "norm", "bias", "head".
    """

    first: dict[str, FirstUse]
    kinds: dict[str, frozenset[str]]


def _uses(call: Call, batch: Any) -> _Uses:
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
    return _Uses(first, kinds)


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


def _chosen(
    names: Iterable[str],
    kinds: Mapping[str, frozenset[str]],
    layers: Layers,
    include: Iterable[str],
) -> list[str]:
    """The parameters of a projection, in the order of `names`."""
    names, include = list(names), list(include)
    unknown = [kind for kind in include if kind not in INCLUDE]
    if unknown:
        raise ValueError(f"include={unknown}: expected any of {', '.join(map(repr, INCLUDE))}, as a tuple.")
    chosen = {name for name in names if kinds[name] & set(include)}
    if not isinstance(layers, str):
        chosen |= match_layers(layers, names)
    elif not layers.strip(", "):
        chosen |= {name for name in names if "linear" in kinds[name]}
    else:
        for part in layers.split(","):
            matched = match_layers(part, names) if part.strip() else []
            of_kind = ([name for name in matched if kind in kinds[name]] for kind in ("linear", "head"))
            chosen.update(next(filter(None, of_kind), matched))
    if not chosen:
        what = "; ".join(f"{name}: {', '.join(sorted(kinds[name]))}" for name in names)
        raise ValueError(
            f"layers={layers!r}, include={tuple(include)} choose no parameter ({what}). Name some with layers=, or "
            "their kind with include=."
        )
    return [name for name in names if name in chosen]


def kronecker_projection(
    model_fn: ModelFn,
    params: Mapping[str, Tensor],
    batch: Any,
    *,
    layers: Layers = "",
    rank: int = 256,
    min_rank: int = 8,
    kind: str = "gaussian",
    seed: int = 0,
    include: Iterable[str] = (),
    has_aux: bool = False,
    on_unsupported: str = "raise",
) -> KroneckerProjection:
    """A projection of per-sample gradients by two small matrices for each parameter, for `ghost_grad_proj`.

    A gradient `G[d_in, d_out]` becomes `P_in^T G P_out`, flattened row-major: k_in * k_out numbers whose inner products
    are those of the gradients in expectation. d_in is the side that meets the activation, whatever way the weight is
    stored:

    | parameter | blocks |
    |---|---|
    | linear map, `Conv1D`, `x @ w` | one, `[d_in, d_out]`; a tied weight as at its first use |
    | convolution | one for each group, `[C_in / groups * kernel, C_out / groups]` |
    | experts `[E, ...]` | one for each expert, all with the same two matrices |
    | embedding | one, `[rows, d]` |
    | bias, norm, any vector | one, `[d, 1]`, so that `P_out` is `[[1.]]` |
    | used only through others (weight norm) | one, of the weight as `nn.Linear` would store it |

    One forward and backward of `batch` shows how each parameter is used; nothing else of the batch enters.

    Args:
        model_fn: `model_fn(params, batch) -> losses[B]`.
        params: parameters by name.
        batch: a pytree of tensors `[B, ...]`.
        layers: comma-separated name parts, matched at dots. A part takes the weights of linear maps and convolutions
            that it matches; if there are none, the head's; else whatever it matches. Empty takes all linear maps and
            convolutions but the head. Or names, or a function of the name, which decide alone.
        rank: about how many numbers a block becomes: k_in * k_out, with k_in / k_out near sqrt(d_out / d_in). Layers
            too small for it keep fewer: `print(projection)` says which.
        min_rank: the least k_in and k_out, where the layer has as many.
        kind: "gaussian", "rademacher" (signs), "orthonormal" (orthogonal columns), "sparse" (one sign in a row) or
            "mask" (rows and columns picked at random), all scaled so that E[P P^T] is the identity.
        seed: with a parameter's name it decides the parameter's matrices: they are the same on every device, and
            whatever other parameters the projection has.
        include: any of "embedding", "norm" (scales and shifts of norms, other scales), "bias" and "head" (the linear
            map that runs last): adds every parameter of these kinds, whether `layers` matches it or not.
        has_aux: `model_fn` returns `(losses, aux)`.
        on_unsupported: as in `ghost_grad_dot`.

    Returns:
        A projection: `.dim`, `.slices` (the columns of each parameter), `.matrices(name)`.

    Raises:
        ValueError: if a pattern matches nothing, nothing is chosen, or an option is unknown.
        UnsupportedUse: as in `ghost_grad_dot`.
        InteractingSamples: as in `ghost_grad_dot`.

    Example:
        >>> import torch, ghostfunc as gf
        >>> model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Tanh(), torch.nn.Linear(30, 3))
        >>> model_fn, params = gf.functionalize(model, gf.classification_loss)
        >>> batch = (torch.randn(5, 40), torch.tensor([0, 1, 2, 0, 1]))
        >>> projection = gf.kronecker_projection(model_fn, params, batch, rank=64, include=("bias", "head"))
        >>> projection.slices["0.weight"], [tuple(p.shape) for p in projection.matrices("0.weight")]
        (slice(0, 64, None), [(40, 8), (30, 8)])
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: expected {', '.join(map(repr, KINDS))}.")
    if rank < 1 or min_rank < 1:
        raise ValueError(f"rank={rank}, min_rank={min_rank}: a projection keeps one number at least.")
    call = checked(model_fn, params, None, "", has_aux, on_unsupported, "different")
    uses = _uses(call, plain(batch))
    kinds = {name: uses.kinds.get(name, _unused(p)) for name, p in call.params.items() if p.numel()}
    chosen = _chosen(kinds, kinds, layers, include)

    def draw(name: str, side: str, d: int, k: int) -> Tensor:
        return _matrix(kind, seed, name, side, d, k).to(call.device, call.dtype)

    parts = {}
    for name in chosen:
        shape = tuple(call.params[name].shape)
        parts[name] = _part(name, shape, blocks_of(shape, uses.first.get(name)), rank, min_rank, draw)
    return KroneckerProjection(parts, kind, seed)


def _unused(parameter: Tensor) -> frozenset[str]:
    """What a parameter may be that the losses of this batch do not depend on: its shape is all there is to go by."""
    return frozenset({"linear"} if parameter.dim() > 1 else {"norm", "bias"})
