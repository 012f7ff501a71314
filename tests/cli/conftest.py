"""A folder with a checkpoint, a clip and pictures, and a fixture that runs commands in it."""

import pytest
from helpers.checkpoint import write_checkpoint


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the tiny checkpoint, a tokenizer of bytes in it, and a clip."""
    from helpers.clips import picture, write_clip
    from PIL import Image

    folder = tmp_path_factory.mktemp("cli")
    write_checkpoint(folder / "model")
    write_clip(folder / "clip.mp4", count=60, fps=10)
    Image.fromarray(picture(5, 200, 120)).save(folder / "one.png")
    Image.fromarray(picture(9, 120, 200)).save(folder / "two.png")
    return folder


@pytest.fixture
def run(place, capsys, monkeypatch):
    """Runs a command in that folder. Returns exit code, stdout and stderr."""
    from vxl_cli.main import main

    monkeypatch.chdir(place)

    def call(*arguments):
        code = main([str(a) for a in arguments])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call
