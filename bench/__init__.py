"""What the memory costs: time, memory and error, beside what else there is."""

from typing import Any, TypeAlias

Result: TypeAlias = dict[str, Any]  # what is measured, as JSON holds it
