"""How VICO samples are made."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["PROMPT", "VicoSettings"]

PROMPT = (
    "These pictures are moments of one short clip, in order. Say in one plain sentence what is "
    "shown and what happens, with what sets this clip apart from others: who, what, where, which "
    "colours, which words on the screen."
)


@dataclass(frozen=True)
class VicoSettings:
    """How samples are made.

    Args:
        seed: draws depend only on it, the file name of a video and its captions.
        samples: the most samples of a video.
        clues: the most clues in a question, 2 to 26.
        clip_seconds: length of a clip.
        pictures: number of pictures of a clip that the captioner sees.
        edge: their longest edge in pixels.
    """

    seed: int = 0
    samples: int = 4
    clues: int = 5
    clip_seconds: float = 14.0
    pictures: int = 4
    edge: int = 768

    def __post_init__(self) -> None:
        for name, least, most in (
            ("samples", 1, math.inf),
            ("clues", 2, 26),
            ("pictures", 1, math.inf),
            ("edge", 1, math.inf),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                bounds = f"{least} to {most}" if most < math.inf else f"{least} or more"
                raise ValueError(f"{name}: got {value}, expected {bounds}")
        if not 0 < self.clip_seconds < math.inf:
            raise ValueError(f"clip_seconds: got {self.clip_seconds}, expected a positive number")
