"""Recurrent layers and attention around parameters: calls that hold many operations, redone in operations with rules.

A recurrent layer adds, at every time step t, one product with the input and one with the state before:

    x_t = W_ih i_t + b_ih,  y_t = W_hh h_{t-1} + b_hh,   h_t = step(x_t, y_t, h_{t-1})

All x_t are one linear map at T positions. The y_t come one after the other, and still W_hh has one factor of T
positions, Outer(a = h_{t-1}, g = cotangent of y_t): y_t is added to row t of a tensor that was tapped beforehand. The
states exist only once the recurrence has run, so they are collected in a list that the factor reads in the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from ghostfunc._errors import UnsupportedUse
from ghostfunc._factors import Factor, Outer
from ghostfunc._interpreter import Interpreter
from ghostfunc._lift import lift
from ghostfunc._operations import op_name, tensors_in
from ghostfunc._packed import is_packed, rows_axis, states_axis
from ghostfunc._sample_axis import Lost, Partition, SampleAxis, Samples, samples_of, set_samples
from ghostfunc._tap import NO_RULE, Rule, Use, tapped

State = Sequence[Tensor]  # (h,) or (h, c)
Step = Callable[..., State]  # step(x, y, *state) -> state


# ---------------------------------------------------------------- parameters where data could stand


def _placed(mode: Interpreter, axis: Samples, tap: Callable[..., Tensor], *args: Any) -> Tensor:
    """What a tap returns, with the samples in a place that no operand shows."""
    before = len(mode.sites)
    out = tap(mode, *args)
    for site in mode.sites[before:]:
        site.axis = axis
    set_samples(out, axis)
    return out


def _as_data(mode: Interpreter, op: str, tensor: Tensor, shape: Sequence[int], axis: Samples) -> Tensor:
    """A tensor without data as one that carries samples, in a shape that it broadcasts to."""
    if mode.find(tensor) is None:
        return _placed(mode, axis, lambda mode: tensor.expand(shape))
    return _placed(mode, axis, lift, op, tensor, torch.Size(shape))


def _carrying(mode: Interpreter, op: str, tensor: Tensor, axis: Samples) -> Tensor:
    return tensor if samples_of(tensor) is not None else _as_data(mode, op, tensor, tensor.shape, axis)


def _attention(
    mode: Interpreter,
    func: Callable,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Attention with learned queries, keys, values or biases: native, on the lifted parameters."""
    operands = (query, key, value, attn_mask)
    data = next((t for t in operands if t is not None and samples_of(t) is not None), query)
    axis = samples_of(data)
    if not isinstance(axis, SampleAxis):
        return NO_RULE
    place = axis.dim - data.dim()  # from the right, as batch dimensions broadcast
    if place > -3 and axis.samples > 1:
        return NO_RULE

    def with_samples(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or mode.find(tensor) is None:
            return tensor
        shape = [1] * (-place - tensor.dim()) + list(tensor.shape)
        if axis.samples > 1:
            shape[place] = axis.size
        return _as_data(mode, "attention", tensor, shape, axis.at(len(shape) + place))

    return mode.call(func, *map(with_samples, operands), *args, **kwargs)


def _for_inference(mode: Interpreter, func: Callable, *args: Any, **kwargs: Any) -> NoReturn:
    """The fused layers that `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` call where nothing has a graph."""
    found = [t for t in map(mode.find, tensors_in([*args, *kwargs.values()])) if t is not None]
    names = tuple(dict.fromkeys(name for t in found for name in t.names))
    raise UnsupportedUse(
        f"{', '.join(names)}: torch has no derivative of `{func.__name__}`, which is for inference. Freeze the "
        "parameter (requires_grad_(False)), or call nn.MultiheadAttention or nn.TransformerEncoderLayer, which know "
        "another way.",
        names,
    )


# ---------------------------------------------------------------- recurrent layers


def _lstm_step(x: Tensor, y: Tensor, h: Tensor, c: Tensor) -> State:
    i, f, g, o = (x + y).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_step(x: Tensor, y: Tensor, h: Tensor) -> State:
    x_r, x_z, x_n = x.chunk(3, -1)
    y_r, y_z, y_n = y.chunk(3, -1)
    n = (x_n + (x_r + y_r).sigmoid() * y_n).tanh()
    return (n + (x_z + y_z).sigmoid() * (h - n),)


def _tanh_step(x: Tensor, y: Tensor, h: Tensor) -> State:
    return ((x + y).tanh(),)


def _relu_step(x: Tensor, y: Tensor, h: Tensor) -> State:
    return ((x + y).relu(),)


class _Steps(NamedTuple):
    """The sequence by its time steps: `[T, B, d]`, or packed rows `[N, d]`, of which step t has `sizes[t]`."""

    sizes: list[int] | None

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        return tensor.unbind(0) if self.sizes is None else tensor.split(self.sizes)

    def join(self, steps: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(steps)) if self.sizes is None else torch.cat(list(steps))


class _Product:
    """The products of a weight with what each time step gives it, `product(t, h) = W h + b`: one factor for all."""

    def __init__(
        self, mode: Interpreter, op: str, steps: _Steps, like: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> None:
        """Tap what the products are added to.

        Args:
            mode: the interpreter.
            op: the operation's name.
            steps: the time steps.
            like: a tensor with a row for each product, which carries the samples.
            weight: `[d_out, d_in]`.
            bias: `[d_out]`, or None.
        """
        axis, shape = samples_of(like), (*like.shape[:-1], len(weight))
        zeros = like.new_zeros(()).expand(shape)
        start = zeros if bias is None else _as_data(mode, op, bias, shape, axis)
        # filled by the calls; the closures must not hold self, which holds the graph that holds them
        inputs: list[Tensor] = [zeros] * len(steps.split(like))

        def outer(g: Tensor, samples: Partition) -> Factor:
            return Outer(samples.rows(steps.join(inputs).to(g.dtype)), samples.rows(g))

        def product(g: Tensor) -> Tensor:
            return g.flatten(0, -2).t() @ steps.join(inputs).flatten(0, -2).to(g.dtype)

        start = _placed(mode, axis, tapped, op, start, (), Use(mode.find(weight), "outer", outer, product))
        self.offsets, self.inputs, self.weight = steps.split(start), inputs, mode.value(weight)
        self.keep = (lambda h: h) if mode.nested else Tensor.detach

    def __call__(self, t: int, h: Tensor) -> Tensor:
        self.inputs[t] = self.keep(h)
        return self.offsets[t] + F.linear(h, self.weight)


def _one_direction(
    mode: Interpreter,
    op: str,
    step: Step,
    steps: _Steps,
    x: Tensor,
    first: State,
    weights: Sequence[Tensor | None],
    *,
    back: bool,
) -> tuple[Tensor, State]:
    """One layer in one direction: its outputs in the layout of x, and its last state."""
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    assert w_ih is not None and w_hh is not None
    x = mode.call(F.linear, x, w_ih, b_ih)
    inputs = steps.split(x)
    recur = _Product(mode, op, steps, x, w_hh, b_hh)
    project = None if w_hr is None else _Product(mode, op, steps, x, w_hr)
    outputs = list(inputs)
    order = range(len(inputs))[:: -1 if back else 1]
    state, ended = tuple(part[: len(inputs[order[0]])] for part in first), []
    for t in order:
        rows = len(inputs[t])
        if rows < len(state[0]):  # the shortest of packed sequences have ended
            ended.insert(0, tuple(part[rows:] for part in state))
            state = tuple(part[:rows] for part in state)
        elif rows > len(state[0]):  # and backward, they begin later
            state = tuple(torch.cat([s, f[len(s) : rows]]) for s, f in zip(state, first, strict=True))
        state = step(inputs[t], recur(t, state[0]), *state)
        if project is not None:
            state = (project(t, state[0]), *state[1:])
        outputs[t] = state[0]
    out = steps.join(outputs)
    set_samples(out, samples_of(x))
    return out, tuple(torch.cat(parts) for parts in zip(state, *ended, strict=True))


def _axes(op: str, x: Tensor, states: Sequence[Tensor], sizes: list[int] | None) -> tuple[Samples, Samples]:
    """Where the samples are in the time steps and in the states, where one of them may be no data."""
    of_x = samples_of(x)
    of_states = next((s for s in map(samples_of, states) if s is not None), None)
    axis = of_x or of_states or Lost("a tensor that came from outside of torch's own functions", mixed=False)
    if sizes is None:
        return axis, axis
    if of_x is None:
        return rows_axis(axis, sizes), axis
    return axis, states_axis(op, axis, sizes, 1)


def _recurrent(step: Step) -> Rule:
    """A recurrent layer, torch's `lstm`, `gru`, `rnn_tanh` or `rnn_relu`: `(output, last state of each layer, ...)`."""

    def rule(mode: Interpreter, func: Callable, *args: Any, **kwargs: Any) -> Any:
        if kwargs or args[0].numel() == 0:  # which torch refuses in its own words
            return NO_RULE
        op = op_name(func)
        packed = is_packed(args)
        sizes = args[1].tolist() if packed else None
        steps = _Steps(sizes)
        x, (hx, params, has_biases, layers, dropout, training, bidirectional, *rest) = args[0], args[1 + packed :]
        batch_first = bool(rest and rest[0])
        given = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        if batch_first:
            x = mode.call(torch.transpose, x, 0, 1)
        of_steps, of_states = _axes(op, x, given, sizes)
        x = _carrying(mode, op, x, of_steps)
        given = [_carrying(mode, op, part, of_states).unbind(0) for part in given]
        ways = 2 if bidirectional else 1
        size = len(params) // (layers * ways)
        last: list[State] = []
        for layer in range(layers):
            if layer and dropout and training:
                x = mode.call(F.dropout, x, dropout, training)
            outputs = []
            for way in range(ways):
                k = layer * ways + way
                weights = list(params[k * size : (k + 1) * size])
                if not has_biases:
                    weights[2:2] = [None, None]
                weights += [None] * (5 - len(weights))
                first = tuple(part[k] for part in given)
                out, state = _one_direction(mode, op, step, steps, x, first, weights, back=way == 1)
                outputs.append(out)
                last.append(state)
            x = outputs[0] if ways == 1 else mode.call(torch.cat, outputs, -1)
        if batch_first:
            x = mode.call(torch.transpose, x, 0, 1)
        return x, *(torch.stack(parts) for parts in zip(*last, strict=True))

    return rule


def _cell(step: Step) -> Rule:
    """One step of a recurrent layer, as `nn.LSTMCell` calls it: two linear maps."""

    def rule(
        mode: Interpreter,
        func: Callable,
        x: Tensor,
        hx: Any,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        state = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        axis, _ = _axes(op_name(func), x, state, None)
        x, *state = (_carrying(mode, op_name(func), t, axis) for t in (x, *state))
        result = step(mode.call(F.linear, x, w_ih, b_ih), mode.call(F.linear, state[0], w_hh, b_hh), *state)
        return result if len(result) > 1 else result[0]

    return rule


# ---------------------------------------------------------------- the table


_STEPS = {"lstm": _lstm_step, "gru": _gru_step, "rnn_tanh": _tanh_step, "rnn_relu": _relu_step}

COMPOSITES: dict[str, Rule] = {
    "scaled_dot_product_attention": _attention,
    "native_multi_head_attention": _for_inference,
    "transformer_encoder_layer_fwd": _for_inference,
    **{name: _recurrent(step) for name, step in _STEPS.items()},
    **{f"{name}_cell": _cell(step) for name, step in _STEPS.items()},
}
