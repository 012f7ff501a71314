"""How many raw tokens stand for one VST, window by window.

A fixed ratio serves every window. Of several allowed ones, one is drawn per window:
`numpy.random.default_rng(42).choice(valid)`, one generator for a sequence, where `valid` keeps
the order of the list without the ratios that do not divide the window. So the same call always
gives the same ratios.

Source: Video-XL section 3.3; the published code's `beacon_ratio_mix = "step-random"`.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..decoder.configuration import VideoXLConfig

__all__ = ["RatioPlan", "WindowRatios"]

_SEED = 42


def _positive(value: object) -> int:
    number = 0
    if not isinstance(value, bool):
        try:
            number = operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            number = 0
    if number < 1:
        raise ValueError(f"ratio: got {value!r}, expected positive integers")
    return number


class WindowRatios:
    """A ratio for each window, in order: `ratio=WindowRatios([8, 8, 2])`.

    A plain list means something else: the ratios to draw from.

    Raises:
        ValueError: empty, or a value is no positive integer.
    """

    def __init__(self, ratios: Iterable[int]) -> None:
        self.ratios = tuple(_positive(r) for r in ratios)
        if not self.ratios:
            raise ValueError("ratio: got no ratios, expected one for each window")

    def __repr__(self) -> str:
        return f"WindowRatios({list(self.ratios)})"


class RatioPlan:
    """Hands out the ratio of one window after the other.

    Args:
        ratio: an integer, a list to draw from, or `WindowRatios`.
        seed: of the draws; the published code's by default.

    Raises:
        ValueError: none of these.
    """

    def __init__(
        self, ratio: int | Sequence[int] | WindowRatios, seed: int | Sequence[int] = _SEED
    ) -> None:
        self._windows: tuple[int, ...] | None = None
        if isinstance(ratio, WindowRatios):
            self._windows = ratio.ratios
            self.allowed = ratio.ratios
        elif isinstance(ratio, Iterable) and not isinstance(ratio, str):
            self.allowed = tuple(_positive(r) for r in ratio)
        else:
            self.allowed = (_positive(ratio),)
        if not self.allowed:
            raise ValueError("ratio: got an empty list, expected at least one ratio")
        self._drawn = 0
        self._generator = np.random.default_rng(seed)

    def next(self, tokens: int) -> int:
        """The ratio of the next window, which has `tokens` raw tokens.

        Raises:
            ValueError: none of the allowed ratios divides the window, or `WindowRatios` has no
                ratio for it.
        """
        if self._windows is not None:
            if self._drawn >= len(self._windows):
                raise ValueError(
                    f"ratio: got {len(self._windows)} ratios, expected one for each window; "
                    f"window {self._drawn + 1} has none"
                )
            ratio = self._windows[self._drawn]
        elif len(self.allowed) == 1:  # nothing is drawn, nothing has to divide
            ratio = self.allowed[0]
        else:
            valid = [r for r in self.allowed if r <= tokens and tokens % r == 0]
            if not valid:
                raise ValueError(
                    f"ratio: got {list(self.allowed)} to draw from, expected one that divides a "
                    f"window of {tokens} tokens, or a single ratio, which need not"
                )
            ratio = int(self._generator.choice(valid))
        self._drawn += 1
        return ratio

    def windows(self, tokens: int, window: int) -> WindowRatios:
        """The next draws for a sequence of `tokens` raw tokens in windows of `window`."""
        sizes = [min(window, tokens - start) for start in range(0, tokens, window)]
        return WindowRatios([self.next(size) for size in sizes])

    def copy(self) -> RatioPlan:
        """An independent plan that goes on from here with the same draws."""
        return RatioPlan.from_state(self.state())

    def state(self) -> str:
        """Everything as JSON; `from_state` reads it."""
        return json.dumps(
            {
                "ratios": list(self.allowed),
                "per_window": self._windows is not None,
                "drawn": self._drawn,
                "generator": self._generator.bit_generator.state,
            }
        )

    @staticmethod
    def from_state(state: str) -> RatioPlan:
        fields: dict[str, Any] = json.loads(state)
        ratios = fields["ratios"]
        plan = RatioPlan(WindowRatios(ratios) if fields["per_window"] else ratios)
        plan._drawn = fields["drawn"]
        plan._generator.bit_generator.state = fields["generator"]
        return plan


def make_plan(config: VideoXLConfig, ratio: int | Sequence[int] | WindowRatios | None) -> RatioPlan:
    """The plan for `ratio`, or for the configuration's own."""
    plan = RatioPlan(config.beacon_ratio if ratio is None else ratio)
    if max(plan.allowed) > config.beacon_window:
        raise ValueError(
            f"ratio: got {max(plan.allowed)}, expected at most the window of "
            f"{config.beacon_window} tokens"
        )
    mix = config.beacon_ratio_mix
    if ratio is None and len(plan.allowed) > 1 and mix != "step-random":
        raise ValueError(
            f"ratio: got None and beacon_ratio_mix {mix!r} in the configuration, expected "
            "'step-random'; name a ratio"
        )
    return plan
