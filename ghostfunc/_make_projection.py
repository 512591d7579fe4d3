"""Making a projection: which parameters, their blocks and ranks, and matrices drawn at random or taken from data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ghostfunc._batch import plain
from ghostfunc._blocks import blocks_of
from ghostfunc._call import Layers, checked
from ghostfunc._functionalize import ModelFn
from ghostfunc._kronecker import KroneckerProjection, Part
from ghostfunc._principal import Sides, principal_matrices
from ghostfunc._projected_layers import blocks_of_all_ranks, chosen, kinds_of_all_ranks, uses_of
from ghostfunc._ranks import Group
from ghostfunc._sketches import KINDS, random_matrix, ranks

PCA = "pca"


def kronecker_projection(
    model_fn: ModelFn,
    params: Mapping[str, Tensor],
    batch: Any,
    *,
    layers: Layers = "",
    rank: int = 256,
    min_rank: int = 8,
    kind: str = "gaussian",
    seed: int = 0,
    include: Iterable[str] = (),
    batches: Iterable[Any] | None = None,
    has_aux: bool = False,
    on_unsupported: str = "raise",
    group: Group | None = None,
) -> KroneckerProjection:
    """A projection of per-sample gradients by two small matrices for each parameter, for `ghost_grad_proj`.

    A gradient `G[d_in, d_out]` becomes `P_in^T G P_out`, flattened row-major: k_in * k_out numbers whose inner products
    are those of the gradients in expectation. d_in is the side that meets the activation, whatever way the weight is
    stored:

    | parameter | blocks |
    |---|---|
    | linear map, `Conv1D`, `x @ w` | one, `[d_in, d_out]`; a tied weight as at its first use |
    | convolution | one for each group, `[C_in / groups * kernel, C_out / groups]` |
    | experts `[E, ...]` | one for each expert, all with the same two matrices |
    | embedding | one, `[rows, d]` |
    | bias, norm, any vector | one, `[d, 1]`, so that `P_out` is `[[1.]]` |
    | used only through others (weight norm) | one, of the weight as `nn.Linear` would store it |

    One forward and backward of `batch` shows how each parameter is used; nothing else of the batch enters.

    Args:
        model_fn: `model_fn(params, batch) -> losses[B]`.
        params: parameters by name.
        batch: a pytree of tensors `[B, ...]`.
        layers: comma-separated name parts, matched at dots. A part takes the weights of linear maps and convolutions
            that it matches; if there are none, the head's; else whatever it matches. Empty takes all linear maps and
            convolutions but the head. Or names, or a function of the name, which decide alone.
        rank: about how many numbers a block becomes: k_in * k_out, with k_in / k_out near sqrt(d_out / d_in). Layers
            too small for it keep fewer: `print(projection)` says which.
        min_rank: the least k_in and k_out, where the layer has as many.
        kind: "gaussian", "rademacher" (signs), "orthonormal" (orthogonal columns), "sparse" (one sign in a row) or
            "mask" (rows and columns picked at random), all scaled so that E[P P^T] is the identity. Or "pca": the
            leading eigenvectors of sum_b G_b G_b^T and sum_b G_b^T G_b over data, orthonormal and not scaled, so that
            an inner product is that of the parts of two gradients which lie in these directions. A side of more than
            16384 entries (a vocabulary) keeps those with the largest gradients.
        seed: with a parameter's name it decides the parameter's matrices: they are the same on every device, and
            whatever other parameters the projection has.
        include: any of "embedding", "norm" (scales and shifts of norms, other scales), "bias" and "head" (the linear
            map that runs last): adds every parameter of these kinds, whether `layers` matches it or not.
        batches: for "pca" the data, batches like `batch`; by default `batch` alone.
        has_aux: `model_fn` returns `(losses, aux)`.
        on_unsupported: as in `ghost_grad_dot`.
        group: the data-parallel process group, or a mesh: `batch` and `batches` are this rank's (`batches` of any
            number, also none), "pca" takes its matrices from all ranks' data, and every rank gets the same projection,
            of a parameter as the first rank uses it whose samples do.

    Returns:
        A projection: `.dim`, `.slices` (the columns of each parameter), `.matrices(name)`.

    Raises:
        ValueError: if a pattern matches nothing, nothing is chosen, or an option is unknown.
        UnsupportedUse: as in `ghost_grad_dot`.
        InteractingSamples: as in `ghost_grad_dot`.

    Example:
        >>> import torch, ghostfunc as gf
        >>> model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Tanh(), torch.nn.Linear(30, 3))
        >>> model_fn, params = gf.functionalize(model, gf.classification_loss)
        >>> batch = (torch.randn(5, 40), torch.tensor([0, 1, 2, 0, 1]))
        >>> projection = gf.kronecker_projection(model_fn, params, batch, rank=64, include=("bias", "head"))
        >>> projection.slices["0.weight"], [tuple(p.shape) for p in projection.matrices("0.weight")]
        (slice(0, 64, None), [(40, 8), (30, 8)])
    """
    if kind not in (*KINDS, PCA):
        raise ValueError(f"kind={kind!r}: expected {', '.join(map(repr, (*KINDS, PCA)))}.")
    if batches is not None and kind != PCA:
        raise ValueError(f"batches= is the data of kind='pca'; {kind!r} matrices are drawn at random.")
    if rank < 1 or min_rank < 1:
        raise ValueError(f"rank={rank}, min_rank={min_rank}: a projection keeps one number at least.")
    call = checked(model_fn, params, None, "", has_aux, on_unsupported, "different", group)
    with call.together():
        uses = uses_of(call, plain(batch))
    kinds = uses.kinds if call.ranks is None else kinds_of_all_ranks(call.ranks, uses)
    shapes = {name: tuple(call.params[name].shape) for name in chosen(kinds, layers, include)}
    blocks = {name: blocks_of(shape, uses.first.get(name)) for name, shape in shapes.items()}
    if call.ranks is not None:
        blocks = blocks_of_all_ranks(call.ranks, uses, blocks)
    sides = {name: Sides(shapes[name], of, *ranks(of.d_in, of.d_out, rank, min_rank)) for name, of in blocks.items()}
    if kind == PCA:
        matrices = principal_matrices(call, [batch] if batches is None else batches, sides, seed)
    else:
        matrices = {
            name: (
                random_matrix(kind, seed, name, "in", of.blocks.d_in, of.k_in),
                random_matrix(kind, seed, name, "out", of.blocks.d_out, of.k_out),
            )
            for name, of in sides.items()
        }
    parts = {}
    for name, of in sides.items():
        p_in, p_out = (matrix.to(call.device, call.dtype) for matrix in matrices[name])
        parts[name] = Part(of.shape, of.blocks, p_in, p_out, clipped=of.blocks.d_in * of.blocks.d_out < rank)
    return KroneckerProjection(parts, kind, seed, rank, min_rank)
