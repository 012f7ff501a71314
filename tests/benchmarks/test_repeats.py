"""How often competitors are repeated, and which readings count."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import attn
from benchmarks.attention.groups import Competitor, main_cases, make_groups
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


def test_the_ceiling_is_not_repeated_alone(played):
    times = interleave({0: played(2.0), -1: played(0.0)}, 0.0, 3, 30, {0: 2.0})
    assert (len(times[0]), len(times[-1])) == (2, 3)
    times = interleave({0: played(0.1), -1: played(0.0)}, 0.9, 3, 30)
    assert len(times[0]) == len(times[-1]) > 3


@pytest.mark.parametrize(
    ("case", "rows", "right", "counts"),
    [
        ("chunk", 8, True, True),
        ("chunk", 8, False, False),
        ("decode", 1, True, False),  # the checked call does not start cold
        ("rope_append", 8, True, False),
    ],
)
def test_which_checked_calls_have_seconds(case, rows, right, counts):
    answer = SimpleNamespace(judge=lambda output: Verdict(0.0, right))
    run = Run(lambda: torch.zeros(1), lambda output: output)
    provider = SimpleNamespace(prepare=lambda x: run, ours=False)
    case = Case(case, Geometry.small(), 0, 1, "fp32", "cpu", plain_rows=rows)
    result = Result(case.name, "a", "fp32", 0, 1)
    competitor = Competitor("a", provider, case)
    found, seconds = Runner._checked(competitor, SimpleNamespace(case=case), answer, result)
    assert (found is run, seconds > 0) == (right, counts)


@pytest.mark.parametrize(("options", "counts"), [([], True), (["--repeats", "5"], False)])
def test_with_a_number_of_repeats_the_checked_call_does_not_count(monkeypatch, options, counts):
    seen = []

    def interleave(turns, left, least, most, first):
        seen.append(first)
        return {name: [call()] for name, call in turns.items()}

    monkeypatch.setattr(attn, "interleave", interleave)
    options = attn.parse(["--small", "--provider", "vxl", "--case", "tail", *options])
    groups = make_groups(options, Geometry.small())
    results = Runner(options, groups, lambda done: None).run()
    assert all(result.ok for result in results)
    assert [first is not None for first in seen] == [counts] * len(groups)


@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        ([], [0, 1620, 20250]),
        (["--cache", "all"], [0, 1620, 8100, 20250]),
        (["--cache", "7,9"], [7, 9]),
    ],
)
def test_cache_lengths_on_a_cpu(options, lengths):
    options = attn.parse(["--device", "cpu", "--case", "chunk", *options])
    cases = main_cases(options, Geometry(), "fp32")
    assert [case.cache_len for case in cases if case.name == "chunk"] == lengths


@pytest.mark.parametrize("given", ["0,all", "x", "-1", "1,"])
def test_a_cache_length_that_is_none_is_named(capsys, given):
    with pytest.raises(SystemExit):
        attn.parse([f"--cache={given}"])
    assert f"--cache: got {given}, expected lengths or all" in capsys.readouterr().err
