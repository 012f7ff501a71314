"""`vxl watch --videos`: memories of many videos, a manifest, and runs that go on."""

import json

import pytest
from helpers.clips import write_clip

from vxl_cli.library import MANIFEST, Watcher


@pytest.fixture
def library(place, tmp_path):
    """A list of three videos, one of them in a folder beside it, one that is noise, one missing."""
    videos = tmp_path / "videos"
    (videos / "deep").mkdir(parents=True)
    for i, name in enumerate(("a.mp4", "b.mp4", "deep/a.mp4")):
        write_clip(videos / name, count=20 + 10 * i, fps=10, shows=range(i, 20 + 11 * i))
    (videos / "noise.mp4").write_bytes(b"no video" * 100)
    names = ["a.mp4", "# not b", "", "deep/a.mp4", "b.mp4", "noise.mp4", "gone.mp4", "a.mp4"]
    (videos / "list.txt").write_text("\n".join(names))
    return videos


@pytest.fixture
def watched(monkeypatch):
    """The videos that a run watches."""
    from vxl_model import VideoXLForConditionalGeneration as Model

    seen, watch = [], Model.watch

    def recorded(self, video, **options):
        memory = watch(self, video, **options)
        seen.append(video)
        return memory

    monkeypatch.setattr(Model, "watch", recorded)
    return seen


def watch(run, library, folder, *more):
    given = ("--videos", library / "list.txt", "--save", folder, "--ratio", 2, *more)
    return run("watch", "--model", "model", *given)


def rows(folder):
    return [json.loads(line) for line in (folder / MANIFEST).read_text().splitlines()]


def test_a_list_of_videos(run, library, tmp_path):
    code, out, _ = watch(run, library, tmp_path / "out", "--json")
    assert code == 0
    assert json.loads(out) | {"manifest": ""} == {
        "videos": 5, "watched": 3, "bad": 2, "manifest": "",
    }  # fmt: skip
    told = rows(tmp_path / "out")
    names = ["a.mp4", "deep/a.mp4", "b.mp4", "noise.mp4", "gone.mp4"]
    assert [row["video"] for row in told] == [str(library / name) for name in names]
    assert "not a video" in told[3]["error"]
    assert "No such file" in told[4]["error"]
    assert len({row["memory"] for row in told[:3]}) == 3
    for row in told[:3]:
        code, out, _ = run(
            "ask", "--model", "model", "--memory", tmp_path / "out" / row["memory"],
            "--max-new-tokens", 4, "--json", "What?",
        )  # fmt: skip
        about = json.loads(out)
        for name in ("frames", "visual_tokens", "cached_tokens"):
            assert about[name] == row[name]


def test_a_run_goes_on_where_it_was(run, library, tmp_path, watched):
    out = tmp_path / "out"
    watch(run, library, out)
    first = {path: path.read_bytes() for path in out.glob("*.vxl")}
    before = rows(out)
    sorted(first)[0].unlink()
    sorted(first)[1].write_bytes(b"cut off")
    watched.clear()
    code, said, _ = watch(run, library, out)
    assert (code, len(watched)) == (0, 2)
    assert "2 watched, 1 there already, 2 bad" in said
    assert {path: path.read_bytes() for path in out.glob("*.vxl")} == first
    for row in (*before, *(after := rows(out))):
        row.pop("seconds", None)
    assert after == before


def test_another_setting_or_another_file_is_watched_again(run, library, tmp_path, watched):
    out = tmp_path / "out"
    for more in ((), ("--frames", 1), ("--final",)):
        watched.clear()
        watch(run, library, out, *more)
        assert len(watched) == 3
    watched.clear()
    write_clip(library / "b.mp4", count=10, fps=10)
    watch(run, library, out)
    assert watched == [str(library / "b.mp4")]


def test_the_manifest_of_an_interrupted_run_tells_what_is_there(
    run, library, tmp_path, monkeypatch
):
    def interrupted(self, video, watch=Watcher.watch):
        if video.endswith("b.mp4"):
            raise KeyboardInterrupt
        return watch(self, video)

    monkeypatch.setattr(Watcher, "watch", interrupted)
    assert watch(run, library, tmp_path / "out")[0] == 130
    assert [row["video"] for row in rows(tmp_path / "out")] == [
        str(library / name) for name in ("a.mp4", "deep/a.mp4")
    ]


def test_errors(run, library, tmp_path):
    code, _, err = run(
        "watch", "--model", "model", "--videos", library / "noise.mp4", "--save", tmp_path / "x"
    )
    assert (code, "none of 1 could be watched" in err) == (2, True)
    code, _, err = run(
        "watch", "--model", "model", "--video", "clip.mp4", "--save", tmp_path / "x", "--ray"
    )
    assert (code, "--ray: for --videos only" in err) == (2, True)
    (library / "empty.txt").write_text("# nothing\n")
    code, _, err = run(
        "watch", "--model", "model", "--videos", library / "empty.txt", "--save", tmp_path / "x"
    )
    assert (code, "got none" in err) == (2, True)
