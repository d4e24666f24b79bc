"""The CUDA C++ kernels of ``csrc/``, called only through :mod:`mal_kernels.ops`.

:mod:`.build` compiles them (nothing is compiled at a plain install), :mod:`.library` finds or
builds the library and calls it, and each other file holds an op's launchers. A launcher takes and
returns plain tensors, allocates with ``new_empty``, never reads a value on the host, launches on
the current stream, and knows nothing of autograd.

``python -m mal_kernels._cuda`` builds the library ahead of its first use.
"""
