"""Which tokens carry a score: their shares add up to the inner product of projected rows, exactly."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import ghostfunc as gf
from ghostfunc.report import token_scores


def gpt2() -> tuple:
    """In float64, with the dropout of GPT-2's configuration, as an index has it: in eval mode."""
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=60, n_positions=16, bos_token_id=0, eos_token_id=0, resid_pdrop=0.1
    )
    model = GPT2LMHeadModel(config).double().eval()
    return gf.functionalize(model, gf.causal_lm_loss)


def padded(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    ids = torch.randint(60, (len(lengths), max(lengths)))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def assert_adds_up(found, rows: torch.Tensor, query: torch.Tensor) -> None:
    exact = rows @ query
    error = (found.tokens.sum(1) + found.elsewhere - exact).abs()
    assert (error <= 1e-10 * rows.norm(dim=1) * query.norm()).all()
    assert exact.abs().max() > 1e-6


@pytest.mark.parametrize("kind", ["gaussian", "orthonormal", "mask"])
@pytest.mark.parametrize("include", [(), ("embedding", "norm", "bias", "head")])
def test_tokens_add_up_to_the_inner_product_of_rows(kind, include):
    model_fn, params = gpt2()
    lengths = (9, 4, 7, 1)
    batch = padded(lengths)
    projection = gf.kronecker_projection(model_fn, params, batch, rank=16, min_rank=2, kind=kind, include=include)
    rows = gf.ghost_grad_proj(model_fn, params, batch, projection)
    query = gf.ghost_grad_proj(model_fn, params, padded((6,)), projection)[0]

    found = token_scores(model_fn, params, batch, projection, query)

    assert found.tokens.shape == (4, 9)
    assert found.untokened == () and not found.elsewhere.any()
    assert_adds_up(found, rows, query)
    for tokens, length in zip(found.tokens, lengths, strict=True):
        assert not tokens[length:].any()  # padding has no share
    assert found.tokens[:3].abs().sum(1).min() > 0
    assert not found.tokens[3].any()  # one token predicts nothing


def test_a_passage_has_the_shares_that_it_has_alone():
    model_fn, params = gpt2()
    batch = padded((9, 4))
    projection = gf.kronecker_projection(model_fn, params, batch, rank=16, min_rank=2)
    query = torch.randn(projection.dim, dtype=torch.float64)
    together = token_scores(model_fn, params, batch, projection, query).tokens[1, :4]
    alone = token_scores(model_fn, params, {"input_ids": batch["input_ids"][1:, :4]}, projection, query).tokens[0]
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)


def test_a_token_has_the_share_of_its_own_terms():
    """Of a linear layer the term of a token is its activation times its grad-output, by hand."""
    torch.manual_seed(1)
    embed, head = nn.Embedding(20, 6).double(), nn.Linear(6, 20, bias=False).double()
    model_fn, params = gf.functionalize(nn.Sequential(embed, head), gf.causal_lm_loss, call=lambda m, ids: m(ids))
    ids = torch.randint(20, (2, 5))
    projection = gf.kronecker_projection(model_fn, params, ids, layers="1", rank=12, min_rank=2)
    query = torch.randn(projection.dim, dtype=torch.float64)
    hidden = embed(ids).detach()
    logits = (hidden @ head.weight.detach().t()).requires_grad_()
    nn.functional.cross_entropy(logits[:, :-1].reshape(8, 20), ids[:, 1:].reshape(8)).backward()
    direction = projection.adjoint(query)["1.weight"]  # [out, in]
    by_hand = torch.einsum("bro,oi,bri->br", logits.grad * 2, direction, hidden)  # a mean over 2 x 4 became one over 4
    torch.testing.assert_close(token_scores(model_fn, params, ids, projection, query).tokens, by_hand)


class Pooled(nn.Module):
    """A model whose head and gain see a mean over tokens, so that neither has tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.inner = nn.Linear(8, 8)
        self.gain = nn.Parameter(torch.randn(8))
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids):
        return self.head(torch.tanh(self.inner(self.embedding(input_ids))).mean(1) * self.gain)


def test_parameters_without_tokens_are_left_out_and_named():
    model_fn, params = gf.functionalize(Pooled().double(), gf.classification_loss)
    batch = {"input_ids": torch.randint(20, (3, 7)), "labels": torch.tensor([0, 1, 2])}
    projection = gf.kronecker_projection(
        model_fn, params, batch, rank=16, min_rank=2, include=("embedding", "norm", "head", "bias")
    )
    rows = gf.ghost_grad_proj(model_fn, params, batch, projection)
    found = token_scores(model_fn, params, batch, projection, rows[1])
    assert set(found.untokened) == {"gain", "head.weight", "head.bias"}
    assert_adds_up(found, rows, rows[1])
    left_out = [projection.slices[name] for name in found.untokened]
    expected = sum(rows[:, columns] @ rows[1, columns] for columns in left_out)
    torch.testing.assert_close(found.elsewhere, expected)
    assert found.elsewhere.abs().min() > 0


def test_a_projection_of_parameters_without_tokens_alone():
    model_fn, params = gf.functionalize(Pooled().double(), gf.classification_loss)
    batch = {"input_ids": torch.randint(20, (3, 7)), "labels": torch.tensor([0, 1, 2])}
    projection = gf.kronecker_projection(model_fn, params, batch, layers="head", rank=16, min_rank=2)
    rows = gf.ghost_grad_proj(model_fn, params, batch, projection)
    found = token_scores(model_fn, params, batch, projection, rows[0])
    assert found.tokens.shape == (3, 7) and not found.tokens.any()
    assert_adds_up(found, rows, rows[0])


def test_a_query_of_another_projection_is_refused():
    model_fn, params = gpt2()
    batch = padded((5,))
    projection = gf.kronecker_projection(model_fn, params, batch, rank=16, min_rank=2)
    with pytest.raises(ValueError, match=rf"\(3,\).*\[{projection.dim}\]"):
        token_scores(model_fn, params, batch, projection, torch.zeros(3, dtype=torch.float64))
