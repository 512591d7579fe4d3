"""The dense reference: per-sample gradients by `vmap(grad)`, at B x numel of memory. Everything is compared with it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.func import grad, vmap
from torch.utils import _pytree as pytree

from ghostfunc._functionalize import ModelFn
from ghostfunc._sharded import is_sharded


def refuse_sharded(what: str, params: Mapping[str, Tensor]) -> None:
    """Raise for sharded parameters, which the dense reference is not for."""
    if sharded := [name for name, p in params.items() if is_sharded(p)]:
        raise NotImplementedError(
            f"{what}: {sharded[0]} is sharded, and the reference has whole per-sample gradients, made by one rank "
            "alone. Call it with unsharded parameters, {name: p.full_tensor()} of a model that is small enough."
        )


def per_sample_grad(
    model_fn: ModelFn, params: dict[str, Tensor], batch: Any, *, randomness: str = "error"
) -> dict[str, Tensor]:
    """Per-sample gradients by `vmap(grad)`: the oracle.

    Args:
        model_fn: `model_fn(params, batch) -> losses[B]`.
        params: parameters by name.
        batch: a pytree of tensors `[B, ...]`.
        randomness: as in `torch.func.vmap`; "error" refuses dropout, whose masks would differ from a batched call's.

    Returns:
        `{name: [B, *shape]}`, the gradient of each sample's own loss (not divided by B).

    Raises:
        NotImplementedError: for sharded parameters.

    Example:
        >>> import torch, ghostfunc as gf
        >>> model_fn, params = gf.functionalize(torch.nn.Linear(4, 3), gf.classification_loss)
        >>> grads = gf.per_sample_grad(model_fn, params, (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])))
        >>> grads["weight"].shape
        torch.Size([5, 3, 4])
    """

    def sample_loss(params: dict[str, Tensor], sample: Any) -> Tensor:
        losses = model_fn(params, pytree.tree_map(lambda t: t.unsqueeze(0), sample))
        return losses.squeeze(0)

    refuse_sharded("per_sample_grad", params)
    params = {name: p.detach() for name, p in params.items()}
    return vmap(grad(sample_loss), in_dims=(None, 0), randomness=randomness)(params, batch)
