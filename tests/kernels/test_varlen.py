"""Ragged calls: a sequence has the bits of a call of its own, with any sharing of pages."""

from __future__ import annotations

import pytest
import torch
from helpers.ragged import DIM, HEADS, KV_HEADS, PAGE, Ragged, gradients

from vxl_kernels import (
    ChunkLayout,
    VarlenLayout,
    VstCache,
    rope_append,
    rope_append_varlen,
    vst_attention,
    vst_attention_varlen,
    vst_linear,
)
from vxl_kernels.testing import check_attention, inverse_frequencies

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MIXED = [1, ChunkLayout(40, 8), 17, ChunkLayout(24, 5, 2), 1, 120, 1, 3]
MIXED_LENS = [2500, 333, 2100, 70, 0, 900, 5000, 129]


def assert_as_alone(call: Ragged) -> None:
    out, lse = call.run()
    for i, part in enumerate(call.layout.unpack(out)):
        alone, alone_lse = vst_attention(*call.alone(i).args(), return_lse=True)
        assert torch.equal(part, alone[0]), f"sequence {i}"
        rows = call.layout.rows_of(i)
        assert torch.equal(lse[:, rows], alone_lse[0]), f"LSE of sequence {i}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [0, 2080])
def test_every_sequence_has_the_bits_that_it_has_alone(dtype, shared):
    assert_as_alone(Ragged(MIXED, MIXED_LENS, shared, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 3])
def test_forks_have_the_bits_that_they_have_alone(dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        lens = [4700 + 37 * i for i in range(12)]
        assert_as_alone(Ragged([1] * 9 + [2, 5, 30], lens, 4640, dtype))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dim", [24, 40, 128])
@pytest.mark.parametrize("page", [1, 128, 512])
def test_forks_in_pages_and_heads_of_any_size(dim, page):
    lens = [700, 650, 640, 2200, 2300]
    assert_as_alone(Ragged([1, 1, 4, 1, 1], lens, 640, page=page, dim=dim))


def test_forks_of_forks_share_as_far_as_they_are_alike():
    call = Ragged([1] * 6, [3000] * 6, 2048)
    for b, other, tokens in ((1, 0, 2900), (3, 2, 2500), (5, 4, 2100)):
        call.table[b, : tokens // PAGE] = call.table[other, : tokens // PAGE]
    assert_as_alone(call)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_attention_is_as_exact_as_its_precision_allows(dtype):
    call = Ragged(MIXED, [300, 33, 210, 70, 0, 90, 500, 129], 64, dtype)
    out, lse = call.run()
    for i, part in enumerate(call.layout.unpack(out)):
        rows = call.layout.rows_of(i)
        check_attention(call.alone(i), part[None], lse[:, rows][None])


def test_the_reference_serves_ragged_calls():
    call = Ragged(MIXED, [300, 33, 210, 70, 0, 90, 500, 129], 64)
    out, lse = call.run(backend="reference")
    ours, our_lse = call.run()
    torch.testing.assert_close(out, ours, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(lse, our_lse, atol=1e-5, rtol=1e-5)


def test_sequences_without_rows_and_calls_without_sequences():
    call = Ragged([0, 2, 0], [50, 60, 0])
    assert_as_alone_without_empty(call)
    empty = Ragged([0], [5])
    out, lse = empty.run()
    assert out.shape == (0, HEADS, DIM)
    assert lse.shape == (HEADS, 0)


def assert_as_alone_without_empty(call: Ragged) -> None:
    out, _ = call.run()
    assert torch.equal(out, vst_attention(*call.alone(1).args())[0])


def test_a_ragged_call_without_a_cache():
    layout = VarlenLayout([3, ChunkLayout(8, 4), 5])
    q, k, v = (torch.randn(layout.rows, heads, DIM) for heads in (4, 2, 2))
    out = vst_attention_varlen(q, k, v, layout=layout)
    for i, x in enumerate(layout.sequences):
        parts = [layout.unpack(t)[i][None] for t in (q, k, v)]
        own = x if isinstance(x, ChunkLayout) else None
        assert torch.equal(layout.unpack(out)[i], vst_attention(*parts, layout=own)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace", [False, True])
def test_rotation_and_append_have_the_bits_of_single_calls(dtype, inplace):
    call = Ragged(MIXED, MIXED_LENS, 0, dtype)
    inv_freq = inverse_frequencies(call.q.shape[2])
    caches = [x.clone() for x in (call.k_cache, call.v_cache)]
    expected = [
        rope_append(*(x.clone() for x in alone.args()[:3]), *caches, *alone.args()[5:], inv_freq)
        for alone in map(call.alone, range(len(MIXED)))
    ]
    rotated = rope_append_varlen(
        call.q.clone(),
        call.k.clone(),
        call.v,
        *call.cache(),
        call.layout,
        inv_freq,
        inplace=inplace,
    )
    for x, name in zip(rotated, (0, 1), strict=True):
        for part, alone in zip(call.layout.unpack(x), expected, strict=True):
            assert torch.equal(part, alone[name][0])
    for ours, theirs in zip((call.k_cache, call.v_cache), caches, strict=True):
        assert torch.equal(ours.nan_to_num(7), theirs.nan_to_num(7))


def test_gradients_of_a_ragged_call_are_those_of_the_reference():
    call = Ragged([1, ChunkLayout(12, 4, 2), 9], [40, 33, 21], 16)
    for ours, theirs in zip(gradients(call, None), gradients(call, "reference"), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_gradients_have_the_bits_of_single_calls():
    call = Ragged([4, ChunkLayout(12, 4, 2), 9], [40, 33, 21])
    leaves = [x.clone().requires_grad_() for x in (call.q, call.k, call.v)]
    weights = torch.randn(call.layout.rows, HEADS, DIM)
    out = vst_attention_varlen(*leaves, *call.cache(), call.layout)
    grads = torch.autograd.grad(out, leaves, weights)
    for i in range(3):
        alone = call.alone(i)
        own = [x.clone().requires_grad_() for x in (alone.q, alone.k, alone.v)]
        out = vst_attention(*own, *alone.args()[3:])
        expected = torch.autograd.grad(out, own, call.layout.unpack(weights)[i][None])
        for ours, theirs in zip(grads, expected, strict=True):
            assert torch.equal(call.layout.unpack(ours)[i], theirs[0])


def test_schemas_and_fakes():
    assert str(torch.ops.vxl.vst_attention_varlen.default._schema) == (
        "vxl::vst_attention_varlen(Tensor q, Tensor k, Tensor v, Tensor? k_cache, Tensor? v_cache, "
        "Tensor? block_table, Tensor? cache_seqlens, Tensor layout, SymInt chunks, float scale, "
        'str backend="") -> (Tensor, Tensor)'
    )
    assert str(torch.ops.vxl.rope_append_varlen.default._schema) == (
        "vxl::rope_append_varlen(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, "
        "Tensor(b!) v_cache, Tensor block_table, Tensor cache_seqlens, Tensor layout, "
        'Tensor inv_freq, str backend="") -> (Tensor, Tensor)'
    )
    call = Ragged([1, ChunkLayout(6, 2, 2), 4], [40, 33, 21], 16, dim=16)
    call.k_cache.nan_to_num_()
    call.v_cache.nan_to_num_()
    args = (call.q, call.k, call.v, *call.cache(), call.layout.table)
    leaves = [x.clone().requires_grad_() for x in args[:5]]
    inv_freq = inverse_frequencies(16)
    for backend in ("", "reference"):
        rest = 4, 0.25, backend
        torch.library.opcheck(torch.ops.vxl.vst_attention_varlen, (*args, *rest))
        torch.library.opcheck(torch.ops.vxl.vst_attention_varlen, (*leaves, *args[5:], *rest))
        rest = inv_freq, backend
        torch.library.opcheck(torch.ops.vxl.rope_append_varlen, (*args, *rest))
        torch.library.opcheck(torch.ops.vxl.rope_append_varlen_, (*args, *rest))
        torch.library.opcheck(torch.ops.vxl.rope_append_varlen_copy, (*leaves, *args[5:], *rest))


def test_linear_takes_ragged_rows():
    layout = VarlenLayout([3, ChunkLayout(8, 4), 1])
    x, weight, vst_weight = torch.randn(layout.rows, 6), torch.randn(5, 6), torch.randn(5, 6)
    out = vst_linear(x, weight, None, vst_weight, None, layout)
    assert torch.equal(out[:12], x[:12] @ weight.T)
    torch.testing.assert_close(out[12:], x[12:] @ vst_weight.T)
    reference = vst_linear(x, weight, None, vst_weight, None, layout, backend="reference")
    torch.testing.assert_close(out, reference)


def test_layout_packs_and_unpacks():
    layout = VarlenLayout([2, ChunkLayout(4, 2, 2), 1])
    assert layout.table.tolist() == [[2, 0, 1, 0, 11], [4, 2, 2, 2, 11], [1, 0, 1, 10, 15]]
    assert layout.cu_seqlens.tolist() == [0, 2, 10, 11]
    assert (layout.rows, layout.raw_rows, layout.vst_rows, layout.chunks) == (15, 11, 4, 4)
    assert layout.appended() == [2, 4, 1]
    parts = [torch.randn(n, 3) for n in (2, 12, 1)]
    for part, again in zip(parts, layout.unpack(layout.pack(parts)), strict=True):
        assert torch.equal(part, again)


def test_a_step_of_a_cache_with_a_number_of_rows_for_each_sequence():
    cache = VstCache(1, KV_HEADS, DIM, num_pages=64, page_size=16)
    video = cache.new()
    cache.reserve(video, 40)
    cache.commit(video, 40)
    seqs = [video, cache.fork(video), cache.fork(video)]
    layout = VarlenLayout([ChunkLayout(8, 4), 5, 1])
    batch = cache.batch(seqs)
    batch.reserve(layout.appended())
    assert [cache._manager.reserved(seq) for seq in seqs] == [2, 5, 1]
    q, k, v = (torch.randn(layout.rows, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    cache.k_cache.zero_()
    cache.v_cache.zero_()
    q, k = rope_append_varlen(q, k, v, *batch.layer(0), layout, inverse_frequencies(DIM))
    vst_attention_varlen(q, k, v, *batch.layer(0), layout)
    batch.commit(layout.appended())
    assert batch.cache_seqlens.tolist() == [42, 45, 41]
    assert [cache.length(seq) for seq in seqs] == [42, 45, 41]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": None}, "layout: got NoneType, expected a VarlenLayout"),
        ({"layout": VarlenLayout([2])}, "q: got 3 rows, expected 2 rows"),
        ({"lens": torch.tensor([50, -1], dtype=torch.int32)}, "cache_seqlens: got -1"),
        ({"lens": torch.tensor([50], dtype=torch.int32)}, "with batch 2"),
        ({"q": torch.zeros(3, 1, 4, 16)}, "q: got shape"),
    ],
)
def test_refusals(change, message):
    call = Ragged([2, 1], [50, 60])
    for name, value in change.items():
        setattr(call, name, value)
    with pytest.raises(ValueError, match=message):
        call.run()


def test_sequences_share_pages_though_their_splits_have_other_lengths():
    # A sequence of more than 131,072 keys has longer splits than its fork of fewer keys.
    torch.manual_seed(0)
    lens, size = [131_580, 3000], 512
    pages = -(-max(lens) // size)
    k_cache, v_cache = torch.randn(2, pages, size, 1, 16).unbind()
    table = torch.arange(pages, dtype=torch.int32).expand(2, -1)
    q, k, v = (torch.randn(2, 1, 1, 16) for _ in range(3))
    cached = torch.tensor(lens, dtype=torch.int32)
    both = vst_attention(q, k, v, k_cache, v_cache, table, cached)
    for b in (0, 1):
        row = slice(b, b + 1)
        alone = vst_attention(q[row], k[row], v[row], k_cache, v_cache, table[row], cached[row])
        assert torch.equal(both[row], alone), f"sequence {b}"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_last_page_of_a_sequence_without_rows_is_not_written(backend):
    cache = torch.zeros(2, 3, 4, 1, 16).unbind()
    table = torch.tensor([[0, 1], [2, 1]], dtype=torch.int32)  # page 1 in both
    layout = VarlenLayout([0, 1])
    q, k, v = (torch.randn(1, 1, 16) for _ in range(3))
    lens = torch.tensor([7, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="block_table: got page 1 at sequences 0 and 1"):
        rope_append_varlen(
            q, k, v, *cache, table, lens, layout, inverse_frequencies(16), backend=backend
        )
    assert not cache[0].any()


def test_the_operator_refuses_a_table_that_leaves_rows_out():
    call = Ragged([2, 1], [50, 60])
    for entry, value in ((0, 1), (3, 1), (1, 3), (2, 2)):
        table = call.layout.table.clone()
        table[0, entry] = value
        with pytest.raises(ValueError, match="layout: got"):
            torch.ops.vxl.vst_attention_varlen(
                call.q, call.k, call.v, *call.cache(), table, 2, 1.0, ""
            )


def test_layouts_that_are_refused():
    for bad in ([-1], [1.5], ["a"], [ChunkLayout(4, 2, order="interleaved")]):
        with pytest.raises(ValueError, match=r"sequences\[0\]: got"):
            VarlenLayout(bad)
