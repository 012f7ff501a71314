"""Writes small video files. Every frame shows its number, so that a test sees which frame it
got."""

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
    sound_seconds=None,
    container_options=None,
    gop=None,
    shows=None,
):
    """`count` frames at `fps`, or shown at `times` (milliseconds, for variable frame rates). They
    show their own numbers or those of `shows`."""
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
            write_tone(out, sound, sound_seconds or count / fps)
        for i in range(count):
            shown = picture(shows[i] if shows else i, *size)
            frame = av.VideoFrame.from_ndarray(shown, format="rgb24")
            frame = frame.reformat(format=pix_fmt)
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def write_long(path, seconds, size=(640, 360), fps=8):
    """Writes one encoded second `seconds` times. So an hour of video is quick to write."""
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


def rewrite(source, target, change=lambda number, packet: packet, container_options=None):
    """The video stream of a file in another container. `change` may change a packet, or drop it by
    returning None."""
    with (
        av.open(str(source)) as given,
        av.open(str(target), "w", container_options=container_options or {}) as out,
    ):
        stream = given.streams.video[0]
        copy = out.add_stream_from_template(stream)
        packets = (packet for packet in given.demux(stream) if packet.size)
        for number, packet in enumerate(packets):
            packet = change(number, packet)
            if packet is not None:
                packet.stream = copy
                out.mux_one(packet)
    return target


def changed(packet, data):
    """A packet with other bytes."""
    other = av.Packet(data)
    for name in ("pts", "dts", "time_base", "duration", "is_keyframe"):
        setattr(other, name, getattr(packet, name))
    return other


# -- field-coded H.264, which no encoder here writes ----------------------------------------------


class Bits:
    """The payload of a NAL unit, bit by bit."""

    def __init__(self):
        self.text = ""

    def put(self, value, count=1):
        self.text += format(value, f"0{count}b")
        return self

    def golomb(self, *values):
        for value in values:
            digits = format(value + 1, "b")
            self.text += "0" * (len(digits) - 1) + digits
        return self

    def align(self):
        self.text += "0" * (-len(self.text) % 8)
        return self

    def unit(self, kind):
        """A start code and the NAL unit, with bytes that prevent false start codes."""
        self.put(1).align()
        data = bytearray()
        for byte in int("1" + self.text, 2).to_bytes(len(self.text) // 8 + 1, "big")[1:]:
            if byte <= 3 and data[-2:] == b"\0\0":
                data.append(3)
            data.append(byte)
        return b"\0\0\0\1" + bytes([3 << 5 | kind]) + bytes(data)


def parameter_sets(size):
    """Main profile, 8 bits of frame_num, pictures that may be fields."""
    width, height = size
    sequence = Bits().put(77, 8).put(0, 8).put(30, 8).golomb(0, 4, 2, 1).put(0)
    sequence.golomb(width // 16 - 1, height // 32 - 1).put(0b001000, 6)
    picture = Bits().golomb(0, 0).put(0, 2).golomb(0, 0, 0).put(0, 3).golomb(0, 0, 0).put(0, 3)
    return sequence.unit(7) + picture.unit(8)


def coded(luma, number, bottom=None, key=False):
    """A frame (`bottom` None) or a field as one slice of raw macroblocks."""
    slice_ = Bits().golomb(0, 7, 0).put(number % 256, 8)
    slice_.put(0) if bottom is None else slice_.put(1).put(bottom)
    slice_ = slice_.golomb(0).put(0, 2) if key else slice_.put(0)
    slice_.golomb(0)
    for y in range(0, luma.shape[0], 16):
        for x in range(0, luma.shape[1], 16):
            block = luma[y : y + 16, x : x + 16].tobytes() + bytes([128]) * 128
            slice_.golomb(25).align().put(int.from_bytes(block, "big"), 8 * len(block))
    return slice_.unit(5 if key else 1)


def write_fields(path, count=30, gop=10, whole=lambda i: False, size=(64, 64)):
    """A bare H.264 stream whose pictures are pairs of fields, or frames where `whole(i)` says."""
    data = b""
    for i in range(count):
        luma = np.ascontiguousarray(picture(i, *size)[..., 1])
        key = i % gop == 0
        data += parameter_sets(size) if key else b""
        if whole(i):
            data += coded(luma, i % gop, key=key)
        else:
            data += coded(luma[::2], i % gop, 0, key) + coded(luma[1::2], i % gop, 1)
    path.write_bytes(data)
    return path
