"""A prepared call, as providers hand it out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Run"]


@dataclass(frozen=True)
class Run:
    """`rows(call())` is the result as `(batch, rows, heads, head_dim)`, which is not timed. The
    first call is the one that is checked."""

    call: Callable[[], object]
    rows: Callable[..., torch.Tensor]
