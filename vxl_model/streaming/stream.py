"""The state of one sequence whose video is being encoded."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .cache_pool import PooledSequence
from .ratios import RatioPlan

__all__ = ["Stream"]


@dataclass
class Stream:
    """One sequence being encoded.

    Attributes:
        sequence: what is kept of it.
        plan: ratios of the windows to come.
        pending: visual tokens that do not fill a window yet, `(tokens, hidden)` each.
        sizes: VSTs of every step so far; 0 for prompt and tails, as the published code counts.
        visual_tokens: raw ones so far.
        closed: a tail has been read; no more video can follow.
    """

    sequence: PooledSequence
    plan: RatioPlan
    pending: list[Tensor] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    visual_tokens: int = 0
    closed: bool = False
    sealed: Stream | None = None
    drawn: list[int] = field(default_factory=list)  # ratios of full windows, not used yet

    @property
    def pending_tokens(self) -> int:
        return sum(len(x) for x in self.pending)

    def fork(self) -> Stream:
        """The same, independent from here on. Shares pages; copies nothing."""
        return Stream(
            self.sequence.fork(),
            self.plan.copy(),
            list(self.pending),
            list(self.sizes),
            self.visual_tokens,
            self.closed,
            self.sealed,
            list(self.drawn),
        )

    def take(self, tokens: int) -> Tensor:
        """Removes the first pending tokens."""
        taken, left = [], tokens
        while left:
            head = self.pending[0]
            taken.append(head[:left])
            if len(head) > left:
                self.pending[0] = head[left:]
            else:
                self.pending.pop(0)
            left -= len(taken[-1])
        return taken[0] if len(taken) == 1 else torch.cat(taken)
