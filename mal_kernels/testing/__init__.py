"""Helpers for testing code that uses the library: tiny host models, inputs, error budgets.

:mod:`~mal_kernels.testing.numerics` judges a kernel against the definition in float64,
:mod:`~mal_kernels.testing.hosts` makes tiny audio language models with random weights,
:mod:`~mal_kernels.testing.oracles` drives implementations by other people,
:mod:`~mal_kernels.testing.interpreter` makes Triton's interpreter trustworthy, and
:mod:`~mal_kernels.testing.emulation` runs the CUDA kernels on threads of the CPU.
"""

from .hosts import cache_name, tiny_host, tiny_inputs
from .numerics import (
    Inputs,
    assert_all_within_budget,
    assert_parity,
    assert_within_budget,
    closed_form,
    low_precision,
    make_inputs,
    results,
)

__all__ = [
    "Inputs",
    "assert_all_within_budget",
    "assert_parity",
    "assert_within_budget",
    "cache_name",
    "closed_form",
    "low_precision",
    "make_inputs",
    "results",
    "tiny_host",
    "tiny_inputs",
]
