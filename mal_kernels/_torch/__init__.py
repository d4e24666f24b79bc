"""The portable backend, ``backend="reference"``: every op in plain PyTorch, on any device.

The closed form of :mod:`mal_kernels.reference`, chunk by chunk, with backward passes derived by
hand: nothing is recorded, so they run wherever autograd calls them. Files have the names of the
ops; :mod:`.chunk` is one chunk of the memory, :mod:`.steps` its coefficients, :mod:`.grid` how
ragged rows lie on chunks.
"""
