"""Preconditioners: what an optimizer makes of a gradient, so that dots speak of its step and not of a plain one.

    theta' = theta - lr U(g),   g = mean_i g_i,   P = dU/dg (or a stand-in that is stated)

To first order sample i changes the validation loss by -lr <P V, g_i / n>, V the validation gradient. P is a function of
a gradient dict, linear and symmetric; here it is a diagonal that is read from the optimizer's state whenever it is
called, so that one preconditioner serves a whole run. The learning rate is left out: that of the first parameter group
is the lr of all formulas, and the entries of a group with another one carry the ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ghostfunc._optimizer_state import Held, OfOptimizer

Direction = dict[str, Tensor]


def adam(optimizer: Optimizer, model: nn.Module, *, exact: bool = False) -> AdamMetric:
    """The metric of Adam or AdamW: with it, a dot is the change of the validation loss that Adam's next step makes.

    `lr / n * ghost_grad_dot(..., precondition=adam(optimizer, model))[i]` is, to first order, the decrease of the mean
    validation loss in the next `optimizer.step()` on account of sample i, in the loss's unit; lr is that of the first
    parameter group. Weight decay as L2 (Adam) or decoupled (AdamW), amsgrad, maximize and groups are the optimizer's.

    With gradient g an entry's step is U(g) = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps), m = b1 m' + (1 - b1) g and
    v = b2 v' + (1 - b2) g^2 (Kingma and Ba, 2015, algorithm 1), and

        exact=False   P = (1 - b1) / (1 - b1^t) / (sqrt(v' / (1 - b2^(t-1))) + eps): the second moment stays that of the
                      step before. No train gradient is needed, and dots keep their one fused pass.
        exact=True    P = dU/dg at the mean train gradient, the second moment's part included.

    An entry without a second moment takes a step of fixed size against the sign of g, whose derivative is nearly zero:
    no single sample changes it to first order. With exact=False the part of such an entry (in a row of an embedding
    that is seen for the first time, say) is zero, except at step 0, when all entries are so: there P is (1 - b1) /
    (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps), with the second moment of this very step. P g = U(g), so that the samples
    share out the step. That ranks samples better than the derivative, which exact=True still is, and is some thirty
    times what leaving one out changes. At step 0 the mean train gradient is needed either way. How good all of these
    are, step by step: benchmarks/adam_leave_one_out.py.

    Gradients that are clipped, scaled or averaged over ranks between `backward()` and `optimizer.step()` are not known
    here. `precondition.update(mean_train_gradient)` is the whole change of the parameters divided by -lr, with momentum
    and weight decay, for the names given to it; torch skips a parameter whose `.grad` is None: leave it out then.

    Args:
        optimizer: a `torch.optim.Adam` or `AdamW`. Its state and settings are read at every call and never changed.
        model: the module whose parameters it holds, as given to `functionalize` or wrapped: the prefixes of
            `DistributedDataParallel` and `torch.compile` make no difference on either side, nor which of its names a
            tied parameter goes by.
        exact: the derivative instead of the frozen second moment.

    Returns:
        A precondition for `ghost_grad_dot`, `value_and_grad_dot` and the second-order values.

    Raises:
        TypeError: if the optimizer is of another class, or a subclass with a step of its own.
        ValueError: (when it is called) if a parameter is not in the model or not in the optimizer, with its name.

    Example:
        >>> import torch, ghostfunc as gf
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> model_fn, params = gf.functionalize(model, gf.classification_loss)
        >>> train = (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
        >>> val = (torch.randn(2, 4), torch.tensor([2, 0]))
        >>> dots = gf.ghost_grad_dot(model_fn, params, train, val, precondition=gf.adam(optimizer, model))
        >>> (1e-3 / 5 * dots).shape  # decreases of the validation loss
        torch.Size([5])
    """
    return AdamMetric(optimizer, model, exact=exact)


def adafactor(optimizer: Optimizer, model: nn.Module) -> AdafactorMetric:
    """The metric of Adafactor: the share of each sample in the step that `torch.optim.Adafactor` makes next.

    Adafactor's step on a matrix is U(g) = a g / sqrt(R C) / max(1, RMS(g / sqrt(R C)) / d) (Shazeer and Stern, 2018,
    algorithms 4 and 5, in torch's variant): R and C are the second moments of rows and columns, of which step t keeps
    1 - t^-0.8, nothing at the first; a is min(lr, 1 / sqrt(t)) times the parameter's own RMS.

    So P = a / lr / sqrt(R C) / max(1, RMS / d), with R, C and the clipping of this very step, at the mean train
    gradient, all held fixed: P g = U(g), the samples share out the step as it is. It is not the derivative of the step:
    a sample's part in R and C is left out, and so is its part in the RMS. Where an update is clipped (often: RMS > d
    is the usual case of early steps) its RMS is d whatever one sample does, and what a sample gives along the update
    itself is overestimated.

    Args:
        optimizer: a `torch.optim.Adafactor`. Its state and settings are read at every call and never changed.
        model: as in `adam`.

    Returns:
        A precondition for `ghost_grad_dot`, `value_and_grad_dot` and the second-order values; it needs the mean train
        gradient (`about_train_gradient`), and `.update` gives the whole step divided by -lr, as in `adam`.

    Raises:
        TypeError: if the optimizer is of another class, or a subclass with a step of its own.
        ValueError: (when it is called) if a parameter is not in the model or not in the optimizer, with its name.

    Example:
        >>> import torch, ghostfunc as gf
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = torch.optim.Adafactor(model.parameters())
        >>> model_fn, params = gf.functionalize(model, gf.classification_loss)
        >>> train = (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
        >>> val = (torch.randn(2, 4), torch.tensor([2, 0]))
        >>> gf.ghost_grad_dot(model_fn, params, train, val, precondition=gf.adafactor(optimizer, model)).shape
        torch.Size([5])
    """
    return AdafactorMetric(optimizer, model)


def diagonal(weights: Mapping[str, Tensor | float] | Callable[[str], Tensor | float]) -> DiagonalMetric:
    """A diagonal metric of your own: P V = weights * V, entry by entry.

    A dot is sum over entries of weights * g_i * V: the change of the validation loss, up to -lr / n, under the step
    theta - lr * weights * mean_i g_i. Learning rates by layer, masks, a diagonal Fisher.

    Args:
        weights: for each parameter a number, or a tensor that broadcasts to its shape; a dict by name, or a function of
            the name, called at each use.

    Returns:
        A precondition for `ghost_grad_dot`, `value_and_grad_dot` and the second-order values.

    Raises:
        ValueError: (when it is called) if a parameter has no weights or weights of another shape, with its name.

    Example:
        >>> import torch, ghostfunc as gf
        >>> P = gf.diagonal(lambda name: 0.1 if name == "bias" else 1.0)
        >>> P({"weight": torch.ones(2), "bias": torch.ones(1)})
        {'weight': tensor([1., 1.]), 'bias': tensor([0.1])}
    """
    return DiagonalMetric(weights)


class _AdamStep(NamedTuple):
    """One parameter's U = momentum / (root + eps), and derivatives with respect to the gradient that Adam sees."""

    momentum: Tensor  # m / (1 - b1^t)
    momentum_slope: float
    root: Tensor  # sqrt(v / (1 - b2^t))
    slope_without_eps: Tensor  # root^2 times the derivative of momentum / root


class AdamMetric(OfOptimizer):
    """What `adam` returns."""

    def __init__(self, optimizer: Optimizer, model: nn.Module, *, exact: bool) -> None:
        super().__init__(optimizer, model, "adam", (torch.optim.Adam, torch.optim.AdamW))
        self._exact = exact

    @property
    def about_train_gradient(self) -> bool:
        """Whether the mean train gradient is needed: always for exact=True, else before the optimizer's first step."""
        held = (p for group in self._optimizer.param_groups for p in group["params"])
        return self._exact or not any(self._optimizer.state.get(p) for p in held)

    def __call__(self, direction: Direction, mean_train_gradient: Direction | None = None) -> Direction:
        """P V.

        Args:
            direction: V, an entry for each parameter in play.
            mean_train_gradient: the gradient that the step is made of; not read where not `about_train_gradient`.

        Returns:
            A dict like `direction`, at least float32.

        Raises:
            ValueError: if the mean train gradient is missing, or a parameter is not found.
        """
        gradient = mean_train_gradient if self.about_train_gradient else None
        if self.about_train_gradient and gradient is None:
            raise ValueError(
                "gf.adam: with exact=True, and at step 0, it is called as P(direction, mean_train_gradient), which the "
                "transforms do (`about_train_gradient`)."
            )
        scaled = {}
        for held, v in self.held(direction):
            weights = self._before(held) if gradient is None else self._about(held, gradient)
            scaled[held.name] = held.ascent * held.rate * weights * v
        return scaled

    def update(self, mean_train_gradient: Direction) -> Direction:
        """The whole change of the parameters in `optimizer.step()`, divided by -lr.

        Args:
            mean_train_gradient: what `.grad` holds at the step, for each parameter in play.

        Returns:
            A dict like `mean_train_gradient`, at least float32.

        Raises:
            ValueError: if a parameter is not found.
        """
        updates = {}
        for held, _ in self.held(mean_train_gradient):
            after = self._step(held, mean_train_gradient)
            decay = held.group["weight_decay"] * held.parameter if self._decoupled(held) else 0
            updates[held.name] = held.rate * (after.momentum / (after.root + held.group["eps"]) + decay)
        return updates

    def _decoupled(self, held: Held) -> bool:
        return held.group.get("decoupled_weight_decay", isinstance(self._optimizer, torch.optim.AdamW))

    def _before(self, held: Held) -> Tensor:
        """With the second moment of the step before."""
        beta1, beta2 = map(float, held.group["betas"])
        second = held.before("max_exp_avg_sq" if held.group["amsgrad"] else "exp_avg_sq", held.parameter.shape)
        root = (second / (1 - beta2 ** max(1, held.step - 1))).sqrt()
        weights = (1 - beta1) / (1 - beta1**held.step) / (root + held.group["eps"])
        return torch.where(second > 0, weights, 0)

    def _about(self, held: Held, mean_gradient: Direction) -> Tensor:
        after, eps = self._step(held, mean_gradient), held.group["eps"]
        if self._exact:
            return (after.momentum_slope * eps + after.slope_without_eps) / (after.root + eps) ** 2
        return after.momentum_slope / (after.root + eps)

    def _step(self, held: Held, mean_gradient: Direction) -> _AdamStep:
        beta1, beta2 = map(float, held.group["betas"])
        gradient = self.gradient(held, mean_gradient)
        if held.group["weight_decay"] and not self._decoupled(held):
            gradient = gradient + held.group["weight_decay"] * held.parameter
        correction1, correction2 = 1 - beta1**held.step, 1 - beta2**held.step
        first_before, second_before = (held.before(key, gradient.shape) for key in ("exp_avg", "exp_avg_sq"))
        first = beta1 * first_before + (1 - beta1) * gradient
        second = beta2 * second_before + (1 - beta2) * gradient**2
        root = (second / correction2).sqrt()
        # (1 - b1) v - m (1 - b2) g: what is common to both cancels here on paper, at step 0 all of it.
        difference = (1 - beta1) * beta2 * second_before - (1 - beta2) * beta1 * first_before * gradient
        slope = torch.where(root > 0, difference / (correction1 * correction2 * root), 0)
        if held.group["amsgrad"]:
            highest = (held.before("max_exp_avg_sq", gradient.shape) / correction2).sqrt()
            slope = torch.where(root > highest, slope, (1 - beta1) / correction1 * highest)
            root = torch.maximum(root, highest)
        return _AdamStep(first / correction1, (1 - beta1) / correction1, root, slope)


class AdafactorMetric(OfOptimizer):
    """What `adafactor` returns."""

    about_train_gradient = True

    def __init__(self, optimizer: Optimizer, model: nn.Module) -> None:
        if not hasattr(torch.optim, "Adafactor"):
            raise TypeError("gf.adafactor is for torch.optim.Adafactor, which this torch does not have; 2.5 does.")
        super().__init__(optimizer, model, "adafactor", (torch.optim.Adafactor,))

    def __call__(self, direction: Direction, mean_train_gradient: Direction) -> Direction:
        """P V.

        Args:
            direction: V, an entry for each parameter in play.
            mean_train_gradient: the gradient that the step is made of.

        Returns:
            A dict like `direction`, at least float32.

        Raises:
            ValueError: if a parameter is not found.
        """
        return {
            held.name: held.ascent * self._weights(held, self.gradient(held, mean_train_gradient)) * v
            for held, v in self.held(direction)
        }

    def update(self, mean_train_gradient: Direction) -> Direction:
        """The whole change of the parameters in `optimizer.step()`, divided by -lr.

        Args:
            mean_train_gradient: what `.grad` holds at the step, for each parameter in play.

        Returns:
            A dict like `mean_train_gradient`, at least float32.

        Raises:
            ValueError: if a parameter is not found.
        """
        updates = {}
        for held, _ in self.held(mean_train_gradient):
            gradient = self.gradient(held, mean_train_gradient)
            decay = held.rate * held.group["weight_decay"] * held.parameter
            updates[held.name] = self._weights(held, gradient) * gradient + decay
        return updates

    def _weights(self, held: Held, gradient: Tensor) -> Tensor:
        small, smallest_scale = held.group["eps"]
        small = torch.finfo(held.parameter.dtype).eps if small is None else small
        new = held.step ** held.group["beta2_decay"]
        shape = held.parameter.shape
        squares = gradient**2
        if len(shape) > 1:
            row_means, column_means = squares.mean(-1, keepdim=True), squares.mean(-2, keepdim=True)
            rows = held.before("row_var", row_means.shape).lerp(row_means, new)
            columns = held.before("col_var", column_means.shape).lerp(column_means, new)
            second = rows @ columns / rows.mean(-2, keepdim=True).clamp(min=small)
        else:
            second = held.before("variance", shape).lerp(squares, new)
        scale = second.clamp(min=small * small).rsqrt()
        clipping = (_rms(scale * gradient) / held.group["d"]).clamp(min=1)
        # The relative step min(lr, 1 / sqrt(t)), divided by lr.
        relative = min(1.0, 1 / max(1.0, float(held.group["lr"]) * math.sqrt(held.step)))
        own_scale = _rms(held.parameter.to(second.dtype)).clamp(min=smallest_scale)
        return held.rate * relative * own_scale / clipping * scale


def _rms(tensor: Tensor) -> Tensor:
    return tensor.norm() / math.sqrt(tensor.numel())


class DiagonalMetric:
    """What `diagonal` returns."""

    def __init__(self, weights: Mapping[str, Tensor | float] | Callable[[str], Tensor | float]) -> None:
        self._weights = weights

    def __call__(self, direction: Direction) -> Direction:
        """P V.

        Args:
            direction: V, an entry for each parameter in play.

        Returns:
            A dict like `direction`.

        Raises:
            ValueError: if a parameter has no weights, or weights that do not fit it.
        """
        return {name: self._of(name, v) * v for name, v in direction.items()}

    def update(self, mean_train_gradient: Direction) -> Direction:
        """The step whose metric this is, divided by -lr: P g.

        Args:
            mean_train_gradient: g.

        Returns:
            A dict like `mean_train_gradient`.
        """
        return self(mean_train_gradient)

    def _of(self, name: str, v: Tensor) -> Tensor | float:
        if isinstance(self._weights, Mapping):
            if name not in self._weights:
                known = ", ".join(self._weights)
                raise ValueError(f"gf.diagonal: no weights for {name!r}; there are some for {known}.")
            weight = self._weights[name]
        else:
            weight = self._weights(name)
        if not isinstance(weight, Tensor):
            return weight
        try:
            return weight.expand(v.shape)
        except RuntimeError as error:
            raise ValueError(
                f"gf.diagonal: the weights of {name!r} have shape {tuple(weight.shape)}, which does not broadcast to "
                f"the parameter's {tuple(v.shape)}."
            ) from error
