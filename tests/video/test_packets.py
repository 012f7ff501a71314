"""What packets tell about a file: number of frames, their times and their places."""

import warnings
from fractions import Fraction

import numpy as np
import pytest

av = pytest.importorskip("av")

from helpers.clips import changed, numbers, rewrite, write_clip, write_fields

from vxl_model.video.decoders import pyav
from vxl_model.video.reader import VideoWarning, open_video


def spread(total, count):
    return [int(i) % 256 for i in np.linspace(0, total - 1, count)]


@pytest.fixture(autouse=True)
def no_warnings(recwarn):
    """A test that expects a warning consumes it."""
    yield
    assert not [str(w.message) for w in recwarn if issubclass(w.category, VideoWarning)]


# -- files put together ----------------------------------------------------------------------------

JOINED = {
    "ts": {"gop": 10},
    "mpg": {"codec": "mpeg2video", "fps": 25},
    "h264": {},
    "mkv": {"container_options": {"live": "1"}},
    "mjpeg": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
}


@pytest.mark.parametrize("kind", JOINED)
def test_joined_files_give_both_parts(tmp_path, kind):
    """`cat a b`: the clock restarts in the second part."""
    options = {"count": 40, "fps": 10, **JOINED[kind]}
    part = write_clip(tmp_path / f"a.{kind}", **options).read_bytes()
    joined = tmp_path / f"ab.{kind}"
    joined.write_bytes(part + part)
    reader = open_video(joined, frames=80)
    assert numbers(reader) == [*range(40), *range(40)]
    seconds = 40 / options["fps"] if kind not in ("h264", "mjpeg") else 40 / 25
    assert reader.duration == pytest.approx(2 * seconds, rel=0.05)
    assert np.allclose(np.diff(reader.timestamps), seconds / 40, atol=0.045)
    assert numbers(open_video(joined, frames=5)) == [0, 19, 39, 19, 39]


def test_joined_with_a_clock_that_jumps_ahead(tmp_path):
    """The second part's clock begins an hour later. The gap is not a pause."""
    early = write_clip(tmp_path / "a.ts", count=40, fps=10)
    late = tmp_path / "b.ts"
    rewrite(early, late, lambda _, packet: moved(packet, 3600 * 90_000))
    joined = tmp_path / "ab.ts"
    joined.write_bytes(early.read_bytes() + late.read_bytes())
    reader = open_video(joined, fps=10)
    assert reader.duration == pytest.approx(8, abs=0.2)
    assert numbers(reader) == [*range(40), *range(40)]


def moved(packet, ticks):
    packet.pts += ticks
    packet.dts += ticks
    return packet


def test_a_pause_in_a_matroska_stays(tmp_path):
    """Its times are intended. One picture may be shown for a minute."""
    times = [*range(0, 1000, 100), *range(61_000, 62_000, 100)]
    reader = open_video(write_clip(tmp_path / "x.mkv", count=20, times=times))
    assert reader.duration == pytest.approx(62, abs=0.2)
    assert numbers(reader)[:62] == [0, *[9] * 60, 10]


# -- packets that are not frames -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["h264", "avi", "mkv", "mp4", "ts", "flv", "mov"])
@pytest.mark.parametrize("mixed", [False, True])
def test_field_coded_h264(tmp_path, kind, mixed):
    """As many frames as pictures, whether all are pairs of fields or some are whole frames."""
    bare = write_fields(tmp_path / "x.h264", count=40, whole=lambda i: mixed and i % 3 == 1)
    path = tmp_path / f"y.{kind}"
    if kind == "h264":
        path = bare
    else:
        ticks = iter(range(10_000))
        rewrite(bare, path, lambda _, packet: timed(packet, next(ticks)))
    reader = open_video(path, frames=40)
    assert reader.num_frames == 40
    assert numbers(reader) == list(range(40))
    assert numbers(open_video(path, frames=4)) == [0, 13, 26, 39]
    assert reader.damaged == 0
    if kind == "h264":
        assert reader.duration == pytest.approx(40 / 25)


def timed(packet, number):
    packet.time_base = Fraction(1, 50)
    packet.pts = packet.dts = number
    packet.duration = 1
    return packet


def test_hidden_frames_of_vp8(tmp_path):
    """VP8 stores frames that only other frames refer to (altref) in packets of their own."""
    plain = write_clip(tmp_path / "x.webm", count=60, codec="libvpx")

    def hide(number, packet):
        data = bytearray(bytes(packet))
        if number % 10 == 5:
            data[0] &= ~16
        return changed(packet, bytes(data))

    reader = open_video(rewrite(plain, tmp_path / "y.webm", hide), frames=54)
    assert numbers(reader) == [i for i in range(60) if i % 10 != 5]


def test_mpeg4_packets_that_repeat_a_frame(tmp_path):
    """Cameras and DivX write "as before" (a VOP that is not coded) for a dropped frame."""
    shows = [i - (i % 5 == 3) for i in range(20)]
    plain = write_clip(
        tmp_path / "x.avi", count=20, codec="mpeg4", options={"bf": "0"}, shows=shows
    )

    def drop(number, packet):
        return changed(packet, not_coded(bytes(packet))) if number % 5 == 3 else packet

    reader = open_video(rewrite(plain, tmp_path / "y.avi", drop), frames=20)
    assert numbers(reader) == shows
    assert reader.damaged == 0


def not_coded(data):
    """The header of a VOP up to the bit that says whether it is coded. The bit becomes 0."""
    assert data.startswith(b"\0\0\1\xb6")
    bits = format(int.from_bytes(data[4:12], "big"), "064b")
    end = bits.index("0", 2)  # seconds passed since the last VOP, then a marker
    head = bits[: end + 2 + 4 + 1] + "0"  # 10 ticks a second take 4 bits
    head += "0" + "1" * (-len(head) % 8 - 1)
    return data[:4] + int(head, 2).to_bytes(len(head) // 8, "big")


CODECS = {
    "mpeg1.mpg": {"codec": "mpeg1video", "fps": 25, "options": {"bf": "2"}},
    "mpeg2.ts": {"codec": "mpeg2video", "fps": 25, "options": {"bf": "2"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"bf": "2"}},
    "wmv2.asf": {"codec": "wmv2"},
    "msmpeg4.avi": {"codec": "msmpeg4"},
    "flv1.flv": {"codec": "flv1"},
    "h263.3gp": {"codec": "h263", "size": (176, 144), "options": {"b": "2M"}},
    "rv20.rm": {"codec": "rv20"},
    "svq1.mov": {"codec": "svq1", "pix_fmt": "yuv410p"},
    "open_gop.mp4": {"options": {"x264-params": "open-gop=1"}, "gop": 10},
    "refresh.mkv": {"options": {"x264-params": "intra-refresh=1:keyint=20"}},
    "h265.mkv": {"codec": "libx265", "options": {"x265-params": "log-level=0"}, "gop": 10},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"auto-alt-ref": "1"}},
    "av1.mp4": {"codec": "libsvtav1"},
    "apng.png": {"codec": "apng", "pix_fmt": "rgb24", "container": "apng"},
    "huffyuv.nut": {"codec": "huffyuv", "pix_fmt": "rgb24"},
    "zmbv.avi": {"codec": "zmbv", "pix_fmt": "bgr0"},
    "dvd.vob": {"codec": "mpeg2video", "fps": 25, "options": {"bf": "2"}},
    "studio.mxf": {"codec": "mpeg2video", "fps": 25, "options": {"bf": "2"}},
}


@pytest.mark.parametrize("name", CODECS)
def test_every_codec_gives_all_its_frames(tmp_path, name):
    """Frames are read in order and with jumps. A packet without a frame would count as damage."""
    try:
        path = write_clip(tmp_path / name, **{"count": 70, "fps": 10, **CODECS[name]})
    except (av.codec.codec.UnknownCodecError, av.error.FFmpegError) as error:
        pytest.skip(f"this PyAV cannot write it: {error}")
    for frames in (70, 5):
        reader = open_video(path, frames=frames, size=None)
        assert numbers(reader) == spread(70, frames)
        assert reader.damaged == 0


# -- where a seek leads ----------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["mpeg1video", "mpeg2video"])
@pytest.mark.parametrize("frames", [3, 7, 12, 23])
def test_seeks_in_a_program_stream(tmp_path, codec, frames):
    """FFmpeg finds no keyframe by time there. The frames are right nevertheless."""
    path = write_clip(
        tmp_path / "x.mpg", count=500, fps=25, gop=15, codec=codec, options={"bf": "2"}
    )
    assert numbers(open_video(path, frames=frames)) == spread(500, frames)


def test_a_seek_that_misses_is_noticed(tmp_path, monkeypatch):
    """Whatever the container does, the requested frame is returned."""
    path = write_clip(tmp_path / "x.mkv", count=300, fps=25, gop=10)
    want = numbers(open_video(path, frames=9))
    assert want == spread(300, 9)
    seek = pyav._Walk._seek
    misses = []

    def miss(self, packet):
        misses.append(packet)
        return seek(self, min(packet + 40, int(self.packets.keys[-1])))

    monkeypatch.setattr(pyav._Walk, "_seek", miss)
    assert numbers(open_video(path, frames=9)) == want
    assert misses


def test_a_file_that_changes_while_it_is_read(tmp_path):
    path = write_clip(tmp_path / "x.mp4", count=300, fps=25, gop=10)
    reader = open_video(path, frames=9)
    write_clip(path, count=30, fps=25, gop=7)
    with pytest.raises(ValueError, match=r"x\.mp4"):
        list(reader)


# -- files that were cut off -----------------------------------------------------------------------


@pytest.mark.parametrize("audio", [True, False])
@pytest.mark.parametrize("name", ["x.mkv", "tags.mkv", "x.mp4"])
def test_cut_off(tmp_path, name, audio):
    options = {"movflags": "faststart"} if name == "x.mp4" else {}
    if name.endswith("mkv"):
        options["cluster_time_limit"] = "500"
    path = write_clip(
        tmp_path / name,
        count=100,
        gop=10,
        size=(128, 128),
        audio=audio,
        container_options=options,
    )
    assert numbers(open_video(path, frames=4)) == spread(100, 4)
    data = path.read_bytes()
    if name == "x.mkv":  # not every writer stores the length of each stream
        data = data.replace(b"DURATION", b"NOTATION")
    path.write_bytes(data[: len(data) // 2])
    with pytest.warns(VideoWarning, match=r"ends after \d\.\d s of the 10\.\d s in its header"):
        open_video(path)


def test_sound_longer_than_the_video_is_fine(tmp_path):
    path = tmp_path / "x.mkv"
    write_clip(path, count=30, audio=True)
    with av.open(str(path)) as probe:
        assert probe.duration > 0
    write_clip(path, count=30, audio=True, sound_seconds=20)
    open_video(path)


# -- more frames asked for than there are ----------------------------------------------------------


def test_more_frames_than_there_are(tmp_path):
    path = write_clip(tmp_path / "x.mp4", count=7)
    with pytest.warns(VideoWarning, match=r"x\.mp4: has 7 of the 20 frames asked for"):
        reader = open_video(path, frames=20)
    assert numbers(reader) == list(range(7))
    slides = write_clip(tmp_path / "x.mkv", count=3, times=[0, 100_000, 400_000])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert numbers(open_video(path, frames=7)) == list(range(7))
        assert numbers(open_video(slides)) == [0, 1, 2]  # 128 is a bound
        assert numbers(open_video(slides, fps=1, frames=50)) == [0, 1, 2]
