"""What a bench reports."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """One number, and what it should not exceed."""

    name: str
    value: float
    goal: float | None = None
