"""Small video files made on the spot. Every frame shows its own number, so that a test sees
which frame it was given."""

from fractions import Fraction

import av
import numpy as np

BITS = 8


def picture(number, width=64, height=64):
    """`number` in black and white columns, most significant first, under a bright top edge."""
    columns = np.array([(number >> (BITS - 1 - i)) & 1 for i in range(BITS)])
    row = columns[np.arange(width) * BITS // width] * 200 + 20
    frame = np.repeat(np.repeat(row[None, :, None], height, 0), 3, 2).astype(np.uint8)
    frame[: height // 4] = (240, 40, 40)  # red: tells top from bottom
    return frame


def read_number(frame):
    """The number that a delivered frame shows."""
    height, width = frame.shape[:2]
    strip = frame[height // 2 : height - height // 8].mean((0, 2))
    centres = (np.arange(BITS) * 2 + 1) * width // (2 * BITS)
    return int("".join("1" if strip[c] > 120 else "0" for c in centres), 2)


def numbers(reader):
    return [read_number(frame) for batch in reader for frame in batch]


def write_clip(
    path,
    count=30,
    fps=10,
    size=(64, 64),
    codec="libx264",
    pix_fmt="yuv420p",
    times=None,
    rotation=0,
    container=None,
    options=None,
    audio=False,
    container_options=None,
    gop=None,
):
    """`count` frames at `fps`, or shown at `times` (milliseconds, for variable frame rates)."""
    with av.open(
        str(path), "w", format=container, container_options=container_options or {}
    ) as out:
        stream = out.add_stream(codec, rate=Fraction(fps), options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        if gop:
            stream.codec_context.gop_size = gop
        if rotation:
            stream.set_display_rotation(rotation)
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        sound = out.add_stream("aac", rate=8000, layout="mono") if audio else None
        if sound:
            write_tone(out, sound, count / fps)
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(picture(i, *size), format="rgb24")
            frame = frame.reformat(format=pix_fmt)
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def write_long(path, seconds, size=(640, 360), fps=8):
    """One encoded second, written `seconds` times: an hour without the encoder's hour."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=fps, options={"bf": "0", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        second = []
        for i in range(fps):
            frame = av.VideoFrame.from_ndarray(picture(i, *size), format="rgb24")
            second += [(bytes(p), p.is_keyframe) for p in stream.encode(frame)]
        second += [(bytes(p), p.is_keyframe) for p in stream.encode(None)]
        assert len(second) == fps
        assert [key for _, key in second] == [True] + [False] * (fps - 1)
        for i in range(seconds * fps):
            data, key = second[i % fps]
            packet = av.Packet(data)
            packet.stream, packet.time_base = stream, Fraction(1, fps)
            packet.pts = packet.dts = i
            packet.duration, packet.is_keyframe = 1, key
            out.mux_one(packet)
    return path


def write_tone(out, stream, seconds):
    samples = np.zeros((1, int(8000 * seconds)), np.float32)
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
    frame.sample_rate = 8000
    frame.pts = 0
    out.mux(stream.encode(frame))
    out.mux(stream.encode(None))


def write_audio(path, seconds=2):
    with av.open(str(path), "w") as out:
        write_tone(out, out.add_stream("aac", rate=8000, layout="mono"), seconds)
    return path
