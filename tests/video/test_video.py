"""Video files give the right frames from any container, and anything else one clear error."""

import gc
import os
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip("av")

from helpers.clips import (
    numbers,
    picture,
    read_number,
    write_audio,
    write_clip,
    write_long,
    write_tone,
)

from vxl_model.video.decoders import pyav
from vxl_model.video.reader import VideoError, VideoWarning, open_video
from vxl_model.video.resize import resize_crop

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """100 frames at 10 fps, 10 s, a keyframe every 12 frames, with B-frames."""
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", count=100, gop=12)


def test_tags_that_are_not_utf8(tmp_path):
    """Old cameras write titles in the encoding of their country."""
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as out:
        out.metadata["title"] = "caf\xe9"
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for i in range(5):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture(i), format="rgb24")))
        out.mux(stream.encode(None))
    whole = path.read_bytes()
    latin = whole.replace("caf\xe9".encode(), b"caf\xe9!")
    assert latin != whole
    path.write_bytes(latin)
    assert numbers(open_video(path, frames=5)) == [0, 1, 2, 3, 4]


# -- sampling ----------------------------------------------------------------------------------


def test_one_frame_a_second(clip):
    reader = open_video(clip)
    assert reader.num_frames == 10
    assert reader.timestamps == [float(i) for i in range(10)]
    assert reader.duration == pytest.approx(10.0)
    assert numbers(reader) == list(range(0, 100, 10))
    assert (reader.backend, reader.damaged) == ("pyav", 0)


def test_long_video_is_spread_evenly(tmp_path):
    """More than 128 s give 128 frames, linspace(0, total - 1) rounded down, as upstream."""
    clip = write_clip(tmp_path / "long.mp4", count=260, fps=2)  # 130 s
    reader = open_video(clip)
    want = np.linspace(0, 259, 128).astype(int)
    assert reader.num_frames == 128
    assert numbers(reader) == [i % 256 for i in want]
    assert reader.timestamps == pytest.approx((want / 2).tolist(), abs=1e-3)
    short = open_video(write_clip(tmp_path / "short.mp4", count=256, fps=2))
    assert short.num_frames == 128  # 128 s exactly: still one per second
    assert numbers(short) == list(range(0, 256, 2))


@pytest.mark.filterwarnings("ignore::vxl_model.video.reader.VideoWarning")
@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"frames": 1}, [0]),
        ({"frames": 5}, [0, 24, 49, 74, 99]),
        ({"frames": 100}, list(range(100))),
        ({"frames": 1000}, list(range(100))),
        ({"fps": 10}, list(range(100))),
        ({"fps": 0.5}, [0, 20, 40, 60, 80]),
        ({"fps": 2.5}, list(range(0, 100, 4))),
        ({"fps": 20}, [i // 2 for i in range(200)]),
        ({"fps": 0.01}, [0]),
        ({"fps": 5, "frames": 3}, [0, 49, 99]),
        ({"fps": 0.5, "frames": 10}, [0, 20, 40, 60, 80]),
    ],
)
def test_frames_and_fps(clip, options, want):
    reader = open_video(clip, **options)
    assert reader.num_frames == len(want)
    assert numbers(reader) == want


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_batches(clip, batch):
    reader = open_video(clip, fps=10, batch=batch)
    shapes = [x.shape for x in reader]
    assert [s[0] for s in shapes] == [min(batch, 100 - i) for i in range(0, 100, batch)]
    assert all(s[1:] == (336, 336, 3) for s in shapes)
    assert numbers(reader) == list(range(100))  # every pass starts again


# -- containers and what files do -----------------------------------------------------------------

FORMATS = {
    "x.mp4": {},
    "x.mkv": {},
    "x.mov": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "x.webm": {"codec": "libvpx-vp9"},
    "vp8.webm": {"codec": "libvpx"},
    "x.avi": {"codec": "mpeg4"},
    "bframes.avi": {},  # AVI stores no presentation times
    "x.flv": {},
    "x.ts": {"gop": 10},
    "x.mpg": {"codec": "mpeg2video", "fps": 25},
    "x.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "bare.h264": {"fps": 25},  # no times at all, no count
    "fragmented.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "live.mkv": {"container_options": {"live": "1"}},  # no duration, no index
    "ten_bit.mp4": {"pix_fmt": "yuv420p10le"},
    "ten_bit.mkv": {"pix_fmt": "yuv422p10le"},
    "planar.mkv": {"codec": "ffv1", "pix_fmt": "yuv444p"},
    "odd.mkv": {"size": (71, 67), "codec": "ffv1", "pix_fmt": "bgr0"},
    "sound.mp4": {"audio": True},
}


@pytest.mark.parametrize("name", FORMATS)
def test_containers(tmp_path, name):
    options = {"count": 30, "fps": 10, **FORMATS[name]}
    clip = write_clip(tmp_path / name, **options)
    reader = open_video(clip, frames=10)
    assert numbers(reader) == np.linspace(0, 29, 10).astype(int).tolist()
    if name != "bare.h264":
        assert reader.duration == pytest.approx(30 / options["fps"], abs=0.06)
    assert reader.damaged == 0


def test_variable_frame_rate(tmp_path):
    """Frames 0 to 9 in the first second, then one per second. Sampling takes the frame that is
    shown at each instant, not every n-th frame."""
    times = [100 * i for i in range(10)] + [1000 * i + 500 for i in range(1, 6)]
    clip = write_clip(tmp_path / "vfr.mkv", count=15, times=times)
    reader = open_video(clip)
    assert numbers(reader)[:6] == [0, 9, 10, 11, 12, 13]
    assert numbers(open_video(clip, frames=15)) == list(range(15))


writes_rotation = pytest.mark.skipif(
    not hasattr(av.VideoStream, "set_display_rotation"), reason="PyAV before 18 cannot write it"
)


@writes_rotation
@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_rotated(tmp_path, rotation):
    """The display matrix turns the picture counterclockwise by `rotation` degrees."""
    clip = write_clip(tmp_path / "r.mp4", count=3, rotation=rotation, size=(96, 64))
    reader = open_video(clip, frames=3, size=None)
    frame = next(iter(reader))[1]
    want = np.rot90(picture(1, 96, 64), rotation // 90)
    assert (reader.height, reader.width) == frame.shape[:2] == want.shape[:2]
    assert np.abs(frame.astype(int) - want).mean() < 12


@writes_rotation
@pytest.mark.parametrize("flip", ["hflip", "vflip"])
@pytest.mark.parametrize("rotation", [0, 90])
def test_mirrored(tmp_path, flip, rotation):
    path = tmp_path / "m.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.set_display_rotation(rotation, **{flip: True})
        for i in range(3):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture(i, 96, 64), format="rgb24")))
        out.mux(stream.encode(None))
    frame = next(iter(open_video(path, frames=3, size=None)))[1]
    turned = np.rot90(picture(1, 96, 64), rotation // 90)
    want = turned[:, ::-1] if flip == "hflip" else turned[::-1]
    assert np.abs(frame.astype(int) - want).mean() < 12


def test_colours(tmp_path):
    """Colours are right within the error of 8-bit YUV and chroma at half resolution."""
    path = tmp_path / "c.mkv"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=1, options={"qp": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        frame = np.full((64, 64, 3), (200, 30, 90), np.uint8)
        out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode(None))
    shown = next(iter(open_video(path)))
    assert np.abs(shown.astype(int) - (200, 30, 90)).max() <= 4


def test_one_frame(tmp_path):
    clip = write_clip(tmp_path / "one.mp4", count=1)
    reader = open_video(clip)
    assert (reader.num_frames, numbers(reader)) == (1, [0])
    assert 0 < reader.duration < 1.1


def test_a_picture_is_a_video_of_one_frame(tmp_path):
    from PIL import Image

    Image.fromarray(picture(77)).save(tmp_path / "p.png")
    assert numbers(open_video(tmp_path / "p.png")) == [77]


@pytest.mark.parametrize("size", [(2, 2), (16, 400), (1000, 20)])
def test_small_and_narrow(tmp_path, size):
    clip = write_clip(tmp_path / "s.mkv", count=2, size=size, codec="ffv1", pix_fmt="bgr0")
    assert next(iter(open_video(clip))).shape == (1, 336, 336, 3)


@pytest.mark.parametrize(
    "name", ["a:b.mp4", "mit Leerzeichen ä.mp4", "100%d.mp4", "new\nline.mp4", "-i.mp4"]
)
def test_names(tmp_path, name, monkeypatch):
    write_clip(tmp_path / "plain.mp4", count=3).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert numbers(open_video(name, frames=3)) == [0, 1, 2]


# -- hostile files ---------------------------------------------------------------------------------


def hostile(kind, folder, clip):
    """Makes a file of that kind. Returns what to open."""
    path = folder / "bad.mp4"
    data = clip.read_bytes()
    if kind == "missing":
        return path
    if kind == "folder":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to(folder / "nowhere")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        return "/dev/zero"
    elif kind == "URL":
        return "https://example.com/bad.mp4"
    elif kind == "name too long":
        return "bad" * 3000
    elif kind == "audio":
        write_audio(path)
    elif kind == "audio with cover":
        from PIL import Image

        Image.fromarray(picture(3)).save(folder / "cover.png")
        with av.open(str(path), "w") as out:
            sound = out.add_stream("aac", rate=8000, layout="mono")
            cover = out.add_stream("png", rate=1)
            cover.width = cover.height = 64
            cover.pix_fmt = "rgb24"
            cover.disposition = av.stream.Disposition.attached_pic.value
            out.mux(cover.encode(av.VideoFrame.from_ndarray(picture(3), format="rgb24")))
            write_tone(out, sound, 1)
    elif kind == "no frames":
        with av.open(str(path), "w", format="matroska") as out:
            stream = out.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            out.start_encoding()
    elif kind == "huge frames":
        from PIL import Image

        path = path.with_suffix(".png")
        Image.fromarray(picture(3)).save(path)
        head = bytearray(path.read_bytes())
        head[16:24] = (16000).to_bytes(4, "big") + (9000).to_bytes(4, "big")
        head[29:33] = zlib.crc32(head[12:29]).to_bytes(4, "big")
        path.write_bytes(head)
    elif kind == "unknown codec":
        path.write_bytes(data.replace(b"avc1", b"zzz9").replace(b"avcC", b"zzzC"))
    elif kind == "subtitles":
        path = path.with_suffix(".srt")
        path.write_text("1\n00:00:01,000 --> 00:00:02,000\nHello\n")
    elif kind == "playlist":
        path = path.with_suffix(".m3u8")
        path.write_text("#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n")
    elif kind == "concat script":
        path.write_text("ffconcat version 1.0\nfile /etc/hostname\nfile http://127.0.0.1:9/x\n")
    elif kind == "text by suffix":
        path = path.with_suffix(".txt")
        path.write_text("Nothing moves here.\n" * 99)
    else:
        content = {
            "empty": b"",
            "text": b"Nothing moves here.\n" * 99,
            "noise": np.random.default_rng(0).bytes(50_000),
            "zeros": bytes(50_000),
            "no index": data[: len(data) // 2],  # an MP4 holds its index at the end
            "only a head": data[:40],
            "archive": b"PK\x03\x04" + data,
        }[kind]
        path.write_bytes(content)
    return path


HOSTILE = {
    "missing": "no such file",
    "folder": "a directory",
    "dangling link": "no such file",
    "pipe": "not a regular file",
    "device": "not a regular file",
    "URL": "a URL",
    "name too long": None,
    "audio": "no video stream.*audio",
    "audio with cover": "no video stream",
    "no frames": None,
    "huge frames": "frames of 16000 x 9000",
    "unknown codec": None,
    "subtitles": "no video stream",
    "playlist": None,
    "concat script": None,
    "text by suffix": "text",
    "empty": "the file is empty",
    "text": None,
    "noise": None,
    "zeros": None,
    "no index": "not a video",
    "only a head": None,
    "archive": None,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile(tmp_path, clip, kind):
    path = hostile(kind, tmp_path, clip)
    threads = threading.active_count()
    words = HOSTILE[kind]
    begin = time.monotonic()
    with pytest.raises(VideoError, match=words) as error:
        numbers(open_video(path))
    assert isinstance(error.value, ValueError)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert time.monotonic() - begin < 10
    assert threading.active_count() == threads


@pytest.mark.parametrize("path", [None, 3, b"bytes.mp4", "", "nul\0.mp4", ["x.mp4"]])
def test_not_a_path(path):
    with pytest.raises(VideoError, match="video: got"):
        open_video(path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"frames": 0}, "frames: got 0"),
        ({"frames": -3}, "frames: got -3"),
        ({"frames": 2.5}, "frames: got 2.5"),
        ({"frames": True}, "frames: got True"),
        ({"fps": 0}, "fps: got 0"),
        ({"fps": float("nan")}, "fps: got nan"),
        ({"fps": float("inf")}, "fps: got inf"),
        ({"fps": "1"}, "fps: got '1'"),
        ({"batch": 0}, "batch: got 0"),
        ({"size": 0}, "size: got 0"),
    ],
)
def test_wrong_arguments(clip, options, words):
    with pytest.raises(ValueError, match=words):
        open_video(clip, **options)


def test_truncated_after_the_index(tmp_path):
    """The frames that are there are read, and the rest is reported."""
    whole = write_clip(
        tmp_path / "w.mp4",
        count=100,
        gop=10,
        size=(256, 256),
        container_options={"movflags": "faststart"},
    )
    cut = tmp_path / "cut.mp4"
    data = whole.read_bytes()
    begin = data.index(b"mdat")
    cut.write_bytes(data[: begin + (len(data) - begin) // 2])
    with pytest.warns(VideoWarning, match=r"cut\.mp4: ends after .* of the 10.0 s"):
        reader = open_video(cut)
    shown = numbers(reader)
    assert 3 <= len(shown) <= 8
    assert shown == [10 * i for i in range(len(shown))]


@pytest.mark.parametrize("name", ["x.mkv", "x.ts", "x.webm"])
def test_truncated_streams(tmp_path, name):
    """Containers that are written from front to back lose only their end."""
    codec = "libvpx" if name.endswith("webm") else "libx264"
    whole = write_clip(tmp_path / name, count=100, gop=10, size=(128, 128), codec=codec)
    data = whole.read_bytes()
    whole.write_bytes(data[: len(data) * 6 // 10])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VideoWarning)
        shown = numbers(open_video(whole))
    assert 3 <= len(shown) <= 8
    assert shown == [10 * i for i in range(len(shown))]


@pytest.mark.parametrize("name", ["x.mp4", "x.mkv", "x.ts", "x.avi"])
def test_damage_in_the_middle(tmp_path, name):
    """Every sample is delivered. The frame before replaces a lost one."""
    clusters = {"cluster_time_limit": "1000"} if name == "x.mkv" else {}
    path = write_clip(
        tmp_path / name,
        count=100,
        gop=10,
        size=(128, 128),
        options={"bf": "0"},
        container_options=clusters,
    )
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle - 1500 : middle + 1500] = bytes(3000)
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VideoWarning)
        reader = open_video(path)
        batches = list(reader)
    assert sum(map(len, batches)) == reader.num_frames
    shown = [read_number(frame) for batch in batches for frame in batch]
    assert shown[0] == 0
    if name != "x.avi":  # FFmpeg renumbers the frames of a damaged AVI
        assert shown[:3] == [0, 10, 20]
        assert shown[-1] == 90


def test_every_byte_may_be_wrong(tmp_path, clip):
    """Files with random bytes give frames or one error, never anything else."""
    data = clip.read_bytes()
    rng = np.random.default_rng(5)
    outcomes = set()
    for trial in range(30):
        broken = bytearray(data)
        for place in rng.integers(0, len(data), 1 + trial):
            broken[place] = rng.integers(256)
        path = tmp_path / f"{trial}.mp4"
        path.write_bytes(broken)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", VideoWarning)
                reader = open_video(path, frames=9)
                outcomes.add(sum(len(batch) for batch in reader) == reader.num_frames)
        except VideoError as error:
            outcomes.add("refused" if str(path) in str(error) else False)
    assert False not in outcomes
    assert True in outcomes


# -- ahead of the model, and no further ----------------------------------------------------------


def test_runs_ahead_but_bounded(clip, monkeypatch):
    made = []
    cut = resize_crop
    monkeypatch.setattr(
        "vxl_model.video.reader.resize_crop", lambda f, s: (made.append(1), cut(f, s))[1]
    )
    reader = iter(open_video(clip, fps=10, batch=4, ahead=2))
    next(reader)
    deadline = time.monotonic() + 5
    while len(made) < 16 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    # taken, two waiting, one that the decoder holds
    assert len(made) == 16
    reader.close()
    assert not [t for t in threading.enumerate() if t.name == "vxl-prefetch"]


def test_left_in_the_middle(clip):
    for _ in range(5):
        for _ in open_video(clip, fps=10, batch=2):
            break
    gc.collect()
    assert not [t for t in threading.enumerate() if t.name == "vxl-prefetch"]


def test_an_error_in_the_thread_is_the_readers(clip, monkeypatch):
    reader = open_video(clip)
    monkeypatch.setattr(reader._decoder, "frames", lambda _: iter([(np.zeros(3), False)]))
    with pytest.raises(VideoError, match=r"clip\.mp4: reading it failed"):
        list(reader)


def test_file_that_goes_away(tmp_path):
    path = write_clip(tmp_path / "gone.mp4", count=3)
    reader = open_video(path)
    path.unlink()
    with pytest.raises(VideoError, match=r"gone\.mp4"):
        list(reader)


def test_nothing_to_decode_with(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(VideoError, match=r"clip\.mp4: .*pip install 'vxl\[video\]'"):
        open_video(clip)


def test_seeks_only_where_it_skips(tmp_path, monkeypatch):
    """5 of 1,000 frames must not decode all of them. Neighbours must not seek."""
    clip = write_clip(tmp_path / "x.mp4", count=1000, fps=25, gop=20)
    decoded, seeks = [], []
    start, frames = pyav._Walk._start, pyav._Walk._decoded

    def starting(self, packet):
        seeks.append(packet)
        start(self, packet)

    def counting(self, begin):
        for item in frames(self, begin):
            decoded.append(1)
            yield item

    monkeypatch.setattr(pyav._Walk, "_start", starting)
    monkeypatch.setattr(pyav._Walk, "_decoded", counting)
    want = np.linspace(0, 999, 5).astype(int)
    assert numbers(open_video(clip, frames=5)) == [i % 256 for i in want]
    assert len(decoded) < 150
    seeks.clear()
    assert len(numbers(open_video(clip, fps=25))) == 1000
    assert not seeks


def peak_bytes(work):
    """How much a piece of work raised the resident memory of the process."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = memory_field("VmRSS")
    work()
    return memory_field("VmHWM") - before


def memory_field(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(name))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_an_hour_takes_the_memory_of_a_minute(tmp_path):
    """3,600 frames in memory would be 1.2 GB. The garbage collector is off, so that no frame may be
    part of a reference cycle."""
    minute, hour = (write_long(tmp_path / f"{s}.mp4", s, fps=2) for s in (60, 3600))

    def read(path, frames):
        def work():
            seen = 0
            for batch in open_video(path, fps=1):
                seen += len(batch)
            assert seen == frames

        return work

    read(minute, 60)()  # memory pools and threads of the libraries
    gc.disable()
    try:
        short, long = peak_bytes(read(minute, 60)), peak_bytes(read(hour, 3600))
    finally:
        gc.enable()
    assert long < short + 32 * 2**20
