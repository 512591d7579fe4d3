"""Rules of norms and their kin: norms that end in a scale and a shift, y = xhat * w + b, PReLU, and bags of embeddings.

The gradient of sample b is sum_r g[b, r] * xhat[b, r] for the scale and sum_r g[b, r] for the shift, over all positions
at once. Nothing but the input is kept for it: xhat is computed again, by the same operation without its parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ghostfunc._factors import Dense, Factor
from ghostfunc._interpreter import Interpreter
from ghostfunc._sample_axis import Partition, SampleAxis, samples_of
from ghostfunc._tap import NO_RULE, Rule, Use, tapped


def _channels(x: Tensor, size: int) -> tuple[int, ...]:
    """The shape in which `size` channels, or one number for all, broadcast along dimension 1 of a tensor."""
    return (size, *(1,) * (x.dim() - 2))


def _scale_and_shift(
    mode: Interpreter,
    op: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    broadcast: tuple[int, ...],
    forward: Callable[[Tensor | None, Tensor | None], Tensor],
    xhat: Callable[[Tensor], Tensor],
) -> Any:
    """A norm, y = forward(w, b) = xhat(x) * w + b with w and b in the shape `broadcast`: Dense for both."""
    if mode.find(x) is not None or samples_of(weight) is not None or samples_of(bias) is not None:
        return NO_RULE
    width = torch.Size(broadcast)

    def scale(g: Tensor, samples: Partition, x: Tensor) -> Factor:
        return _dense(g * xhat(x).to(g.dtype), samples, width, weight)

    def shift(g: Tensor, samples: Partition, x: Tensor) -> Factor:
        return _dense(g, samples, width, bias)

    return tapped(
        mode,
        op,
        forward(mode.value(weight), mode.value(bias)),
        (x,),
        Use(mode.find(weight), "dense", scale),
        Use(mode.find(bias), "dense", shift),
    )


def _dense(entry: Tensor, samples: Partition, width: torch.Size, parameter: Tensor | None) -> Factor:
    assert parameter is not None
    return Dense(samples.sum_to(entry, width).reshape(-1, *parameter.shape))


def _rms_norm(
    mode: Interpreter,
    func: Callable,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: int | float | None = None,
) -> Any:
    return _scale_and_shift(
        mode, "rms_norm", input, weight, None, tuple(normalized_shape),
        lambda w, b: F.rms_norm(input, normalized_shape, w, eps),
        lambda x: F.rms_norm(x, normalized_shape, eps=eps),
    )  # fmt: skip


def _group_norm(
    mode: Interpreter,
    func: Callable,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: int | float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    return _scale_and_shift(
        mode, "group_norm", input, weight, bias, _channels(input, input.shape[1]),
        lambda w, b: F.group_norm(input, num_groups, w, b, eps),
        lambda x: F.group_norm(x, num_groups, eps=eps),
    )  # fmt: skip


def _instance_norm(
    mode: Interpreter,
    func: Callable,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: int | float = 0.1,
    eps: int | float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    if func is torch.instance_norm:  # its arguments are (input, weight, bias, running_mean, running_var, ...)
        running_mean, running_var, weight, bias = weight, bias, running_mean, running_var
    read = (None, None) if use_input_stats else (running_mean, running_var)  # by xhat, which must not move them
    return _scale_and_shift(
        mode, "instance_norm", input, weight, bias, _channels(input, input.shape[1]),
        lambda w, b: F.instance_norm(input, running_mean, running_var, w, b, use_input_stats, momentum, eps),
        lambda x: F.instance_norm(x, *read, use_input_stats=use_input_stats, eps=eps),
    )  # fmt: skip


def _batch_norm(
    mode: Interpreter,
    func: Callable,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: int | float = 0.1,
    eps: int | float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    if func is torch.batch_norm:  # its arguments are (input, weight, bias, running_mean, running_var, ...)
        running_mean, running_var, weight, bias = weight, bias, running_mean, running_var
    axis = samples_of(input)
    in_channels = isinstance(axis, SampleAxis) and axis.samples > 1 and axis.dim == 1
    learnt = mode.find(running_mean) is not None or mode.find(running_var) is not None
    if training or running_mean is None or learnt or in_channels:
        return NO_RULE
    return _scale_and_shift(
        mode, "batch_norm", input, weight, bias, _channels(input, input.shape[1]),
        lambda w, b: F.batch_norm(input, running_mean, running_var, w, b, eps=eps),
        lambda x: F.batch_norm(x, running_mean, running_var, eps=eps),
    )  # fmt: skip


def _prelu(mode: Interpreter, func: Callable, input: Tensor, weight: Tensor) -> Any:
    """PReLU, y = max(x, 0) + w * min(x, 0): Dense(sum_r g_r * min(x_r, 0)), over all entries or those of a channel."""
    if mode.find(input) is not None or samples_of(weight) is not None:
        return NO_RULE
    width = torch.Size(_channels(input, weight.numel()))

    def slope(g: Tensor, samples: Partition, x: Tensor) -> Factor:
        return _dense(g * x.clamp(max=0), samples, width, weight)

    out = F.prelu(input, mode.value(weight))
    return tapped(mode, "prelu", out, (input,), Use(mode.find(weight), "dense", slope))


def _embedding_bag(
    interpreter: Interpreter,
    func: Callable,
    /,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: int | float | None = None,
    norm_type: int | float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """A bag of rows is a look-up and a sum, mean or maximum over it; padding is not in the bag."""
    if func is torch.embedding_bag or input.dim() != 2 or input.shape[1] == 0:
        return NO_RULE
    if per_sample_weights is not None and mode != "sum":
        return NO_RULE  # torch's own error
    call = interpreter.call
    padding = None if padding_idx is None else (input == padding_idx % len(weight)).unsqueeze(-1)  # [B, L, 1]
    rows = call(F.embedding, input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq)  # [B, L, d]
    if padding is not None:
        rows = call(torch.masked_fill, rows, padding, -torch.inf if mode == "max" else 0.0)
    if mode == "max":
        out = call(torch.max, rows, 1)[0]
        return out if padding is None else call(torch.masked_fill, out, padding.all(1), 0.0)
    if per_sample_weights is not None:
        rows = call(torch.mul, rows, call(torch.unsqueeze, per_sample_weights, -1))
    out = call(torch.sum, rows, 1)
    if mode == "sum":
        return out
    return call(torch.div, out, input.shape[1] if padding is None else (~padding).sum(1).clamp(min=1))


NORMS: dict[str, Rule] = {
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "batch_norm": _batch_norm,
    "prelu": _prelu,
    "embedding_bag": _embedding_bag,
}
