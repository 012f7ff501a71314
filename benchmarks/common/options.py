"""Options that several benchmarks share."""

from __future__ import annotations

import argparse
import importlib.util
import io
from pathlib import Path
from typing import Any

from vxl_kernels.files import atomic_write

__all__ = ["add_output_options", "check_output_options", "save_figure"]


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
    json, plot = (getattr(options, name, None) for name in ("json", "plot"))
    if json is not None and plot is not None and _same_file(json, plot):
        parser.error(f"--plot: got {plot}, which --json names too")
    for name in ("json", "plot"):
        path = getattr(options, name, None)
        if path is None:
            continue
        if path.is_dir() or not path.absolute().parent.is_dir():
            parser.error(f"--{name}: got {path}, expected a file in a folder that exists")
        if name == "plot" and importlib.util.find_spec("matplotlib") is None:
            parser.error("--plot: needs matplotlib: pip install matplotlib")
        if name == "plot" and path.suffix[1:] not in _formats():
            parser.error(f"--plot: got {path}, expected .{', .'.join(sorted(_formats()))}")
        if name == "plot" and nothing_to_draw:
            parser.error(f"--plot: {nothing_to_draw}")


def _same_file(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve() or (a.exists() and b.exists() and a.samefile(b))


def _formats() -> set[str]:
    """Kinds of files that matplotlib draws."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    return set(FigureCanvasAgg.filetypes)


def save_figure(path: Path, figure: Any, dpi: int = 150) -> None:
    """Writes a figure of matplotlib, whole or not at all."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:], dpi=dpi)
    atomic_write(path, drawn.getvalue(), durable=False)
