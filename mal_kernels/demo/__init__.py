"""The self-contained demo: synthetic dialogues, a small real Qwen2-Audio and a trained memory.

Nothing is imported here, so ``import mal_kernels`` and ``mal-kernels --help`` stay light.
"""
