"""The compiled kernels against the float64 truth, and against themselves."""

import dataclasses

import pytest
import torch
from helpers.attention_properties import (
    check_chunks_at_once,
    check_neighbours,
    check_strides,
)
from helpers.serving import serving
from helpers.strategies import DTYPES, calls
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vxl_kernels import ChunkLayout, vst_attention
from vxl_kernels.testing import check_attention, make_inputs, poisoned_memory

pytestmark = pytest.mark.core


def attend(inputs, **options):
    return vst_attention(*inputs.args(), return_lse=True, backend="cpu", **options)


@settings(max_examples=150)
@given(calls())
@example(make_inputs((0,), ChunkLayout(1, 1)))
@example(make_inputs((700, 0), ChunkLayout(130, 3, 2), heads=7, kv_heads=1, head_dim=256))
@example(make_inputs((5000,), rows=1, heads=28, kv_heads=4, head_dim=128, page_size=64))
@example(make_inputs((5000,), rows=40, heads=28, kv_heads=4, head_dim=64, page_size=64))
def test_against_the_truth(inputs):
    with poisoned_memory():
        out, lse = attend(inputs)
    check_attention(inputs, out, lse)


def dense_softmax(inputs):
    """Attention of sequence 0 directly from the mask, without the package's reference."""
    x = inputs.to(torch.float64)
    rows, heads, head_dim = x.q.shape[1:]
    group = heads // x.k.shape[2]
    length = int(x.cache_seqlens[0])
    if x.layout is None:
        mask = torch.ones(rows, length + rows, dtype=torch.bool).tril(length)
    else:
        mask = x.layout.materialize(length)
    entries = mask.shape[1] - rows
    out = torch.zeros(rows, heads, head_dim, dtype=torch.float64)
    for h in range(heads):
        keys, values = [], []
        for cache, own, parts in ((x.k_cache, x.k, keys), (x.v_cache, x.v, values)):
            for i in range(entries):
                page = x.block_table[0, i // cache.shape[1]]
                parts.append(cache[page, i % cache.shape[1], h // group])
            parts.extend(own[0, :, h // group])
        scores = x.q[0, :, h] @ torch.stack(keys).T / head_dim**0.5
        weights = torch.where(mask, scores, -torch.inf).softmax(-1)
        out[:, h] = weights @ torch.stack(values)
    return out


@given(calls(dtypes=(torch.float64,)))
@settings(max_examples=25)
def test_reference_against_dense_softmax(inputs):
    out = vst_attention(*inputs.args(), backend="reference")
    torch.testing.assert_close(out[0], dense_softmax(inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunks", [1, 3])
def test_orders_are_equal_to_the_bit(dtype, chunks):
    split = make_inputs((37, 0), ChunkLayout(100, 8, chunks), heads=6, kv_heads=2, dtype=dtype)
    index = split.layout.interleaved_to_split().argsort()
    twin = dataclasses.replace(
        split,
        layout=ChunkLayout(100, 8, chunks, "interleaved"),
        **{n: getattr(split, n)[:, index] for n in ("q", "k", "v")},
    )
    out, lse = attend(split)
    twin_out, twin_lse = attend(twin)
    assert torch.equal(out[:, index], twin_out)
    assert torch.equal(lse[:, :, index], twin_lse)


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_at_once_equal_one_after_the_other(dtype):
    inputs = make_inputs((25, 300), ChunkLayout(90, 7, 4), heads=6, kv_heads=2, dtype=dtype)
    check_chunks_at_once(attend, inputs)


BATCHES = [
    pytest.param({"layout": ChunkLayout(300, 8, 2)}, id="chunks"),
    pytest.param({"rows": 64}, id="tail"),
    pytest.param({"rows": 1}, id="decode"),
    pytest.param({"rows": 3}, id="few rows"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(28, 4, 128), (8, 1, 33), (16, 2, 256), (4, 1, 80), (2, 1, 48), (1, 1, 72), (6, 1, 64)],
)
@pytest.mark.parametrize("cached", [1, 127, 300, 2049])
def test_few_rows_have_the_bits_that_they_have_among_many(dtype, heads, kv_heads, head_dim, cached):
    """The kernel of a few rows and that of tiles compute each number by the same operations."""
    rows = 80
    inputs = make_inputs(
        (cached,),
        rows=rows,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        page_size=16,
    )
    for row in range(rows):  # where a later row looks for it
        page, slot = inputs.block_table[0, (cached + row) // 16], (cached + row) % 16
        inputs.k_cache[page, slot] = inputs.k[0, row]
        inputs.v_cache[page, slot] = inputs.v[0, row]
    out, lse = attend(inputs)
    for first, count in ((0, 1), (41, 2), (77, 3)):
        some = slice(first, first + count)
        few = dataclasses.replace(
            inputs,
            **{name: getattr(inputs, name)[:, some] for name in ("q", "k", "v")},
            cache_seqlens=inputs.cache_seqlens + first,
        )
        few_out, few_lse = attend(few)
        assert torch.equal(few_out, out[:, some])
        assert torch.equal(few_lse, lse[:, :, some])


@pytest.mark.parametrize("shape", BATCHES)
def test_a_sequence_does_not_see_its_neighbours(shape):
    inputs = make_inputs((9000, 0, 2500), heads=14, kv_heads=2, head_dim=32, **shape)
    check_neighbours(attend, inputs)


@pytest.mark.parametrize("shape", BATCHES)
def test_thread_count_changes_no_bit(shape):
    inputs = make_inputs((9000, 40), heads=14, kv_heads=2, head_dim=32, **shape)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(attend(inputs))
    finally:
        torch.set_num_threads(threads)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


@pytest.mark.parametrize("shape", BATCHES)
@pytest.mark.parametrize("spread", [1e-6, 300.0, 1e4])
def test_extreme_logits_stay_finite(shape, spread):
    inputs = make_inputs((600,), heads=4, kv_heads=2, head_dim=32, spread=spread, **shape)
    out, lse = attend(inputs)
    assert out.isfinite().all()
    check_attention(inputs, out, lse)


def test_underflow_keeps_the_largest():
    inputs = make_inputs((400,), rows=3, heads=2, kv_heads=1, head_dim=16)
    inputs.k[:] = 0
    inputs.q[:] = 50
    inputs.k_cache[inputs.block_table[0, 0].long(), 5] = 50
    out, _ = attend(inputs)
    best = inputs.v_cache[inputs.block_table[0, 0].long(), 5].expand(3, 2, -1)
    torch.testing.assert_close(out[0], best)


def test_no_cache_is_an_empty_cache():
    for layout, rows in ((ChunkLayout(50, 4), 0), (None, 30), (None, 1)):
        inputs = make_inputs((0, 0), layout, rows=rows, head_dim=32)
        out = vst_attention(inputs.q, inputs.k, inputs.v, layout=layout, backend="cpu")
        assert torch.equal(out, attend(inputs)[0])


@pytest.mark.parametrize(("batch", "rows"), [(0, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize("backend", serving())
def test_zero_sizes(batch, rows, backend):
    inputs = make_inputs((4,) * batch, rows=rows)
    out, lse = vst_attention(*inputs.args(), return_lse=True, backend=backend)
    assert out.shape == inputs.q.shape
    assert lse.shape == (batch, inputs.q.shape[2], rows)


@given(calls(), st.integers(0, 2**16))
@settings(max_examples=40)
def test_strides_are_free(inputs, seed):
    orders = [[0, 1, 2, 3], [0, 2, 1, 3], [2, 0, 1, 3], [3, 1, 0, 2]]  # the last: rows only
    pick = torch.Generator().manual_seed(seed)
    chosen = {"block_table": [1, 0]}
    for name in ("q", "k", "v", "k_cache", "v_cache"):
        choices = 3 if name.endswith("cache") else 4
        chosen[name] = orders[int(torch.randint(choices, (), generator=pick))]
    check_strides(attend, inputs, chosen)


def test_scale_is_of_the_scores():
    inputs = make_inputs((20,), rows=6)
    twice = dataclasses.replace(inputs, q=inputs.q * 2)
    out, lse = attend(inputs, scale=0.5)
    twice_out, twice_lse = attend(twice, scale=0.25)
    torch.testing.assert_close(out, twice_out)
    torch.testing.assert_close(lse, twice_lse)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, -1])
@pytest.mark.parametrize("shape", BATCHES)
def test_every_nan_stays_a_nan(bits, shape):
    """Also a NaN with other bits set, as in memory full of ones."""
    inputs = make_inputs((60,), heads=4, kv_heads=2, head_dim=32, **shape)
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    inputs.k[0, 0] = nan.expand(2, 32)
    out, _ = attend(inputs)
    last = -1 if inputs.layout is None else int(inputs.layout.raw_rows()[inputs.layout.window - 1])
    assert out[0, last].isnan().all()
