"""Dot products and projections inside an ordinary PyTorch loop, which stays as it is."""

from ghostfunc._engine import GradDotProdEngine
from ghostfunc._engine_manager import GhostEngineManager
from ghostfunc._engine_output import EngineOutput
from ghostfunc._proj_engine import GradProjEngine

__all__ = ["EngineOutput", "GhostEngineManager", "GradDotProdEngine", "GradProjEngine"]
