"""Rules of convolutions: the kernel is a linear map of the windows of the data that it meets, one row a position.

    out[n, o, l] = sum_ck w[o, c, k] x[n, c, s l + d k - p]      G_n = sum_l outer(g[n, l], windows(x)[n, l])
    transposed: the same sum with x and out in each other's place, G_n = sum_l outer(x[n, l], windows(g)[n, l])

What is saved is x itself; windows exist from the backward of the layer to its contraction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ghostfunc._factors import Dense, Factor, Outer
from ghostfunc._interpreter import Interpreter
from ghostfunc._operations import as_autocast, op_name
from ghostfunc._sample_axis import Partition, RowMap, SampleAxis, samples_of
from ghostfunc._tap import NO_RULE, Rule, Use, tapped

_DENSE_BYTES = 64 << 20


class _Kernel(NamedTuple):
    """How a convolution's kernel meets the data.

    Attributes:
        shape: the weight's, `[C_out, C_in / groups, *size]`, or `[C_in, C_out / groups, *size]` where transposed.
        stride: between positions, for each dimension.
        padding: zeros on either side.
        dilation: between the entries of a window.
        output_padding: of a transposed convolution.
        groups: how many parts of the channels are convolved apart.
        transposed: whether x has the positions, and the result the windows.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int
    transposed: bool

    def positions(self, x: Tensor) -> int:
        """The number of positions of the kernel on an image of x `[N, C, *L]`."""
        if self.transposed:
            return prod(x.shape[2:])
        sizes = zip(x.shape[2:], self.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        return prod((length + 2 * pad - gap * (size - 1) - 1) // step + 1 for length, size, step, pad, gap in sizes)

    def windows(self, wide: Tensor, counts: Sequence[int]) -> Tensor:
        """What the kernel meets at each of `counts` positions: `[N, C, *L]` to `[N, *counts, C * size]`.

        The channels stay ahead of the positions in memory, so that the copy runs along the data's rows.
        """
        if any(self.padding):
            wide = F.pad(wide, [pad for pad in reversed(self.padding) for _ in range(2)])
        for dim, (size, step, gap, count) in enumerate(
            zip(self.shape[2:], self.stride, self.dilation, counts, strict=True), start=2
        ):
            wide = wide.unfold(dim, gap * (size - 1) + 1, step)[..., ::gap].narrow(dim, 0, count)
        dims = len(counts)  # wide is [N, C, *counts, *size]
        wide = wide.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
        return wide.flatten(1, 1 + dims).movedim(1, -1)

    def gradient(self, g: Tensor, x: Tensor, images: int = 1) -> Tensor:
        """The weight's gradient from the grad-output `[N, C_out, *L]`; with `images`, channels are those of so many."""
        shape = (images * self.shape[0], *self.shape[1:])
        weight = g.new_empty(1).expand(shape)  # only its shape is read
        geometry = (self.stride, self.padding, self.dilation, self.transposed, self.output_padding)
        mask = [False, True, False]
        return torch.ops.aten.convolution_backward(g, x, weight, None, *geometry, images * self.groups, mask)[1]


def _each(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """A setting for each dimension."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _convolved(
    mode: Interpreter,
    func: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    transposed: bool = False,
    **settings: Any,
) -> Any:
    """A convolution: Outer(windows, g), or Dense where channels are in groups; Dense(sum of g) for the bias."""
    stride, padding, dilation, output_padding = (
        _each(settings.get(name, 0), weight.dim() - 2) for name in ("stride", "padding", "dilation", "output_padding")
    )
    kernel = _Kernel(weight.shape, stride, padding, dilation, output_padding, settings["groups"], transposed)
    if samples_of(weight) is not None or samples_of(bias) is not None or mode.find(x) is not None:
        return NO_RULE
    batched, grouped = x.dim() == weight.dim(), kernel.groups > 1
    axis = samples_of(x)
    apart = mode.samples == 1 or (batched and isinstance(axis, SampleAxis) and axis.dim == 0)
    if weight.is_complex() or x.is_complex() or (grouped and not apart):  # samples may be channels
        return NO_RULE
    if grouped and batched and mode.find(weight) is not None and _better_apart(x, kernel, mode.dtype):
        return _by_group(mode, func, x, weight, bias, settings)
    x = as_autocast(x)
    x = x if batched else x.unsqueeze(0)
    out = func(x, mode.value_in_product(weight), mode.value(bias), **settings).movedim(1, -1)  # [N, *L, C_out]

    def outer(g: Tensor, samples: Partition, x: Tensor) -> Factor:
        x = x.to(g.dtype)
        if not kernel.transposed:
            return Outer(samples.rows(kernel.windows(x, g.shape[1:-1])), samples.rows(g))
        if isinstance(samples, RowMap):  # of the result's rows, which are not the kernel's positions
            return _sample_by_sample(g, samples, x)
        windows = kernel.windows(g.movedim(-1, 1), x.shape[2:])
        return Outer(samples.rows(x.movedim(1, -1)), samples.rows(windows), transposed=True)

    def dense(g: Tensor, samples: Partition, x: Tensor) -> Factor:
        x = x.to(g.dtype)
        if isinstance(samples, RowMap):
            return _sample_by_sample(g, samples, x)
        channels, images = g.movedim(-1, 1).flatten(0, 1), len(x)
        gradients = kernel.gradient(channels.unsqueeze(0), x.flatten(0, 1).unsqueeze(0), images)
        return of_groups(samples.sum_to(gradients.view(images, *kernel.shape), kernel.shape))

    def _sample_by_sample(g: Tensor, samples: RowMap, x: Tensor) -> Dense:
        return of_groups(torch.stack([plain(samples.only(g, sample), x) for sample in range(samples.samples)]))

    def of_groups(gradients: Tensor) -> Dense:
        rows = kernel.shape[0] // kernel.groups
        return Dense(gradients, (kernel.groups, rows, prod(kernel.shape[1:])), kernel.transposed)

    def plain(g: Tensor, x: Tensor) -> Tensor:
        return kernel.gradient(g.movedim(-1, 1), x)

    def shift(g: Tensor, samples: Partition, x: Tensor) -> Factor:
        return Dense(samples.sum_to(g, g.shape[-1:]))

    tracked = mode.find(weight)
    result = tapped(
        mode,
        op_name(func),
        out,
        (x,),
        Use(tracked, "dense", dense, plain) if grouped else Use(tracked, "outer", outer, plain),
        Use(mode.find(bias), "dense", shift, lambda g, x: g.flatten(0, -2).sum(0)),
    ).movedim(-1, 1)
    if tracked is not None and kernel.transposed:
        site = tracked.sites[-1]
        site.positions, site.width = len(x) * kernel.positions(x) // mode.samples, prod(kernel.shape[1:])
    return result if batched else result.squeeze(0)


def _better_apart(x: Tensor, kernel: _Kernel, dtype: torch.dtype) -> bool:
    """Whether the gradients of x's images are large, and larger than the rows that they are made of.

    One grouped convolution makes the gradients of all images and groups at once, `[N, *shape]`. Rows are
    `[N, positions, C]` and `[N, positions, C' * size]`, so that they are fewer where a group has more
    channels than an image has positions.
    """
    wide = kernel.groups * prod(kernel.shape[1:])
    size = dtype.itemsize * len(x)
    gradients, rows = size * kernel.shape.numel(), size * kernel.positions(x) * (kernel.shape[0] + wide)
    return gradients > _DENSE_BYTES and gradients > rows


def _by_group(
    mode: Interpreter, func: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, settings: dict
) -> Tensor:
    """A convolution of each group's channels with a slice of the weight, which has an Outer of its own."""
    groups = settings["groups"]
    alone = {**settings, "groups": 1}
    slices = [mode.call(torch.chunk, t, groups, dim) for t, dim in ((x, 1), (weight, 0))]
    slices.append([None] * groups if bias is None else mode.call(torch.chunk, bias, groups))
    return mode.call(torch.cat, [mode.call(func, *of_group, **alone) for of_group in zip(*slices, strict=True)], 1)


def _conv(
    mode: Interpreter,
    func: Callable,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Any:
    dims = weight.dim() - 2
    if isinstance(padding, str):
        if padding not in ("same", "valid") or (padding == "same" and any(step != 1 for step in _each(stride, dims))):
            return NO_RULE  # torch refuses it
        sizes = zip(weight.shape[2:], _each(dilation, dims), strict=True)
        around = [gap * (size - 1) if padding == "same" else 0 for size, gap in sizes]
        if any(both % 2 for both in around) and mode.find(input) is None:  # the odd zero comes last
            input = mode.call(F.pad, input, [zeros for both in reversed(around) for zeros in (0, both % 2)])
        padding = [both // 2 for both in around]
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return _convolved(mode, func, input, weight, bias, **settings)


def _conv_transpose(
    mode: Interpreter,
    func: Callable,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Any:
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return _convolved(mode, func, input, weight, bias, transposed=True, output_padding=output_padding, **settings)


def _convolution(
    mode: Interpreter,
    func: Callable,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    *internal: Any,
) -> Any:
    """`torch.convolution`, as the function that it is."""
    if internal:
        return NO_RULE
    dims = weight.dim() - 2
    if transposed:
        func = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        return _conv_transpose(mode, func, input, weight, bias, stride, padding, output_padding, groups, dilation)
    func = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    return _conv(mode, func, input, weight, bias, stride, padding, dilation, groups)


CONVOLUTIONS: dict[str, Rule] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _conv),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _conv_transpose),
    "convolution": _convolution,
}
