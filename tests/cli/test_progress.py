"""The progress bar of a long command, on terminals, also narrow ones, and in a log file."""

import io
import os
import re

import pytest

pytest.importorskip("tqdm")

from vxl_cli import progress
from vxl_cli.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("columns", [40, 120])
def test_on_a_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", "20")
    stream = Terminal()
    bar = Progress("watching", stream=stream)
    bar._bar.delay, bar._bar.dynamic_ncols = 0, lambda _: (columns, 20)
    for done in range(1, 129):
        bar._bar.mininterval = 0
        bar(done, 128)
    bar.close()
    drawn = [x for x in re.split(r"[\r\n]", stream.getvalue()) if x.strip()]
    assert any("128/128" in x for x in drawn)
    assert all(len(x) <= columns for x in drawn)
    assert stream.getvalue().endswith("\r")  # erased


def test_in_a_log_file(monkeypatch):
    """A short command prints nothing, a long one whole lines."""
    stream = io.StringIO()
    bar = Progress("watching", stream=stream)
    bar(3, 4)
    bar.close()
    assert stream.getvalue() == ""
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    bar = Progress("watching", stream=stream)
    for done in range(1, 5):
        bar(done, 4)
    bar.close()
    lines = stream.getvalue().split(os.linesep)
    assert "4/4" in lines[-2]
    assert lines[-1] == ""
    assert "\r" not in stream.getvalue()
    assert max(map(len, lines)) <= 80


def test_without_a_total():
    stream = Terminal()
    bar = Progress("captioning", "clips", stream=stream)
    bar._bar.delay = bar._bar.mininterval = 0
    bar(7, None)
    bar.close()
    assert "7 clips" in stream.getvalue()
