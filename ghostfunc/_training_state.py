"""The states of a model and of its optimizer by the parameters' names, and where they go when they are loaded.

The names are those of the bare module, whatever wraps it, so that a run may go on under another wrapper.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ghostfunc._plain_state import tensors_in
from ghostfunc._wrapped import inner

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")


def _bare(module: nn.Module) -> nn.Module:
    """The module inside of `torch.compile` and `DistributedDataParallel`."""
    while (unwrapped := getattr(inner(module), "_orig_mod", inner(module))) is not module:
        module = unwrapped
    return module


def _name_of(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


class ModelState:
    """The parameters and buffers of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def get(self) -> dict[str, Any]:
        """The model's own tensors by name, tied ones once; sharded ones as `DTensor`s."""
        doubles = self._doubles()
        return {name: value for name, value in get_model_state_dict(self.model).items() if name not in doubles}

    def targets(self, stored: dict[str, Any], where: str) -> dict[str, Tensor]:
        """The tensors that a stored state is to be read into, by the names that it has for them.

        Raises:
            ValueError: if it is the state of another model.
        """
        own = self.get()
        if own.keys() != stored.keys():
            raise ValueError(
                f"{where} is of another model: only there: {_listed(stored.keys() - own.keys())}; only in this one: "
                f"{_listed(own.keys() - stored.keys())}."
            )
        targets = {}
        for name, value in own.items():
            for at in tensors_in(stored[name]):
                if not isinstance(value, Tensor):  # a part of a module's extra state
                    targets[at.name] = torch.empty(at.shape, dtype=at.dtype)
                elif (tuple(value.shape), value.dtype) == (at.shape, at.dtype):
                    targets[at.name] = value.detach()
                else:
                    raise ValueError(
                        f"{where} is of another model: {name} is {list(at.shape)} {at.dtype} there, and "
                        f"{list(value.shape)} {value.dtype} in this one."
                    )
        return targets

    def set(self, state: dict[str, Any]) -> None:
        """Take a state over."""
        doubles = self._doubles()
        set_model_state_dict(self.model, {**state, **{name: state[first] for name, first in doubles.items()}})

    def _doubles(self) -> dict[str, str]:
        """The further names of tied tensors, each with the first one."""
        first: dict[int, str] = {}
        module = _bare(self.model)
        found = {}
        persistent = get_model_state_dict(self.model).keys()
        for tensors in (module.named_parameters, module.named_buffers):
            for name, tensor in tensors(remove_duplicate=False):
                name = _name_of(name)
                if name in persistent and first.setdefault(id(tensor), name) != name:
                    found[name] = first[id(tensor)]
        return found


class OptimizerState:
    """The state of an optimizer, with its parameters by name.

    `torch.distributed.checkpoint.state_dict` has functions for this, which take a step with gradients of zero wherever
    there is no state yet: a run that saves before its first step would count one too many. This one reads and writes
    `Optimizer.state_dict` alone.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module) -> None:
        self.optimizer = optimizer
        self.model = model

    def get(self) -> dict[str, Any]:
        """`Optimizer.state_dict()` with names for numbers.

        Raises:
            ValueError: if a parameter is not the model's.
            NotImplementedError: for sharded tensors of another shape than their parameter's.
        """
        names, stored = self._names(), self.optimizer.state_dict()
        groups = [{**group, "params": [names[i] for i in group["params"]]} for group in stored["param_groups"]]
        state = {names[i]: of_param for i, of_param in stored["state"].items()}
        for name, param in self._params().items():
            for key, value in state.get(name, {}).items():
                if isinstance(value, DTensor) and value.shape != param.shape:
                    raise NotImplementedError(
                        f"the optimizer's {key} of {name} is sharded, and has another shape, {list(value.shape)}, than "
                        f"the parameter, {list(param.shape)}: how to shard it when it is loaded is not known."
                    )
        return {"param_groups": groups, "state": state}

    def targets(self, stored: dict[str, Any], where: str) -> dict[str, Tensor]:
        """New tensors that a stored state is to be read into, sharded as the parameters are.

        Raises:
            ValueError: if it is the state of an optimizer with other parameters.
        """
        names = self._names()
        order = iter(range(len(names)))
        own = [[names[next(order)] for _ in group["params"]] for group in self.optimizer.param_groups]
        there = [group["params"] for group in stored["param_groups"]]
        if own != there:
            raise ValueError(
                f"{where} is of an optimizer with other parameter groups: {_groups(there)} there, and {_groups(own)} "
                "in this one."
            )
        targets = {at.name: torch.empty(at.shape, dtype=at.dtype) for at in tensors_in(stored["param_groups"])}
        params = self._params()
        for name, of_param in stored["state"].items():
            for at in tensors_in(of_param):
                like = at.shape and at.shape == tuple(params[name].shape)
                targets[at.name] = (
                    torch.empty_like(params[name], dtype=at.dtype, requires_grad=False)
                    if like
                    else torch.empty(at.shape, dtype=at.dtype)
                )
        return targets

    @torch.no_grad()
    def set(self, state: dict[str, Any]) -> None:
        """Take a state over, in its own dtypes."""
        numbers = {name: i for i, name in enumerate(self._names())}
        groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]]
        of_params = {numbers[name]: of_param for name, of_param in state["state"].items()}
        self.optimizer.load_state_dict({"param_groups": groups, "state": of_params})
        params = self._params()
        for name, of_param in state["state"].items():
            taken = self.optimizer.state[params[name]]
            for key, value in of_param.items():
                # load_state_dict gives every state its parameter's dtype: float32 moments of bfloat16 ones are cut.
                if isinstance(value, Tensor) and taken[key].dtype != value.dtype:
                    taken[key] = value.to(taken[key].device)

    def _params(self) -> dict[str, nn.Parameter]:
        return {_name_of(name): param for name, param in _bare(self.model).named_parameters()}

    def _names(self) -> list[str]:
        """The names of the optimizer's parameters, in the order of its numbers."""
        of = {param: name for name, param in self._params().items()}
        ordered = [param for group in self.optimizer.param_groups for param in group["params"]]
        if strangers := [list(param.shape) for param in ordered if param not in of]:
            raise ValueError(
                f"the optimizer has parameters that the model does not have, of shapes {strangers[:8]}. Build it from "
                "the model's, after fully_shard; put modules that are trained together into one nn.ModuleDict."
            )
        return [of[param] for param in ordered]


def _listed(names: Any) -> str:
    names = sorted(names)
    return (", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")) or "nothing"


def _groups(groups: list[list[str]]) -> str:
    return " / ".join(f"{len(names)} from {names[0]} on" if names else "none" for names in groups)
