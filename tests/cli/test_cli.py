"""The command line: answers, files and warnings."""

import io
import json
import shutil
import sys
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("av")
pytest.importorskip("PIL.Image")

from helpers.clips import write_clip
from helpers.commands import ASK, QUESTION

from vxl_cli import session
from vxl_cli.common import clock
from vxl_kernels import _ext
from vxl_model import VideoXLForConditionalGeneration
from vxl_model.video.reader import open_video

pytestmark = [
    pytest.mark.core,
    pytest.mark.skipif(_ext.extension is None, reason="no compiled extension"),
]


def expected_answer(place, memory_of):
    model = VideoXLForConditionalGeneration.from_pretrained(place / "model")
    processor = model.processor
    memory = memory_of(model, processor)
    tail = processor.suffix_ids(QUESTION)[0]
    ids = memory.ask(tail, max_new_tokens=6, do_sample=False, eos_token_id=processor.stop_ids)
    return processor.decode(ids)


def test_ask(run, place):
    code, out, err = run(*ASK, "--video", "clip.mp4", QUESTION)
    assert (code, err) == (0, "")
    want = expected_answer(
        place,
        lambda model, processor: model.watch(
            pixel_values=list(processor.video_pixels(place / "clip.mp4")),
            input_ids=processor.prefix_ids(),
            ratio=4,
        ),
    )
    assert out.strip() == want


def test_in_one_line_of_python(run, place):
    """The library does the same in one line, with its default prompt and stop tokens."""
    model = VideoXLForConditionalGeneration.from_pretrained(place / "model", ratio=4)
    answer = model.watch(place / "clip.mp4").ask(QUESTION, max_new_tokens=6, do_sample=False)
    code, out, _ = run(*ASK, "--video", "clip.mp4", "--json", QUESTION)
    assert code == 0
    assert json.loads(out)["answer"] == answer


def test_ask_json_and_memory(run):
    code, out, err = run(*ASK, "--video", "clip.mp4", "--json", QUESTION, "And then?")
    assert (code, err) == (0, "")
    first, second = map(json.loads, out.splitlines())
    assert (first["question"], second["question"]) == (QUESTION, "And then?")
    assert first["frames"] == 6
    assert first["visual_tokens"] == 6 * 144
    assert first["cached_tokens"] > 6 * 144 // 4
    assert 0 < first["new_tokens"] <= 6

    code, out, err = run(
        "watch", "--model", "model", "--video", "clip.mp4", "--ratio", 4, "--save", "m.vxl"
    )
    assert (code, err) == (0, "")
    assert "6 frames, 864 visual tokens" in out
    code, out, err = run(
        "ask",
        "--model",
        "model",
        "--memory",
        "m.vxl",
        "--max-new-tokens",
        6,
        "--json",
        QUESTION,
        "And then?",
    )
    assert (code, err) == (0, "")
    again = [json.loads(line)["answer"] for line in out.splitlines()]
    assert again == [first["answer"], second["answer"]]


def test_frames_and_fps(run):
    for options, frames in (
        (["--frames", 3], 3),
        (["--fps", 2], 12),
        (["--fps", 2, "--frames", 5], 5),
    ):
        code, out, _ = run(*ASK, "--video", "clip.mp4", "--json", *options, QUESTION)
        assert code == 0
        assert json.loads(out)["frames"] == frames


def test_a_folder_of_frames(run, place, tmp_path):
    """Frame 2 comes before frame 10, as in `watch` of the library."""
    for i in (1, 2, 10):
        shutil.copy(place / ("two.png" if i == 2 else "one.png"), tmp_path / f"frame {i}.png")
    model = VideoXLForConditionalGeneration.from_pretrained(place / "model", ratio=4)
    want = model.watch(tmp_path).ask(QUESTION, max_new_tokens=6, do_sample=False)
    code, out, _ = run(*ASK, "--video", tmp_path, "--json", QUESTION)
    assert code == 0
    assert json.loads(out)["answer"] == want
    assert json.loads(out)["frames"] == 3
    code, out, err = run(*ASK, "--video", tmp_path, "--json", "--frames", 2, QUESTION)
    assert json.loads(out)["frames"] == 2
    watch = ("watch", "--model", "model", "--video", tmp_path, "--ratio", 4, "--save")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    code, _, err = run(*watch, tmp_path / "frame 2.png")
    assert code == 2
    assert "which is an input" in err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert run(*watch, "frames.vxl")[0] == 0
    code, out, _ = run("ask", *ASK[1:3], *ASK[5:], "--memory", "frames.vxl", "--json", QUESTION)
    assert json.loads(out)["answer"] == want


def test_what_an_answer_begins_with(run, place):
    prefix = "Best option: ("
    model = VideoXLForConditionalGeneration.from_pretrained(place / "model", ratio=4)
    memory, processor = model.watch(place / "clip.mp4"), model.processor
    greedy = {"max_new_tokens": 6, "do_sample": False}
    ids = processor.suffix_ids(QUESTION, prefix)
    new = memory.ask(ids, **greedy, eos_token_id=processor.stop_ids)
    want = processor.decode(new)
    assert memory.ask(QUESTION, **greedy, answer_prefix=prefix) == want
    assert memory.ask(QUESTION, **greedy) != want
    code, out, _ = run(*ASK, "--video", "clip.mp4", "--json", "--answer-prefix", prefix, QUESTION)
    assert code == 0
    answer = json.loads(out)
    assert (answer["answer"], answer["answer_prefix"]) == (want, prefix)
    with pytest.raises(ValueError, match=r"^answer_prefix: got 'x', expected none with ids"):
        memory.ask(ids, answer_prefix="x")


def test_images(run, place):
    code, out, err = run(*ASK, "--image", "one.png", "--json", QUESTION)
    assert (code, err) == (0, "")
    one = json.loads(out)
    assert one["frames"] == 2  # tiles; the whole picture is not used
    want = expected_answer(
        place,
        lambda model, processor: model.watch(
            pixel_values=processor.image_to_pixels(place / "one.png"),
            image_sizes=(200, 120),
            input_ids=processor.prefix_ids(),
            ratio=4,
        ),
    )
    assert one["answer"] == want
    code, out, _ = run(*ASK, "--image", "one.png", "--image", "two.png", "--json", QUESTION)
    assert code == 0
    assert json.loads(out)["frames"] == 2


def test_chat(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n\nx<|im_end|>\nAnd then?\n"))
    code, out, err = run(
        "chat",
        "--model",
        "model",
        "--video",
        "clip.mp4",
        "--max-new-tokens",
        6,
        "--ratio",
        4,
        "--json",
    )
    assert code == 0
    assert [json.loads(line)["question"] for line in out.splitlines()] == [QUESTION, "And then?"]
    assert err == "vxl: question: got the control token '<|im_end|>', expected plain text\n"


def test_version(run):
    from vxl_kernels import __version__

    assert run("--version") == (0, f"vxl {__version__}\n", "")


def test_debug_shows_the_traceback(run, monkeypatch):
    from vxl_cli.session import Session

    def broken(*_):
        raise LookupError("two\nlines")

    monkeypatch.setattr(Session, "answer", broken)
    code, out, err = run(*ASK, "--video", "clip.mp4", "Q")
    assert (code, out, err) == (1, "", "vxl: LookupError: two lines (--debug shows where)\n")
    with pytest.raises(LookupError):
        run(*ASK, "--video", "clip.mp4", "--debug", "Q")


def test_ask_saves_what_it_watched(run):
    code, out, err = run(*ASK, "--video", "clip.mp4", "--save", "asked.vxl", QUESTION)
    assert (code, err) == (0, "")
    ask = ("ask", "--model", "model", "--memory", "asked.vxl", "--max-new-tokens", "6")
    assert run(*ask, QUESTION) == (0, out, "")


def test_more_positions_than_the_model_was_trained_for(run, place, tmp_path):
    shutil.copytree(place / "model", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 64}))
    base = ("--model", tmp_path / "model", "--video", "clip.mp4", "--ratio", 4)
    code, _, err = run("watch", *base, "--save", tmp_path / "m.vxl")
    assert code == 0
    assert "vxl: warning: the video takes" in err
    assert "more than the 64 that the model was trained for" in err
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 300}))
    code, _, err = run("ask", *base, "--max-new-tokens", 100, QUESTION)
    assert code == 0
    assert "the video with this question and the longest answer takes" in err


def test_damage_is_a_warning(run, place):
    data = write_clip(
        place / "whole.mp4",
        count=100,
        gop=10,
        size=(256, 256),
        container_options={"movflags": "faststart"},
    ).read_bytes()
    begin = data.index(b"mdat")
    (place / "cut.mp4").write_bytes(data[: begin + (len(data) - begin) // 2])
    code, out, err = run(*ASK, "--video", "cut.mp4", "--json", QUESTION)
    assert code == 0
    assert 3 <= json.loads(out)["frames"] <= 8
    assert err.startswith("vxl: warning: cut.mp4: ends after")
    assert err.count("\n") == 1


def test_the_clock_waits_for_a_gpu(monkeypatch):
    """A CPU has done its work when a call returns."""
    waited = []
    cuda = SimpleNamespace(synchronize=waited.append)
    mps = SimpleNamespace(synchronize=lambda: waited.append("mps"))  # takes no device
    modules = {"cuda": cuda, "mps": mps}
    monkeypatch.setattr(torch, "get_device_module", lambda device: modules[device.type])
    assert clock(torch.device("cpu")) <= clock(torch.device("cuda", 1)) <= time.perf_counter()
    clock(torch.device("mps"))
    assert waited == [torch.device("cuda", 1), "mps"]


def test_seconds_of_watching_end_when_the_device_has_watched(run, monkeypatch):
    calls, remember = [], session.Session._remember

    def remembered(self, source):
        calls.append("watch")
        return remember(self, source)

    monkeypatch.setattr(session, "clock", lambda device: calls.append("clock") or 0.0)
    monkeypatch.setattr(session.Session, "_remember", remembered)
    code, _, err = run(*ASK, "--video", "clip.mp4", QUESTION)
    assert (code, err) == (0, "")
    assert calls == ["clock", "watch", "clock"]


def test_reader_is_closed_when_the_model_fails(place, monkeypatch):
    """An error between decoding and answer leaves no thread running."""
    import threading

    model = VideoXLForConditionalGeneration.from_pretrained(place / "model")
    monkeypatch.setattr(
        model.model.mm_projector[0], "forward", lambda x: (_ for _ in ()).throw(ValueError("no"))
    )
    with pytest.raises(ValueError, match="no"):
        model.watch(open_video(place / "clip.mp4", batch=1), input_ids=[1])
    assert not [t for t in threading.enumerate() if t.name.startswith("vxl-")]
