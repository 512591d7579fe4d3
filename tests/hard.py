"""Uses that a method with hooks or a list of layers gets silently wrong: they are exact, or refused by name."""

from collections.abc import Callable
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


def _masked(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """Only some positions pass through the layer, and are put back."""
    chosen = x[..., 0] > 0
    return torch.zeros_like(x).masked_scatter(chosen[..., None], F.linear(x[chosen], p["w"]))


def _packed(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """Tokens of all samples in one sequence, summed back by the sample's number."""
    rows = F.linear(x.flatten(0, 1), p["w"], p["b"]).tanh()
    owner = torch.arange(len(x), device=x.device).repeat_interleave(3)
    return torch.zeros(len(x), 5, dtype=x.dtype, device=x.device).index_add(0, owner, rows)


def _experts(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """Each token goes to one of three experts, one of which is idle."""
    tokens = x.reshape(-1, 4)
    gates = F.linear(tokens, p["router"]).softmax(-1)
    best = gates[:, :2].argmax(-1)
    out = torch.zeros_like(tokens)
    for expert in range(3):
        rows = (best == expert).nonzero().squeeze(-1)
        out.index_add_(0, rows, F.linear(tokens[rows], p["experts"][expert]) * gates[rows, expert, None])
    return out.view_as(x)


def _quantised(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """Vector quantisation with a straight-through estimator."""
    h = x @ p["w"]
    nearest = torch.cdist(h, p["codes"]).argmin(-1)
    codes = p["codes"][nearest]
    return h + (codes - h).detach() + (codes - h.detach()).pow(2)


def _spectral(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """A filter in the frequency domain with complex weights from real parameters."""
    return torch.fft.irfft(torch.fft.rfft(x, dim=-1) * torch.view_as_complex(p["w"]), n=4, dim=-1)


def _inner_vmap(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.func.vmap(lambda row: torch.tanh(row @ p["w"]))(x)


def _through_numpy(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """Features that leave torch and come back."""
    features = torch.tensor([[sum(row) for row in sample] for sample in x.tolist()], dtype=x.dtype, device=x.device)
    return F.linear(x, p["w"]) + features.unsqueeze(-1) * p["s"]


def _scaled_table(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """A tied table that is scaled before both of its uses."""
    ids = (x[..., 0] > 0).long() + (x[..., 1] > 0).long()
    table = p["table"] * 4**0.5
    return F.linear(F.embedding(ids, table) + x, table + p["shift"])


def _two_names() -> Callable[[torch.dtype, torch.device], Built]:
    """One tensor under two names: two parameters with the same values."""
    make = _function(lambda p, x: F.linear(F.linear(x, p["a"]).tanh(), p["b"]), a=(4, 4), b=(4, 4))

    def shared(dtype: torch.dtype, device: torch.device) -> Built:
        built = make(dtype, device)
        return built._replace(params={"a": built.params["a"], "b": built.params["a"]})

    return shared


def _not_contiguous() -> Callable[[torch.dtype, torch.device], Built]:
    """Parameters that are views: a transpose, every second column, one row for all."""
    make = _function(
        lambda p, x: F.linear(F.linear(x, p["t"]).tanh() * p["strided"], p["one"]), t=(5, 4), strided=(10,), one=(1, 5)
    )

    def views(dtype: torch.dtype, device: torch.device) -> Built:
        built = make(dtype, device)
        t, strided, one = built.params.values()
        params = {"t": t.t().contiguous().t(), "strided": strided[::2], "one": one.expand(3, 5)}
        return built._replace(params=params)

    return views


class Double(torch.autograd.Function):
    """A user's own Function on the data alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Two times x."""
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        """Two times g."""
        return 2 * g


def _foreign_layers(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """The user's Function before, between and after the parameters."""
    h = F.linear(Double.apply(x), p["w"], p["b"])
    h = Double.apply(h.tanh()) * p["s"]
    return Double.apply(h)


def _all_foreign(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """No tensor that the model computes with comes from the batch by torch operations."""
    x = torch.tensor(x.tolist(), dtype=x.dtype, device=x.device)
    return F.linear(F.linear(x, p["w"], p["b"]).tanh(), p["v"])


def _pieces(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """One layer's output written into a buffer, position by position."""
    out = torch.empty(len(x), 3, 5, dtype=x.dtype, device=x.device)
    for t in range(3):
        out[:, t] = F.linear(x[:, t], p["w"]) + p["b"]
    return out


def _written_views(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """Writes through views of a buffer, with data and with a parameter alone."""
    out = torch.zeros(len(x), 4, 4, dtype=x.dtype, device=x.device)
    out[:, :3].copy_(x @ p["w"])
    out[:, 3].add_(p["b"])
    out.select(1, 0).mul_(2)
    return out


def _filled(p: dict[str, Tensor], x: Tensor) -> Tensor:
    h = torch.full_like(x, 2.0)
    h.mul_(p["s"])
    return h * x + x.new_zeros(x.shape).add_(p["b"])


HARD = [
    Case("views as parameters", _not_contiguous()),
    Case("nothing from the batch", _function(_all_foreign, w=(5, 4), b=(5,), v=(3, 5))),
    Case("pieces", _function(_pieces, w=(5, 4), b=(5,))),
    Case("written views", _function(_written_views, w=(4, 4), b=(4,))),
    Case("filled", _function(_filled, s=(4,), b=(4,))),
    Case("own function on the data", _function(_foreign_layers, w=(5, 4), b=(5,), s=(5,))),
    Case("transposed batch matmul", _function(lambda p, x: torch.bmm(p["w"] @ x.mT, x), w=(5, 4))),
    Case("weight through the data's reshape", _function(lambda p, x: p["w"].view(1, 3, 4).expand_as(x) * x, w=(12,))),
    Case("weight gathered by the data", _function(lambda p, x: p["w"][(x > 0).long().sum(-1)], w=(5, 4))),
    Case("weight picked by the data", _function(
        lambda p, x: torch.take_along_dim(p["w"].expand(len(x), 3, 4), x.argsort(-1), -1), w=(3, 4)
    )),
    Case("masked weight", _function(lambda p, x: torch.where(x > 0, p["w"], p["v"]) * x, w=(4,), v=(3, 4))),
    Case("a matrix for each sample", _function(
        lambda p, x: torch.einsum("bte,bde->btd", x, torch.einsum("bt,tde->bde", x[..., 0], p["w"])), w=(3, 5, 4)
    )),
    Case("hypernetwork", _function(
        lambda p, x: torch.bmm(x, F.linear(x.mean(1), p["w"], p["b"]).view(-1, 4, 5)), w=(20, 4), b=(20,)
    )),
    Case("mixture by softmax", _function(
        lambda p, x: torch.einsum("bk,kde,btd->bte", (x.mean(1) @ p["g"]).softmax(-1), p["w"], x), g=(4, 3), w=(3, 4, 5)
    )),
    Case("scaled table", _function(_scaled_table, table=(3, 4), shift=(4,))),
    Case("two names", _two_names()),
    Case("type as the data", _function(lambda p, x: F.linear(x, p["w"].type_as(x), p["b"].to(x)), w=(5, 4), b=(5,))),
    Case("rounded weight", _function(
        lambda p, x: F.linear(x, p["w"] + ((4 * p["w"]).round() / 4 - p["w"]).detach()), w=(5, 4)
    )),
    Case("rows of a weight", _function(lambda p, x: sum((x * row).tanh() for row in p["w"]), w=(5, 4))),
    Case("constant of the batch's shape", _function(
        lambda p, x: (torch.zeros_like(x) + p["b"]) * x + (x.new_ones(len(x), 3, 1) * p["s"]), b=(4,), s=(4,)
    )),
    Case("norm of a weight", _function(lambda p, x: x * p["w"].norm() / p["w"].max(), w=(5, 4))),
    Case("a product over positions", _function(lambda p, x: torch.einsum("btd,st->bsd", x, p["w"]), w=(5, 3))),
    Case("a triangular mix of positions", _function(lambda p, x: p["w"].tril() @ x, w=(3, 3))),
    Case("a cumulative sum of a weight", _function(lambda p, x: x * p["w"].cumsum(0).unsqueeze(1), w=(3,))),
    Case("masked positions", _function(_masked, w=(4, 4))),
    Case("packed tokens", _function(_packed, w=(5, 4), b=(5,))),
    Case("experts", _function(_experts, router=(3, 4), experts=(3, 4, 4))),
    Case("quantised", _function(_quantised, w=(4, 5), codes=(6, 5))),
    Case("spectral", _function(_spectral, w=(3, 2))),
    Case("vmap inside", _function(_inner_vmap, w=(4, 5))),
    Case("through lists", _function(_through_numpy, w=(5, 4), s=(5,))),
    Case("prompt tuning", _function(
        lambda p, x: torch.cat([p["prompt"].repeat(len(x), 1, 1), x], 1) @ p["w"], prompt=(2, 4), w=(4, 5)
    )),
    Case("reshaped across samples and back", _function(
        lambda p, x: F.linear(x.reshape(3, len(x), 4), p["w"], p["b"]).reshape(len(x), 3, 5), w=(5, 4), b=(5,)
    )),
    Case("all in one row", _function(
        lambda p, x: (x.reshape(1, -1, 4) * p["s"] + p["b"]).view(len(x), 3, 4), s=(4,), b=(4,)
    )),
    Case("a strided view", _function(
        lambda p, x: F.linear(x.contiguous().as_strided((len(x), 2, 4), (12, 4, 1)), p["w"]), w=(5, 4)
    )),
    Case("unfolded", _function(lambda p, x: F.linear(x.unfold(1, 2, 1), p["w"]), w=(5, 2))),
    Case("sorted in each sample", _function(lambda p, x: F.linear(x.sort(1).values, p["w"]), w=(5, 4))),
    Case("samples as columns", _function(
        lambda p, x: (p["w"] @ x.flatten(1).T + p["b"][:, None]).T, w=(5, 12), b=(5,)
    )),
    Case("samples as columns of a square", _function(
        lambda p, x: (x[:, 0].T * p["rows"][:, None]).T + p["b"], rows=(4,), b=(4,)
    )),
    Case("lstm", _module(lambda: Recurrent(nn.LSTM), 3, 4)),
    Case("gru", _module(lambda: Recurrent(nn.GRU), 3, 4)),
    Case("multihead attention", _module(Attention, 4, 4)),
    Case("encoder layer", _module(lambda: Encoder(batch_first=True), 4, 4)),
    Case("encoder layer, sequence first", _module(lambda: Encoder(batch_first=False), 4, 4)),
    Case("weight norm", _module(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), 4)),
    Case("bilinear", _module(lambda: nn.Bilinear(4, 4, 3), 4, call=lambda module, batch: module(*2 * [batch[0]]))),
    Case("conv1d", _module(lambda: nn.Sequential(nn.Conv1d(3, 3, 2), nn.Flatten(), nn.Linear(9, 3)), 3, 4)),
    Case("transposed", _module(lambda: nn.Sequential(nn.ConvTranspose1d(3, 2, 2), nn.Flatten()), 3, 4)),
    Case("in place", _function(_in_place, w=(4, 4), b=(4,), s=(4,))),
    Case("checkpointed", _function(_recomputed, w=(4, 4), b=(4,))),
    Case("assigned", _function(_assigned, w=(4, 3), constant=(2,))),
    Case("scripted", _function(lambda p, x: _scripted(x, p["w"]), w=(5, 4))),
    Case("autograd function", _function(lambda p, x: Scale.apply(x @ p["w"], p["s"]), w=(4, 4), s=(4,))),
    Case("autograd function on a shared weight", _function(
        lambda p, x: Scale.apply(F.linear(x, p["w"]), p["w"][0]), w=(4, 4)
    )),
    Case("stacked", _function(lambda p, x: x @ torch.stack([p["a"], p["b"]], 1), a=(4,), b=(4,))),
    Case("batch in the middle", _function(lambda p, x: F.linear(x.transpose(0, 1), p["w"]).transpose(0, 1), w=(5, 4))),
    Case("batch last", _function(lambda p, x: (p["w"] @ x.permute(1, 2, 0)).permute(2, 0, 1), w=(5, 4))),
    Case("batch last, bias", _function(lambda p, x: (x.permute(1, 2, 0) + p["b"]).permute(2, 0, 1), b=(4, 1))),
    Case("time-major rows", _function(
        lambda p, x: F.linear(x.transpose(0, 1).reshape(-1, 4), p["w"]).view(3, -1, 5).transpose(0, 1), w=(5, 4)
    )),
    Case("reversed batch", _function(lambda p, x: F.linear(x.flip(0), p["w"]).flip(0), w=(5, 4))),
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
