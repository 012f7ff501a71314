"""The one form of an error about an argument."""

from __future__ import annotations

from typing import NoReturn

__all__ = []


def fail(argument: str, got: object, expected: object) -> NoReturn:
    raise ValueError(f"{argument}: got {got}, expected {expected}")
