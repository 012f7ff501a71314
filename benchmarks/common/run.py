"""A prepared call of a provider."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Run"]


@dataclass(frozen=True)
class Run:
    """`rows(call())` is the result as `(batch, rows, heads, head_dim)`; `rows` is not timed. The
    first call is checked."""

    call: Callable[[], object]
    rows: Callable[..., torch.Tensor]
