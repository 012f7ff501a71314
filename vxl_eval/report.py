"""The files of a report: JSON, Markdown and a picture in one folder, and never over an input."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vxl_kernels.files import atomic_write, check_target

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Report"]


class Report:
    """Makes the folder. Call it before a long computation: it refuses what cannot be written.

    Args:
        folder: `--output` of a command.
        name: of the files, without an ending.
        inputs: files and folders that the command reads.

    Raises:
        ValueError: a file of the report is an input.
        OSError: a file cannot be written.
    """

    def __init__(
        self, folder: str | os.PathLike[str], name: str, inputs: Iterable[str | Path | None]
    ) -> None:
        self.folder = Path(folder)
        self._name = name
        self._inputs = [Path(source) for source in inputs if source]
        self.folder.mkdir(parents=True, exist_ok=True)
        for ending in (".json", ".md", ".png"):
            check_target(self._file(ending), inputs=self._inputs, argument="--output")

    def _file(self, ending: str) -> Path:
        return self.folder / f"{self._name}{ending}"

    def _write(self, ending: str, data: str | bytes) -> None:
        atomic_write(self._file(ending), data, durable=False, inputs=self._inputs)

    def write(
        self, record: dict[str, Any], lines: Sequence[str], draw: Callable[[Figure], None]
    ) -> bool:
        """Replaces the files. Returns whether there is a picture: matplotlib draws it.

        Args:
            record: for JSON.
            lines: of Markdown.
            draw: draws on an empty figure.
        """
        self._write(".json", json.dumps(record, indent=1) + "\n")
        self._write(".md", "\n".join(lines) + "\n")
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return False
        figure, picture = Figure(dpi=150), io.BytesIO()
        draw(figure)
        figure.tight_layout()
        figure.savefig(picture, format="png")
        self._write(".png", picture.getvalue())
        return True
