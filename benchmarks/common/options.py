"""Options that several benchmarks share."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

__all__ = ["add_output_options", "check_output_options"]


def add_output_options(parser: argparse.ArgumentParser, drawn: str = "") -> None:
    """Adds `--json` and, where `drawn` names what can be drawn, `--plot`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    if drawn:
        parser.add_argument(
            "--plot", type=Path, metavar="FILE.png", help=f"draw {drawn} (needs matplotlib)"
        )


def check_output_options(
    parser: argparse.ArgumentParser, options: argparse.Namespace, nothing_to_draw: str = ""
) -> None:
    """Ends the program before anything runs where a file could not be written or drawn.

    Args:
        nothing_to_draw: why `--plot` would find nothing; empty if it will.
    """
    for name in ("json", "plot"):
        path = getattr(options, name, None)
        if path is None:
            continue
        if path.is_dir() or not path.absolute().parent.is_dir():
            parser.error(f"--{name}: got {path}, expected a file in a folder that exists")
        if name == "plot" and importlib.util.find_spec("matplotlib") is None:
            parser.error("--plot: needs matplotlib: pip install matplotlib")
        if name == "plot" and nothing_to_draw:
            parser.error(f"--plot: {nothing_to_draw}")
