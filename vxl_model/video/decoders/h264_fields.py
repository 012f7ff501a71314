"""Field-coded H.264: which packets hold the second field of a picture.

An interlaced H.264 picture is coded as one frame or as two fields. FFmpeg gives each field a packet
of its own, and the decoder makes one picture of the two. Only the slice headers tell the two cases
apart. Source: ITU-T H.264, sections 7.3.2.1.1, 7.3.2.2, 7.3.3 and 7.4.1.2.4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

SLICE, IDR_SLICE, SPS, PPS = 1, 5, 7, 8
# Profiles whose parameter sets describe chroma and scaling.
HIGH_PROFILES = frozenset({44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 144, 244})
HEADER_BYTES = 64  # a slice header up to its field flags takes fewer


class Bits:
    """Reads a NAL unit's payload bit by bit."""

    def __init__(self, unit: bytes) -> None:
        payload = unit.replace(b"\0\0\3", b"\0\0")
        self._value = int.from_bytes(payload, "big")
        self._left = 8 * len(payload)

    def take(self, count: int) -> int:
        """An unsigned number of `count` bits; zeros follow the end."""
        self._left -= count
        shifted = self._value >> self._left if self._left >= 0 else self._value << -self._left
        return shifted & ((1 << count) - 1)

    def golomb(self) -> int:
        """An Exp-Golomb number, unsigned."""
        zeros = 0
        while not self.take(1):
            zeros += 1
            if zeros > 32:
                raise ValueError("not an Exp-Golomb number")
        return (1 << zeros) - 1 + self.take(zeros)

    def signed_golomb(self) -> int:
        number = self.golomb()
        return (number + 1) // 2 if number % 2 else -(number // 2)


@dataclass(frozen=True)
class Sequence:
    """What a sequence parameter set says about slice headers."""

    frame_num_bits: int
    separate_planes: bool
    frames_only: bool


class FieldPairs:
    """Follows an H.264 stream packet by packet."""

    def __init__(self, extradata: bytes | None) -> None:
        """`extradata`: the stream's parameter sets, either as avcC or as a byte stream."""
        self._length_size = 0  # of a NAL unit's length; 0 means start codes
        self._sequences: dict[int, Sequence] = {}
        self._pictures: dict[int, int] = {}  # a picture parameter set's sequence
        self._first: tuple[int, int] | None = None  # frame number and parity of an open pair
        if extradata and extradata[0] == 1:
            self._length_size = (extradata[4] & 3) + 1
            self._read_avcc(extradata)
        elif extradata:
            self._parameters(_units_by_start_code(extradata))

    @property
    def possible(self) -> bool:
        """False where all pictures are whole frames. A byte stream may change its mind."""
        known = self._sequences.values()
        return not (self._length_size and known and all(s.frames_only for s in known))

    def is_second(self, packet: bytes) -> bool:
        """Whether the packet completes the picture that the packet before it began."""
        units = (
            _units_by_length(packet, self._length_size)
            if self._length_size
            else _units_by_start_code(packet)
        )
        header = self._parameters(units)
        if header is None:
            self._first = None
            return False
        second = self._first == (header[0], 1 - header[1])
        self._first = None if second else header
        return second

    def _parameters(self, units: Iterator[bytes]) -> tuple[int, int] | None:
        """Takes parameter sets up to the first slice; returns the slice's frame number and parity,
        None for a whole frame."""
        for unit in units:
            kind = unit[0] & 31 if unit else 0
            try:
                if kind == SPS:
                    self._read_sequence(Bits(unit[1:]))
                elif kind == PPS:
                    bits = Bits(unit[1:HEADER_BYTES])
                    self._pictures[bits.golomb()] = bits.golomb()
                elif kind in (SLICE, IDR_SLICE):
                    return self._read_slice(Bits(unit[1:HEADER_BYTES]))
            except (ValueError, KeyError):  # damaged, or its parameter sets are missing
                return None
        return None

    def _read_avcc(self, extradata: bytes) -> None:
        at = 5
        for mask in (31, 255):  # sequence parameter sets, then picture parameter sets
            count = extradata[at] & mask if at < len(extradata) else 0
            at += 1
            for _ in range(count):
                length = int.from_bytes(extradata[at : at + 2], "big")
                self._parameters(iter((extradata[at + 2 : at + 2 + length],)))
                at += 2 + length

    def _read_sequence(self, bits: Bits) -> None:
        profile = bits.take(8)
        bits.take(16)
        number = bits.golomb()
        separate = False
        if profile in HIGH_PROFILES:
            chroma = bits.golomb()
            separate = chroma == 3 and bool(bits.take(1))
            bits.golomb(), bits.golomb(), bits.take(1)
            if bits.take(1):
                for i in range(8 if chroma != 3 else 12):
                    if bits.take(1):
                        _skip_scaling_list(bits, 16 if i < 6 else 64)
        frame_num_bits = bits.golomb() + 4
        order = bits.golomb()
        if order == 0:
            bits.golomb()
        elif order == 1:
            bits.take(1), bits.golomb(), bits.golomb()
            for _ in range(bits.golomb()):
                bits.golomb()
        bits.golomb(), bits.take(1), bits.golomb(), bits.golomb()
        self._sequences[number] = Sequence(frame_num_bits, separate, bool(bits.take(1)))

    def _read_slice(self, bits: Bits) -> tuple[int, int] | None:
        bits.golomb(), bits.golomb()
        sequence = self._sequences[self._pictures[bits.golomb()]]
        if sequence.frames_only:
            return None
        if sequence.separate_planes:
            bits.take(2)
        frame_num = bits.take(sequence.frame_num_bits)
        return (frame_num, bits.take(1)) if bits.take(1) else None


def _skip_scaling_list(bits: Bits, size: int) -> None:
    last = scale = 8
    for _ in range(size):
        if scale:
            scale = (last + bits.signed_golomb()) % 256
        last = scale or last


def _units_by_start_code(data: bytes) -> Iterator[bytes]:
    begin = data.find(b"\0\0\1")
    while begin >= 0:
        end = data.find(b"\0\0\1", begin + 3)
        yield data[begin + 3 : end if end >= 0 else len(data)]
        begin = end


def _units_by_length(data: bytes, size: int) -> Iterator[bytes]:
    at = 0
    while at + size <= len(data):
        length = int.from_bytes(data[at : at + size], "big")
        yield data[at + size : at + size + length]
        at += size + length
