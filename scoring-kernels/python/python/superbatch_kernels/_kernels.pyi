"""The extension module. Its arguments are those of `superbatch_kernels.select`, checked."""

from typing import Any

__version__: str

def select(request: dict[str, Any]) -> dict[str, Any]:
    """Draws a sub-batch. Arrays come back as memory: int64 and float64."""

def words() -> tuple[list[str], list[str], list[str]]:
    """The kernels' policies, losses and criteria."""

def defaults() -> dict[str, Any]:
    """The kernels' defaults, by argument."""

def readers() -> dict[str, str]:
    """The arguments that a single policy reads, each with it."""
