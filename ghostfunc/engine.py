"""Dot products inside an ordinary PyTorch loop: `engine(X, Y)` stands where `model(X, Y)` was."""

from ghostfunc._engine import EngineOutput, GradDotProdEngine
from ghostfunc._engine_manager import GhostEngineManager

__all__ = ["EngineOutput", "GhostEngineManager", "GradDotProdEngine"]
