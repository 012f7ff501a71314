"""The one form of errors, and checks of numbers that a caller gives."""

from __future__ import annotations

import operator
from typing import Any, NoReturn

__all__ = ["at_least", "fail", "finite", "sequence_id"]

_INT32_MAX, _INT64_MAX = 2**31 - 1, 2**63 - 1
_FLOAT32_MAX = 3.4028234663852886e38


def fail(argument: str, got: object, expected: object) -> NoReturn:
    raise ValueError(f"{argument}: got {got}, expected {expected}")


def at_least(name: str, value: object, least: int, most: int | None = None) -> int:
    """value as an int from `least` to `most`, by default to the end of int32. NumPy's integers are
    taken too. A bool is refused, although it is an int of Python."""
    limit = _INT32_MAX if most is None else most
    if type(value) is int and least <= value <= limit:
        return value
    number = _index(value)
    if number is not None and least <= number <= limit:
        return number
    if most is not None:
        fail(name, _shown(value), f"{least} to {most}")
    too_large = number is not None and number > limit
    words = f"most {_INT32_MAX}" if too_large else f"least {least}"
    fail(name, _shown(value), f"an integer of at {words}")


def finite(name: str, value: Any) -> float:
    """value as a float that float32 holds: not NaN, not infinite."""
    if type(value) is float and -_FLOAT32_MAX <= value <= _FLOAT32_MAX:
        return value
    if getattr(value, "requires_grad", False):  # a float would drop its gradient without a word
        fail(name, "a tensor that requires a gradient", "a number")
    try:
        number = float(value) if _is_one(value) and not isinstance(value, (str, bytes)) else None
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = None
    if number is None or not -_FLOAT32_MAX <= number <= _FLOAT32_MAX:
        fail(name, _shown(value), "a finite number, as float32 holds it")
    return number


def sequence_id(name: str, value: object) -> int:
    """value as an int of 64 bits. The page manager knows whether the sequence exists."""
    number = value if type(value) is int else _index(value)
    if number is None or not -_INT64_MAX <= number <= _INT64_MAX:
        fail(name, _shown(value), "a sequence's id, an integer")
    return number


def _is_one(value: Any) -> bool:
    """Whether value is neither an array of several numbers nor a bool."""
    bools = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    return not bools and getattr(value, "ndim", 0) == 0


def _index(value: Any) -> int | None:
    try:
        return operator.index(value) if _is_one(value) else None
    except (TypeError, RuntimeError):
        return None


def _shown(value: object) -> str:
    """value in one line. Python refuses to print an integer of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."
