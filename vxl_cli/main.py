"""`vxl`, also `python -m vxl_model`: ask a video from the command line.

Answers go to stdout, everything else to stderr. Other packages add commands by entry points of
the group `vxl.commands`: functions that take argparse's subparsers.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

from .common import Parser, add_device_arguments, byte_size, count, ratio, run

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    return run(_parser(), arguments)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="vxl", description="Video-XL: ask questions of a video.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    ask = commands.add_parser("ask", help="watch a video and answer questions about it")
    ask.add_argument(
        "questions", nargs="+", metavar="QUESTION", help="each is answered without the others"
    )
    _add_source(ask, memory=True)
    _add_answer(ask)
    ask.set_defaults(run=_ask)

    chat = commands.add_parser("chat", help="ask one question after another about a video")
    _add_source(chat, memory=True)
    _add_answer(chat)
    chat.set_defaults(run=_chat)

    watch = commands.add_parser("watch", help="watch videos and save their memories")
    _add_source(watch, memory=False).add_argument(
        "--videos",
        nargs="+",
        metavar="PATH",
        help="files, folders, and .txt files that list them; a memory of each goes to --save",
    )
    watch.add_argument(
        "--save",
        required=True,
        metavar="FILE",
        help="ask and chat read it by --memory; with --videos a folder",
    )
    watch.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="with --videos: on a Ray cluster, by default one of this machine",
    )
    watch.add_argument("--workers", type=count, help="with --ray (default: one a GPU or 8 cores)")
    watch.add_argument(
        "--final", action="store_true", help="encode the last window for other programs, as vLLM"
    )
    watch.add_argument("--json", action="store_true", help="print one JSON object")
    watch.set_defaults(run=_watch)

    plan = commands.add_parser(
        "plan", help="memory and arithmetic that a video takes; loads no weights"
    )
    plan.add_argument("--frames", type=count, required=True, help="of the video")
    plan.add_argument("--ratio", type=ratio, required=True, help="8, or 4,8,16 to compare")
    plan.add_argument("--model", metavar="PATH", help="folder or Hub name (default: Video-XL-7B)")
    plan.add_argument(
        "--free", type=byte_size, metavar="SIZE", help="memory of a device that is not here, as 80G"
    )
    add_device_arguments(plan)
    plan.add_argument(
        "--quantize", choices=("8bit", "4bit"), help="of bitsandbytes, the decoder's weights"
    )
    plan.add_argument(
        "--train", choices=("full", "lora"), help="also the memory of a training step on the video"
    )
    plan.add_argument("--lora-rank", type=count, default=32, help="(default: %(default)s)")
    plan.add_argument(
        "--vst", choices=("full", "adapters"), default="full", help="as the recipe's setting"
    )
    plan.add_argument("--json", action="store_true", help="print JSON, one object a ratio")
    plan.set_defaults(run=_plan)

    for entry in sorted(entry_points(group="vxl.commands"), key=lambda entry: entry.name):
        entry.load()(commands)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from vxl_kernels import __version__

        print(f"vxl {__version__}")
        parser.exit()


def _add_source(parser: argparse.ArgumentParser, memory: bool) -> Any:
    """Returns the group of what can be watched."""
    parser.add_argument(
        "--model", required=True, metavar="PATH", help="checkpoint: a folder or a name on the Hub"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--video",
        metavar="FILE",
        help="any container that FFmpeg reads, or a folder of pictures in the order of their names",
    )
    source.add_argument(
        "--image", action="append", metavar="FILE", help="a picture; several are like a video"
    )
    if memory:
        source.add_argument("--memory", metavar="FILE", help="a memory that --save wrote")
        parser.add_argument("--save", metavar="FILE", help="also save the memory of the video")
    parser.add_argument(
        "--frames", type=count, help="this many, evenly spaced; with --fps at most this many"
    )
    parser.add_argument("--fps", type=float, help="frames a second (default: 1, at most 128)")
    parser.add_argument(
        "--ratio", type=ratio, help="visual tokens per cached token: 8, or 2,4,8 to draw from"
    )
    add_device_arguments(parser)
    return source


def _add_answer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-new-tokens", type=count, default=256, help="of an answer (default: %(default)s)"
    )
    parser.add_argument(
        "--answer-prefix",
        default="",
        metavar="TEXT",
        help="what each answer begins with, as 'Best option: ('; the model goes on from there",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, one object a line")


# -- commands: each imports what it needs --------------------------------------------------------


def _check_files(options: argparse.Namespace) -> None:
    """A wrong file name is reported before anything heavy is imported."""
    for path in (options.video, *(options.image or ()), getattr(options, "memory", None)):
        if path is not None and "://" not in path and not os.path.lexists(path):
            raise ValueError(f"{path}: no such file")


def _ask(options: argparse.Namespace) -> None:
    _check_files(options)
    from .session import Session

    session = Session(options, options.questions)
    for question in options.questions:
        session.answer(question)


def _chat(options: argparse.Namespace) -> None:
    _check_files(options)
    from .chat import chat
    from .session import Session

    chat(Session(options))


def _watch(options: argparse.Namespace) -> None:
    if options.videos is not None:
        if not any(map(os.path.lexists, options.videos)):  # one of several is a bad video
            raise ValueError(f"--videos: {options.videos[0]}: no such file")
        from .library import watch_library

        return watch_library(options)
    for name in ("ray", "workers"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name}: for --videos only")
    _check_files(options)
    from .session import Session

    Session(options).print_watched()


def _plan(options: argparse.Namespace) -> None:
    from .plan import print_plans

    print_plans(options)
