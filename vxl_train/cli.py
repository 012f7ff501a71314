"""`python -m vxl_train`: arguments and words; the work is done by `run.train`, `vico.build`,
`mix.build`.

The same commands are `vxl train`, `vxl vico` and `vxl mix` where the package is installed.
"""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import json
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from vxl_cli.common import (
    Parser,
    add_device_arguments,
    count,
    input_path,
    output_file,
    placement,
    quiet,
)
from vxl_cli.common import run as run_command
from vxl_cli.progress import Progress

from .vico.settings import PROMPT, VicoSettings

__all__ = ["add_mix", "add_train", "add_vico", "leave", "main"]

CONFIGS = Path(__file__).with_name("configs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    parser = Parser(prog="python -m vxl_train", description="Train Video-XL.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_train(commands, "run")
    add_vico(commands)
    add_mix(commands)
    return run_command(parser, arguments)


def leave(code: int) -> NoReturn:
    """Ends the process as `sys.exit` does. One of several that train together ends at once.

    `destroy_process_group` leaves gloo's threads alive, because caches of PyTorch (of DTensor, and
    default arguments in torch.distributed.nn) refer to the group. Such a thread aborts the process
    when it asks for the lock of an interpreter that is being taken down: "terminate called without
    an active exception". So here the interpreter is not taken down, after all that a program can
    ask for at its end is done.
    """
    if "RANK" not in os.environ:
        sys.exit(code)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def add_vico(commands: Any) -> None:
    """Adds the command that makes VICO samples to argparse's subparsers."""
    parser = commands.add_parser("vico", help="videos to training samples on what they show when")
    default, shown = VicoSettings(), "(default: %(default)s)"
    add = parser.add_argument
    add("--videos", nargs="+", required=True, metavar="FILE_OR_DIR")
    add(
        "--captioner",
        required=True,
        metavar="MODEL",
        help="image-text model of transformers: a folder or a name on the Hub; or URL#MODEL of an "
        "OpenAI-compatible server",
    )
    add("--output", required=True, metavar="FILE", help="JSONL; captions go to FILE.captions")
    add("--seed", type=int, default=default.seed)
    add("--samples", type=count, default=default.samples, help=f"at most this many a video {shown}")
    add("--clues", type=count, default=default.clues, help=f"at most this many a question {shown}")
    add("--clip-seconds", type=float, default=default.clip_seconds, help=shown)
    add("--pictures", type=count, default=default.pictures, help=f"captioned of a clip {shown}")
    add("--edge", type=count, default=default.edge, help=f"longest edge in pixels {shown}")
    add("--prompt", default=PROMPT, help="what the captioner is asked")
    add("--max-new-tokens", type=count, default=64, help=f"of a caption {shown}")
    add("--on-error", choices=("skip", "stop"), default="skip", help=f"at a bad video {shown}")
    add("--json", action="store_true", help="print one JSON object")
    add_device_arguments(parser)
    parser.set_defaults(run=_vico)


def _vico(options: argparse.Namespace) -> None:
    from vxl_cli.videos import find_videos

    videos = find_videos(options.videos)
    from .vico.build import check_output, make_vico
    from .vico.captioner import Captioner, TransformersCaptioner
    from .vico.server_captioner import ServerCaptioner

    quiet()
    device, dtype = placement(options)
    settings = VicoSettings(
        options.seed,
        options.samples,
        options.clues,
        options.clip_seconds,
        options.pictures,
        options.edge,
    )
    check_output(options.output, [*videos, Path(options.captioner)])
    said = {"prompt": options.prompt, "max_new_tokens": options.max_new_tokens}
    captioner: Captioner
    if "://" in options.captioner:
        captioner = ServerCaptioner(options.captioner, **said)
    else:
        captioner = TransformersCaptioner(options.captioner, **said, device=device, dtype=dtype)
    bar = Progress("captioning", "clips")

    def report(line: str) -> None:
        bar.close()
        print(f"vxl: {line}", file=sys.stderr)

    try:
        summary = make_vico(
            options.videos,
            captioner,
            options.output,
            settings,
            on_error=options.on_error,
            progress=bar,
            report=report,
        )
    finally:
        bar.close()
    if options.json:
        print(json.dumps({**vars(summary), "dropped": dict(summary.dropped)}))
        return
    made = f"{summary.samples} samples of {summary.videos} videos"
    print(
        f"{options.output}: {made}, {summary.clips} clips ({summary.captioned} captioned now); "
        f"{len(summary.skipped)} videos skipped, {len(summary.bad)} unreadable"
    )


def add_mix(commands: Any) -> None:
    """Adds the command that mixes published data sets to argparse's subparsers."""
    parser = commands.add_parser("mix", help="published data sets into one file of samples")
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help=f"with the key mix; see {CONFIGS}")
    add("--root", required=True, metavar="DIR", help="folder of all sets; --root of training too")
    add("--output", required=True, metavar="FILE", help="JSONL")
    add("--seed", type=_seed, default=42, help="of the draws (default: %(default)s)")
    add("--no-files", action="store_true", help="do not look whether pictures and videos are there")
    add("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_mix)


def _seed(text: str) -> int:
    """An argument's type: an integer from 0 on."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer >= 0")
    return int(text)


def _mix(options: argparse.Namespace) -> None:
    input_path("--config", options.config)
    input_path("--root", options.root, folder=True)
    from .mix.build import make_mix, read_mix

    output_file("--output", options.output, [options.config])
    sets = read_mix(options.config)
    bar = Progress("mixing", "samples")
    try:
        summary = make_mix(
            sets,
            options.root,
            options.output,
            seed=options.seed,
            check_files=not options.no_files,
            progress=bar,
        )
    finally:
        bar.close()
    if options.json:
        print(json.dumps([dataclasses.asdict(one) for one in summary.sets]))
        return
    for one in summary.sets:
        bad = ", ".join(f"{count} {kind}" for kind, count in sorted(one.bad.items())) or "none"
        print(f"{one.name}: {one.written} samples of {one.usable} usable ones; bad: {bad}")
    print(f"{options.output}: {summary.written} samples")


def add_train(commands: Any, name: str = "train") -> None:
    """Adds the command that trains to argparse's subparsers."""
    parser = commands.add_parser(name, help="train a checkpoint on LLaVA-style data")
    parser.set_defaults(run=run)
    parser.add_argument(
        "--stage",
        required=True,
        choices=("align", "finetune"),
        help="align: the projector learns; finetune: everything",
    )
    parser.add_argument(
        "--model", required=True, metavar="PATH", help="checkpoint: a folder or a name on the Hub"
    )
    parser.add_argument(
        "--data",
        required=True,
        action="append",
        metavar="FILE",
        help="LLaVA-style JSON or JSONL; several may be named",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of this run")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help=f"YAML or JSON: settings of vxl_train and TrainingArguments; see {CONFIGS}",
    )
    parser.add_argument("--root", metavar="DIR", help="of paths in the data (default: its folder)")
    parser.add_argument("--eval-data", metavar="FILE", help="its loss is measured during training")
    parser.add_argument(
        "--eval-answers", metavar="FILE", help="its questions are answered during training"
    )
    parser.add_argument("--plot", action="store_true", help="draw the log: train_log.png")
    parser.add_argument(
        "--on-bad-sample", choices=("skip", "stop"), help="skip (default) reports it and goes on"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")


def run(options: argparse.Namespace) -> None:
    """Runs the command; raises ValueError or OSError for invalid input."""
    for name in ("data", "config", "root"):
        value = getattr(options, name)
        for path in value if isinstance(value, list) else [value]:
            if path is not None and not (
                Path(path).is_dir() if name == "root" else Path(path).is_file()
            ):
                wanted = "a folder" if name == "root" else "a file"
                raise ValueError(f"--{name}: got {path}, expected {wanted} that is there")
    from vxl_model.inputs.processing import VideoXLProcessor

    from .run_folder import check_inputs
    from .settings import TrainSettings

    check_inputs(Path(options.output), config=options.config or ())
    settings = TrainSettings.read(
        options.config,
        options.stage,
        on_bad_sample=options.on_bad_sample,
        eval_data=options.eval_data,
        eval_answers=options.eval_answers,
    )
    VideoXLProcessor.read_config(options.model)  # its errors are one line
    import torch
    from transformers.utils import logging

    from .run import train

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    first = int(os.environ.get("RANK", "0")) == 0  # under torchrun or accelerate launch

    def log(line: str) -> None:
        if first:
            print(line, file=sys.stderr, flush=True)

    report = train(
        options.model,
        options.data,
        options.output,
        settings,
        root=options.root,
        resume=options.resume,
        log=log,
    )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if not first:
        return
    if options.plot:
        from .plot import plot_log

        plot_log(options.output)
    if options.json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        for line in summary(report):
            print(line)


def summary(report: Any) -> list[str]:
    """What a run did, in words."""
    done = report.steps - report.resumed_from
    counts = ", ".join(f"{n} {kind}" for kind, n in report.samples.items())
    lines = [
        f"samples   {counts}",
        "bad       " + (", ".join(f"{n} {kind}" for kind, n in report.bad.items()) or "none"),
        f"steps     {report.steps}"
        + (f", {done} of them now" if report.resumed_from else "")
        + f", of {report.samples_a_step} samples and {report.tokens_a_step:.0f} tokens",
    ]
    if done:
        lines.append(f"time      {report.seconds:.1f} s, {report.seconds / done:.2f} s a step")
    if report.loss is not None:
        lines.append(f"loss      {report.loss:.4f} in the last step")
    lines.append(f"model     {report.result}")
    return lines
