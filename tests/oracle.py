"""The reference of the tests: a loop over single samples with `torch.autograd.grad`, independent of ghostfunc.

Errors are relative: of a dot product |d - d*| / (|g_i| |V|), of a gradient |G - G*| / |G*|.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def size(batch: Any) -> int:
    """Number of samples of a batch."""
    return pytree.tree_leaves(batch)[0].shape[0]


def as_double(tree: Any) -> Any:
    """The same values in float64; integer tensors stay as they are."""
    return pytree.tree_map(lambda t: t.double() if t.is_floating_point() else t, tree)


def losses_and_grads(
    model_fn: Callable[..., Tensor], params: dict[str, Tensor], batch: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """`(losses [B], {name: [B, *shape]})`, one sample at a time."""
    losses, rows = [], []
    for i in range(size(batch)):
        leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
        loss = model_fn(leaves, pytree.tree_map(lambda t, i=i: t[i : i + 1], batch))
        assert loss.shape == (1,), f"the case's model_fn returned {tuple(loss.shape)} for one sample"
        losses.append(loss.detach()[0])
        if loss.requires_grad:
            grads = torch.autograd.grad(loss[0], list(leaves.values()), allow_unused=True)
        else:
            grads = [None] * len(leaves)
        rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(leaves.values(), grads, strict=True)])
    return torch.stack(losses), {name: torch.stack([row[k] for row in rows]) for k, name in enumerate(params)}


def per_sample_grads(model_fn: Callable[..., Tensor], params: dict[str, Tensor], batch: Any) -> dict[str, Tensor]:
    """`{name: [B, *shape]}`, one sample at a time."""
    return losses_and_grads(model_fn, params, batch)[1]


def mean(per_sample: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of the mean loss."""
    return {name: g.mean(0) for name, g in per_sample.items()}


def _rows(grads: dict[str, Tensor], lead: int) -> Tensor:
    return torch.cat([g.flatten(lead) if g.dim() > lead else g.unsqueeze(-1) for g in grads.values()], -1).double()


def dots(train: dict[str, Tensor], direction: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """`(<g_i, V> [n], |g_i| |V| [n])`."""
    g, v = _rows(train, 1), _rows(direction, 0)
    return g @ v, g.norm(dim=1) * v.norm()


def matrix(train: dict[str, Tensor], val: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """`(<g_i, g_j> [n, m], |g_i| |g_j| [n, m])`."""
    g, v = _rows(train, 1), _rows(val, 1)
    return g @ v.T, g.norm(dim=1)[:, None] * v.norm(dim=1)


def expected(out: str, train: dict[str, Tensor], val: dict[str, Tensor]) -> Any:
    """What `out` stands for, each value with the scale that its error is measured by."""
    if out == "train":
        return dots(train, mean(val))
    if out == "train val":
        return matrix(train, val)
    if out == "param train":
        return {name: dots({name: train[name]}, {name: val[name].mean(0)}) for name in train}
    assert out == "param train val"
    return {name: matrix({name: train[name]}, {name: val[name]}) for name in train}


def assert_dots(actual: Tensor, reference: tuple[Tensor, Tensor], tolerance: float, what: str) -> None:
    """Compare dot products; where a gradient is zero, the dot product has to be exactly zero."""
    value, scale = reference
    assert isinstance(actual, torch.Tensor), f"{what}: {type(actual).__name__} instead of a tensor"
    assert actual.shape == value.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(value.shape)}"
    assert not actual.requires_grad, f"{what}: the result still hangs on a graph"
    error = (actual.double() - value).abs()
    assert (error <= tolerance * scale).all(), (
        f"{what}: relative error {(error / scale.clamp(min=1e-300)).max():.2e} > {tolerance:.0e}\n"
        f"got {actual}\nexpected {value}"
    )


def assert_dots_by_name(
    actual: dict[str, Tensor], reference: dict[str, tuple[Tensor, Tensor]], tolerance: float, what: str
) -> None:
    """The same for each parameter, with its own norms as the scale."""
    assert list(actual) == list(reference), f"{what}: parameters {list(actual)}, expected {list(reference)}"
    for name, pair in reference.items():
        assert_dots(actual[name], pair, tolerance, f"{what} of {name}")


def assert_grads(actual: dict[str, Tensor], reference: dict[str, Tensor], tolerance: float, what: str) -> None:
    """Compare gradients, parameter by parameter."""
    assert list(actual) == list(reference), f"{what}: parameters {list(actual)}, expected {list(reference)}"
    for name, g in reference.items():
        assert actual[name].shape == g.shape, f"{what} of {name}: {tuple(actual[name].shape)} for {tuple(g.shape)}"
        assert not actual[name].requires_grad, f"{what} of {name} still hangs on a graph"
        error, scale = (actual[name].double() - g.double()).norm(), g.double().norm()
        assert error <= tolerance * scale, f"{what} of {name}: relative error {error / scale:.2e} > {tolerance:.0e}"
