"""The axes of a result: every subset in every order, against gradients by token, head, layer, sample and parameter."""

from itertools import permutations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, Draw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import losses_and_grads
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import ghostfunc as gf
from ghostfunc._axes import block_of, layers_by_name

CPU = torch.device("cpu")
N, M, R, H = 3, 2, 4, 2  # samples, validation samples, positions, heads
Params = dict[str, Tensor]


def two_layers(p: Params, batch: dict[str, Tensor]) -> Tensor:
    """Two linear maps at each position, an embedding and a scale; each use can have weights of its own position."""

    def at(name: str, t: int) -> Tensor:
        return p[name] if p[name].dim() == NDIM[name] else p[name][t]

    rows = []
    for t in range(batch["ids"].shape[1]):
        x = F.embedding(batch["ids"][:, t], at("emb", t)) + at("pos", t)[0, t] + at("wpe", t)[POSITIONS[t]]
        h = F.linear(x, at("a.0.w", t), at("a.0.b", t)).tanh() * at("a.0.scale", t)
        rows.append(F.linear(h, at("a.1.w", t)).square().sum(-1))
    return torch.stack(rows, 1).tanh().mean(1)


def one_tensor_at_all_positions(p: Params, batch: dict[str, Tensor]) -> Tensor:
    """The same model, all positions in one tensor."""
    where = F.embedding(torch.tensor([POSITIONS]), p["wpe"])  # [1, R, 4], as GPT-2 looks them up
    h = F.embedding(batch["ids"], p["emb"]) + p["pos"] + where
    h = F.linear(h, p["a.0.w"], p["a.0.b"]).tanh() * p["a.0.scale"]
    return F.linear(h, p["a.1.w"]).square().sum(-1).tanh().mean(1)


POSITIONS = (2, 0, 5, 2)
SHAPES: dict[str, tuple[int, ...]] = {
    "emb": (5, 4),
    "pos": (1, R, 4),
    "wpe": (6, 4),
    "a.0.w": (6, 4),
    "a.0.b": (6,),
    "a.0.scale": (6,),
    "a.1.w": (3, 6),
}
NDIM = {name: len(shape) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def setting() -> tuple[Params, Any, Any, dict[str, Tensor], dict[str, Tensor]]:
    """`(params, train, val, gradients by sample and token [n, R, *shape], validation gradients [m, *shape])`."""
    draw = Draw(torch.float64, CPU, 3)
    params = draw.params(**SHAPES)
    train, val = {"ids": draw.ids(5, N, R)}, {"ids": draw.ids(5, M, R)}
    own = {name: torch.stack([p] * R) for name, p in params.items()}  # weights of each position's own
    token = losses_and_grads(two_layers, own, train)[1]  # [n, R, *shape]
    return params, train, val, token, losses_and_grads(two_layers, params, val)[1]


def reference(token: dict[str, Tensor], val: dict[str, Tensor], axes: tuple[str, ...]) -> Any:
    """The products `[n, R, m]` of each parameter, reduced to some axes by hand."""
    cube = {
        name: torch.einsum("nrx,mx->nrm", token[name].flatten(2), val[name].reshape(M, -1)) for name in token
    }  # fmt: skip
    names = [axis for axis in axes if axis not in ("param", "layer")]

    def reduced(t: Tensor) -> Tensor:
        letters = {"train": "n", "token": "r", "val": "m"}
        t = t if "val" in names else t / M
        return torch.einsum(f"nrm->{''.join(letters[name] for name in names)}", t)

    if "param" in axes:
        return {name: reduced(t) for name, t in cube.items()}
    if "layer" in axes:
        layers: dict[str, Tensor] = {}
        for name, t in cube.items():
            layer = name[:3]
            layers[layer] = layers[layer] + t if layer in layers else t
        return {layer: reduced(t) for layer, t in layers.items()}
    return reduced(sum(cube.values()))


def every_order() -> list[str]:
    names = [(*some, *group) for some in _subsets("train", "token", "val") for group in ((), ("param",), ("layer",))]
    return [" ".join(order) for some in names for order in permutations(some)]


def _subsets(*names: str) -> list[tuple[str, ...]]:
    return [()] if not names else [s for rest in _subsets(*names[1:]) for s in (rest, (names[0], *rest))]


@pytest.mark.parametrize("out", every_order())
def test_every_subset_in_every_order(out, setting):
    params, train, val, token, v = setting
    expected = reference(token, v, tuple(out.split()))
    found = gf.ghost_grad_dot(one_tensor_at_all_positions, params, train, val, out=out)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    result = gf.value_and_grad_dot(one_tensor_at_all_positions, params, train, val, out=out)
    torch.testing.assert_close(result.dots, expected, rtol=1e-10, atol=1e-13)


def test_norms_and_directions_by_token(setting):
    params, train, _, token, v = setting
    rows = torch.cat([token[name].flatten(2) for name in params], 2)  # [n, R, all]
    found = gf.ghost_grad_norm(one_tensor_at_all_positions, params, train, out="token")
    torch.testing.assert_close(found, rows.norm(dim=2), rtol=1e-10, atol=1e-13)
    by_name = gf.ghost_grad_norm(one_tensor_at_all_positions, params, train, out="token param sample")
    for name, norms in by_name.items():
        torch.testing.assert_close(norms, token[name].flatten(2).norm(dim=2).t(), rtol=1e-10, atol=1e-13)
    direction = {name: g[0] for name, g in v.items()}
    flat = torch.cat([direction[name].flatten() for name in params])
    along = gf.ghost_grad_along(one_tensor_at_all_positions, params, train, direction, out="token sample")
    torch.testing.assert_close(along, (rows @ flat).t(), rtol=1e-10, atol=1e-13)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["mlp", "gpt2 tied", "convolution", "derived", "weight twice"]),
    axes=st.permutations(["train", "val", "layer"]),
    left_out=st.sampled_from(["train", "val", "layer"]),
    reduction=st.sampled_from(["sum", "mean"]),
)
def test_sums_over_an_axis_agree_with_the_coarser_pattern(name, axes, left_out, reduction):
    model_fn, params, batch = BY_NAME[name].make(torch.float64, CPU)
    train, val = batch(3, 1), batch(2, 2)

    def dots(out: list[str]) -> Any:
        return gf.ghost_grad_dot(model_fn, params, train, val, out=" ".join(out), reduction=reduction)

    fine, coarse = dots(list(axes)), dots([axis for axis in axes if axis != left_out])
    if left_out == "layer":
        fine = torch.stack(list(fine.values())).sum(0)
    else:
        place = [axis for axis in axes if axis != "layer"].index(left_out)
        mean = left_out == "val" and reduction == "mean"
        fine = {layer: t.mean(place) if mean else t.sum(place) for layer, t in fine.items()}
    torch.testing.assert_close(fine, coarse, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- heads


def gpt2() -> nn.Module:
    sizes = {"n_layer": 2, "n_head": H, "n_embd": 8, "vocab_size": 13, "n_positions": 8, "use_cache": False}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).double().eval()


def llama() -> nn.Module:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=13)).double().eval()


def by_hand(name: str, grads: Tensor) -> Tensor:
    """Per-sample gradients `[n, *shape]` of an attention weight as `[n, H, entries of the head]`."""
    n = len(grads)
    if name.endswith("c_attn.weight"):  # [d, (q k v) x heads x 4]
        return grads.view(n, 8, 3, H, 4).permute(0, 3, 1, 2, 4).reshape(n, H, -1)
    if name.endswith("c_attn.bias"):
        return grads.view(n, 3, H, 4).permute(0, 2, 1, 3).reshape(n, H, -1)
    if name.endswith("o_proj.weight"):  # [d, heads x 4]
        return grads.view(n, 8, H, 4).permute(0, 2, 1, 3).reshape(n, H, -1)
    return grads.view(n, -1, 4, 8).reshape(n, len(grads[0]) // 4, -1)  # rows are heads


@pytest.mark.parametrize("build", [gpt2, llama])
def test_heads(build):
    torch.manual_seed(0)
    module = build()
    model_fn, params = gf.functionalize(module, gf.causal_lm_loss)
    heads = gf.attention_heads(module)
    assert len(heads) == {"gpt2": 6, "llama": 8}[build.__name__] and set(heads) <= set(params)
    train, val = {"input_ids": torch.randint(13, (N, 5))}, {"input_ids": torch.randint(13, (M, 5))}
    g, v = (losses_and_grads(model_fn, params, b)[1] for b in (train, val))
    options: dict[str, Any] = {"layers": heads, "heads": heads}
    found = gf.ghost_grad_dot(model_fn, params, train, val, out="head param val train", **options)
    along = gf.ghost_grad_along(model_fn, params, train, {k: t.mean(0) for k, t in v.items()}, out="param sample head",
                                **options)  # fmt: skip
    for name in heads:
        expected = torch.einsum("nhx,mhx->hmn", by_hand(name, g[name]), by_hand(name, v[name]))
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(along[name], expected.mean(1).t(), rtol=1e-9, atol=1e-14)
    if build is gpt2:
        by_layer = gf.ghost_grad_dot(model_fn, params, train, val, out="layer train head token", **options)
        assert list(by_layer) == ["transformer.h.0", "transformer.h.1"]
        whole = gf.ghost_grad_dot(model_fn, params, train, val, out="layer train", layers=heads)
        for layer, dots in by_layer.items():
            torch.testing.assert_close(dots.sum((1, 2)), whole[layer], rtol=1e-9, atol=1e-14)
    else:
        with pytest.raises(ValueError, match="different numbers of heads"):
            gf.ghost_grad_dot(model_fn, params, train, val, out="train head", **options)


@pytest.mark.parametrize("group", ["", "param", "layer"])
def test_every_subset_with_heads(group):
    """Every subset of the axes is the reduction of all of them; heads and tokens have their own references above."""
    torch.manual_seed(0)
    module = gpt2()
    model_fn, params = gf.functionalize(module, gf.causal_lm_loss)
    heads = gf.attention_heads(module)
    train, val = {"input_ids": torch.randint(13, (N, 5))}, {"input_ids": torch.randint(13, (M, 5))}

    def dots(axes: tuple[str, ...]) -> Any:
        out = " ".join((*axes, group))
        found = gf.ghost_grad_dot(model_fn, params, train, val, out=out, layers=heads, heads=heads)
        return found if group else {"": found}

    names = ("train", "token", "val", "head")
    everything = dots(names)
    assert {t.shape for t in everything.values()} == {(N, 5, M, H)}
    for axes in _subsets(*names):
        summed = [place for place, name in enumerate(names) if name not in axes]
        for key, t in dots(axes).items():
            expected = everything[key].sum(summed) if summed else everything[key]
            expected = expected if "val" in axes else expected / M
            torch.testing.assert_close(t, expected, rtol=1e-9, atol=1e-14)


def test_heads_that_are_missing_or_do_not_fit():
    model_fn, params, batch = BY_NAME["mlp"].make(torch.float64, CPU)
    train, val = batch(3, 1), batch(2, 2)
    with pytest.raises(ValueError, match=r"no pattern for 0\.weight"):
        gf.ghost_grad_dot(model_fn, params, train, val, out="train head")
    for pattern in ("(head=3 k) d", "(head=2 k)", "k d", "(head=2 k) (head=2 d)"):
        with pytest.raises(ValueError, match=r"heads\['0\.weight'\]"):
            gf.ghost_grad_dot(
                model_fn, params, train, val, out="train head", layers="0.weight", heads={"0.weight": pattern}
            )
    with pytest.raises(ValueError, match="no attention layer"):
        gf.attention_heads(nn.Linear(2, 2))


# ---------------------------------------------------------------- patterns


def test_layers_by_name():
    names = ["transformer.wte.weight", "transformer.h.0.attn.w", "transformer.h.11.mlp.w", "scale"]
    assert [block_of(name) for name in names] == ["transformer.wte", "transformer.h.0", "transformer.h.11", "scale"]
    assert layers_by_name(names[1:3], r"h\.(\d+)") == {names[1]: "0", names[2]: "11"}
    assert layers_by_name(names, str.upper) == {name: name.upper() for name in names}
    with pytest.raises(ValueError, match=r"transformer\.wte\.weight"):
        layers_by_name(names, r"h\.(\d+)")


def test_a_token_that_no_parameter_stands_at():
    """Images have no position axis that a dense layer shares: refused with the parameter's name."""
    model_fn, params, batch = BY_NAME["mlp"].make(torch.float64, CPU)
    with pytest.raises(gf.UnsupportedUse, match=r"weight.*'token'"):
        gf.ghost_grad_dot(model_fn, params, batch(3, 1), batch(2, 2), out="train token")

    def flat(p: Params, b: dict[str, Tensor]) -> Tensor:
        return (b["x"] * p["w"]).square()

    with pytest.raises(ValueError, match="'token' needs a batch with positions"):
        gf.ghost_grad_norm(flat, {"w": torch.ones(())}, {"x": torch.ones(3)}, out="token")
    with pytest.raises(ValueError, match="exclude each other"):
        gf.ghost_grad_norm(flat, {"w": torch.ones(())}, {"x": torch.ones(3, 2)}, out="token",
                           segments=torch.zeros(3, 2, dtype=torch.long))  # fmt: skip


@pytest.mark.parametrize("out", ["train token", "param token train", "layer val", "", "param"])
def test_results_are_new_tensors_without_a_graph(out, setting):
    params, train, val, *_ = setting
    found = gf.ghost_grad_dot(one_tensor_at_all_positions, params, train, val, out=out)
    assert all(not t.requires_grad for t in pytree.tree_leaves(found))
