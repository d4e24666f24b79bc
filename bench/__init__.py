"""The benchmark measures what the memory costs: time, bytes and error, beside its rivals."""

from typing import Any, TypeAlias

Result: TypeAlias = dict[str, Any]  # what is measured, as JSON holds it
