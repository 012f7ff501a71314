"""A folder with the tiny checkpoint, a tokenizer of bytes in it, and a clip."""

import pytest
from helpers.checkpoint import write_checkpoint


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    from helpers.clips import write_clip

    folder = tmp_path_factory.mktemp("eval")
    write_checkpoint(folder / "model")
    write_clip(folder / "movie.mp4", count=40, fps=10)
    return folder


@pytest.fixture(scope="session")
def model(place):
    from vxl_model import VideoXLForConditionalGeneration

    return VideoXLForConditionalGeneration.from_pretrained(place / "model").eval()
