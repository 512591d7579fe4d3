"""ghostfunc: what single training samples do to a model, exactly, in one backward pass."""

from ghostfunc._errors import InteractingSamples, UnsupportedUse
from ghostfunc._factors import Dense, Gather, Outer
from ghostfunc._functionalize import functionalize
from ghostfunc._losses import causal_lm_loss, classification_loss
from ghostfunc._oracle import per_sample_grad
from ghostfunc._transforms import (
    ValueAndGradDot,
    ghost_factors,
    ghost_grad_along,
    ghost_grad_dot,
    value_and_grad_dot,
)

__all__ = [
    "Dense",
    "Gather",
    "InteractingSamples",
    "Outer",
    "UnsupportedUse",
    "ValueAndGradDot",
    "causal_lm_loss",
    "classification_loss",
    "functionalize",
    "ghost_factors",
    "ghost_grad_along",
    "ghost_grad_dot",
    "per_sample_grad",
    "value_and_grad_dot",
]
