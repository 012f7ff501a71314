"""The command line: answers, files and one-line errors."""

import io
import json
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.paths import CHECKPOINT, ROOT

pytest.importorskip("transformers")
pytest.importorskip("av")
Image = pytest.importorskip("PIL.Image")

from helpers.clips import write_audio, write_clip

from examples.demo import main as demo
from examples.demo import print_demo
from vxl_kernels import _ext
from vxl_model import VideoXLForConditionalGeneration
from vxl_model.video.reader import open_video

pytestmark = [
    pytest.mark.core,
    pytest.mark.skipif(_ext.extension is None, reason="no compiled extension"),
]

QUESTION = "What is shown?"


ASK = ("ask", "--model", "model", "--ratio", "4", "--max-new-tokens", "6")


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


def test_nothing_heavy_for_help_and_wrong_names(place):
    """`vxl --help` and a wrong file name need neither torch nor transformers."""
    code = (
        "import sys; from vxl_cli.main import main; status = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'numpy', 'av', 'PIL'} & set(sys.modules); "
        "print(sorted(heavy), file=sys.stderr); sys.exit(status)"
    )
    wrong = ("--model", "model", "--video", "none.mp4")
    for arguments, status in (
        (("--help",), 0),
        (("ask", "--help"), 0),
        (("ask", *wrong, "Q"), 2),
        (("chat", *wrong), 2),
        (("watch", *wrong, "--save", "m.vxl"), 2),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=place,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status
        assert done.stderr.splitlines()[-1] == "[]"
        assert status == 0 or "none.mp4: no such file" in done.stderr


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


def test_as_a_process(place):
    """The module runs, streams to stdout, and prints nothing else there or on stderr."""
    command = [sys.executable, "-m", "vxl_model", *ASK, "--video", "clip.mp4", QUESTION]
    done = subprocess.run(
        command, cwd=place, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


def environment():
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_demo(place, capsys):
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
