"""One forward and one backward of `model_fn` under the interpreter: losses, gradient, factors and fused contractions.

    losses = model_fn(sentinels, batch)                       the interpreter puts rules around parameter uses
    backward of sum_i w_i losses_i                             every tap's cotangent is a factor or its contraction

The plan (which sites are fused) is made between the two, when every use of every parameter is known.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from ghostfunc._contract import total
from ghostfunc._errors import InteractingSamples, UnsupportedUse, interaction
from ghostfunc._factors import Dense, Factor
from ghostfunc._functionalize import ModelFn
from ghostfunc._interpreter import Interpreter
from ghostfunc._nesting import functorch_level, own_level, readable, recorded, uncompiled, unwrapped
from ghostfunc._probe import probe
from ghostfunc._randomness import RandomState
from ghostfunc._ranks import Ranks
from ghostfunc._rules import apply_rule
from ghostfunc._run_losses import check_losses, why_doubted
from ghostfunc._run_result import Run
from ghostfunc._sample_axis import Partition, SampleAxis, set_samples
from ghostfunc._segments import Segments
from ghostfunc._sites import Site, Tracked

# How far a sample's loss alone may be from its loss in the batch, by the precision that the model computed in.
_ALONE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 3e-3}


@dataclass(frozen=True)
class Want:
    """What a run is asked for.

    Attributes:
        grads: whether the sum of the gradients of the first `train` samples is wanted.
        train: how many samples, the first ones, enter the gradient.
        weights: the cotangent of the losses: the weight of each sample, `[S]`; None for ones.
        factors: names of the parameters whose factors are wanted.
        randomness: "different", "same" or "error": whether samples draw the same random numbers, or none may be drawn.
        dropout: whether dropout draws; otherwise it is the identity.
        segments: sets of positions that are the samples of factors, in place of the batch's; `train` counts these.
        refuse_random: raise `DrewRandomNumbers` where the forward draws random numbers.
        has_aux: whether `model_fn` returns `(losses, aux)`.
        lenient: whether a use without a rule is paid for with a backward pass for each sample.
        batches: names and sizes of the batches that the samples come from, for messages.
        more_taps: names of the contractions that may be fused with a site.
        narrow: a matrix that a site's activation is multiplied with in the forward, for the backward to keep that
            alone; called with the site and the side of the stored weight that the activation meets.
        plan: gives each site its treatment, once all are known.
        ranks: those that have the shards of sharded parameters.
    """

    train: int
    dtype: torch.dtype
    grads: bool = False
    weights: Tensor | None = None
    factors: frozenset[str] = frozenset()
    randomness: str = "different"
    dropout: bool = True
    segments: Segments | None = None
    refuse_random: bool = False
    has_aux: bool = False
    lenient: bool = False
    batches: tuple[tuple[str, int], ...] = ()
    more_taps: Callable[[Site], Collection[str]] = lambda site: ()
    narrow: Callable[[Site, str], Tensor | None] = lambda site, side: None
    plan: Callable[[list[Site]], None] = lambda sites: None
    ranks: Ranks | None = None


def run(model_fn: ModelFn, params: Mapping[str, Tensor], batch: Any, samples: int, want: Want) -> Run:
    """Run `model_fn` forward and backward once.

    Args:
        model_fn: `model_fn(params, batch) -> losses[S]`.
        params: parameters by name.
        batch: a pytree of tensors `[S, ...]`.
        samples: S.
        want: what is wanted.

    Returns:
        The losses and what was wanted.

    Raises:
        UnsupportedUse: if a parameter's use is not accounted for.
        InteractingSamples: if a sample's loss depends on another sample.
    """
    with uncompiled(), own_level() as level:
        return _run(model_fn, params, batch, samples, want, level)


def _run(
    model_fn: ModelFn, params: Mapping[str, Tensor], batch: Any, samples: int, want: Want, level: int | None
) -> Run:
    mode, losses, aux, doubt = forward(model_fn, params, batch, samples, want)
    if want.segments is not None and doubt:
        raise UnsupportedUse(
            f"{doubt}; with segments= no probe of the backward can tell the rows apart. Use operations that are "
            "followed, or one document in a row.",
            tuple(params),
        )
    if level is not None and doubt:
        raise UnsupportedUse(
            f"{doubt}, and inside a functorch transform (vmap, grad or jvp of the call) no probe of the backward can "
            "tell the samples apart. Call it outside of the transform, or use operations that are followed.",
            tuple(params),
        )
    if recorded(losses) and (doubt or (mode.notes and samples > 1)):
        raise UnsupportedUse(
            f"{doubt or mode.notes[0]}, and while torch.compile records the call no probe of the backward can tell the "
            "samples apart. Call it outside of torch.compile, or use operations that are followed.",
            tuple(params),
        )
    if mode.shards is not None and (doubt or (mode.notes and samples > 1)):
        raise UnsupportedUse(
            f"{doubt or mode.notes[0]}, and with sharded parameters no probe can tell the samples apart: it takes as "
            "many passes as a rank has samples. Use operations that are followed, or unsharded parameters.",
            tuple(params),
        )
    for site in mode.sites:
        site.train = want.train
        site.wants_grad = want.grads
        wanted = any(name in want.factors for name in site.tracked.names)
        site.treatment = "factor" if wanted or level is not None else "grad" if want.grads else "off"
        if doubt:
            site.treatment = "raw"
    if not doubt and level is None:
        want.plan([site for site in mode.sites if site.treatment == "factor"])
    with torch.autocast(losses.device.type, enabled=False):
        result = _backward(mode, losses, want, doubt, level)
    if doubt:
        _check_alone(model_fn, params, batch, range(samples), want, mode, losses.detach(), doubt)
    elif mode.notes and samples > 1 and level is None and readable(losses):
        _check_alone(model_fn, params, batch, range(samples - 1, samples), want, mode, result.losses, mode.notes[0])
    result.aux = aux
    return result


def forward(
    model_fn: ModelFn, params: Mapping[str, Tensor], batch: Any, samples: int, want: Want
) -> tuple[Interpreter, Tensor, Any, str]:
    """The forward of a run: `(interpreter, losses, aux, why samples must be probed or "")`."""
    nested = functorch_level() is not None
    mode = Interpreter(
        params,
        samples,
        randomness=want.randomness,
        dropout=want.dropout,
        refuse_random=want.refuse_random,
        apply_rule=apply_rule,
        more_taps=want.more_taps,
        narrow=want.narrow,
        dtype=want.dtype,
        lenient=want.lenient,
        nested=nested,
        segments=want.segments,
        ranks=want.ranks,
    )

    def carrying(tensor: Tensor) -> Tensor:
        alias = _carrying(tensor, samples)
        if want.segments is not None:
            want.segments.seed(alias)
        return alias

    # Only the math kernel of attention has a derivative of its backward.
    kernels = sdpa_kernel(SDPBackend.MATH) if nested else nullcontext()
    before = None if torch.compiler.is_compiling() else RandomState.of(mode.device)
    saving = nullcontext() if mode.shards is None else mode.shards.saved_as_shards()
    with torch.enable_grad(), kernels, uncompiled(), saving, mode:
        out = model_fn(mode.sentinels, pytree.tree_map_only(Tensor, carrying, batch))
    if before is not None and not mode.random and before.has_moved():
        mode.drew_unseen()
    losses, aux = out if want.has_aux else (out, None)
    try:
        check_losses(losses, samples, want.batches)
    except ValueError:
        mode.refuse_unseen(losses)
        raise
    losses, without_data = _with_samples(mode, losses, samples)
    doubt = why_doubted(losses, mode.sites, samples) or without_data
    aux = pytree.tree_map_only(Tensor, lambda t: _out(mode.real(t), mode.level if nested else None), aux)
    return mode, mode.real(losses), aux, doubt


def _with_samples(mode: Interpreter, losses: Tensor, samples: int) -> tuple[Tensor, str]:
    """Losses that come from parameters alone as a use of these with data, and why they are doubted; others as they are.

    Features that leave torch and come back are such data: each sample's loss is compared with its loss alone.
    """
    if mode.find(losses) is None:
        return losses, ""
    ones = losses.detach().new_ones(samples, 1)  # the probe reads rows
    set_samples(ones, SampleAxis(0, samples))
    with torch.enable_grad(), mode:
        losses = torch.squeeze(ones * torch.unsqueeze(losses, 1), 1)
    return losses, "the losses do not come from the batch by torch operations" if samples > 1 else ""


def _check_alone(
    model_fn: ModelFn,
    params: Mapping[str, Tensor],
    batch: Any,
    samples: Iterable[int],
    want: Want,
    mode: Interpreter,
    losses: Tensor,
    doubt: str,
) -> None:
    """Raise where the loss of one of these samples alone is not its loss in the batch, both without dropout."""
    before = RandomState.of(mode.device) if mode.random else None

    def losses_of(part: Any, size: int) -> Tensor:
        quiet = Interpreter(params, size, randomness="same", dropout=False, apply_rule=apply_rule, dtype=want.dtype)
        part = pytree.tree_map_only(Tensor, lambda t: _carrying(t, size), part)
        with torch.no_grad(), quiet:
            out = model_fn(dict(params), part) if before is None else before.replay(model_fn, dict(params), part)
        return out[0] if want.has_aux else out

    together = losses_of(batch, len(losses)) if mode.random else losses
    tolerance = _ALONE_TOLERANCE.get(mode.precision, 3e-2)
    for sample in samples:
        alone = losses_of(pytree.tree_map_only(Tensor, lambda t, s=sample: t[s : s + 1], batch), 1)
        error = (alone.reshape(-1)[0] - together[sample]).abs()
        if not float(error) <= tolerance * (1 + float(together[sample].abs())):
            raise InteractingSamples(
                interaction(
                    f"{doubt}, and sample {sample} has loss {float(alone):.6g} alone, "
                    f"{float(together[sample]):.6g} here"
                )
            )


def _carrying(tensor: Tensor, samples: int) -> Tensor:
    alias = tensor.view_as(tensor)
    set_samples(alias, SampleAxis(0, samples))
    return alias


def _out(tensor: Tensor, level: int | None) -> Tensor:
    """A value of a run as the caller gets it: without its graph, or as a value of the outer transform."""
    return tensor.detach() if level is None else unwrapped(tensor, level)


def _factor_out(factor: Factor, level: int | None) -> Factor:
    if level is None and not any(isinstance(v, Tensor) and v.requires_grad for v in vars(factor).values()):
        return factor
    given = [f.name for f in fields(factor) if f.init]
    tensors = {name: v for name in given if isinstance(v := getattr(factor, name), Tensor)}
    return replace(factor, **{name: _out(value, level) for name, value in tensors.items()})


def _backward(mode: Interpreter, losses: Tensor, want: Want, doubt: str, level: int | None) -> Run:
    from_factors = bool(doubt) or level is not None  # the gradient is summed after the backward, not inside it
    sites = [site for site in mode.sites if site.treatment != "off"]
    asked = [site for site in sites if site.treatment != "grad"]
    taps = list({id(site.tap): site.tap for site in asked if site.tap is not None}.values())  # one for each operation
    leaves = mode.leaves
    inputs = list(taps)
    inputs += list(leaves.values()) if want.grads and not from_factors else []
    watched = mode.tracked
    inputs += [t.sentinel for t in watched]
    weights = torch.ones_like(losses) if want.weights is None else want.weights.to(losses)
    if recorded(losses):  # the check of `check_losses`, when the compiled graph runs
        names, sizes = zip(*(want.batches or (("given", len(losses)),)), strict=True)
        weights = torch.ops.ghostfunc.finite(weights, losses.detach(), names, sizes)
    keep = bool(doubt) or want.lenient or mode.nested
    values: list[Tensor | None] = [None] * len(inputs)
    if losses.requires_grad:
        values = list(mode.gradients(losses, inputs, weights, keep=keep))

    if mode.nested:
        of_tap = {id(tap): value for tap, value in zip(taps, values, strict=False)}
        for site in asked:
            value = of_tap[id(site.tap)]
            site.values = {} if value is None else {"g": value}
    uncounted = [t for t, value in zip(watched, values[len(values) - len(watched) :], strict=True) if value is not None]
    if uncounted and (want.segments is not None or not (want.lenient or mode.nested)):
        _refuse(uncounted, sharded=mode.shards is not None)

    result = Run(_out(losses, level), None, {}, mode.tracked, {}, {}, leaves)
    partitions: dict[Site, Partition] = {}
    if doubt:
        partitions = probe(mode, losses, weights, sites, doubt)
    for site in sites:
        if site.treatment == "fused":
            if site.values:
                result.fused[site] = site.values
        elif site.treatment in ("factor", "raw"):
            samples = partitions.get(site) if doubt or not site.values else site.partition()
            factor = None if samples is None else site.factor(samples)
            if factor is not None:
                result.factors[site] = factor

    if want.grads:
        count = len(leaves)
        found = values[len(taps) : len(taps) + count] if not from_factors else [None] * count
        result.grads = {
            name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(leaves.items(), found, strict=True)
        }
        if from_factors:
            for site, factor in result.factors.items():
                _add_gradient(result, site.tracked, total(factor.part(0, want.train), site.tracked.real.shape))
    if uncounted:
        _dense_by_backwards(mode, losses, weights, uncounted, want, result, level)
    _pull_complex(result, want.dtype)
    if want.grads:
        counted = {name for site in result.factors for name in site.tracked.names} if from_factors else set()
        counted |= {name for tracked in uncounted for name in tracked.names}
        result.unused = tuple(
            name for name, grad in zip(leaves, found, strict=True) if grad is None and name not in counted
        )
    if from_factors:  # factors of parameters that only the gradient needed
        result.factors = {s: f for s, f in result.factors.items() if any(n in want.factors for n in s.tracked.names)}
    result.factors = {site: _factor_out(factor, level) for site, factor in result.factors.items()}
    for site in mode.sites:  # nothing that they know waits for the garbage collector
        site.make = site.contract = site.ids = site.tap = None
        site.values = {}
        site.tracked.sites.clear()
    result.grads = {name: _out(grad, level) for name, grad in result.grads.items()}
    return result


def _refuse(uncounted: list[Tracked], *, sharded: bool) -> None:
    names = tuple(dict.fromkeys(name for t in uncounted for name in t.names))
    shapes = ", ".join(f"{name} {tuple(t.sentinel.shape)}" for t in uncounted for name in t.names)
    how = "; ".join(dict.fromkeys(t.unseen for t in uncounted if t.unseen)) or (
        "by an operation that the interpreter does not see (a torch.autograd.Function of your own, torch.jit.script, "
        "a C++ extension)"
    )
    dense = "" if sharded else "pass on_unsupported='dense' (exact, one backward pass for each sample), "
    raise UnsupportedUse(
        f"{shapes}: used {how}, so that its per-sample gradient would be missing. Freeze the parameter "
        f"(requires_grad_(False)), {dense}or write the operation in torch functions.",
        names,
    )


def _add_gradient(result: Run, tracked: Tracked, gradient: Tensor) -> None:
    for name in tracked.names:
        pulled = result.pull(tracked, name, gradient.unsqueeze(0))[0]
        result.grads[name] = result.grads[name] + pulled.to(result.grads[name].dtype)


def _dense_by_backwards(
    mode: Interpreter,
    losses: Tensor,
    weights: Tensor,
    uncounted: list[Tracked],
    want: Want,
    result: Run,
    level: int | None,
) -> None:
    """Per-sample gradients of parameters without a rule: one backward pass for each sample."""
    for site in mode.sites:
        site.treatment = "off"
    rows: list[list[Tensor]] = [[] for _ in uncounted]
    for sample in range(len(losses)):
        found = mode.gradients(losses[sample], [t.sentinel for t in uncounted], weights[sample], keep=True)
        for row, tracked, grad in zip(rows, uncounted, found, strict=True):
            row.append(torch.zeros_like(tracked.real) if grad is None else _out(grad, level))
    for tracked, row in zip(uncounted, rows, strict=True):
        stacked = torch.stack(row)
        factor = Dense(stacked if stacked.is_complex() else stacked.to(want.dtype))
        if any(name in want.factors for name in tracked.names):
            result.factors[Site(tracked, "one backward pass for each sample", "dense", dtype=want.dtype)] = factor
        if want.grads:
            _add_gradient(result, tracked, factor.grad[: want.train].sum(0))


def _pull_complex(result: Run, dtype: torch.dtype) -> None:
    """Factors of complex tensors as factors of the real parameters that these come from."""
    parameters = {t.names[0]: t for t in result.tracked if t.derivation is None}
    for site, factor in list(result.factors.items()):
        if site.tracked.real.is_complex():
            del result.factors[site]
            dense = factor.dense(site.tracked.real.shape)
            for name in site.tracked.names:
                pulled = Dense(result.pull(site.tracked, name, dense).to(dtype))
                result.factors[Site(parameters[name], site.op, "dense", dtype=dtype)] = pulled
