"""Errors about an argument, in one form."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from vxl_model import VideoXLConfig

__all__ = ["check_ratio", "fail"]


# As `vxl_model.errors.fail`. Importing that package loads torch and transformers, and the score of
# saved answers needs neither.
def fail(argument: str, got: object, expected: str) -> NoReturn:
    """Raises a ValueError."""
    raise ValueError(f"{argument}: got {got}, expected {expected}")


def check_ratio(config: VideoXLConfig, ratio: int | list[int] | None) -> None:
    """Refuses a `--ratio` that no window of the model can have."""
    from vxl_model.streaming.ratios import make_plan

    try:
        make_plan(config, ratio)
    except ValueError as error:
        raise ValueError(f"--{error}") from None
