"""How many raw tokens one VST summarises, window by window.

A fixed ratio holds for every window. If several are allowed, one is drawn for each window:
`numpy.random.default_rng(42).choice(valid)`, one generator for a sequence, where `valid` is the
list, in order, without the ratios that do not divide the window. So the same call always gives
the same ratios.

Source: Video-XL section 3.3; the published code's `beacon_ratio_mix = "step-random"`.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..decoder.configuration import VideoXLConfig
from ..errors import fail

__all__ = ["Ratio", "RatioPlan", "WindowRatios", "make_plan", "row_plans"]

_SEED = 42


def _positive(value: object) -> int:
    number = 0
    if not isinstance(value, bool):
        try:
            number = operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            number = 0
    if number < 1:
        fail("ratio", repr(value), "positive integers")
    return number


class WindowRatios:
    """A ratio for each window, in order: `ratio=WindowRatios([8, 8, 2])`.

    A plain list holds the ratios to draw from, as `beacon_ratio` in a checkpoint's config.json.

    Raises:
        ValueError: empty, or a value is not a positive integer.
    """

    def __init__(self, ratios: Iterable[int]) -> None:
        self.ratios = tuple(_positive(r) for r in ratios)
        if not self.ratios:
            fail("ratio", "no ratios", "one for each window")

    def __repr__(self) -> str:
        return f"WindowRatios({list(self.ratios)})"


Ratio = int | Sequence[int] | WindowRatios | None


class RatioPlan:
    """The ratio of one window after the other.

    Args:
        ratio: an integer, a list to draw from, or `WindowRatios`.
        seed: of the draws, by default the published code's.

    Raises:
        ValueError: something else.
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
            fail("ratio", "an empty list", "at least one ratio")
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
                expected = f"one for each window; window {self._drawn + 1} has none"
                fail("ratio", f"{len(self._windows)} ratios", expected)
            ratio = self._windows[self._drawn]
        elif len(self.allowed) == 1:  # nothing is drawn, nothing has to divide
            ratio = self.allowed[0]
        else:
            valid = [r for r in self.allowed if r <= tokens and tokens % r == 0]
            if not valid:
                fail(
                    "ratio",
                    f"{list(self.allowed)} to draw from",
                    f"one that divides a window of {tokens} tokens, or a single ratio, which need "
                    "not",
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
        """Everything as JSON, which `from_state` reads."""
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


def make_plan(config: VideoXLConfig, ratio: Ratio) -> RatioPlan:
    """The plan for `ratio`, or for the configuration's own."""
    plan = RatioPlan(config.beacon_ratio if ratio is None else ratio)
    if max(plan.allowed) > config.beacon_window:
        fail("ratio", max(plan.allowed), f"at most the window of {config.beacon_window} tokens")
    mix = config.beacon_ratio_mix
    if ratio is None and len(plan.allowed) > 1 and mix != "step-random":
        got = f"None and beacon_ratio_mix {mix!r} in the configuration"
        fail("ratio", got, "'step-random'; name a ratio")
    return plan


def row_plans(
    config: VideoXLConfig,
    ratio: Ratio | Sequence[WindowRatios | None],
    default: Ratio,
    batch: int,
) -> list[RatioPlan]:
    """A plan for each row of a batch.

    Args:
        ratio: for all rows, or a list of one `WindowRatios` for each row.
        default: the ratio of rows that have none.
    """
    each = list(ratio) if isinstance(ratio, Sequence) else []
    if not any(r is None or isinstance(r, WindowRatios) for r in each):
        return [make_plan(config, default if ratio is None else ratio)] * batch  # type: ignore[arg-type]
    if len(each) != batch:
        fail("ratio", f"{len(each)} WindowRatios", f"{batch}, one for each row")
    return [make_plan(config, default if r is None else r) for r in each]
