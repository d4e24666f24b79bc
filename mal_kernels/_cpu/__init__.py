"""The native CPU kernels of ``csrc/cpu/``, called only through :mod:`mal_kernels.ops`.

The hash of clips is no op: :mod:`mal_kernels.hosts` calls it where the library is loaded already.

:mod:`.build` compiles them, once and at their first use, :mod:`.library` finds or builds the
library for this processor, and each other file holds an op's launchers. A launcher takes and
returns plain tensors and knows nothing of autograd.
"""
