"""`vxl chat` at a terminal and through a pipe."""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time

import pytest
from helpers.paths import ROOT

pytest.importorskip("transformers")
pytest.importorskip("av")

from vxl_kernels import _ext

pytestmark = [
    pytest.mark.core,
    pytest.mark.skipif(_ext.extension is None, reason="no compiled extension"),
]
COMMAND = [sys.executable, "-m", "vxl_cli", "chat", "--model", "model", "--video", "clip.mp4"]


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "dumb"}


def take_terminal():
    """In the child, before it starts: stdin becomes its terminal, and Ctrl-C reaches it even where
    the tests run in a shell's background, which ignores it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A process at a pseudo-terminal. Types, and reads until a pattern appears."""

    def __init__(self, folder, *options):
        self.host, device = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, *options],
            cwd=folder,
            env=environment(),
            stdin=device,
            stdout=device,
            stderr=device,
            start_new_session=True,
            preexec_fn=take_terminal,
        )
        os.close(device)
        self.shown = ""

    def type(self, text):
        self.shown = ""
        os.write(self.host, text.encode())

    def until(self, pattern, seconds=90):
        end = time.monotonic() + seconds
        while not re.search(pattern, self.shown):
            assert time.monotonic() < end, self.shown[-2000:]
            if select.select([self.host], [], [], 0.2)[0]:
                try:
                    self.shown += os.read(self.host, 4096).decode(errors="replace")
                except OSError:  # the process has left
                    assert re.search(pattern, self.shown), self.shown[-2000:]
        return self.shown

    def interrupt(self):
        """Ctrl-C at the prompt, until a new prompt appears. CPython's readline does not notice a
        signal that comes after it has shown the prompt and before it waits for a key."""
        for _ in range(9):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                return self.until("> $", 10)
        raise AssertionError(self.shown[-2000:])

    def leave(self):
        code = self.process.wait(30)
        os.close(self.host)
        return code


def test_at_a_terminal(place):
    chat = Terminal(place, "--max-new-tokens", "2")
    chat.until("> $")
    chat.type("/help\n")
    chat.until(r"/save FILE[\s\S]*> $")
    chat.type("\n")
    assert "vxl:" not in chat.until("> $")
    chat.type("/nonsense\n")
    chat.until(r"/nonsense: unknown command[\s\S]*> $")
    chat.type("/save kept.vxl\n")
    chat.until(r"saved kept\.vxl[\s\S]*> $")
    chat.type("/save clip.mp4\n")
    chat.until(r"which is an input[\s\S]*> $")
    chat.interrupt()
    chat.type("/quit\n")
    assert chat.leave() == 0
    assert (place / "kept.vxl").stat().st_size > 1000


def test_an_interrupted_answer_leaves_the_session_as_it_was(run, place, monkeypatch, capsys):
    """After Ctrl-C in the middle of an answer, the next question gets its own answer."""
    transformers = pytest.importorskip("transformers")
    typed = iter(["What?", "What?"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed, "/quit"))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    put, seen = transformers.TextStreamer.put, []

    def interrupted(self, value):
        seen.append(value)
        if len(seen) == 3:
            raise KeyboardInterrupt
        put(self, value)

    monkeypatch.setattr(transformers.TextStreamer, "put", interrupted)
    command = ("--model", "model", "--video", "clip.mp4", "--ratio", 4, "--max-new-tokens", 6)
    code, out, err = run("chat", *command)
    assert code == 0
    assert "(stopped)" in err
    answer = run("ask", *command, "What?")[1]
    assert out.endswith(answer)


def test_history(place):
    pytest.importorskip("readline")
    chat = Terminal(place, "--max-new-tokens", "2")
    chat.until("> $")
    chat.type("abcd\n")
    chat.until(r"> $")
    chat.type("\x10")  # Ctrl-P, the line before
    chat.until("abcd")
    chat.type("\x15\x04")  # the line is erased; the input ends
    assert chat.leave() == 0


def test_bytes_that_are_not_utf8_cost_their_line(place):
    done = subprocess.run(
        [*COMMAND, "--max-new-tokens", "2", "--json"],
        cwd=place,
        env=environment(),
        input=b"one\ncaf\xe9\nthree\n",
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0
    asked = [json.loads(line)["question"] for line in done.stdout.splitlines()]
    assert asked == ["one", "three"]
    assert done.stderr.decode().count("\n") == 1
    assert b"expected text in UTF-8" in done.stderr
