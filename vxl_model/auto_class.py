"""`register_for_auto_class`: saved folders that transformers' auto classes can load in a program
that does not import vxl_model.

transformers copies the file of a registered class and those that it imports. A class of this
package is written as a file that imports the package instead.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import transformers.models.auto as auto_module

from .errors import fail

__all__ = ["AUTO_MODULE", "AutoClassMixin", "write_auto_file"]

AUTO_MODULE = "video_xl"
_TEXT = '''"""Video-XL's classes, for `trust_remote_code=True`. They come with the package vxl."""

from vxl_model import (  # noqa: F401
    VideoXLConfig,
    VideoXLForConditionalGeneration,
    VideoXLImageProcessor,
    VideoXLModel,
    VideoXLProcessor,
    VideoXLVideoProcessor,
)
'''


class AutoClassMixin:
    """`register_for_auto_class` for a class of this package."""

    default_auto_class: ClassVar[str]
    registered_auto_class: ClassVar[str | None] = None

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Folders that are saved from now on name this class for an auto class of transformers:
        `AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)` loads them
        where vxl is installed.

        Raises:
            ValueError: transformers has no such auto class.
        """
        name = auto_class or cls.default_auto_class
        name = name if isinstance(name, str) else name.__name__
        if not hasattr(auto_module, name):
            fail("auto_class", repr(name), "an auto class of transformers")
        cls.registered_auto_class = name

    @classmethod
    def class_auto_map(cls) -> dict[str, str]:
        """The entry of a saved file for this class; empty if it is not registered."""
        if cls.registered_auto_class is None:
            return {}
        return {cls.registered_auto_class: f"{AUTO_MODULE}.{cls.__name__}"}


def write_auto_file(folder: str | os.PathLike[str]) -> None:
    """Writes the file that auto maps name."""
    (Path(folder) / f"{AUTO_MODULE}.py").write_text(_TEXT)
