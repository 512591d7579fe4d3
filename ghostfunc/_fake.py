"""Fake tensors: parameters and batches with shapes and no values, so that a model of any size can be followed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree


def fake_mode(tensors: Iterable[Tensor]) -> FakeTensorMode | None:
    """The mode in which operations on these run without values; None where all of them have values.

    Tensors on the meta device get a mode of their own, in which all of them are on the CPU.
    """
    for tensor in tensors:
        if isinstance(tensor, FakeTensor):
            return tensor.fake_mode
        if tensor.device.type == "meta":
            return _FromMeta(allow_non_fake_inputs=True)
    return None


def new_mode() -> FakeTensorMode:
    """A mode in which a model's own tensors (buffers, frozen parameters) may have values."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def as_fake(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """A tensor as the mode wants it: without a graph, and without values."""
    if isinstance(tensor, FakeTensor):
        return tensor.detach()
    if not tensor.is_meta:
        return mode.from_tensor(tensor.detach())
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


class _FromMeta(FakeTensorMode):
    """Takes tensors of the meta device, a module's own among them, for tensors of the CPU: no kernels are for meta."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, self._on_cpu, (args, kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _on_cpu(self, tensor: Tensor) -> Tensor:
        return as_fake(self, tensor) if type(tensor) is Tensor and tensor.is_meta else tensor
