"""Benchmarks of ``mal_kernels``; not installed with it."""
