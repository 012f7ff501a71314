"""Every refusal is one ValueError with argument, got and expected, and nothing is written."""

import dataclasses
import re

import pytest
import torch
from helpers.serving import serving

from vxl_kernels import ChunkLayout, rope_append, vst_attention, vst_linear
from vxl_kernels.testing import inverse_frequencies, make_inputs


def inputs(**changes):
    base = make_inputs((5, 9), rows=3, heads=4, kv_heads=2, head_dim=16, page_size=4)
    return dataclasses.replace(base, **{n: f(base) for n, f in changes.items()})


def entry(row, column, page):
    def change(x):
        table = x.block_table.clone()
        table[row, column] = page
        return table

    return change


def lens(*values):
    return lambda x: torch.tensor(values, dtype=torch.int32)


SHAPES = [
    ({"q": lambda x: x.q[0]}, "q: got shape (3, 4, 16), expected 4 dimensions"),
    ({"q": lambda x: x.q.long()}, "q: got torch.int64, expected float32"),
    ({"q": lambda x: [1]}, "q: got list, expected a tensor"),
    ({"q": lambda x: x.q[:, :, :3]}, "q: got 3 heads, expected a multiple of the 2 KV heads"),
    ({"q": lambda x: x.q[:, :, :0]}, "q: got 0 heads, expected a multiple of"),
    ({"k": lambda x: x.k[0]}, "k: got shape (3, 2, 16), expected 4 dimensions"),
    ({"k": lambda x: x.k.half()}, "k: got torch.float16, expected torch.float32 as q"),
    ({"k": lambda x: x.k[:, :2]}, "k: got shape (2, 2, 2, 16), expected (2, 3, kv_heads, 16)"),
    ({"k": lambda x: x.k.to("meta")}, "k: got device meta, expected cpu as q"),
    ({"v": lambda x: x.v[:, :, :1]}, "v: got shape (2, 3, 1, 16), expected (2, 3, 2, 16) as k"),
    ({"v": lambda x: x.v.bfloat16()}, "v: got torch.bfloat16, expected torch.float32 as q"),
    ({"k_cache": lambda x: None}, "k_cache: got None, expected a tensor"),
    ({"k_cache": lambda x: x.k_cache[0]}, "k_cache: got shape (4, 2, 16), expected 4 dimensions"),
    ({"k_cache": lambda x: x.k_cache.half()}, "k_cache: got torch.float16, expected torch.float32"),
    ({"k_cache": lambda x: x.k_cache[:, :, :1]}, "k_cache: got shape (8, 4, 1, 16), expected (pag"),
    ({"k_cache": lambda x: x.k_cache[:, :0]}, "k_cache: got page_size 0, expected at least 1"),
    (
        {"k_cache": lambda x: x.k_cache.mT.contiguous().mT},
        "k_cache: got head_dim stride 2, expected 1",
    ),
    ({"v_cache": lambda x: x.v_cache[1:]}, "v_cache: got shape (7, 4, 2, 16), expected (8, 4, 2"),
    ({"block_table": lambda x: x.block_table.long()}, "block_table: got torch.int64, expected tor"),
    ({"block_table": lambda x: x.block_table[0]}, "block_table: got shape (3,), expected 2 dimen"),
    ({"block_table": lambda x: x.block_table[:1]}, "block_table: got shape (1, 3), expected (bat"),
    (
        {"cache_seqlens": lambda x: x.cache_seqlens.long()},
        "cache_seqlens: got torch.int64, expected",
    ),
    ({"cache_seqlens": lambda x: x.cache_seqlens[:1]}, "cache_seqlens: got shape (1,), expected ("),
    ({"layout": lambda x: ChunkLayout(5, 2)}, "q: got 3 rows, expected 7 rows by ChunkLayout("),
    ({"layout": lambda x: 8}, "layout: got int, expected a ChunkLayout or None"),
]

PAGING = [
    ({"cache_seqlens": lens(5, -1)}, "cache_seqlens: got -1 at sequence 1, expected at least 0"),
    ({"cache_seqlens": lens(5, 14)}, "block_table: got 3 pages of 4 tokens, expected room for "),
    ({"block_table": entry(1, 0, 8)}, "block_table: got page 8 at sequence 1, expected 0 to 7"),
    ({"block_table": entry(0, 1, -1)}, "block_table: got page -1 at sequence 0, expected 0 to 7"),
]


@pytest.mark.parametrize("backend", serving())
@pytest.mark.parametrize(("changes", "message"), SHAPES + PAGING)
def test_refused_before_anything_is_written(changes, message, backend):
    call = inputs(**changes)
    tensors = [x for x in call.args() if isinstance(x, torch.Tensor)]
    kept = [x.clone() for x in tensors]
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}"):
        vst_attention(*call.args(), backend=backend)
    for inplace in (False, True):
        with pytest.raises(ValueError, match=rf"^{re.escape(message)}"):
            rope_append(*call.args(), inverse_frequencies(16), backend=backend, inplace=inplace)
    for x, before in zip(tensors, kept, strict=True):
        if x.device.type != "meta":
            assert torch.equal(x.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("backend", serving())
def test_unused_table_entries_may_hold_anything(backend):
    call = inputs(block_table=entry(0, 2, -7), cache_seqlens=lens(5, 9))  # 5 + 3 tokens: 2 pages
    rope_append(*call.args(), inverse_frequencies(16), backend=backend)
    assert vst_attention(*call.args(), backend=backend).isfinite().all()


@pytest.mark.parametrize("head_dim", [8, 257])
def test_head_dim_range(head_dim):
    call = make_inputs((4,), rows=2, head_dim=head_dim)
    with pytest.raises(ValueError, match=f"q: got head_dim {head_dim}, expected 16 to 256"):
        vst_attention(*call.args())


@pytest.mark.parametrize(
    ("inv_freq", "message"),
    [
        (torch.ones(7), "inv_freq: got shape (7,), expected (8,)"),
        (torch.ones(8, 1), "inv_freq: got shape (8, 1), expected 1 dimensions"),
        (torch.ones(8, dtype=torch.float16), "inv_freq: got torch.float16, expected torch.float32"),
        (torch.ones(8, device="meta"), "inv_freq: got device meta, expected cpu as k"),
    ],
)
def test_inv_freq(inv_freq, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rope_append(*inputs().args(), inv_freq)


def test_odd_head_dim_has_no_halves():
    call = make_inputs((4,), rows=2, head_dim=17)
    with pytest.raises(ValueError, match="k: got head_dim 17, expected an even number"):
        rope_append(*call.args(), torch.ones(8))


def test_chunks_need_a_cache():
    layout = ChunkLayout(5, 2, chunks=2)
    call = make_inputs((0,), layout)
    for backend in serving():
        with pytest.raises(ValueError, match="k_cache: got None, expected a tensor"):
            vst_attention(call.q, call.k, call.v, layout=layout, backend=backend)


@pytest.mark.parametrize(
    ("backend", "dtype", "words"),
    [
        ("triton", torch.float32, "backend 'triton' cannot run this call: "),
        ("cpu", torch.float64, "backend 'cpu' cannot run this call: dtype torch.float64"),
        ("cuda", torch.float32, "backend: got 'cuda', expected 'cpu', 'triton', 'reference'"),
        (None, torch.float64, "q: got torch.float64, expected float32, bfloat16 or float16"),
    ],
)
def test_named_backends_never_fall_back(backend, dtype, words):
    call = inputs().to(dtype)
    with pytest.raises(ValueError, match=re.escape(words)):
        vst_attention(*call.args(), backend=backend)
    with pytest.raises(ValueError, match=re.escape(words)):
        rope_append(*call.args(), inverse_frequencies(16), backend=backend)


LAYOUT = ChunkLayout(4, 2)
LINEAR = {
    "x": torch.ones(1, 6, 3),
    "weight": torch.ones(5, 3),
    "bias": torch.ones(5),
    "vst_weight": torch.ones(5, 3),
    "vst_bias": torch.ones(5),
    "layout": LAYOUT,
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.ones(6, 3), "x: got shape (6, 3), expected 3 dimensions"),
        ("x", torch.ones(1, 5, 3), "x: got 5 rows, expected 6 rows by ChunkLayout("),
        ("weight", torch.ones(5, 4), "weight: got shape (5, 4), expected (out_features, 3)"),
        ("weight", torch.ones(5), "weight: got shape (5,), expected 2 dimensions"),
        ("bias", torch.ones(4), "bias: got shape (4,), expected (5,)"),
        ("vst_weight", torch.ones(4, 3), "vst_weight: got shape (4, 3), expected (5, 3)"),
        ("vst_weight", None, "vst_weight: got None, expected a tensor"),
        ("vst_bias", torch.ones(5).half(), "vst_bias: got torch.float16, expected torch.float32"),
        ("layout", "split", "layout: got str, expected a ChunkLayout or None"),
        ("backend", "gpu", "backend: got 'gpu', expected"),
    ],
)
def test_linear(name, value, message):
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}"):
        vst_linear(**{**LINEAR, name: value})


@pytest.mark.parametrize("backend", serving())
def test_inplace_has_no_gradient(backend):
    call = inputs()
    call.q.requires_grad_()
    before = call.k_cache.clone()
    with pytest.raises(ValueError, match="require a gradient"):
        rope_append(*call.args(), inverse_frequencies(16), inplace=True, backend=backend)
    assert torch.equal(before.nan_to_num(), call.k_cache.nan_to_num())


def test_operators_called_by_name_check_too():
    x = inputs()
    op, cache = torch.ops.vxl.vst_attention, x.args()[3:7]
    for q, k, v, rest in (
        (x.q, x.k[:, :1], x.v[:, :1], cache),
        (x.q, x.k.half(), x.v, cache),
        (x.q, x.k, x.v, (x.k_cache[:, :0], x.v_cache[:, :0], *cache[2:])),
        (x.q, x.k, x.v, (*cache[:2], x.block_table[:1], x.cache_seqlens)),
        (x.q, x.k, x.v, (x.k_cache, None, None, None)),
    ):
        with pytest.raises(ValueError, match="expected"):
            op(q, k, v, *rest, [], 1.0)
    with pytest.raises(ValueError, match="inv_freq"):
        torch.ops.vxl.rope_append(*x.args()[:-1], [], torch.ones(3))
