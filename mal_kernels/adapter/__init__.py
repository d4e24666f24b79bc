"""Memory-as-a-Layer on a frozen audio language model: :class:`MALAdapter`."""

from .adapter import MALAdapter
from .report import TurnReport

__all__ = ["MALAdapter", "TurnReport"]
