"""A linear map and the cross-entropy of its results as one operation, without the logits of all positions.

    l_r = lse_r - z[r, y_r],    z_r = W h_r + b,    lse_r = log sum_v exp z[r, v]
    dl_r / dz[r, v] = exp(z[r, v] - lse_r) - [v = y_r]

The forward walks over blocks of the weight's rows, with a running logsumexp, and keeps lse `[N]`. The backward computes
the logits of a block again, and all that it owes to them, before it goes to the next one. So a step has 4 products
(logits, logits again, gradient of h, gradient of W) where one with logits has 3, and memory is that of a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import handle_torch_function, has_torch_function

from ghostfunc._nesting import functorch_level, recorded
from ghostfunc._operations import as_autocast

_BLOCK_BYTES = {"cpu": 16 << 20}  # logits of a block: what stays in a cache; elsewhere:
_BLOCK_BYTES_ELSEWHERE = 256 << 20
_ROWS = 256  # of the weight in a block, below which products lose speed


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Cross-entropy of the logits `hidden @ weight.T + bias`, which are never there all at once.

    The numbers are those of `F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="none")`, in
    plain autograd and in every transform of ghostfunc. Memory is that of the logits of one block of the vocabulary,
    16 MB on a CPU, and the time is that of one more product: the backward computes the logits again. Inside functorch
    transforms and `torch.compile`, and where the backward is itself differentiated, all logits are computed at once.

    Args:
        hidden: `[..., d]`, what the head maps to logits.
        weight: `[V, d]`, the head's.
        targets: `[...]`, integers from 0 to V - 1, or `ignore_index`.
        bias: `[V]`.
        ignore_index: the target of positions that are left out.
        softcap: c, where the logits are c * tanh(logits / c), as in Gemma 2.
        chunk: how many rows of the weight make a block; by default what fits 16 MB (256 MB on an accelerator).

    Returns:
        `[...]`, a loss for each position, 0 with gradient 0 where its target is `ignore_index`. float64 for float64,
        else float32; products are in the dtype of `hidden`, or autocast's.

    Raises:
        ValueError: for shapes that do not fit, or a chunk below 1.
        IndexError: for a target outside of the vocabulary.

    Example:
        >>> import torch, ghostfunc as gf
        >>> hidden, weight, targets = torch.randn(2, 5, 4), torch.zeros(8, 4), torch.randint(8, (2, 5))
        >>> gf.linear_cross_entropy(hidden, weight, targets).shape
        torch.Size([2, 5])
        >>> gf.linear_cross_entropy(hidden, weight, targets)[0, 0].round(decimals=4)
        tensor(2.0794)
    """
    if (
        weight.dim() != 2
        or hidden.dim() < 1
        or hidden.shape[-1] != weight.shape[1]
        or hidden.shape[:-1] != targets.shape
    ):
        raise ValueError(
            f"linear_cross_entropy: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets "
            f"{tuple(targets.shape)} do not fit; expected [..., d], [V, d] and [...]."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: a bias of shape {tuple(bias.shape)} does not fit a weight {tuple(weight.shape)}; "
            f"expected [{weight.shape[0]}]."
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk!r}: expected how many rows of the weight make a block, 1 or more.")
    return token_losses(hidden, weight, targets, bias, ignore_index, softcap, chunk).squeeze(-1)


def token_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    chunk: int | None,
) -> Tensor:
    """The losses as `[..., 1]`, rows of one entry: the operation that the interpreter sees."""
    tensors = (hidden, weight, targets, bias)
    if has_torch_function(tensors):
        return handle_torch_function(token_losses, tensors, hidden, weight, targets, bias, ignore_index, softcap, chunk)
    if functorch_level() is not None or recorded(hidden) or torch.compiler.is_compiling():
        return at_once(hidden, weight, targets, bias, ignore_index, softcap)
    check_targets(targets, len(weight), ignore_index)
    return _InBlocks.apply(as_autocast(hidden), weight, bias, targets, ignore_index, softcap, chunk)[0]  # type: ignore[index]


def at_once(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, ignore_index: int, softcap: float | None
) -> Tensor:
    """The same from all logits, in operations that any transform knows."""
    logits = F.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=ignore_index, reduction="none")
    return losses.view(targets.shape).unsqueeze(-1)


def check_targets(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raise where a target is no row of the weight."""
    bad = targets[(targets != ignore_index) & ((targets < 0) | (targets >= vocabulary))]
    if bad.numel():
        raise IndexError(
            f"linear_cross_entropy: target {bad[0].item()} is outside of the vocabulary, 0 to {vocabulary - 1}, and is "
            f"not ignore_index={ignore_index}."
        )


# ---------------------------------------------------------------- blocks


def accumulation_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of losses, probabilities and sums."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def rows_at_a_time(hidden: Tensor, vocabulary: int, chunk: int | None) -> int:
    """How many rows of the weight make a block."""
    if chunk is None:
        row = max(1, hidden[..., 0].numel()) * accumulation_dtype(hidden).itemsize
        chunk = max(_ROWS, _BLOCK_BYTES.get(hidden.device.type, _BLOCK_BYTES_ELSEWHERE) // row)
    return max(1, min(chunk, vocabulary))


def blocks(vocabulary: int, rows: int, first: int = 0) -> Iterator[tuple[int, int]]:
    """`(start, stop)` of each block."""
    return ((start, min(start + rows, vocabulary)) for start in range(first, vocabulary, rows))


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """Logits `[..., t]` of some rows of the weight, in the dtype of accumulation; memory of their own."""
    bias = None if bias is None else bias.to(hidden.dtype)
    logits = F.linear(hidden, weight.to(hidden.dtype), bias).to(accumulation_dtype(hidden))
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def cotangents_(
    logits: Tensor, lse: Tensor, token: Tensor, targets: Tensor, rows: int | Tensor, softcap: float | None
) -> Tensor:
    """Logits overwritten by their cotangents, (exp(z - lse) - [v = y]) token: `[..., t]`.

    Args:
        logits: `[..., t]`.
        lse: `[..., 1]`.
        token: `[..., 1]`, the cotangent of each loss, 0 where the target is ignored.
        targets: `[...]`.
        rows: which rows of the weight the logits are of: the first of a block, or each of them, to broadcast.
        softcap: as in `linear_cross_entropy`.

    Returns:
        The memory of `logits`.
    """
    slope = None if softcap is None else 1 - (logits / softcap).square_()
    g, wanted = logits.sub_(lse).exp_(), targets.unsqueeze(-1)
    if isinstance(rows, int):
        place, last = wanted - rows, logits.shape[-1] - 1
        g.scatter_add_(-1, place.clamp(0, last), ((place < 0) | (place > last)).to(g.dtype).sub_(1))
    else:
        g.sub_((wanted == rows).to(g.dtype))
    g.mul_(token)
    return g if slope is None else g.mul_(slope)


def losses_in_blocks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    rows: int,
) -> tuple[Tensor, Tensor]:
    """`(losses [..., 1], lse [..., 1])`, without a graph."""
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        lse = hidden.new_full((*targets.shape, 1), -torch.inf, dtype=accumulation_dtype(hidden))
        at_target = torch.zeros_like(lse)
        wanted = targets.unsqueeze(-1)
        for start, stop in blocks(len(weight), rows):
            logits = logits_of(hidden, weight[start:stop], None if bias is None else bias[start:stop], softcap)
            own = logits.gather(-1, (wanted - start).clamp(0, stop - start - 1))
            at_target = torch.where((wanted >= start) & (wanted < stop), own, at_target)
            lse = torch.logaddexp(lse, logits.logsumexp(-1, keepdim=True))
        return (lse - at_target).masked_fill(wanted == ignore_index, 0), lse


# ---------------------------------------------------------------- plain autograd


class _InBlocks(Function):
    """The operation in plain autograd: `(losses [..., 1], lse [..., 1])`."""

    @staticmethod
    def forward(hidden, weight, bias, targets, ignore_index, softcap, chunk):
        rows = rows_at_a_time(hidden, len(weight), chunk)
        return losses_in_blocks(hidden, weight, targets, bias, ignore_index, softcap, rows)

    @staticmethod
    def setup_context(ctx, inputs, output):
        hidden, weight, bias, targets, *ctx.options = inputs
        ctx.save_for_backward(hidden, weight, bias, targets, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, grad, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        ignore_index, softcap, chunk = ctx.options
        with torch.autocast(hidden.device.type, enabled=False):
            if torch.is_grad_enabled():  # the backward is differentiated
                found = _differentiable_backward(grad, hidden, weight, bias, targets, ignore_index, softcap)
            else:
                token = grad.masked_fill(targets.unsqueeze(-1) == ignore_index, 0)
                rows = rows_at_a_time(hidden, len(weight), chunk)
                wanted = ctx.needs_input_grad[:3]
                found = _backward_in_blocks(token, hidden, weight, bias, targets, lse, softcap, rows, wanted)
        return *found, None, None, None, None


def _backward_in_blocks(
    token: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    softcap: float | None,
    rows: int,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of hidden, weight and bias that are wanted."""
    x = hidden.flatten(0, -2)  # [N, d]
    of_hidden = x.new_zeros(x.shape, dtype=lse.dtype) if wanted[0] else None
    of_weight = torch.empty_like(weight) if wanted[1] else None
    of_bias = torch.empty_like(bias) if wanted[2] and bias is not None else None
    for start, stop in blocks(len(weight), rows):
        some = weight[start:stop]
        logits = logits_of(hidden, some, None if bias is None else bias[start:stop], softcap)
        g = cotangents_(logits, lse, token, targets, start, softcap).flatten(0, -2)  # [N, t]
        if of_bias is not None:
            torch.sum(g, 0, out=of_bias[start:stop]) if of_bias.dtype == g.dtype else of_bias[start:stop].copy_(
                g.sum(0)
            )
        g = g.to(x.dtype)
        if of_hidden is not None:
            add_product_(of_hidden, g, some.to(x.dtype))
        if of_weight is not None:
            of_weight[start:stop] = g.t() @ x
    return None if of_hidden is None else of_hidden.view(hidden.shape).to(hidden.dtype), of_weight, of_bias


def add_product_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a product to a matrix, in the matrix's dtype."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out)
    else:
        out += a @ b


def _differentiable_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients as functions of everything that they depend on, from all logits at once."""
    w = weight.to(hidden.dtype)
    logits = F.linear(hidden, w, None if bias is None else bias.to(hidden.dtype)).to(grad.dtype)
    capped = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    read = (targets != ignore_index).unsqueeze(-1)
    one_hot = F.one_hot(targets.masked_fill(targets == ignore_index, 0), len(weight))
    g = (capped.softmax(-1) - one_hot) * grad * read
    g = (g if softcap is None else g * (1 - (capped / softcap).square())).flatten(0, -2)  # [N, V]
    low = g.to(hidden.dtype)
    of_hidden = (low @ w).view(hidden.shape)
    of_weight = (low.t() @ hidden.flatten(0, -2)).to(weight.dtype)
    return of_hidden, of_weight, None if bias is None else g.sum(0).to(bias.dtype)
