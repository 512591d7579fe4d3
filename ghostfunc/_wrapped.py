"""Wrapped modules: what `DistributedDataParallel` and `fully_shard` do in a forward, and a pure function must not.

Their forward hooks install parameters of their own, or prepare a backward that never comes; ghostfunc gathers sharded
parameters at their uses and reduces gradients itself. The dtypes of FSDP2's mixed precision policy stay.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils import _pytree as pytree

from ghostfunc._sharded import is_sharded


def inner(module: nn.Module) -> nn.Module:
    """The module that computes: without `DistributedDataParallel` around it."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def check_wrapping(module: nn.Module) -> None:
    """Raise for a module that is wrapped in a way that does not go with pure functions; free what FSDP2 has gathered.

    Raises:
        NotImplementedError: for `DataParallel`, the first FSDP, or tensor parallel modules.
    """
    if isinstance(module, DataParallel):
        raise NotImplementedError(
            "functionalize: DataParallel copies the module to every device in each forward. Pass the module in it "
            "(module.module), and a process for each device with group=."
        )
    for name, child in module.named_modules():
        if type(child).__name__ == "FullyShardedDataParallel":
            raise NotImplementedError(
                f"functionalize: {name or 'the module'} is a FullyShardedDataParallel, which flattens its parameters "
                "into one. Use torch.distributed.fsdp.fully_shard, which keeps them apart."
            )
        hooks = [*child._forward_pre_hooks.values(), *child._forward_hooks.values()]
        if any(getattr(hook, "__module__", "").startswith("torch.distributed.tensor") for hook in hooks):
            raise NotImplementedError(
                f"functionalize: {name or 'the module'} is tensor parallel (parallelize_module, distribute_module): "
                "its activations are split within a sample, so that no rank has a sample's factors. Shard it with "
                "fully_shard over all these ranks instead: its parameters take as little memory, and every rank has "
                "samples of its own."
            )
    _reshard(module)


def _reshard(module: nn.Module) -> None:
    """Free what FSDP2 has gathered: a forward without a backward leaves the root's parameters whole in the module."""
    for child in module.modules():
        if _state_of(child) is not None and (reshard := getattr(child, "reshard", None)) is not None:
            reshard()


def _state_of(module: nn.Module) -> Any:
    """What FSDP2 keeps of a module; None for any other."""
    if "torch.distributed.fsdp._fully_shard._fsdp_state" not in sys.modules:
        return None
    return sys.modules["torch.distributed.fsdp._fully_shard._fsdp_state"]._get_module_fsdp_state(module)


def dtypes_of(module: nn.Module) -> dict[str, torch.dtype]:
    """In which dtype FSDP2's policies gather parameters, by their names; those that keep their own are not there."""
    found: dict[str, torch.dtype | None] = {}
    for prefix, child in module.named_modules():
        state = _state_of(child)
        if state is not None:  # parents come first, and their children's policies go before theirs
            sharded = [name for name, p in child.named_parameters(prefix) if is_sharded(p)]
            found |= dict.fromkeys(sharded, state._mp_policy.param_dtype)
    return {name: dtype for name, dtype in found.items() if dtype is not None}


@contextmanager
def without_sharding_hooks(module: nn.Module) -> Iterator[None]:
    """FSDP2's hooks replaced by what they do to dtypes alone, for the time of a forward."""
    changed: list[tuple[dict, OrderedDict]] = []
    _reshard(module)
    try:
        for child in module.modules():
            if (state := _state_of(child)) is None:
                continue
            policy = state._mp_policy
            before = policy.param_dtype if policy.cast_forward_inputs else None
            for hooks, stand_in in ((child._forward_pre_hooks, _casting_inputs(before)),
                                    (child._forward_hooks, _casting_outputs(policy.output_dtype))):  # fmt: skip
                changed.append((hooks, OrderedDict(hooks)))
                for key, hook in hooks.items():
                    if _is_method_of(state, hook):
                        hooks[key] = stand_in
        yield
    finally:
        for hooks, original in reversed(changed):
            hooks.clear()
            hooks.update(original)


def _is_method_of(state: Any, hook: Any) -> bool:
    """Whether a hook is a method of FSDP2's state, with wrappers around it or not."""
    while hook is not None and getattr(hook, "__self__", None) is not state:
        hook = getattr(hook, "__wrapped__", None)
    return hook is not None


def _casting_inputs(dtype: torch.dtype | None) -> Callable:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return (args, kwargs) if dtype is None else _cast((args, kwargs), dtype)

    return hook


def _casting_outputs(dtype: torch.dtype | None) -> Callable:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return None if dtype is None else _cast(output, dtype)

    return hook


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, tree)
