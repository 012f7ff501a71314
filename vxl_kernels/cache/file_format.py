"""A sequence of the VST cache as a safetensors file.

The file holds tensors `key.N` and `value.N`, `(length, kv_heads, head_dim)`, in the order of the
layers, then the caller's own tensors. Any safetensors reader can open it. The metadata of its
header holds the geometry, a CRC-32 of every tensor and one of the header itself. These find
damage, not forgery.

The safetensors package would need all tensors at once to write them: a second copy of the
sequence in host memory. So this module writes and reads in pieces, which stay in the processor's
cache between the disk, the checksum and the pages.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate
from types import TracebackType
from typing import BinaryIO

import torch

from .._arguments import fail
from ..files import atomic_write

__all__ = ["Header", "Reader", "Tensors", "read_metadata", "read_tensors", "write"]

FORMAT = "vxl-cache-1"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# Loading 313 MiB took 0.20 s in pieces of 4 MiB, 0.21 of 1 MiB, 0.23 of half a MiB.
_PIECE_BYTES = 4 << 20
_NO_CHECKSUM = "0" * 8  # as long as a real one, so that the header keeps its length

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Header:
    """Geometry of a file. The fields are those of `VstCache`, and the length in rows."""

    num_layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    length: int

    def refuse_unless(self, **wanted: object) -> None:
        """Raises ValueError that names every field that differs."""
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
        """Yields `(tensor, first, rows)` of every piece in the order of the file. Tensor 2i is K
        of layer i, and tensor 2i + 1 its V."""
        each = max(1, _PIECE_BYTES // max(1, self.tensor_bytes // max(1, self.length)))
        for tensor in range(2 * self.num_layers):
            for first in range(0, self.length, each):
                yield tensor, first, min(each, self.length - first)

    def tensor_names(self) -> list[str]:
        return [f"{kind}.{i}" for i in range(self.num_layers) for kind in ("key", "value")]

    def entries(self) -> dict[str, dict[str, object]]:
        """K and V as the safetensors header describes them, without their offsets."""
        shape = [self.length, self.kv_heads, self.head_dim]
        return {
            name: {"dtype": _DTYPES[self.dtype], "shape": shape} for name in self.tensor_names()
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
    tensors: Tensors,
) -> None:
    """Writes a file by `atomic_write`, durable.

    Args:
        piece: returns the rows of a piece, on the host. Its arguments are those of
            `Header.pieces`.
        user: strings to keep in the file.
        tensors: tensors to keep in the file, of the dtypes of a cache.
    """
    for name, text in user.items():
        if not isinstance(name, str) or not isinstance(text, str):
            fail("metadata", f"{name!r}: {text!r}", "names and texts that are strings")
    for name, tensor in tensors.items():
        kind = getattr(tensor, "dtype", type(tensor).__name__)
        if kind not in _DTYPES or not isinstance(name, str) or name in header.tensor_names():
            fail("tensors", f"{name!r} of {kind}", "another name, a dtype of the cache")

    def write_to(file: BinaryIO) -> None:
        blank = [_NO_CHECKSUM] * (2 * header.num_layers + len(tensors))
        file.write(_encode(header, blank, user, tensors))
        checksums = _write_pieces(file, header, piece)
        for _, tensor in sorted(tensors.items()):
            data = _raw(tensor.cpu())
            checksums.append(_hex(zlib.crc32(data)))
            file.write(data)
        file.seek(0)
        file.write(_encode(header, checksums, user, tensors))

    atomic_write(path, write_to, durable=True)


def _encode(
    header: Header, checksums: list[str], user: Mapping[str, str], tensors: Tensors
) -> bytes:
    entries = header.entries() | {
        name: {"dtype": _DTYPES[x.dtype], "shape": list(x.shape)}
        for name, x in sorted(tensors.items())
    }
    sizes = [header.tensor_bytes] * (2 * header.num_layers)
    sizes += [x.nbytes for _, x in sorted(tensors.items())]
    for entry, size, end in zip(entries.values(), sizes, accumulate(sizes), strict=True):
        entry["data_offsets"] = [end - size, end]
    contents = {"__metadata__": header.metadata(checksums, user), **entries}
    text = json.dumps(contents, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_pieces(
    file: BinaryIO, header: Header, piece: Callable[[int, int, int], torch.Tensor]
) -> list[str]:
    """Writes one piece while the next one is gathered and added to the checksum of its tensor."""
    checksums = [0] * (2 * header.num_layers)
    with ThreadPoolExecutor(1) as pool:
        writing: Future[None] | None = None
        for tensor, first, rows in header.pieces():
            data = _raw(piece(tensor, first, rows))
            checksums[tensor] = zlib.crc32(data, checksums[tensor])
            if writing is not None:
                writing.result()  # one piece in flight, and no write after one that failed
            writing = pool.submit(_write_piece, file, data)
        if writing is not None:
            writing.result()
    return [_hex(checksum) for checksum in checksums]


def _write_piece(file: BinaryIO, data: memoryview) -> None:
    start = file.tell()
    file.write(data)
    file.flush()
    if hasattr(os, "posix_fadvise"):
        # The disk starts now instead of at the fsync.
        os.posix_fadvise(file.fileno(), start, len(data), os.POSIX_FADV_DONTNEED)


# -- reading ------------------------------------------------------------------------------


class Reader:
    """An open file with a valid header.

    Attributes:
        header: geometry of the file.
        user: the strings in the file.
        checksums: the CRC-32 of every tensor, in hexadecimal.

    Raises:
        ValueError: the file is not a safetensors file, has another format, or is truncated or
            damaged.
        OSError: the file cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from safetensors import SafetensorError, safe_open

        self._path = os.fspath(path)
        self._stream = open(path, "rb", buffering=0)  # noqa: SIM115  closed by __exit__
        try:
            # The package maps the file. It reads the header here, because it checks every rule.
            with self._same_file(safe_open) as file:
                self.header, self.checksums, self.user = self._parse(file)
        except (SafetensorError, OSError) as error:
            self._stream.close()
            self._refuse(f"a file that is truncated, damaged or not in safetensors ({error})")
        except BaseException:
            self._stream.close()
            raise

    def _same_file(self, safe_open):
        """The package's view of the file that is open here. Another process may replace the file
        between the two openings, so both are compared."""
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
            self._refuse(f"whose format is {fields.get('format')!r} and not {FORMAT!r}")
        checksum = fields.pop("header_crc32", "")
        if checksum != _fields_checksum(fields):
            self._refuse("whose header is damaged")
        dtypes = {str(dtype): dtype for dtype in _DTYPES}
        sizes = {n: int(fields[n]) for n in ("num_layers", "kv_heads", "head_dim", "length")}
        header = Header(dtype=dtypes[fields["dtype"]], **sizes)
        names = set(file.keys())
        for name, entry in header.entries().items():
            part = file.get_slice(name) if name in names else None
            if (part and {"dtype": part.get_dtype(), "shape": part.get_shape()}) != entry:
                self._refuse(f"whose tensor {name} does not match its metadata")
        self._extra = sorted(names - set(header.tensor_names()))
        checksums = fields["crc32"].split()
        if len(checksums) != 2 * header.num_layers + len(self._extra):
            self._refuse(f"with {len(names)} tensors and {len(checksums)} checksums")
        return header, checksums, json.loads(fields["user"])

    def pieces(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yields `(tensor, first row, rows (n, kv_heads, head_dim))` of every piece, on the host.

        The last piece of a tensor comes only if the checksum of the tensor is right; otherwise
        this raises ValueError. Use a piece before you take the next one: there are two buffers,
        and one is filled while the other is used.
        """
        (header_bytes,) = struct.unpack("<Q", self._stream.read(8))
        self._stream.seek(8 + header_bytes)
        if hasattr(os, "posix_fadvise"):  # the kernel reads ahead: 1.25x faster from a cold disk
            os.posix_fadvise(self._stream.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        h = self.header
        pieces = list(h.pieces())
        longest = max((rows for *_, rows in pieces), default=0)
        shape = longest, h.kv_heads, h.head_dim
        buffers = [torch.empty(shape, dtype=h.dtype, device="cpu") for _ in range(2)]
        parts = [buffers[i % 2][:rows] for i, (*_, rows) in enumerate(pieces)]
        checksums = [0] * (2 * h.num_layers)
        with ThreadPoolExecutor(1) as pool:
            coming = [pool.submit(self._fill, part) for part in parts[:1]]
            for i, (tensor, first, rows) in enumerate(pieces):
                coming.pop().result()
                coming += [pool.submit(self._fill, part) for part in parts[i + 1 : i + 2]]
                checksums[tensor] = zlib.crc32(_raw(parts[i]), checksums[tensor])
                is_last = first + rows == h.length
                if is_last and _hex(checksums[tensor]) != self.checksums[tensor]:
                    self._refuse(f"whose tensor {h.tensor_names()[tensor]} is damaged")
                yield tensor, first, parts[i]

    def _fill(self, tensor: torch.Tensor) -> None:
        data = _raw(tensor)
        while data:
            count = self._stream.readinto(data)
            if not count:
                self._refuse("which became shorter while it was read")
            data = data[count:]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The caller's own tensors, on the host. Raises ValueError if one is damaged."""
        from safetensors import safe_open

        with self._same_file(safe_open) as file:
            found = {name: file.get_tensor(name) for name in self._extra}
        checksums = self.checksums[2 * self.header.num_layers :]
        for (name, tensor), checksum in zip(found.items(), checksums, strict=True):
            if _hex(zlib.crc32(_raw(tensor))) != checksum:
                self._refuse(f"whose tensor {name} is damaged")
        return found

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
    """The strings that `VstCache.save` wrote. Raises as `VstCache.load` does."""
    with Reader(path) as file:
        return file.user


def read_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The extra tensors that `VstCache.save` wrote, on the host. Raises as `VstCache.load` does."""
    with Reader(path) as file:
        return file.tensors()
