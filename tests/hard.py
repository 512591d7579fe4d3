"""Uses that a method with hooks or a list of layers gets silently wrong: they are exact, or refused by name."""

from typing import Any

import torch
import torch.nn.functional as F
from cases import Built, Case, Draw, classes, functionalized, squared, tensors
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ghostfunc as gf


class Scale(torch.autograd.Function):
    """A user's own Function around a parameter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        """Scale the last dimension."""
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        """The product rule."""
        x, w = ctx.saved_tensors
        return g * w, (g * x).flatten(0, -2).sum(0)


@torch.jit.script_if_tracing
def _scripted(x: Tensor, w: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, w).tanh()


def _module(build: Any, *shape: int, call: Any = None) -> Any:
    def make(dtype: torch.dtype, device: torch.device) -> Built:
        torch.manual_seed(0)
        module = build()
        return Built(
            *functionalized(module, gf.classification_loss, dtype, device, call), classes(dtype, device, *shape)
        )

    return make


def _function(body: Any, **shapes: tuple[int, ...]) -> Any:
    """A hand-written case: `body(params, x [B, 3, 4]) -> [B, ...]`."""

    def make(dtype: torch.dtype, device: torch.device) -> Built:
        def model_fn(p: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
            h = body(p, batch["x"]).tanh()
            return squared(h, batch["y"].view(-1, *[1] * (h.dim() - 1)))

        return Built(model_fn, Draw(dtype, device).params(**shapes), tensors(dtype, device, x=(3, 4), y=()))

    return make


class Recurrent(nn.Module):
    """An LSTM or GRU and a head."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(4, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        """The head on the last state."""
        return self.head(self.rnn(x)[0][:, -1])


class Attention(nn.Module):
    """`nn.MultiheadAttention` in its default layout `[T, B, d]`."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Self-attention, then the mean over T."""
        x = x.transpose(0, 1)
        return self.head(self.attention(x, x, x)[0].mean(0))


class Encoder(nn.Module):
    """`nn.TransformerEncoderLayer`, in train mode without dropout."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=batch_first)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """One layer, then the mean over positions."""
        h = self.layer(x) if self.batch_first else self.layer(x.transpose(0, 1)).transpose(0, 1)
        return self.head(h.mean(1))


def _in_place(p: dict[str, Tensor], x: Tensor) -> Tensor:
    h = F.linear(x, p["w"])
    h += p["b"]
    h.mul_(p["s"])
    h[:, 0] += p["b"]
    return h


def _recomputed(p: dict[str, Tensor], x: Tensor) -> Tensor:
    h = checkpoint(lambda x: F.linear(x, p["w"], p["b"]).tanh(), x, use_reentrant=False)
    return F.linear(h, p["w"])


def _assigned(p: dict[str, Tensor], x: Tensor) -> Tensor:
    out = x.new_zeros(*x.shape[:2], 5)
    out[..., :2] = p["constant"]
    out[..., 2:] = x @ p["w"]
    return out


HARD = [
    Case("lstm", _module(lambda: Recurrent(nn.LSTM), 3, 4), vmap=False),
    Case("gru", _module(lambda: Recurrent(nn.GRU), 3, 4), vmap=False),
    Case("multihead attention", _module(Attention, 4, 4)),
    Case("encoder layer", _module(lambda: Encoder(batch_first=True), 4, 4)),
    Case("encoder layer, sequence first", _module(lambda: Encoder(batch_first=False), 4, 4)),
    Case("weight norm", _module(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), 4)),
    Case("bilinear", _module(lambda: nn.Bilinear(4, 4, 3), 4, call=lambda module, batch: module(*2 * [batch[0]]))),
    Case("conv1d", _module(lambda: nn.Sequential(nn.Conv1d(3, 3, 2), nn.Flatten(), nn.Linear(9, 3)), 3, 4)),
    Case("transposed", _module(lambda: nn.Sequential(nn.ConvTranspose1d(3, 2, 2), nn.Flatten()), 3, 4)),
    Case("in place", _function(_in_place, w=(4, 4), b=(4,), s=(4,))),
    Case("checkpointed", _function(_recomputed, w=(4, 4), b=(4,)), vmap=False),
    Case("assigned", _function(_assigned, w=(4, 3), constant=(2,))),
    Case("scripted", _function(lambda p, x: _scripted(x, p["w"]), w=(5, 4))),
    Case("autograd function", _function(lambda p, x: Scale.apply(x @ p["w"], p["s"]), w=(4, 4), s=(4,)), vmap=False),
    Case("stacked", _function(lambda p, x: x @ torch.stack([p["a"], p["b"]], 1), a=(4,), b=(4,))),
    Case("batch in the middle", _function(lambda p, x: F.linear(x.transpose(0, 1), p["w"]).transpose(0, 1), w=(5, 4))),
    Case("batch last", _function(lambda p, x: (p["w"] @ x.permute(1, 2, 0)).permute(2, 0, 1), w=(5, 4))),
    Case("batch last, bias", _function(lambda p, x: (x.permute(1, 2, 0) + p["b"]).permute(2, 0, 1), b=(4, 1))),
    Case("time-major rows", _function(
        lambda p, x: F.linear(x.transpose(0, 1).reshape(-1, 4), p["w"]).view(3, -1, 5).transpose(0, 1), w=(5, 4)
    )),
    Case("reversed batch", _function(lambda p, x: F.linear(x.flip(0), p["w"]).flip(0), w=(5, 4)), vmap=False),
    Case("permuted rows", _function(
        lambda p, x: F.linear(x[torch.arange(len(x) - 1, -1, -1)], p["w"])[torch.arange(len(x) - 1, -1, -1)], w=(5, 4)
    )),
    Case("sample by sample", _function(
        lambda p, x: torch.stack([F.linear(row, p["w"]) for row in x]), w=(5, 4)
    )),
    Case("halves of the batch", _function(
        lambda p, x: torch.cat([F.linear(half, p["w"]) for half in x.split((len(x) + 1) // 2)]), w=(5, 4)
    )),
    Case("doubled batch", _function(lambda p, x: sum(F.linear(torch.cat([x, x * x]), p["w"]).chunk(2)), w=(5, 4))),
    Case("repeated samples", _function(
        lambda p, x: (F.linear(x.repeat_interleave(2, 0) ** 2, p["w"])).view(-1, 2, 3, 5).sum(1), w=(5, 4)
    )),
    Case("data attribute", _function(lambda p, x: F.linear(x, p["w"].data) + p["b"], w=(5, 4), b=(5,))),
    Case("square batch and width", _function(lambda p, x: x.sum(1).T.unsqueeze(0).mul(p["s"])[0].T, s=(1,))),
    Case("outer of two weights", _function(lambda p, x: x @ torch.outer(p["a"], p["b"]), a=(4,), b=(5,))),
    Case("weight times weight", _function(lambda p, x: x @ (p["w"] @ p["w"]), w=(4, 4))),
    Case("nonlinear in the weight", _function(lambda p, x: torch.cdist(x, p["w"]), w=(5, 4))),
    Case("softmax of a weight", _function(lambda p, x: x * p["w"].softmax(0).cumsum(0), w=(4,))),
    Case("weight as data", _function(lambda p, x: p["w"].expand(len(x), 5), w=(5,))),
    Case("prelu with one weight", _function(lambda p, x: F.prelu(x, p["w"]), w=(1,))),
    Case("scaled dot product", _function(
        lambda p, x: F.scaled_dot_product_attention(x, p["k"].expand(len(x), -1, -1), p["v"].expand(len(x), -1, -1)),
        k=(5, 4), v=(5, 4),
    )),
    Case("embedding bag", _function(
        lambda p, x: F.embedding_bag((x[:, 0] > 0).long(), p["w"], mode="sum"), w=(2, 4)
    )),
    Case("inner and kron", _function(
        lambda p, x: torch.inner(x, p["w"]) + torch.kron(p["a"], p["a"])[:5], w=(5, 4), a=(3,)
    )),
    Case("batch-dependent slice", _function(lambda p, x: F.linear(x, p["w"])[:, : int(x.shape[1])], w=(5, 4))),
]  # fmt: skip


def lookup(p: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    """Hidden states of ids, for the cases of wrong ids."""
    return F.embedding(batch["ids"], p["table"]).pow(2).mean((1, 2))
