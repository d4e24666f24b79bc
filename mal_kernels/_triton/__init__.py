"""Triton kernels and their launchers; a file for each of ``mal_kernels.ops``.

Imported only when ``backend="triton"`` is asked for. A launcher takes and returns plain tensors,
allocates with ``new_empty``, never reads a value on the host, and knows nothing of autograd.

Names in kernels: ``i_`` index of a program or loop, ``o_`` offsets, ``m_`` mask, ``p_`` pointer,
``b_`` block of values, ``d`` gradient; tuples of tensors ``t`` tokens, ``s`` states, ``f`` factors
of the inner gradients, ``g`` gradients, ``c`` what the backward carries, ``r`` its results, and
``M`` what is known at compilation (:mod:`mal_kernels._triton.chunks`); ``trace`` is the momentum
``S``, since ``momentum`` is the gate η; constexprs ``H`` heads, ``D`` features, ``E`` hidden width,
``BT`` tokens of a tile, ``BD ≥ D`` padded to a power of two, ``BE`` width of a slice of ``E``. A
tile never changes a result except for rounding. Each file lists ``EXAMPLES``: calls of its
launchers, on meta tensors, by which :mod:`mal_kernels._triton.aot` compiles every kernel for a GPU
that is not there.
"""
