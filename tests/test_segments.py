"""Packed documents: with `segments=` a sample is a set of positions, and has the numbers that it has alone."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_dots, assert_grads, dots, mean, per_sample_grads
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import ghostfunc as gf

T, VOCABULARY = 8, 13
LENGTHS, ROWS = (3, 5, 4, 2, 6), ([0, 1], [2, 3], [4])  # the documents of each row; two rows have positions to spare


def documents() -> list[Tensor]:
    return [torch.randint(VOCABULARY, (length,)) for length in LENGTHS]


def packed(documents: list[Tensor]) -> dict[str, Tensor]:
    """Input ids, positions within the document, and segments `[3, T]`."""
    ids = torch.randint(VOCABULARY, (len(ROWS), T))
    positions, segments = torch.zeros_like(ids), torch.full_like(ids, -1)
    for row, numbers in enumerate(ROWS):
        at = 0
        for number in numbers:
            there = slice(at, at := at + LENGTHS[number])
            ids[row, there] = documents[number]
            positions[row, there] = torch.arange(LENGTHS[number])
            segments[row, there] = number
    labels = ids.masked_fill(segments < 0, -100)
    return {"input_ids": ids, "position_ids": positions, "labels": labels, "segments": segments}


def mask_of(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """`[B, 1, T, T]`: 0 where a position may see another, and the least number elsewhere."""
    seen = (segments[:, :, None] == segments[:, None, :]) & torch.ones(T, T).tril().bool()
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min).unsqueeze(1)


def gpt2(attention: str) -> nn.Module:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": VOCABULARY, "n_positions": 16}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **tokens, attn_implementation=attention)).eval()


def llama(attention: str) -> nn.Module:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=VOCABULARY, attn_implementation=attention)
    ).eval()


def stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_documents_in_a_row_are_as_alone(make, attention):
    module = make(attention).double()
    model_fn, params = gf.functionalize(module, gf.causal_lm_loss)
    params = {k: p + 0.2 * torch.randn_like(p) for k, p in params.items()}
    texts = documents()
    batch = packed(texts)
    batch["attention_mask"] = mask_of(batch["segments"], torch.float64)
    val = {"input_ids": torch.randint(VOCABULARY, (2, T))}
    alone = stacked([per_sample_grads(model_fn, params, {"input_ids": text[None]}) for text in texts])
    of_val = per_sample_grads(model_fn, params, val)
    tolerance = 1e-10 if make is gpt2 else 1e-5  # Llama computes its norms in float32

    result = gf.value_and_grad_dot(model_fn, params, batch, val, segments=batch["segments"])
    assert_dots(result.dots, dots(alone, mean(of_val)), tolerance, "dots")
    assert_grads(result.grads, {k: g.sum(0) / len(ROWS) for k, g in alone.items()}, tolerance, "grads")
    assert result.losses.shape == (len(ROWS),)
    matrix = gf.ghost_grad_dot(model_fn, params, batch, val, segments=batch["segments"], out="val train")
    assert matrix.shape == (2, len(LENGTHS))
    assert_dots(matrix.mean(0), dots(alone, mean(of_val)), tolerance, "matrix")
    along = gf.ghost_grad_along(model_fn, params, batch, mean(of_val), segments=batch["segments"])
    assert_dots(along, dots(alone, mean(of_val)), tolerance, "along")
    _, factors = gf.ghost_factors(model_fn, params, batch, segments=batch["segments"])
    for name, of_parameter in factors.items():
        dense = torch.stack([f.dense(params[name].shape) for f in of_parameter]).sum(0)
        scale = alone[name].norm()
        assert (dense - alone[name]).norm() <= tolerance * scale, name


def test_transformers_masks_by_position_ids():
    """Without a mask and a cache, transformers sees by the position ids where documents begin."""
    module = llama("sdpa").double()
    module.config.use_cache = False
    model_fn, params = gf.functionalize(module, gf.causal_lm_loss)
    params = {k: p + 0.2 * torch.randn_like(p) for k, p in params.items()}
    texts = [torch.randint(VOCABULARY, (length,)) for length in (3, 5, 6, 2)]
    batch = {
        "input_ids": torch.cat(texts).view(2, T),
        "position_ids": torch.cat([torch.arange(len(text)) for text in texts]).view(2, T),
        "segments": torch.cat([torch.full((len(text),), k) for k, text in enumerate(texts)]).view(2, T),
    }
    direction = {k: torch.randn_like(p) for k, p in params.items()}
    alone = stacked([per_sample_grads(model_fn, params, {"input_ids": text[None]}) for text in texts])
    along = gf.ghost_grad_along(model_fn, params, batch, direction, segments=batch["segments"])
    assert_dots(along, dots(alone, direction), 1e-5, "along")


def token_model(p: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    """No position meets another; `[T, B, d]` inside, rows flattened, a bias for each position."""
    x = batch["x"].transpose(0, 1)  # [T, B, 3]
    h = F.linear(x, p["w"], p["b"]).tanh() * p["s"]
    h = (h.reshape(-1, 5) @ p["v"]).view(*h.shape[:2], 2).transpose(0, 1) + p["place"]  # [B, T, 2]
    return (h.pow(2).sum(2) * batch["weight"]).sum(1)


def token_params() -> dict[str, Tensor]:
    shapes = {"w": (5, 3), "b": (5,), "s": (5,), "v": (5, 2), "place": (T, 2)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def token_batch(n: int) -> dict[str, Tensor]:
    return {"x": torch.randn(n, T, 3).double(), "weight": torch.rand(n, T).double()}


def test_any_set_of_positions():
    """Segments need not be runs, nor stay in one row; the rest is left out."""
    params, batch, val = token_params(), token_batch(4), token_batch(2)
    segments = torch.randint(-1, 5, (4, T))
    segments[0, 0] = 5
    V = mean(per_sample_grads(token_model, params, val))
    rows = []
    for k in range(6):
        only = {**batch, "weight": batch["weight"] * (segments == k)}
        rows.append({name: g.sum(0, keepdim=True) for name, g in per_sample_grads(token_model, params, only).items()})
    expected = stacked(rows)
    result = gf.value_and_grad_dot(token_model, params, batch, val, segments=segments, out="param train")
    for name, value in result.dots.items():
        assert_dots(value, dots({name: expected[name]}, {name: V[name]}), 1e-10, name)
    assert_grads(result.grads, mean(per_sample_grads(token_model, params, batch)), 1e-10, "grads")
    whole = gf.ghost_grad_dot(token_model, params, batch, val, segments=torch.arange(4)[:, None].expand(4, T))
    assert_dots(whole, dots(per_sample_grads(token_model, params, batch), V), 1e-10, "one segment for each row")


@pytest.mark.parametrize("rows", [1, 3])
def test_one_row_and_one_position(rows):
    params = {name: p[:1] if name == "place" else p for name, p in token_params().items()}
    batch = {name: t[:rows, :1] for name, t in token_batch(3).items()}
    direction = {name: torch.randn_like(p) for name, p in params.items()}
    along = gf.ghost_grad_along(token_model, params, batch, direction, segments=torch.arange(rows)[:, None])
    assert_dots(along, dots(per_sample_grads(token_model, params, batch), direction), 1e-10, "along")


def pooled(p: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    return F.linear((batch["x"] @ p["w"].t()).mean(1), p["v"].t()).pow(2).sum(1)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (torch.zeros(4, T), r"expected integers \[B, T\].*float32 \(4, 8\)"),
        (torch.zeros(4, dtype=torch.long), r"expected integers \[B, T\].*\(4,\)"),
        (torch.zeros(3, T, dtype=torch.long), r"\(3, 8\) fit no tensor of the batch \(.*\(4, 8, 3\)"),
        (torch.zeros(4, 5, dtype=torch.long), r"\(4, 5\) fit no tensor"),
        (torch.full((4, T), -1), r"run from -1 to -1"),
        (torch.full((4, T), -2), r"run from -2 to -2"),
    ],
)
def test_segments_that_do_not_fit(segments: Any, message: str):
    params, batch = token_params(), token_batch(4)
    with pytest.raises(ValueError, match=message):
        gf.ghost_grad_along(token_model, params, batch, params, segments=segments)


def test_what_segments_cannot_serve():
    params, batch, val = token_params(), token_batch(4), token_batch(2)
    segments = torch.randint(0, 3, (4, T))
    with pytest.raises(ValueError, match="only the train rows have segments"):
        gf.ghost_grad_dot(token_model, params, batch, val, segments=segments, schedule="joint")
    params = {"w": params["w"], "v": params["v"]}
    with pytest.raises(gf.UnsupportedUse, match=r"(?s)v: segments= .* `linear` .*layers="):
        gf.ghost_grad_along(pooled, params, batch, params, segments=segments)
    along = gf.ghost_grad_along(pooled, params, batch, params, segments=segments, layers="w")
    assert along.shape == (3,)


def test_the_loss_of_a_packed_row():
    """Each document's own mean; the last token of one does not predict the next."""
    texts = documents()
    batch = packed(texts)
    logits = torch.randn(len(ROWS), T, VOCABULARY, dtype=torch.float64)
    losses = gf.causal_lm_loss(logits, batch)
    for row, numbers in enumerate(ROWS):
        parts = [(logits[row, batch["segments"][row] == k], texts[k]) for k in numbers]
        expected = sum(F.cross_entropy(own[:-1], text[1:]) for own, text in parts)
        torch.testing.assert_close(losses[row], expected, rtol=1e-12, atol=0)
