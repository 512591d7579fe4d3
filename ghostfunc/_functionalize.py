"""From a module to a pure function: `functionalize(module, loss) -> (model_fn, params)`.

`model_fn(params, batch) -> losses[B]` runs the module with `torch.func.functional_call`, so that the parameters are
arguments and nothing of the module changes.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

LossFn = Callable[[Any, Any], Tensor]
ModelFn = Callable[[dict[str, Tensor], Any], Any]


class _Call(nn.Module):
    """Makes `call(module, batch)` the forward of a module, so that `functional_call` can swap parameters around it."""

    def __init__(self, module: nn.Module, call: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.module = module
        self.call = call

    def forward(self, batch: Any) -> Any:
        return self.call(self.module, batch)


def _default_call(module: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return module(**{key: value for key, value in batch.items() if key != "labels"})
    if isinstance(batch, (tuple, list)):
        return module(*batch[:-1])
    return module(batch)


def functionalize(
    module: nn.Module, loss: LossFn, *, call: Callable[[nn.Module, Any], Any] | None = None
) -> tuple[ModelFn, dict[str, Tensor]]:
    """Turn a module and a per-sample loss into a pure function and its parameters.

    Args:
        module: any `torch.nn.Module`. Its trainable parameters (`requires_grad`) become arguments; frozen ones and
            buffers stay in it. Buffers are cloned for each call, so that a call never changes them.
        loss: `loss(output, batch) -> losses[B]`, one loss per sample, not reduced over the batch.
        call: `call(module, batch) -> output`; by default a dict batch is passed as keywords without `labels`, a tuple
            as all but its last element, a tensor as it is.

    Returns:
        `(model_fn, params)`: `model_fn(params, batch) -> losses[B]`, and the trainable parameters by name, detached
        (they share the module's memory, so an optimizer's step is seen by the next call), tied ones once.

    Raises:
        ValueError: if the module has no trainable parameter.
        RuntimeError: by `model_fn`, if the module has activation checkpointing switched on: its recomputation would
            run with the module's own weights instead of `params`.

    Example:
        >>> import torch, ghostfunc as gf
        >>> model = torch.nn.Linear(4, 3)
        >>> model_fn, params = gf.functionalize(model, gf.classification_loss)
        >>> sorted(params), model_fn(params, (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))).shape
        (['bias', 'weight'], torch.Size([5]))
    """
    wrapper = _Call(module, call or _default_call)
    prefix = "module."
    params = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("functionalize: the module has no parameter with requires_grad=True, so it has no gradients.")

    def model_fn(params: dict[str, Tensor], batch: Any) -> Tensor:
        _refuse_checkpointing(module)
        swapped = {prefix + name: tensor for name, tensor in params.items()}
        swapped |= {prefix + name: buffer.clone() for name, buffer in module.named_buffers()}
        with _recurrent_layers_as_they_were(module):
            return loss(functional_call(wrapper, swapped, (batch,)), batch)

    return model_fn, params


@contextmanager
def _recurrent_layers_as_they_were(module: nn.Module) -> Iterator[None]:
    """Put back the lists of weights of recurrent layers: `functional_call` leaves the swapped tensors in them."""
    lists = [(m, m._flat_weights, m._flat_weight_refs) for m in module.modules() if isinstance(m, nn.RNNBase)]
    try:
        yield
    finally:
        for layer, weights, references in lists:
            layer._flat_weights, layer._flat_weight_refs = weights, references


def _refuse_checkpointing(module: nn.Module) -> None:
    for name, submodule in module.named_modules():
        if submodule.training and getattr(submodule, "gradient_checkpointing", False):
            raise RuntimeError(
                f"activation checkpointing is switched on in {name or 'the module'!r}: its recomputation runs with the "
                "module's own weights, not with params, and gradients would be silently wrong. Switch it off "
                "(gradient_checkpointing_disable() on a transformers model) before the call."
            )
