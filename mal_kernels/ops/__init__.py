"""The functional API: one file per op, contracts only."""

from ..state import MemoryUpdate, MomentumScan, NeuralMemoryOutput, ReadParams
from ._backend import explain
from .aligned_residual_read import aligned_residual_read, aligned_residual_read_
from .memory_read import memory_read
from .memory_update import memory_update
from .momentum_scan import momentum_scan
from .neural_memory import neural_memory

__all__ = [
    "MemoryUpdate",
    "MomentumScan",
    "NeuralMemoryOutput",
    "ReadParams",
    "aligned_residual_read",
    "aligned_residual_read_",
    "explain",
    "memory_read",
    "memory_update",
    "momentum_scan",
    "neural_memory",
]
