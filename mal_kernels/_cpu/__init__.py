"""The native CPU kernels of ``csrc/cpu/``, called only through :mod:`mal_kernels.ops`.

:mod:`.build` compiles them, once and at their first use, :mod:`.library` finds or builds the
library for this processor, and each other file holds an op's launchers. A launcher takes and
returns plain tensors and knows nothing of autograd.
"""
