"""One table of cases: `case.make(dtype, device) -> (model_fn, params, batch)`, and `batch(n, seed)` draws n samples.

Everything is tiny, and every value is drawn in float64 first, so that a case has the same numbers in every dtype.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ghostfunc as gf

Params = dict[str, Tensor]
BatchMaker = Callable[[int, int], Any]


class Built(NamedTuple):
    """A case in one dtype on one device."""

    model_fn: Callable[[Params, Any], Tensor]
    params: Params
    batch: BatchMaker


class Case(NamedTuple):
    """A named case."""

    name: str
    make: Callable[[torch.dtype, torch.device], Built]


class Draw:
    """Seeded tensors of one dtype on one device."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        values = std * torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return values.to(self.device, self.dtype)

    def ids(self, high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)

    def params(self, **shapes: tuple[int, ...]) -> Params:
        return {name: self.normal(*shape, std=0.5) for name, shape in shapes.items()}


def tensors(dtype: torch.dtype, device: torch.device, **shapes: tuple[int, ...]) -> BatchMaker:
    """A maker of dict batches of normal entries `[n, *shape]`."""

    def batch(n: int, seed: int) -> dict[str, Tensor]:
        draw = Draw(dtype, device, seed)
        return {name: draw.normal(n, *shape) for name, shape in shapes.items()}

    return batch


def classes(dtype: torch.dtype, device: torch.device, *shape: int, high: int = 3) -> BatchMaker:
    """A maker of `(x [n, *shape], y [n])`."""

    def batch(n: int, seed: int) -> tuple[Tensor, Tensor]:
        draw = Draw(dtype, device, seed)
        return draw.normal(n, *shape), draw.ids(high, n)

    return batch


def functionalized(module: nn.Module, loss: Any, dtype: torch.dtype, device: torch.device, call: Any = None) -> Any:
    """`functionalize` after giving every parameter a value that is neither 0 nor 1."""
    draw = Draw(torch.float64, torch.device("cpu"), seed=1)
    module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(draw.normal(*p.shape, std=0.3))
    return gf.functionalize(module.to(device, dtype), loss, call=call)


def squared(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample."""
    return (prediction - target).pow(2).flatten(1).mean(1)


# --- ordinary modules -------------------------------------------------------------------------------------------------


def mlp(dtype: torch.dtype, device: torch.device) -> Built:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3, bias=False))
    return Built(*functionalized(module, gf.classification_loss, dtype, device), classes(dtype, device, 5))


def mlp_frozen(dtype: torch.dtype, device: torch.device) -> Built:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    for frozen in (*module[0].parameters(), module[1].bias, module[2].weight, module[4].bias):
        frozen.requires_grad_(False)
    return Built(*functionalized(module, gf.classification_loss, dtype, device), classes(dtype, device, 5))


def batch_norm_eval(dtype: torch.dtype, device: torch.device) -> Built:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).eval()
    return Built(*functionalized(module, gf.classification_loss, dtype, device), classes(dtype, device, 5))


def convolution(dtype: torch.dtype, device: torch.device) -> Built:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.GroupNorm(2, 4), nn.PReLU(4), nn.Conv2d(4, 4, 2, groups=2),
        nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    return Built(*functionalized(module, gf.classification_loss, dtype, device), classes(dtype, device, 2, 5, 5))


def gpt2(*, tied: bool, positions: int = 6) -> Callable[[torch.dtype, torch.device], Built]:
    """HF GPT-2: `Conv1D` layers, positions looked up with ids `[1, T]`."""

    def make(dtype: torch.dtype, device: torch.device) -> Built:
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        config = GPT2Config(
            n_layer=2, n_head=2, n_embd=8, vocab_size=19, n_positions=8, tie_word_embeddings=tied,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        module = GPT2LMHeadModel(config)

        def batch(n: int, seed: int) -> dict[str, Tensor]:
            return {"input_ids": Draw(dtype, device, seed).ids(19, n, positions)}

        return Built(*functionalized(module, gf.causal_lm_loss, dtype, device), batch)

    return make


def padding_idx(dtype: torch.dtype, device: torch.device) -> Built:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(7, 4, padding_idx=2), nn.Linear(4, 7))

    def batch(n: int, seed: int) -> dict[str, Tensor]:
        ids = Draw(dtype, device, seed).ids(7, n, 5)
        ids[:, 1] = 2
        return {"input": ids, "labels": ids}

    return Built(*functionalized(module, gf.causal_lm_loss, dtype, device), batch)


# --- written by hand, without a module --------------------------------------------------------------------------------


def products(dtype: torch.dtype, device: torch.device) -> Built:
    """Every spelling of a product with a weight, on `[B, T, d]`."""
    shapes = {
        "linear": (6, 4), "linear_b": (6,), "einsum": (6, 6), "einsum_t": (6, 6), "at": (6, 5), "at_t": (6, 5),
        "at_T": (4, 5), "at_mT": (6, 4), "matmul": (6, 4), "addmm": (4, 6), "addmm_b": (6,), "mm": (6, 4),
        "flat_linear": (3, 4), "vector": (3,), "bmm": (4, 4), "left": (5, 3), "tensordot": (3, 3),
    }  # fmt: skip

    def model_fn(p: Params, batch: dict[str, Tensor]) -> Tensor:
        x = batch["x"]  # [B, T, 4]
        b, t, _ = x.shape
        h = F.linear(x, p["linear"], p["linear_b"]).tanh()  # [B, T, 6]
        h = torch.einsum("btd,de->bte", h, p["einsum"])
        h = torch.einsum("ed,btd->bte", p["einsum_t"], h).tanh()
        h = h @ p["at"]  # [B, T, 5]
        h = (h @ p["at_t"].t()).tanh()  # [B, T, 6]
        h = (h @ p["at"]) @ p["at_T"].T  # [B, T, 4]
        h = (h @ p["at_mT"].mT).tanh()  # [B, T, 6]
        h = torch.matmul(h, p["matmul"])  # [B, T, 4]
        h = torch.addmm(p["addmm_b"], h.reshape(-1, 4), p["addmm"]).tanh()  # [B * T, 6]
        h = torch.mm(h, p["mm"]).view(b, t, 4)
        h = torch.bmm(h, p["bmm"].expand(b, 4, 4)).tanh()
        h = F.linear(h.flatten(0, 1), p["flat_linear"]).view(b, t, 3)
        h = torch.tensordot(h, p["tensordot"], dims=1) + h
        h = p["left"] @ h.transpose(1, 2)[..., :3] if t >= 3 else h  # [B, 5, 3]: the weight on the left
        return ((h @ p["vector"]) ** 2).mean(1)

    return Built(model_fn, Draw(dtype, device).params(**shapes), tensors(dtype, device, x=(3, 4)))


def broadcasts(dtype: torch.dtype, device: torch.device) -> Built:
    """Biases and scales that enter by broadcasting, in every spelling."""
    shapes = {
        "add": (4,), "radd": (4,), "alpha": (4,), "sub": (4,), "rsub": (4,), "mul": (4,), "rmul": (1, 4), "div": (4,),
        "rdiv": (4,), "positions": (3, 1), "batch_one": (1, 3, 4), "addcmul": (4,), "where": (4,), "scalar": (),
        "power": (),
    }  # fmt: skip

    def model_fn(p: Params, batch: dict[str, Tensor]) -> Tensor:
        x = batch["x"]  # [B, 3, 4]
        h = p["radd"] + (x + p["add"])
        h = torch.add(h, p["alpha"], alpha=2).tanh()
        h = p["rsub"] - (h - p["sub"])
        h = p["rmul"] * (h * p["mul"])
        h = (h / (2 + p["div"] ** 2)).tanh()
        h = p["rdiv"] / (2 + h)
        h = h * p["positions"] + p["batch_one"]
        h = torch.addcmul(h, x, p["addcmul"]).tanh()
        h = torch.where(x > 0, h, p["where"])
        h = h * p["scalar"]
        return (2 + h).pow(p["power"]).flatten(1).sum(1)

    return Built(model_fn, Draw(dtype, device).params(**shapes), tensors(dtype, device, x=(3, 4)))


def norms(dtype: torch.dtype, device: torch.device) -> Built:
    """LayerNorm with and without a bias, over one and two dimensions, and a root-mean-square norm with `1 + w`."""
    shapes = {"w": (4,), "b": (4,), "no_bias": (4,), "two": (3, 4), "two_b": (3, 4), "gemma": (4,), "group": (3,)}

    def model_fn(p: Params, batch: dict[str, Tensor]) -> Tensor:
        x = batch["x"]  # [B, 3, 4]
        h = F.layer_norm(x, (4,), p["w"], p["b"]) + x
        h = F.layer_norm(h, (4,), p["no_bias"]) + x
        h = F.layer_norm(h, (3, 4), p["two"], p["two_b"]) + x
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + p["gemma"]) + x
        h = F.group_norm(h, 3, p["group"])
        return squared(h.tanh(), batch["y"])

    return Built(model_fn, Draw(dtype, device).params(**shapes), tensors(dtype, device, x=(3, 4), y=(3, 4)))


def derived(dtype: torch.dtype, device: torch.device) -> Built:
    """Tensors derived from parameters without the data: LoRA, casts, reparametrisations, stacks."""
    shapes = {
        "W": (5, 4), "A": (2, 4), "B": (5, 2), "cast": (5, 5), "log_a": (5,), "direction": (4, 5), "gain": (4, 1),
        "first": (2, 4), "second": (3, 4), "fused": (8, 5), "symmetric": (5, 5),
    }  # fmt: skip

    def model_fn(p: Params, batch: dict[str, Tensor]) -> Tensor:
        x = batch["x"]  # [B, 3, 4]
        h = F.linear(x, p["W"] + 0.5 * p["B"] @ p["A"]).tanh()  # [B, 3, 5]
        h = h + F.linear(F.linear(x, p["A"]), p["B"])
        h = F.linear(h.double(), p["cast"].double()).to(h.dtype)
        h = h * torch.exp(-F.softplus(p["log_a"]))
        h = h @ (p["symmetric"] + p["symmetric"].T)
        h = F.linear(h.tanh(), p["gain"] * F.normalize(p["direction"], dim=1))  # [B, 3, 4]
        h = F.linear(h, torch.cat([p["first"], p["second"]])).tanh()  # [B, 3, 5]
        query, key = p["fused"].chunk(2)
        h = F.linear(h, query) * F.linear(h, key)  # [B, 3, 4]
        return squared(h, x)

    return Built(model_fn, Draw(dtype, device).params(**shapes), tensors(dtype, device, x=(3, 4)))


def tied_by_hand(dtype: torch.dtype, device: torch.device) -> Built:
    """One matrix as embedding and as head, of `[B, T]` ids, with labels of -100 and a sample that has no others."""

    def model_fn(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        ids, _ = batch
        h = F.embedding(ids, p["emb"]) + p["pos"][: ids.shape[1]]
        h = h + (h @ p["mix"]).tanh().cumsum(1)
        return gf.causal_lm_loss(h @ p["emb"].t(), batch)

    def batch(n: int, seed: int) -> tuple[Tensor, Tensor]:
        ids = Draw(dtype, device, seed).ids(11, n, 5)
        labels = ids.clone()
        labels[::2, 3] = -100
        if n > 2:
            labels[1] = -100
        return ids, labels

    return Built(model_fn, Draw(dtype, device).params(emb=(11, 4), pos=(8, 4), mix=(4, 4)), batch)


def embeddings(dtype: torch.dtype, device: torch.device) -> Built:
    """A table looked up twice, with ids of other shapes; positions by ids `[1, T]`, by `[T]`, by index, by slice."""
    shapes = {"emb": (9, 4), "pos": (6, 4), "kind": (2, 4), "rows": (9, 4), "bag": (9, 4)}

    def model_fn(p: Params, batch: dict[str, Tensor]) -> Tensor:
        ids, context = batch["ids"], batch["context"]  # [B, 4], [B, 2, 3]
        positions = torch.arange(4, device=ids.device)
        h = F.embedding(ids, p["emb"]) + F.embedding(context, p["emb"]).mean((1, 2))[:, None]
        h = h + F.embedding(positions[None], p["pos"]) * F.embedding(positions, p["pos"]) + p["pos"][:4]
        h = h + F.embedding(torch.zeros_like(ids), p["kind"]) + p["rows"][ids] + p["rows"][ids[:, 0]][:, None]
        h = h.tanh() * F.embedding(ids[:, 0], p["bag"], padding_idx=0)[:, None]
        return h.pow(2).mean((1, 2))

    def batch(n: int, seed: int) -> dict[str, Tensor]:
        draw = Draw(dtype, device, seed)
        return {"ids": draw.ids(9, n, 4), "context": draw.ids(9, n, 2, 3)}

    return Built(model_fn, Draw(dtype, device).params(**shapes), batch)


def weight_twice(dtype: torch.dtype, device: torch.device) -> Built:
    """A weight and its bias in two layers, with other numbers of positions, and the transpose in a third."""

    def model_fn(p: Params, batch: dict[str, Tensor]) -> Tensor:
        x = batch["x"]  # [B, 3, 4]
        h = F.linear(x, p["w"], p["b"]).tanh()
        h = F.linear(h.mean(1), p["w"], p["b"]).tanh()  # [B, 4]
        h = h @ p["w"]
        return squared(h + p["b"], x[:, 0])

    return Built(model_fn, Draw(dtype, device).params(w=(4, 4), b=(4,)), tensors(dtype, device, x=(3, 4)))


def recurrent(dtype: torch.dtype, device: torch.device) -> Built:
    """A recurrent cell, unrolled: each weight is used at every position."""

    def model_fn(p: Params, batch: dict[str, Tensor]) -> Tensor:
        x = batch["x"]  # [B, 4, 3]
        h = p["h0"].expand(x.shape[0], -1)
        for t in range(x.shape[1]):
            h = torch.tanh(F.linear(x[:, t], p["w"]) + F.linear(h, p["u"], p["b"]))
        return squared(h, x[:, 0, :1])

    shapes = {"w": (5, 3), "u": (5, 5), "b": (5,), "h0": (5,)}
    return Built(model_fn, Draw(dtype, device).params(**shapes), tensors(dtype, device, x=(4, 3)))


def heads(dtype: torch.dtype, device: torch.device) -> Built:
    """Attention by einsum with weights `[heads, d_in, d_out]`, and with samples and heads in one dimension."""

    def model_fn(p: Params, batch: dict[str, Tensor]) -> Tensor:
        x = batch["x"]  # [B, 3, 4]
        b, t, _ = x.shape
        q = torch.einsum("btd,hde->bhte", x, p["q"])
        k = torch.einsum("btd,hde->bhte", x, p["k"])
        v = torch.einsum("btd,hde->bhte", x, p["v"])
        a = (q @ k.mT).softmax(-1) @ v  # [B, 2, 3, 5]
        merged = a.reshape(b * 2, t, 5) @ p["merged"]  # [B * 2, 3, 5]
        out = torch.einsum("bhte,hed->btd", merged.view(b, 2, t, 5), p["o"])
        return squared(out, x)

    shapes = {"q": (2, 4, 5), "k": (2, 4, 5), "v": (2, 4, 5), "merged": (5, 5), "o": (2, 5, 4)}
    return Built(model_fn, Draw(dtype, device).params(**shapes), tensors(dtype, device, x=(3, 4)))


def sequence_first(positions: int) -> Callable[[torch.dtype, torch.device], Built]:
    """A model that runs on `[T, B, d]`, on `[T * B, d]`, and takes the mean over T."""

    def make(dtype: torch.dtype, device: torch.device) -> Built:
        def model_fn(p: Params, batch: dict[str, Tensor]) -> Tensor:
            x = batch["x"].transpose(0, 1)  # [T, B, 4]
            t, b, _ = x.shape
            h = F.linear(x, p["w"], p["b"])  # [T, B, 5]
            h = F.layer_norm(h, (5,), p["norm"], p["norm_b"]).tanh()
            h = (h * p["scale"] + p["bias"]).tanh()
            h = torch.addmm(p["flat_b"], h.reshape(t * b, 5), p["flat"]).view(t, b, 5).tanh()
            h = h @ p["at"] + F.linear(x, p["w"])
            return squared(h.mean(0), batch["y"])

        shapes = {
            "w": (5, 4), "b": (5,), "norm": (5,), "norm_b": (5,), "scale": (5,), "bias": (5,),
            "flat": (5, 5), "flat_b": (5,), "at": (5, 5),
        }  # fmt: skip
        params = Draw(dtype, device).params(**shapes)
        return Built(model_fn, params, tensors(dtype, device, x=(positions, 4), y=(5,)))

    return make


def regularised(dtype: torch.dtype, device: torch.device) -> Built:
    """A penalty on the weights inside every sample's loss, and a temperature."""

    def model_fn(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        logits = F.linear(x, p["w"], p["b"]) * p["log_temperature"].exp()
        penalty = 0.1 * p["w"].pow(2).sum() + 0.1 * p["only_penalty"].abs().sum()
        return F.cross_entropy(logits, y, reduction="none") + penalty

    shapes = {"w": (3, 5), "b": (3,), "log_temperature": (), "only_penalty": (4,)}
    return Built(model_fn, Draw(dtype, device).params(**shapes), classes(dtype, device, 5))


def unused(dtype: torch.dtype, device: torch.device) -> Built:
    """A parameter that is never touched, one that is detached, one that is used by half of the samples."""

    def model_fn(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        h = F.linear(x, p["w"]) + (x @ p["detached"]).detach() + (x @ p["half"]) * (y > 0)[:, None]
        return F.cross_entropy(h, y, reduction="none")

    shapes = {"w": (3, 5), "never": (2, 2), "detached": (5, 3), "half": (5, 3)}
    return Built(model_fn, Draw(dtype, device).params(**shapes), classes(dtype, device, 5))


def last_token(dtype: torch.dtype, device: torch.device) -> Built:
    """The logits at each sample's last token, by `[arange(B), lengths - 1]`; a class token in front."""

    def model_fn(p: Params, batch: dict[str, Tensor]) -> Tensor:
        x, lengths = batch["x"], batch["lengths"]  # [B, 4, 3], [B]
        b = x.shape[0]
        h = F.linear(x, p["w"]).tanh()  # [B, 4, 5]
        h = torch.cat([p["class_token"].expand(b, -1, -1), h], 1).cumsum(1) / 3
        logits = F.linear(h, p["head"], p["head_b"])  # [B, 5, 2]
        chosen = logits[torch.arange(b, device=x.device), lengths]  # [B, 2]
        return chosen.logsumexp(-1) - logits[:, 0, 0]

    def batch(n: int, seed: int) -> dict[str, Tensor]:
        draw = Draw(dtype, device, seed)
        return {"x": draw.normal(n, 4, 3), "lengths": draw.ids(5, n, low=1)}

    shapes = {"w": (5, 3), "class_token": (1, 1, 5), "head": (2, 5), "head_b": (2,)}
    return Built(model_fn, Draw(dtype, device).params(**shapes), batch)


def choices(dtype: torch.dtype, device: torch.device) -> Built:
    """Multiple choice: `[B, C, T]` runs as `[B * C, T]`; the batch is nested."""

    def model_fn(p: Params, batch: dict[str, Any]) -> Tensor:
        ids, (answer,) = batch["ids"], batch["more"]  # [B, 3, 4], [B]
        b = ids.shape[0]
        h = F.embedding(ids.view(b * 3, 4), p["emb"])  # [B * 3, 4, 5]
        h = F.linear(h, p["w"], p["b"]).tanh().mean(1)
        return F.cross_entropy(F.linear(h, p["score"]).view(b, 3), answer, reduction="none")

    def batch(n: int, seed: int) -> dict[str, Any]:
        draw = Draw(dtype, device, seed)
        return {"ids": draw.ids(7, n, 3, 4), "more": (draw.ids(3, n),)}

    shapes = {"emb": (7, 5), "w": (5, 5), "b": (5,), "score": (1, 5)}
    return Built(model_fn, Draw(dtype, device).params(**shapes), batch)


CASES = [
    Case("mlp", mlp),
    Case("mlp frozen", mlp_frozen),
    Case("batch norm in eval mode", batch_norm_eval),
    Case("convolution", convolution),
    Case("gpt2 tied", gpt2(tied=True)),
    Case("gpt2 untied", gpt2(tied=False)),
    Case("gpt2 two positions", gpt2(tied=True, positions=2)),
    Case("padding_idx", padding_idx),
    Case("products", products),
    Case("broadcasts", broadcasts),
    Case("norms", norms),
    Case("derived", derived),
    Case("tied by hand", tied_by_hand),
    Case("embeddings", embeddings),
    Case("weight twice", weight_twice),
    Case("recurrent", recurrent),
    Case("heads", heads),
    Case("regularised", regularised),
    Case("unused", unused),
    Case("last token", last_token),
    Case("choices", choices),
    Case("sequence first T=1", sequence_first(1)),
    Case("sequence first T=4, the train batch", sequence_first(4)),
    Case("sequence first T=3, the val batch", sequence_first(3)),
    Case("sequence first T=7, both", sequence_first(7)),
    Case("sequence first T=5, neither", sequence_first(5)),
]
BY_NAME = {case.name: case for case in CASES}
