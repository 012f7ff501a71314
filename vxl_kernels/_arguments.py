"""The words of a refusal, and integers as arguments."""

from __future__ import annotations

import operator
from typing import NoReturn

__all__ = ["at_least", "fail"]


def fail(argument: str, got: object, expected: object) -> NoReturn:
    raise ValueError(f"{argument}: got {got}, expected {expected}")


def at_least(name: str, value: object, least: int) -> int:
    """value as an int, NumPy's integers too; a bool is one for Python only."""
    if type(value) is int and value >= least:
        return value
    try:
        number = operator.index(value) if not isinstance(value, bool) else least - 1  # type: ignore[arg-type]
    except TypeError:
        number = least - 1
    if number < least:
        fail(name, repr(value), f"an integer of at least {least}")
    return number
