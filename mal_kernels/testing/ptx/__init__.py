"""A machine for PTX on the CPU: runs compiled kernels and reports what a GPU would punish.

The emulation of :mod:`..emulation` and the repaired interpreter run *sources*. Here runs what the
compilers made of them: Triton's PTX for sm_80 and sm_90 (layouts, pipelining, swizzles, wgmma
descriptors and all), and nvcc's for sm_90a through the compiled host code of ``csrc/``.

:mod:`.source` finds a kernel in a text, :mod:`.decode` makes numbers of its instructions and
:mod:`.flow` says where lanes that part meet again; :mod:`.machine` runs the numbers in
``csrc/ptx/`` (g++, built once). :mod:`.triton` and :mod:`.cuda` take the place of a launch, so that
ops run unchanged on CPU tensors. ``python -m bench.ptx`` counts what a tile of tokens costs.

It reports accesses outside of the tensors given or misaligned, shared memory that is read before
it is written, races inside a block, a cluster and the grid, registers of a wgmma and targets of a
cp.async touched before they are waited for, a missing wgmma.fence or fence.proxy.async, barriers,
matrix instructions and shuffles under divergence, deadlocks, and blocks that leave while others
read their shared memory.

It does not show what ptxas makes of the PTX, speed, memory order weaker than barriers and fences,
nor a sentence of the manual that was misread here and in the kernel alike.
"""
