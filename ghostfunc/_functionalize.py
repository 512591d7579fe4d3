"""From a module to a pure function: `functionalize(module, loss) -> (model_fn, params)`.

`model_fn(params, batch) -> losses[B]` runs the module with `torch.func.functional_call`, so that the parameters are
arguments and nothing of the module changes.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from ghostfunc._before_head import before_head, inputs_of
from ghostfunc._interpreter import Interpreter
from ghostfunc._losses import chunked_causal_lm_loss
from ghostfunc._sharded import GatheredAtUse, is_sharded
from ghostfunc._wrapped import check_wrapping, dtypes_of, inner, without_sharding_hooks

LossFn = Callable[[Any, Any], Tensor]
ModelFn = Callable[[dict[str, Tensor], Any], Any]


class _Call(nn.Module):
    """Makes `call(module, batch)` the forward of a module, so that `functional_call` can swap parameters around it."""

    def __init__(self, module: nn.Module, call: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.module = module
        self.call = call

    def forward(self, batch: Any) -> Any:
        return self.call(inner(self.module), batch)


def _default_call(module: nn.Module, batch: Any) -> Any:
    args, kwargs = inputs_of(batch)
    return module(*args, **kwargs)


def functionalize(
    module: nn.Module, loss: LossFn, *, call: Callable[[nn.Module, Any], Any] | None = None
) -> tuple[ModelFn, dict[str, Tensor]]:
    """Turn a module and a per-sample loss into a pure function and its parameters.

    Args:
        module: any `torch.nn.Module`. Its trainable parameters (`requires_grad`) become arguments; frozen ones and
            buffers stay in it. Buffers are cloned for each call, so that a call never changes them.
        loss: `loss(output, batch) -> losses[B]`, one loss per sample, not reduced over the batch.
        call: `call(module, batch) -> output`; by default a dict batch is passed as keywords without `labels` and
            `segments`, a tuple as all but its last element, a tensor as it is. With `chunked_causal_lm_loss` and a
            transformers causal language model, its body is called so, and its head is left to the loss.

    Returns:
        `(model_fn, params)`: `model_fn(params, batch) -> losses[B]`, and the trainable parameters by name, detached
        (they share the module's memory, so an optimizer's step is seen by the next call), tied ones once. Of a module
        in `DistributedDataParallel` the module inside is run, under the wrapped one's names: pass `group=` to calls.
        Parameters that `fully_shard` has sharded stay so, and are gathered at their uses, in the dtype of its policy.

    Raises:
        ValueError: if the module has no trainable parameter.
        NotImplementedError: for a module that is wrapped in `DataParallel`, sharded by the first FSDP, or tensor
            parallel.
        TypeError: for `chunked_causal_lm_loss` without `call` and a module whose logits are not known to be its head's.

    Example:
        >>> import torch, ghostfunc as gf
        >>> model = torch.nn.Linear(4, 3)
        >>> model_fn, params = gf.functionalize(model, gf.classification_loss)
        >>> sorted(params), model_fn(params, (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))).shape
        (['bias', 'weight'], torch.Size([5]))
    """
    check_wrapping(module)
    dtypes = dtypes_of(module)
    if call is None and loss is chunked_causal_lm_loss:
        with _whole(module, dtypes):
            call = before_head(inner(module))
    call = call or _default_call
    wrapper = _Call(module, call)
    prefix = "module."
    params = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("functionalize: the module has no parameter with requires_grad=True, so it has no gradients.")

    frozen = [name for name, p in module.named_parameters() if not p.requires_grad and is_sharded(p)]

    def model_fn(params: dict[str, Tensor], batch: Any) -> Tensor:
        interpreter = Interpreter.current()
        if frozen:
            if interpreter is not None and interpreter.shards is None:
                raise NotImplementedError(
                    f"{frozen[0]} is sharded and frozen, and no parameter of the call is sharded: shard all of the "
                    "module's parameters with fully_shard, or none."
                )
            params = {name: p for name, p in module.named_parameters() if name in frozen} | params
        if dtypes:
            cast = Tensor.to if interpreter is None else interpreter.compute_in
            params = {name: cast(p, dtypes[name]) if name in dtypes else p for name, p in params.items()}
        alone = interpreter is None and any(map(is_sharded, params.values()))
        whole = GatheredAtUse() if alone else nullcontext()
        swapped = {prefix + name: tensor for name, tensor in params.items()}
        swapped |= {prefix + name: buffer.clone() for name, buffer in module.named_buffers()}
        with _checkpointing(module, lambda: _swapped(wrapper, swapped)), whole:
            with _swapped(wrapper, swapped):
                output = wrapper(batch)
            return loss(output, batch)

    return model_fn, params


@contextmanager
def _whole(module: nn.Module, dtypes: dict[str, torch.dtype]) -> Iterator[None]:
    """A sharded module as it computes on every rank, with its own parameters."""
    if not any(map(is_sharded, module.parameters())):
        yield
        return
    cast = {name: p.to(dtypes[name]) for name, p in module.named_parameters() if name in dtypes}
    with without_sharding_hooks(module), _reparametrize_module(module, cast, tie_weights=True), GatheredAtUse():
        yield


@contextmanager
def _swapped(wrapper: _Call, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Parameters and buffers in place of the module's own; recurrent layers get their lists of weights back."""
    lists = [(m, m._flat_weights, m._flat_weight_refs) for m in wrapper.modules() if isinstance(m, nn.RNNBase)]
    try:
        with (
            without_sharding_hooks(wrapper),
            _reparametrize_module(wrapper, tensors, tie_weights=True, strict=False, stack_weights=True),
        ):
            yield
    finally:
        for layer, weights, references in lists:
            layer._flat_weights, layer._flat_weight_refs = weights, references


@contextmanager
def _checkpointing(module: nn.Module, swap: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Activation checkpointing as it was asked for, where the recomputation can run with the same parameters.

    Under the interpreter the backward enters `swap` again, and checkpointing is of the kind that can be recomputed
    there (`use_reentrant=False`). Elsewhere the recomputation would run with the module's own weights, so that nothing
    is checkpointed: the same numbers, in more memory.
    """
    interpreter = Interpreter.current()
    checkpointed = [m for m in module.modules() if m.training and getattr(m, "gradient_checkpointing", False)]
    before = [(m, dict(m.__dict__)) for m in checkpointed]
    if interpreter is not None and not interpreter.nested:
        interpreter.again_in_backward(swap)
        for m in checkpointed:
            how: Any = m._gradient_checkpointing_func
            m._gradient_checkpointing_func = partial(how, use_reentrant=False)  # type: ignore[assignment]
    else:
        for m in checkpointed:
            m.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for m, attributes in before:
            for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):
                m.__dict__.pop(name, None)
                if name in attributes:
                    m.__dict__[name] = attributes[name]
