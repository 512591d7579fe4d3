"""Calls that hold many operations: attention, transformers, recurrent layers and cells, in all their arguments."""

import itertools
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import BatchMaker, Built, Draw, functionalized, squared
from oracle import assert_dots, assert_dots_by_name, assert_grads, expected, losses_and_grads, mean
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import ghostfunc as gf

CPU = torch.device("cpu")
D, HEADS, T = 4, 2, 5
LENGTHS = (3, 5, 2, 4)


def distance(output: Any, batch: tuple[Tensor, ...]) -> Tensor:
    """Mean squared distance of everything that came out to a number, for each sample."""
    parts = torch.cat([part.flatten(1) for part in (output if isinstance(output, tuple) else (output,))], 1)
    return squared(parts.tanh(), batch[-1][:, None])


def sequences(*, features: int = D, padded: bool = False, lengths: bool = False) -> BatchMaker:
    """A maker of `(x [n, T, d], y [n])`, with a mask of padding or with lengths in the middle."""

    def batch(n: int, seed: int) -> tuple[Tensor, ...]:
        draw = Draw(torch.float64, CPU, seed)
        x, y = draw.normal(n, T, features), draw.normal(n)
        long = torch.tensor([LENGTHS[i % len(LENGTHS)] for i in range(n)])
        middle = ((torch.arange(T) >= long[:, None]),) * padded + (long,) * lengths
        return x, *middle, y

    return batch


class Around(nn.Module):
    """A module called in its own way."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.inner = module
        self.call = call

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(self.inner, *inputs)


def case(module: nn.Module, call: Callable[..., Any], batch: BatchMaker | None = None) -> Built:
    """A case of `call(module, x, ...)`, whose result is one tensor or several, the samples first."""
    around = Around(module, call)
    around.train(module.training)
    return Built(*functionalized(around, distance, torch.float64, CPU), batch or sequences())


def check(built: Built, *, probe: str = "") -> None:
    """Losses as torch's own, and every quantity as the loop over single samples has it; followed without a probe."""
    model_fn, params, batch = built
    train, val = batch(4, 1), batch(3, 2)
    losses, g = losses_and_grads(model_fn, params, train)
    _, v = losses_and_grads(model_fn, params, val)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}  # torch's way where there is a graph
    torch.testing.assert_close(model_fn(leaves, train).detach(), losses, rtol=1e-12, atol=1e-12)

    result = gf.value_and_grad_dot(model_fn, params, train, val, out="param train", schedule="joint")
    assert_dots_by_name(result.dots, expected("param train", g, v), 1e-10, "joint")
    assert_grads(result.grads, mean(g), 1e-10, "joint")
    torch.testing.assert_close(result.losses, losses, rtol=1e-12, atol=1e-12)
    dots = gf.ghost_grad_dot(model_fn, params, train, val, out="train val", schedule="two-phase")
    assert_dots(dots, expected("train val", g, v), 1e-10, "two-phase")
    _, factors = gf.ghost_factors(model_fn, params, train)
    dense = {name: sum(f.dense(params[name].shape) for f in uses) for name, uses in factors.items()}
    assert_grads(dense, g, 1e-10, "factors")
    reason = gf.explain(model_fn, params, train).probe
    assert probe in reason if probe else not reason


# --- multi-head attention ---------------------------------------------------------------------------------------------

ATTENTIONS: dict[str, dict[str, Any]] = {
    "packed": {},
    "without biases": {"bias": False},
    "bias_k and bias_v": {"add_bias_kv": True},
    "zero attention": {"add_zero_attn": True},
    "bias and zero": {"add_bias_kv": True, "add_zero_attn": True},
    "other keys and values": {"kdim": 3, "vdim": 6},
}


@pytest.mark.parametrize(
    ("batch_first", "need_weights"), [(True, True), (False, False)], ids=["batch first, weights", "time first"]
)
@pytest.mark.parametrize("options", ATTENTIONS.values(), ids=ATTENTIONS)
def test_attention(options, need_weights, batch_first):
    """Every way to build `nn.MultiheadAttention`, in both layouts; the weights are part of what is returned."""

    def call(attention: nn.MultiheadAttention, x: Tensor) -> Any:
        x = x if batch_first else x.transpose(0, 1)
        kv = (x, x) if attention.kdim == D else (x[..., :3].sin(), torch.cat([x, x[..., :2].cos()], -1))
        out, weights = attention(x, *kv, need_weights=need_weights)
        out = out if batch_first else out.transpose(0, 1)
        return (out, weights) if need_weights else out

    check(case(nn.MultiheadAttention(D, HEADS, batch_first=batch_first, **options), call))


def _causal(x: Tensor) -> Tensor:
    return torch.ones(T, T, dtype=torch.bool).triu(1)


MASKS: dict[str, Callable[[Tensor, Tensor], dict[str, Any]]] = {
    "padding": lambda x, pad: {"key_padding_mask": pad},
    "padding by numbers": lambda x, pad: {"key_padding_mask": torch.zeros_like(x[..., 0]).masked_fill(pad, -3.0)},
    "causal": lambda x, pad: {"attn_mask": _causal(x)},
    "causal by numbers": lambda x, pad: {"attn_mask": torch.zeros(T, T).to(x).masked_fill(_causal(x), -torch.inf)},
    "causal by a hint": lambda x, pad: {"attn_mask": _causal(x), "is_causal": True},
    "both": lambda x, pad: {"attn_mask": _causal(x), "key_padding_mask": pad},
    "for each head": lambda x, pad: {"attn_mask": (x @ x.mT).repeat_interleave(HEADS, 0)},
    "a weight for each head": lambda x, pad: {"average_attn_weights": False},
}


@pytest.mark.parametrize("need_weights", [True, False], ids=["with weights", "without"])
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_attention_masks(masks, need_weights):
    def call(attention: nn.MultiheadAttention, x: Tensor, pad: Tensor) -> Any:
        out, weights = attention(x, x, x, need_weights=need_weights, **masks(x, pad))
        return (out, weights) if need_weights else out

    check(case(nn.MultiheadAttention(D, HEADS, batch_first=True), call, sequences(padded=True)))


def test_attention_with_given_keys_and_values():
    def call(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
        given = {
            key: f(x[..., :2]).repeat_interleave(HEADS, 0)
            for key, f in (("static_k", Tensor.sin), ("static_v", Tensor.cos))
        }
        x = x.transpose(0, 1)
        return F.multi_head_attention_forward(
            x, x, x, D, HEADS, attention.in_proj_weight, attention.in_proj_bias, None, None, False, 0.0,
            attention.out_proj.weight, attention.out_proj.bias, **given,
        )[0].transpose(0, 1)  # fmt: skip

    check(case(nn.MultiheadAttention(D, HEADS), call))


def test_attention_sample_by_sample():
    """Unbatched input; each sample's result belongs to it."""

    def call(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
        return torch.stack([attention(row, row, row)[0] for row in x])

    module = nn.MultiheadAttention(D, HEADS)
    model_fn, params, batch = case(module, call)
    train, val = batch(4, 1), batch(3, 2)
    (_, g), (_, v) = losses_and_grads(model_fn, params, train), losses_and_grads(model_fn, params, val)
    assert_dots(gf.ghost_grad_dot(model_fn, params, train, val), expected("train", g, v), 1e-10, "unbatched")


def test_attention_returns_what_torch_returns():
    """The output and the weights, or None for them."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(D, HEADS, batch_first=True, dtype=torch.float64)
    params = {name: p.detach() for name, p in attention.named_parameters()}
    x = Draw(torch.float64, CPU).normal(3, T, D)
    for need_weights, average in itertools.product((True, False), (True, False)):
        options = {"need_weights": need_weights, "average_attn_weights": average}
        seen: list[Any] = []

        def model_fn(p, x, options=options, seen=seen):
            seen.append(torch.func.functional_call(attention, p, (x, x, x), options))
            return seen[-1][0].pow(2).mean((1, 2))

        gf.ghost_grad_along(model_fn, params, x, params)
        for ours, torchs in zip(seen[0], attention(x, x, x, **options), strict=True):
            torch.testing.assert_close(ours, torchs, rtol=1e-14, atol=1e-14)


def test_attention_refuses_what_torch_refuses():
    def call(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
        return attention(x, x[:, 1:], x)[0]

    model_fn, params, batch = case(nn.MultiheadAttention(D, HEADS, batch_first=True), call)
    with pytest.raises(AssertionError, match="key shape"):
        gf.ghost_grad_along(model_fn, params, batch(3, 1), params)
    assert not torch.overrides._get_current_function_mode_stack()


# --- learned queries, keys, values and biases -------------------------------------------------------------------------


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def _former(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """Learned queries with layers of their own before they meet the data."""
    q = F.linear(F.layer_norm(p["q"].expand(len(x), -1, -1), (D,)), p["w"])
    return F.scaled_dot_product_attention(_heads(q), _heads(x @ p["k"]), _heads(x))


LEARNED: dict[str, tuple[Callable[[dict[str, Tensor], Tensor], Tensor], dict[str, tuple[int, ...]]]] = {
    "queries": (
        lambda p, x: F.scaled_dot_product_attention(p["q"].expand(len(x), -1, -1), x @ p["k"], x),
        {"q": (3, D), "k": (D, D)},
    ),
    "queries by keyword": (
        lambda p, x: F.scaled_dot_product_attention(query=p["q"].expand(len(x), -1, -1), key=x, value=x), {"q": (3, D)}
    ),
    "queries for all": (lambda p, x: F.scaled_dot_product_attention(p["q"], x, x), {"q": (1, 3, D)}),
    "repeated queries": (
        lambda p, x: F.scaled_dot_product_attention(p["q"].repeat(len(x), 1, 1), x, x), {"q": (3, D)}
    ),
    "queries with layers": (_former, {"q": (1, 3, D), "w": (D, D), "k": (D, D)}),
    "keys and values": (
        lambda p, x: F.scaled_dot_product_attention(_heads(x), p["k"].expand(len(x), -1, -1, -1), p["v"][None]),
        {"k": (HEADS, 3, 2), "v": (HEADS, 3, 2)},
    ),
    "heads first": (
        lambda p, x: F.scaled_dot_product_attention(
            p["q"].expand(-1, len(x), -1, -1), *2 * [_heads(x).transpose(0, 1)]
        ).transpose(0, 1),
        {"q": (HEADS, 1, 3, 2)},
    ),
    "position biases": (
        lambda p, x: F.scaled_dot_product_attention(_heads(x), _heads(x @ p["k"]), _heads(x), p["bias"]),
        {"k": (D, D), "bias": (HEADS, T, T)},
    ),
    "one key for two heads": (
        lambda p, x: F.scaled_dot_product_attention(_heads(x), p["k"][None], p["k"][None], enable_gqa=True),
        {"k": (1, T, 2)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEARNED)
def test_attention_around_parameters(name):
    body, shapes = LEARNED[name]

    def model_fn(p, batch):
        return distance(body(p, batch[0]), batch)

    params, batch = Draw(torch.float64, CPU).params(**shapes), sequences()
    check(Built(model_fn, params, batch))
    (_, g), (_, v) = (losses_and_grads(model_fn, params, batch(1, seed)) for seed in (1, 2))
    one = gf.ghost_grad_dot(model_fn, params, batch(1, 1), batch(1, 2), schedule="two-phase")
    assert_dots(one, expected("train", g, v), 1e-10, "one sample")


# --- transformers -----------------------------------------------------------------------------------------------------


def _encoder(layers: int, **options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(D, HEADS, 6, dropout=0.0, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the nested tensors that it will not use
        return nn.TransformerEncoder(layer, layers) if layers else layer


ENCODERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm first": {"norm_first": True, "activation": "gelu"},
    "without biases": {"bias": False},
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layers", [0, 2], ids=["a layer", "an encoder"])
@pytest.mark.parametrize("options", ENCODERS.values(), ids=ENCODERS)
def test_encoders(options, layers, training):
    """With padding, where nested tensors would be made in eval mode, and with a causal mask."""

    def call(encoder: nn.Module, x: Tensor, pad: Tensor) -> tuple[Tensor, ...]:
        mask = {"mask" if layers else "src_mask": _causal(x), "is_causal": True}
        return encoder(x, src_key_padding_mask=pad), encoder(x, **mask)

    torch.manual_seed(0)
    module = _encoder(layers, batch_first=True, **options).train(training)
    check(case(module, call, sequences(padded=True)))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "time first"])
def test_transformer(batch_first, training):
    """The whole of `nn.Transformer`, with a causal mask for the decoder and padding for the encoder's side."""

    def call(transformer: nn.Transformer, x: Tensor, pad: Tensor) -> Tensor:
        source, target = (t if batch_first else t.transpose(0, 1) for t in (x, x[:, :3].sin()))
        masks = {"tgt_mask": _causal(x)[:3, :3], "src_key_padding_mask": pad, "memory_key_padding_mask": pad}
        out = transformer(source, target, **masks, tgt_is_causal=True)
        return out if batch_first else out.transpose(0, 1)

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = nn.Transformer(D, HEADS, 1, 1, 6, dropout=0.0, batch_first=batch_first).train(training)
    check(case(module, call, sequences(padded=True)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_frozen_encoder_is_followed(training):
    """In eval mode torch gives a frozen encoder to kernels for inference; at positions of data they say the same.

    At padded positions they say zero, and the interpreter what the encoder says in training.
    """

    def call(m: nn.ModuleList, x: Tensor, pad: Tensor) -> Tensor:
        return m[1](m[0](x, src_key_padding_mask=pad)).masked_fill(pad[..., None], 0)

    torch.manual_seed(0)
    module = nn.ModuleList([_encoder(1, batch_first=True).requires_grad_(False), nn.Linear(D, 3)]).train(training)
    check(case(module, call, sequences(padded=True)))


def test_layers_for_inference_are_refused_by_name():
    """The fused layers that torch calls where nothing has a gradient have no derivative at all."""
    draw = Draw(torch.float64, CPU)
    params = draw.params(w=(3 * D, D), b=(3 * D,), out=(D, D), shift=(D,))
    batch = sequences()

    def attention(p, batch):
        x = batch[0]
        return distance(torch._native_multi_head_attention(x, x, x, D, HEADS, *p.values())[0], batch)

    def layer(p, batch):
        w, b, out, shift = p.values()
        more = (False, False, 1e-5, shift, shift, shift, shift, out, shift, out, shift)
        return distance(torch._transformer_encoder_layer_fwd(batch[0], D, HEADS, w, b, out, shift, *more), batch)

    for model_fn, how in itertools.product((attention, layer), ("raise", "dense")):
        with pytest.raises(gf.UnsupportedUse, match="no derivative") as refusal:
            gf.ghost_grad_along(model_fn, params, batch(3, 1), params, on_unsupported=how)
        assert set(refusal.value.parameters) == set(params)


# --- recurrent layers -------------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn": nn.RNN,
    "rnn relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}
RECURRENT: dict[str, dict[str, Any]] = {
    "batch first": {"batch_first": True},
    "two layers, two directions": {"num_layers": 2, "bidirectional": True},
    "without biases, batch first": {"bias": False, "num_layers": 2, "batch_first": True},
}
HIDDEN = 3


def _state(rnn: nn.RNNBase, of_layer: Callable[[int], Tensor]) -> Any:
    """An initial state from one `[layers, B, d]` for each of its parts."""
    parts = tuple(of_layer(k) for k in range(1 + isinstance(rnn, nn.LSTM)))
    return parts if isinstance(rnn, nn.LSTM) else parts[0]


def _last(state: Any) -> tuple[Tensor, ...]:
    """The last states with the samples first."""
    return tuple(part.transpose(0, 1) for part in (state if isinstance(state, tuple) else (state,)))


@pytest.mark.parametrize("options", RECURRENT.values(), ids=RECURRENT)
@pytest.mark.parametrize("kind", KINDS)
def test_recurrent(kind, options):
    """The outputs and the last states, from zeros and from states that the data gives."""

    def call(rnn: nn.RNNBase, x: Tensor) -> tuple[Tensor, ...]:
        count = rnn.num_layers * (1 + rnn.bidirectional)
        given = _state(rnn, lambda k: x[:, :count, k : k + HIDDEN].transpose(0, 1).contiguous())
        steps = x if rnn.batch_first else x.transpose(0, 1)
        zero, zero_states = rnn(steps)
        out, states = rnn(steps, given)
        outs = (zero, out) if rnn.batch_first else (zero.transpose(0, 1), out.transpose(0, 1))
        return *outs, *_last(zero_states), *_last(states)

    torch.manual_seed(0)
    check(case(KINDS[kind](D, HIDDEN, **options), call))


@pytest.mark.parametrize("bias", [True, False])
def test_lstm_projection(bias):
    torch.manual_seed(0)
    rnn = nn.LSTM(D, HIDDEN, proj_size=2, num_layers=2, bidirectional=True, batch_first=True, bias=bias)
    check(case(rnn, lambda rnn, x: rnn(x)[0]))


class LearnedStates(nn.Module):
    """A recurrent layer, and parameters that its state starts from."""

    def __init__(self, rnn: nn.Module, layers: int) -> None:
        super().__init__()
        self.rnn = rnn
        self.start = nn.Parameter(torch.zeros(2, layers, 1, HIDDEN))


@pytest.mark.parametrize("kind", KINDS)
def test_learned_initial_states(kind):
    def call(m: LearnedStates, x: Tensor) -> Tensor:
        return m.rnn(x, _state(m.rnn, lambda k: m.start[k].expand(-1, len(x), -1).contiguous()))[0]

    torch.manual_seed(0)
    check(case(LearnedStates(KINDS[kind](D, HIDDEN, num_layers=2, batch_first=True), 2), call))


@pytest.mark.parametrize("kind", KINDS)
def test_recurrent_without_input(kind):
    """A decoder that hears nothing but its first state, and one that hears the same learned word at every step."""

    def call(m: LearnedStates, x: Tensor) -> tuple[Tensor, ...]:
        state = _state(m.rnn, lambda k: x[None, :, k, :HIDDEN].contiguous())
        silence = x.new_zeros(len(x), T, HIDDEN)
        word = m.start[0, 0].expand(len(x), T, HIDDEN)
        return m.rnn(silence, state)[0], m.rnn(word, state)[0]

    torch.manual_seed(0)
    check(case(LearnedStates(KINDS[kind](HIDDEN, HIDDEN, batch_first=True), 1), call))


@pytest.mark.parametrize("bias", [True, False], ids=["biases", "without"])
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn", "rnn relu"])
def test_cells(kind, bias):
    """Steps by hand, from zeros and from a learned state."""
    cells = {
        "lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell,
        "rnn relu": lambda *sizes, **options: nn.RNNCell(*sizes, nonlinearity="relu", **options),
    }  # fmt: skip

    def call(m: LearnedStates, x: Tensor) -> tuple[Tensor, ...]:
        found = []
        learned = tuple(part.expand(len(x), -1) for part in m.start[:, 0, 0])
        for state in (None, learned if kind == "lstm" else learned[0]):
            for t in range(3):
                state = m.rnn(x[:, t], state)
            found += list(state) if kind == "lstm" else [state]
        return tuple(found)

    torch.manual_seed(0)
    check(case(LearnedStates(cells[kind](D, HIDDEN, bias=bias), 1), call))


@pytest.mark.parametrize("deep", [False, True], ids=["one layer", "two layers, two directions"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences(kind, deep):
    """Sequences of their own lengths, sorted and put back by torch, from zeros and from states that the data gives."""

    def call(rnn: nn.RNNBase, x: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        count = rnn.num_layers * (1 + rnn.bidirectional)
        given = _state(rnn, lambda k: x[:, :count, k : k + HIDDEN].transpose(0, 1).contiguous())
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        zero, zero_states = rnn(packed)
        out, states = rnn(packed, given)
        padded = (pad_packed_sequence(part, batch_first=True, total_length=T)[0] for part in (zero, out))
        return *padded, *_last(zero_states), *_last(states)

    torch.manual_seed(0)
    rnn = KINDS[kind](D, HIDDEN, num_layers=1 + deep, bidirectional=deep)
    check(case(rnn, call, sequences(lengths=True)))


class Double(torch.autograd.Function):
    """A user's own Function on the data, which leaves torch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Two times x."""
        return torch.tensor(x.tolist(), dtype=x.dtype) * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        """Two times g."""
        return 2 * g


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_recurrent_behind_an_unknown_operation(packed):
    """Where the samples are not followed, the probe finds them in one factor for all time steps."""

    def call(m: nn.ModuleList, x: Tensor, lengths: Tensor) -> Tensor:
        x = Double.apply(m[0](x))
        if not packed:
            return m[1](x)[0]
        rows = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(m[1](rows)[0], batch_first=True, total_length=T)[0]

    torch.manual_seed(0)
    module = nn.ModuleList([nn.Linear(D, D), nn.LSTM(D, HIDDEN, batch_first=True, bidirectional=True)])
    check(case(module, call, sequences(lengths=True)), probe="index_select" if packed else "outside")


@pytest.mark.parametrize("train_only", ["none", "weight_hh_l0", "bias_hh_l1_reverse"])
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_recurrent(kind, train_only):
    """Frozen layers are followed, and the parameters that are left are exact."""
    torch.manual_seed(0)
    rnn = KINDS[kind](D, HIDDEN, num_layers=2, bidirectional=True, batch_first=True)
    for name, p in rnn.named_parameters():
        p.requires_grad_(name == train_only)
    module = nn.ModuleList([nn.Linear(D, D), rnn])
    check(case(module, lambda m, x: (lambda out, states: (out, *_last(states)))(*m[1](m[0](x)))))


def test_one_factor_for_all_time_steps():
    """A recurrent weight costs what a linear layer at T positions costs."""
    rnn = nn.LSTM(D, HIDDEN, num_layers=2, batch_first=True)
    model_fn, params, batch = case(rnn, lambda rnn, x: rnn(x)[0])
    _, factors = gf.ghost_factors(model_fn, params, batch(4, 1))
    for name, uses in factors.items():
        if "weight" in name:
            (factor,) = uses
            assert isinstance(factor, gf.Outer)
            assert factor.a.shape[:2] == (4, T)


@pytest.mark.parametrize("kind", KINDS)
def test_a_recurrent_layer_used_again_and_again(kind):
    """Step by step, and then on its own outputs: the uses belong together in every dot product."""

    def call(rnn: nn.RNNBase, x: Tensor) -> tuple[Tensor, ...]:
        state, outs = None, []
        for t in range(3):
            out, state = rnn(x[:, t : t + 1], state)
            outs.append(out)
        return torch.cat(outs, 1), rnn(rnn(x)[0])[0]

    torch.manual_seed(0)
    check(case(KINDS[kind](D, D, batch_first=True), call))


def test_an_empty_sequence_is_refused_in_torchs_words():
    rnn = nn.LSTM(D, HIDDEN, batch_first=True)
    model_fn, params, batch = case(rnn, lambda rnn, x: rnn(x[:, :0])[0])
    with pytest.raises(RuntimeError, match="sequence length to be larger than 0"):
        gf.ghost_grad_along(model_fn, params, batch(3, 1), params)


def test_samples_in_the_place_of_time_steps_are_refused():
    rnn = nn.GRU(D, HIDDEN)  # batch_first was forgotten
    model_fn, params, batch = case(rnn, lambda rnn, x: rnn(x)[0])
    with pytest.raises(gf.InteractingSamples, match="samples meet in `gru`"):
        gf.ghost_grad_along(model_fn, params, batch(3, 1), params)
    rnn.requires_grad_(False)
    model_fn, params, batch = case(nn.ModuleList([rnn, nn.Linear(HIDDEN, 2)]), lambda m, x: m[1](m[0](x)[0]))
    with pytest.raises(gf.InteractingSamples, match="samples meet in `gru`"):
        gf.ghost_grad_along(model_fn, params, batch(3, 1), params)


@pytest.mark.parametrize("fails", [False, True])
def test_a_recurrent_layer_keeps_its_own_weights(fails):
    """`functional_call` leaves the swapped tensors in the layer's list of weights; a call puts the list back."""
    rnn = nn.LSTM(D, HIDDEN, batch_first=True)

    def call(rnn: nn.LSTM, x: Tensor) -> Tensor:
        out = rnn(x)[0]
        if fails:
            raise ArithmeticError
        return out

    model_fn, params, batch = case(rnn, call)
    listed = rnn._flat_weights
    try:
        gf.ghost_grad_along(model_fn, params, batch(3, 1), params)
    except ArithmeticError:
        assert fails
    assert rnn._flat_weights is listed
    assert all(kept is p for kept, p in zip(listed, rnn.parameters(), strict=True))
    assert all(ref() is p for ref, p in zip(rnn._flat_weight_refs, rnn.parameters(), strict=True))


# --- dropout ----------------------------------------------------------------------------------------------------------


def _attending(dropout: float, need_weights: bool) -> Built:
    module = nn.MultiheadAttention(D, HEADS, dropout=dropout, batch_first=True)
    return case(module, lambda m, x: m(x, x, x, need_weights=need_weights)[0])


def _recurring(kind: str, frozen: bool) -> Built:
    rnn = KINDS[kind](D, HIDDEN, num_layers=3, bidirectional=True, dropout=0.4, batch_first=True)
    rnn.requires_grad_(not frozen)
    return case(nn.ModuleList([nn.Linear(D, D), rnn]), lambda m, x: m[1](m[0](x))[0])


def _transforming() -> Built:
    layer = nn.TransformerEncoderLayer(D, HEADS, 6, dropout=0.3, batch_first=True)
    return case(layer, lambda m, x: m(x))


DRAWING: dict[str, Callable[[], Built]] = {
    "attention with weights": lambda: _attending(0.4, True),
    "attention": lambda: _attending(0.4, False),
    "lstm": lambda: _recurring("lstm", False),
    "gru": lambda: _recurring("gru", False),
    "rnn": lambda: _recurring("rnn", False),
    "frozen lstm": lambda: _recurring("lstm", True),
    "frozen gru": lambda: _recurring("gru", True),
    "encoder layer": _transforming,
}


@pytest.mark.parametrize("name", DRAWING)
def test_dropout_draws_what_torch_draws(name):
    """Under one seed the train losses are those of a plain step; validation rows are as in eval mode."""
    torch.manual_seed(0)
    model_fn, params, batch = DRAWING[name]()
    train, val = batch(4, 1), batch(3, 2)
    torch.manual_seed(7)
    plain = model_fn(params, train)
    torch.manual_seed(8)
    assert (model_fn(params, train) - plain).abs().max() > 1e-3
    torch.manual_seed(7)
    result = gf.value_and_grad_dot(model_fn, params, train, val)
    torch.testing.assert_close(result.losses, plain, rtol=1e-12, atol=1e-12)
    torch.manual_seed(9)
    again = gf.value_and_grad_dot(model_fn, params, train, val)
    assert torch.equal(again.val_losses, result.val_losses)
    assert not torch.equal(again.losses, result.losses)


def test_dropout_grads_are_those_of_the_masks_that_were_drawn():
    torch.manual_seed(0)
    model_fn, params, batch = _recurring("lstm", False)
    train, val = batch(4, 1), batch(3, 2)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    torch.manual_seed(7)
    plain = torch.autograd.grad(model_fn(leaves, train).mean(), list(leaves.values()))
    torch.manual_seed(7)
    grads = gf.value_and_grad_dot(model_fn, params, train, val).grads
    assert_grads(grads, dict(zip(params, plain, strict=True)), 1e-10, "grads")


# --- inside other transforms ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["lstm", "gru", "encoder"])
def test_composes_with_torch_func(name):
    """`torch.func.grad` of a dot product, by differences of fourth order, and `vmap` over an ensemble of parameters."""
    torch.manual_seed(0)
    if name == "encoder":
        built = case(_encoder(1, batch_first=True, activation="gelu"), lambda m, x: m(x))
    else:
        built = case(KINDS[name](D, HIDDEN, batch_first=True, bidirectional=True), lambda m, x: m(x)[0])
    model_fn, params, batch = built
    train, val = batch(3, 1), batch(2, 2)
    draw = Draw(torch.float64, CPU, seed=3)
    step = {key: draw.normal(*p.shape) for key, p in params.items()}

    def total(p):
        return gf.ghost_grad_dot(model_fn, p, train, val).sum()

    def moved(by):
        return {key: p + by * step[key] for key, p in params.items()}

    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        gradient = torch.func.grad(total)(params)
        slope = sum((gradient[key] * step[key]).sum() for key in params)
        near, far = (total(moved(by)) - total(moved(-by)) for by in (2e-4, 4e-4))
        torch.testing.assert_close(slope, (8 * near - far) / 24e-4, rtol=1e-8, atol=1e-10)
        ensemble = {key: torch.stack([p, moved(0.1)[key]]) for key, p in params.items()}
        torch.testing.assert_close(torch.func.vmap(total)(ensemble), torch.stack([total(params), total(moved(0.1))]))


@pytest.mark.parametrize("name", ["lstm", "attention"])
def test_recomputed(name):
    """Under activation checkpointing, with parameters that are not the module's own (torch alone mixes the two up)."""

    def call(m: nn.ModuleList, x: Tensor, *, again: bool) -> Tensor:
        apply = m[1] if name == "lstm" else lambda h: m[1](h, h, h)
        return checkpoint(lambda h: apply(h)[0], m[0](x), use_reentrant=False) if again else apply(m[0](x))[0]

    torch.manual_seed(0)
    inner = nn.LSTM(D, D, batch_first=True) if name == "lstm" else nn.MultiheadAttention(D, HEADS, batch_first=True)
    module = nn.ModuleList([nn.Linear(D, D), inner])
    model_fn, params, batch = case(module, partial(call, again=True))
    plain_fn, _, _ = case(module, partial(call, again=False))
    params = {key: 0.7 * p + 0.1 for key, p in params.items()}
    train, val = batch(4, 1), batch(3, 2)
    (_, g), (_, v) = losses_and_grads(plain_fn, params, train), losses_and_grads(plain_fn, params, val)
    result = gf.value_and_grad_dot(model_fn, params, train, val)
    assert_dots(result.dots, expected("train", g, v), 1e-10, "recomputed")
    assert_grads(result.grads, mean(g), 1e-10, "recomputed")
    if isinstance(inner, nn.LSTM):
        assert all(kept is p for kept, p in zip(inner._flat_weights, inner.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lstm", "encoder"])
def test_compiled(name):
    """As one graph; Dynamo wants to be told that recurrent layers are allowed."""
    torch.manual_seed(0)
    module = nn.LSTM(D, D, batch_first=True) if name == "lstm" else _encoder(1, batch_first=True)
    built = case(module, lambda m, x: m(x)[0] if name == "lstm" else m(x))
    model_fn, params, batch = built
    train, val = batch(4, 1), batch(3, 2)
    eager = gf.value_and_grad_dot(model_fn, params, train, val)
    with torch._dynamo.config.patch(allow_rnn=True):
        step = torch.compile(
            lambda p, train, val: gf.value_and_grad_dot(model_fn, p, train, val), fullgraph=True, backend="aot_eager"
        )
        compiled = step(params, train, val)
    torch._dynamo.reset()
    torch.testing.assert_close(compiled.dots, eager.dots, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(compiled.grads, eager.grads, rtol=1e-12, atol=1e-14)
