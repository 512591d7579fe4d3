"""Attention heads: which entries of a weight belong to which head, and dot products head by head.

A pattern names the dimensions of a weight as einops does, with sizes where they are needed: `"d (qkv=3 head=12 k)"` is
GPT-2's `c_attn.weight`, `"(head=12 k) d"` its `c_proj.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import EinopsError, rearrange
from torch import Tensor, nn

from ghostfunc._contract import along, pair
from ghostfunc._factors import Dense, Factor, Outer
from ghostfunc._run_result import Run, base_factor


class Heads(NamedTuple):
    """Where the heads of a weight are.

    Attributes:
        dim: the dimension that they are along.
        index: `[H, size / H]`, the entries of each head along it.
    """

    dim: int
    index: Tensor


def heads_of(name: str, shape: Sequence[int], pattern: str) -> Heads:
    """Where a pattern puts the heads of a weight.

    Raises:
        ValueError: if the pattern does not fit the weight, or has no axis "head".
    """
    dims = re.findall(r"\([^()]*\)|[^\s()]+", pattern)
    places = [place for place, dim in enumerate(dims) if re.search(r"\bhead\b", dim)]
    what = f"heads[{name!r}] = {pattern!r} for a weight of shape {tuple(shape)}"
    if len(dims) != len(shape) or len(places) != 1:
        raise ValueError(f"{what}: expected {len(shape)} dimensions, one of which has an axis 'head'.")
    (dim,) = places
    axes = [axis.partition("=") for axis in dims[dim].strip("()").split()]
    sizes = {axis: int(size) for axis, _, size in axes if size}
    names = [axis for axis, _, _ in axes]
    others = " ".join(axis for axis in names if axis != "head")
    try:
        index = rearrange(torch.arange(shape[dim]), f"({' '.join(names)}) -> head ({others})", **sizes)
    except EinopsError as error:
        raise ValueError(f"{what}: {error}") from error
    return Heads(dim, index)


def attention_heads(module: nn.Module) -> dict[str, str]:
    """Patterns for the weights of a module's attention layers, for `heads=`.

    It knows attention with `q_proj`, `k_proj`, `v_proj` and `o_proj` or `out_proj` (Llama, Qwen, Gemma, OPT and many
    more), GPT-2's `c_attn` and `c_proj`, and `nn.MultiheadAttention`. The output projection's bias belongs to no head.

    Args:
        module: the model.

    Returns:
        `{parameter name: pattern}`. Write the patterns of other layers by hand: `"(head=12 k) d"` is a weight
        `[d_out, d_in]` whose rows are 12 heads of k.

    Raises:
        ValueError: if it finds no attention layer.

    Example:
        >>> import torch, ghostfunc as gf
        >>> gf.attention_heads(torch.nn.MultiheadAttention(8, num_heads=2))["out_proj.weight"]
        'd (head=2 k)'
    """
    found: dict[str, str] = {}
    for name, part in module.named_modules():
        prefix = f"{name}." if name else ""
        config = getattr(part, "config", None)
        count = getattr(part, "num_heads", None) or getattr(config, "num_attention_heads", None)
        if not isinstance(count, int):
            continue
        fewer = getattr(config, "num_key_value_heads", None) or count
        if isinstance(part, nn.MultiheadAttention):
            found |= {
                f"{prefix}in_proj_weight": f"(qkv=3 head={count} k) d",
                f"{prefix}in_proj_bias": f"(qkv=3 head={count} k)",
                f"{prefix}out_proj.weight": f"d (head={count} k)",
            }
            for letter in "qkv":
                found[f"{prefix}{letter}_proj_weight"] = f"(head={count} k) d"
        elif hasattr(part, "c_attn") and hasattr(part, "c_proj"):
            found |= {
                f"{prefix}c_attn.weight": f"d (qkv=3 head={count} k)",
                f"{prefix}c_attn.bias": f"(qkv=3 head={count} k)",
                f"{prefix}c_proj.weight": f"(head={count} k) d",
            }
        elif all(hasattr(part, f"{letter}_proj") for letter in "qkv"):
            for letter, heads in (("q", count), ("k", fewer), ("v", fewer)):
                found[f"{prefix}{letter}_proj.weight"] = f"(head={heads} k) d"
                found[f"{prefix}{letter}_proj.bias"] = f"(head={heads} k)"
            for out in ("o_proj", "out_proj"):
                found[f"{prefix}{out}.weight"] = f"d (head={count} k)"
    names = dict(module.named_parameters())
    found = {name: pattern for name, pattern in found.items() if name in names}
    if not found:
        raise ValueError(
            f"attention_heads: no attention layer that it knows in a {type(module).__name__}. Write the patterns: "
            "{'layer.weight': '(head=12 k) d'}."
        )
    return found


def along_heads(run: Run, name: str, directions: Tensor, heads: Heads, units: int) -> Tensor:
    """Dot products with directions `[k, *shape]`, head by head: `[n, k, H]`."""
    index = heads.index.to(directions.device)
    factors = [base_factor(run, site, run.factors[site], name) for site in run.sites(name) if site in run.factors]
    columns = []
    for rows in index:
        direction = directions.index_select(heads.dim + 1, rows)
        columns.append(_sum([along(_only(f, heads.dim, rows, directions.shape[1:]), direction) for f in factors]))
    return torch.stack([_or_zeros(c, run, units, len(directions)) for c in columns], -1)


def with_samples_heads(run: Run, val: Run, name: str, heads: Heads, units: int) -> Tensor:
    """Dot products with each sample of another run, head by head: `[n, m, H]`."""
    shape = run.leaves[name].shape
    index = heads.index.to(run.leaves[name].device)
    train, others = (
        [base_factor(r, site, r.factors[site], name) for site in r.sites(name) if site in r.factors] for r in (run, val)
    )
    columns = []
    for rows in index:
        ours, theirs = ([_only(f, heads.dim, rows, shape) for f in factors] for factors in (train, others))
        columns.append(_sum([pair(a, b) for a in ours for b in theirs]))
    return torch.stack([_or_zeros(c, run, units, len(val.losses)) for c in columns], -1)


def _sum(tensors: list[Tensor]) -> Tensor | None:
    return torch.stack(tensors).sum(0) if tensors else None


def _or_zeros(column: Tensor | None, run: Run, units: int, count: int) -> Tensor:
    return run.losses.new_zeros(units, count) if column is None else column


def _only(factor: Factor, dim: int, rows: Tensor, shape: Sequence[int]) -> Factor:
    """The factor of some rows of the weight along a dimension."""
    if isinstance(factor, Outer) and len(shape) == 2:
        left, right = factor.left, factor.right
        if dim == 0:
            left = left.index_select(2, rows)
        else:
            right = right.index_select(2, rows)
        return Outer(right, left)
    return Dense(factor.dense(shape).index_select(dim + 1, rows))
