"""Test-time neural memory for PyTorch, and Memory-as-a-Layer for frozen audio language models."""

from . import ops
from .adapter import MALAdapter, TurnReport
from .config import MALConfig
from .dialogues import Dialogue, DialogueStore
from .errors import (
    ArgumentError,
    AudioFileError,
    BackendUnavailable,
    CheckpointError,
    DetachedWarning,
    HostError,
    MALError,
    MALWarning,
    MissingPackage,
    NoDialogueWarning,
    StoreError,
    TrainingWarning,
)
from .hosts import HostSpec, register_host
from .memory import NeuralMemory
from .state import MemoryState

__version__ = "0.1.0"
__all__ = [
    "ArgumentError",
    "AudioFileError",
    "BackendUnavailable",
    "CheckpointError",
    "DetachedWarning",
    "Dialogue",
    "DialogueStore",
    "HostError",
    "HostSpec",
    "MALAdapter",
    "MALConfig",
    "MALError",
    "MALWarning",
    "MemoryState",
    "MissingPackage",
    "NeuralMemory",
    "NoDialogueWarning",
    "StoreError",
    "TrainingWarning",
    "TurnReport",
    "ops",
    "register_host",
]
