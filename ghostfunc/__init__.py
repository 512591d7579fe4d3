"""ghostfunc: what single training samples do to a model, exactly, in one backward pass."""

from ghostfunc._errors import InteractingSamples, UnsupportedUse
from ghostfunc._functionalize import functionalize
from ghostfunc._losses import causal_lm_loss, classification_loss
from ghostfunc._oracle import per_sample_grad
from ghostfunc._transforms import ValueAndGradDot, value_and_grad_dot

__all__ = [
    "InteractingSamples",
    "UnsupportedUse",
    "ValueAndGradDot",
    "causal_lm_loss",
    "classification_loss",
    "functionalize",
    "per_sample_grad",
    "value_and_grad_dot",
]
