"""A sequence of the VST cache as a safetensors file.

Tensors `key.N` and `value.N`, `(length, kv_heads, head_dim)`, in the order of the layers; so
any safetensors reader opens the file. The header's metadata holds geometry, a CRC-32 of every
tensor and of the header itself. They find damage, not forgery.

Writing is done here and not by the safetensors package because that one wants all tensors at
once: a second copy of the sequence in host memory. Both ways go in pieces that stay in the
processor's cache between the disk, the checksum and the pages.
"""

from __future__ import annotations

import json
import os
import secrets
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import torch

from .._arguments import fail

__all__ = ["Header", "Reader", "read_metadata", "write"]

FORMAT = "vxl-cache-1"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# Loading 313 MiB took 0.20 s in pieces of 4 MiB, 0.21 of 1 MiB, 0.23 of half a MiB.
_PIECE_BYTES = 4 << 20
_NO_CHECKSUM = "0" * 8  # as wide as a real one, so that the header keeps its length


@dataclass(frozen=True)
class Header:
    """Geometry of a file. Fields as in `VstCache`; length in rows."""

    num_layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    length: int

    def refuse_unless(self, **wanted: object) -> None:
        """Raises ValueError with every field that differs."""
        differ = {name: w for name, w in wanted.items() if getattr(self, name) != w}
        if differ:
            fail("path", f"a file with {self._words(differ)}", self._words(differ, differ))

    def _words(self, names: Iterable[str], values: Mapping[str, object] | None = None) -> str:
        values = asdict(self) if values is None else values
        return ", ".join(f"{name} {values[name]}" for name in names)

    @property
    def tensor_bytes(self) -> int:
        return self.length * self.kv_heads * self.head_dim * self.dtype.itemsize

    def pieces(self) -> Iterator[tuple[int, int, int]]:
        """`(tensor, first, rows)` of every piece in the order of the file; tensor 2i is K of
        layer i, 2i + 1 its V."""
        each = max(1, _PIECE_BYTES // max(1, self.tensor_bytes // max(1, self.length)))
        for tensor in range(2 * self.num_layers):
            for first in range(0, self.length, each):
                yield tensor, first, min(each, self.length - first)

    def tensor_names(self) -> list[str]:
        return [f"{kind}.{i}" for i in range(self.num_layers) for kind in ("key", "value")]

    def entries(self) -> dict[str, dict[str, object]]:
        """The tensors as the safetensors header names them."""
        shape, size = [self.length, self.kv_heads, self.head_dim], self.tensor_bytes
        return {
            name: {
                "dtype": _DTYPES[self.dtype],
                "shape": shape,
                "data_offsets": [i * size, (i + 1) * size],
            }
            for i, name in enumerate(self.tensor_names())
        }

    def metadata(self, checksums: list[str], user: Mapping[str, str]) -> dict[str, str]:
        fields = {
            "format": FORMAT,
            **{name: str(value) for name, value in asdict(self).items()},
            "crc32": " ".join(checksums),
            "user": json.dumps(dict(user), sort_keys=True),
        }
        return {**fields, "header_crc32": _fields_checksum(fields)}


def _fields_checksum(fields: Mapping[str, str]) -> str:
    return _hex(zlib.crc32(json.dumps(fields, sort_keys=True).encode()))


def _hex(checksum: int) -> str:
    return f"{checksum:08x}"


def _raw(x: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the host."""
    return x.contiguous().flatten().view(torch.uint8).numpy().data


# -- writing ------------------------------------------------------------------------------


def write(
    path: str | os.PathLike[str],
    header: Header,
    piece: Callable[[int, int, int], torch.Tensor],
    user: Mapping[str, str],
) -> None:
    """Writes a whole file or none: beside its place first, moved there when it is complete and
    on the disk.

    Args:
        piece: the rows of a piece, on the host; arguments as `Header.pieces`.
        user: strings to keep with it.
    """
    for name, text in user.items():
        if not isinstance(name, str) or not isinstance(text, str):
            fail("metadata", f"{name!r}: {text!r}", "names and texts that are strings")
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with open(unfinished, "xb", buffering=0) as file:
            blank = [_NO_CHECKSUM] * (2 * header.num_layers)
            _write_all(file, memoryview(_encode(header, blank, user)))
            checksums = _write_pieces(file, header, piece)
            file.seek(0)
            _write_all(file, memoryview(_encode(header, checksums, user)))
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _encode(header: Header, checksums: list[str], user: Mapping[str, str]) -> bytes:
    entries = {"__metadata__": header.metadata(checksums, user), **header.entries()}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_pieces(
    file, header: Header, piece: Callable[[int, int, int], torch.Tensor]
) -> list[str]:
    """Writes one piece while the next is gathered and added to its tensor's checksum."""
    checksums = [0] * (2 * header.num_layers)
    with ThreadPoolExecutor(1) as pool:
        writing: Future[None] | None = None
        for tensor, first, rows in header.pieces():
            data = _raw(piece(tensor, first, rows))
            checksums[tensor] = zlib.crc32(data, checksums[tensor])
            if writing is not None:
                writing.result()  # one piece in flight, and no write behind one that failed
            writing = pool.submit(_write_all, file, data)
        if writing is not None:
            writing.result()
    return [_hex(checksum) for checksum in checksums]


def _write_all(file, data: memoryview) -> None:
    start, size = file.tell(), len(data)
    while data:  # a raw write may take less than it is given
        data = data[file.write(data) :]
    if hasattr(os, "posix_fadvise"):
        # The disk starts now instead of at the fsync.
        os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_DONTNEED)


def _sync_directory(directory: Path) -> None:
    """Makes the new name itself durable, where the system can."""
    with suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# -- reading ------------------------------------------------------------------------------


class Reader:
    """An open file whose header has been found right.

    Attributes:
        header: its geometry.
        user: the strings kept with it.

    Raises:
        ValueError: not a safetensors file, not of this format, truncated, or damaged.
        OSError: it can't be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from safetensors import SafetensorError, safe_open

        self._path = os.fspath(path)
        self._stream = open(path, "rb", buffering=0)  # noqa: SIM115  closed by __exit__
        try:
            # The package maps the file; it is used for the header, whose every rule it checks.
            with self._same_file(safe_open) as file:
                self.header, self._checksums, self.user = self._parse(file)
        except (SafetensorError, OSError) as error:
            self._stream.close()
            self._refuse(f"a file that is truncated, damaged or no safetensors ({error})")
        except BaseException:
            self._stream.close()
            raise

    def _same_file(self, safe_open):
        """The package's view of the very file that is open here: another process may replace it
        between the two openings."""
        while True:
            file = safe_open(self._path, framework="pt")
            if os.path.samestat(os.fstat(self._stream.fileno()), os.stat(self._path)):
                return file
            self._stream.close()
            self._stream = open(self._path, "rb", buffering=0)  # noqa: SIM115

    def _refuse(self, got: str) -> None:
        fail("path", f"{self._path!r}, {got}", "a file that VstCache.save wrote")

    def _parse(self, file) -> tuple[Header, list[str], dict[str, str]]:
        fields = file.metadata() or {}
        if fields.get("format") != FORMAT:
            self._refuse(f"of format {fields.get('format')!r} instead of {FORMAT!r}")
        checksum = fields.pop("header_crc32", "")
        if checksum != _fields_checksum(fields):
            self._refuse("whose header is damaged")
        dtypes = {str(dtype): dtype for dtype in _DTYPES}
        sizes = {n: int(fields[n]) for n in ("num_layers", "kv_heads", "head_dim", "length")}
        header = Header(dtype=dtypes[fields["dtype"]], **sizes)
        names = set(file.keys())
        for name, entry in header.entries().items():
            part = file.get_slice(name) if name in names else None
            found = part and {"dtype": part.get_dtype(), "shape": part.get_shape()}
            if found != {"dtype": entry["dtype"], "shape": entry["shape"]}:
                self._refuse(f"whose tensor {name} is not what its header says")
        return header, fields["crc32"].split(), json.loads(fields["user"])

    def pieces(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """`(tensor, first row, rows (n, kv_heads, head_dim))` of every piece, on the host.

        A tensor's last piece comes after its checksum was found right; a wrong one raises
        ValueError. Use a piece before you take the next: two buffers serve them all, and one
        is filled while the other is used.
        """
        (header_bytes,) = struct.unpack("<Q", self._stream.read(8))
        self._stream.seek(8 + header_bytes)
        if hasattr(os, "posix_fadvise"):  # read ahead of us: 1.25 times as fast from a cold disk
            os.posix_fadvise(self._stream.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        h = self.header
        pieces = list(h.pieces())
        longest = max((rows for *_, rows in pieces), default=0)
        buffers = [torch.empty(longest, h.kv_heads, h.head_dim, dtype=h.dtype) for _ in range(2)]
        parts = [buffers[i % 2][:rows] for i, (*_, rows) in enumerate(pieces)]
        checksums = [0] * len(self._checksums)
        with ThreadPoolExecutor(1) as pool:
            coming = [pool.submit(self._fill, part) for part in parts[:1]]
            for i, (tensor, first, rows) in enumerate(pieces):
                coming.pop().result()
                coming += [pool.submit(self._fill, part) for part in parts[i + 1 : i + 2]]
                checksums[tensor] = zlib.crc32(_raw(parts[i]), checksums[tensor])
                is_last = first + rows == h.length
                if is_last and _hex(checksums[tensor]) != self._checksums[tensor]:
                    self._refuse(f"whose tensor {h.tensor_names()[tensor]} is damaged")
                yield tensor, first, parts[i]

    def _fill(self, tensor: torch.Tensor) -> None:
        data = _raw(tensor)
        while data:
            count = self._stream.readinto(data)
            if not count:
                self._refuse("which became shorter while it was read")
            data = data[count:]

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stream.close()


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The strings that `VstCache.save` was given; errors as `VstCache.load`'s."""
    with Reader(path) as file:
        return file.user
