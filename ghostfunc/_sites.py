"""Tracked tensors (parameters and what derives from them without the data) and sites, their uses with data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ghostfunc._contract import total
from ghostfunc._errors import UnsupportedUse
from ghostfunc._factors import Dense, Factor, Own
from ghostfunc._operations import op_name, tensors_in, with_leaves
from ghostfunc._parts import SELECTIONS, Part, part_of
from ghostfunc._randomness import RandomState
from ghostfunc._sample_axis import Lost, Partition, RowMap, SampleAxis, Samples
from ghostfunc._sharded import Shard

ISOMETRIES = frozenset(
    "t transpose swapaxes permute movedim view reshape flatten unflatten squeeze unsqueeze contiguous clone alias "
    "get_T get_mT view_as reshape_as".split()
)

MakeFactor = Callable[[Tensor, Partition], Factor]


@dataclass(eq=False)
class Derivation:
    """How a tensor came from tracked ones: result `index` of `func(*args, **kwargs)`, with `Tracked` in the arguments.

    Attributes:
        func: the operation.
        args: its positional arguments.
        kwargs: its keyword arguments.
        index: which of its results.
        out_of: of how many; 0 where it returns one tensor.
        randomness: the generators' states before it, where it drew random numbers.
    """

    func: Callable
    args: Any
    kwargs: Any
    index: int
    out_of: int
    randomness: RandomState | None = None

    def again(self, args: Any, kwargs: Any) -> Any:
        """The operation on other arguments, with the same random numbers."""
        if self.randomness is None:
            return self.func(*args, **kwargs)
        return self.randomness.replay(self.func, *args, **kwargs)


@dataclass(eq=False)
class Tracked:
    """A parameter, or a tensor derived from parameters without the data.

    Attributes:
        names: the parameters that it comes from.
        sentinel: what `model_fn` sees.
        real: what rules use: the leaf, or the derived tensor with its graph.
        derivation: None for a parameter.
        isometric: whether it is a parameter with its entries in another order.
        unseen: where an operation used the sentinel itself: how.
        stale: what made the values of a derived tensor others than these.
        sites: the uses with data.
        shard: for a sharded parameter: where its values are; `real` is then zeros that take no memory.
    """

    names: tuple[str, ...]
    sentinel: Tensor
    real: Tensor
    derivation: Derivation | None = None
    isometric: bool = True
    unseen: str = ""
    stale: str = ""
    sites: list[Site] = field(default_factory=list)
    shard: Shard | None = None

    @property
    def leaf(self) -> Tensor:
        """Of a parameter: what the backward differentiates with respect to."""
        return self.real if self.shard is None else self.shard.leaf

    @property
    def values(self) -> Tensor:
        """Its values; of a sharded parameter gathered, for one operation."""
        return self.real if self.shard is None else self.shard.values()

    def replay(self, values: Mapping[str, Tensor]) -> Tensor:
        """The tensor again, from other values of the parameters."""
        if self.derivation is None:
            return values[self.names[0]]
        how = self.derivation
        args, kwargs = with_leaves(
            lambda leaf: leaf.replay(values) if isinstance(leaf, Tracked) else leaf, how.args, how.kwargs
        )
        out = how.again(args, kwargs)
        return out if how.out_of == 0 else tensors_in([out])[how.index]

    @property
    def root(self) -> Tracked | None:
        """The parameter, of which this is some or all of the entries in some order; None where it is anything else."""
        how = self.derivation
        if how is None:
            return self
        first = how.args[0] if how.args else None
        if op_name(how.func) not in ISOMETRIES | SELECTIONS or not isinstance(first, Tracked) or len(self.names) > 1:
            return None
        return first.root

    @cached_property
    def part(self) -> Part | None:
        """Which entries of the parameter, where they are a box of them."""
        root = self.root
        if root is None:
            return None
        if root.shard is None or root is self:
            return part_of(root.real, self.real)
        whole = self.real._base
        return part_of(whole, self.real) if whole is not None and root.shard.gave(whole) else None

    def transposed_base(self) -> Tracked | None:
        """The tracked matrix that this one is the transpose of."""
        how = self.derivation
        if how is None or self.real.dim() != 2 or not how.args or not isinstance(how.args[0], Tracked):
            return None
        name = op_name(how.func)
        swaps = name in ("t", "get_T", "get_mT") or (
            name in ("transpose", "swapaxes", "permute")
            and self.real.shape == how.args[0].real.shape[::-1]
            and self.real.stride() == how.args[0].real.stride()[::-1]
            and sorted(d % 2 for d in how.args[1:] if isinstance(d, int)) == [0, 1]
            and (name != "permute" or how.args[1:] == (1, 0))
        )
        return how.args[0] if swaps and how.args[0].real.dim() == 2 else None


@dataclass(eq=False)
class Site:
    """One use of a tracked tensor together with data: where its factor comes out of the backward.

    Attributes:
        tracked: the tensor.
        op: the operation's name.
        kind: "outer", "gather" or "dense".
        axis: where the samples are in the operation's result, known once it has run.
        tap: an input of the operation that it never reads: a backward that is asked for its cotangent reaches the
            operation, and there leaves what the treatment asks for in `values`.
        taps: names of the contractions that may be asked of the site, beside its factor.
        values: what the last backward has left, by name.
        treatment: "factor": the factor comes out; "fused": its contraction does; "raw": the grad-output does, for a
            probe; "grad": only the parameter's gradient is wanted; "off": nothing is.
        wants_grad: whether the gradient of the parameter is computed.
        contract: for "fused": `factor -> (gradient or None, {tap: cotangent})`.
        make: `(grad-output, samples) -> factor`, kept by the backward where the factor is made later.
        train: how many samples, the first ones, enter the gradient.
        dtype: the dtype of the factor and of its contractions.
        positions: positions of a sample, R.
        width: the last dimension of the result.
        own_axis: where each sample's own part of the tensor is, for an `Own` factor.
        ids: for "gather": the ids as they were given.
        fused_right: for "fused": activations of all samples, where cross terms with other uses need them.
        rows: with segments: the segment of each row of the result, given where the samples are.
        fallback: whether the operation has no rule.
        look_ups: for a fused linear map: the look-ups of its weight that ran before it.
        narrowed: whether the activation was projected in the forward, and the factor is of what is left of it.
    """

    tracked: Tracked
    op: str
    kind: str
    train: int = 0
    axis: SampleAxis | Lost | None = None
    tap: Tensor | None = None
    taps: Collection[str] = ()
    values: dict[str, Tensor] = field(default_factory=dict)
    treatment: str = "factor"
    wants_grad: bool = True
    contract: Callable[[Factor], tuple[Tensor | None, dict[str, Tensor]]] | None = None
    make: MakeFactor | None = None
    dtype: torch.dtype = torch.float32
    positions: int = 1
    width: int = 1
    own_axis: SampleAxis | None = None
    ids: Tensor | None = None
    fused_right: Tensor | None = None
    rows: Callable[[SampleAxis], RowMap | Lost] | None = None
    fallback: bool = False
    look_ups: list[Site] = field(default_factory=list)
    narrowed: bool = False

    @property
    def label(self) -> str:
        """The parameters' names, for messages."""
        return ", ".join(self.tracked.names)

    def sample_rows_of_ids(self) -> Tensor:
        """For "gather": the ids of each sample, `[S, R]`."""
        assert self.ids is not None and isinstance(self.axis, SampleAxis)
        return self.axis.rows(self.ids.unsqueeze(-1)).squeeze(-1)

    def cast(self, grad: Tensor) -> Tensor:
        """A grad-output, or what was made of it, in the dtype of contractions."""
        return grad if self.dtype.is_complex or grad.is_complex() else grad.to(self.dtype)

    def partition(self) -> Partition:
        """The samples of the result's rows: the batch's, or its segments.

        Raises:
            UnsupportedUse: if they are not known.
        """
        samples: Samples | RowMap = self.axis
        if isinstance(samples, SampleAxis) and self.rows is not None:
            samples = self.rows(samples)
            if isinstance(samples, Lost):
                raise UnsupportedUse(
                    f"{self.label}: segments= and the axis 'token' need each row of the result of `{self.op}` at one "
                    f"position of the batch, and here it is not known ({samples.reason}). Leave the parameter out with "
                    "layers=.",
                    self.tracked.names,
                )
        if not isinstance(samples, Partition):
            raise UnsupportedUse(
                f"{self.label}: the samples of the result of `{self.op}` are not known.", self.tracked.names
            )
        return samples

    def resolve(self, grad: Tensor, make: MakeFactor, plain: Callable[[], Tensor] | None = None) -> Tensor | None:
        """What the operation's backward leaves in `values` and returns for the parameter.

        Args:
            grad: the cotangent of the operation's result.
            make: makes the factor of all samples from it.
            plain: the parameter's gradient over all samples, where there is a shorter way than through the factor.

        Returns:
            The parameter's cotangent.
        """
        gradient: Tensor | None = None
        if self.treatment == "raw":
            self.make = make
            self.values = {"g": grad}
        elif (
            self.treatment == "grad"
            and plain is not None
            and isinstance(self.axis, SampleAxis)
            and (self.train == self.axis.samples or self.rows is not None)
        ):
            gradient = plain()
        elif self.treatment != "off":
            factor = make(self.cast(grad), self.partition())
            if self.treatment == "fused":
                assert self.contract is not None
                gradient, values = self.contract(factor)
                self.values = {name: self.cast(value) for name, value in values.items()}
            elif self.treatment == "factor":
                self.values = self._kept(factor, grad, make)
            if self.wants_grad:
                coarse = torch.finfo(self.dtype).eps > torch.finfo(grad.dtype).eps  # a dtype for the dots alone
                if coarse or gradient is None:
                    exact = make(grad, self.partition()) if coarse else factor
                    gradient = total(exact.part(0, self.train), self.tracked.real.shape)
        return gradient

    def _kept(self, factor: Factor, grad: Tensor, make: MakeFactor) -> dict[str, Tensor]:
        if isinstance(factor, Dense):
            return {"grad": self.cast(factor.grad)}
        if isinstance(factor, Own):
            self.own_axis = factor.axis
            return {"own": self.cast(total(factor, self.tracked.real.shape))}
        self.make = make
        return {"g": grad}

    def factor(self, samples: Partition) -> Factor | None:
        """The factor out of what the backward has left; None where the losses do not depend on this use."""
        dense, own, grad = (self.values.get(name) for name in ("grad", "own", "g"))
        if dense is not None:
            return Dense(dense)
        if own is not None:
            assert self.own_axis is not None
            return Own(self.own_axis.split(own), self.own_axis)
        if grad is None or self.make is None:
            return None
        return self.make(self.cast(grad), samples)
