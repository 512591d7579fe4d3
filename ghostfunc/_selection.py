"""Which candidates to train on: the greedy rule of GREATS, usefulness minus redundancy.

A step on the samples S moves the parameters by -lr/k * sum_{j in S} g_j. Beside those, sample z adds to the fall of the
validation loss, in units of lr/k,

    u(z | S) = <g_z, grad L_val(theta after S)>  ~  <g_z, V> - lr/k * sum_{j in S} g_z^T H g_j

with V the validation gradient and H the validation loss's Hessian, taken for the identity by GREATS.
"""

import math

import torch
from jaxtyping import Int
from torch import Tensor


def greedy_select(dots: Tensor, gram: Tensor, k: int, *, lr: float) -> Int[Tensor, " k"]:
    """Choose k of n candidates to train on, one after the other, each the most useful beside those chosen before.

    Each choice is the sample z with the largest

        u(z | S) = dots[z] - lr/k * sum_{j in S} gram[z, j]

    among those not chosen yet: what z still does for the validation loss once the step on the samples S is made, in
    units of lr/k. (Wang et al., 2024, "GREATS: Online Selection of High-Quality Data for LLM Training in Every
    Iteration": the greedy rule with the Hessian approximated by the identity, for a step on the mean of k losses.)

    What is approximated: the validation gradient after the step on S is V - lr/k * H sum_{j in S} g_j (second order);
    H is the identity; z's own second-order term is left out; the step is one of plain gradient descent. The identity
    knows no curvature: where g_i^T H g_j itself is known, or H is better taken for c times the identity, pass that
    matrix, or c * gram, as `gram`. With lr = 0 or a `gram` of zeros these are the k largest dots.

    Args:
        dots: `[n]`, <g_i, V>, as `ghost_grad_dot(model_fn, params, candidates, val)` gives them; positive is helpful.
        gram: `[n, n]`, <g_i, g_j> among the candidates, on the same device.
        k: how many to choose, 1 to n. All k are chosen, even if some are harmful (u below 0).
        lr: the learning rate of the step on the mean of the chosen samples' losses.

    Returns:
        int64 `[k]`, the indices in the order of choice; of equals the lowest index comes first. The k of a smaller k
        need not be among them, since the step per sample is lr/k.

    Raises:
        TypeError: if `dots` or `gram` is not of a floating-point type.
        ValueError: for shapes, devices, k or lr that do not fit, numbers that are not finite (or so large that the sums
            would not be), or a matrix that is not symmetric.

    Cost: O(k n) beside the n² numbers of the matrix, and on a GPU the host waits once, for the checks.

    Example:
        >>> import torch, ghostfunc as gf
        >>> dots = torch.tensor([3.0, 2.9, 2.0])  # the second sample is nearly the first again
        >>> gram = torch.tensor([[4.0, 3.9, 0.0], [3.9, 4.0, 0.0], [0.0, 0.0, 1.0]])
        >>> gf.greedy_select(dots, gram, 2, lr=1.0)
        tensor([0, 2])
        >>> gf.greedy_select(dots, gram, 2, lr=0.1)
        tensor([0, 1])
    """
    dtype = _checked_dtype(dots, gram, k, lr)
    utility, redundancy = dots.detach().to(dtype), gram.detach().to(dtype) * (lr / k)  # [n], [n, n]
    chosen = []
    for _ in range(k):
        best = utility.argmax(0, keepdim=True)  # [1], of equals the first
        chosen.append(best)
        utility = (utility - redundancy.index_select(0, best).squeeze(0)).index_fill(0, best, -math.inf)
    return torch.cat(chosen)


def _checked_dtype(dots: Tensor, gram: Tensor, k: int, lr: float) -> torch.dtype:
    """The dtype to calculate in, if everything fits; on a GPU all numbers are checked by one transfer to the host."""
    for name, tensor in (("dots", dots), ("gram", gram)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}: expected a floating-point type.")
    n = dots.numel()
    if dots.shape != (n,) or gram.shape != (n, n):
        raise ValueError(
            f"dots has shape {tuple(dots.shape)} and gram {tuple(gram.shape)}: expected [n], and [n, n], the inner "
            "products of the n candidates' gradients among each other."
        )
    if gram.device != dots.device:
        raise ValueError(f"dots is on {dots.device}, gram on {gram.device}: move one to the other's device.")
    if k not in range(1, n + 1):
        raise ValueError(f"k={k}: expected a number of samples from 1 to the number of candidates, {n}.")
    if not 0 <= lr < math.inf:
        raise ValueError(f"lr={lr}: expected a learning rate, finite and not negative.")
    dtype = torch.promote_types(torch.promote_types(dots.dtype, gram.dtype), torch.float32)
    entry = gram.detach().abs().amax().to(dtype)
    asymmetry = (gram - gram.t()).detach().abs().amax().to(dtype)
    utility = dots.detach().abs().amax().to(dtype) + lr * entry  # none that arises is larger
    utility, entry, asymmetry = torch.stack([utility, entry, asymmetry]).tolist()
    if not math.isfinite(utility):
        raise ValueError(
            "dots and lr * gram must be finite: leave out candidates whose gradient is not (or divide both by a common "
            "factor, if only their sums are too large)."
        )
    tolerance = math.sqrt(max(torch.finfo(gram.dtype).eps, torch.finfo(torch.float32).eps)) * entry
    if asymmetry > tolerance:
        raise ValueError(
            f"gram is not symmetric: gram[i, j] and gram[j, i] differ by up to {asymmetry:.3g}, where {tolerance:.3g} "
            "would be rounding. It must hold the candidates among each other, not against other samples."
        )
    return dtype
