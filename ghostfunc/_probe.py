"""The probe: which sample each row of a grad-output belongs to, where the samples could not be followed.

The backward is linear in the weights w of the losses, so that the row g of a sample s satisfies

    g(w) = w_s g(1)

A pass with other weights therefore finds s, and finds rows in which samples meet. The weights are powers of two: a
row of one sample then scales exactly, rounding included, in every dtype, and nothing is left to a tolerance but the
order of an accelerator's atomic additions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ghostfunc._errors import InteractingSamples, interaction
from ghostfunc._interpreter import Interpreter, Site
from ghostfunc._sample_axis import Partition, RowMap, SampleAxis

_BASE = 8  # weights 1 to 128 in one pass
_FLOAT16_BASE = 2  # its greatest number is 65504


def probe(
    mode: Interpreter,
    losses: Tensor,
    weights: Tensor,
    sites: list[Site],
    cotangents: dict[Site, dict[str, Tensor | None]],
    doubt: str,
    *,
    precision: torch.dtype,
    keep: bool,
) -> dict[Site, Partition]:
    """The sample of each row, digit by digit of its number: one backward pass for each digit.

    Args:
        mode: the interpreter of the forward.
        losses: `[S]`, with their graph.
        weights: `[S]`, of the pass that was made.
        sites: the uses of parameters.
        cotangents: what that pass gave; "g" is a grad-output.
        doubt: why samples have to be probed, for messages.
        precision: the dtype of the fewest digits that the model computed in.
        keep: whether the graph is needed afterwards.

    Returns:
        The sample of each row, by site.

    Raises:
        InteractingSamples: if samples meet in a row.
    """
    samples = len(losses)
    probed = [site for site in sites if cotangents[site].get("g") is not None]
    of_row = {site: torch.zeros((), dtype=torch.long, device=losses.device) for site in probed}
    base = _FLOAT16_BASE if precision == torch.float16 else _BASE
    digit = 1
    while probed and digit < samples:
        number = torch.arange(samples, device=losses.device) // digit % base
        last = digit * base >= samples
        taps = [site.taps["g"] for site in probed]
        again = mode.gradients(losses, taps, weights * (2.0**number).to(weights), keep=keep or not last)
        for site, second in zip(probed, again, strict=True):
            first = cotangents[site]["g"]
            assert first is not None and second is not None
            if first.dim() == 0:
                raise InteractingSamples(interaction(f"`{site.op}` of {site.label} gives one number for all samples"))
            power, alone = _powers(first, second, base, precision)
            if not alone:
                raise InteractingSamples(
                    interaction(
                        f"{doubt}, and a probe of the backward found samples meeting in `{site.op}` of {site.label}"
                    )
                )
            of_row[site] = of_row[site] + digit * power
        digit *= base
    found: dict[Site, Partition] = {}
    for site in probed:
        first = cotangents[site]["g"]
        assert first is not None
        rows = of_row[site].clamp(max=samples - 1)
        if isinstance(site.axis, SampleAxis):
            followed, entries = site.axis.of_rows(first), _rows(first)
            if bool(((rows != followed) & (entries.square().sum(1) > _smallest(entries, precision))).any()):
                raise InteractingSamples(
                    interaction(f"{doubt}, and rows of `{site.op}` of {site.label} change their sample")
                )
            rows = followed
        found[site] = RowMap(rows, samples)
    return found


def _rows(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor).flatten(-2) if tensor.is_complex() else tensor
    return (real.flatten(0, -2) if real.dim() > 1 else real.unsqueeze(0)).double()


def _smallest(rows: Tensor, precision: torch.dtype) -> Tensor:
    """The square of a row that has no digits left: its entries are below the smallest normal number."""
    return rows.new_tensor(rows.shape[1] * torch.finfo(precision).smallest_normal ** 2)


def _powers(first: Tensor, second: Tensor, base: int, precision: torch.dtype) -> tuple[Tensor, bool]:
    """The power of two that each row of a probe was scaled by, and whether every row was scaled as a whole."""
    g, h = _rows(first), _rows(second)
    ratio = (g * h).sum(1) / g.square().sum(1).clamp(min=torch.finfo(torch.float64).tiny)
    power = ratio.clamp(1, 2 ** (base - 1)).log2().round()
    error = (h - 2 ** power[:, None] * g).square().sum(1)
    square = h.square().sum(1)
    eps = torch.finfo(torch.float64 if first.device.type == "cpu" else precision).eps
    allowed = _smallest(h, precision) + 64 * eps**2 * square
    if first.device.type != "cpu" and len(square):  # atomic additions come in another order in each pass
        allowed = allowed + eps * square + 16 * eps**2 * square.max()
    return power.long(), bool((error <= allowed).all())
