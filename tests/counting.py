"""What a computation does: products in FLOPs, everything else in entries; an operator that it does not know raises.

`FlopCounterMode` passes over what has no formula: `addmm_`, `mv`, `dot`, a CPU's fused attention, custom operators.
Here an operator has a formula, or is known to multiply no matrices, or stops the count. Contractions that are written
as an elementwise product and a sum are no FLOPs of a product. They show in the entries: in their number, in the
largest operations, and in products that have more entries than what they multiply.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


# --- products ---------------------------------------------------------------------------------------------------------


def _of_matrices(a: Any, b: Any, **_: Any) -> int:
    """`[..., i, j] @ [..., j, k]`, or `[..., i, j] @ [j]`, or `[j] @ [j]`."""
    return 2 * prod(a) * (b[-1] if len(b) > 1 else 1)


def _added(total: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
    return _of_matrices(a, b)


def _added_outer(total: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * a[0] * b[0]


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def _convolution_backward(
    g: Any, x: Any, w: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: Any,
    output_padding: Any, groups: Any, mask: Any, **_: Any,
) -> int:  # fmt: skip
    """As many products for each of the two as the forward: torch's formula has groups meet in the weight's."""
    return (mask[0] + mask[1]) * conv_flop_count(list(x), list(w), list(g), transposed)


FORMULAS: dict[Any, Callable[..., int]] = {
    **dict.fromkeys((aten.mv, aten.dot, aten.vdot), _of_matrices),
    **dict.fromkeys((aten.addmm_, aten.baddbmm_, aten.addbmm, aten.addbmm_, aten.addmv, aten.addmv_), _added),
    **dict.fromkeys((aten.addr, aten.addr_), _added_outer),
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten.convolution_backward: _convolution_backward,
}


# --- everything else --------------------------------------------------------------------------------------------------

_NOTHING = """
    alias detach empty empty_like empty_strided new_empty new_empty_strided lift_fresh _unsafe_view _reshape_alias
    set_ resize_ unsqueeze_ squeeze_ t_ transpose_ as_strided_ is_same_size
    _local_scalar_dense item record_stream _assert_async is_pinned
"""
_WRITES = """
    zeros zeros_like new_zeros zero_ ones ones_like new_ones full full_like new_full fill fill_ arange scalar_tensor eye
    copy_ copy _to_copy clone contiguous cat stack constant_pad_nd flip roll repeat repeat_interleave tril triu
    randn rand randint normal_ uniform_ bernoulli bernoulli_ exponential_ randperm native_dropout
    native_dropout_backward index index_select gather embedding take masked_select nonzero diag_embed
"""  # of a look-up: the result, not the table
_SCATTERS = """
    index_add index_add_ index_put index_put_ _index_put_impl_ _unsafe_index_put scatter scatter_ scatter_add
    scatter_add_ index_copy index_copy_ select_backward slice_backward embedding_dense_backward masked_scatter
    masked_scatter_ slice_scatter select_scatter
"""
_READS = """
    native_layer_norm native_layer_norm_backward native_group_norm native_group_norm_backward native_batch_norm
    native_batch_norm_backward cudnn_batch_norm _fused_rms_norm _fused_rms_norm_backward _softmax
    _softmax_backward_data _safe_softmax _log_softmax _log_softmax_backward_data nll_loss_forward nll_loss_backward
    nll_loss2d_forward nll_loss2d_backward cumsum cumprod sort topk argsort searchsorted _unique2 unique_dim bincount
    logsumexp max min median max_pool2d_with_indices max_pool2d_with_indices_backward avg_pool2d avg_pool2d_backward
    _adaptive_avg_pool2d _adaptive_avg_pool2d_backward mean linalg_vector_norm norm isin unfold_backward
    floor_divide equal _foreach_norm
"""
_KNOWN = {
    name: kind
    for kind, names in {"nothing": _NOTHING, "writes": _WRITES, "scatters": _SCATTERS, "reads": _READS}.items()
    for name in names.split()
}


def distinct(t: Tensor) -> int:
    """The entries of a tensor that are not repetitions of one another by `expand`."""
    return prod(size for size, stride in zip(t.shape, t.stride(), strict=True) if stride)


class Entries(NamedTuple):
    """What one operation passed over.

    Attributes:
        op: its name.
        count: entries of the result, for a reduction of what it reduces, for scattering of what is put.
        grew: whether an elementwise operation's result has more entries than each of its operands has.
    """

    op: str
    count: int
    grew: bool


class Product(NamedTuple):
    """One product of matrices.

    Attributes:
        op: its name.
        flops: by its formula.
        written: entries of its result.
    """

    op: str
    flops: int
    written: int


class Counted(TorchDispatchMode):
    """Counts what runs within it, on the CPU or a GPU, eager.

    Attributes:
        products: every operation with a formula, in the order in which they ran.
        passes: every other operation that touched an entry, in the order in which they ran.
        bodies: whether a custom operator is counted by its Python body instead of by its formula.
        apart: names of operators that are left out, such as decompositions, which have no count of products.
    """

    def __init__(self, *, bodies: bool = False, apart: Sequence[str] = ()) -> None:
        super().__init__()
        self.products: list[Product] = []
        self.passes: list[Entries] = []
        self.bodies, self.apart = bodies, apart
        self._formulas = FlopCounterMode(display=False, custom_mapping=FORMULAS).flop_registry

    @property
    def total_flops(self) -> int:
        """FLOPs of all products."""
        return sum(product.flops for product in self.products)

    @property
    def entries(self) -> int:
        """Entries that all other operations passed over."""
        return sum(entries.count for entries in self.passes)

    def by_op(self, *, grew: bool = False) -> Counter[str]:
        """Entries by operator; with `grew`, only those of results that outgrew their operands."""
        found: Counter[str] = Counter()
        for op, count, has_grown in self.passes:
            if has_grown or not grew:
                found[op] += count
        return found

    def largest(self, *, grew: bool = False) -> Entries:
        """The operation that passed over most entries; with `grew`, of those whose result outgrew the operands."""
        found = [entries for entries in self.passes if entries.grew or not grew]
        return max(found, key=lambda entries: entries.count, default=Entries("none", 0, grew))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if self.bodies and func.namespace == "ghostfunc":
            with self:
                return body_of(func.name())(*args, **kwargs)
        if packet not in self._formulas:
            with self:  # as under inference mode, where composite operators arrive whole
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        name = packet.__name__
        if packet in self._formulas:
            written = sum(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))
            self.products.append(Product(name, self._formulas[packet](*args, **kwargs, out_val=out), written))
        elif name not in self.apart:
            self._pass(func, name, args, kwargs, out)
        return out

    def _pass(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        results, operands = ([t for t in tree_leaves(tree) if isinstance(t, Tensor)] for tree in (out, (args, kwargs)))
        kind, grew = "nothing" if func.is_view else _KNOWN.get(name, ""), False
        if not kind and torch.Tag.pointwise in func.tags:
            kind = "writes"
            grew = len(operands) > 1 and results[0].numel() > max(distinct(t) for t in operands)
        elif not kind and (torch.Tag.reduction in func.tags or func.namespace == "ghostfunc"):
            kind = "reads"
        elif not kind:
            raise NotImplementedError(
                f"tests/counting.py does not know {func} {[tuple(t.shape) for t in operands]}: give it a formula if it "
                "multiplies matrices, else put its name into one of the lists."
            )
        passed = {"nothing": [], "writes": results, "scatters": operands[1:] or operands, "reads": operands + results}
        count = max((t.numel() for t in passed[kind]), default=0)
        if count:
            self.passes.append(Entries(name, count, grew))


class Allocated(TorchDispatchMode):
    """What operations allocate.

    Attributes:
        largest: bytes of the largest tensor that was made.
        peak: bytes of all tensors made within that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.peak = 0
        self._alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {StorageWeakRef(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                storage = StorageWeakRef(t.untyped_storage())
                if storage in given or storage in self._alive:
                    continue
                self._alive[storage] = t.untyped_storage().nbytes()
                self.largest = max(self.largest, self._alive[storage])
        self._alive = {storage: size for storage, size in self._alive.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self._alive.values()))
        return out


def counted(run: Callable[[], Any], *, bodies: bool = False, apart: Sequence[str] = ()) -> Counted:
    """Run something and count it."""
    with Counted(bodies=bodies, apart=apart) as found:
        run()
    return found


def flops(run: Callable[[], Any], *, apart: Sequence[str] = ()) -> int:
    """FLOPs of the products of a run."""
    return counted(run, apart=apart).total_flops


def custom_operators() -> dict[str, Callable[..., Any]]:
    """The Python bodies of the package's operators, by name: `ghostfunc::name`."""
    return {name: definition._init_fn for name, definition in OPDEFS.items() if name.startswith("ghostfunc::")}


def body_of(operator: str) -> Callable[..., Any]:
    """The Python body of one of the package's operators."""
    return custom_operators()[operator.removesuffix(".default")]


def plain_step(model_fn: Callable[..., Tensor], params: dict[str, Tensor], batch: Any) -> None:
    """Forward and backward of the mean loss."""
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    torch.autograd.grad(model_fn(leaves, batch).mean(), list(leaves.values()), allow_unused=True)
