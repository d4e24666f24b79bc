"""Test-time neural memory for PyTorch, and Memory-as-a-Layer for frozen audio language models."""

from . import ops
from .errors import (
    ArgumentError,
    AudioFileError,
    BackendUnavailable,
    CheckpointError,
    HostError,
    MALError,
)
from .memory import NeuralMemory
from .state import MemoryState

__version__ = "0.1.0"
__all__ = [
    "ArgumentError",
    "AudioFileError",
    "BackendUnavailable",
    "CheckpointError",
    "HostError",
    "MALError",
    "MemoryState",
    "NeuralMemory",
    "ops",
]
