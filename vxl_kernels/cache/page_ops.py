"""The page operators in plain PyTorch: any device, where the extension has none of its own.

Nothing here synchronises a GPU: page numbers are read on the host only on a CPU, to refuse
wrong ones with the words of csrc/bindings.
"""

from __future__ import annotations

import torch

from ..checks import fail


def _check_pool(name: str, cache: torch.Tensor) -> None:
    if cache.dim() != 5:
        fail(
            name,
            f"shape {list(cache.shape)}",
            "5 dimensions (layers, pages, page_size, kv_heads, head_dim)",
        )


def _check_table(cache: torch.Tensor, row: torch.Tensor, first: int, rows: int) -> None:
    _check_pool("cache", cache)
    if row.dim() != 1 or row.dtype != torch.int32 or row.device != cache.device:
        fail(
            "block_table_row",
            f"{row.dtype} {list(row.shape)} on {row.device}",
            f"int32 (max_pages,) on {cache.device}",
        )
    page_size = cache.shape[2]
    if first < 0 or rows < 0 or first + rows > len(row) * page_size:
        fail(
            "first, rows",
            f"{first}, {rows}",
            f"a range in the {len(row)} pages of {page_size} rows",
        )
    if cache.device.type != "cpu" or rows == 0:
        return
    pages = cache.shape[1]
    for i in range(first // page_size, (first + rows - 1) // page_size + 1):
        if not 0 <= int(row[i]) < pages:
            fail("block_table_row", f"page {int(row[i])} at {i}", f"0 to {pages - 1} in cache")


def _check_copies(k_cache: torch.Tensor, v_cache: torch.Tensor, copies: torch.Tensor) -> None:
    _check_pool("k_cache", k_cache)
    _check_pool("v_cache", v_cache)
    if v_cache.shape != k_cache.shape or v_cache.dtype != k_cache.dtype:
        fail("v_cache", f"{v_cache.dtype} {list(v_cache.shape)}", "dtype and shape of k_cache")
    shape = tuple(copies.shape)
    if len(shape) != 2 or shape[1] != 3 or copies.dtype != torch.int32:
        fail("copies", f"{copies.dtype} {list(shape)}", "int32 (n, 3)")
    if copies.device != k_cache.device:
        fail("copies", f"device {copies.device}", f"{k_cache.device} as k_cache")
    if copies.device.type != "cpu":
        return
    pages, page_size = k_cache.shape[1:3]
    used = [(i, *entry) for i, entry in enumerate(copies.tolist()) if entry[2] != 0]
    sources = {source for _, source, _, _ in used}
    targets: set[int] = set()
    for i, source, target, rows in used:
        if not 0 <= rows <= page_size:
            fail("copies", f"{rows} rows at entry {i}", f"0 to {page_size}")
        for page in (source, target):
            if not 0 <= page < pages:
                fail("copies", f"page {page} at entry {i}", f"0 to {pages - 1} in k_cache")
        if target in targets:
            fail("copies", f"page {target} as the target of two entries", "distinct targets")
        if target in sources:
            fail(
                "copies", f"page {target} as a source and a target", "targets that are not sources"
            )
        targets.add(target)


def copy_pages_(k_cache: torch.Tensor, v_cache: torch.Tensor, copies: torch.Tensor) -> None:
    _check_copies(k_cache, v_cache, copies)
    if len(copies):
        source, target, rows = copies.long().unbind(1)
        # An unused entry (no rows) repeats the longest one: the same values, written twice.
        # Its number has a dimension: one without would be read on the host.
        longest = rows.argmax(0, keepdim=True)
        source, target, rows = (
            torch.where(rows > 0, x, x[longest]) for x in (source, target, rows)
        )
        # All unused: any page onto itself.
        target = torch.where(rows > 0, target, 0)
        source = torch.where(rows > 0, source, 0)
        wanted = torch.arange(k_cache.shape[2], device=k_cache.device) < rows[:, None]
        for cache in (k_cache, v_cache):
            new = torch.where(wanted[:, :, None, None], cache[:, source], cache[:, target])
            cache[:, target] = new
    torch.autograd.graph.increment_version([k_cache, v_cache])


def _slots(
    cache: torch.Tensor, row: torch.Tensor, first: int, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    rows_at = torch.arange(first, first + rows, device=cache.device)
    page_size = cache.shape[2]
    return row[rows_at // page_size].long(), rows_at % page_size


def gather_rows(
    cache: torch.Tensor, block_table_row: torch.Tensor, first: int, rows: int
) -> torch.Tensor:
    _check_table(cache, block_table_row, first, rows)
    page, slot = _slots(cache, block_table_row, first, rows)
    return cache[:, page, slot]


def scatter_rows_(
    cache: torch.Tensor, block_table_row: torch.Tensor, first: int, rows: torch.Tensor
) -> None:
    _check_pool("cache", cache)
    want = (cache.shape[0], rows.shape[1] if rows.dim() > 1 else -1, *cache.shape[3:])
    if tuple(rows.shape) != want or rows.dtype != cache.dtype or rows.device != cache.device:
        fail(
            "rows",
            f"{rows.dtype} {list(rows.shape)} on {rows.device}",
            f"{cache.dtype} ({want[0]}, rows, {want[2]}, {want[3]}) on {cache.device}",
        )
    _check_table(cache, block_table_row, first, rows.shape[1])
    page, slot = _slots(cache, block_table_row, first, rows.shape[1])
    cache[:, page, slot] = rows
    torch.autograd.graph.increment_version([cache])
