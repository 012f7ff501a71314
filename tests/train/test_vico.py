"""VICO: the right pictures of every clip, and runs that resume where they ended."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.paths import ROOT, TESTS

pytest.importorskip("transformers")
pytest.importorskip("av")
pytest.importorskip("PIL.Image")

from helpers.captioner import WORDS, Reader
from helpers.clips import write_audio, write_clip
from helpers.vico_samples import check_sample

from vxl_model.video.decoders import pyav
from vxl_model.video.decoders.choose import open_decoder
from vxl_model.video.reader import VideoError, VideoWarning
from vxl_train.vico import captioner
from vxl_train.vico.build import VicoSettings, find_videos, make_vico
from vxl_train.vico.captions import Clip, cut, read_clips
from vxl_train.vico.questions import FORMS

CLIPS = 9  # of 128 s; what is left is less than half of one


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos of 128 s at 2 frames per second. Each frame shows its number."""
    folder = tmp_path_factory.mktemp("videos")
    write_clip(folder / "a.mp4", count=256, fps=2, gop=4)
    write_clip(folder / "b.mkv", count=200, fps=2, gop=4)
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers_of(clip, pictures, fps=2, count=256):
    """The frames that are shown in the middle of each part of a clip."""
    return [min(int(t * fps + 1e-6), count - 1) for t in clip.times(pictures)]


# -- clips ---------------------------------------------------------------------------------------


def test_clips_of_14_seconds(folder):
    decoder = open_decoder(folder / "a.mp4")
    clips = cut(decoder, 14.0)
    assert [(c.index, c.start, c.end) for c in clips] == [
        (i, 14.0 * i, 14.0 * i + 14) for i in range(CLIPS)
    ]
    assert [c.end for c in cut(decoder, 50.0)] == [50, 100, 128]  # 28 s: more than half of one
    assert len(cut(decoder, 128.0)) == 1
    assert [c.end for c in cut(decoder, 200.0)] == [128]
    assert cut(decoder, 257.0) == []
    assert clips[2].times(2).tolist() == [31.5, 38.5]


@pytest.mark.parametrize("pictures", [1, 4])
def test_pictures_are_those_of_the_clip(folder, pictures):
    decoder = open_decoder(folder / "a.mp4")
    clips = cut(decoder, 14.0)
    reader = Reader()
    for wanted in (clips, clips[3:4], clips[1::3]):  # all; after a resume: some
        reader.seen.clear()
        for _, shown, damaged in read_clips(decoder, "a", wanted, pictures, 768):
            reader.caption(shown)
            assert damaged == 0
        assert reader.seen == [numbers_of(clip, pictures) for clip in wanted]
        for seen, clip in zip(reader.seen, wanted, strict=True):
            assert all(clip.start <= number / 2 < clip.end for number in seen)


@pytest.mark.parametrize("name", ["x.mkv", "x.ts", "x.avi", "x.mpg"])
def test_pictures_in_other_containers(tmp_path, name):
    """Exact to the frame, also in MPEG-PS, where FFmpeg's seeks miss."""
    codec = {"x.mpg": "mpeg2video", "x.avi": "mpeg4"}.get(name, "libx264")
    write_clip(tmp_path / name, count=250, fps=25, gop=12, codec=codec)
    reader = Reader()
    decoder = open_decoder(tmp_path / name)
    clips = cut(decoder, 2.0)
    for _, shown, damaged in read_clips(decoder, name, clips, 3, 768):
        reader.caption(shown)
        assert damaged == 0
    want = np.array([numbers_of(clip, 3, 25, 250) for clip in clips])
    assert np.array_equal(reader.seen, want)


def test_seeks_instead_of_decoding_everything(folder, monkeypatch):
    decoded = []
    plain = pyav._Walk._decoded

    def counted(self, begin):
        for item in plain(self, begin):
            decoded.append(item[0])
            yield item

    monkeypatch.setattr(pyav._Walk, "_decoded", counted)
    decoder = open_decoder(folder / "a.mp4")
    decoded.clear()
    clips = cut(decoder, 14.0)
    assert len(list(read_clips(decoder, "a", clips, 1, 768))) == CLIPS
    assert len(decoded) < 256 / 3  # of 256: a group of pictures each, and some before
    decoded.clear()
    list(read_clips(decoder, "a", clips[-1:], 1, 768))
    assert len(decoded) <= 9


def test_pictures_are_bounded(tmp_path):
    path = write_clip(tmp_path / "wide.mp4", count=4, fps=1, size=(320, 160))
    decoder = open_decoder(path)
    ((_, shown, _),) = read_clips(decoder, "wide", cut(decoder, 4.0), 2, 100)
    assert [picture.size for picture in shown] == [(100, 50)] * 2


def test_stretches_without_frames_make_no_clips(tmp_path):
    """A picture that is shown for an hour is not 257 clips."""
    path = write_clip(tmp_path / "x.mkv", count=5, times=[0, 500, 1000, 3_600_000, 3_611_000])
    decoder = open_decoder(path)
    assert [clip.index for clip in cut(decoder, 14.0)] == [0, 257]


# -- runs ----------------------------------------------------------------------------------------


def test_samples_of_a_folder(folder, tmp_path):
    reader = Reader()
    summary = make_vico([folder], reader, tmp_path / "out.jsonl", VicoSettings(samples=6))
    assert (summary.videos, summary.clips, summary.captioned) == (2, CLIPS + 7, CLIPS + 7)
    samples = lines(tmp_path / "out.jsonl")
    assert len(samples) == summary.samples == 12
    assert len({sample["id"] for sample in samples}) == 12
    assert {sample["vico"]["form"] for sample in samples} == set(FORMS)
    for sample in samples:
        check_sample(sample)
        about = sample["vico"]
        assert sample["duration"] == (128.0 if sample["video"].endswith("a.mp4") else 100.0)
        assert (about["seed"], about["captioner"], about["clip_seconds"]) == (0, "reader", 14.0)
        for clue in about["clues"]:  # the words were seen at that time
            numbers = [WORDS.index(word) for word in clue["text"].split()[1:]]
            clip = Clip(0, clue["start"], clue["end"])
            assert numbers == [n % len(WORDS) for n in numbers_of(clip, 4)]
    assert [sample["video"] for sample in samples[::6]] == [
        str(folder / "a.mp4"),
        str(folder / "b.mkv"),
    ]


def test_video_is_named_from_the_output(folder, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_bytes((folder / "a.mp4").read_bytes())
    make_vico([tmp_path], Reader(), tmp_path / "out.jsonl")
    assert {sample["video"] for sample in lines(tmp_path / "out.jsonl")} == {"in/a.mp4"}


def test_same_bytes(folder, tmp_path, monkeypatch):
    """Output depends on seed and captions alone, not on other videos or the order of a folder."""

    def run(name, videos, **settings):
        make_vico(videos, Reader(), tmp_path / name, VicoSettings(**settings))
        return (tmp_path / name).read_bytes().splitlines()

    both = run("1", [folder])
    assert run("2", [folder]) == both
    alone = run("3", [folder / "b.mkv"])
    assert both[-len(alone) :] == alone
    assert run("4", [folder / "b.mkv", folder, folder / "a.mp4"]) == alone + both[: -len(alone)]
    assert run("5", [folder], seed=1) != both
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda path: [(a, b, c[::-1]) for a, b, c in walk(path)])
    assert run("6", [folder]) == both


def test_captions_are_kept(folder, tmp_path):
    video, out = tmp_path / "v.mp4", tmp_path / "out.jsonl"
    video.write_bytes((folder / "a.mp4").read_bytes())

    def calls(settings=None, **reader):
        captioner = Reader(**reader)
        make_vico([video], captioner, out, settings)
        return len(captioner.seen)

    assert calls() == CLIPS
    first = out.read_bytes()
    assert calls() == 0
    assert calls(VicoSettings(seed=3, samples=2)) == 0  # other questions, the same captions
    assert calls(identity="reader 2") == CLIPS
    assert calls(VicoSettings(pictures=2)) == CLIPS
    assert calls(VicoSettings(edge=32)) == CLIPS
    assert calls(VicoSettings(clip_seconds=20)) == 6
    os.utime(video, (1, 1))
    assert calls() == CLIPS
    with video.open("ab") as file:  # MP4 reads bytes at its end as a box
        file.write(b"\0\0\0\x08free")
    os.utime(video, (1, 1))
    assert calls() == CLIPS
    assert out.read_bytes() == first


def test_complete_videos_are_not_opened_again(folder, tmp_path, monkeypatch):
    make_vico([folder], Reader(), tmp_path / "out.jsonl")
    monkeypatch.setattr("vxl_train.vico.build.open_decoder", None)
    make_vico([folder], Reader(), tmp_path / "out.jsonl")


@pytest.mark.parametrize("cut_off", [1, 9, 60, 500, None])
def test_torn_captions(folder, tmp_path, cut_off):
    out = tmp_path / "out.jsonl"
    make_vico([folder], Reader(), out)
    want, kept = out.read_bytes(), tmp_path / "out.jsonl.captions"
    whole = kept.read_bytes()
    said = []
    if cut_off:
        kept.write_bytes(whole[:-cut_off])
        lost = whole.count(b"\n") - whole[:-cut_off].count(b"\n")
    else:  # damage in the middle: zeros, a line that is not a caption, one nested too deeply
        rows = whole.splitlines(keepends=True)
        rows[2], rows[4] = b"\0" * len(rows[2][:-1]) + b"\n", b"[1]\n"
        rows[5] = b"[" * 100_000 + b"\n"
        kept.write_bytes(b"".join(rows))
        lost = 3
    reader = Reader()
    make_vico([folder], reader, out, report=said.append)
    assert len(reader.seen) == lost
    assert "damaged lines" in said[0]
    assert out.read_bytes() == want
    assert sorted(kept.read_bytes().splitlines()) == sorted(whole.splitlines()) or not cut_off
    again = Reader()
    make_vico([folder], again, out, report=said.append)
    assert again.seen == []


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[1])
from helpers.captioner import Reader
from vxl_train.vico.build import make_vico
class Slow(Reader):
    def caption(self, pictures):
        time.sleep(0.05)
        return super().caption(pictures)
make_vico([sys.argv[2]], Slow(), sys.argv[3])
"""


def test_killed_run_goes_on(folder, tmp_path):
    out, kept = tmp_path / "out.jsonl", tmp_path / "out.jsonl.captions"
    out.write_text("old\n")
    arguments = [sys.executable, "-c", KILLED, str(TESTS), str(folder), str(out)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(arguments, env={**os.environ, "PYTHONPATH": path})
    deadline = time.monotonic() + 120
    while not (kept.exists() and kept.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert out.read_text() == "old\n"
    done = sum(b'"caption"' in line for line in kept.read_bytes().split(b"\n")[:-1])
    assert 4 <= done < CLIPS
    reader = Reader()
    make_vico([folder], reader, out)
    assert len(reader.seen) == CLIPS + 7 - done
    make_vico([folder], Reader(), tmp_path / "whole.jsonl")
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {
        "out.jsonl",
        "out.jsonl.captions",
        "whole.jsonl",
        "whole.jsonl.captions",
    }


def test_one_run_at_a_time(folder, tmp_path):
    out = tmp_path / "out.jsonl"

    class Nested(Reader):
        def caption(self, pictures):
            with pytest.raises(ValueError, match="another run"):
                make_vico([folder], Reader(), out)
            return super().caption(pictures)

    make_vico([folder / "a.mp4"], Nested(), out, VicoSettings(clip_seconds=60))


def test_failing_captioner_loses_nothing(folder, tmp_path):
    def fail(numbers):
        if numbers[0] > 60:
            raise RuntimeError("out of memory")
        return f"{WORDS[numbers[0] % 40]} {WORDS[numbers[1] % 40]}"

    out = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError, match="out of memory"):
        make_vico([folder / "a.mp4"], Reader(fail), out)
    assert not out.exists()
    reader = Reader()
    make_vico([folder / "a.mp4"], reader, out)
    assert len(reader.seen) == CLIPS - 3  # three clips begin before frame 60


def test_captioner_without_words(folder, tmp_path):
    with pytest.raises(TypeError, match="caption\\(\\) gave a NoneType"):
        make_vico([folder], Reader(lambda numbers: None), tmp_path / "out.jsonl")
    assert make_vico([folder], Reader(), tmp_path / "out.jsonl").captioned == CLIPS + 7


# -- videos that give nothing ----------------------------------------------------------------------


@pytest.fixture
def mixed(folder, tmp_path):
    """One good video, four that cannot be read, and two short ones."""
    place = tmp_path / "mixed"
    place.mkdir()
    (place / "good.mp4").write_bytes((folder / "a.mp4").read_bytes())
    (place / "cut.mp4").write_bytes((folder / "a.mp4").read_bytes()[:2000])
    (place / "empty.mp4").write_bytes(b"")
    (place / "noise.mkv").write_bytes(os.urandom(5000))
    write_audio(place / "sound.mp4")
    write_clip(place / "short.mp4", count=40, fps=2)
    write_clip(place / "tiny.mp4", count=3, fps=2)
    (place / "notes.txt").write_text("no video")
    return place


def test_bad_videos_are_counted(mixed, tmp_path):
    said = []
    summary = make_vico([mixed], Reader(), tmp_path / "o", report=said.append)
    names = {Path(name).name for name in summary.bad}
    assert names == {"cut.mp4", "empty.mp4", "noise.mkv", "sound.mp4"}
    skipped = {Path(name).name: reason for name, reason in summary.skipped.items()}
    assert skipped == dict.fromkeys(("short.mp4", "tiny.mp4"), "shorter than two clips of 14 s")
    assert len(said) == 6
    assert all(any(name in line for line in said) for name in [*names, *skipped])
    make_vico([mixed / "good.mp4"], Reader(), tmp_path / "alone")
    assert (tmp_path / "o").read_bytes() == (tmp_path / "alone").read_bytes()


def test_stop_at_a_bad_video(mixed, tmp_path):
    out = tmp_path / "out.jsonl"
    videos = [mixed / "good.mp4", mixed / "noise.mkv"]
    with pytest.raises(VideoError, match=r"noise\.mkv"):
        make_vico(videos, Reader(), out, on_error="stop")
    assert not out.exists()
    reader = Reader()
    make_vico(videos, reader, out)
    assert reader.seen == []  # the good one's captions were kept


def test_nothing_to_write(folder, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("old")
    for says, why in (
        (lambda n: "the same words again", "8 repeated"),
        (lambda n: "", "9 empty"),
        (
            lambda n: ("up and down" if n[0] // 28 % 2 else "left or right") + " twice",
            "2 recurring",
        ),
    ):
        said = []
        captioner = Reader(says, identity=why)
        with pytest.raises(ValueError, match=r"videos: none of 1 gave a sample .*not written"):
            make_vico([folder / "a.mp4"], captioner, out, report=said.append)
        assert why in said[0]
        assert out.read_text() == "old"


def test_damaged_clips_are_not_captioned(tmp_path):
    """Pictures of another clip would take their place."""
    path = write_clip(
        tmp_path / "x.mp4",
        count=250,
        fps=2,
        gop=8,
        size=(128, 128),
        container_options={"movflags": "faststart"},
    )
    data = bytearray(path.read_bytes())
    middle = data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 2
    length = len(data) // 6
    data[middle : middle + length] = b"\0" * length
    path.write_bytes(bytes(data))
    reader = Reader()
    summary = make_vico([path], reader, tmp_path / "out.jsonl")
    assert 0 < summary.dropped["damaged"] < CLIPS
    assert len(reader.seen) == summary.clips - summary.dropped["damaged"]
    captioned = [
        json.loads(line) for line in (tmp_path / "out.jsonl.captions").read_text().splitlines()[1:]
    ]
    clips = cut(open_decoder(path), 14.0)
    seen = iter(reader.seen)
    for entry in captioned:
        if not entry.get("damaged"):
            assert next(seen) == numbers_of(clips[entry["clip"]], 4, count=250)
    for sample in lines(tmp_path / "out.jsonl"):
        check_sample(sample)


def test_truncated_video(folder, tmp_path):
    """Matroska needs no end, so the frames that are there count."""
    data = (folder / "b.mkv").read_bytes()
    (tmp_path / "x.mkv").write_bytes(data[: len(data) // 2])
    with pytest.warns(VideoWarning, match="truncated"):
        summary = make_vico([tmp_path / "x.mkv"], Reader(), tmp_path / "out.jsonl")
    assert 2 <= summary.clips < 7


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"samples": 0}, "samples: got 0"),
        ({"clues": 1}, "clues: got 1, expected 2 to 26"),
        ({"clues": 27}, "clues: got 27"),
        ({"pictures": 0}, "pictures: got 0"),
        ({"edge": 0}, "edge: got 0"),
        ({"clip_seconds": 0.0}, "clip_seconds: got 0.0"),
        ({"clip_seconds": float("nan")}, "clip_seconds: got nan"),
    ],
)
def test_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        VicoSettings(**settings)


def test_find_videos(folder, tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("z.MP4", "a.txt", "deep/b.webm", "deep/er/c.mov"):
        (tmp_path / name).write_bytes(b"x")
    found = find_videos([tmp_path / "deep" / "b.webm", tmp_path, f"{tmp_path}/deep/../z.MP4"])
    assert [file.relative_to(tmp_path).as_posix() for file in found] == [
        "deep/b.webm",
        "deep/er/c.mov",
        "z.MP4",
    ]
    for paths in ([], [tmp_path / "none"], [tmp_path / "deep" / "none.mp4"]):
        with pytest.raises(ValueError, match="videos: "):
            find_videos(paths)
    with contextlib.redirect_stderr(io.StringIO()), pytest.raises(ValueError, match="on_error"):
        make_vico([folder], Reader(), tmp_path / "x", on_error="ask")


# -- command line --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["video", "captions", "captioner", "subtitles"])
def test_no_input_is_written(folder, tmp_path, monkeypatch, capsys, form):
    """Nor a file next to the output that does not hold captions."""
    from vxl_train.cli import main

    monkeypatch.setattr(captioner, "TransformersCaptioner", lambda *args, **options: Reader())
    (tmp_path / "reader").mkdir()
    (tmp_path / "reader" / "config.json").write_text("{}")
    (tmp_path / "x.captions").write_text("WEBVTT\n\n00:00 --> 00:01\nno line end")
    shutil.copy(folder / "a.mp4", tmp_path / "a.mp4")
    shutil.copy(folder / "a.mp4", tmp_path / "b.captions")
    videos = [tmp_path / "a.mp4", tmp_path / "b.captions"]
    output = {
        "video": tmp_path / "a.mp4",
        "captions": tmp_path / "b",
        "captioner": tmp_path / "reader" / "config.json",
        "subtitles": tmp_path / "x",
    }[form]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    options = ["--captioner", str(tmp_path / "reader"), "--output", str(output)]
    assert main(["vico", "--videos", *map(str, videos), *options]) == 2
    words = "does not hold captions" if form == "subtitles" else "which is an input"
    assert words in capsys.readouterr().err
    assert all(path.read_bytes() == content for path, content in before.items())


def test_json_with_dropped_captions(folder, tmp_path, monkeypatch, capsys):
    from vxl_train.cli import main

    reader = Reader()
    says = reader.says
    reader.says = lambda numbers: "" if min(numbers) < 28 else says(numbers)
    monkeypatch.setattr(captioner, "TransformersCaptioner", lambda *args, **options: reader)
    video, out = str(folder / "a.mp4"), str(tmp_path / "out.jsonl")
    options = ["--videos", video, "--captioner", "any", "--json", "--output", out]
    assert main(["vico", *options]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert sum(summary["dropped"].values()) == 1
    assert all(isinstance(reason, str) for reason in summary["dropped"])
    assert summary["samples"] > 0
