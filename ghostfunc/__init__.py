"""ghostfunc: what single training samples do to a model, exactly, in one backward pass."""

from ghostfunc._errors import InteractingSamples, UnsupportedUse, VerificationError
from ghostfunc._explain import explain
from ghostfunc._factors import Dense, Gather, Outer
from ghostfunc._functionalize import functionalize
from ghostfunc._losses import causal_lm_loss, classification_loss
from ghostfunc._oracle import per_sample_grad
from ghostfunc._second_order import InRunValues, ghost_grad_hess_grad, in_run_values
from ghostfunc._selection import greedy_select
from ghostfunc._transforms import (
    ValueAndGradDot,
    ghost_factors,
    ghost_grad_along,
    ghost_grad_dot,
    value_and_grad_dot,
)
from ghostfunc._verify import verify
from ghostfunc.dotlog import DotLog, read_dot_log
from ghostfunc.engine import EngineOutput, GhostEngineManager, GradDotProdEngine
from ghostfunc.ledger import InRunShapley

__all__ = [
    "Dense",
    "DotLog",
    "EngineOutput",
    "Gather",
    "GhostEngineManager",
    "GradDotProdEngine",
    "InRunShapley",
    "InRunValues",
    "InteractingSamples",
    "Outer",
    "UnsupportedUse",
    "ValueAndGradDot",
    "VerificationError",
    "causal_lm_loss",
    "classification_loss",
    "explain",
    "functionalize",
    "ghost_factors",
    "ghost_grad_along",
    "ghost_grad_dot",
    "ghost_grad_hess_grad",
    "greedy_select",
    "in_run_values",
    "per_sample_grad",
    "read_dot_log",
    "value_and_grad_dot",
    "verify",
]
