"""The backends of ``csrc/`` share how a library is built and kept, and how it is called.

:mod:`.build` finds sources and keeps what was compiled in the user's cache, :mod:`.packing` makes
the structs that a library takes, and :mod:`.momentum_scan` has what the launchers of the scan do
wherever it runs. A library knows neither torch nor Python: it is bound by ctypes.
"""
