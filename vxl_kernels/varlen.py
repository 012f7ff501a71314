"""What the rows of a ragged call are: sequences of any lengths and layouts in one flat tensor.

The raw rows of all sequences come first, then the VST rows of all sequences, so that each weight
set multiplies one dense block. Three sequences, a window with VSTs between two texts::

    sequences  VarlenLayout([2, ChunkLayout(window=4, ratio=2), 1])
    rows       [a0 a1 | x0 x1 x2 x3 | b0 | vs0 vs1]
    raw rows from  0     2             6     7 (VSTs)

Names follow flash-attn's varlen interface.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ._arguments import at_least, fail
from .layout import ChunkLayout

__all__ = ["COLUMNS", "VarlenLayout", "kept_rows"]

COLUMNS = ("window", "ratio", "chunks", "raw_begin", "vst_begin")


class VarlenLayout:
    """The sequences of a ragged call, and the same as data on the device.

    Lengths and layouts reach the kernels only in `table`. A new step therefore neither compiles a
    kernel nor waits for the device.

    Args:
        sequences: a `ChunkLayout` of split order for windows with their VSTs, or a number of rows
            for ordinary tokens (prompt, text, decode: 1). 0 is a sequence without rows.
        device: of the tensors of the call.

    Attributes:
        sequences: as given, a tuple.
        table: int32 `(sequences, 5)` on the device: window, ratio, chunks, first raw row and first
            VST row of each sequence. Ordinary tokens have ratio 0 and one chunk of `window` rows.
        cu_seqlens: int32 `(sequences + 1,)` on the device: where the raw rows of each begin.
        raw_rows, vst_rows, rows: how many rows of each kind, and together.
        chunks: chunks of all sequences.

    Raises:
        ValueError: a sequence is neither a layout of split order nor a number of rows, or there are
            more rows than an int32 counts.
    """

    def __init__(
        self,
        sequences: Sequence[ChunkLayout | int],
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(sequences, Sequence):
            fail("sequences", repr(sequences)[:80], "a list of layouts and numbers of rows")
        self.sequences = tuple(_sequence(i, x) for i, x in enumerate(sequences))
        shapes = [_shape(x) for x in self.sequences]
        raw = [window * chunks for window, _, chunks in shapes]
        vst = [window // ratio * chunks if ratio else 0 for window, ratio, chunks in shapes]
        self.raw_rows, self.vst_rows = sum(raw), sum(vst)
        self.rows = self.raw_rows + self.vst_rows
        self.chunks = sum(chunks for _, _, chunks in shapes)
        at_least("rows", self.rows, 0, 2**31 - 1)
        table, raw_begin, vst_begin = [], 0, self.raw_rows
        for shape, raws, vsts in zip(shapes, raw, vst, strict=True):
            table.append((*shape, raw_begin, vst_begin))
            raw_begin, vst_begin = raw_begin + raws, vst_begin + vsts
        host = torch.tensor(table, dtype=torch.int32, device="cpu").view(-1, len(COLUMNS))
        ends = torch.tensor(
            [row[3] for row in table] + [raw_begin], dtype=torch.int32, device="cpu"
        )
        self.table, self.cu_seqlens = _upload(host, device), _upload(ends, device)

    def __len__(self) -> int:
        return len(self.sequences)

    def __repr__(self) -> str:
        return f"VarlenLayout({list(self.sequences)!r})"

    def appended(self) -> list[int]:
        """How many tokens `rope_append_varlen` adds to each sequence: the VSTs of windows, every
        row of text. `CacheBatch.reserve` and `commit` take this list."""
        return [
            x.chunks * x.vsts_per_chunk if isinstance(x, ChunkLayout) else x for x in self.sequences
        ]

    def rows_of(self, i: int, device: torch.device | str | None = None) -> torch.Tensor:
        """Rows of sequence i in the order of its own layout: int64 `(rows,)`."""
        shape = _shape(self.sequences[i])
        raws = shape[0] * shape[2]
        before = [_shape(x) for x in self.sequences[:i]]
        raw = sum(window * chunks for window, _, chunks in before)
        vst = self.raw_rows + sum(w // r * chunks for w, r, chunks in before if r)
        vsts = shape[0] // shape[1] * shape[2] if shape[1] else 0
        return torch.cat(
            [
                torch.arange(raw, raw + raws, device=device),
                torch.arange(vst, vst + vsts, device=device),
            ]
        )

    def pack(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """One flat tensor `(rows, ...)` of parts `(rows of the sequence, ...)`."""
        if len(parts) != len(self):
            fail("parts", len(parts), f"one for each of {len(self)} sequences")
        split = [self._split(i, x) for i, x in enumerate(parts)]
        return torch.cat([raw for raw, _ in split] + [vst for _, vst in split])

    def unpack(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The rows of each sequence, in the order of its own layout, of a flat tensor."""
        if x.dim() < 1 or x.shape[0] != self.rows:
            fail("x", tuple(x.shape), f"a tensor ({self.rows}, ...)")
        return [x[self.rows_of(i, x.device)] for i in range(len(self))]

    def split_rows(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The raw rows of a flat tensor, and its VST rows."""
        if x.dim() < 1 or x.shape[0] != self.rows:
            fail("x", tuple(x.shape), f"a tensor ({self.rows}, ...)")
        return x[: self.raw_rows], x[self.raw_rows :]

    def _split(self, i: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        window, ratio, chunks = _shape(self.sequences[i])
        raws = window * chunks
        rows = raws + (window // ratio * chunks if ratio else 0)
        if x.dim() < 1 or x.shape[0] != rows:
            fail(f"parts[{i}]", tuple(x.shape), f"a tensor ({rows}, ...)")
        return x[:raws], x[raws:]


def kept_rows(table: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Whether each row of a ragged call is appended to the cache, its sequence, and its entry among
    those that its sequence appends; 0 and 0 of rows that are not appended.

    Args:
        table: of a `VarlenLayout`.
        rows: of the call.
    """
    window, ratio, chunks, raw, vst = table.long().unbind(1)
    text = ratio == 0
    begin = torch.where(text, raw, vst)
    count = torch.where(text, window, chunks * (window // ratio.clamp(min=1)))
    row = torch.arange(rows, device=table.device)
    inside = (row[:, None] >= begin) & (row[:, None] < begin + count)  # one sequence or none
    kept, sequence = inside.long().max(1)
    kept = kept > 0
    return kept, sequence * kept, (row - begin[sequence]) * kept


def _sequence(i: int, x: Any) -> ChunkLayout | int:
    if isinstance(x, ChunkLayout):
        if x.order != "split":
            fail(f"sequences[{i}]", repr(x.order), "a layout of split order")
        return x
    return at_least(f"sequences[{i}]", x, 0)


def _shape(x: ChunkLayout | int) -> tuple[int, int, int]:
    return (x.window, x.ratio, x.chunks) if isinstance(x, ChunkLayout) else (x, 0, 1)


def _upload(host: torch.Tensor, device: torch.device | str | None) -> torch.Tensor:
    """On the device, without waiting for the copy."""
    kind = torch.device(device if device is not None else torch.get_default_device())
    if kind.type == "cuda":
        return host.pin_memory().to(kind, non_blocking=True)
    return host.to(kind)
