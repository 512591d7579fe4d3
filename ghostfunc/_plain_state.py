"""State as JSON and tensors, so that reading it runs no code: a tensor's place in the JSON holds its name.

What JSON cannot tell apart is tagged: `{"$tuple": [...]}`, `{"$dict": [[key, value], ...]}` for keys that are not text,
`{"$Counter": ...}`, and `{"$tensor": name, "shape": [...], "dtype": ...}`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

_TENSOR, _TUPLE, _DICT, _COUNTER = "$tensor", "$tuple", "$dict", "$Counter"


class TensorAt(NamedTuple):
    """What the JSON says about a tensor that is stored beside it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def as_json(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON.

    Args:
        value: numbers, text, booleans, None and tensors, in dicts, lists, tuples and Counters.
        place: what it is, for names and messages.
        tensors: its tensors are added, each under its place.

    Raises:
        TypeError: if there is anything else in it; the message names the place.

    Example:
        >>> found = {}
        >>> as_json({"lr": 0.1, "betas": (0.9, 0.95), "m": torch.ones(2)}, "optimizer", found)
        {'lr': 0.1, 'betas': {'$tuple': [0.9, 0.95]}, 'm': {'$tensor': 'optimizer/m', 'shape': [2], 'dtype': 'float32'}}
        >>> found
        {'optimizer/m': tensor([1., 1.])}
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors[place] = value.detach()
        return {_TENSOR: place, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, (list, tuple)):
        items = [as_json(item, f"{place}/{number}", tensors) for number, item in enumerate(value)]
        return items if isinstance(value, list) else {_TUPLE: items}
    if isinstance(value, dict):
        if not isinstance(value, Counter) and all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: as_json(item, f"{place}/{key}", tensors) for key, item in value.items()}
        pairs = [
            [as_json(key, f"{place}/key", tensors), as_json(item, f"{place}/{key}", tensors)]
            for key, item in value.items()
        ]
        return {_COUNTER if isinstance(value, Counter) else _DICT: pairs}
    raise TypeError(
        f"a checkpoint cannot hold {place}, a {type(value).__module__}.{type(value).__qualname__}: it takes numbers, "
        "text, None and tensors, in dicts, lists and tuples, because reading anything else back can run code."
    )


def from_json(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value of which `as_json` made this JSON, with these tensors by name."""
    if isinstance(value, list):
        return [from_json(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(from_json(value[_TUPLE], tensors))
    for tag, kind in ((_DICT, dict), (_COUNTER, Counter)):
        if tag in value:
            return kind({from_json(key, tensors): from_json(item, tensors) for key, item in value[tag]})
    return {key: from_json(item, tensors) for key, item in value.items()}


def tensors_in(value: Any) -> Iterator[TensorAt]:
    """The tensors that a JSON of `as_json` needs."""
    if isinstance(value, list):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict) and _TENSOR in value:
        yield TensorAt(value[_TENSOR], tuple(value["shape"]), getattr(torch, value["dtype"]))
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
