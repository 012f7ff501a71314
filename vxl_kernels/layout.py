"""What each row of a call holds, and which keys it sees.

A window of `window` raw visual tokens becomes one chunk: one summary token (VST) follows every
`ratio` raw tokens. Raw tokens after the last VST have none. This module is the only description
of that layout: masks, row orders, positions and FLOP counts are read from here.
`csrc/include/vxl/params.h` is its counterpart for the kernels.

Example, window 5, ratio 2 (two VSTs, one raw token left over), one chunk::

    position in chunk    0   1   2    3   4   5    6
    token                x0  x1  vs0  x2  x3  vs1  x4
    row, interleaved     0   1   2    3   4   5    6
    row, split           0   1   5    2   3   6    4      rows = [x0 x1 x2 x3 x4 | vs0 vs1]

Source: Video-XL paper, section 3.2; the published code's `beacon` memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from ._arguments import at_least, fail

__all__ = ["ChunkLayout", "layout_from_ints", "layout_to_ints", "takes_ints"]

Order = Literal["split", "interleaved"]


@dataclass(frozen=True)
class ChunkLayout:
    """The rows of a call of `chunks` equal chunks.

    Args:
        window: raw tokens of a chunk (1440 in the released model).
        ratio: raw tokens per VST, "alpha" in the paper (2 to 16); at most `window`.
        chunks: chunks of the call.
        order: "split" is `[raw rows of all chunks | VST rows of all chunks]`, so that each
            weight set multiplies one dense block. "interleaved" is the order of the sequence,
            as in the upstream code.

    Raises:
        ValueError: an argument is not a positive integer of 32 bits, `ratio > window`, or `order`
            is neither of the two.
    """

    window: int
    ratio: int
    chunks: int = 1
    order: Order = "split"

    def __post_init__(self) -> None:
        for name in ("window", "ratio", "chunks"):
            value = getattr(self, name)
            number = at_least(name, value, 1)
            if number is not value:
                object.__setattr__(self, name, number)
        if self.ratio > self.window:
            fail("ratio", self.ratio, f"at most the window of {self.window} tokens")
        if self.order not in ("split", "interleaved"):
            fail("order", repr(self.order), "'split' or 'interleaved'")

    # -- sizes ---------------------------------------------------------------------

    @property
    def vsts_per_chunk(self) -> int:
        """VSTs of one chunk: `window // ratio`."""
        return self.window // self.ratio

    @property
    def rows_per_chunk(self) -> int:
        """Rows of one chunk, raw and VST."""
        return self.window + self.vsts_per_chunk

    @property
    def rows(self) -> int:
        """Rows of the whole call."""
        return self.chunks * self.rows_per_chunk

    # -- the two axes: row -> chunk, row -> position in its chunk ----------------------

    def chunk_index(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Chunk of each row: int64 `(rows,)`."""
        return self._row_table(device)[0]

    def positions(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Position of each row in its chunk, counted over raw and VST: int64 `(rows,)`.

        RoPE's position of row r of chunk c, in a sequence with M cached tokens before the
        call, is `M + c * vsts_per_chunk + positions()[r]`.
        """
        return self._row_table(device)[1]

    def is_vst(self, device: torch.device | str | None = None) -> torch.Tensor:
        """True where the row is a VST: bool `(rows,)`."""
        return self._vst_at(self.positions(device))

    def vst_rows(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Rows of the VSTs in the order in which they are cached: int64
        `(chunks * vsts_per_chunk,)`."""
        return self._rows_in_sequence(device, vst=True)

    def raw_rows(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Rows of the raw tokens in sequence order: int64 `(chunks * window,)`."""
        return self._rows_in_sequence(device, vst=False)

    def interleaved_to_split(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Index that takes interleaved rows to split order, `x_split = x[:, index]`:
        int64 `(rows,)`. Its `argsort()` is the inverse."""
        twin = ChunkLayout(self.window, self.ratio, self.chunks, "interleaved")
        return torch.cat([twin.raw_rows(device), twin.vst_rows(device)])

    def split_rows(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The raw rows of x `(batch, rows, ...)`, and its VST rows.

        Raises:
            ValueError: x has another number of rows.
        """
        _check_rows("x", x, self.rows)
        if self.order == "split":
            raw, vst = x.split(
                [self.chunks * self.window, self.chunks * self.vsts_per_chunk], dim=1
            )
            return raw, vst
        rows = self.raw_rows(x.device), self.vst_rows(x.device)
        return x.index_select(1, rows[0]), x.index_select(1, rows[1])

    def join_rows(self, raw: torch.Tensor, vst: torch.Tensor) -> torch.Tensor:
        """What `split_rows` has split, in the order of the layout.

        Raises:
            ValueError: a part has another number of rows.
        """
        _check_rows("raw", raw, self.chunks * self.window)
        _check_rows("vst", vst, self.chunks * self.vsts_per_chunk)
        if self.order == "split":
            return torch.cat([raw, vst], dim=1)
        out = raw.new_empty(raw.shape[0], self.rows, *raw.shape[2:])
        out = out.index_copy(1, self.raw_rows(raw.device), raw)
        return out.index_copy(1, self.vst_rows(raw.device), vst)

    # -- the mask -----------------------------------------------------------------

    def materialize(
        self, cache_len: int = 0, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """The dense mask: True where the row may attend.

        Columns are `[cache | rows]`: first the `cache_len + (chunks - 1) * vsts_per_chunk`
        cache entries that some row sees (the tokens cached before the call, then the VSTs
        that earlier chunks of the call append), then the rows of the call.

        Args:
            cache_len: tokens cached before the call.

        Returns:
            bool `(rows, cache_len + (chunks - 1) * vsts_per_chunk + rows)`.
        """
        cache_len = at_least("cache_len", cache_len, 0)
        chunk, position = self._row_table(device)
        entries = torch.arange(
            cache_len + (self.chunks - 1) * self.vsts_per_chunk, device=position.device
        )
        cached = entries[None, :] < cache_len + chunk[:, None] * self.vsts_per_chunk
        own = (chunk[:, None] == chunk[None, :]) & (position[None, :] <= position[:, None])
        return torch.cat([cached, own], dim=1)

    def draw(self, cache_len: int = 0) -> str:
        """`materialize` as text, one line per row: `#` seen, `.` not seen, `|` before the rows.

        >>> print(ChunkLayout(window=4, ratio=2).draw(cache_len=1))
        x0   #|#.....
        x1   #|##....
        x2   #|###.#.
        x3   #|#####.
        vs0  #|##..#.
        vs1  #|######
        """
        mask = self.materialize(cache_len, "cpu")
        split_at = mask.shape[1] - self.rows
        names: list[str] = [""] * self.rows
        for kind, rows in (("x", self.raw_rows("cpu")), ("vs", self.vst_rows("cpu"))):
            for i, row in enumerate(rows.tolist()):
                names[row] = f"{kind}{i}"
        width = max(len(name) for name in names) + 2
        lines = []
        for name, row in zip(names, mask.tolist(), strict=True):
            marks = "".join("#" if seen else "." for seen in row)
            lines.append(f"{name:<{width}}{marks[:split_at]}|{marks[split_at:]}")
        return "\n".join(lines)

    def pairs(self, cache_len: int = 0) -> int:
        """How many (row, key) pairs attend: the number of True in `materialize`."""
        cache_len = at_least("cache_len", cache_len, 0)
        per_chunk = self.rows_per_chunk
        before = sum(cache_len + c * self.vsts_per_chunk for c in range(self.chunks))
        return per_chunk * before + self.chunks * per_chunk * (per_chunk + 1) // 2

    def flops(self, heads: int, head_dim: int, cache_len: int = 0) -> int:
        """FLOPs of the attention of one sequence: two products of 2 FLOPs per pair, head and
        dimension. The softmax is not counted, as usual."""
        heads, head_dim = at_least("heads", heads, 1), at_least("head_dim", head_dim, 1)
        return 4 * heads * head_dim * self.pairs(cache_len)

    # -- private -----------------------------------------------------------------------

    def _vst_at(self, position: torch.Tensor) -> torch.Tensor:
        return position % (self.ratio + 1) == self.ratio

    def _row_table(self, device: torch.device | str | None) -> tuple[torch.Tensor, torch.Tensor]:
        def arange(n: int) -> torch.Tensor:
            return torch.arange(n, device=device)

        if self.order == "interleaved":
            chunk = arange(self.chunks).repeat_interleave(self.rows_per_chunk)
            return chunk, arange(self.rows_per_chunk).repeat(self.chunks)
        raw, vst = arange(self.window), arange(self.vsts_per_chunk)
        chunk = torch.cat([arange(self.chunks).repeat_interleave(n) for n in (len(raw), len(vst))])
        raw_position = raw + raw // self.ratio
        vst_position = vst * (self.ratio + 1) + self.ratio
        position = torch.cat([raw_position.repeat(self.chunks), vst_position.repeat(self.chunks)])
        return chunk, position

    def _rows_in_sequence(self, device: torch.device | str | None, vst: bool) -> torch.Tensor:
        # No search by value: its length would depend on data, which torch.compile cannot trace.
        each = self.vsts_per_chunk if vst else self.window
        index = torch.arange(self.chunks * each, device=device)
        if self.order == "split":
            return index + self.chunks * self.window if vst else index
        chunk, i = index // each, index % each
        position = i * (self.ratio + 1) + self.ratio if vst else i + i // self.ratio
        return chunk * self.rows_per_chunk + position


# -- as in the operators' schemas: [window, ratio, chunks, split], and [] for None ----------


def layout_to_ints(layout: ChunkLayout | None) -> list[int]:
    if layout is None:
        return []
    return [layout.window, layout.ratio, layout.chunks, int(layout.order == "split")]


def layout_from_ints(ints: list[int]) -> ChunkLayout | None:
    if not ints:
        return None
    window, ratio, chunks, split = ints
    return ChunkLayout(window, ratio, chunks, "split" if split else "interleaved")


def takes_ints(fn: Callable) -> Callable:
    """`fn`, which takes a ChunkLayout, as a function that takes the operators' integers instead."""

    def call(*args):
        return fn(*(layout_from_ints(x) if isinstance(x, list) else x for x in args))

    return call


def _check_rows(name: str, x: torch.Tensor, rows: int) -> None:
    if not isinstance(x, torch.Tensor) or x.dim() < 2 or x.shape[1] != rows:
        got = tuple(x.shape) if isinstance(x, torch.Tensor) else repr(x)
        fail(name, got, f"a tensor (batch, {rows}, ...)")
