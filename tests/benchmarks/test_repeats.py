"""How often competitors are repeated, and which readings count."""

import pytest

from benchmarks.attention.groups import Competitor, Group
from benchmarks.attn import Runner
from benchmarks.common import timing
from benchmarks.common.cases import Case, Geometry
from benchmarks.common.timing import interleave
from benchmarks.peers.registry import PROVIDERS


@pytest.fixture
def played(monkeypatch):
    """Makes a competitor whose calls take so many seconds of a clock that nobody waits for."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def make(seconds: float):
        def call() -> float:
            now[0] += seconds
            return seconds

        return call

    return make


@pytest.mark.parametrize(
    ("seconds", "first", "readings"),
    [
        (0.1, 0.1, [0.1] * 3),  # a short first call does not count
        (0.5, 0.51, [0.5, 0.51, 0.5]),
        (0.5, 0.6, [0.5] * 3),  # the next call does not agree
        (2.0, 2.05, [2.0, 2.05]),
        (2.0, 3.0, [2.0] * 2),
        (2.0, None, [2.0] * 2),
    ],
)
def test_the_checked_call_counts_if_it_is_long_and_agrees(played, seconds, first, readings):
    known = {} if first is None else {0: first}
    assert interleave({0: played(seconds)}, 0.0, 3, 3, known)[0] == readings


def test_so_many_repeats_as_were_asked_for(played):
    times = interleave({0: played(0.01), 1: played(0.3)}, 0.0, 5, 5)
    assert {name: len(values) for name, values in times.items()} == {0: 5, 1: 5}


@pytest.mark.parametrize(
    ("first", "slower"),
    [
        ({0: 1.0, 1: 3.0, 2: 2.0}, {1}),
        ({0: 1.0, 1: 2.0, 2: 3.0}, {2}),
        ({0: 1.0, 1: 0.2, 2: 0.3}, set()),  # short: both are repeated
        ({0: 1.0, 1: 0.0, 2: 3.0}, set()),  # the other form failed
        ({}, set()),
    ],
)
def test_only_the_faster_form_of_a_peer_is_repeated(first, slower):
    case = Case("chunk", Geometry.small(), 0, 1, "fp32", "cpu")
    names = ("vxl", "sdpa_bool", "sdpa_float")
    group = Group("any", [Competitor(name, PROVIDERS[name], case) for name in names])
    assert Runner._slower_forms(group, first) == slower
