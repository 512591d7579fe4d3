"""The zoo's plain torch modules: one tiny case for each way that a module of `torch.nn` uses its parameters.

Every module reads `x [n, *shape]`; a sample's loss is the mean squared distance of `tanh(output)` to its target.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cases import Built, Draw, functionalized, squared
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from zoo import ZooCase

Build = Callable[[], nn.Module]


def distance(output: Any, batch: tuple[Tensor, ...]) -> Tensor:
    """Mean squared distance of each sample's `tanh(output)` to its target, the batch's last entry."""
    output = output[0] if isinstance(output, tuple) else output
    return squared(output.tanh(), batch[-1].view(-1, *[1] * (output.dim() - 1)))


def move_statistics(module: nn.Module) -> None:
    """Give running means and variances values that are neither 0 nor 1."""
    draw = Draw(torch.float64, torch.device("cpu"), seed=2)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(draw.normal(*buffer.shape, std=0.5))
        if name.endswith("running_var"):
            buffer.copy_(draw.normal(*buffer.shape).square() + 0.5)


def module_case(name: str, build: Build, *shape: int, call: Any = None, train: bool = False) -> ZooCase:
    """A case of a module that reads `x [n, *shape]`, in eval mode unless `train`."""

    def make(dtype: torch.dtype, device: torch.device) -> Built:
        torch.manual_seed(0)
        module = build().train(train)
        move_statistics(module)

        def batch(n: int, seed: int) -> tuple[Tensor, Tensor]:
            draw = Draw(dtype, device, seed)
            return draw.normal(n, *shape), draw.normal(n)

        model_fn, params = functionalized(module, distance, dtype, device, call)
        return Built(model_fn, params, batch)

    return ZooCase(name, make)


# --- convolutions and norms -------------------------------------------------------------------------------------------

LINE, IMAGE, VOLUME = (4, 11), (4, 7, 6), (2, 4, 5, 4)

CONVOLUTIONS: list[tuple[str, Build, tuple[int, ...]]] = [
    ("conv1d", lambda: nn.Conv1d(4, 6, 3), LINE),
    ("conv1d stride, padding, dilation", lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2), LINE),
    ("conv1d same", lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=2), LINE),
    ("conv1d valid", lambda: nn.Conv1d(4, 6, 3, padding="valid", bias=False), LINE),
    ("conv1d causal depthwise", lambda: nn.Conv1d(4, 4, 4, groups=4, padding=3), LINE),
    ("conv1d groups", lambda: nn.Conv1d(4, 6, 3, groups=2, bias=False), LINE),
    ("conv1d circular", lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), LINE),
    ("conv1d pointwise", lambda: nn.Conv1d(4, 6, 1), LINE),
    ("conv2d", lambda: nn.Conv2d(4, 6, 3, padding=1), IMAGE),
    ("conv2d rectangular", lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), IMAGE),
    ("conv2d same", lambda: nn.Conv2d(4, 6, (3, 2), padding="same", dilation=2), IMAGE),
    ("conv2d circular", lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular"), IMAGE),
    ("conv2d reflect", lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), IMAGE),
    ("conv2d groups", lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2), IMAGE),
    ("conv2d depthwise", lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), IMAGE),
    ("conv2d depthwise with a multiplier", lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), IMAGE),
    ("conv2d patches", lambda: nn.Conv2d(4, 6, 3, stride=3), IMAGE),
    ("conv2d of the whole image", lambda: nn.Conv2d(4, 6, (7, 6)), IMAGE),
    ("conv3d", lambda: nn.Conv3d(2, 4, 3, padding=1, stride=(1, 2, 1)), VOLUME),
    ("conv3d groups and dilation", lambda: nn.Conv3d(2, 4, 2, groups=2, dilation=(1, 2, 1)), VOLUME),
    ("conv3d same", lambda: nn.Conv3d(2, 4, 3, padding="same", groups=2), VOLUME),
    ("conv transpose 1d", lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1), LINE),
    ("conv transpose 1d groups", lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, dilation=2, bias=False), LINE),
    ("conv transpose 2d", lambda: nn.ConvTranspose2d(4, 6, 3, stride=(2, 1), output_padding=(1, 0)), IMAGE),
    ("conv transpose 2d groups", lambda: nn.ConvTranspose2d(4, 6, (3, 2), groups=2, padding=1), IMAGE),
    ("conv transpose 2d depthwise", lambda: nn.ConvTranspose2d(4, 4, 3, groups=4, stride=2), IMAGE),
    ("conv transpose 3d", lambda: nn.ConvTranspose3d(2, 4, 2, stride=2, output_padding=(1, 0, 1)), VOLUME),
    ("conv transpose 3d groups", lambda: nn.ConvTranspose3d(2, 4, 2, groups=2, padding=1), VOLUME),
]

NORMS: list[tuple[str, Build, tuple[int, ...]]] = [
    ("group norm", lambda: nn.GroupNorm(2, 4), IMAGE),
    ("group norm of vectors", lambda: nn.GroupNorm(2, 6), (6,)),
    ("instance norm 1d", lambda: nn.InstanceNorm1d(4, affine=True), LINE),
    ("instance norm 2d", lambda: nn.InstanceNorm2d(4, affine=True), IMAGE),
    ("instance norm 3d", lambda: nn.InstanceNorm3d(2, affine=True), VOLUME),
    (
        "instance norm with running statistics",
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        IMAGE,
    ),
    ("batch norm 1d", lambda: nn.BatchNorm1d(4), LINE),
    ("batch norm 2d", lambda: nn.BatchNorm2d(4), IMAGE),
    ("batch norm 3d", lambda: nn.BatchNorm3d(2), VOLUME),
    ("layer norm", lambda: nn.LayerNorm(6), IMAGE),
    ("layer norm without bias", lambda: nn.LayerNorm([7, 6], bias=False), IMAGE),
    ("rms norm", lambda: nn.RMSNorm(6), IMAGE),
    ("rms norm over two dimensions", lambda: nn.RMSNorm([7, 6], eps=1e-5), IMAGE),
]


def _between(build: Build, channels: int, dims: int) -> Build:
    """Pointwise convolution, tanh, the module: the module's own input needs a gradient."""
    pointwise = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return lambda: nn.Sequential(pointwise(channels, channels, 1), nn.Tanh(), build())


class WeightStandardised(nn.Conv2d):
    """A convolution with a weight that is derived from its parameter."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve with the standardised weight."""
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        std = self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(input, (self.weight - mean) / (std + 1e-3), self.bias, padding=1)


class Uneven(nn.Conv2d):
    """A convolution that pads one more at the end than at the start, which torch warns about."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return super().forward(input)


class ConvolvedTwice(nn.Module):
    """One kernel at two resolutions, and once more on transposed images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Three uses of one weight."""
        h = self.conv(F.avg_pool2d(self.conv(x).tanh(), 2)).tanh()
        return self.conv(h.transpose(-1, -2))


class Frames(nn.Module):
    """A convolution over the frames of a video, folded into the batch; then one over time."""

    def __init__(self) -> None:
        super().__init__()
        self.space = nn.Conv2d(4, 6, 3, stride=2)
        self.time = nn.Conv1d(6, 5, 2)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 3, 4, 7, 6]` to `[B, 5, 2]`."""
        b, t = x.shape[:2]
        h = self.space(x.flatten(0, 1)).tanh().mean((-1, -2))  # [B * T, 6]
        return self.time(h.view(b, t, 6).transpose(1, 2))


class FramesFirst(Frames):
    """The same with the frames before the samples: rows are not sample-major."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 3, 4, 7, 6]` to `[B, 5, 2]`."""
        b, t = x.shape[:2]
        h = self.space(x.transpose(0, 1).flatten(0, 1)).tanh().mean((-1, -2))  # [T * B, 6]
        return self.time(h.view(t, b, 6).permute(1, 2, 0))


class Unbatched(nn.Module):
    """A depthwise convolution with samples as its channels: `[1, B * C, T]` and the kernels repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 4, 11]` to `[B, 4, 9]`."""
        b, c, t = x.shape
        out = F.conv1d(x.reshape(1, b * c, t), self.weight.repeat(b, 1, 1), groups=b * c)
        return out.view(b, c, -1)


CONVOLUTION_CASES = [
    *(module_case(name, _between(build, shape[0], len(shape) - 1), *shape) for name, build, shape in CONVOLUTIONS),
    module_case("conv2d on the data itself", lambda: nn.Conv2d(4, 6, 3), *IMAGE),
    module_case("conv2d with a standardised weight", lambda: WeightStandardised(4, 6, 3), *IMAGE),
    module_case("conv2d same, even kernel", lambda: Uneven(4, 6, (2, 4), padding="same"), *IMAGE),
    module_case("conv2d three times", ConvolvedTwice, *IMAGE),
    module_case("frames in the batch", Frames, 3, *IMAGE),
    module_case("frames before the batch", FramesFirst, 3, *IMAGE),
    module_case("samples as channels", Unbatched, *LINE),
]
NORM_CASES = [
    module_case(name, lambda b=build, d=shape[-1]: nn.Sequential(nn.Linear(d, d), nn.Tanh(), b()), *shape)
    for name, build, shape in NORMS
]


# --- attention --------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """`nn.MultiheadAttention` on `x [B, T, 8]`, with every option of it that the cases set."""

    def __init__(
        self,
        *,
        need_weights: bool = False,
        cross: bool = False,
        mask: bool = False,
        causal: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.need_weights, self.cross, self.mask, self.causal = need_weights, cross, mask, causal
        self.batch_first = options.setdefault("batch_first", True)
        self.attention = nn.MultiheadAttention(8, 2, **options)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, 8]` to `[B, T, 8]`."""
        padding = (x[..., 0] > 0.8).index_fill(1, torch.tensor([0], device=x.device), False) if self.mask else None
        causal = torch.ones(x.shape[1], x.shape[1], device=x.device).triu(1).bool() if self.causal else None
        key, value = (x[..., :5], x[..., 2:5]) if self.cross else (x, x)
        if not self.batch_first:
            x, key, value = (t.transpose(0, 1) for t in (x, key, value))
        out, weights = self.attention(
            x, key, value, key_padding_mask=padding, attn_mask=causal, need_weights=self.need_weights
        )
        out = out if self.batch_first else out.transpose(0, 1)
        return out if weights is None else torch.cat([out, weights], -1)


ATTENTIONS: list[tuple[str, dict[str, Any]]] = [
    ("", {}),
    ("with weights", {"need_weights": True}),
    ("sequence first", {"batch_first": False}),
    ("sequence first with weights", {"batch_first": False, "need_weights": True}),
    ("padded", {"mask": True}),
    ("padded with weights", {"mask": True, "need_weights": True}),
    ("causal", {"causal": True}),
    ("causal and padded, sequence first", {"causal": True, "mask": True, "batch_first": False}),
    ("without bias", {"bias": False}),
    ("with kdim and vdim", {"cross": True, "kdim": 5, "vdim": 3}),
    ("with kdim and vdim and weights", {
        "cross": True, "kdim": 5, "vdim": 3, "need_weights": True, "batch_first": False,
    }),
    ("with bias_k and bias_v", {"add_bias_kv": True}),
    ("with bias_k and bias_v, padded", {"add_bias_kv": True, "mask": True, "need_weights": True, "batch_first": False}),
    ("with zero attention", {"add_zero_attn": True, "causal": True}),
    ("with everything", {
        "cross": True, "kdim": 5, "vdim": 3, "add_bias_kv": True, "add_zero_attn": True, "mask": True, "causal": True,
        "need_weights": True,
    }),
]  # fmt: skip


class Transformer(nn.Module):
    """`nn.Transformer` between `x` and a target made from it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.batch_first = options["batch_first"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # advises another layout
            self.model = nn.Transformer(8, 2, 1, 2, 12, dropout=0.0, **options)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, 8]` to `[B, 3, 8]`."""
        source, target = x, x[:, :3].flip(-1)
        padding = (x[..., 0] > 0.8).index_fill(1, torch.tensor([0], device=x.device), False)
        causal = self.model.generate_square_subsequent_mask(3, device=x.device, dtype=x.dtype)
        if not self.batch_first:
            source, target = source.transpose(0, 1), target.transpose(0, 1)
        out = self.model(source, target, tgt_mask=causal, src_key_padding_mask=padding)
        return out if self.batch_first else out.transpose(0, 1)


class EncoderStack(nn.Module):
    """`nn.TransformerEncoder`; in eval mode and all frozen, torch runs it as one fused call."""

    def __init__(self, *, frozen: bool, padded: bool, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=frozen and padded)
        self.encoder.requires_grad_(not frozen)
        self.head = nn.Linear(8, 3)
        self.padded = padded

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, 8]` to `[B, 3]`."""
        padding = None
        if self.padded:
            padding = torch.arange(x.shape[1], device=x.device) >= 2 + (x[:, :1, 0] > 0).long() * (x.shape[1] - 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # nested tensors are a prototype
            h = self.encoder(x, src_key_padding_mask=padding)
        return self.head(h[:, 0])


ATTENTION_CASES = [
    *(
        module_case(f"multihead attention {name}".rstrip() + mode, lambda o=options: Attention(**o), 4, 8, train=train)
        for name, options in ATTENTIONS
        for mode, train in (("", False), (", training", True))
        if not train or name in ("", "with weights", "sequence first")
    ),
    module_case("transformer", lambda: Transformer(batch_first=True), 4, 8),
    module_case(
        "transformer, sequence first", lambda: Transformer(batch_first=False, activation="gelu"), 4, 8, train=True
    ),
    module_case("encoder stack", lambda: EncoderStack(frozen=False, padded=False), 4, 8),
    module_case("encoder stack padded", lambda: EncoderStack(frozen=False, padded=True, norm_first=True), 4, 8),
    module_case(
        "encoder stack, training", lambda: EncoderStack(frozen=False, padded=True, activation="gelu"), 4, 8, train=True
    ),
    module_case("encoder stack frozen", lambda: EncoderStack(frozen=True, padded=False), 4, 8),
    module_case(
        "encoder stack frozen after a layer that is not",
        lambda: nn.Sequential(nn.Linear(8, 8), EncoderStack(frozen=True, padded=True)),
        4,
        8,
    ),
    module_case("encoder stack frozen and padded", lambda: EncoderStack(frozen=True, padded=True), 4, 8),
]


# --- recurrent --------------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """A recurrent network on `x [B, T, 4]`: all outputs, and the last states where `states`."""

    def __init__(
        self, kind: Callable[..., nn.RNNBase], *, states: bool = False, start: bool = False, **options: Any
    ) -> None:
        super().__init__()
        self.states, self.batch_first = states, options.setdefault("batch_first", True)
        self.rnn = kind(4, 5, **options)
        self.start = nn.Parameter(torch.randn(self.rnn.num_layers, 1, 5)) if start else None

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, 4]` to `[B, ...]`."""
        b = x.shape[0]
        x = x if self.batch_first else x.transpose(0, 1)
        if self.start is None:
            out, last = self.rnn(x)
        else:
            first = self.start.expand(-1, b, -1).contiguous()
            out, last = self.rnn(x, (first, first.tanh()) if isinstance(self.rnn, nn.LSTM) else first)
        out = out if self.batch_first else out.transpose(0, 1)
        if not self.states:
            return out
        states = last if isinstance(last, tuple) else (last,)
        return torch.cat([out.flatten(1), *(s.transpose(0, 1).flatten(1) for s in states)], 1)


class Unrolled(nn.Module):
    """A recurrent cell applied position by position."""

    def __init__(self, kind: Callable[..., nn.Module], **options: Any) -> None:
        super().__init__()
        self.cell = kind(4, 5, **options)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, 4]` to `[B, 5]`."""
        state: Any = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return state[0] + state[1] if isinstance(state, tuple) else state


class Packed(nn.Module):
    """An LSTM on sequences of unequal lengths, as a packed sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 4, 4]` to `[B, 4, 5]`."""
        lengths = 2 + (x[:, 0, 0] > 0).long() * 2
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=4)[0]


RECURRENT_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("", {}),
    ("with states, sequence first", {"states": True, "batch_first": False}),
    ("of two layers, both ways", {"states": True, "num_layers": 2, "bidirectional": True}),
    ("without bias", {"bias": False}),
    ("from a learned state", {"start": True, "num_layers": 2, "states": True}),
]

RECURRENT_CASES = [
    *(
        module_case(f"{kind.__name__.lower()} {name}".rstrip(), lambda k=kind, o=options: Recurrent(k, **o), 4, 4)
        for kind in (nn.LSTM, nn.GRU, nn.RNN)
        for name, options in RECURRENT_OPTIONS
    ),
    module_case("rnn relu", lambda: Recurrent(nn.RNN, nonlinearity="relu", states=True), 4, 4, train=True),
    module_case("lstm with projection", lambda: Recurrent(nn.LSTM, proj_size=3, states=True), 4, 4),
    module_case(
        "lstm with projection, two layers, both ways",
        lambda: Recurrent(nn.LSTM, proj_size=3, num_layers=2, bidirectional=True, batch_first=False), 4, 4, train=True,
    ),
    module_case("lstm packed", Packed, 4, 4),
    module_case("lstm cell", lambda: Unrolled(nn.LSTMCell), 4, 4),
    module_case("gru cell", lambda: Unrolled(nn.GRUCell), 4, 4),
    module_case("rnn cell", lambda: Unrolled(nn.RNNCell, nonlinearity="relu"), 4, 4),
    module_case("rnn cell without bias", lambda: Unrolled(nn.RNNCell, bias=False), 4, 4),
]  # fmt: skip


# --- the rest ---------------------------------------------------------------------------------------------------------


class Bags(nn.Module):
    """`nn.EmbeddingBag` on ids that come from the data."""

    def __init__(self, mode: str, **options: Any) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(9, 4, mode=mode, **options)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 5]` to `[B, 4]`."""
        ids = (x.abs() * 4).long().clamp(max=8)
        return self.bag(ids, per_sample_weights=x if self.bag.mode == "sum" else None)


class Bare(nn.Module):
    """Parameters without a module of their own: a class token, positions, a gate, a mixing matrix, a scale by layer."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.positions = nn.Parameter(torch.randn(1, 6, 4))
        self.gate = nn.Parameter(torch.randn(()))
        self.mix = nn.Parameter(torch.randn(2, 4, 3))
        self.scales = nn.ParameterList([torch.randn(3), torch.randn(1, 3)])
        self.temperatures = nn.ParameterDict({"hot": torch.randn(1), "cold": torch.randn(3)})

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 5, 4]` to `[B, 2, 6, 3]`."""
        h = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        h = h * self.gate.sigmoid()
        h = torch.einsum("btd,hde->bhte", h, self.mix)
        for scale in self.scales:
            h = h * scale
        return h / self.temperatures["hot"].exp() + h.tanh() * self.temperatures["cold"].softmax(0)


class Derived(nn.Module):
    """Every quantity derived from parameters that models of the field use."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(4))
        self.log_decay = nn.Parameter(torch.randn(6, 2))
        self.step = nn.Parameter(torch.randn(6))
        self.transposed = nn.Parameter(torch.randn(4, 6))
        self.parts = nn.ParameterList([torch.randn(2, 6), torch.randn(3, 6)])
        self.fused = nn.Parameter(torch.randn(3 * 4, 5))
        self.fused_bias = nn.Parameter(torch.randn(3 * 4))
        self.cosine = nn.Parameter(torch.randn(3, 4))
        self.low_rank = nn.ParameterList([torch.randn(3, 1), torch.randn(1, 3)])
        self.eye = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 5, 4]` to `[B, 5, 3]`."""
        h = x * (1 + self.gain.double()).to(x.dtype)
        h = F.linear(h, self.transposed.t()).tanh()  # [B, 5, 6]
        decay = -torch.exp(self.log_decay)  # [6, 2]
        steps = F.softplus(h + self.step).unsqueeze(-1)
        h = (torch.exp(steps * decay) * h.unsqueeze(-1)).sum(-1)
        h = F.linear(h, torch.cat(list(self.parts))).tanh()  # [B, 5, 5]
        q = F.linear(h, self.fused[:4], self.fused_bias[:4])
        k = F.linear(h, self.fused[4:8], self.fused_bias[4:8])
        v = F.linear(h, self.fused[8:], self.fused_bias[8:])
        h = F.scaled_dot_product_attention(q, k, v)  # [B, 5, 4]
        h = F.linear(F.normalize(h, dim=-1), F.normalize(self.cosine, dim=-1))
        rotation = torch.linalg.matrix_exp(self.eye - self.eye.mT)
        return h @ (rotation + self.low_rank[0] @ self.low_rank[1])


class Adaptive(nn.Module):
    """`nn.AdaptiveLogSoftmaxWithLoss`: clusters of classes, each with the samples that fall in it."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(4, 9, [3, 6], div_value=2.0)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 4]` to `[B, 1]`."""
        return self.softmax(x, (x.sum(-1).abs() * 3).long().clamp(max=8)).output.unsqueeze(-1)


class LowRank(nn.Module):
    """A parametrisation that adds a low-rank update to a frozen weight: merged LoRA."""

    def __init__(self, d_out: int, d_in: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(2, d_in))
        self.b = nn.Parameter(torch.randn(d_out, 2))

    def forward(self, weight: Tensor) -> Tensor:
        """W + B A / 2."""
        return weight + 0.5 * self.b @ self.a


def _merged() -> nn.Module:
    first, second = nn.Linear(4, 6), nn.Linear(6, 3)
    for layer in (first, second):
        layer.requires_grad_(False)
        parametrize.register_parametrization(layer, "weight", LowRank(*layer.weight.shape))
    return nn.Sequential(first, nn.Tanh(), second)


def _weight_normed_old_style() -> nn.Module:
    """`nn.utils.weight_norm`, which sets `weight` anew in a hook before each forward."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and still in checkpoints
        return nn.Sequential(
            nn.utils.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.utils.weight_norm(nn.Linear(5, 3), dim=-1)
        )


def _reparametrised(norm: Callable[..., nn.Module], conv: type[nn.Module] = nn.Conv1d) -> nn.Module:
    return nn.Sequential(norm(conv(4, 6, 3)), nn.Tanh(), nn.Flatten(), norm(nn.Linear(54, 3)))


def _both_ways(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return module(batch[0], batch[0].flip(-1))


OTHER_CASES = [
    module_case("bilinear", lambda: nn.Bilinear(4, 4, 3), 4, call=_both_ways),
    module_case("bilinear on positions", lambda: nn.Bilinear(4, 4, 3, bias=False), 5, 4, call=_both_ways),
    module_case("prelu", lambda: nn.Sequential(nn.Linear(4, 6), nn.PReLU()), 5, 4),
    module_case("prelu by channel", lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.PReLU(6)), *LINE),
    module_case("embedding bag sum", lambda: Bags("sum"), 5),
    module_case("embedding bag mean", lambda: Bags("mean"), 5),
    module_case("embedding bag max", lambda: Bags("max"), 5),
    module_case("embedding bag with padding", lambda: Bags("mean", padding_idx=1), 5),
    module_case("bare parameters", Bare, 5, 4),
    module_case("derived parameters", Derived, 5, 4),
    module_case("merged lora", _merged, 5, 4),
    module_case("weight norm", lambda: _reparametrised(parametrizations.weight_norm), *LINE),
    module_case("weight norm, old style", _weight_normed_old_style, 5, 4),
    module_case("spectral norm", lambda: _reparametrised(parametrizations.spectral_norm), *LINE),
    module_case("spectral norm, training", lambda: _reparametrised(parametrizations.spectral_norm), *LINE, train=True),
    module_case("orthogonal", lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.Tanh()), 5, 4),
    module_case("linear with one output", lambda: nn.Linear(4, 1), 4),
    module_case("adaptive softmax", Adaptive, 4),
]  # fmt: skip

FAMILIES = {
    "convolution": CONVOLUTION_CASES,
    "normalisation": NORM_CASES,
    "attention": ATTENTION_CASES,
    "recurrent": RECURRENT_CASES,
    "other modules": OTHER_CASES,
}
MODULES = [case._replace(family=family) for family, cases in FAMILIES.items() for case in cases]
