"""A sequence in host memory.

From a GPU it is in page-locked blocks of one size. PyTorch's allocator rounds page-locked memory up
to a power of two, keeps it, and takes a second to lock gigabytes. Blocks are not rounded. Those of
a sequence that has ended are used again for the next one, of any length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["HostSequence"]

BLOCK_BYTES = 32 << 20  # a power of two
Piece = tuple[int, int, torch.Tensor]
"""(tensor, first row, rows): K of layer tensor / 2, or V of layer (tensor - 1) / 2."""


class HostSequence:
    """A sequence in host memory, made by `VstCache.offload`.

    Attributes:
        shape: `(2, num_layers, length, kv_heads, head_dim)`, K then V.
        dtype: of the rows.
    """

    def __init__(self, data: torch.Tensor, event: torch.cuda.Event | None = None) -> None:
        self.shape, self.dtype = data.shape, data.dtype
        self._event = event
        self._data: torch.Tensor | None = data
        self._pieces = [(i, 0, data[i % 2, i // 2]) for i in range(2 * self.shape[1])]

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: torch.dtype, pinned: bool) -> HostSequence:
        """Memory for a sequence; `pinned` for page-locked blocks."""
        if not pinned:
            return cls(torch.empty(shape, dtype=dtype, device="cpu"))
        host = cls.__new__(cls)
        host.shape, host.dtype, host._event, host._data = torch.Size(shape), dtype, None, None
        host._pieces = list(_blocks(host.shape, dtype))
        return host

    @property
    def length(self) -> int:
        return self.shape[2]

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    @property
    def data(self) -> torch.Tensor:
        """The rows in one tensor of `shape`, when the copy from the device is complete: of a
        sequence from a GPU a new tensor."""
        if self._data is not None:
            return self._data
        self.wait()
        out = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        for tensor, first, rows in self._pieces:
            out[tensor % 2, tensor // 2, first : first + len(rows)] = rows
        return out

    def pieces(self) -> Iterator[Piece]:
        """Where the rows are. They are views, so the memory is page-locked, and a stream that
        waits for the device may read them before the host could."""
        return iter(self._pieces)

    def wait(self) -> HostSequence:
        """Returns when the copy from the device is complete."""
        if self._event is not None:
            self._event.synchronize()
        return self


def _blocks(shape: torch.Size, dtype: torch.dtype) -> Iterator[Piece]:
    """Pieces in page-locked blocks, the tensors one after the other."""
    _, layers, length, *heads = shape
    each = max(1, BLOCK_BYTES // max(1, torch.Size(heads).numel() * dtype.itemsize))
    options: dict[str, Any] = {"dtype": dtype, "device": "cpu", "pin_memory": True}
    block, used, left = torch.empty(0, *heads, dtype=dtype), 0, 2 * layers * length
    for tensor in range(2 * layers):
        first = 0
        while first < length:
            if used == len(block):
                block, used = torch.empty(min(each, left), *heads, **options), 0
            rows = min(length - first, len(block) - used)
            yield tensor, first, block[used : used + rows]
            first, used, left = first + rows, used + rows, left - rows
