"""Norms, PReLU and bags of embeddings: exact in every mode and layout, and without a loop over samples."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import Draw, Params
from exact import Spelling, assert_exact, assert_has_rule, built
from oracle import per_sample_grads
from torch import Tensor, nn

import ghostfunc as gf

IMAGE = (4, 3, 2)  # channels, height, width
AFFINE = {"w": (4,), "b": (4,)}


def running(x: Tensor) -> tuple[Tensor, Tensor]:
    """Means and variances of four channels."""
    return x.new_tensor([0.1, -0.4, 0.3, 0.0]), x.new_tensor([0.5, 1.5, 1.0, 2.0])


def hugging_face_norm(p: Params, x: Tensor) -> Tensor:
    """Root-mean-square norms as Llama and as Gemma write them."""
    variance = x.float().pow(2).mean(-1, keepdim=True).double()
    x = p["llama"] * (x * torch.rsqrt(variance + 1e-6)).to(x.dtype)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + p["gemma"].double())


SPELLINGS = [
    Spelling("rms_norm", lambda p, x: F.rms_norm(x, (4,), p["w"]), (3, 4), {"w": (4,)}),
    Spelling("rms_norm of two dimensions", lambda p, x: F.rms_norm(x, (3, 4), p["w"], 1e-3), (2, 3, 4), {"w": (3, 4)}),
    Spelling("torch.rms_norm", lambda p, x: torch.rms_norm(x, (4,), p["w"]), (4,), {"w": (4,)}),
    Spelling(
        "rms_norm, positions first",
        lambda p, x: F.rms_norm(x.transpose(0, 1), (4,), p["w"]).transpose(0, 1),
        (3, 4),
        {"w": (4,)},
    ),
    Spelling(
        "rms_norm of rows",
        lambda p, x: F.rms_norm(x.transpose(0, 1).reshape(-1, 4), (4,), p["w"]).view(3, -1, 4).transpose(0, 1),
        (3, 4),
        {"w": (4,)},
    ),
    Spelling("norms by hand", hugging_face_norm, (3, 4), {"llama": (4,), "gemma": (4,)}),
    Spelling("group_norm of images", lambda p, x: F.group_norm(x, 2, p["w"], p["b"]), IMAGE, AFFINE),
    Spelling("group_norm of vectors", lambda p, x: F.group_norm(x, 2, p["w"], p["b"], 1e-2), (4,), AFFINE),
    Spelling("torch.group_norm", lambda p, x: torch.group_norm(x, 4, p["w"], p["b"]), (4, 3), AFFINE),
    Spelling("group_norm, scale only", lambda p, x: F.group_norm(x, 2, p["w"]), (4, 3), {"w": (4,)}),
    Spelling(
        "group_norm of frames",
        lambda p, x: F.group_norm(x.flatten(0, 1), 2, p["w"], p["b"]).view(x.shape),
        (5, *IMAGE),
        AFFINE,
    ),
    Spelling("instance_norm", lambda p, x: F.instance_norm(x, None, None, p["w"], p["b"]), IMAGE, AFFINE),
    Spelling(
        "instance_norm, running",
        lambda p, x: F.instance_norm(x, *running(x), p["w"], p["b"], use_input_stats=False),
        IMAGE,
        AFFINE,
    ),
    Spelling(
        "torch.instance_norm",
        lambda p, x: torch.instance_norm(x, p["w"], p["b"], None, None, True, 0.1, 1e-5, False),
        (4, 3),
        AFFINE,
    ),
    Spelling("batch_norm of images", lambda p, x: F.batch_norm(x, *running(x), p["w"], p["b"]), IMAGE, AFFINE),
    Spelling("batch_norm of vectors", lambda p, x: F.batch_norm(x, *running(x), p["w"], p["b"]), (4,), AFFINE),
    Spelling(
        "torch.batch_norm",
        lambda p, x: torch.batch_norm(x, p["w"], p["b"], *running(x), False, 0.1, 1e-3, False),
        (4, 3),
        AFFINE,
    ),
    Spelling("prelu with one slope", lambda p, x: F.prelu(x, p["w"]), (3, 4), {"w": (1,)}),
    Spelling("prelu of images", lambda p, x: F.prelu(x, p["w"]), IMAGE, {"w": (4,)}),
    Spelling("prelu of vectors", lambda p, x: torch.prelu(x, p["w"]), (4,), {"w": (4,)}),
    Spelling(
        "prelu, positions first",
        lambda p, x: F.prelu(x.transpose(0, 1), p["w"]).transpose(0, 1),
        (3, 4),
        {"w": (1,)},
    ),
]


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.name)
def test_norms(spelling, device, monkeypatch):
    """Every spelling is exact, and has a rule that does not loop over samples."""
    model_fn, params, batch = built(spelling, device)
    assert_exact(model_fn, params, batch(4, 1), batch(3, 2))
    assert_has_rule(monkeypatch, model_fn, params, batch(4, 1))


@pytest.mark.parametrize(
    "module",
    [
        lambda: nn.RMSNorm(4),
        lambda: nn.GroupNorm(1, 3),
        lambda: nn.InstanceNorm1d(3, affine=True),
        lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
        lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True).eval(),
        lambda: nn.BatchNorm1d(3).eval(),
        lambda: nn.PReLU(3),
    ],
    ids=["RMSNorm", "GroupNorm", "InstanceNorm", "InstanceNorm, moving", "InstanceNorm, eval", "BatchNorm", "PReLU"],
)
def test_modules(module, device, monkeypatch):
    """Modules between two layers: exact, and their buffers stay as they are."""
    torch.manual_seed(0)
    norm = module().to(device, torch.float64)
    net = nn.Sequential(nn.Linear(5, 4), norm, nn.Flatten(), nn.Linear(12, 3)).to(device, torch.float64)
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    model_fn, params = gf.functionalize(net, gf.classification_loss)
    draw = Draw(torch.float64, device, 3)
    train, val = ((draw.normal(n, 3, 5), draw.ids(3, n)) for n in (4, 3))
    assert_exact(model_fn, params, train, val)
    assert_has_rule(monkeypatch, model_fn, params, train)
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def test_batch_norm_in_training_is_refused(device):
    """Samples meet in the statistics of a batch."""
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).to(device)
    model_fn, params = gf.functionalize(net, gf.classification_loss)
    batch = torch.randn(4, 5, device=device), torch.zeros(4, dtype=torch.long, device=device)
    with pytest.raises(gf.InteractingSamples, match="batch_norm in training mode"):
        gf.ghost_factors(model_fn, params, batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["rms_norm", "group_norm of images", "batch_norm of images"])
def test_low_precision(name, dtype, device):
    """A norm in half precision: the scale's per-sample gradients are near those of the same numbers in float64."""
    spelling = next(s for s in SPELLINGS if s.name == name)
    model_fn, params, batch = built(spelling, device, dtype)
    reference = built(spelling, device)[0]
    train = batch(4, 1)
    (factor,) = gf.ghost_factors(model_fn, params, train)[1]["w"]
    doubled = {key: p.double() for key, p in params.items()}
    want = per_sample_grads(reference, doubled, {key: x.double() for key, x in train.items()})["w"]
    error = (factor.dense(want.shape[1:]).double() - want).flatten(1).norm(dim=1)
    assert (error <= 0.05 * want.flatten(1).norm(dim=1).max()).all()


# --- bags of embeddings -----------------------------------------------------------------------------------------------


def bags(call: Callable[..., Tensor], device: torch.device):
    """A table in bags of ids `[B, 5]` with one id twice, one in padding; `call(ids, table, weights)`."""

    def model_fn(p: Params, batch: dict[str, Tensor]) -> Tensor:
        return (call(batch["ids"], p["table"], batch["weights"]) @ p["head"]).tanh().pow(2).mean(1)

    def batch(n: int, seed: int) -> dict[str, Tensor]:
        draw = Draw(torch.float64, device, seed)
        ids = draw.ids(7, n, 5)
        ids[:, 1] = ids[:, 0]
        ids[:, 2] = 2
        ids[0] = 2
        return {"ids": ids, "weights": draw.normal(n, 5)}

    return model_fn, Draw(torch.float64, device).params(table=(7, 4), head=(4, 3)), batch


@pytest.mark.parametrize("padding", [None, 2, -5])
@pytest.mark.parametrize("kind", ["sum", "mean", "max", "weighted"])
def test_bags(kind, padding, device, monkeypatch):
    """Sums, means, maxima and weighted sums, also of a bag with nothing but padding: exact, with factors of rows."""

    def call(ids: Tensor, table: Tensor, weights: Tensor) -> Tensor:
        mode = "sum" if kind == "weighted" else kind
        chosen = weights if kind == "weighted" else None
        return F.embedding_bag(ids, table, mode=mode, padding_idx=padding, per_sample_weights=chosen)

    model_fn, params, batch = bags(call, device)
    assert_exact(model_fn, params, batch(4, 1), batch(3, 2))
    assert "embedding" in assert_has_rule(monkeypatch, model_fn, params, batch(4, 1))


def test_bags_with_learnt_weights(device, monkeypatch):
    """Weights of a bag's entries that are a parameter."""

    def model_fn(p: Params, batch: dict[str, Tensor]) -> Tensor:
        ids = batch["ids"]
        weights = p["weights"].expand(ids.shape)
        return F.embedding_bag(ids, p["table"], mode="sum", per_sample_weights=weights).tanh().pow(2).mean(1)

    params = Draw(torch.float64, device).params(table=(7, 4), weights=(5,))
    batch = bags(F.embedding_bag, device)[2]
    assert_exact(model_fn, params, batch(4, 1), batch(3, 2))
    assert_has_rule(monkeypatch, model_fn, params, batch(4, 1))


def test_bags_by_offsets(device):
    """Bags in one row of ids: the samples are told by a probe."""

    def call(ids: Tensor, table: Tensor, weights: Tensor) -> Tensor:
        offsets = torch.arange(len(ids), device=ids.device) * ids.shape[1]
        return F.embedding_bag(ids.flatten(), table, offsets, mode="mean")

    model_fn, params, batch = bags(call, device)
    assert_exact(model_fn, params, batch(4, 1), batch(3, 2))


def test_bags_with_max_norm_are_refused(device):
    """A table that is renormalised in place has no gradient of a pure function."""
    model_fn, params, batch = bags(lambda ids, table, _: F.embedding_bag(ids, table, max_norm=1.0), device)
    with pytest.raises(gf.UnsupportedUse, match=r"table.*max_norm"):
        gf.ghost_factors(model_fn, params, batch(4, 1))
