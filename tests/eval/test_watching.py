"""What a task shows becomes a memory; answers on disk; the memory of runs; suites."""

import importlib
import json
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from helpers.clips import picture
from PIL import Image

from vxl_eval import memory_run
from vxl_eval.answers import Answers, model_identity, read_answers, request_key
from vxl_eval.cli import main
from vxl_eval.suite import Task, plan_lines, read_suite, task_seconds
from vxl_eval.watching import Sampling, Watcher, visual_identity
from vxl_model import VideoMemory


def same(model, memory, other):
    for layer in range(model.config.num_hidden_layers):
        for given, wanted in zip(memory.keys_values(layer), other.keys_values(layer), strict=True):
            assert given.equal(wanted)


def test_kinds_of_visual_input(model, place, tmp_path):
    shown = [Image.fromarray(picture(i, 70, 50)) for i in (3, 90, 200)]
    for i, one in enumerate(shown):
        one.save(tmp_path / f"{i}.png")
    watcher = Watcher(model, Sampling(frames=2, ratio=4))

    def seen(*visuals):
        return watcher.memory(object(), lambda: visuals)

    same(model, seen(place / "movie.mp4"), model.watch(place / "movie.mp4", frames=2, ratio=4))
    same(model, seen(str(tmp_path)), model.watch(tmp_path, frames=2, ratio=4))
    same(model, seen(*shown), model.watch([shown[0], shown[2]], ratio=4))
    pixels = model.processor.image_to_pixels(shown[0])
    wanted = model.watch(pixel_values=pixels, image_sizes=(70, 50), ratio=4)
    same(model, seen(shown[0]), wanted)
    same(model, seen(tmp_path / "0.png"), wanted)
    same(model, seen(), model.watch(visual_features=[], ratio=4))
    with pytest.raises(ValueError, match="visual: got int"):
        seen(5)


def test_frames_are_repeated_as_published(model, place):
    """linspace over the frames there are, rounded down: 3 frames as 7."""
    frames = np.stack([np.asarray(Image.fromarray(picture(i, 336, 336))) for i in (1, 60, 250)])
    watcher = Watcher(model, Sampling(frames=7, ratio=4, repeat_frames=True))
    pictures = [Image.fromarray(frame) for frame in frames]
    wanted = model.watch(frames[[0, 0, 0, 1, 1, 1, 2]], ratio=4)
    same(model, watcher.memory(1, lambda: pictures), wanted)
    long = Watcher(model, Sampling(frames=2, repeat_frames=True, ratio=4))
    movie = place / "movie.mp4"
    same(model, long.memory(1, lambda: [movie]), model.watch(movie, frames=2, ratio=4))


def test_one_watch_for_the_questions_of_a_video(model, place):
    watcher, opened = Watcher(model, Sampling(frames=1)), []

    def show(name):
        opened.append(name)
        return [place / "movie.mp4"]

    for name in ("a", "a", "b", "b", "a"):
        watcher.memory(name, lambda name=name: show(name))
    assert opened == ["a", "b", "a"]
    assert watcher.watched == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": 0}, "frames: got 0"),
        ({"fps": 0}, "fps: got 0"),
        ({"repeat_frames": True}, "repeat_frames"),
        ({"repeat_frames": True, "frames": 4, "fps": 1}, "repeat_frames"),
    ],
)
def test_what_sampling_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


def test_a_changed_file_is_another_one(tmp_path):
    file = tmp_path / "a.mp4"
    file.write_bytes(b"1")
    before = visual_identity([file])
    assert before == visual_identity([str(file)])
    file.write_bytes(b"22")
    assert visual_identity([file]) != before
    assert visual_identity([file, Image.new("RGB", (2, 2))]) is None
    folder = model_identity(tmp_path)
    file.write_bytes(b"333")
    assert model_identity(tmp_path) != folder
    assert model_identity("owner/name") == ["owner/name"]


def test_answers_survive_torn_lines_and_are_shared(tmp_path):
    first, other = Answers(tmp_path, 0), Answers(tmp_path, 1)
    first.add("a", {"answer": "x"})
    other.add("b", {"answer": ["y", 2]})
    with (tmp_path / "answers-0.jsonl").open("a") as file:
        file.write('{"key": "c", "ans')
    again = Answers(tmp_path, 0)
    assert len(again) == 2
    assert again.get("b")["answer"] == ["y", 2]
    assert again.get("c") is None
    again.add("c", {"answer": "z"})
    assert [x["key"] for x in read_answers(tmp_path)] == ["a", "c", "b"]
    assert Answers(None).get("a") is None


def test_settings_are_part_of_a_request():
    request = {"context": "What?"}
    keys = {request_key({"frames": frames}, request) for frames in (1, 2, None)}
    assert len(keys) == 3
    assert request_key({"frames": 1}, dict(request)) in keys


def test_the_memory_of_runs(place, tmp_path, capsys):
    asked = ["memory", "--model", place / "model", "--frames", "8,16", "--ratio", "4"]
    assert main(list(map(str, [*asked, "--output", tmp_path, "--device", "cpu"]))) == 0
    points = json.loads((tmp_path / "memory.json").read_text())["points"]
    assert [point["frames"] for point in points] == [8, 16]
    assert [point["visual_tokens"] for point in points] == [8 * 144, 16 * 144]
    for point in points:  # frames of noise alone take 2.6 MiB for 8
        assert point["peak_bytes"] > 2**20
        assert point["planned_bytes"] > 2**20
        assert point["watch_seconds"] > 0
    assert (tmp_path / "memory.md").read_text() == capsys.readouterr().out
    assert (tmp_path / "memory.png").stat().st_size > 1000


class Calls(list):
    """The names of functions, each noted when a call returns."""

    def noted(self, name, function=lambda *args, **options: None):
        def call(*args, **options):
            found = function(*args, **options)
            self.append(name)
            return found

        return call


def test_seconds_of_watching_end_when_the_device_has_watched(model, monkeypatch):
    calls = Calls()
    monkeypatch.setattr(memory_run, "clock", calls.noted("clock", lambda device: 0.0))
    monkeypatch.setattr(model, "watch", calls.noted("watch", model.watch))
    monkeypatch.setattr(VideoMemory, "ask", calls.noted("ask"))
    memory_run.measure(model, memory_run.PeakMemory(model.device), 2, 4)
    assert calls == ["clock", "watch", "clock", "ask", "clock"]


def test_seconds_of_a_request_end_when_the_device_is_done(monkeypatch):
    """lmms-eval itself may be missing."""
    stubs = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.instance", "lmms_eval.api.model")
    for name in stubs:
        monkeypatch.setitem(sys.modules, name, mock.MagicMock(lmms=object))
    monkeypatch.delitem(sys.modules, "vxl_eval.lmms_model", raising=False)
    lmms_model = importlib.import_module("vxl_eval.lmms_model")
    monkeypatch.delitem(sys.modules, "vxl_eval.lmms_model")
    calls = Calls()
    monkeypatch.setattr(lmms_model, "clock", calls.noted("clock", lambda device: 0.0))
    one = mock.MagicMock(_key=lambda request: "key", answers=mock.MagicMock(get={}.get))
    one._watcher = SimpleNamespace(watched=0, memory=calls.noted("watch"))
    one._answer = calls.noted("answer", lambda request, memory: "A")
    request = lmms_model._Request("generate_until", ("task", "test", 0), {}, "visuals")
    assert lmms_model.VideoXL._answered(one, [request]) == {"key": "A"}
    assert calls == ["clock", "watch", "clock", "answer", "clock"]


def test_the_papers_suite():
    suite = read_suite("paper")
    paper = {task.task: task.paper for task in suite.tasks}
    assert paper["videomme"] == 55.5
    assert paper["videomme_w_subtitle"] == 61.0
    assert paper["mvbench"] == 55.3
    assert "mlvu_dev" in paper


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: 5", "suite.yaml"),
        ("tasks: [{task: a, kind: b}]", "kind 'b'"),
        ("tasks: [{task: a, size: b}]", "size"),
        ("tasks: [", "suite.yaml"),
    ],
)
def test_what_a_suite_cannot_be(tmp_path, text, message):
    (tmp_path / "suite.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_suite(str(tmp_path / "suite.yaml"))
    with pytest.raises(ValueError, match="expected paper"):
        read_suite("papers")


def test_a_plan_says_what_is_needed(model, monkeypatch):
    monkeypatch.setattr("vxl_eval.suite.download_size", lambda task: (12.0, "says the test"))
    tasks = [
        Task("a", "A", frames=4, samples=300, videos=100, dataset="x/y"),
        Task("b", "B", dataset="x/y"),
    ]
    seconds = task_seconds(model.config, tasks[0], 4, model.device, model.dtype, 1e9)
    half = task_seconds(model.config, tasks[0], 4, model.device, model.dtype, 2e9)
    assert seconds == pytest.approx(2 * half)
    lines = plan_lines(tasks, [7200.0, None], None)[1:]
    assert lines[0] == "A: 300 questions, at least 2.0 hours; x/y, 12 GB (says the test)"
    assert lines[1] == "B: an unknown number of questions; the same data"


def test_a_suite_without_lmms_eval(place, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["--model", str(place / "model"), "--suite", "paper"]) == 2
    assert "lmms-eval is not installed" in capsys.readouterr().err
    assert main(["--model", str(place / "model")]) == 2
    assert "--suite" in capsys.readouterr().err
    asked = ["--model", str(place / "model"), "--suite", "paper", "--tasks", "mmmu"]
    assert main(asked) == 2
    assert "--tasks: got mmmu" in capsys.readouterr().err
