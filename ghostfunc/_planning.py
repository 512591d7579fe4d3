"""`plan_step`: the memory and the traffic of a step on every rank, from tensors that have no values.

The real code runs once on fake tensors: the validation gradient, then `value_and_grad_dot` along it, as ranks run them.
Every storage that it makes is recorded. What a mesh makes of the record is arithmetic:

    replicated   parameters, their gradients and the direction as they are; both gradients are all-reduced
    sharded      of these three 1/N; a weight is whole while an operation uses it, a gradient while it is made

Nothing here is a measurement: `docs/planning.md` says how far off it was where it could be measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from ghostfunc._allocations import Allocation, Allocations, Span, at_peak
from ghostfunc._batch import batch_size, plain
from ghostfunc._call import Params
from ghostfunc._explain import Plan, explain
from ghostfunc._fake import as_fake, fake_mode, new_mode
from ghostfunc._functionalize import ModelFn
from ghostfunc._interpreter import Interpreter
from ghostfunc._planner import tile_bytes
from ghostfunc._transforms import val_gradient, value_and_grad_dot

_KEPT_WHOLE = 1 << 16  # numbers of a sharded parameter that is gathered once in a run


class Memory(NamedTuple):
    """Bytes of one rank at the moment of a step when it holds most.

    Attributes:
        parameters: its own, whole or a shard.
        optimizer: what the optimizer keeps of them.
        direction: the validation gradient.
        gradients: of the train samples, as far as they are made.
        activations: what the forward has left for the backward and is still there.
        logits: tensors of the size of the head's result, where the vocabulary was told.
        working: anything else that operations hold at that moment, and a tile of the contractions.
        gathered: where parameters are sharded: the largest weight whole, or its direction.
    """

    parameters: int
    optimizer: int
    direction: int
    gradients: int
    activations: int
    logits: int
    working: int
    gathered: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


class Seconds(NamedTuple):
    """A step's time by the model of `StepPlan.seconds`.

    Attributes:
        compute: of the products.
        communication: of what the rank sends.
    """

    compute: float
    communication: float

    @property
    def total(self) -> float:
        """One after the other: gathers wait, and nothing overlaps."""
        return self.compute + self.communication


class _Weight(NamedTuple):
    """A parameter, as meshes see it: its size, and how often a run of one batch uses it whole."""

    numel: int
    bytes: int
    forward: int
    backward: int

    @property
    def gathers(self) -> int:
        """In one forward and backward."""
        return 1 if self.numel <= _KEPT_WHOLE else self.forward + self.backward


class _Phase(NamedTuple):
    """A forward and backward: when it began, when its forward began and ended, its end, what it found in the end."""

    start: int
    forward: int
    middle: int
    end: int
    gradients: dict[str, Allocation]


class _Record(NamedTuple):
    """What running both phases has told."""

    weights: dict[str, _Weight]
    validation: _Phase
    training: _Phase
    made: list[Allocation]
    logits: tuple[int, ...]  # numbers of the logits of each batch
    device: str


@dataclass(frozen=True, eq=False)
class StepPlan:
    """What `plan_step` found.

    Attributes:
        plan: `explain`'s, of the same step: uses, contractions, FLOPs.
        samples: train samples of a rank.
        val_samples: validation samples of a rank.
        itemsize: bytes of a parameter's number.
        again_flops: of what the backwards run again, where activations are checkpointed.
    """

    plan: Plan
    samples: int
    val_samples: int
    itemsize: int
    again_flops: int
    _record: _Record

    @property
    def parameters(self) -> int:
        """How many numbers the parameters are."""
        return sum(w.numel for w in self._record.weights.values())

    @property
    def parameter_bytes(self) -> int:
        """Of all parameters."""
        return sum(w.bytes for w in self._record.weights.values())

    @property
    def activation_bytes(self) -> int:
        """What the forward of the train samples leaves for the backward, its logits included."""
        return self._left(self._record.training)

    @property
    def plain_flops(self) -> int:
        """Products of a rank's plain step on its train samples."""
        return (self.plan.plain_flops or 0) + self.again_flops * self.samples // (self.samples + self.val_samples)

    @property
    def flops(self) -> int:
        """Products of a rank's step with dots: the validation gradient, the train gradient and the dots."""
        return (self.plan.total_flops or 0) + self.again_flops

    def memory(
        self, ranks: int = 1, *, sharded: bool = False, moments: int = 2, blocks_of_logits: bool = False
    ) -> Memory:
        """The memory of one rank.

        Args:
            ranks: N, that share parameters or only the samples.
            sharded: whether each has 1/N of the parameters, the direction, the gradients and the optimizer's states.
            moments: what the optimizer keeps, in numbers for each parameter: 2 for Adam, 0 for plain SGD.
            blocks_of_logits: count logits as blocks of them, as `chunked_causal_lm_loss` makes them.

        Returns:
            Its parts at the moment when their sum is largest.
        """
        share = ranks if sharded else 1
        spans = list(self._held_in_time(share, blocks_of_logits))
        found = at_peak(spans)
        working = found.get("working", 0) + self._tile + (tile_bytes(self._record.device) if blocks_of_logits else 0)
        own = -(-self.parameter_bytes // share)
        return Memory(
            parameters=own,
            optimizer=moments * own,
            direction=found.get("direction", 0),
            gradients=found.get("gradients", 0),
            activations=found.get("activations", 0),
            logits=found.get("logits", 0),
            working=working,
            gathered=self._gathered if share > 1 else 0,
        )

    def traffic(self, ranks: int = 1, *, sharded: bool = False) -> int:
        """Bytes that one rank sends in a step, by ring algorithms.

        An all-gather or a reduce-scatter of a tensor sends (N - 1)/N of it, an all-reduce twice that. Sharded, every
        use gathers a weight: in the forward and in the backward of both batches, and its direction once; the two
        gradients are reduce-scattered. Replicated, they are all-reduced.
        """
        weights = self._record.weights.values()
        if sharded:
            again = [w.forward if self.again_flops and w.numel > _KEPT_WHOLE else 0 for w in weights]
            whole = sum(w.bytes * (2 * (w.gathers + more) + 1 + 2) for w, more in zip(weights, again, strict=True))
        else:
            whole = 2 * 2 * self.parameter_bytes
        return whole * (ranks - 1) // ranks

    def seconds(self, ranks: int = 1, *, sharded: bool = False, flops: float, bandwidth: float) -> Seconds:
        """A model of a step's time, no measurement: products at one rate, then bytes at another, nothing at once.

        Args:
            ranks: N.
            sharded: as in `memory`.
            flops: what a rank makes in a second: its peak times the utilisation that is hoped for.
            bandwidth: bytes that a rank sends in a second.
        """
        return Seconds(self.flops / flops, self.traffic(ranks, sharded=sharded) / bandwidth)

    # ---------------------------------------------------------------- what is held when

    @property
    def _tile(self) -> int:
        """The buffer of a contraction, which is inside one operation of the record."""
        largest = max((w.numel for w in self._record.weights.values()), default=0)
        return min(tile_bytes(self._record.device), 4 * self.samples * largest)

    @property
    def _gathered(self) -> int:
        """A weight whole, or its direction as it was sent and as it is contracted."""
        copied = 0 if self.itemsize >= 4 else 4
        return max((w.bytes + w.numel * copied for w in self._record.weights.values()), default=0)

    @cached_property
    def _copies(self) -> set[Allocation]:
        """The direction in the dtype of contractions, where that is not the gradient's: made before the forward."""
        phase = self._record.training
        return {a for a in self._record.made if phase.start < a.born <= phase.forward and a.alive(phase.middle)}

    def _held_in_time(self, share: int, blocks_of_logits: bool) -> Iterator[Span]:
        gradients: set[Allocation] = set()
        for kind, phase in (("direction", self._record.validation), ("gradients", self._record.training)):
            gradients |= set(phase.gradients.values())
            yield from self._gradients(kind, phase, share)
        left_out = {"", "logits"} if blocks_of_logits else {""}
        for allocation in self._record.made:
            if allocation not in gradients and (kind := self._kind(allocation, share)) not in left_out:
                yield Span(kind, allocation.bytes, allocation.born, allocation.died)

    def _gradients(self, kind: str, phase: _Phase, share: int) -> Iterator[Span]:
        """Whole while they are made, a share of them from then on."""
        births = sorted(a.born for a in phase.gradients.values())
        for name, allocation in phase.gradients.items():
            if share == 1:
                yield Span(kind, allocation.bytes, allocation.born, allocation.died)
                continue
            once = len(self.plan.uses.get(name, ())) == 1
            complete = next((b for b in births if b > allocation.born), phase.end) if once else phase.end
            yield Span(kind, allocation.bytes, allocation.born, complete)
            yield Span(kind, -(-allocation.bytes // share), complete, allocation.died)

    def _kind(self, allocation: Allocation, share: int) -> str:
        """What a storage is for; "" for what ranks with shards do not have."""
        if allocation in self._copies:
            return "" if share > 1 else "direction"
        if any(allocation.bytes in (2 * size, 4 * size, 8 * size) for size in self._record.logits):
            return "logits"
        for phase in (self._record.validation, self._record.training):
            if phase.forward < allocation.born <= phase.middle and allocation.alive(phase.middle):
                return "activations"
        return "working"

    def _left(self, phase: _Phase) -> int:
        return sum(a.bytes for a in self._record.made if phase.forward < a.born and a.alive(phase.middle))


def _of_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of the fused kernel of the CPU, as plain products: scores, and values by them."""
    (batch, heads, rows, width), columns = query, key[2]
    return 2 * batch * heads * rows * columns * (width + value[3])


def _of_attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return 2 * _of_attention(query, key, value)


_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _of_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _of_attention_backward,
}


def plan_step(
    model_fn: ModelFn,
    params: Params,
    train: Any,
    val: Any,
    *,
    vocabulary: int = 0,
    device: str = "cpu",
) -> StepPlan:
    """What a rank's step with dots takes: `val_gradient`, then `value_and_grad_dot` along it, on fake tensors.

    Nothing is computed and no weight needs memory: parameters and batches may be fake (made under a `FakeTensorMode`)
    or on the meta device, and real ones are not touched. A 70B model with
    checkpointed activations takes two minutes of one core.

    Args:
        model_fn: `model_fn(params, batch) -> losses[B]`.
        params: parameters by name.
        train: one rank's share of the train batch.
        val: one rank's share of the validation batch, of samples of the same shapes.
        vocabulary: the size of the head's last dimension, to count logits apart; 0 to leave them where they are.
        device: the kind of device that contracts, which decides how large a tile is: "cpu", or another.

    Returns:
        A plan, to be asked for the memory, the traffic and the time on any number of ranks.

    Raises:
        UnsupportedUse: as in `ghost_grad_dot`.
        RuntimeError: for a model that decides by values.

    Example:
        >>> import torch, ghostfunc as gf
        >>> model_fn, params = gf.functionalize(torch.nn.Linear(4, 3), gf.classification_loss)
        >>> batch = (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
        >>> plan = plan_step(model_fn, params, batch, batch)
        >>> plan.memory().parameters, plan.memory(ranks=3, sharded=True).parameters
        (60, 20)
    """
    params, train, val = dict(params), plain(train), plain(val)
    mode = fake_mode(params.values()) or new_mode()
    n, m = batch_size(train, "train"), batch_size(val, "val")
    params = {name: as_fake(mode, p.detach()) for name, p in params.items()}
    train, val = pytree.tree_map_only(Tensor, lambda t: as_fake(mode, t), (train, val))
    plan = explain(model_fn, params, train, val, schedule="two-phase")
    if plan.probe or plan.total_flops is None:
        raise RuntimeError(
            f"plan_step: {plan.probe or 'the model decides by values'}, so that it cannot be followed without values."
        )
    with mode:
        validation, training, made, checkpointed = _recorded(model_fn, params, train, val)
    again = 0
    if checkpointed:  # counted in a run of its own: the counter holds on to tensors of what runs again
        with mode, FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
            value_and_grad_dot(model_fn, params, train, val_gradient(model_fn, params, val))
        again = counter.get_total_flops() - plan.total_flops
    weights = {
        name: _Weight(
            p.numel(),
            p.numel() * p.element_size(),
            len(plan.uses[name]),
            sum(use.factor == "Outer" for use in plan.uses[name]),
        )
        for name, p in params.items()
    }
    positions = max((t.shape[1] for t in pytree.tree_leaves(train) if isinstance(t, Tensor) and t.dim() > 1), default=1)
    itemsize = max(p.element_size() for p in params.values())
    logits = (vocabulary * n * positions, vocabulary * m * positions) if vocabulary else ()
    record = _Record(weights, validation, training, made, logits, device)
    return StepPlan(plan, n, m, itemsize, again, record)


def _recorded(
    model_fn: ModelFn, params: dict[str, Tensor], train: Any, val: Any
) -> tuple[_Phase, _Phase, list[Allocation], bool]:
    """Both phases of a step, every storage that they make, and whether activations are checkpointed."""
    record = Allocations()
    marks: list[int] = []
    checkpointed: list[bool] = []

    def marked(params: dict[str, Tensor], batch: Any) -> Any:
        marks.append(record.clock)
        losses = model_fn(params, batch)
        marks.append(record.clock)
        interpreter = Interpreter.current()
        checkpointed.append(interpreter is not None and interpreter.checkpointed)
        return losses

    with record:
        first = val_gradient(marked, params, val)
        validation = _phase(0, marks, record, first.direction)
        start = record.clock
        second = value_and_grad_dot(marked, params, train, first)
        training = _phase(start, marks[2:], record, second.grads)
    return validation, training, record.made, any(checkpointed)


def _phase(start: int, marks: list[int], record: Allocations, gradients: dict[str, Tensor]) -> _Phase:
    found = {name: record.of(gradient) for name, gradient in gradients.items()}
    made = {name: allocation for name, allocation in found.items() if allocation is not None}
    return _Phase(start, marks[0], marks[1], record.clock, made)
