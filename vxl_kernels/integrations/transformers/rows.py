"""What the rows of a forward are: padding, packed sequences, or simply causal.

transformers calls the mask function of an attention implementation once in a forward, and gives
what it returns to every layer. Here that is a `RowPlan`, or None where each row sees the cached
tokens and the rows up to its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from ..._arguments import fail

__all__ = ["CachedKeys", "RowPlan", "row_plan", "whole_cache"]

CachedKeys = tuple[Tensor, Tensor, Tensor, Tensor]  # k_cache, v_cache, block_table, cache_seqlens

_TILE = 256  # rows of a mask that are looked at together
_PAGE = 128  # keys of a page, at most


@dataclass(frozen=True, eq=False)
class RowPlan:
    """Rows of a forward that are not simply causal over `[cached | rows]`.

    Attributes:
        start: where the rows of the forward begin among the keys: how many tokens are cached.
        kept: bool `(batch, start)` on the host, False for cached padding; None without any.
        valid: bool `(batch, rows)` on the host, False for padding; None without any.
        takes: int64 `(sequences, length)` each: rows of the forward, counted through the batch,
            that are sequences of their own. A shorter sequence repeats its last row. Empty where
            no row of the batch starts with padding, and nothing is packed.
        back: int64 `(batch * rows)`: where each row is in the rows of all takes; -1 for padding.
    """

    start: int
    kept: Tensor | None = None
    valid: Tensor | None = None
    takes: tuple[Tensor, ...] = ()
    back: Tensor | None = None
    _tables: dict[tuple[int, ...], tuple[int, int, Tensor, Tensor]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"RowPlan({self.start} cached tokens, {len(self.takes) or 'no'} takes)"

    def contiguous(self) -> RowPlan:
        """Itself: `generate` asks it of the masks of a StaticCache."""
        return self

    def sequences(self, x: Tensor) -> list[Tensor]:
        """The rows of x `(batch, rows, heads, head_dim)`, sequences that start with a token."""
        return [x.flatten(0, 1)[take] for take in self.takes] or [x]

    def rows(self, parts: list[Tensor], shape: torch.Size) -> Tensor:
        """The way back of `sequences`, to a tensor of this shape. Padding is 0."""
        if self.back is None:
            return parts[0]
        rows = torch.cat([part.flatten(0, 1) for part in parts])[self.back.clamp(min=0)]
        return rows.masked_fill((self.back < 0)[:, None, None], 0.0).view(shape)

    def cached(self, key: Tensor, value: Tensor) -> CachedKeys:
        """The cached tokens of key and value `(batch, kv_heads, keys, head_dim)`, padding left out,
        as operators take a cache. They are not copied where padding is on the left."""
        if self.kept is None:
            return whole_cache(key, value, self.start)
        strides = key.stride()
        wants_grad = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
        if wants_grad or strides != value.stride() or strides[3] != 1 or strides[0] % strides[2]:
            return _gathered(key, value, self.kept)
        if strides not in self._tables:
            first = _first_tokens(self.kept)
            if first is None:
                return _gathered(key, value, self.kept)
            step = strides[0] // strides[2]
            self._tables[strides] = _overlapping_pages(first, self.start, step, key.device)
        count, page_size, table, lengths = self._tables[strides]
        size = (count, page_size, key.shape[1], key.shape[3])
        steps = (strides[2], strides[2], strides[1], 1)
        keys, values = (x.as_strided(size, steps, x.storage_offset()) for x in (key, value))
        return keys, values, table, lengths


# -- caches ------------------------------------------------------------------------------------


def whole_cache(key: Tensor, value: Tensor, tokens: int) -> CachedKeys:
    """The first tokens of key and value `(batch, kv_heads, keys, head_dim)`: a page a sequence."""
    batch = key.shape[0]
    table = torch.arange(batch, dtype=torch.int32, device=key.device)[:, None]
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device=key.device)
    return key.transpose(1, 2), value.transpose(1, 2), table, lengths


def _gathered(key: Tensor, value: Tensor, kept: Tensor) -> CachedKeys:
    """Copies of the kept tokens, a page a sequence."""
    counts = kept.sum(1)
    order = kept.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    index = order[:, : max(1, int(counts.max()))].to(key.device)
    batch = torch.arange(len(kept), device=key.device)[:, None]
    keys, values = (x.transpose(1, 2)[batch, index] for x in (key, value))
    table = batch.to(torch.int32)
    return keys, values, table, counts.to(torch.int32).to(key.device)


def _first_tokens(kept: Tensor) -> list[int] | None:
    """The first token of each sequence if all padding is left of it. None otherwise."""
    counts = kept.sum(1)
    left = torch.arange(kept.shape[1]) >= kept.shape[1] - counts[:, None]
    return (kept.shape[1] - counts).tolist() if torch.equal(kept, left) else None


def _overlapping_pages(
    first: list[int], end: int, step: int, device: torch.device
) -> tuple[int, int, Tensor, Tensor]:
    """Keys `first[b]` to `end` of each sequence b, whose keys start at row `b * step`, as pages
    that may start at any row and so overlap: their number and size, table and lengths.

    Keys of a cache may come in any order. The page that is not full holds the first keys, so that
    no page reaches beyond the last one, and it comes last.
    """
    lengths = [end - start for start in first]
    shortest = min((n for n in lengths if n), default=1)
    page_size = min(_PAGE, 1 << (shortest.bit_length() - 1))
    pages = []
    for b, (start, length) in enumerate(zip(first, lengths, strict=True)):
        rest = length % page_size
        at = [*range(start + rest, end, page_size), *([start] if rest else [])]
        pages.append([b * step + row for row in at])
    table = torch.zeros(len(pages), max(1, *map(len, pages)), dtype=torch.int32)
    for row, entries in zip(table, pages, strict=True):
        row[: len(entries)] = torch.tensor(entries, dtype=torch.int32)
    count = int(table.max()) + 1
    return count, page_size, table.to(device), torch.tensor(lengths, dtype=torch.int32).to(device)


# -- plans ---------------------------------------------------------------------------------------


def row_plan(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | None = None,
    **_: Any,
) -> RowPlan | None:
    """The mask function of `attn_implementation="vxl"`; arguments as transformers gives them.

    Raises:
        ValueError: a pattern that is not causal within sequences.
    """
    offset = int(q_offset)  # a StaticCache has a tensor
    start, end = offset - kv_offset, offset + q_length
    sequences: list[Tensor] | None = None
    if local_size is not None and allow_is_causal_skip:  # a window or chunk, and nothing else
        _refuse_window(local_size, end)
    elif mask_function is not causal_mask_function:
        if use_vmap:
            fail("attention mask", "a mask function of the caller's", "causal attention")
        places = (range(offset, end), range(kv_offset, end))
        sequences = _sequences(mask_function, batch_size, *places, local_size, device)
    kept = valid = None
    if attention_mask is not None:
        mask = attention_mask.bool().cpu()
        mask = torch.nn.functional.pad(mask, (0, max(0, end - mask.shape[1])))
        parts = mask[:, kv_offset:offset], mask[:, offset:end]
        kept, valid = (None if bool(part.all()) else part for part in parts)
    if sequences is not None:
        if kept is not None or valid is not None:
            fail("attention_mask", "padding beside packed sequences", "one of the two")
        groups = _of_like_length(sequences)
    elif valid is not None and not _is_prefix(valid):
        sequences = [row.nonzero()[:, 0] + b * q_length for b, row in enumerate(valid)]
        groups = [list(range(batch_size))]  # in this order, since each has its cached tokens
    elif kept is None and valid is None and kv_length == start + q_length:
        return None
    else:
        return RowPlan(start, kept, valid)
    takes, back = _takes(sequences, groups, batch_size * q_length)
    on = torch.device("cpu") if device is None else device
    return RowPlan(start, kept, valid, tuple(take.to(on) for take in takes), back.to(on))


def _refuse_window(size: int, tokens: int) -> None:
    if tokens > size:
        expected = f"at least the {tokens} tokens of the sequence"
        fail("sliding_window", f"a window or chunk of {size} tokens", expected)


def _sequences(
    mask_function: Callable,
    batch: int,
    rows: range,
    keys: range,
    local_size: int | None,
    device: torch.device | None,
) -> list[Tensor] | None:
    """The packed sequences of a mask: for each the rows, counted through the batch. None if each
    row of the batch is one. Refuses what is not causal within them."""
    q, k = (torch.arange(x.start, x.stop, device=device) for x in (rows, keys))
    b = torch.arange(batch, device=device)[:, None, None, None]
    head = torch.zeros(1, dtype=torch.int64, device=device)[None, :, None, None]

    def seen(q_index: Tensor, k_index: Tensor) -> Tensor:
        mask = mask_function(b, head, q_index[None, None], k_index[None, None])
        shape = torch.broadcast_shapes(q_index.shape, k_index.shape)
        return mask.expand(batch, 1, *shape)[:, 0]

    begins = torch.zeros(batch, len(rows), dtype=torch.bool, device=device)
    begins[:, 1:] = ~seen(q[1:, None], q[1:, None] - 1)[..., 0]
    first = torch.where(begins, q, keys.start).cummax(1).values
    for tile in range(0, len(rows), _TILE):
        at = slice(tile, tile + _TILE)
        expected = (k >= first[:, at, None]) & (k <= q[at, None])
        wrong = (seen(q[at, None], k[None]) != expected).nonzero()
        if len(wrong):
            row, key = tile + int(wrong[0, 1]), int(wrong[0, 2])
            _refuse_pattern(row, key, bool(expected[tuple(wrong[0])]), local_size)
    if not bool(begins.any()):
        return None
    if rows.start != keys.start:
        fail("attention mask", "packed sequences after cached tokens", "one of the two")
    begins[:, 0] = True
    starts = begins.flatten().nonzero()[:, 0].cpu()
    return list(torch.arange(batch * len(rows)).tensor_split(starts[1:]))


def _refuse_pattern(row: int, key: int, expected: bool, local_size: int | None) -> None:
    what = "does not see" if expected else "sees"
    got = f"row {row}, which {what} key {key}"
    if local_size is not None:
        got += f" (window or chunk of {local_size} tokens)"
    name = "attention mask" if local_size is None else "sliding_window"
    fail(name, got, "causal attention within each sequence")


def _is_prefix(valid: Tensor) -> bool:
    """Whether padding is at the end of each row only, where no token sees it."""
    return not bool((valid[:, 1:] & ~valid[:, :-1]).any())


def _of_like_length(sequences: list[Tensor]) -> list[list[int]]:
    """Numbers of sequences that are computed together, so that less than half of it is for
    nothing."""
    groups: dict[int, list[int]] = {}
    for i, rows in enumerate(sequences):
        groups.setdefault(len(rows).bit_length(), []).append(i)
    return list(groups.values())


def _takes(
    sequences: list[Tensor], groups: list[list[int]], total: int
) -> tuple[list[Tensor], Tensor]:
    """`RowPlan.takes` and `RowPlan.back`."""
    takes, back, done = [], torch.full((total,), -1), 0
    for group in groups:
        length = max(1, *(len(sequences[i]) for i in group))
        take = torch.zeros(len(group), length, dtype=torch.int64)
        for row, i in zip(take, group, strict=True):
            rows = sequences[i]
            if len(rows):  # a sequence of padding alone takes row 0, which nobody reads
                row[: len(rows)], row[len(rows) :] = rows, rows[-1]
            back[rows] = done + torch.arange(len(rows))
            done += length
        takes.append(take)
    return takes, back
