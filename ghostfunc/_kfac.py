"""K-FAC and EK-FAC preconditioners: factors of runs over a data loader, summed to Fisher blocks of each parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ghostfunc._batch import batch_size, plain
from ghostfunc._call import Call, Layers, checked
from ghostfunc._fisher import FisherPreconditioner, damped
from ghostfunc._fisher_ranks import diagonalise, sum_moments, sum_squares
from ghostfunc._functionalize import ModelFn
from ghostfunc._moments import Matrix, Rows
from ghostfunc._parameter_fisher import ParameterFisher
from ghostfunc._ranks import Group
from ghostfunc._run_result import Run
from ghostfunc._sharded import is_sharded


def kfac(
    model_fn: ModelFn,
    params: Mapping[str, Tensor],
    batches: Iterable[Any],
    *,
    damping: float = 0.1,
    relative: bool = True,
    max_side: int = 4096,
    dtype: torch.dtype | None = None,
    layers: Layers = "",
    has_aux: bool = False,
    on_unsupported: str = "raise",
    randomness: str = "different",
    group: Group | None = None,
) -> FisherPreconditioner:
    """A K-FAC preconditioner: (F + lambda I)^-1 with Kronecker-factored blocks of the empirical Fisher matrix.

    F = mean_i grad l_i grad l_i^T, the Fisher matrix of the per-sample losses (l_i as `model_fn` returns it, a mean
    over tokens where it is one), taken block by block. A weight `[d_out, d_in]` of linear maps, whose gradient in
    sample i is sum_r g_r a_r^T over its positions r, has (Martens and Grosse, arXiv 1503.05671; several positions and
    uses: "K-FAC expand" of Eschenhagen et al., arXiv 2311.00636)

        F_w ~ G x A / (N M)        A = sum a_r a_r^T [d_in, d_in], G = sum g_r g_r^T [d_out, d_out]
        P V = U_G ((U_G^T V U_A) / (s_G s_A^T / (N M) + lambda)) U_A^T          G = U_G s_G U_G^T, A = U_A s_A U_A^T

    over N samples and M positions. "Expand" takes the positions' terms as independent of each other, because each
    token of a language model has a loss of its own; it is exact for one position and activations that are independent
    of the grad-outputs. `ekfac` corrects the eigenvalues where they are not. Dropout is off.

    Every parameter in play has a block, and `.how` and the repr say which:

    - weights of linear maps and convolutions (of their windows): as above. Uses of one kind count as more positions.
    - look-up tables: the same, a one-hot activation's moment being the diagonal of the counts.
    - weights that are looked up and multiplied (tied heads): the Kronecker product nearest to the sum of the two.
    - parts that are matrices of their own (experts, halves of a fused weight): a block each.
    - biases, norm scales, grouped convolutions, whatever else: the full matrix of per-sample gradients, which
      is exact.
    - a side, or a full matrix, that is longer than `max_side`: its diagonal (the vocabulary's side of a head).
    - parameters that the losses do not depend on: F = 0.

    Args:
        model_fn: `model_fn(params, batch) -> losses[B]`. For the true Fisher matrix, pass one whose losses are those
            of labels that it draws from its own logits: `(logits.detach() - noise.log()).argmax(-1)` with noise
            `torch.empty_like(logits).exponential_()` (`torch.multinomial` does too, at a forward for each sample).
        params: parameters by name.
        batches: batches, of any sizes; a DataLoader. Tensors are moved to the parameters' device. A batch's factors
            are in memory together: activations and grad-outputs of every layer.
        damping: positive. lambda = damping x the mean eigenvalue of the parameter's block, which has no
            unit; or damping itself, in squared entries of gradients.
        relative: which of the two. Relative, a parameter with F = 0 gets P V = 0 (its pseudo-inverse); absolute,
            V / lambda.
        max_side: the longest side whose second moment is built and diagonalised, `[max_side, max_side]`.
        dtype: of the sums and of the result, as in `ghost_grad_dot`.
        layers: as in `ghost_grad_dot`; the others are not in the result, so that a call about them needs the same.
        has_aux: `model_fn` returns `(losses, aux)`; aux is dropped.
        on_unsupported: as in `ghost_grad_dot`.
        randomness: as in `ghost_grad_dot`, for anything but dropout.
        group: the data-parallel process group, or a mesh: `batches` are this rank's, of any number, also none; sums
            are over all ranks' samples, each matrix is diagonalised by one rank, and every rank gets the same
            preconditioner. Ranks wait for the one with the most batches, which the group's timeout must allow.

    Returns:
        A `FisherPreconditioner` for `precondition=`; it can be saved.

    Raises:
        ValueError: for no batches, losses or gradients that are not finite, damping that is not positive, or layers
            that match nothing.
        UnsupportedUse: as in `ghost_grad_dot`, or if batches use a parameter in ways whose moments do not add up.
        InteractingSamples: as in `ghost_grad_dot`.
        NotImplementedError: for sharded parameters.

    Cost, of a linear map over n positions: 4 n d_in d_out + 2 n (d_in^2 + d_out^2) FLOPs for each batch, where a
    training step takes 6 n d_in d_out (1.3 steps for a square weight, 2.1 for 1:4, less for a head with one long side);
    then eigenvectors once, of each side, which takes longer than a few batches do. Counted on two layers of GPT-2 small
    with its tied head, 4 x 256 tokens: 1.02 training steps, and 2.37 for both passes of `ekfac`.

    Example:
        >>> import torch, ghostfunc as gf
        >>> model_fn, params = gf.functionalize(torch.nn.Linear(4, 3), gf.classification_loss)
        >>> train, val = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(2)]
        >>> preconditioner = gf.kfac(model_fn, params, [train], damping=0.1)
        >>> gf.ghost_grad_dot(model_fn, params, train, val, precondition=preconditioner).shape
        torch.Size([8])
    """
    return _fisher(
        "kfac",
        model_fn,
        params,
        batches,
        damping,
        relative,
        max_side,
        dtype=dtype,
        layers=layers,
        has_aux=has_aux,
        on_unsupported=on_unsupported,
        randomness=randomness,
        group=group,
    )


def ekfac(
    model_fn: ModelFn,
    params: Mapping[str, Tensor],
    batches: Iterable[Any],
    *,
    damping: float = 0.1,
    relative: bool = True,
    max_side: int = 4096,
    dtype: torch.dtype | None = None,
    layers: Layers = "",
    has_aux: bool = False,
    on_unsupported: str = "raise",
    randomness: str = "different",
    group: Group | None = None,
) -> FisherPreconditioner:
    """An EK-FAC preconditioner: K-FAC's eigenvectors with the exact second moments of per-sample gradients along them.

    P V = U_G ((U_G^T V U_A) / (S + lambda)) U_A^T with S = mean_i (U_G^T G_i U_A)^2, entry by entry, G_i the whole
    gradient of sample i over all positions and uses (George et al., arXiv 1806.03884). Of all matrices with these
    eigenvectors it is the nearest to the Fisher matrix in Frobenius' norm, and has its trace. S takes a second pass
    over the batches; per-sample gradients are made from the factors tile by tile, never `[B, d_out, d_in]`.

    Args:
        model_fn: as in `kfac`.
        params: as in `kfac`.
        batches: as in `kfac`; they are gone through twice, so that an iterator will not do.
        damping: as in `kfac`; the mean eigenvalue is that of S.
        relative: as in `kfac`.
        max_side: as in `kfac`.
        dtype: as in `kfac`.
        layers: as in `kfac`.
        has_aux: as in `kfac`.
        on_unsupported: as in `kfac`.
        randomness: as in `kfac`.
        group: as in `kfac`.

    Returns:
        A `FisherPreconditioner`, whose blocks are those of `kfac` with other eigenvalues.

    Raises:
        TypeError: if `batches` is an iterator.
        ValueError: as in `kfac`.
        UnsupportedUse: as in `kfac`.
        InteractingSamples: as in `kfac`.
        NotImplementedError: as in `kfac`.

    Cost beside `kfac`: the second pass takes 6 n d_in d_out + 2 n (d_in^2 + d_out^2) FLOPs for a linear map, 1.7 steps
    for a square weight.

    Example:
        >>> import torch, ghostfunc as gf
        >>> model_fn, params = gf.functionalize(torch.nn.Linear(4, 3), gf.classification_loss)
        >>> batches = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(2)]
        >>> preconditioner = gf.ekfac(model_fn, params, batches)
        >>> preconditioner(params)["weight"].shape
        torch.Size([3, 4])
    """
    return _fisher(
        "ekfac",
        model_fn,
        params,
        batches,
        damping,
        relative,
        max_side,
        dtype=dtype,
        layers=layers,
        has_aux=has_aux,
        on_unsupported=on_unsupported,
        randomness=randomness,
        group=group,
    )


def _fisher(
    kind: str,
    model_fn: ModelFn,
    params: Mapping[str, Tensor],
    batches: Iterable[Any],
    damping: float,
    relative: bool,
    max_side: int,
    **options: Any,
) -> FisherPreconditioner:
    call = checked(model_fn, params, **options)
    if sharded := [name for name, p in call.params.items() if is_sharded(p)]:
        raise NotImplementedError(
            f"{kind}: {sharded[0]} is sharded, and Kronecker factors and their eigenvectors are of whole weights. Fit "
            "it on unsharded parameters, or use another precondition (gf.diagonal)."
        )
    if not 0 < damping < math.inf:
        raise ValueError(
            f"damping={damping!r}: expected a positive finite number, or directions without curvature blow up."
        )
    if max_side < 1:
        raise ValueError(f"max_side={max_side!r}: expected a side of 1 or more.")
    with call.together():
        _check_batches(kind, batches)
    if not call.names:
        raise ValueError(f"layers: no parameter matches; the parameters are {', '.join(call.params)}.")
    parameters = [
        ParameterFisher(name, tuple(p.shape), max_side) for name, p in call.params.items() if name in call.names
    ]

    samples = _pass(call, batches, parameters, Matrix.add, grow=True)
    if not samples:
        raise ValueError("batches is empty: the Fisher matrix is a mean over at least one sample.")
    if call.ranks is not None:
        sum_moments(call.ranks, parameters, call.dtype, call.device)
    for parameter in parameters:
        for matrix in parameter.matrices:
            if not matrix.is_finite():
                raise ValueError(
                    f"{parameter.name} {parameter.shape}: the second moments of its gradients over `batches` are not "
                    "finite, though the losses are. Look at operations with an infinite derivative (sqrt at 0, norms "
                    "of 0), or use dtype=torch.float64 if they overflow."
                )
    matrices = [matrix for parameter in parameters for matrix in parameter.matrices]
    if call.ranks is None:
        for matrix in matrices:
            matrix.diagonalise(samples)
    else:
        diagonalise(call.ranks, matrices, samples)
    if kind == "ekfac":
        again = _pass(call, batches, parameters, Matrix.add_squares, grow=False)
        if not again:
            raise ValueError("batches: the second pass gave no batch; ekfac goes through them twice.")
        if call.ranks is not None:
            sum_squares(call.ranks, matrices)
        for matrix in matrices:
            matrix.correct(again)
    return FisherPreconditioner(
        kind,
        {p.name: damped(p.blocks(call.dtype, call.device), p.numel, damping, relative=relative) for p in parameters},
        {p.name: p.shape for p in parameters},
        {p.name: p.how() for p in parameters},
        left_out=tuple(name for name in call.params if name not in call.names),
        samples=samples,
        damping=damping,
        relative=relative,
    )


def _check_batches(kind: str, batches: Iterable[Any]) -> None:
    if isinstance(batches, (Tensor, Mapping)):
        raise TypeError(f"batches is one batch, a {type(batches).__name__}; expected an iterable of batches: [batch].")
    if kind == "ekfac" and isinstance(batches, Iterator):
        raise TypeError(
            "batches is an iterator, which ends after one pass; ekfac needs two: pass a list or a DataLoader."
        )


def _pass(
    call: Call,
    batches: Iterable[Any],
    parameters: list[ParameterFisher],
    add: Callable[[Matrix, list[Rows]], None],
    *,
    grow: bool,
) -> int:
    """Let `add` add each batch's factors to their matrices: the number of samples, of all ranks."""
    samples = 0
    with call.together():
        for result in _runs(call, batches):
            samples += len(result.losses)
            with torch.no_grad(), torch.autocast(call.device.type, enabled=False):
                _add_all(result, parameters, add, grow)
            del result  # before the next batch's factors come
    return call.over_ranks(samples)


def _add_all(
    result: Run, parameters: list[ParameterFisher], add: Callable[[Matrix, list[Rows]], None], grow: bool
) -> None:
    for parameter in parameters:
        for matrix, factors in parameter.uses(result, grow=grow):
            add(matrix, factors)


def _runs(call: Call, batches: Iterable[Any]) -> Iterator[Run]:
    for number, batch in enumerate(batches):
        what = f"batches[{number}]"
        batch = pytree.tree_map_only(Tensor, lambda t: t.to(call.device), plain(batch))
        samples = batch_size(batch, what)
        yield call.run(batch, samples, train=samples, factors=call.names, dropout=False, batches=((what, samples),))
