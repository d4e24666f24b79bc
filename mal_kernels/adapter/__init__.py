"""Memory-as-a-Layer on a frozen audio language model: :class:`MALAdapter`."""

from ..dialogues import TurnReport
from .adapter import MALAdapter

__all__ = ["MALAdapter", "TurnReport"]
