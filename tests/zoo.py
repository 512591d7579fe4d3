"""What the tables of architectures share: cases with notes, padded batches of tokens, and float64 all the way."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from cases import BatchMaker, Built, Case, Draw, Params, functionalized
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import ghostfunc as gf

VOCABULARY = 37
POSITIONS = 6
LENGTHS = (6, 3, 5, 4)  # of the samples of a padded batch, in turn
FIRST_WORD = 3  # the ids below are pad, begin and end


class ZooCase(NamedTuple):
    """A named case, with what the table's test has to know about it.

    Attributes:
        name: the case's name.
        make: `make(dtype, device) -> Built`.
        family: the architecture, for the documentation.
        zero: parts of the names of trainable parameters whose gradients are zero but for rounding, such as the bias of
            keys without rotation: it adds the same number to every score of a query, and the softmax takes it away.
        padding: the side on which its batches are padded; empty where they are not.
    """

    name: str
    make: Callable[[torch.dtype, torch.device], Built]
    family: str = ""
    zero: tuple[str, ...] = ()
    padding: str = ""


class InDouble(TorchFunctionMode):
    """Casts to float32 become casts to float64: models that cast inside would round at 1e-7 in every method alike.

    The grouped product of experts has no float64 kernel, and becomes the operator that transformers has for that case.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        if func.__name__ == "_grouped_mm":
            return torch.ops.transformers.grouped_mm_fallback(args[0], args[1], kwargs["offs"])
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {key: torch.float64 if a is torch.float32 else a for key, a in (kwargs or {}).items()}
        return func(*args, **kwargs)


def in_double(case: Case | ZooCase, device: torch.device) -> Built:
    """A case in float64, without casts to float32."""
    made = case.make(torch.float64, device)

    def without_casts(params: Params, batch: Any) -> Tensor:
        with InDouble():
            return made.model_fn(params, batch)

    return made._replace(model_fn=without_casts)


def built(
    module: nn.Module, loss: Any, batch: BatchMaker, dtype: torch.dtype, device: torch.device, call: Any = None
) -> Built:
    """A case of a module in eval mode, in which no parameter is 0 or 1."""
    model_fn, params = functionalized(module.eval(), loss, dtype, device, call)
    return Built(model_fn, params, batch)


def tokens(
    dtype: torch.dtype, device: torch.device, *, padding: str = "", positions: bool = False, length: int = POSITIONS
) -> BatchMaker:
    """A maker of dict batches of ids `[n, T]`; padded ones have a mask, labels, and if asked for `position_ids`.

    A sample's first token has no label: padding on the left would have it predicted from a pad token.
    """

    def batch(n: int, seed: int) -> dict[str, Tensor]:
        ids = Draw(dtype, device, seed).ids(VOCABULARY, n, length, low=FIRST_WORD)
        if not padding:
            return {"input_ids": ids}
        lengths = torch.tensor([min(LENGTHS[i % len(LENGTHS)], length) for i in range(n)], device=device)
        mask = (torch.arange(length, device=device) < lengths[:, None]).long()
        mask = mask if padding == "right" else mask.flip(1)
        made = {
            "input_ids": ids * mask,
            "attention_mask": mask,
            "labels": ids.masked_fill((mask == 0) | (mask.cumsum(1) == 1), -100),
        }
        return made | ({"position_ids": positions_of(mask)} if positions else {})

    return batch


def positions_of(mask: Tensor) -> Tensor:
    """Positions that count a sample's own tokens, whatever stands before them."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def padded_further(batch: dict[str, Tensor], side: str, by: int = 2) -> dict[str, Tensor]:
    """The same samples in a longer batch."""
    fill = {"labels": -100}
    width = (0, by) if side == "right" else (by, 0)
    return {name: nn.functional.pad(t, width, value=fill.get(name, 0)) for name, t in batch.items()}


def causal_lm(
    module: nn.Module, dtype: torch.dtype, device: torch.device, *, padding: str = "", positions: bool = False
) -> Built:
    """A case of a causal language model of transformers, or of a module that is called like one."""
    return built(module, gf.causal_lm_loss, tokens(dtype, device, padding=padding, positions=positions), dtype, device)
