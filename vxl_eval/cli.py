"""`vxl eval`: arguments; the work is done by `suite_run`, `needle_run`, `memory_run`.

`python -m vxl_eval` is the same command where the package is not installed.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from vxl_cli.common import (
    Parser,
    add_device_arguments,
    count,
    input_path,
    model_name,
    positive,
    ratio,
    run,
)

__all__ = ["add_eval", "main"]

_HELP = "benchmarks by lmms-eval, needles in real video, the memory of runs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = Parser(prog="python -m vxl_eval", description=_HELP)
    _fill(parser)
    return run(parser, arguments)


def add_eval(commands: Any) -> None:
    """Adds the command to argparse's subparsers."""
    _fill(commands.add_parser("eval", help=_HELP))


def _fill(parser: argparse.ArgumentParser) -> None:
    _add_suite(parser)
    parts = parser.add_subparsers(dest="part", metavar="PART")
    _add_needle(parts.add_parser("needle", help="a picture hidden in a real video, found or not"))
    _add_memory(parts.add_parser("memory", help="peak memory and seconds over frames"))
    scores = parts.add_parser("scores", help="the score of answers that lmms-eval saved")
    scores.add_argument("--kind", required=True, choices=("videomme", "mvbench", "mlvu"))
    scores.add_argument("samples", metavar="FILE", help="JSONL that --log_samples wrote")
    scores.set_defaults(run=_scores)


def _model(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument(
        "--model", required=required, metavar="PATH", help="a folder or a name on the Hub"
    )


def _output(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--output", default=default, metavar="DIR", help="of results (default: %(default)s)"
    )


def _add_suite(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_suite)
    _model(parser, required=False)
    add = parser.add_argument
    add("--suite", metavar="NAME", help="paper, or a YAML file of tasks")
    add("--tasks", nargs="+", metavar="TASK", help="only these of the suite")
    _output(parser, "vxl-eval")
    add("--frames", type=count, help="of each video (default: as the suite says)")
    add("--fps", type=positive, help="frames a second; with --frames, at most that many frames")
    add("--ratio", type=ratio, help="visual tokens per cached token (default: the model's)")
    add("--limit", type=count, metavar="N", help="only the first N questions of each task")
    add("--processes", type=count, default=1, help="by accelerate, one a GPU")
    add("--on-error", choices=("stop", "skip"), default="skip", help="at a video that is broken")
    add("--dry-run", action="store_true", help="only say what a run needs")
    add_device_arguments(parser)


def _add_needle(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_needle)
    _model(parser, required=False)
    add = parser.add_argument
    add("--haystack", required=True, metavar="FILE", help="a long video")
    add("--needles", metavar="FILE", help="JSON: picture, question, answer (default: drawn cards)")
    add("--lengths", type=_lengths, default=[128, 512, 2048], metavar="N,N", help="frames")
    add("--depths", type=_depths, default="5", metavar="N", help="5, or 0,0.5,1")
    add("--fps", type=positive, help="frames a second (default: the video sampled evenly)")
    add("--ratio", type=ratio, help="visual tokens per cached token (default: the model's)")
    add("--max-new-tokens", type=count, default=16)
    add("--no-controls", action="store_true", help="only videos with the needle in them")
    add("--samples", metavar="DIR", help="only write the videos as samples for training there")
    add("--check", action="store_true", help="run every cell by itself too, and compare")
    _output(parser, "vxl-needle")
    add_device_arguments(parser)


def _add_memory(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_memory)
    _model(parser)
    parser.add_argument("--frames", type=_counts, required=True, metavar="N,N")
    parser.add_argument("--ratio", type=count, default=16, help="(default: %(default)s)")
    _output(parser, "vxl-memory")
    add_device_arguments(parser)


def _counts(text: str) -> list[int]:
    return [count(part) for part in text.split(",")]


def _lengths(text: str) -> list[int]:
    """An argument's type: frames of videos, the needle and at least one more."""
    lengths = _counts(text)
    if min(lengths) < 2:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected frames of videos, at least 2")
    return lengths


def _depths(text: str) -> list[float]:
    """An argument's type: the number of depths from 0 to 1, or the depths themselves."""
    if "," not in text and "." not in text:
        steps = count(text)
        return [i / max(1, steps - 1) for i in range(steps)]
    try:
        depths = [float(part) for part in text.split(",")]
    except ValueError:
        depths = [-1.0]
    if not all(0 <= depth <= 1 for depth in depths):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected numbers from 0 to 1")
    return depths


def _suite(options: argparse.Namespace) -> None:
    for name, expected in (("model", "a checkpoint"), ("suite", "a name or a file of a suite")):
        if getattr(options, name) is None:
            raise ValueError(f"--{name}: got nothing, expected {expected} (see vxl eval --help)")
    model_name("--model", options.model)
    if options.suite.endswith((".yaml", ".yml")):
        input_path("--suite", options.suite)
    from .suite_run import run_suite

    run_suite(options)


def _needle(options: argparse.Namespace) -> None:
    if options.samples is None:  # samples need no model
        if options.model is None:
            raise ValueError(
                "--model: got nothing, expected a checkpoint (see vxl eval needle --help)"
            )
        model_name("--model", options.model)
    if not os.path.lexists(options.haystack):
        raise ValueError(f"--haystack: {options.haystack}: no such file")
    if options.needles is not None:
        input_path("--needles", options.needles)
    from .needle_run import run_needle

    run_needle(options)


def _memory(options: argparse.Namespace) -> None:
    model_name("--model", options.model)
    from .memory_run import run_memory

    run_memory(options)


def _scores(options: argparse.Namespace) -> None:
    from .scores import read_samples, score

    print(json.dumps(asdict(score(options.kind, *read_samples(options.samples)))))
