"""The state of one sequence whose video is being encoded."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .cache_pool import SequenceHandle
from .ratios import RatioPlan

__all__ = ["VideoState", "joined"]


@dataclass
class VideoState:
    """One sequence being encoded.

    Attributes:
        sequence: what is kept of it.
        plan: ratios of the windows to come.
        pending: visual tokens that do not fill a window yet, `(tokens, hidden)` each, on any
            devices.
        vst_counts: VSTs of every step so far, 0 for prefix and suffixes, as the published code
            counts them.
        visual_tokens: raw ones so far.
        finished: a suffix has been read, so no more video can follow.
        flushed: this state with its last, partial window encoded, once that was needed.
        drawn_ratios: of full windows that are pending.
    """

    sequence: SequenceHandle
    plan: RatioPlan
    pending: list[Tensor] = field(default_factory=list)
    vst_counts: list[int] = field(default_factory=list)
    visual_tokens: int = 0
    finished: bool = False
    flushed: VideoState | None = None
    drawn_ratios: list[int] = field(default_factory=list)

    @property
    def pending_tokens(self) -> int:
        return sum(len(x) for x in self.pending)

    def fork(self) -> VideoState:
        """The same, independent from here on. Shares pages and copies nothing."""
        return VideoState(
            self.sequence.fork(),
            self.plan.copy(),
            list(self.pending),
            list(self.vst_counts),
            self.visual_tokens,
            self.finished,
            self.flushed,
            list(self.drawn_ratios),
        )

    def take(self, tokens: int, device: torch.device) -> Tensor:
        """Removes the first pending tokens, and gives them on `device`."""
        taken, left = [], tokens
        while left:
            head = self.pending[0]
            taken.append(head[:left])
            if len(head) > left:
                self.pending[0] = head[left:]
            else:
                self.pending.pop(0)
            left -= len(taken[-1])
        return joined(taken, device)


def joined(pieces: list[Tensor], device: torch.device) -> Tensor:
    """Pending tokens in one tensor on `device`. They wait where they came from: those of a whole
    video may be too many for a GPU."""
    if len({x.device for x in pieces}) == 1:
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).to(device)
    return torch.cat([x.to(device) for x in pieces])
