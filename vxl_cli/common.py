"""What the commands of every package share: parsing, errors in one line, devices, output files.

Exit codes: 0 fine; 2 the input cannot be used, said in one line; 1 out of memory or an unexpected
error; 130 interrupted. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch

__all__ = [
    "Parser",
    "add_device_arguments",
    "complain",
    "count",
    "one_line",
    "output_file",
    "placement",
    "quiet",
    "ratio",
    "run",
]

DTYPES = ("float32", "bfloat16", "float16")


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line; every command has `--debug`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_argument(
            "--debug",
            action="store_true",
            default=argparse.SUPPRESS,
            help="show the traceback of an error",
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> int:
    """Parses `arguments`, calls the chosen command's `run(options)` and returns the exit code."""
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    warnings.showwarning = _warn  # type: ignore[assignment]
    try:
        options.run(options)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return complain("interrupted", 130)
    except BrokenPipeError:  # the reader of our output left: no complaint, and none at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if getattr(options, "debug", False):
            raise
        return _report(error)


def _report(error: Exception) -> int:
    text = one_line(error)
    if isinstance(error, (ValueError, OSError, ImportError)):
        return complain(text, 2)
    if isinstance(error, (MemoryError, RuntimeError)) and (
        isinstance(error, MemoryError) or "memory" in text
    ):
        return complain(
            f"out of memory ({text}); fewer --frames, a larger --ratio or --dtype bfloat16 take "
            "less, see vxl plan",
            1,
        )
    return complain(f"{type(error).__name__}: {text} (--debug shows where)", 1)


def complain(text: str, code: int) -> int:
    """Prints an error and returns `code`."""
    print(f"vxl: {text}", file=sys.stderr)
    return code


def one_line(error: BaseException) -> str:
    """What an error says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{error.strerror}"
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed; pip install 'vxl[model,video]'"
    return " ".join(str(error).split()) or type(error).__name__


def _warn(message: Any, category: type, *_: Any) -> None:
    from vxl_model.video.decoders.base import VideoWarning

    if issubclass(category, VideoWarning):
        print(f"vxl: warning: {message}", file=sys.stderr)


def quiet() -> None:
    """Turns off the progress bars and advice of transformers."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


# -- arguments -----------------------------------------------------------------------------------


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--device` and `--dtype`; `placement` reads them."""
    parser.add_argument("--device", type=_device, help="cpu, cuda, cuda:1 ... (default: a GPU)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")


def placement(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """The device and dtype that were chosen, or the default ones."""
    import torch

    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device, getattr(
        torch, options.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    )


def count(text: str) -> int:
    """An argument's type: a positive integer."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer >= 1")
    return value


def ratio(text: str) -> int | list[int]:
    """An argument's type: one ratio, or several separated by commas."""
    values = [count(part) for part in text.split(",")]
    return values[0] if len(values) == 1 else values


def _device(text: str) -> torch.device:
    import torch

    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"got {text!r}: {reason}") from None
    return device


def output_file(
    option: str, path: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str] | None]
) -> Path:
    """The file that a command may write.

    Args:
        inputs: files and folders that the command reads; None is skipped.

    Raises:
        ValueError: `path` is a folder or a device, cannot be written, or is an input.
    """
    from vxl_kernels.files import check_target

    read = [source for source in inputs if source is not None]
    try:
        check_target(path, inputs=read, devices=False, argument=option)
    except FileNotFoundError:
        raise ValueError(f"{option}: got {path}, no such folder") from None
    except OSError as error:
        raise ValueError(f"{option}: got {path}: {error.strerror}") from None
    return Path(path)
