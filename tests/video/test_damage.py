"""Damaged files: every picture that the decoder marks or loses is counted and named."""

import contextlib
import warnings

import numpy as np
import pytest

av = pytest.importorskip("av")

from helpers.clips import changed, numbers, rewrite, write_clip

from vxl_model.video.reader import VideoError, VideoWarning, open_video

KINDS = {
    "x.mp4": {},
    "x.ts": {},
    "x.mkv": {"container_options": {"cluster_time_limit": "500"}},
    "x.mpg": {"codec": "mpeg2video"},
    "x.avi": {"codec": "mpeg4", "options": {"bf": "0"}},
    "h264.avi": {},
    "x.h264": {},
    "h265.mkv": {"codec": "libx265", "options": {"x265-params": "log-level=0"}},
    "vp9.webm": {"codec": "libvpx-vp9"},
}


def damage(path, places=12, size=400):
    """Overwrites bytes in many places after the header."""
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for at in rng.integers(3000, len(data) - 6000, places):
        data[at : at + size] = rng.bytes(size)
    path.write_bytes(data)
    return path


def decoded_in_one_go(path):
    """FFmpeg's own counts for a file: packets, frames, and frames marked as corrupt."""
    packets, marks = 0, []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        with contextlib.suppress(av.error.FFmpegError):
            for packet in container.demux(stream):
                packets += packet.size > 0
                with contextlib.suppress(av.error.FFmpegError):
                    marks += [frame.is_corrupt for frame in packet.decode()]
    return packets, len(marks), sum(marks)


@pytest.mark.parametrize("name", KINDS)
def test_every_marked_or_lost_picture_is_counted(tmp_path, name):
    options = {"count": 300, "fps": 25, "gop": 30, "size": (320, 240), **KINDS[name]}
    path = damage(write_clip(tmp_path / name, **options))
    packets, frames, marked = decoded_in_one_go(path)
    assert frames < 300 or marked, "nothing is damaged"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VideoWarning)
        reader = open_video(path, frames=packets)
        delivered = sum(map(len, reader))
    assert delivered == reader.num_frames == packets
    assert reader.damaged == packets - frames + marked


def test_damage_is_named(tmp_path):
    path = damage(write_clip(tmp_path / "x.mp4", count=300, fps=25, gop=30, size=(320, 240)))
    reader = open_video(path, frames=300)
    with pytest.warns(VideoWarning, match=r"x\.mp4: \d+ of 300 frames are damaged, at \d") as said:
        for _ in reader:
            pass
    assert f"{reader.damaged} of 300" in str(said[0].message)
    assert f"at {reader.timestamps[reader.damaged_frames[0]]:.2f}" in str(said[0].message)


def test_a_sound_file_says_nothing(tmp_path, recwarn):
    reader = open_video(write_clip(tmp_path / "x.mp4", count=30), frames=30)
    for _ in range(2):
        numbers(reader)
        assert reader.damaged_frames == []
    assert not [w for w in recwarn if issubclass(w.category, VideoWarning)]


@pytest.mark.parametrize("name", ["x.avi", "x.mp4"])
def test_a_lost_picture_leaves_the_others_in_place(tmp_path, name):
    """In an AVI, only their order identifies frames."""
    whole = write_clip(tmp_path / name, count=40, codec="mpeg4", options={"bf": "0"}, gop=1)

    def spoil(number, packet):
        return changed(packet, bytes(packet.size)) if number in (7, 8, 23) else packet

    reader = open_video(rewrite(whole, tmp_path / f"spoilt_{name}", spoil), frames=40)
    with pytest.warns(VideoWarning, match="3 of 40 frames are damaged, at 0.70, 0.80, 2.30 s"):
        shown = numbers(reader)
    assert shown == [{7: 6, 8: 6, 23: 22}.get(i, i) for i in range(40)]
    assert reader.damaged_frames == [7, 8, 23]


def test_a_damaged_keyframe_after_a_jump(tmp_path):
    """Decoding continues from an earlier keyframe."""
    whole = write_clip(tmp_path / "x.mp4", count=200, gop=10, options={"bf": "0"})

    def spoil(number, packet):
        return changed(packet, b"\0\0\0\1\x65\0") if number == 100 else packet

    path = rewrite(whole, tmp_path / "y.mp4", spoil)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VideoWarning)
        reader = open_video(path, frames=3)
        shown = numbers(reader)
        again = open_video(path, frames=200)
        one_by_one = numbers(again)
    assert (shown[0], shown[2]) == (0, 199)
    assert 90 <= shown[1] <= 99
    assert one_by_one[:100] == list(range(100))


# -- errors of the libraries -----------------------------------------------------------------------


class SurpriseError(Exception):
    """An error that no library has today."""


@pytest.mark.parametrize("place", ["demux", "decode", "reformat"])
def test_any_error_of_a_library_names_the_file(tmp_path, monkeypatch, place):
    from vxl_model.video.decoders import pyav

    path = write_clip(tmp_path / "x.mp4", count=30)
    reader = open_video(path, frames=30)

    def fail(*_, **__):
        raise SurpriseError("no such thing")

    name = {"demux": "_numbered", "decode": "_pictures", "reformat": "_upright"}[place]
    target = pyav if place == "reformat" else pyav._Walk
    monkeypatch.setattr(target, name, fail)
    with pytest.raises(VideoError, match=r"x\.mp4: reading it failed \(no such thing\)"):
        list(reader)
    with pytest.raises(VideoError, match=r"x\.mp4: reading it failed \(no such thing\)"):
        open_video(path)
