"""Interrupts that fall where a test wants them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence


def interrupted_at(
    step: int, function: Callable[[], object], where: Sequence[str], event: str = "line"
) -> bool:
    """Whether ``function`` took that many steps in files of ``where``, and was interrupted there.

    A step is an ``event`` of a trace, "line" or "opcode". Other files are left alone: in a callback
    of the garbage collector Python drops an interrupt.
    """
    count = 0

    def local(_frame, seen, _arg):
        nonlocal count
        count += seen == event
        if count == step and seen == event:
            raise KeyboardInterrupt
        return local

    def watched(frame, *_):
        if not any(part in frame.f_code.co_filename for part in where):
            return None
        frame.f_trace_opcodes = event == "opcode"
        return local

    sys.settrace(watched)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return count >= step
