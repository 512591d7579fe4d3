"""ghostfunc: what single training samples do to a model, exactly, in one backward pass."""

from ghostfunc._dots import BoundedDots, ValGradient, ValueAndGradDot
from ghostfunc._errors import InteractingSamples, UnsupportedUse, VerificationError
from ghostfunc._explain import explain
from ghostfunc._factors import Dense, Gather, Outer
from ghostfunc._fisher import FisherPreconditioner
from ghostfunc._functionalize import functionalize
from ghostfunc._gather import GatheredSamples, MeanGradient, gather_samples, mean_gradient
from ghostfunc._heads import attention_heads
from ghostfunc._kfac import ekfac, kfac
from ghostfunc._kronecker import KroneckerProjection
from ghostfunc._linear_cross_entropy import linear_cross_entropy
from ghostfunc._losses import causal_lm_loss, chunked_causal_lm_loss, classification_loss
from ghostfunc._make_projection import kronecker_projection
from ghostfunc._many import ClippedGrad, Quantities, ghost_quantities
from ghostfunc._oracle import per_sample_grad
from ghostfunc._planning import StepPlan, plan_step
from ghostfunc._preconditioners import adafactor, adam, diagonal
from ghostfunc._projection import ghost_grad_proj
from ghostfunc._quantities import Along, Clip, Dot, Gram, Norm, Project, Stream
from ghostfunc._ranks import OutOfStep, RankFailed
from ghostfunc._second_order import InRunValues, ghost_grad_hess_grad, in_run_values
from ghostfunc._selection import greedy_select
from ghostfunc._single import ghost_clipped_grad, ghost_grad_gram, ghost_grad_norm, ghost_grad_stream
from ghostfunc._tiles import Tile
from ghostfunc._tracin import TracIn, tracin
from ghostfunc._transforms import (
    ghost_factors,
    ghost_grad_along,
    ghost_grad_dot,
    val_gradient,
    value_and_grad_dot,
)
from ghostfunc._verify import verify
from ghostfunc.dotlog import DotLog, read_dot_log
from ghostfunc.engine import EngineOutput, GhostEngineManager, GradDotProdEngine, GradProjEngine
from ghostfunc.ledger import InRunShapley

__all__ = [
    "Along",
    "BoundedDots",
    "Clip",
    "ClippedGrad",
    "Dense",
    "Dot",
    "DotLog",
    "EngineOutput",
    "FisherPreconditioner",
    "Gather",
    "GatheredSamples",
    "GhostEngineManager",
    "GradDotProdEngine",
    "GradProjEngine",
    "Gram",
    "InRunShapley",
    "InRunValues",
    "InteractingSamples",
    "KroneckerProjection",
    "MeanGradient",
    "Norm",
    "OutOfStep",
    "Outer",
    "Project",
    "Quantities",
    "RankFailed",
    "StepPlan",
    "Stream",
    "Tile",
    "TracIn",
    "UnsupportedUse",
    "ValGradient",
    "ValueAndGradDot",
    "VerificationError",
    "adafactor",
    "adam",
    "attention_heads",
    "causal_lm_loss",
    "chunked_causal_lm_loss",
    "classification_loss",
    "diagonal",
    "ekfac",
    "explain",
    "functionalize",
    "gather_samples",
    "ghost_clipped_grad",
    "ghost_factors",
    "ghost_grad_along",
    "ghost_grad_dot",
    "ghost_grad_gram",
    "ghost_grad_hess_grad",
    "ghost_grad_norm",
    "ghost_grad_proj",
    "ghost_grad_stream",
    "ghost_quantities",
    "greedy_select",
    "in_run_values",
    "kfac",
    "kronecker_projection",
    "linear_cross_entropy",
    "mean_gradient",
    "per_sample_grad",
    "plan_step",
    "read_dot_log",
    "tracin",
    "val_gradient",
    "value_and_grad_dot",
    "verify",
]
