"""The dialogues package keeps what is remembered between turns.

A :class:`Dialogue` is what the user holds. A :class:`DialogueStore` keeps a ``Snapshot`` of every
dialogue after each turn, in memory and in a backing (:mod:`~mal_kernels.dialogues.backing`), as
bytes of :mod:`~mal_kernels.dialogues.files`.
"""

from .dialogue import Dialogue
from .report import TurnReport
from .store import DialogueStore

__all__ = ["Dialogue", "DialogueStore", "TurnReport"]
