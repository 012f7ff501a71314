"""A conversation at the terminal or through a pipe: one line, one question."""

from __future__ import annotations

import contextlib
import sys

from .common import complain, one_line
from .session import Session

__all__ = ["chat"]

HELP = """\
  Type a question and press Enter. Ctrl-C stops an answer.
  /save FILE   save the memory of the video; --memory FILE loads it
  /help        show this text
  /quit        leave; so does Ctrl-D"""


def chat(session: Session) -> None:
    """Answers questions until the input ends. A question that cannot be used is reported, and the
    conversation goes on."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  input() then has editing and history
        print("/help lists the commands.", file=sys.stderr)
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # a bad byte costs its line only
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            if terminal:
                print()
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            print()
            continue
        if line == "/quit":
            return
        try:
            _respond(session, line)
        except KeyboardInterrupt:
            if not terminal:
                raise
            print("\n(stopped)", file=sys.stderr)
        except (ValueError, OSError) as error:
            complain(one_line(error), 2)


def _respond(session: Session, line: str) -> None:
    command, _, rest = line.partition(" ")
    if command == "/help":
        print(HELP, file=sys.stderr)
    elif command == "/save":
        if not rest.strip():
            raise ValueError("/save: got no file name, expected /save FILE")
        path = session.save("/save", rest.strip())
        print(f"saved {path}", file=sys.stderr)
    elif command.startswith("/") and command.isascii():
        raise ValueError(f"{command}: unknown command; /help lists them")
    elif line:
        session.answer(line)
