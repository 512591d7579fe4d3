"""The parameters of a model as an optimizer holds them: settings, state and learning rate, by the gradients' names."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_WRAPPERS = {"module", "_orig_mod"}  # of DistributedDataParallel and of torch.compile, in parameters' names


class Held(NamedTuple):
    """A parameter as its optimizer holds it.

    Attributes:
        name: in the gradients.
        parameter: the optimizer's own tensor, detached.
        group: its parameter group.
        state: what the optimizer keeps of it; empty before its first step.
        rate: its learning rate over that of the first group.
        ascent: -1 where the optimizer maximizes, and so sees the negated gradient, else 1.
    """

    name: str
    parameter: Tensor
    group: Mapping[str, Any]
    state: Mapping[str, Any]
    rate: float
    ascent: int

    @property
    def step(self) -> int:
        """The number of the next step, from 1."""
        return int(self.state["step"]) + 1 if self.state else 1

    def before(self, key: str, shape: Iterable[int]) -> Tensor:
        """A moment in the state as the step finds it, at least float32; zeros before the first step."""
        dtype = torch.promote_types(self.parameter.dtype, torch.float32)
        if self.state:
            return self.state[key].to(dtype)
        return self.parameter.new_zeros(tuple(shape), dtype=dtype)


class OfOptimizer:
    """Finds parameters by name in an optimizer of one of the given classes."""

    def __init__(self, optimizer: Optimizer, model: nn.Module, what: str, classes: Iterable[type[Optimizer]]) -> None:
        self._optimizer, self._model, self._what = optimizer, model, what
        kind = type(optimizer)
        if not any(issubclass(kind, of) and inspect.unwrap(kind.step) is inspect.unwrap(of.step) for of in classes):
            raise TypeError(
                f"gf.{what}: cannot tell what a step of {kind.__module__}.{kind.__qualname__} does; possible are "
                f"{', '.join(f'torch.optim.{of.__name__}' for of in classes)} and subclasses that keep their step. "
                "Other preconditioners: gf.adam, gf.adafactor, gf.diagonal, or a function of your own from a gradient "
                "dict to a gradient dict."
            )

    def held(self, direction: Mapping[str, Tensor]) -> Iterator[tuple[Held, Tensor]]:
        """Each parameter of the direction, with its entry."""
        groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        first = float(self._optimizer.param_groups[0]["lr"])
        for name, p in self._parameters(direction).items():
            if id(p) not in groups:
                raise ValueError(
                    f"gf.{self._what}: the optimizer does not hold {name!r} of shape {tuple(p.shape)}, so its step "
                    "leaves it as it is. Freeze it before functionalize, or add it to a parameter group."
                )
            if direction[name].shape != p.shape:
                raise ValueError(
                    f"gf.{self._what}: {name!r} has shape {tuple(direction[name].shape)} in the gradient, "
                    f"{tuple(p.shape)} in the model."
                )
            group, state = groups[id(p)], self._optimizer.state.get(p, {})
            rate, ascent = self._rate(float(group["lr"]), first), -1 if group["maximize"] else 1
            yield Held(name, p.detach(), group, state, rate, ascent), direction[name]

    def _parameters(self, names: Iterable[str]) -> dict[str, Tensor]:
        given = dict(self._model.named_parameters(remove_duplicate=False))
        if all(name in given for name in names):
            return {name: given[name] for name in names}
        bare: dict[str, list[Tensor]] = {}
        for name, p in given.items():
            same = bare.setdefault(_bare(name), [])
            if all(p is not other for other in same):
                same.append(p)
        missing = [name for name in names if _bare(name) not in bare]
        if missing:
            raise ValueError(
                f"gf.{self._what}: the model has no parameter {', '.join(missing)}; it has {', '.join(given)}. Give "
                "the model whose parameters these are."
            )
        for name in names:
            if len(bare[_bare(name)]) > 1:
                raise ValueError(
                    f"gf.{self._what}: {name!r} may be several parameters of the model, which differ in a wrapper's "
                    "prefix only. Give the module that functionalize was given."
                )
        return {name: bare[_bare(name)][0] for name in names}

    def _rate(self, lr: float, first: float) -> float:
        if lr == first:
            return 1.0
        if first == 0:
            raise ValueError(
                f"gf.{self._what}: the first parameter group has learning rate 0 and another has {lr}; values are in "
                "units of the first group's. Put a group that learns first."
            )
        return lr / first

    def gradient(self, held: Held, mean_gradient: Mapping[str, Tensor]) -> Tensor:
        """The mean train gradient of a parameter as the optimizer sees it."""
        if held.name not in mean_gradient:
            raise ValueError(f"gf.{self._what}: the mean train gradient has no entry for {held.name!r}.")
        gradient = held.ascent * mean_gradient[held.name]
        return gradient.to(torch.promote_types(gradient.dtype, torch.float32))


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
