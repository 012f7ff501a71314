"""What `vxl eval` cannot use is refused by name, before a model is loaded or a file is written."""

import json

import pytest

from vxl_eval.cli import main
from vxl_eval.needle_run import drawn_needles
from vxl_eval.needle_samples import write_samples
from vxl_eval.scores import read_samples
from vxl_model import VideoXLForConditionalGeneration


@pytest.fixture
def refused(place, tmp_path, monkeypatch, capsys):
    """Runs a command that has to be refused; returns what it says."""

    def loaded(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(VideoXLForConditionalGeneration, "from_pretrained", loaded)
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        before = sorted(tmp_path.rglob("*"))
        status = main([str(argument) for argument in arguments])
        said = capsys.readouterr().err
        assert status == 2, said
        assert said.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return said

    return call


NEEDLE = {
    "one frame": (("--lengths", "1"), "--lengths: got '1', expected frames of videos, at least 2"),
    "length": (("--lengths", "5,x"), "--lengths: got 'x'"),
    "too long": (("--lengths", "5,41"), "--haystack: got 40 frames of"),
    "depth": (("--depths", "0,2"), "--depths: got '0,2', expected numbers from 0 to 1"),
    "depth nan": (("--depths", "nan,1"), "--depths: got 'nan,1'"),
    "no depths": (("--depths", "0"), "--depths: got '0'"),
    "fps": (("--fps", "0"), "--fps: got '0', expected a number above 0"),
    "fps inf": (("--fps", "inf"), "--fps: got 'inf'"),
    "ratio": (("--ratio", "4,99999"), "--ratio: got 99999, expected at most the window"),
    "haystack": (("--haystack", "none.mp4"), "--haystack: none.mp4: no such file"),
    "no needles": (("--needles", "none.json"), "--needles: got none.json, no such file"),
    "model": (("--model", "./none"), "--model: got './none', no such folder"),
}


@pytest.mark.parametrize(("changed", "message"), NEEDLE.values(), ids=NEEDLE)
def test_needles(refused, place, changed, message):
    given = {"--model": place / "model", "--haystack": place / "movie.mp4", "--lengths": "5"}
    given[changed[0]] = changed[1]
    said = refused("needle", *(part for pair in given.items() for part in pair))
    assert message.removeprefix("--") in said
    assert changed[0] in said or changed[0] == "--lengths"


def test_a_model_is_needed_but_for_samples(refused, place):
    asked = ("needle", "--haystack", place / "movie.mp4", "--lengths", "2", "--depths", "1")
    assert "--model: got nothing" in refused(*asked)
    assert main(list(map(str, (*asked, "--samples", "made")))) == 0


@pytest.mark.parametrize(
    "record",
    [
        {"picture": 5, "question": "?", "answer": "a"},
        {"picture": "a.png", "question": "?", "answer": ""},
        {"picture": "a.png", "question": None, "answer": "a"},
        {"picture": "text.png", "question": "?", "answer": "a"},
        "a.png",
    ],
)
def test_needles_of_a_file(refused, place, tmp_path, record):
    drawn_needles()[0].picture.save(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "needles.json").write_text(json.dumps([record]))
    asked = ("--model", place / "model", "--haystack", place / "movie.mp4", "--lengths", "5")
    assert "--needles: got" in refused("needle", *asked, "--needles", "needles.json")


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'["caf\xe9"]', b"", b"{}"],
    ids=["deep", "latin1", "empty", "object"],
)
def test_files_that_hold_something_else(refused, place, tmp_path, content):
    asked = ("--model", place / "model", "--haystack", place / "movie.mp4", "--lengths", "5")
    (tmp_path / "needles.json").write_bytes(content)
    assert "--needles: got needles.json" in refused("needle", *asked, "--needles", "needles.json")
    (tmp_path / "suite.yaml").write_bytes(content)
    assert "--suite: got suite.yaml" in refused("--suite", "suite.yaml", "--model", place / "model")


def test_samples_of_a_short_video(refused, place, tmp_path):
    asked = ("--haystack", place / "movie.mp4", "--lengths", "2,99", "--samples", "made")
    assert "--haystack: got 40 frames" in refused("needle", *asked)
    assert not (tmp_path / "made").exists()
    (tmp_path / "cut.mp4").write_bytes((place / "movie.mp4").read_bytes()[:2000])
    with pytest.raises(ValueError, match="cut"):
        write_samples(tmp_path / "cut.mp4", drawn_needles(), [9], [0], tmp_path / "made")
    assert not list(tmp_path.glob("made/*"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--model", "./none"), "--model: got './none', no such folder"),
        (("--model", "a/b/c"), "--model: got 'a/b/c', no such folder"),
        (("--frames", "4,0"), "--frames: got '0'"),
        (("--ratio", "99999"), "--ratio: got 99999"),
    ],
)
def test_memory(refused, place, changed, message):
    given = {"--model": place / "model", "--frames": "4", **dict([changed])}
    said = refused("memory", *(part for pair in given.items() for part in pair))
    assert message.removeprefix("--") in said
    assert changed[0] in said


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--model", "./none"), "--model: got './none', no such folder"),
        (("--suite", "none.yaml"), "--suite: got none.yaml, no such file"),
        (("--suite", "none"), "--suite: got 'none', expected paper"),
        (("--ratio", "99999"), "--ratio: got 99999"),
        (("--fps", "-1"), "argument --fps: "),
    ],
)
def test_suites(refused, place, changed, message):
    given = {"--model": place / "model", "--suite": "paper", **dict([changed])}
    said = refused("--dry-run", *(part for pair in given.items() for part in pair))
    assert message in said


def test_a_dry_run_needs_no_lmms_eval(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("vxl_eval.suite.download_size", lambda task: (12.0, "says the test"))
    monkeypatch.setattr("vxl_eval.suite_run._least_seconds", lambda tasks, _: [1.0] * len(tasks))
    monkeypatch.chdir(tmp_path)
    asked = ["--model", str(place / "model"), "--suite", "paper"]
    assert main([*asked, "--dry-run"]) == 0
    assert "2700 questions" in capsys.readouterr().err
    assert main(asked) == 2
    assert "lmms-eval is not installed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


LINE = {"filtered_resps": "A", "videomme_score": {"pred_answer": "A", "answer": "B"}}
SAMPLES = {
    "a list": ("[1]", ":1, a list"),
    "text": ("nothing", ":1, which is not JSON"),
    "no file": (None, "none.jsonl"),
    "empty": ("", "without a line"),
    "blank": ("\n\n", "without a line"),
    "no answer": (json.dumps({**LINE, "filtered_resps": []}), "no answer"),
    "no result": (json.dumps({"filtered_resps": "A"}), "0 results"),
    "no right answer": (
        json.dumps({**LINE, "videomme_score": {"pred_answer": "A"}}),
        ":1, no right answer",
    ),
    "a later line": (f"{json.dumps(LINE)}\nnull\n", ":2, a NoneType"),
    "not UTF-8": ("\udcff", ":1, which is not JSON"),
}


@pytest.mark.parametrize(("text", "message"), SAMPLES.values(), ids=SAMPLES)
def test_scores(refused, tmp_path, text, message):
    file = tmp_path / "none.jsonl"
    if text is not None:
        file.write_text(text, errors="surrogateescape")
        with pytest.raises(ValueError, match="samples: got"):
            read_samples(file)
    assert message in refused("scores", "--kind", "videomme", file)


def test_help_names_the_parts(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "PART" in shown
    for part in ("needle", "memory", "scores"):
        assert f"\n    {part} " in shown
