"""ChunkLayout against a plain loop over the tokens."""

import numpy as np
import pytest
import torch
from helpers.strategies import layouts
from hypothesis import given
from hypothesis import strategies as st

from vxl_kernels import ChunkLayout


def tokens(layout):
    """(chunk, position, vst index or None, raw index or None) in sequence order."""
    for chunk in range(layout.chunks):
        position = raw = vst = 0
        while raw < layout.window:
            yield chunk, position, None, raw
            raw, position = raw + 1, position + 1
            if raw % layout.ratio == 0:
                yield chunk, position, vst, None
                vst, position = vst + 1, position + 1


def row_of(layout, sequence_index, token):
    chunk, _, vst, raw = token
    if layout.order == "interleaved":
        return sequence_index
    if vst is None:
        return chunk * layout.window + raw
    return layout.chunks * layout.window + chunk * layout.vsts_per_chunk + vst


@given(layouts(), st.integers(0, 9))
def test_every_view_agrees_with_the_walk(layout, cache_len):
    walk = list(tokens(layout))
    assert len(walk) == layout.rows
    rows = [row_of(layout, i, t) for i, t in enumerate(walk)]
    assert sorted(rows) == list(range(layout.rows))
    chunk, position = layout.chunk_index(), layout.positions()
    is_vst = layout.is_vst()
    for row, (c, r, vst, _) in zip(rows, walk, strict=True):
        assert (chunk[row], position[row], is_vst[row]) == (c, r, vst is not None)
    assert layout.vst_rows().tolist() == [
        row for row, t in zip(rows, walk, strict=True) if t[2] is not None
    ]
    assert layout.raw_rows().tolist() == [
        row for row, t in zip(rows, walk, strict=True) if t[2] is None
    ]

    mask = layout.materialize(cache_len)
    entries = cache_len + (layout.chunks - 1) * layout.vsts_per_chunk
    assert mask.shape == (layout.rows, entries + layout.rows)
    expected = torch.zeros_like(mask)
    for row, (c, r, _, _) in zip(rows, walk, strict=True):
        expected[row, : cache_len + c * layout.vsts_per_chunk] = True
        for other, (c2, r2, _, _) in zip(rows, walk, strict=True):
            expected[row, entries + other] = c == c2 and r2 <= r
    assert torch.equal(mask, expected)
    assert layout.pairs(cache_len) == int(mask.sum())
    assert layout.flops(28, 128, cache_len) == 4 * 28 * 128 * int(mask.sum())


@given(layouts())
def test_orders_are_permutations_of_each_other(layout):
    twin = ChunkLayout(layout.window, layout.ratio, layout.chunks, "interleaved")
    split = ChunkLayout(layout.window, layout.ratio, layout.chunks, "split")
    index = layout.interleaved_to_split()
    assert torch.equal(twin.positions()[index], split.positions())
    assert torch.equal(twin.chunk_index()[index], split.chunk_index())


@given(layouts())
def test_rows_are_split_and_joined(layout):
    x = torch.randn(2, layout.rows, 3)
    raw, vst = layout.split_rows(x)
    assert torch.equal(raw, x[:, ~layout.is_vst()])
    assert torch.equal(vst, x[:, layout.is_vst()])
    assert torch.equal(layout.join_rows(raw, vst), x)


def test_released_geometry():
    layout = ChunkLayout(1440, 8)
    assert (layout.vsts_per_chunk, layout.rows_per_chunk, layout.rows) == (180, 1620, 1620)
    assert ChunkLayout(1440, 8, chunks=4).rows == 4 * 1620


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"window": 0, "ratio": 1}, "window"),
        ({"window": 8.0, "ratio": 2}, "window"),
        ({"window": 8, "ratio": 0}, "ratio"),
        ({"window": 8, "ratio": 9}, "ratio"),
        ({"window": 8, "ratio": 2, "chunks": 0}, "chunks"),
        ({"window": 8, "ratio": 2, "chunks": True}, "chunks"),
        ({"window": 8, "ratio": 2, "order": "mixed"}, "order"),
    ],
)
def test_refusals_name_the_argument(arguments, name):
    with pytest.raises(ValueError, match=rf"^{name}: got .*, expected "):
        ChunkLayout(**arguments)
    with pytest.raises(ValueError, match="cache_len: got -1"):
        ChunkLayout(8, 2).materialize(-1)


def test_numpy_integers_are_integers():
    layout = ChunkLayout(np.int64(1440), np.int32(8))
    assert layout == ChunkLayout(1440, 8)
    assert type(layout.window) is int
