"""How often competitors are repeated, and which readings count."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.attention.groups import Competitor
from benchmarks.attn import Runner
from benchmarks.common import timing
from benchmarks.common.cases import Case, Geometry
from benchmarks.common.oracle import Verdict
from benchmarks.common.report import Result
from benchmarks.common.run import Run
from benchmarks.common.timing import interleave


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
        (0.5, 0.7, [0.5] * 3),  # it paid for something that the next did not
        (2.0, 2.05, [2.0, 2.05]),
        (2.0, 2.2, [2.0, 2.2, 2.0]),  # two readings that differ
        (2.0, 3.0, [2.0] * 2),
        (2.0, 0.0, [2.0] * 2),
    ],
)
def test_the_checked_call_counts_if_it_is_long(played, seconds, first, readings):
    assert interleave({0: played(seconds)}, 0.0, 3, 3, {0: first})[0] == readings


def test_so_many_repeats_as_were_asked_for(played):
    calls = {0: played(0.01), 1: played(0.3), 2: played(2.0), -1: played(0.0)}
    times = interleave(calls, 0.0, 5, 5)
    assert {name: len(values) for name, values in times.items()} == {0: 5, 1: 5, 2: 5, -1: 5}


def test_the_ceiling_is_read_beside_others_only(played):
    times = interleave({0: played(2.0), -1: played(0.0)}, 0.0, 3, 30, {0: 2.0})
    assert (len(times[0]), len(times[-1])) == (2, 1)


def test_a_wrong_result_has_no_first_reading():
    wrong = SimpleNamespace(judge=lambda output: Verdict(1.0, False))
    run = Run(lambda: torch.zeros(1), lambda output: output)
    provider = SimpleNamespace(prepare=lambda x: run, ours=False)
    case = Case("chunk", Geometry.small(), 0, 1, "fp32", "cpu")
    result = Result("chunk", "a", "fp32", 0, 1)
    competitor = Competitor("a", provider, case)
    assert Runner._checked(competitor, SimpleNamespace(case=case), wrong, result) == (None, 0.0)
    assert result.note.startswith("WRONG")
