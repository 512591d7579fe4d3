"""`explain`: the plan for a model and a batch, printed: uses, factors, contractions, FLOPs and bytes.

Beside it stand the plain step on the train samples and the floor, a plain step on the concatenated batch: what the val
rows cost that any method has to run.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from ghostfunc._axes import match_layers
from ghostfunc._batch import batch_size, cannot_join, join, plain
from ghostfunc._call import Params
from ghostfunc._factors import Later
from ghostfunc._fake import as_fake, fake_mode, new_mode
from ghostfunc._functionalize import ModelFn
from ghostfunc._planner import Budget, Shape, best_order
from ghostfunc._products import Along, Joint
from ghostfunc._randomness import DrewRandomNumbers, RandomState
from ghostfunc._run import Want, forward
from ghostfunc._sites import Site

aten = torch.ops.aten


@dataclass(frozen=True)
class Use:
    """One use of a parameter in the plan.

    Attributes:
        op: the operation.
        factor: "Outer", "Gather", "Dense", or "Later" where the operation has no rule.
        contraction: "tile stream", "direction", "Gram", or what is kept until the end of the backward.
        flops: products beside those of a plain training step, for the dot products and the directions.
        bytes: what is kept until the end of the backward.
        derived: whether the parameter enters through a tensor derived from it.
        fallback: whether the operation has no rule: exact, by a backward of the operation for each sample.
    """

    op: str
    factor: str
    contraction: str
    flops: int
    bytes: int
    derived: bool
    fallback: bool = False


@dataclass(frozen=True)
class Plan:
    """What `explain` found; print it.

    Attributes:
        samples: train samples.
        val_samples: validation samples; 0 where the direction is given.
        schedule: "joint" or "two-phase".
        probe: why a second backward will tell samples apart; empty where they are followed.
        shapes: the parameters' shapes.
        uses: the uses by parameter; an empty list for one that the losses do not depend on.
        plain_flops: of a plain training step on the train samples; None where it could not be counted.
        weight_flops: of these, the gradients of the weights of linear maps.
    """

    samples: int
    val_samples: int
    schedule: str
    probe: str
    shapes: dict[str, tuple[int, ...]]
    uses: dict[str, list[Use]]
    plain_flops: int | None = None
    weight_flops: int = 0

    @property
    def floor_flops(self) -> int | None:
        """Products of a plain step on the train and val samples together."""
        if self.plain_flops is None:
            return None
        return self.plain_flops * (self.samples + self.val_samples) // self.samples

    @property
    def total_flops(self) -> int | None:
        """Products of the call: `value_and_grad_dot`, or `ghost_grad_along` where the direction is given."""
        if self.plain_flops is None:
            return None
        if not self.val_samples:
            return self.plain_flops - self.weight_flops + self.flops
        of_val = self.plain_flops - (self.weight_flops if self.schedule == "joint" else 0)
        return self.plain_flops + of_val * self.val_samples // self.samples + self.flops

    @property
    def flops(self) -> int:
        """Products beside a plain training step on the train samples, without the val forward and backward."""
        return sum(use.flops for uses in self.uses.values() for use in uses)

    @property
    def coverage(self) -> dict[str, float]:
        """The share of all parameters, by number, that each rule covers, or several together; the largest first.

        "fallback" are those with a use that has no rule, "unused" those that the losses do not depend on.
        """
        sizes: dict[str, int] = {}
        for name, uses in self.uses.items():
            rules = " + ".join(sorted({use.op for use in uses})) or "unused"
            rules = "fallback" if any(use.fallback for use in uses) else rules
            sizes[rules] = sizes.get(rules, 0) + math.prod(self.shapes[name])
        whole = sum(sizes.values())
        return {rules: size / whole for rules, size in sorted(sizes.items(), key=lambda item: -item[1])}

    def __str__(self) -> str:
        rows = [("parameter", "shape", "use", "factor", "contraction", "MFLOP", "MB kept")]
        for name, uses in self.uses.items():
            shape = "x".join(map(str, self.shapes[name])) or "scalar"
            if not uses:
                rows.append((name, shape, "unused", "", "gradient is zero", "", ""))
            for use in uses:
                op = f"{use.op} (derived)" if use.derived else use.op
                rows.append(
                    (name, shape, op, use.factor, use.contraction, f"{use.flops / 1e6:.3g}", f"{use.bytes / 2**20:.3g}")
                )
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        head = f"{self.samples} train and {self.val_samples} val samples, {self.schedule}"
        if not self.val_samples:
            head = f"{self.samples} samples along a given direction"
        if self.probe:
            lines.append(f"a second backward tells samples apart: {self.probe}")
        covered = ", ".join(f"{share:.1%} {rules}" for rules, share in self.coverage.items())
        lines.append(f"parameters by rule: {covered}")
        lines.append(f"beside a plain step on the train samples: {self.flops / 1e9:.4g} GFLOP of products")
        if self.plain_flops is not None and self.floor_flops is not None and self.total_flops is not None:
            amounts = {"plain step": self.plain_flops, "floor": self.floor_flops, "this plan": self.total_flops}
            parts = [
                f"{what} {flops / 1e9:.4g} ({flops / max(1, self.plain_flops):.3f})" for what, flops in amounts.items()
            ]
            lines.append(f"GFLOP, and in plain steps: {', '.join(parts)}")
        return "\n".join([head, *lines])


def explain(
    model_fn: ModelFn,
    params: Params,
    batch: Any,
    val: Any = None,
    *,
    layers: str | Callable[[str], bool] = "",
    on_unsupported: str = "raise",
    schedule: str = "auto",
    memory: int | float | None = None,
) -> Plan:
    """The plan for a model and a batch, from one forward.

    Args:
        model_fn: `model_fn(params, batch) -> losses[B]`.
        params: parameters by name; those of a `FakeTensorMode` or on the meta device do, and the batch is then taken
            for one without values too.
        batch: the train batch.
        val: a validation batch, for the plan of `value_and_grad_dot`; without it, that of `ghost_grad_along`.
        layers: as in `ghost_grad_dot`.
        on_unsupported: as in `ghost_grad_dot`.
        schedule: as in `value_and_grad_dot`; "joint" is taken where it is possible.
        memory: as in `ghost_grad_dot`.

    Returns:
        A plan that prints as a table: for each use of each parameter its operation, factor, contraction, the
        FLOPs beside a plain training step, and the memory kept until the backward ends.

    Raises:
        UnsupportedUse: as in `ghost_grad_dot`.
        InteractingSamples: as in `ghost_grad_dot`.

    Example:
        >>> import torch, ghostfunc as gf
        >>> model_fn, params = gf.functionalize(torch.nn.Linear(4, 3), gf.classification_loss)
        >>> batch = (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
        >>> [use.contraction for use in gf.explain(model_fn, params, batch, batch).uses["weight"]]
        ['direction']
    """
    params = dict(params)
    batch, val = plain(batch), plain(val)
    n = batch_size(batch, "train")
    m = 0 if val is None else batch_size(val, "val")
    names = match_layers(layers, list(params))
    if schedule not in ("auto", "joint", "two-phase"):
        raise ValueError(f"schedule={schedule!r}: expected 'auto', 'joint' or 'two-phase'.")
    joint = m > 0 and schedule != "two-phase" and not cannot_join(batch, val)
    mode = fake_mode(params.values())
    if mode is not None:
        params = {name: as_fake(mode, p) for name, p in params.items()}
        batch, val = pytree.tree_map_only(Tensor, partial(as_fake, mode), (batch, val))
    before = RandomState.of(next(iter(params.values())).device)
    plan = partial(_plan, model_fn, params, batch, val, n, m, names, on_unsupported == "dense", Budget(memory))
    try:
        with mode or nullcontext():
            return plan(joint)
    except DrewRandomNumbers:
        with mode or nullcontext():
            return plan(False)
    finally:
        before.restore()


def _plan(
    model_fn: ModelFn,
    params: dict[str, Tensor],
    batch: Any,
    val: Any,
    n: int,
    m: int,
    names: frozenset[str],
    lenient: bool,
    budget: Budget,
    joint: bool,
) -> Plan:
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in params.values()) else torch.float32
    joined = Joint(names, n, m, each=False, fuse=not lenient, budget=budget)
    products = joined if joint else Along(names, n, {}, 1, budget)
    samples = n + m if joint else n
    want = Want(
        train=n, dtype=dtype, grads=m > 0, factors=names, more_taps=products.more_taps, plan=products.plan,
        lenient=lenient, refuse_random=joint,
    )  # fmt: skip
    mode, _, _, probe = forward(model_fn, params, join(batch, val) if joint else batch, samples, want)
    if not probe:
        products.plan([site for site in mode.sites if names.intersection(site.tracked.names)])
    uses = {
        name: [
            _use(site, n, samples, m, joint, probe, budget)
            for site in mode.sites
            if name in site.tracked.names
        ]
        for name in params
        if name in names
    }  # fmt: skip
    shapes = {name: tuple(p.shape) for name, p in params.items()}
    weight_flops = sum(
        2 * n * site.positions * site.tracked.real.numel() for site in mode.sites if site.kind == "outer"
    )
    plain = _flops_of_plain_step(model_fn, params, batch)
    return Plan(n, m, "joint" if joint else "two-phase", probe, shapes, uses, plain, weight_flops)


def _flops_of_plain_step(model_fn: ModelFn, params: dict[str, Tensor], batch: Any) -> int | None:
    """Products of forward and backward of the mean loss, counted with tensors that have no values.

    None for a model that decides by values. Attention is counted as plain products: a fused kernel does the same ones.
    """
    with warnings.catch_warnings(), fake_mode(params.values()) or new_mode() as fake:
        warnings.simplefilter("ignore")
        leaves = {name: as_fake(fake, p).requires_grad_() for name, p in params.items()}
        batch = pytree.tree_map_only(Tensor, partial(as_fake, fake), batch)
        counter = FlopCounterMode(display=False, custom_mapping={aten.convolution_backward: _of_convolution_backward})
        try:
            with counter, sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
                out = model_fn(leaves, batch)
                losses = out[0] if isinstance(out, tuple) else out
                torch.autograd.grad(losses.mean(), list(leaves.values()), allow_unused=True)
        except Exception:  # whatever a model does that needs values: the plan is whole without this count
            return None
    return counter.get_total_flops()


def _of_convolution_backward(
    g: Any, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: Any,
    output_padding: Any, groups: Any, mask: Any, **_: Any,
) -> int:  # fmt: skip
    """As many products for each of the two gradients as in the forward; torch's formula forgets groups."""
    return (mask[0] + mask[1]) * conv_flop_count(list(x), list(weight), list(g), transposed)


def _use(site: Site, n: int, samples: int, m: int, joint: bool, probe: str, budget: Budget) -> Use:
    shape = site.tracked.real.shape
    size = torch.finfo(site.dtype).bits // 8
    derived = site.tracked.derivation is not None
    if site.fallback:
        at_once = min(samples, Later.at_a_time(shape.numel(), size))
        how = f"no rule: a backward of `{site.op}` for each sample, {at_once} at a time"
        return Use(site.op, "Later", how, 0, at_once * shape.numel() * size, derived, fallback=True)
    if site.kind == "dense":
        kept = samples * shape.numel() * size
        return Use(site.op, "Dense", "per-sample gradients kept", 2 * n * shape.numel(), kept, derived)
    width_in = shape.numel() // site.width if site.kind == "outer" else 0
    kept = samples * site.positions * (site.width + width_in) * size
    if site.kind == "gather":
        return Use(site.op, "Gather", "grad-outputs kept", 0, kept, derived)
    val_rows = m * site.positions if joint else 0
    sizes = n, site.positions, shape[0], shape[1:].numel(), 1, val_rows
    order = best_order(Shape(*sizes, not joint, m > 0, size, site.tracked.real.device.type), budget.bytes)
    plain_step = 2 * n * site.positions * shape.numel() if m else 0
    if site.treatment == "fused" and not probe:
        pairs = sum(n * site.positions * m * look_up.positions for look_up in site.look_ups)  # with earlier look-ups
        crosses = 2 * 2 * pairs * shape[1:].numel()
        return Use(site.op, "Outer", order.name, order.flops - plain_step + crosses, 0, derived)
    return Use(site.op, "Outer", f"factors kept, then {order.name}", order.flops, kept, derived)
