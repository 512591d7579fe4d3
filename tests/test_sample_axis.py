"""What a tensor says about its samples is true: each claim is compared with which entries change when a sample does."""

from collections.abc import Callable
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ghostfunc._follow import follow
from ghostfunc._sample_axis import Lost, SampleAxis, samples_of, set_samples

B = 4


class Following(TorchFunctionMode):
    """Lets every operation's results carry their samples."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        follow(func, args, kwargs, out, B, NOTES)
        return out


NOTES: list[str] = []  # of the call under test


@contextmanager
def following(*tensors: Tensor):
    for t in tensors:
        set_samples(t, SampleAxis(0, B))
    with Following():
        yield


def inputs(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def changed_by(body: Callable[[Tensor], Tensor], x: Tensor, sample: int, *, order_kept: bool) -> Tensor:
    """Which entries of the result depend on a sample: where the order of rows was noted, in that order."""
    other = x.clone()
    change = inputs(tuple(x.shape), seed=1)[sample] - x[sample]
    other[sample] += 1e-6 * change if order_kept else change
    return ~torch.isclose(body(x), body(other), rtol=0, atol=0, equal_nan=True)


def check_claim(body: Callable[[Tensor], Tensor], x: Tensor) -> SampleAxis | Lost | None:
    carrying = x.clone()
    NOTES.clear()
    with following(carrying):
        out = body(carrying)
    claim = samples_of(out)
    changed = [changed_by(body, x, s, order_kept=bool(NOTES)) for s in range(B)]
    if claim is None:
        assert not any(c.any() for c in changed), "a result that depends on the batch carries nothing"
    if isinstance(claim, SampleAxis):
        assert out.shape[claim.dim] == claim.size
        owner = claim.of_index().view(-1, *(1,) * (out.dim() - claim.dim - 1)).expand(out.shape)
        for s in range(B):
            assert not (changed[s] & (owner != s)).any(), f"{claim}: entries of others depend on sample {s}"
    return claim


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    # elementwise and along a dimension
    "tanh": torch.tanh,
    "scale": lambda x: 2 * x + 1,
    "add its mean": lambda x: x + x.mean(-1, keepdim=True),
    "add the reverse": lambda x: x + x.flip(-1),
    "softmax last": lambda x: x.softmax(-1),
    "softmax first": lambda x: x.softmax(0),
    "cumsum 0": lambda x: x.cumsum(0),
    "cumsum 1": lambda x: x.cumsum(1 % x.dim()),
    "flip two": lambda x: x.flip(-1, 0),
    "flip tuple": lambda x: x.flip((0, -1)),
    "roll flat": lambda x: x.roll(1),
    "roll 0": lambda x: x.roll(1, 0),
    "roll last": lambda x: x.roll(1, -1),
    "roll two": lambda x: x.roll((1, 1), (0, -1)),
    "sort 0": lambda x: x.sort(0).values,
    "sort last": lambda x: x.sort().values,
    "topk": lambda x: x.topk(1).values,
    "normalize": lambda x: F.normalize(x, dim=-1),
    "normalize first": lambda x: F.normalize(x, dim=0),
    "renorm last": lambda x: x.renorm(2, x.dim() - 1, 0.5),
    "renorm first": lambda x: x.renorm(2, 0, 0.5),
    "diff": lambda x: x.diff(),
    "layer norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "layer norm two": lambda x: F.layer_norm(x, x.shape[-2:]),
    "pad": lambda x: F.pad(x, (1, 2)),
    "pad shifted": lambda x: F.pad(x, (*(0, 0) * (x.dim() - 1), 1, -1)),
    "pad shifted last": lambda x: F.pad(x, (1, -1)),
    "triu": lambda x: x.triu(),
    "glu": lambda x: F.glu(torch.cat([x, x.sin()], -1)),
    # reductions
    "sum last": lambda x: x.sum(-1, keepdim=True),
    "sum first": lambda x: x.sum(0, keepdim=True).expand(x.shape),
    "mean middle": lambda x: x.mean(x.dim() // 2, keepdim=True),
    "max last": lambda x: x.max(-1, keepdim=True).values,
    "max all": lambda x: x * x.max(),
    "logsumexp": lambda x: x.logsumexp(tuple(range(1, x.dim()))) if x.dim() > 1 else x,
    "norm": lambda x: x.norm(dim=-1, keepdim=True),
    "norm all": lambda x: x / x.norm(),
    "std first": lambda x: x / x.std(0, correction=0, keepdim=True).expand(x.shape),
    "argmax": lambda x: x.argmax(-1, keepdim=True).double(),
    # shapes
    "flatten": lambda x: x.flatten(),
    "flatten two": lambda x: x.flatten(0, 1) if x.dim() > 1 else x,
    "flatten last two": lambda x: x.flatten(-2) if x.dim() > 1 else x,
    "transpose": lambda x: x.transpose(0, -1),
    "transpose last": lambda x: x.transpose(-1, -2) if x.dim() > 1 else x,
    "permute": lambda x: x.permute(*range(1, x.dim()), 0),
    "movedim": lambda x: x.movedim(-1, 0),
    "mT": lambda x: x.mT if x.dim() > 1 else x,
    "unsqueeze": lambda x: x.unsqueeze(-1),
    "unsqueeze 0": lambda x: x.unsqueeze(0),
    "squeeze": lambda x: x.squeeze(),
    "rows of B": lambda x: x.reshape(B, -1),
    "columns of B": lambda x: x.reshape(-1, B),
    "halves": lambda x: x.reshape(2, -1),
    "heads": lambda x: x.unflatten(-1, (2, -1)) if x.shape[-1] % 2 == 0 else x,
    "middle of B": lambda x: x.reshape(-1, B, x.numel() // B) if x.numel() // B > 0 else x,
    "expand": lambda x: x.expand(3, *x.shape),
    "repeat": lambda x: x.repeat(2, *(1,) * (x.dim() - 1)),
    "repeat last": lambda x: x.repeat(*(1,) * (x.dim() - 1), 2),
    "interleave": lambda x: x.repeat_interleave(2, 0),
    "interleave last": lambda x: x.repeat_interleave(2, -1),
    "tile": lambda x: x.tile(2),
    "unfold": lambda x: x.unfold(-1, 2, 1) if x.shape[-1] > 1 else x,
    # parts and indices
    "first": lambda x: x[:1],
    "all but the first": lambda x: x[1:],
    "every second": lambda x: x[::2],
    "last position": lambda x: x[..., -1],
    "new axis": lambda x: x[:, None],
    "new axis first": lambda x: x[None],
    "select": lambda x: x.select(-1, 0),
    "reversed rows": lambda x: x[torch.arange(len(x) - 1, -1, -1)],
    "rows again": lambda x: x[torch.arange(len(x))],
    "columns again": lambda x: x[..., torch.arange(x.shape[-1])],
    "a point each": lambda x: x[torch.arange(len(x)), torch.zeros(len(x), dtype=torch.long)] if x.dim() > 1 else x,
    "some columns": lambda x: x[..., [0, -1]],
    "index select": lambda x: x.index_select(0, torch.arange(len(x) - 1, -1, -1)),
    "index select last": lambda x: x.index_select(-1, torch.zeros(3, dtype=torch.long)),
    "gather": lambda x: x.gather(-1, x.argsort(-1)),
    "gather first": lambda x: x.gather(0, x.argsort(0)),
    "take along": lambda x: x.take_along_dim(x.argsort(-1), -1),
    "chunks swapped": lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
    "chunks swapped first": lambda x: torch.cat(x.chunk(2, 0)[::-1], 0),
    "unbound": lambda x: torch.stack(x.unbind(-1)[::-1], -1),
    "unbound first": lambda x: torch.stack(x.unbind(0)[::-1], 0),
    "stacked": lambda x: torch.stack([x, x.sin()], 1),
    "stacked last": lambda x: torch.stack([x, x.sin()], -1),
    "doubled": lambda x: torch.cat([x, x.sin()]),
    "doubled last": lambda x: torch.cat([x, x.sin()], -1),
    "with a constant row": lambda x: torch.cat([torch.ones_like(x[:1]), x])[:-1],
    "masked": lambda x: x.masked_fill(x > 0, 0.0),
    "where": lambda x: torch.where(x > 0, x, x.mean(-1, keepdim=True)),
    "scatter": lambda x: torch.zeros_like(x).scatter(-1, x.argsort(-1), x),
    "index add": lambda x: torch.zeros_like(x).index_add(0, torch.arange(len(x) - 1, -1, -1), x),
    # products and contractions
    "outer with itself": lambda x: x.unsqueeze(-1) * x.unsqueeze(-2),
    "gram of positions": lambda x: x @ x.mT if x.dim() > 1 else x,
    "gram of columns": lambda x: x.mT @ x if x.dim() > 1 else x,
    "times a constant": lambda x: x @ inputs((x.shape[-1], 3), 5),
    "a constant times": lambda x: inputs((3, x.shape[-2]), 5) @ x if x.dim() > 1 else x,
    "einsum": lambda x: torch.einsum("...d,...e->...de", x, x.sin()),
    "einsum first": lambda x: torch.einsum("b...,c...->bc", x, x),
    "einsum permuted": lambda x: torch.einsum("a...d->d...a", x),
    "cdist": lambda x: torch.cdist(x, x) if x.dim() > 1 else x,
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x) if x.dim() > 1 else x,
    "its own transpose": lambda x: x + x.mT if x.dim() > 1 and x.shape[-1] == x.shape[-2] else x,
    "interpolate": lambda x: F.interpolate(x, scale_factor=2) if x.dim() == 3 else x,
    "pooled": lambda x: F.avg_pool1d(x, 2) if x.dim() == 3 and x.shape[-1] > 1 else x,
    "convolved": lambda x: F.conv1d(x, inputs((2, x.shape[1], 1), 3)) if x.dim() == 3 else x,
    "cosine": lambda x: F.cosine_similarity(x, x.flip(-1) + 1, dim=-1),
    "squared error": lambda x: F.mse_loss(x, x.sin(), reduction="none"),
    "squared error, reduced": lambda x: x * F.mse_loss(x, x.sin()),
}  # fmt: skip
SHAPES = [(B, 3), (B, B), (B, 3, 2), (B, B, B), (B, 2, 3, 2)]

BEFORE = ["", "transpose", "flatten two", "doubled"]


def evaluable(body: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether an operation is defined for a shape at all."""
    try:
        return 0 < body(x).numel() <= 5000
    except (IndexError, RuntimeError):
        return False


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
@pytest.mark.parametrize("name", OPERATIONS)
def test_one_operation(name):
    """Each operation on every shape, and on the same data with the samples in other dimensions."""
    body = OPERATIONS[name]
    tried = 0
    for shape, before in product(SHAPES, BEFORE):
        first = OPERATIONS[before] if before else (lambda x: x)
        chain = lambda x, first=first: body(first(x))  # noqa: E731
        x = inputs(shape)
        if evaluable(chain, x):
            tried += 1
            check_claim(chain, x)
    assert tried


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(shape=st.sampled_from(SHAPES), names=st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=2, max_size=6))
def test_chains_of_operations(shape, names):
    """No chain of operations ends in a claim that is not true."""

    def chain(x: Tensor) -> Tensor:
        for name in names:
            x = OPERATIONS[name](x)
        return x

    x = inputs(shape)
    if evaluable(chain, x):
        check_claim(chain, x)


@pytest.mark.parametrize(
    "name",
    ["tanh", "softmax last", "layer norm", "sum last", "flatten two", "transpose", "permute", "mT", "heads", "repeat",
     "interleave", "gram of positions", "times a constant", "attention", "stacked", "doubled", "a point each",
     "new axis", "last position", "gather", "masked"],
)  # fmt: skip
def test_ordinary_operations_are_followed(name):
    """The operations that models are made of do not lose the samples."""
    claim = check_claim(OPERATIONS[name], inputs((B, 3, 2)))
    assert isinstance(claim, SampleAxis)


@pytest.mark.parametrize(
    "name",
    ["softmax first", "cumsum 0", "normalize first", "sum first", "max all", "norm all", "std first", "einsum first"],
)  # fmt: skip
def test_meeting_samples_are_called_so(name):
    """The operations that let samples meet are named in the reason."""
    claim = check_claim(OPERATIONS[name], inputs((B, 3, 2)))
    assert isinstance(claim, Lost)
    assert claim.mixed
    assert "`" in claim.reason


def test_enumerations_are_what_they_were_made() -> None:
    """An index that was arange(B) and was written to, or picked anew, is no longer."""
    x = inputs((B, 3))
    places = torch.randperm(B, generator=torch.Generator().manual_seed(3))

    def written(x: Tensor) -> Tensor:
        index = torch.arange(B)
        index += 1
        return x[index % B, 0]

    def assigned(x: Tensor) -> Tensor:
        index = torch.arange(B)[:, None]
        index[0], index[1] = 1, 0
        return x[index, torch.arange(3)]

    for body in (
        written,
        assigned,
        lambda x: x[torch.arange(B)[places], 1],
        lambda x: x[torch.arange(B)[:, None], [0]],
    ):
        assert isinstance(check_claim(body, x), SampleAxis)
