"""A checkpoint that a command can load by its folder."""

import shutil
from pathlib import Path

from helpers.paths import CHECKPOINT


def write_checkpoint(folder: Path) -> None:
    """The tiny checkpoint with a tokenizer of bytes, in a new folder."""
    from examples.demo_clip import byte_tokenizer  # needs more packages than the kernels' tests

    shutil.copytree(CHECKPOINT, folder)
    byte_tokenizer(128).save_pretrained(folder)
