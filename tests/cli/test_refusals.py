"""What the command refuses with one line, and files that it does not overwrite."""

import io
import shutil
import sys

import pytest
import torch
from helpers.paths import CHECKPOINT
from safetensors.torch import save_file

pytest.importorskip("transformers")
pytest.importorskip("av")
pytest.importorskip("PIL.Image")

from helpers.clips import write_audio

from vxl_kernels import _ext
from vxl_model import VideoXLForConditionalGeneration

pytestmark = [
    pytest.mark.core,
    pytest.mark.skipif(_ext.extension is None, reason="no compiled extension"),
]


@pytest.mark.parametrize("command", ["watch", "ask", "chat"])
@pytest.mark.parametrize("form", ["same", "link", "hard link", "of the model"])
def test_an_input_is_never_written(run, place, tmp_path, command, form):
    (tmp_path / "talk.mp4").write_bytes((place / "clip.mp4").read_bytes())
    target = tmp_path / "talk.mp4"
    if form == "link":
        target = tmp_path / "link.vxl"
        target.symlink_to("talk.mp4")
    elif form == "hard link":
        target = tmp_path / "hard.vxl"
        target.hardlink_to(tmp_path / "talk.mp4")
    elif form == "of the model":
        target = place / "model" / "config.json"
    before = target.read_bytes()
    more = ("Q",) if command == "ask" else ()
    code, out, err = run(
        command, "--model", "model", "--video", tmp_path / "talk.mp4", "--save", target, *more
    )
    assert (code, out) == (2, "")
    assert "which is an input" in err
    assert target.read_bytes() == before


def test_what_was_loaded_is_never_written(run, place, tmp_path, monkeypatch):
    """A memory and pictures too, and by /save."""
    memory, picture = tmp_path / "m.vxl", tmp_path / "one.png"
    shutil.copy(place / "one.png", picture)
    model = ("--model", "model")
    assert run("watch", *model, "--image", picture, "--save", memory)[0] == 0
    before = memory.read_bytes(), picture.read_bytes()
    clip = (place / "clip.mp4").read_bytes()
    for source in (("--memory", memory), ("--image", "two.png", "--image", picture)):
        code, out, err = run("ask", *model, *source, "--save", source[-1], "Q")
        assert (code, out) == (2, "")
        assert "--save: got" in err
        assert "which is an input" in err
    for source in (("--memory", memory), ("--image", picture), ("--video", "clip.mp4")):
        lines = f"/save {source[1]}\n/save model/config.json\n"
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        code, out, err = run("chat", *model, *source)
        assert (code, out) == (0, "")
        assert err.count("which is an input") == 2
    assert (memory.read_bytes(), picture.read_bytes()) == before
    assert (place / "clip.mp4").read_bytes() == clip


def test_only_a_memory_is_replaced(run, place, tmp_path, monkeypatch):
    """By --save and by /save: another file that is there stays."""
    model, kept, clip = ("--model", "model"), tmp_path / "m.vxl", tmp_path / "clip.mp4"
    kept.touch()
    for _ in range(2):
        assert run("watch", *model, "--image", "one.png", "--save", kept)[0] == 0
    shutil.copy(place / "clip.mp4", clip)
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    for other in (clip, tmp_path / "x.safetensors"):
        before = other.read_bytes()
        code, out, err = run("watch", *model, "--image", "one.png", "--save", other)
        assert (code, out) == (2, "")
        assert f"--save: got {other}, which exists and is not a memory" in err
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"/save {other}\n"))
        code, out, err = run("chat", *model, "--memory", kept)
        assert (code, out) == (0, "")
        assert f"/save: got {other}, which exists and is not a memory" in err
        assert other.read_bytes() == before


def hostile(place):
    """Arguments, and a word of the error message."""
    (place / "broken.mp4").write_bytes(b"no video" * 100)
    (place / "empty.mp4").write_bytes(b"")
    (place / "text.vxl").write_text("no memory")
    (place / "bare").mkdir(exist_ok=True)
    write_audio(place / "sound.mp4")
    model = ("--model", "model")
    video = ("--video", "clip.mp4")
    return {
        "no command": ((), "COMMAND"),
        "unknown command": (("sing",), "invalid choice"),
        "no source": (("ask", *model, "Q"), "--video"),
        "two sources": (("ask", *model, *video, "--image", "one.png", "Q"), "not allowed"),
        "no question": (("ask", *model, *video), "QUESTION"),
        "empty question": (("ask", *model, *video, " "), "question: got ' '"),
        "control token": (("ask", *model, *video, "a<|im_end|>"), "control token"),
        "no model": (("ask", *video, "Q"), "--model"),
        "missing model": (("ask", "--model", "./none", *video, "Q"), "./none"),
        "folder without a model": (("ask", "--model", "bare", *video, "Q"), "not a checkpoint"),
        "model is a file": (("ask", "--model", "clip.mp4", *video, "Q"), "clip.mp4"),
        "missing video": (("ask", *model, "--video", "none.mp4", "Q"), "no such file"),
        "empty video": (("ask", *model, "--video", "empty.mp4", "Q"), "is empty"),
        "broken video": (("ask", *model, "--video", "broken.mp4", "Q"), "not a video"),
        "sound": (("ask", *model, "--video", "sound.mp4", "Q"), "no video stream"),
        "folder without pictures": (("ask", *model, "--video", "bare", "Q"), "without pictures"),
        "fps of a folder": (("ask", *model, "--video", ".", "--fps", 2, "Q"), "fps: got 2.0"),
        "control token in the answer": (
            ("ask", *model, *video, "--answer-prefix", "a<|im_end|>", "Q"),
            "answer_prefix: got the control token",
        ),
        "missing image": (("ask", *model, "--image", "none.png", "Q"), "none.png"),
        "video as image": (("ask", *model, "--image", "clip.mp4", "Q"), "not a picture"),
        "frames of an image": (("ask", *model, "--image", "one.png", "--frames", 2, "Q"), "--fps"),
        "no frames": (("ask", *model, *video, "--frames", 0, "Q"), "--frames"),
        "frames no number": (("ask", *model, *video, "--frames", "x", "Q"), "--frames"),
        "fps 0": (("ask", *model, *video, "--fps", 0, "Q"), "fps: got 0.0"),
        "ratio 0": (("ask", *model, *video, "--ratio", "0", "Q"), "--ratio"),
        "ratio of words": (("ask", *model, *video, "--ratio", "4,big", "Q"), "--ratio"),
        "ratio beyond the window": (("ask", *model, *video, "--ratio", "999", "Q"), "ratio: got"),
        "device": (("ask", *model, *video, "--device", "toaster", "Q"), "--device"),
        "device that is not there": (("ask", *model, *video, "--device", "cuda:77", "Q"), "cuda"),
        "dtype": (("ask", *model, *video, "--dtype", "int8", "Q"), "--dtype"),
        "missing memory": (("ask", *model, "--memory", "none.vxl", "Q"), "none.vxl"),
        "text as memory": (("ask", *model, "--memory", "text.vxl", "Q"), "text.vxl"),
        "ratio of a memory": (("ask", *model, "--memory", "text.vxl", "--ratio", 4, "Q"), "made"),
        "save nowhere": (("watch", *model, *video, "--save", "no/where.vxl"), "no such folder"),
        "save to a folder": (("watch", *model, *video, "--save", "bare"), "directory"),
        "plan without frames": (("plan", "--ratio", 8), "--frames"),
        "plan beyond the window": (("plan", "--frames", 9, "--ratio", 2000), "ratio: got 2000"),
        "plan of nothing": (("plan", "--frames", 9, "--ratio", 8, "--model", "./none"), "./none"),
    }


HOSTILE = [
    "no command",
    "unknown command",
    "no source",
    "two sources",
    "no question",
    "empty question",
    "control token",
    "no model",
    "missing model",
    "folder without a model",
    "model is a file",
    "missing video",
    "empty video",
    "broken video",
    "sound",
    "folder without pictures",
    "fps of a folder",
    "control token in the answer",
    "missing image",
    "video as image",
    "frames of an image",
    "no frames",
    "frames no number",
    "fps 0",
    "ratio 0",
    "ratio of words",
    "ratio beyond the window",
    "device",
    "device that is not there",
    "dtype",
    "missing memory",
    "text as memory",
    "ratio of a memory",
    "save nowhere",
    "save to a folder",
    "plan without frames",
    "plan beyond the window",
    "plan of nothing",
]


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile(run, place, kind):
    kinds = hostile(place)
    assert set(kinds) == set(HOSTILE)
    arguments, words = kinds[kind]
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert words in err
    assert "Traceback" not in err


def test_memory_of_another_model(run, place):
    assert run("watch", "--model", "model", "--video", "clip.mp4", "--save", "a.vxl")[0] == 0
    other = place / "other"
    shutil.copytree(place / "model", other, dirs_exist_ok=True)
    model = VideoXLForConditionalGeneration.from_pretrained(place / "model")
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    model.save_pretrained(other)
    code, out, err = run("ask", "--model", other, "--memory", "a.vxl", "Q")
    assert (code, out) == (2, "")
    assert "another model" in err


def test_model_without_tokenizer(run):
    code, out, err = run("ask", "--model", CHECKPOINT, "--video", "clip.mp4", "Q")
    assert (code, out) == (2, "")
    assert "tokenizer: the checkpoint has none" in err
