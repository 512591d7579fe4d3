"""Interpret: a mode that sees every torch operation while `model_fn` runs, and puts a rule where a parameter is used.

`model_fn` receives *sentinels*: copies of the parameters that share their memory. Where an operation consumes one,

- with data of the batch, its rule runs it on the real leaf and records a `Site` (its factor comes out of the backward);
- without, the result is a tensor *derived* from parameters, which is tracked like a parameter, and whose factors are
  pulled back through the derivation.

No rule consumes a sentinel itself. A sentinel that has a gradient after the backward was used by something that the
mode did not see, and the call raises.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from ghostfunc._bodies import COMPOSED, IN_STEPS, body
from ghostfunc._deriving import derive, is_memory_of_a_parameter, refuse_stale, refuse_write
from ghostfunc._errors import UnsupportedUse
from ghostfunc._follow import follow
from ghostfunc._nesting import functorch_level, leaf_at, readable, saved_tensors_are_hooked
from ghostfunc._operations import (
    LIKE_ANOTHER,
    READS,
    dtype_of_product,
    is_in_place,
    op_name,
    operation,
    tensors_in,
    with_leaves,
)
from ghostfunc._randomness import (
    MAY_DRAW,
    DrewRandomNumbers,
    RandomState,
    cannot_share,
    draws,
    in_eval_mode,
    in_place_by_name,
    refusal,
    shared,
)
from ghostfunc._ranks import Ranks
from ghostfunc._sample_axis import Lost, SampleAxis, Samples, samples_of, set_samples
from ghostfunc._segments import Segments
from ghostfunc._sharded import Shards, ends_in, is_sharded
from ghostfunc._sites import Site, Tracked

_WRITES = frozenset(  # in-place operations that have a rule
    """
    add iadd sub isub mul imul div itruediv pow lerp addcmul addcdiv copy masked_fill clamp clamp_min clamp_max clip
    atan2 hypot xlogy remainder fmod copysign
    """.split()
)

_APART = MAY_DRAW | IN_STEPS.keys() | {op_name(func) for func in COMPOSED} | {"grad", "backward"}  # looked at first


class Interpreter(TorchFunctionMode):
    """The mode: tracks parameters and what derives from them, and follows the samples of everything else."""

    def __init__(
        self,
        params: Mapping[str, Tensor],
        samples: int,
        *,
        randomness: str = "different",
        dropout: bool = True,
        refuse_random: bool = False,
        apply_rule: Callable[..., Any],
        more_taps: Callable[[Site], Collection[str]] = lambda site: (),
        narrow: Callable[[Site, str], Tensor | None] = lambda site, side: None,
        dtype: torch.dtype,
        lenient: bool = False,
        nested: bool = False,
        segments: Segments | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__()
        self.samples = samples
        self.apply_rule = apply_rule
        self.more_taps = more_taps
        self.narrow = narrow
        self.dtype = dtype
        self.lenient = lenient
        self.sites: list[Site] = []
        self.level = functorch_level()
        self.nested = nested
        self.randomness = randomness
        self.dropout = dropout
        self.refuse_random = refuse_random
        self.tracked: list[Tracked] = []
        self.segments = segments
        self.checkpointed = False  # whether the backward will run a part of the forward again
        self.recomputing = False
        self._no_draw_unseen = randomness == "error" or (randomness == "same" and samples > 1)
        self._again: list[Callable[[], AbstractContextManager]] = []
        self._others: set[int] = set()  # parameters of modules that are not tracked
        self.notes: list[str] = []  # why integers of the whole batch decided what a sample goes through
        self._by_id: dict[int, Tracked] = {}
        self.random = False
        self.dtypes: set[torch.dtype] = set()  # that results had
        self.device = next(iter(params.values())).device
        self.shards = Shards(ranks) if any(map(is_sharded, params.values())) else None
        for name, param in params.items():
            if self.shards is not None and is_sharded(param):
                shard = self.shards.add(name, param.detach().requires_grad_())
                sentinel = shard.stand_in(param.dtype).requires_grad_()
                self.track(Tracked((name,), sentinel, shard.in_graph(), shard=shard))
            else:
                self.track(Tracked((name,), self.leaf(param), param if nested else self.leaf(param)))

    @staticmethod
    def current() -> Interpreter | None:
        """The interpreter that is running, if one is."""
        running = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, Interpreter)]
        return running[-1] if running else None

    def again_in_backward(self, enter: Callable[[], AbstractContextManager]) -> None:
        """Enter a context around the backward too: activation checkpointing runs parts of the forward there."""
        self._again.append(enter)

    def gradients(
        self, output: Tensor, inputs: list[Tensor], weight: Tensor, *, keep: bool
    ) -> tuple[Tensor | None, ...]:
        """A backward pass; where it runs parts of the forward again, they run as they did."""
        for site in self.sites:
            site.values = {}
        if not self.checkpointed or self.nested:
            return torch.autograd.grad(
                output, inputs, weight, allow_unused=True, retain_graph=keep, create_graph=self.nested
            )
        with ExitStack() as stack:
            for enter in self._again:
                stack.enter_context(enter())
            self.recomputing = True
            stack.callback(setattr, self, "recomputing", False)
            stack.enter_context(self)
            # torch.autograd.grad is a torch function, and would leave the mode before the engine starts.
            return torch.autograd.Variable._execution_engine.run_backward(
                (output,), (weight,), keep, False, tuple(inputs), allow_unreachable=True, accumulate_grad=False
            )

    def _examined(self, tensors: list[Tensor]) -> tuple[list[Tracked], bool, bool]:
        """What an operation takes: tracked tensors, whether one carries samples, whether one is foreign.

        A foreign tensor has a graph that the interpreter did not see grow (a user's own autograd.Function).
        """
        tracked: list[Tracked] = []
        followed = foreign = False
        own: set[int] = set()
        by_id = self._by_id
        for t in tensors:
            if (node := t.grad_fn) is not None and node.name() == "CheckpointFunctionBackward":
                self._refuse_reentrant()
            if type(t) is not Tensor and isinstance(t, torch.nn.Parameter) and t.requires_grad:
                own.add(id(t))
            found = by_id.get(id(t))
            if found is not None and found.sentinel is t:
                tracked.append(found)
                followed = followed or samples_of(t) is not None
            elif samples_of(t) is not None:
                followed = True
            elif t.requires_grad:
                foreign = True
        if not self.checkpointed and not self.recomputing:
            self.checkpointed = saved_tensors_are_hooked(None if self.shards is None else self.shards.hooks)
        if own:
            self._watch_recomputation(own, tensors)
        return tracked, followed, foreign

    def _refuse_reentrant(self) -> None:
        raise UnsupportedUse(
            "reentrant activation checkpointing hides the parameters that it runs over from autograd. Pass "
            "use_reentrant=False to torch.utils.checkpoint.checkpoint.",
            tuple(self.leaves),
        )

    def _watch_recomputation(self, own: set[int], tensors: list[Tensor]) -> None:
        """Notice weights of modules; in a recomputation, those that the forward did not have."""
        if not self.recomputing:
            self._others |= own
        elif own - self._others:
            shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
            raise UnsupportedUse(
                f"activation checkpointing runs an operation on shapes {shapes} again with a module's own parameters "
                "instead of params: torch.func.functional_call had put them back. Make model_fn with "
                "gf.functionalize, which swaps them in again, or switch checkpointing off.",
                tuple(self.leaves),
            )

    @property
    def sentinels(self) -> dict[str, Tensor]:
        """What `model_fn` gets for its parameters."""
        return {t.names[0]: t.sentinel for t in self.tracked if t.derivation is None}

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The real parameters of this call, as leaves of its graph."""
        return {t.names[0]: t.leaf for t in self.tracked if t.derivation is None}

    def leaf(self, tensor: Tensor) -> Tensor:
        """A tensor that the backward of this call differentiates with respect to, with the values of another."""
        if self.nested:
            assert self.level is not None
            return leaf_at(tensor, self.level)
        return tensor.detach().requires_grad_()

    def track(self, tracked: Tracked) -> Tracked:
        """Know a tensor by its sentinel from here on."""
        if not self.recomputing:
            self.tracked.append(tracked)
        self._by_id[id(tracked.sentinel)] = tracked
        return tracked

    def stand_for(self, tracked: Tracked, sentinel: Tensor) -> None:
        """Let another tensor be the sentinel of a tracked one."""
        del self._by_id[id(tracked.sentinel)]
        tracked.sentinel = sentinel
        self._by_id[id(sentinel)] = tracked

    def sites_of(self, op: str, uses: Sequence[tuple[Tracked, str]], out: Tensor) -> list[Site]:
        """A site for each use of a tracked tensor by an operation, `(tensor, kind)`; `out` is its result."""
        width = out.shape[-1] if out.dim() else 1
        positions = out.numel() // max(1, width * self.samples)
        sites = []
        for tracked, kind in uses:
            dtype = torch.promote_types(self.dtype, tracked.real.dtype) if tracked.real.is_complex() else self.dtype
            site = Site(tracked, op, kind, dtype=dtype, positions=positions, width=width)
            if not self.nested:
                site.taps = self.more_taps(site)
            if not self.recomputing:
                tracked.sites.append(site)
                self.sites.append(site)
            sites.append(site)
        return sites

    def unsupported(self, message: str, names: tuple[str, ...], func: Callable, args: Any, kwargs: Any) -> Any:
        """A use that cannot be factored: refuse, or let the sentinels through for a backward of each sample."""
        if not self.lenient and not self.nested:
            raise UnsupportedUse(message, names)
        return func(*args, **kwargs)

    def find(self, tensor: Any) -> Tracked | None:
        """The tracked tensor that a sentinel stands for."""
        tracked = self._by_id.get(id(tensor)) if isinstance(tensor, Tensor) else None
        return tracked if tracked is not None and tracked.sentinel is tensor else None

    def value(self, tensor: Any) -> Any:
        """What an operation computes with: the values of a tracked tensor; anything else as it is."""
        tracked = self.find(tensor)
        if tracked is None:
            return tensor
        if tracked.shard is not None:
            return tracked.shard.values()
        return tracked.real if self.nested else tracked.real.detach()

    def value_in_product(self, tensor: Any) -> Any:
        """The same for a product: a sharded weight is gathered as autocast wants it, and not cast after that."""
        tracked = self.find(tensor)
        if tracked is None or tracked.shard is None:
            return self.value(tensor)
        return tracked.shard.values(dtype_of_product(tensor))

    def real(self, tensor: Any) -> Any:
        """The real tensor behind a sentinel; anything else as it is."""
        tracked = self.find(tensor)
        if tracked is None:
            return tensor
        return tracked.real if tracked.shard is None else tracked.shard.with_graph(tracked.real)

    def compute_in(self, tensor: Any, dtype: torch.dtype) -> Any:
        """A parameter in a dtype; a sharded one, of the call or frozen, is gathered in it."""
        tracked = self.find(tensor)
        if tracked is None and self.shards is not None and is_sharded(tensor):
            self.shards.frozen(tensor).dtype = dtype
            return tensor
        if tracked is None or tracked.shard is None:
            return tensor.to(dtype)
        if tracked.shard.dtype == dtype:
            return tracked.sentinel
        tracked.shard.dtype = dtype
        self.stand_for(tracked, tracked.shard.stand_in(dtype).requires_grad_())
        return tracked.sentinel

    def _whole(self, leaf: Any) -> Any:
        """The values of a sharded tensor, which reads them where no gradient is recorded or wanted."""
        tracked = self.find(leaf)
        if tracked is not None:
            return leaf if tracked.shard is None else tracked.shard.values()
        return self.shards.frozen(leaf).values() if self.shards is not None and is_sharded(leaf) else leaf

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in READS:
            return func(*args, **kwargs)
        out = self._call(func, args, kwargs)
        if isinstance(out, Tensor):
            self.dtypes.add(out.dtype)
        return out

    @property
    def precision(self) -> torch.dtype:
        """The dtype of the fewest digits that an operation's result had."""
        floating = [dtype.to_real() for dtype in self.dtypes if dtype.is_floating_point or dtype.is_complex]
        return max(floating, key=lambda dtype: torch.finfo(dtype).eps, default=self.dtype)

    def call(self, func: Callable, *args: Any, **kwargs: Any) -> Any:
        """Run one operation: through a rule where it uses a tracked tensor."""
        return self._call(func, args, kwargs)

    def _call(self, func: Callable, args: Any, kwargs: dict[str, Any]) -> Any:
        name, in_place = operation(func)
        if name in _APART:
            if (steps := body(func)) is not None:  # each step comes back here
                with self:
                    return steps(*args, **kwargs)
            if self.nested and name in IN_STEPS:  # an outer transform may differentiate what the backward gives
                with self:
                    return IN_STEPS[name](*args, **kwargs)
            if name in MAY_DRAW and draws(name, args, kwargs):
                func, args, kwargs = self._drawing(name, func, args, kwargs)
                in_place = is_in_place(func)
            if func is torch.autograd.grad or func is torch.autograd.backward or name == "backward":
                self._refuse_backward(name)
        tensors = tensors_in(args)
        if kwargs:
            tensors += tensors_in(kwargs.values())
        if self.shards is not None and (not torch.is_grad_enabled() or any(map(is_sharded, tensors))):
            recording = torch.is_grad_enabled()
            args, kwargs = with_leaves(
                lambda leaf: leaf if recording and self.find(leaf) is not None else self._whole(leaf), args, kwargs
            )
            tensors = tensors_in(args) + tensors_in(kwargs.values())
        tracked, followed, foreign = self._examined(tensors)
        if tracked:
            refuse_stale(name, tracked)
            if why := self._must_not_see(name, in_place, args, kwargs, tensors):
                if self.shards is not None:
                    self._refuse_sharded(why, tracked)
                for t in tracked:
                    t.unseen = why
                return func(*args, **kwargs)  # on the sentinels: the backward will find them
        if not tracked or not torch.is_grad_enabled():
            out = self._watched(name, func, args, kwargs) if self._no_draw_unseen else func(*args, **kwargs)
            follow(func, args, kwargs, out, self.samples, self.notes, tensors)
            if self.segments is not None:
                self.segments.follow(func, args, kwargs, out)
            if foreign:
                self._doubt(out)
            return out
        if name in LIKE_ANOTHER and self.find(args[0]) is not None:
            args = (args[0], *(a.detach() if isinstance(a, Tensor) else a for a in args[1:]))
            return derive(self, func, args, kwargs, tracked)
        if name == "getitem" and self.find(args[0]) is not None:
            args = (args[0], self._numbers(args[1]))
            tensors = tensors_in(args)
            _, followed, foreign = self._examined(tensors)
        if not followed and not foreign:
            return derive(self, func, args, kwargs, tracked)
        before = len(self.sites)
        out = self.apply_rule(self, name, func, args, kwargs)
        results = [out] if isinstance(out, Tensor) else tensors_in((out,))
        if in_place or any(samples_of(t) is None for t in results):  # else a rule's own steps were followed
            follow(func, args, kwargs, out, self.samples, self.notes, tensors)
            if self.segments is not None:
                self.segments.follow(func, args, kwargs, out)
        if foreign:
            self._doubt(out)
        unplaced = [site for site in self.sites[before:] if site.axis is None]
        if unplaced:
            axis = self._known(samples_of(results[0]))
            for site in unplaced:
                site.axis = axis
                if self.segments is not None:
                    positions = self.segments.carried_by(results[0])
                    site.rows = partial(self.segments.rows, results[0].shape, positions=positions)
        return out

    @staticmethod
    def _refuse_sharded(why: str, tracked: list[Tracked]) -> None:
        names = tuple(dict.fromkeys(name for t in tracked for name in t.names))
        raise UnsupportedUse(
            f"{', '.join(names)}: used {why}; sharded parameters are gathered for operations that have a rule, and "
            "this one would not get their values. Write the operation in torch functions, or leave them unsharded.",
            names,
        )

    def refuse_unseen(self, losses: Tensor) -> None:
        """Raise if losses come from what stands for a sharded parameter: an operation that is not seen has used it."""
        sharded = [t for t in self.tracked if t.shard is not None]
        if sharded and (places := ends_in(losses, [t.sentinel for t in sharded])):
            self._refuse_sharded(
                "by an operation that the interpreter does not see (a torch.autograd.Function of your own, "
                "torch.jit.script, a C++ extension)",
                [sharded[place] for place in places],
            )

    def _refuse_backward(self, name: str) -> None:
        """A backward inside `model_fn` runs through values that carry no parameter: its result would lose them."""
        names = tuple(dict.fromkeys(n for site in self.sites for n in site.tracked.names))
        if names:
            raise UnsupportedUse(
                f"{', '.join(names)}: model_fn runs `{name}` itself, after uses of these parameters; how its result "
                "depends on them is not followed. Write the derivative with torch.func.grad and pass "
                "on_unsupported='dense' (exact, one backward pass for each sample).",
                names,
            )

    def _must_not_see(
        self, name: str, in_place: bool, args: Any, kwargs: Mapping[str, Any], tensors: list[Tensor]
    ) -> str:
        """Why no rule can run a use, inside a functorch transform of the model's own or a write; "" where one can."""
        if functorch_level() != self.level:
            return f"by `{name}` inside a functorch transform of the model's own"
        to_data = name == "setitem" and self.find(args[0]) is None and samples_of(args[0]) is not None
        writes = (in_place and name not in _WRITES) or (name == "setitem" and not to_data)
        writes = writes or kwargs.get("out") is not None
        target = self.find(kwargs["out"] if kwargs.get("out") is not None else args[0] if args else None)
        if target is not None and (writes or in_place) and is_memory_of_a_parameter(target, self.tracked):
            refuse_write(name, target)
        if not writes or not torch.is_grad_enabled():
            return ""
        if target is not None and target.derivation is not None and all(samples_of(t) is None for t in tensors):
            return ""
        return f"by `{name}`, which writes to a tensor"

    @staticmethod
    def _known(axis: Samples) -> Samples:
        """The axis of a site, whose every row must have an owner."""
        if isinstance(axis, SampleAxis) and axis.owners is not None and bool((axis.owners < 0).any()):
            return Lost("rows that no sample owns pass through a parameter", mixed=False)
        return axis

    def _numbers(self, index: Any) -> Any:
        """An index whose scalar tensors are numbers: which part of a parameter is used has no gradient."""
        items = index if isinstance(index, tuple) else (index,)
        numbers = []
        for item in items:
            if isinstance(item, Tensor) and item.dim() == 0 and item.dtype != torch.bool and readable(item):
                if isinstance(samples_of(item), Lost):
                    self.notes.append("a number that the whole batch decides picks a part of a parameter")
                item = int(item)
            numbers.append(item)
        return tuple(numbers) if isinstance(index, tuple) else numbers[0]

    def random_state(self, name: str, args: Any, kwargs: Any) -> RandomState | None:
        """The generators' states before an operation that draws random numbers, to run it again with them."""
        return RandomState.of(self.device) if name in MAY_DRAW and draws(name, args, kwargs) else None

    def _doubt(self, out: Any) -> None:
        """What a foreign tensor enters is nobody's for certain."""
        if self.samples > 1 and torch.is_grad_enabled():
            for result in tensors_in([out]):
                if not isinstance(samples_of(result), Lost):
                    set_samples(result, Lost("a tensor that came from outside of torch's own functions", mixed=False))

    # -- randomness

    def _drawing(self, name: str, func: Callable, args: Any, kwargs: Any) -> tuple[Callable, Any, Any]:
        """An operation that draws random numbers, as this call wants it: silenced, refused, shared or as it is."""
        if not self.dropout and (silenced := in_eval_mode(name, args, kwargs)) is not None:
            return func, *silenced
        if self.randomness == "error":
            raise refusal(name)
        if self.refuse_random:
            raise DrewRandomNumbers
        self.random = True
        tensors = tensors_in(args) + tensors_in(kwargs.values())
        tracked = [t for t in map(self.find, tensors) if t is not None]
        if tracked:
            func, args, kwargs = in_place_by_name(name, func, args, kwargs)
        by_rule = bool(tracked) and any(samples_of(t) is not None for t in tensors)  # a rule takes it apart
        if self.randomness == "same" and self.samples > 1 and not by_rule:
            func = shared(func, self.samples, bool(tracked) and all(t.isometric for t in tracked))
        return func, args, kwargs

    def drew_unseen(self) -> None:
        """Numbers were drawn in the forward by an operation that is not known to draw, or was not seen."""
        if self.randomness == "error":
            raise refusal("an operation of the model")
        if self.refuse_random:
            raise DrewRandomNumbers
        if self.randomness == "same" and self.samples > 1:
            raise cannot_share("an operation of the model", "it was not seen")
        self.random = True

    def _watched(self, name: str, func: Callable, args: Any, kwargs: Any) -> Any:
        """Run an operation; one that is not known to draw random numbers must not."""
        if name in MAY_DRAW or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        before = RandomState.of(self.device)
        out = func(*args, **kwargs)
        if before.has_moved():
            raise refusal(name) if self.randomness == "error" else cannot_share(name, "it is not known how")
        return out
