"""JSON files of a checkpoint. Each holds an object, or one error names the file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["check_json_files", "read_json_object"]

_INDEX = ".index.json"
# What reads a checkpoint ignores some of these where they are damaged.
_MODEL_FILES = (
    "config.json",
    "vision_config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)


def _json_value(text: str | bytes) -> Any:
    """As `json.loads`; text that is no UTF-8, or nested too deeply, is a ValueError too."""
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json_object(file: str | os.PathLike[str]) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        ValueError: the file cannot be read, or holds anything else. It names the file.
    """
    try:
        value = _json_value(Path(file).read_bytes())
    except (ValueError, OSError) as error:
        raise ValueError(f"{os.fspath(file)}: not JSON ({error})") from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise ValueError(f"{os.fspath(file)}: got a {kind}, expected an object")
    return value


def check_json_files(folder: str | os.PathLike[str], names: Iterable[str] = _MODEL_FILES) -> None:
    """Raises ValueError for the first damaged one of a local checkpoint's files. A name that is
    not there is fine. `folder` may be a name on the Hub, of which nothing is checked."""
    unread = "pytorch_model.bin.index.json"
    if not any(os.path.lexists(Path(folder) / f"model.safetensors{x}") for x in ("", _INDEX)):
        unread = ""
    for name in names:
        file = Path(folder) / name
        if name == unread or not os.path.lexists(file):
            continue
        value = read_json_object(file)
        if name.endswith(".index.json") and not isinstance(value.get("weight_map"), dict):
            raise ValueError(f"{file}: got no weight_map, expected the file of each weight")
