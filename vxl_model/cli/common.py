"""What the commands of every package share: one line for an error, devices, exit codes.

Exit codes: 0 fine; 2 the input cannot be used, said in one line; 1 out of memory; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

__all__ = [
    "Parser",
    "add_device_arguments",
    "complain",
    "count",
    "one_line",
    "placement",
    "quiet",
    "ratio",
    "run",
]

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Parser(argparse.ArgumentParser):
    """One line for one error."""

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
    except (ValueError, OSError, ImportError) as error:
        return complain(one_line(error), 2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and (
            "memory" not in str(error)
        ):
            raise
        return complain(
            f"out of memory ({one_line(error)}); fewer --frames, a larger --ratio or "
            "--dtype bfloat16 take less, see the plan command",
            1,
        )


def complain(text: str, code: int) -> int:
    print(f"vxl: {text}", file=sys.stderr)
    return code


def one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{error.strerror}"
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed; pip install 'vxl[model,video]'"
    return " ".join(str(error).split()) or type(error).__name__


def _warn(message: Any, category: type, *_: Any) -> None:
    from ..video.reader import VideoWarning

    if issubclass(category, VideoWarning):
        print(f"vxl: warning: {message}", file=sys.stderr)


# -- arguments -----------------------------------------------------------------------------------


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=_device, help="cpu, cuda, cuda:1 ... (default: a GPU)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")


def count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer from 1 on")
    return value


def ratio(text: str) -> int | list[int]:
    values = [count(part) for part in text.split(",")]
    return values[0] if len(values) == 1 else values


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"got {text!r}: {reason}") from None
    return device


def placement(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    default = torch.float32 if device.type == "cpu" else torch.bfloat16
    return device, DTYPES.get(options.dtype, default)


def quiet() -> None:
    """No bars and advice of transformers between our lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
