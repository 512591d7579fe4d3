"""Axes: what a result has an entry for, as a pattern in the spirit of einops, and which parameters a call is about.

    out="layer train val"  ->  {layer: [n, m]}

An axis that is left out is summed over, except "val", which a call's `reduction` reduces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

GROUPS = ("param", "layer")  # axes that are keys of a dict
LayerOf = str | Callable[[str], str]


class Axes(NamedTuple):
    """The axes of a result.

    Attributes:
        out: the pattern as it was given.
        tensor: the axes of its tensors, in order; "sample" is called "train".
        group: "param" or "layer" where the result is a dict, else "".
    """

    out: str
    tensor: tuple[str, ...]
    group: str

    def has(self, name: str) -> bool:
        """Whether an axis is asked for."""
        return name in self.tensor or name == self.group


def parse(out: str, available: Iterable[str], *, needed: str = "") -> Axes:
    """An axes pattern, checked.

    Args:
        out: names of axes, separated by spaces, in any order.
        available: the axes that are possible here; "train" may be called "sample".
        needed: an axis without which the result has no meaning.

    Returns:
        The axes.

    Raises:
        ValueError: for an axis that is unknown or impossible here, that stands twice, or a needed one that is missing.
    """
    available = tuple(available)
    names = tuple("train" if name == "sample" else name for name in out.split())
    shown = ", ".join(f"{name!r} (or 'sample')" if name == "train" else repr(name) for name in available)
    problem = ""
    if unknown := [name for name in names if name not in available]:
        problem = f"{', '.join(map(repr, unknown))} is no axis here"
    elif len(set(names)) != len(names):
        problem = "an axis may stand once"
    elif needed and needed not in names:
        problem = f"{needed!r} must be among the axes"
    elif set(GROUPS) <= set(names):
        problem = "a parameter is in one layer, so that a result is by 'param' or by 'layer'"
    if problem:
        raise ValueError(f"out={out!r}: {problem}; the axes here are {shown}.")
    group = next((name for name in names if name in GROUPS), "")
    return Axes(out, tuple(name for name in names if name not in GROUPS), group)


def block_of(name: str) -> str:
    """The layer of a parameter by its name: up to the first number ("transformer.h.0"), else its module."""
    parts = name.split(".")
    for place, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join(parts[: place + 1])
    return ".".join(parts[:-1]) or name


def layers_by_name(names: Iterable[str], layer_of: LayerOf) -> dict[str, str]:
    """The layer of each parameter.

    Args:
        names: of the parameters.
        layer_of: "" for `block_of`; a regular expression, whose first group (or whole match) is the layer; or a
            function of the name.

    Returns:
        `{name: layer}`.

    Raises:
        ValueError: for a parameter that the expression does not match.
    """
    if callable(layer_of):
        return {name: layer_of(name) for name in names}
    if not layer_of:
        return {name: block_of(name) for name in names}
    found: dict[str, str] = {}
    for name in names:
        match = re.search(layer_of, name)
        if match is None:
            raise ValueError(
                f"layer_of={layer_of!r} matches nothing in the parameter {name!r}. Leave it out with layers=, or widen "
                "the expression."
            )
        found[name] = match.group(1 if match.re.groups else 0)
    return found


def match_layers(layers: str | Iterable[str] | Callable[[str], bool], names: list[str]) -> frozenset[str]:
    """The parameters that a pattern means.

    Args:
        layers: comma-separated name parts, matched at dots ("h.1" is not "h.11"); empty for all; or names; or a
            function of the name.
        names: the parameters' names.

    Returns:
        The names that match.

    Raises:
        ValueError: if a part matches nothing; the message lists the names.
    """
    if callable(layers):
        return frozenset(name for name in names if layers(name))
    if not isinstance(layers, str):
        if unknown := sorted(set(layers) - set(names)):
            raise ValueError(f"layers: {', '.join(unknown)} are not parameters; these are {', '.join(names)}.")
        return frozenset(layers)
    found: set[str] = set()
    for part in (p.strip() for p in layers.split(",") if p.strip()):
        matched = [name for name in names if f".{part}." in f".{name}."]
        if not matched:
            raise ValueError(f"layers: no parameter matches {part!r}; the parameters are {', '.join(names)}.")
        found.update(matched)
    return frozenset(found or names)


def positions_of(batch: Any) -> int:
    """The length of the axis "token", R: the second dimension of the ids, or of the first tensor that has one.

    Raises:
        ValueError: if no tensor of the batch has a second dimension.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    wide = [t for t in tensors if t.dim() >= 2]
    if not wide:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
        raise ValueError(f"the axis 'token' needs a batch with positions, tensors [B, R, ...]; it has shapes {shapes}.")
    ids = [t for t in wide if t.dim() == 2 and not t.is_floating_point()]
    return (ids or wide)[0].shape[1]


def arrange(
    columns: Mapping[str, Tensor], axes: Axes, *, has: tuple[str, ...], scale: float | int = 1, layer_of: LayerOf = ""
) -> Tensor | dict[str, Tensor]:
    """Per-parameter results in the axes that were asked for.

    Args:
        columns: `{name: tensor}`.
        axes: what was asked for; an axis that is left out is summed over.
        has: the axes of the tensors.
        scale: a factor.
        layer_of: the layer of a parameter, as in `layers_by_name`.

    Returns:
        A tensor, or a dict of them.

    Raises:
        ValueError: if parameters with different numbers of heads are to be summed.
    """
    summed = [place for place, name in enumerate(has) if name not in axes.tensor]
    left = [name for name in has if name in axes.tensor]
    order = [left.index(name) for name in axes.tensor]

    def shaped(tensor: Tensor) -> Tensor:
        tensor = tensor.sum(summed) if summed else tensor
        return (tensor * scale if scale != 1 else tensor).permute(order)

    shapes = {tuple(t.shape): name for name, t in columns.items()}
    if len(shapes) > 1 and axes.group != "param":
        counts = ", ".join(f"{name}: {shape[has.index('head')]}" for shape, name in shapes.items())
        raise ValueError(
            f"out={axes.out!r}: parameters with different numbers of heads ({counts}) cannot be summed. Choose some "
            "with layers=, or add the axis 'param'."
        )
    if axes.group == "param":
        return {name: shaped(tensor) for name, tensor in columns.items()}
    if axes.group == "layer":
        groups: dict[str, list[Tensor]] = {}
        for name, layer in layers_by_name(columns, layer_of).items():
            groups.setdefault(layer, []).append(columns[name])
        return {layer: shaped(torch.stack(tensors).sum(0)) for layer, tensors in groups.items()}
    return shaped(torch.stack(list(columns.values())).sum(0))
