"""What the commands of every package share: parsing, errors in one line, devices, output files.

Exit codes: 0 fine; 2 the input cannot be used, said in one line; 1 out of memory or an unexpected
error; 130 interrupted. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch

__all__ = [
    "Parser",
    "add_device_arguments",
    "byte_size",
    "clock",
    "complain",
    "count",
    "one_line",
    "output_file",
    "placement",
    "quiet",
    "ratio",
    "run",
]

_EXTRAS = {  # of pyproject.toml, where it is not the model's
    "ray": "ray",
    **dict.fromkeys(
        ("fastapi", "httpx", "prometheus_client", "python_multipart", "uvicorn", "websockets"),
        "model,video,serve",
    ),
}
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
        extras = _EXTRAS.get((error.name or "").partition(".")[0], "model,video")
        return f"{error.name} is not installed; pip install 'vxl[{extras}]'"
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


def clock(device: torch.device) -> float:
    """Seconds, read once the device has done what is queued: a call may return before."""
    import torch

    if device.type != "cpu":
        module = torch.get_device_module(device)
        if device.index is None:  # not all of them take a device
            module.synchronize()
        else:
            module.synchronize(device)
    return time.perf_counter()


def count(text: str) -> int:
    """An argument's type: a positive integer."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer >= 1")
    return value


def byte_size(text: str) -> int:
    """An argument's type: 80G, 24GiB or 1.5T, binary multiples."""
    units = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
    digits = text.upper().removesuffix("B").removesuffix("I")
    number = digits.rstrip("KMGT")
    try:
        size = float(number) * 1024 ** units[digits[len(number) :]]
    except (ValueError, KeyError):
        size = 0
    if not 0 < size < 2**63:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a size like 80G")
    return int(size)


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


def input_path(option: str, path: str | os.PathLike[str], folder: bool = False) -> Path:
    """A file or folder that a command reads.

    Raises:
        ValueError: it is not there, or is of the other kind.
    """
    found = Path(path)
    if not (found.is_dir() if folder else found.is_file()):
        wanted = "folder" if folder else "file"
        got = f"{path}, no such {wanted}" if not os.path.lexists(path) else f"{path}, no {wanted}"
        raise ValueError(f"{option}: got {got}")
    return found


def model_name(option: str, name: str) -> str:
    """A checkpoint: a folder, or a name on the Hub, which is at most OWNER/NAME.

    Raises:
        ValueError: it can be neither.
    """
    local = name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.isfile(name)
    if not name or (local and not os.path.isdir(name)):
        raise ValueError(f"{option}: got {name!r}, no such folder")
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise ValueError(f"{option}: got {name!r}, a folder without config.json")
    return name


def positive(text: str) -> float:
    """An argument's type: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0")
    return value


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
