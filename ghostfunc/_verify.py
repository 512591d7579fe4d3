"""`verify`: a model's dot products, norms and gradients held against the dense oracle, parameter by parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ghostfunc._axes import match_layers
from ghostfunc._batch import batch_size, plain
from ghostfunc._call import Params
from ghostfunc._errors import InteractingSamples, VerificationError
from ghostfunc._functionalize import ModelFn
from ghostfunc._oracle import per_sample_grad, refuse_sharded
from ghostfunc._transforms import ghost_factors, ghost_grad_dot, value_and_grad_dot

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@dataclass(frozen=True)
class ParameterCheck:
    """Errors of one parameter, relative to ‖g_i‖ ‖V‖ for a dot product, to the oracle's norm for norms and gradients.

    Attributes:
        uses: the number of uses; 0 for a parameter that the losses do not depend on.
        dots: the greatest error of a dot product.
        norms: the greatest error of a norm.
        grads: the error of the mean gradient.
    """

    uses: int
    dots: float
    norms: float
    grads: float

    @property
    def worst(self) -> float:
        """The greatest of the errors."""
        return max(self.dots, self.norms, self.grads)


@dataclass(frozen=True)
class Report:
    """What `verify` measured; print it.

    Attributes:
        samples: the number of samples.
        tolerance: the relative error allowed.
        interaction: the greatest change of a sample's loss, relative, when it is computed alone.
        parameters: the errors by parameter.
        oracle: how the reference was computed.
    """

    samples: int
    tolerance: float
    interaction: float
    parameters: dict[str, ParameterCheck]
    oracle: str

    @property
    def worst(self) -> float:
        """The greatest error of all."""
        return max((check.worst for check in self.parameters.values()), default=0.0)

    def __str__(self) -> str:
        width = max(len("parameter"), *(len(name) for name in self.parameters))
        lines = [
            f"{self.samples} samples against the oracle ({self.oracle}), relative errors, {self.tolerance:.0e} allowed",
            f"{'parameter':<{width}}  uses     dots    norms    grads",
        ]
        for name, check in self.parameters.items():
            note = "" if check.uses else "  unused"
            lines.append(
                f"{name:<{width}}  {check.uses:>4}  {check.dots:.1e}  {check.norms:.1e}  {check.grads:.1e}{note}"
            )
        lines.append(f"a sample's loss alone differs from its loss in the batch by {self.interaction:.1e}")
        return "\n".join(lines)


def verify(
    model_fn: ModelFn,
    params: Params,
    batch: Any,
    *,
    tolerance: float | None = None,
    layers: str | Callable[[str], bool] = "",
    on_unsupported: str = "raise",
) -> Report:
    """Hold ghostfunc's numbers for a model and a batch against per-sample gradients computed one by one.

    Dot products (with the mean gradient of the batch), norms and the mean gradient are compared for each parameter,
    and each sample's loss with its loss alone. Memory is B times the parameters: use a small batch, and float64 to tell
    rounding from error.

    Args:
        model_fn: `model_fn(params, batch) -> losses[B]`, without randomness (put the module in eval mode).
        params: parameters by name.
        batch: a pytree of tensors `[B, ...]`, two samples or more.
        tolerance: the relative error allowed; by default 1e-10 in float64 and 1e-5 in float32.
        layers: restricts the comparison, as in `ghost_grad_dot`.
        on_unsupported: as in `ghost_grad_dot`.

    Returns:
        A report that prints as a table.

    Raises:
        VerificationError: naming the parameter and the quantity that differ.
        InteractingSamples: if a sample's loss alone is not its loss in the batch.
        UnsupportedUse: as in `ghost_grad_dot`.
        RuntimeError: if `model_fn` draws random numbers.
        NotImplementedError: for sharded parameters.

    Example:
        >>> import torch, ghostfunc as gf
        >>> model_fn, params = gf.functionalize(torch.nn.Linear(4, 3).double(), gf.classification_loss)
        >>> batch = (torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1]))
        >>> gf.verify(model_fn, params, batch).worst < 1e-10
        True
    """
    refuse_sharded("verify", params)
    batch = plain(batch)
    samples = batch_size(batch, "given")
    names = [name for name in params if name in match_layers(layers, list(params))]
    dtype = torch.float64 if all(p.dtype == torch.float64 for p in params.values()) else torch.float32
    allowed = _TOLERANCE[dtype] if tolerance is None else tolerance

    result = value_and_grad_dot(
        model_fn, params, batch, batch, out="param train", layers=layers, on_unsupported=on_unsupported,
        randomness="error",
    )  # fmt: skip
    dots_alone = ghost_grad_dot(
        model_fn, params, batch, batch, out="param train", layers=layers, schedule="two-phase",
        on_unsupported=on_unsupported, randomness="error",
    )  # fmt: skip
    _, factors = ghost_factors(
        model_fn, params, batch, layers=layers, on_unsupported=on_unsupported, randomness="error"
    )  # fmt: skip
    interaction = _interaction(model_fn, params, batch, result.losses)
    reference, oracle = _reference(model_fn, params, batch, samples)

    checks: dict[str, ParameterCheck] = {}
    for name in names:
        true = reference[name].to(dtype).reshape(samples, -1)  # [B, numel]
        mean = true.mean(0)
        scale = true.norm(dim=1) * mean.norm()
        products = (true * mean).sum(1)  # summed in pairs, which a float32 matrix-vector product of this length is not
        dots = torch.stack([_relative(d[name] - products, scale) for d in (result.dots, dots_alone)]).max()
        shape = params[name].shape
        dense = sum((f.dense(shape).reshape(samples, -1) for f in factors[name]), torch.zeros_like(true))
        norms = _relative(dense.norm(dim=1) - true.norm(dim=1), true.norm(dim=1)).max()
        grads = _relative((result.grads[name].reshape(-1).to(dtype) - mean).norm(), mean.norm())
        checks[name] = ParameterCheck(len(factors[name]), float(dots), float(norms), float(grads))
    report = Report(samples, allowed, interaction, checks, oracle)
    wrong = {name: check for name, check in checks.items() if not check.worst <= allowed}
    if wrong:
        name, check = max(wrong.items(), key=lambda item: item[1].worst)
        raise VerificationError(
            f"{', '.join(wrong)}: differs from the oracle by more than {allowed:.0e}; the worst is {name} "
            f"{tuple(params[name].shape)} with {check}.\n{report}"
        )
    if interaction > 100 * allowed:
        raise InteractingSamples(
            f"a sample's loss alone differs from its loss in the batch by {interaction:.1e} (relative): they interact."
        )
    return report


def _relative(error: Tensor, scale: Tensor) -> Tensor:
    return torch.where(error == 0, 0.0, error.abs() / scale)


def _alone(batch: Any, sample: int) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t[sample : sample + 1], batch)


def _interaction(model_fn: ModelFn, params: Params, batch: Any, losses: Tensor) -> float:
    with torch.no_grad():
        alone = torch.cat([model_fn(dict(params), _alone(batch, s)) for s in range(len(losses))])
    return float(((alone - losses).abs() / losses.abs().clamp(min=1e-3)).max())


def _reference(model_fn: ModelFn, params: Params, batch: Any, samples: int) -> tuple[dict[str, Tensor], str]:
    """Per-sample gradients by vmap, or one by one for a model that vmap cannot run."""
    try:
        return per_sample_grad(model_fn, dict(params), batch), "vmap"
    except (RuntimeError, NotImplementedError, ValueError):
        pass
    rows: list[tuple[Tensor, ...]] = []
    for sample in range(samples):
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        loss = model_fn(leaves, _alone(batch, sample)).sum()
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        rows.append(tuple(torch.zeros_like(p) if g is None else g for g, p in zip(found, leaves.values(), strict=True)))
    return {
        name: torch.stack(column) for name, column in zip(params, zip(*rows, strict=True), strict=True)
    }, "one by one"
