"""Which tokens carry a score.

    score_i = <proj(g_i), q> = <g_i, adj(q)> = sum over tokens t of <g_it, adj(q)>

The gradient g_i of a sample is the sum of its tokens' own terms g_it (activation times grad-output at that
position), so that the score divides over them exactly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from ghostfunc._axes import positions_of
from ghostfunc._call import Params
from ghostfunc._errors import UnsupportedUse
from ghostfunc._functionalize import ModelFn
from ghostfunc._kronecker import KroneckerProjection
from ghostfunc._transforms import ghost_grad_along


class TokenScores(NamedTuple):
    """The inner products of projected gradients with a query, divided over tokens.

    Attributes:
        tokens: `[B, R]`, zero at padding.
        elsewhere: `[B]`, the share of the parameters in `untokened`.
        untokened: the parameters that are not used token by token, so that no token has their share.
    """

    tokens: Tensor
    elsewhere: Tensor
    untokened: tuple[str, ...]


def token_scores(
    model_fn: ModelFn, params: Params, batch: Any, projection: KroneckerProjection, query: Float[Tensor, " k"]
) -> TokenScores:
    """Divide `ghost_grad_proj(model_fn, params, batch, projection) @ query` over the tokens of each sample.

    It costs a forward and a backward of the batch; no per-sample gradient is made.

    Args:
        model_fn: `model_fn(params, batch) -> losses[B]`.
        params: parameters by name.
        batch: a pytree of tensors `[B, R, ...]`.
        projection: of `kronecker_projection`.
        query: `[projection.dim]`, a projected gradient, or what a preconditioner made of it.

    Returns:
        `TokenScores(tokens[B, R], elsewhere[B], untokened)`: `tokens.sum(1) + elsewhere` is the inner product. The
        share of a token is what its position adds to the gradient of the whole sample's loss.

    Raises:
        ValueError: if the query has another dimension, or the batch no positions.
        UnsupportedUse: as in `ghost_grad_dot`.
        InteractingSamples: as in `ghost_grad_dot`.

    Example:
        >>> import torch, ghostfunc as gf
        >>> from ghostfunc.report import token_scores
        >>> model = torch.nn.Sequential(torch.nn.Embedding(20, 8), torch.nn.Linear(8, 20))
        >>> model_fn, params = gf.functionalize(model, gf.causal_lm_loss, call=lambda module, ids: module(ids))
        >>> batch = torch.randint(20, (3, 7))
        >>> projection = gf.kronecker_projection(model_fn, params, batch, rank=16, include=("head",))
        >>> rows = gf.ghost_grad_proj(model_fn, params, batch, projection)
        >>> scores = token_scores(model_fn, params, batch, projection, rows[0])
        >>> torch.allclose(scores.tokens.sum(1) + scores.elsewhere, rows @ rows[0], atol=1e-5)
        True
    """
    if query.shape != (projection.dim,):
        raise ValueError(f"query has shape {tuple(query.shape)}; the projection makes rows of [{projection.dim}].")
    direction = projection.adjoint(query)
    tokened, tokens = list(direction), None
    while tokened and tokens is None:
        try:
            tokens = ghost_grad_along(model_fn, params, batch, direction, out="sample token", layers=tokened)
        except UnsupportedUse as error:
            left = [name for name in tokened if name not in error.parameters]
            if len(left) == len(tokened):
                raise
            tokened = left
    untokened = tuple(name for name in direction if name not in tokened)
    if tokens is None:
        elsewhere = ghost_grad_along(model_fn, params, batch, direction, layers=untokened)
        return TokenScores(elsewhere.new_zeros(len(elsewhere), positions_of(batch)), elsewhere, untokened)
    if untokened:
        elsewhere = ghost_grad_along(model_fn, params, batch, direction, layers=untokened)
    else:
        elsewhere = tokens.new_zeros(len(tokens))
    return TokenScores(tokens, elsewhere, untokened)
