"""Stores behind the dialogues, under the name by which they are imported."""

from .dialogues.backing import DirectoryStore, KeyValueStore, MemoryStore, RedisStore

__all__ = ["DirectoryStore", "KeyValueStore", "MemoryStore", "RedisStore"]
