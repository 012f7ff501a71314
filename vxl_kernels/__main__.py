"""`python -m vxl_kernels [info]` says what is installed, what runs where, and why not.
`python -m vxl_kernels tune FILE` times tile shapes on this GPU and keeps the best."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import platform
import sys
from pathlib import Path

import torch

from . import __version__, _ext, _triton, backends


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _build_info() -> dict[str, str]:
    path = Path(__file__).with_name("_build_info.json")
    if not path.exists():
        return {"extension": "never built here", "cuda": "never built here"}
    return json.loads(path.read_text())


def _cuda(build: dict[str, str]) -> str:
    """What the loaded extension says, not what some build once noted beside it."""
    if _ext.has_cuda:
        return "rope_append and page copies are built in"
    note = build["cuda"]
    return note if note.startswith(("not", "never")) else "not in the loaded extension"


def report() -> str:
    """The text that the command prints."""
    build = _build_info()
    isa = _ext.extension.cpu_isa() if _ext.extension else "-"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    lines = [
        f"vxl_kernels   {__version__}",
        f"python        {platform.python_version()} on {platform.machine()}",
        f"torch         {torch.__version__}, {torch.get_num_threads()} threads",
        f"triton        {_version('triton')}",
        f"transformers  {_version('transformers')}",
        f"GPU           {gpu}",
        f"extension     {build['extension']}",
        f"  loaded      {'yes' if _ext.extension else 'no: ' + _ext.reason_missing}",
        f"  CPU kernels {isa}",
        f"  CUDA        {_cuda(build)}",
        "backends",
    ]
    for name, reasons in backends().items():
        lines.append(f"  {name:<11} {'ready' if not reasons else 'no: ' + '; '.join(reasons)}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m vxl_kernels", description=__doc__)
    parser.add_argument("command", nargs="?", choices=("info", "tune"), default="info")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of tune")
    given = parser.parse_args(arguments)
    if given.command == "tune":
        try:
            tune = importlib.import_module("._triton.tune", __package__)
        except ImportError:
            print(f"tune: {'; '.join(_triton.reasons(None))}", file=sys.stderr)
            return 1
        return tune.main(given.options)
    if given.options:
        parser.error(f"info: got {' '.join(given.options)}, expected no options")
    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
