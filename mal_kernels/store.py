"""Stores behind the dialogues, under the name by which they are imported."""

from .dialogues.backing import Change, KeyValueStore, MemoryStore, QueueingStore, SharedStore
from .dialogues.folder import DirectoryStore
from .dialogues.server import RedisStore

__all__ = [
    "Change",
    "DirectoryStore",
    "KeyValueStore",
    "MemoryStore",
    "QueueingStore",
    "RedisStore",
    "SharedStore",
]
