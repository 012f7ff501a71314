"""Which columns of a batch of text are tokens, and whether the caller's positions fit them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import fail

__all__ = ["check_positions", "token_spans"]


def token_spans(
    attention_mask: Tensor | None, shape: tuple[int, int] | torch.Size
) -> list[tuple[int, int]]:
    """First column and end of the tokens of each row.

    Args:
        attention_mask: `(batch, columns)`, 0 for padding at either end of a row. None for no
            padding.
        shape: `(batch, columns)` of the text.

    Raises:
        ValueError: another shape, padding inside a row, or a row of padding alone.
    """
    if attention_mask is None:
        return [(0, shape[1])] * shape[0]
    if tuple(attention_mask.shape) != tuple(shape):
        fail("attention_mask", f"shape {tuple(attention_mask.shape)}", tuple(shape))
    spans = []
    for b, mask in enumerate(attention_mask.cpu().bool()):
        columns = mask.nonzero().flatten()
        if not len(columns):
            fail("attention_mask", f"no token in row {b}", "at least one")
        start, stop = int(columns[0]), int(columns[-1]) + 1
        if stop - start != len(columns):
            fail("attention_mask", f"padding inside row {b}", "padding at the ends only")
        spans.append((start, stop))
    return spans


def check_positions(
    position_ids: Tensor | None, spans: list[tuple[int, int]], columns: int
) -> None:
    """Refuses positions that do not count up by one through the tokens of each row. A token's
    rotation follows from its place in the cache, and only distances between tokens matter, so
    other positions would be ignored.

    Args:
        position_ids: `(batch, columns)` or `(1, columns)`, None for no check.
        spans: of `token_spans`.
    """
    if position_ids is None:
        return
    if position_ids.dim() != 2 or position_ids.shape[1] != columns:
        fail("position_ids", f"shape {tuple(position_ids.shape)}", f"(batch, {columns})")
    if len(position_ids) not in (1, len(spans)):
        fail("position_ids", f"{len(position_ids)} rows", f"1 or {len(spans)}")
    host = position_ids.detach().cpu()
    for b, (start, stop) in enumerate(spans):
        steps = host[b if len(host) > 1 else 0, start:stop].diff()
        if bool((steps != 1).any()):
            at = start + int((steps != 1).nonzero()[0])
            got = f"a step of {int(steps[at - start])} after column {at} of row {b}"
            fail("position_ids", got, "positions that count up by one")
