"""The probe: which sample each row of a grad-output belongs to, where the samples could not be followed.

The backward is linear in the weights w of the losses, so that the row g of a sample s satisfies

    g(w) = w_s g(1)

A pass with other weights therefore finds s, and finds rows in which samples meet. The weights are powers of two: a
row of one sample then scales exactly, rounding included, in every dtype, and nothing is left to a tolerance but atomic
additions, which come in another order in each pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ghostfunc._errors import InteractingSamples, interaction
from ghostfunc._interpreter import Interpreter
from ghostfunc._sample_axis import Partition, RowMap, SampleAxis
from ghostfunc._sites import Site

_BASE = 8  # weights 1 to 128 in one pass
_FLOAT16_BASE = 2  # its greatest number is 65504
_REPETITIONS = 3  # of a pass, to see whether it gives the same


def probe(
    mode: Interpreter,
    losses: Tensor,
    weights: Tensor,
    sites: list[Site],
    doubt: str,
) -> dict[Site, Partition]:
    """The sample of each row, digit by digit of its number: one backward pass for each digit.

    Args:
        mode: the interpreter of the forward.
        losses: `[S]`, with their graph.
        weights: `[S]`, of the pass that was made.
        sites: the uses of parameters, with what that pass left in `values`, where it stays; "g" is a grad-output.
        doubt: why samples have to be probed, for messages.

    Returns:
        The sample of each row, by site.

    Raises:
        InteractingSamples: if samples meet in a row.
    """
    samples, precision = len(losses), mode.precision
    firsts = {site: g for site in sites if (g := site.values.get("g")) is not None}
    of_row = {site: torch.zeros((), dtype=torch.long, device=losses.device) for site in firsts}
    base = _FLOAT16_BASE if precision == torch.float16 else _BASE
    vary = True if losses.device.type != "cpu" else None  # known once an exact comparison fails
    digit = 1
    while firsts and digit < samples:
        number = torch.arange(samples, device=losses.device) // digit % base
        again = _grad_outputs(mode, losses, weights * (2.0**number).to(weights), firsts)
        for (site, first), second in zip(firsts.items(), again, strict=True):
            if first.dim() == 0:
                raise InteractingSamples(interaction(f"`{site.op}` of {site.label} gives one number for all samples"))
            power, whole = _powers(first, second, base, precision, sums_vary=vary or False)
            if not whole and vary is None:
                vary = _sums_vary(mode, losses, weights, firsts)
                power, whole = _powers(first, second, base, precision, sums_vary=vary)
            if not whole:
                raise InteractingSamples(
                    interaction(
                        f"{doubt}, and a probe of the backward found samples meeting in `{site.op}` of {site.label}"
                    )
                )
            of_row[site] = of_row[site] + digit * power
        digit *= base
    found: dict[Site, Partition] = {}
    for site, first in firsts.items():
        rows = of_row[site].clamp(max=samples - 1)
        if isinstance(site.axis, SampleAxis):
            followed, entries = site.axis.of_rows(first), _rows(first)
            reliable = entries.square().sum(1) > _noise(entries, precision, vary or False)
            if bool(((rows != followed) & reliable).any()):
                raise InteractingSamples(
                    interaction(f"{doubt}, and rows of `{site.op}` of {site.label} change their sample")
                )
            rows = followed
        found[site] = RowMap(rows, samples)
        site.values = {"g": first}
    return found


def _grad_outputs(mode: Interpreter, losses: Tensor, weights: Tensor, firsts: dict[Site, Tensor]) -> list[Tensor]:
    """The grad-outputs of a pass with other weights."""
    taps = {id(site.tap): site.tap for site in firsts if site.tap is not None}
    mode.gradients(losses, list(taps.values()), weights, keep=True)
    return [site.values["g"] for site in firsts]


def _rows(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor).flatten(-2) if tensor.is_complex() else tensor
    return (real.flatten(0, -2) if real.dim() > 1 else real.unsqueeze(0)).double()


def _noise(rows: Tensor, precision: torch.dtype, sums_vary: bool) -> Tensor:
    """The square of a row that has no digits left: of numbers below the smallest normal one, or of what sums leave."""
    noise = rows.new_tensor(rows.shape[1] * torch.finfo(precision).smallest_normal ** 2)
    if sums_vary and len(rows):
        noise = noise + 16 * torch.finfo(precision).eps ** 2 * rows.square().sum(1).max()
    return noise


def _sums_vary(mode: Interpreter, losses: Tensor, weights: Tensor, firsts: dict[Site, Tensor]) -> bool:
    """Whether equal passes differ: atomic additions, of threads or of an accelerator, come in any order."""
    for _ in range(_REPETITIONS):
        again = _grad_outputs(mode, losses, weights, firsts)
        if any(not torch.equal(g, first) for g, first in zip(again, firsts.values(), strict=True)):
            return True
    return False


def _powers(
    first: Tensor, second: Tensor, base: int, precision: torch.dtype, *, sums_vary: bool
) -> tuple[Tensor, bool]:
    """The power of two that each row of a probe was scaled by, and whether every row was scaled as a whole."""
    g, h = _rows(first), _rows(second)
    ratio = (g * h).sum(1) / g.square().sum(1).clamp(min=torch.finfo(torch.float64).tiny)
    power = ratio.clamp(1, 2 ** (base - 1)).log2().round()
    error = (h - 2 ** power[:, None] * g).square().sum(1)
    tolerance = torch.finfo(precision).eps ** 0.5 if sums_vary else 8 * torch.finfo(torch.float64).eps
    allowed = _noise(h, precision, sums_vary) + tolerance**2 * h.square().sum(1)
    return power.long(), bool((error <= allowed).all())
