"""`make demo`: its answers, and the times that it prints."""

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("av")
pytest.importorskip("PIL.Image")

from examples.demo import main as demo
from examples.demo import print_demo
from vxl_kernels import _ext

pytestmark = [
    pytest.mark.core,
    pytest.mark.skipif(_ext.extension is None, reason="no compiled extension"),
]


def test_demo(capsys):
    assert demo(["--frames", "12", "--max-new-tokens", "3", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    result = json.loads(out)
    print_demo(result)
    shown = capsys.readouterr().out
    assert "These words mean nothing" in shown
    for stage in ("decode and resize", "vision tower", "projector", "language model, video"):
        assert stage in shown
    seconds = result["seconds"]
    assert (result["frames"], result["visual_tokens"]) == (12, 12 * 144)
    inside = seconds["vision tower"] + seconds["projector and pooling"]
    assert 0 < inside + seconds["language model, video"] <= seconds["watch"]
    assert 0 < seconds["language model, answer"] <= seconds["answer"]
    assert seconds["watch"] + seconds["answer"] < seconds["total"]
    needles = result["needles"]
    assert needles["answers"] == needles["truth"]
    assert all(words in shown for words in needles["questions"])
