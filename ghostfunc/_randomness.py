"""Random numbers: which operations draw them, how they are silenced, and how the samples of a batch draw the same.

Under `randomness="same"` every sample gets what it would get alone in its batch. A dropout draws the mask of one
sample, which multiplies all of them; any other operation runs for each sample from the same state of the generators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ghostfunc._axis_algebra import argument
from ghostfunc._errors import UnsupportedUse
from ghostfunc._nesting import with_values
from ghostfunc._operations import is_in_place, op_name, tensors_in
from ghostfunc._sample_axis import Lost, SampleAxis, samples_of

RANDOMNESS = ("different", "same", "error")

_MASKS = frozenset("dropout dropout1d dropout2d dropout3d feature_dropout".split())  # the result is a mask times x
_SWITCHES = {  # position of `training`, and its default
    **dict.fromkeys((*_MASKS, "native_dropout"), (2, True)),
    **dict.fromkeys(("alpha_dropout", "feature_alpha_dropout"), (2, False)),
    "rrelu": (3, False),
}
_IN_PLACE = {
    **dict.fromkeys(_MASKS - {"dropout"}, torch.feature_dropout_),
    "dropout": torch.dropout_,
    "alpha_dropout": torch.alpha_dropout_,
    "feature_alpha_dropout": torch.feature_alpha_dropout_,
    "rrelu": torch.rrelu_,
}
_ATTENTION = "scaled_dot_product_attention"
_RECURRENT = frozenset("lstm gru rnn_tanh rnn_relu".split())
_SAMPLERS = frozenset(
    """
    bernoulli binomial cauchy exponential geometric gumbel_softmax log_normal multinomial normal poisson rand rand_like
    randint randint_like randn randn_like random randperm sample_dirichlet standard_gamma uniform
    """.split()
)
MAY_DRAW = _SAMPLERS | _RECURRENT | {_ATTENTION, *_SWITCHES}


class DrewRandomNumbers(Exception):
    """Raised inside a joint forward that draws random numbers, when the caller asked to be told."""


@dataclass(frozen=True, eq=False)
class RandomState:
    """The states of the random number generators that operations on a device draw from."""

    device: torch.device
    cpu: Tensor
    accelerator: Tensor | None

    @staticmethod
    def of(device: torch.device) -> RandomState:
        """The states now."""
        accelerator = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        return RandomState(device, torch.get_rng_state(), accelerator)

    def restore(self) -> None:
        """Put the generators back to these states."""
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)

    @with_values
    def has_moved(self) -> bool:
        """Whether a number has been drawn since."""
        now = RandomState.of(self.device)
        pairs = ((self.cpu, now.cpu), (self.accelerator, now.accelerator))
        return any(a is not None and b is not None and not torch.equal(a, b) for a, b in pairs)

    def replay(self, func: Callable, *args: Any, **kwargs: Any) -> Any:
        """Run a function from these states, and leave the generators as they are."""
        _refuse_while_recorded()
        now = RandomState.of(self.device)
        try:
            self.restore()
            return func(*args, **kwargs)
        finally:
            now.restore()


def _refuse_while_recorded() -> None:
    if torch.compiler.is_compiling():
        raise UnsupportedUse(
            "the same random numbers are needed again, and a compiled graph would draw others: a parameter goes "
            "through an operation that draws, or randomness='same' through one that is no dropout. Call it outside of "
            "torch.compile, or put the model in eval mode (module.eval())."
        )


def draws(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call of an operation draws random numbers."""
    if name in _SWITCHES:
        position, default = _SWITCHES[name]
        on = argument(args, kwargs, position, "training", "train", default=default)
        return bool(on) and (name == "rrelu" or argument(args, kwargs, 1, "p", default=0.5) > 0)
    if name == _ATTENTION:
        return argument(args, kwargs, 4, "dropout_p", default=0.0) > 0
    if name in _RECURRENT:
        at = _dropout_of_layers(args)
        layers, p, training = args[at - 1 : at + 2]
        return bool(layers > 1 and p > 0 and training)
    return name in _SAMPLERS


def in_eval_mode(name: str, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """The arguments with which a call does what it does in eval mode; None where there is no such mode."""
    if name in _SWITCHES:
        return _replaced(args, kwargs, _SWITCHES[name][0], "train" if "train" in kwargs else "training", False)
    if name == _ATTENTION:
        return _replaced(args, kwargs, 4, "dropout_p", 0.0)
    return _replaced(args, kwargs, _dropout_of_layers(args), "dropout", 0.0) if name in _RECURRENT else None


def in_place_by_name(name: str, func: Callable, args: Any, kwargs: dict[str, Any]) -> tuple[Callable, Any, Any]:
    """A call with `inplace=True` as one of torch's function that ends in `_`; any other as it is."""
    if not _is_in_place(name, func, args, kwargs) or is_in_place(func):
        return func, args, kwargs
    defaults = {"input": None, "lower": 1 / 8, "upper": 1 / 3} if name == "rrelu" else {"input": None, "p": 0.5}
    given = (argument(args, kwargs, k, key, default=value) for k, (key, value) in enumerate(defaults.items()))
    return _IN_PLACE[name], (*given, True), {}


def _is_in_place(name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    flag = argument(args, kwargs, 4 if name == "rrelu" else 3, "inplace", default=False)
    return is_in_place(func) or (name in _SWITCHES and flag is True)


def _dropout_of_layers(args: Sequence[Any]) -> int:
    return 5 + (not isinstance(args[2], (tuple, list)))  # packed sequences come with their sizes


def _replaced(args: Any, kwargs: dict[str, Any], position: int, name: str, value: Any) -> tuple[Any, dict[str, Any]]:
    if len(args) > position:
        return (*args[:position], value, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: value}


def refusal(name: str) -> RuntimeError:
    """The error of `randomness="error"`."""
    return RuntimeError(
        f"`{name}` draws random numbers, and randomness='error' forbids it. Put the model in eval mode "
        "(module.eval()), or pass randomness='different' (every sample draws its own, as in a plain training step) or "
        "'same' (every sample draws the same)."
    )


def cannot_share(name: str, why: str) -> UnsupportedUse:
    """The error of `randomness="same"` for an operation that cannot be given one draw for all samples."""
    return UnsupportedUse(
        f"`{name}` draws random numbers that the samples cannot share (randomness='same'): {why}. Pass "
        "randomness='different', or put the model in eval mode (module.eval())."
    )


def shared(func: Callable, samples: int, of_parameter: bool) -> Callable:
    """An operation that draws, with the same numbers for every sample.

    Args:
        func: the operation.
        samples: the number of samples in the batch.
        of_parameter: whether it draws for a parameter as it is, which has no samples.

    Returns:
        A function of the same arguments and name.
    """
    name = op_name(func)

    def drawing(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("generator") is not None:
            raise cannot_share(name, "it draws from a generator of its own")
        tensors = tensors_in(args) + tensors_in(kwargs.values())
        carrying = [t for t in tensors if samples_of(t) is not None]
        if not carrying:
            out = func(*args, **kwargs)
            for result in () if of_parameter else tensors_in([out]):
                _refuse_ambiguous(name, result.shape, samples)
            return out
        x, axis = carrying[0], samples_of(carrying[0])
        if not isinstance(axis, SampleAxis) or axis.owners is not None:
            why = axis.reason if isinstance(axis, Lost) else "its rows are in no order"
            raise cannot_share(name, f"the samples of its argument of shape {tuple(x.shape)} have no place ({why})")
        in_place = _is_in_place(name, func, args, kwargs)
        if name in _MASKS:
            mask = func(torch.ones_like(_part(x, axis, 0)), argument(args, kwargs, 1, "p", default=0.5), True)
            mask = mask if axis.outer == axis.inner == 1 else _joined([mask] * samples, axis)
            return x.mul_(mask) if in_place else x * mask
        joined = _one_by_one(name, func, args, kwargs, x, axis, in_place)
        return x.copy_(joined) if in_place else joined

    drawing.__name__ = func.__name__
    return drawing


def _refuse_ambiguous(name: str, shape: torch.Size, samples: int) -> None:
    for dim, size in enumerate(shape):
        if size and size % samples == 0:
            raise cannot_share(
                name,
                f"it depends on no sample, and dimension {dim} of its shape {tuple(shape)} could be that of the "
                f"{samples} samples; draw with rand_like, bernoulli or dropout of a tensor that comes from the batch",
            )


def _one_by_one(
    name: str, func: Callable, args: Any, kwargs: dict[str, Any], x: Tensor, axis: SampleAxis, in_place: bool
) -> Tensor:
    """The operation on each sample from the same state of the generators."""
    behind = x.dim() - axis.dim

    def part(leaf: Any, sample: int) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        here, dim = samples_of(leaf), leaf.dim() - behind
        there = SampleAxis(dim, axis.samples, axis.outer, axis.inner)
        if here is not None and here != there:
            raise cannot_share(name, f"its arguments of shapes {tuple(x.shape)} and {tuple(leaf.shape)} do not line up")
        if here is None and (dim < 0 or leaf.shape[dim] != axis.size):
            return leaf
        of_sample = _part(leaf, there, sample)
        return of_sample.clone() if in_place else of_sample

    _refuse_while_recorded()
    before, after, parts = RandomState.of(x.device), None, []
    for sample in range(axis.samples):
        before.restore()
        of_sample = pytree.tree_map(lambda leaf, s=sample: part(leaf, s), (args, kwargs))
        parts.append(func(*of_sample[0], **of_sample[1]))
        if after is not None and after.has_moved():
            raise cannot_share(name, "how many numbers it draws depends on a sample's values")
        after = after or RandomState.of(x.device)
    dim = parts[0].dim() - behind if isinstance(parts[0], Tensor) else -1
    if dim < 0 or parts[0].shape[dim] != axis.outer * axis.inner:
        raise cannot_share(name, "its result does not have the samples where its argument has them")
    return _joined(parts, SampleAxis(dim, axis.samples, axis.outer, axis.inner))


def _part(tensor: Tensor, axis: SampleAxis, sample: int) -> Tensor:
    """A sample's part, in the shape that the tensor would have if there were no other."""
    if axis.outer == 1:
        return tensor.narrow(axis.dim, sample * axis.inner, axis.inner)
    split = tensor.unflatten(axis.dim, (axis.outer, axis.samples, axis.inner))
    return split.select(axis.dim + 1, sample).flatten(axis.dim, axis.dim + 1)


def _joined(parts: list[Tensor], axis: SampleAxis) -> Tensor:
    """The samples' parts put together again."""
    split = [part.unflatten(axis.dim, (axis.outer, axis.inner)) for part in parts]
    return torch.stack(split, axis.dim + 1).flatten(axis.dim, axis.dim + 2)
