"""A sequence of the VST cache as a safetensors file.

Tensors `key.N` and `value.N`, `(length, kv_heads, head_dim)`, in the order of the layers; so
any safetensors reader opens the file. The header's metadata holds geometry, a CRC-32 of every
tensor and of the header itself. They find damage, not forgery.

Writing is done here and not by the safetensors package because that one wants all tensors at
once: a second copy of the sequence in host memory. Layers are written one at a time while a
thread computes the checksum of the same bytes.
"""

from __future__ import annotations

import json
import os
import secrets
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import torch

from ._arguments import fail

__all__ = ["Header", "Reader", "read_metadata", "write"]

FORMAT = "vxl-cache-1"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
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
    tensors: Iterable[torch.Tensor],
    user: Mapping[str, str],
) -> None:
    """Writes a whole file or none: beside its place first, moved there when it is complete and
    on the disk.

    Args:
        tensors: K and V of every layer in turn, on the host.
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
            file.write(_encode(header, blank, user))
            checksums = _write_tensors(file, tensors)
            file.seek(0)
            file.write(_encode(header, checksums, user))
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


def _write_tensors(file, tensors: Iterable[torch.Tensor]) -> list[str]:
    checksums: list[Future[int]] = []
    with ThreadPoolExecutor(1) as pool:
        for tensor in tensors:
            data = _raw(tensor)
            checksums.append(pool.submit(zlib.crc32, data))
            while data:  # a raw write may take less than it is given
                data = data[file.write(data) :]
            checksums[-1].result()  # bounds what is in flight to one tensor
    return [_hex(c.result()) for c in checksums]


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

        with open(path, "rb"):  # a plain OSError, before anything is interpreted
            pass
        self._path = os.fspath(path)
        try:
            self._file = safe_open(self._path, framework="pt")
            self.header, self._checksums, self.user = self._parse(self._file.metadata() or {})
        except (SafetensorError, OSError) as error:
            self._refuse(f"a file that is truncated, damaged or no safetensors ({error})")

    def _refuse(self, got: str) -> None:
        fail("path", f"{self._path!r}, {got}", "a file that VstCache.save wrote")

    def _parse(self, fields: dict[str, str]) -> tuple[Header, list[str], dict[str, str]]:
        if fields.get("format") != FORMAT:
            self._refuse(f"of format {fields.get('format')!r} instead of {FORMAT!r}")
        checksum = fields.pop("header_crc32", "")
        if checksum != _fields_checksum(fields):
            self._refuse("whose header is damaged")
        dtypes = {str(dtype): dtype for dtype in _DTYPES}
        sizes = {n: int(fields[n]) for n in ("num_layers", "kv_heads", "head_dim", "length")}
        header = Header(dtype=dtypes[fields["dtype"]], **sizes)
        names = set(self._file.keys())
        for name, entry in header.entries().items():
            part = self._file.get_slice(name) if name in names else None
            found = part and {"dtype": part.get_dtype(), "shape": part.get_shape()}
            if found != {"dtype": entry["dtype"], "shape": entry["shape"]}:
                self._refuse(f"whose tensor {name} is not what its header says")
        return header, fields["crc32"].split(), json.loads(fields["user"])

    def tensors(self) -> Iterator[torch.Tensor]:
        """K and V of every layer in turn, `(length, kv_heads, head_dim)` on the host.

        Each tensor is handed out while its checksum is being computed; a wrong one raises
        ValueError at the next step, so keep what was read only when the iterator has ended.
        """
        with ThreadPoolExecutor(1) as pool:
            for name, expected in zip(self.header.tensor_names(), self._checksums, strict=True):
                tensor = self._file.get_tensor(name)
                checksum = pool.submit(zlib.crc32, _raw(tensor))
                yield tensor
                if _hex(checksum.result()) != expected:
                    self._refuse(f"whose tensor {name} is damaged")

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        del self._file


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The strings that `VstCache.save` was given; errors as `VstCache.load`'s."""
    with Reader(path) as file:
        return file.user
