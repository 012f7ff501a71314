"""Where strides are out of reach of a kernel's short offsets or of TMA, the launcher takes 64-bit
offsets. Plans on the meta device show it, with strides that no memory would hold."""

import pytest
import torch

pytest.importorskip("triton")

from vxl_kernels import ChunkLayout, ops
from vxl_kernels._triton import launch, launch_backward, launch_common

BF16 = torch.bfloat16
LAYOUTS = {"prefill": ChunkLayout(90, 8), "decode": None}
HEADS, KV_HEADS, HEAD_DIM = 14, 2, 128
PAGES, TABLE = 512, 256
MAX_STRIDE, MAX_INT32 = 2**20, 2**31 - 1


def meta(*shape, strides=None, dtype=BF16):
    if strides is None:
        return torch.empty(shape, dtype=dtype, device="meta")
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def plan(layout=None, q=None, k=None, v=None, k_cache=None, v_cache=None, arch=None):
    """Attention's launch, then dQ's."""
    rows = 1 if layout is None else layout.rows
    q = meta(1, rows, HEADS, HEAD_DIM) if q is None else q
    k = meta(1, rows, KV_HEADS, HEAD_DIM) if k is None else k
    v = meta(1, rows, KV_HEADS, HEAD_DIM) if v is None else v
    k_cache = meta(PAGES, 128, KV_HEADS, HEAD_DIM) if k_cache is None else k_cache
    v_cache = k_cache if v_cache is None else v_cache
    table = meta(1, TABLE, dtype=torch.int32)
    call = (q, k, v, k_cache, v_cache, table, meta(1, dtype=torch.int32))
    ints, lse = ops.layout_to_ints(layout), meta(1, HEADS, rows, dtype=torch.float32)
    first = launch.plan_attention(*call, ints, 0.1, arch)[0][0]
    backward = launch_backward.plan_attention_backward
    dq = backward(q, lse, *call, q, lse, ints, 0.1, arch)[0][1]
    assert dq.name == "backward_q"
    return first, dq


# -- pages: 32 bits that count eighths, from a base address that they start at -----------------

WIDTH = KV_HEADS * HEAD_DIM
FAR = (8 * MAX_INT32 + 7 - 128 * WIDTH) // PAGES // 8 * 8  # the largest page stride in reach


@pytest.mark.parametrize(
    ("page", "slot", "near"),
    [
        (128 * WIDTH, WIDTH, True),
        (128 * WIDTH + 8, WIDTH, True),
        (128 * WIDTH + 4, WIDTH, False),  # pages start between multiples of 8
        (128 * WIDTH, WIDTH + 4, False),
        (WIDTH, MAX_STRIDE, True),  # pages side by side: a slot of all pages, then the next slot
        (WIDTH, MAX_STRIDE + 8, False),
        (FAR, WIDTH, True),
        (FAR + 8, WIDTH, False),
    ],
)
@pytest.mark.parametrize("which", ["k_cache", "v_cache"])
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("page_size", [128, 16])
def test_caches_out_of_reach_go_by_64_bits(page, slot, near, which, kind, page_size):
    """One of the caches is out of reach, and the other has its usual strides."""
    caches = dict.fromkeys(("k_cache", "v_cache"), meta(PAGES, page_size, KV_HEADS, HEAD_DIM))
    page += (128 - page_size) * slot // PAGES // 8 * 8 if page >= FAR else 0  # as far in all
    shape = (PAGES, page_size, KV_HEADS, HEAD_DIM)
    caches[which] = meta(*shape, strides=(page, slot, HEAD_DIM, 1))
    first, dq = plan(LAYOUTS[kind], **caches)
    assert first.name == kind
    expected = {128: "block_in_page", 16: "pages_in_block"}[page_size] if near else "gather"
    assert first.constexprs["PAGE_MODE"] == expected
    assert dq.constexprs["PAGE_MODE"] == expected


def test_one_page_out_of_reach_goes_by_64_bits():
    """A table of one page is "block_in_page", unless its slots are far."""
    table = meta(1, 1, dtype=torch.int32)
    lens, q = meta(1, dtype=torch.int32), meta(1, 1, KV_HEADS, HEAD_DIM)
    for slot, expected in ((MAX_STRIDE, "block_in_page"), (MAX_STRIDE + 8, "gather")):
        strides = (50 * slot, slot, HEAD_DIM, 1)
        cache = meta(2, 50, KV_HEADS, HEAD_DIM, strides=strides)
        call = (q, q, q, cache, cache, table, lens)
        assert launch.plan_attention(*call, [], 0.1)[0][0].constexprs["PAGE_MODE"] == expected


# -- own rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_rows_far_apart_are_copied(name, kind):
    heads = HEADS if name == "q" else KV_HEADS
    layout = LAYOUTS[kind]
    rows = 1 if layout is None else layout.rows
    for row, head_stride, used in (
        (MAX_STRIDE, 1, MAX_STRIDE),
        (MAX_STRIDE + 8, 1, heads * HEAD_DIM),
        (MAX_STRIDE, 2, heads * HEAD_DIM),  # head_dim not dense
    ):
        strides = (rows * row, row, HEAD_DIM * head_stride, head_stride)
        x = meta(1, rows, heads, HEAD_DIM, strides=strides)
        for each in plan(layout, **{name: x}):
            assert each.arguments[f"{name}_row"] == used, each.name


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("odd", ["k", "v", "k_cache", "v_cache"])
def test_one_set_of_offsets_only_for_equal_strides(odd, kind):
    """Here k is a part of a fused product and v is not. V must not be read with K's strides."""
    layout = LAYOUTS[kind]
    for each in plan(layout):
        assert each.constexprs["SAME_STRIDES"]
    cache = odd.endswith("cache")
    shape = (PAGES, 128) if cache else (1, 1 if layout is None else layout.rows)
    x = meta(*shape, HEADS + 2 * KV_HEADS, HEAD_DIM)[:, :, HEADS : HEADS + KV_HEADS]
    tensors = dict.fromkeys(("k_cache", "v_cache"), meta(PAGES, 128, KV_HEADS, HEAD_DIM))
    for each in plan(layout, **tensors | {odd: x}):
        assert not each.constexprs["SAME_STRIDES"], each.name


# -- TMA ---------------------------------------------------------------------------------------


def real(*shape, offset=0, strides=None):
    """A tensor on the CPU, which has addresses, `offset` elements from an aligned one."""
    dense = torch.empty(shape, device="meta").stride()
    strides = dense if strides is None else strides
    size = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    memory = torch.empty(size + offset, dtype=BF16)
    assert memory.data_ptr() % 16 == 0
    return memory.as_strided(shape, strides, offset)


def test_descriptors_describe_the_tensor():
    x = real(3, 40, 2, 64, offset=8)
    found = launch_common.descriptor(x, 32)
    assert (found.shape, found.strides) == ([3, 2, 40, 64], [40 * 128, 64, 128, 1])
    assert found.block_shape == [1, 1, 32, 64]
    assert found.base.data_ptr() == x.data_ptr()


@pytest.mark.parametrize(
    "x",
    [
        {"offset": 1},
        {"offset": 4},
        {"strides": (40 * 128 + 4, 128, 64, 1)},
        {"strides": (40 * 132, 132, 64, 1)},
        {"strides": (40 * 144, 144, 68, 1)},
        {"strides": (0, 128, 64, 1)},
        {"strides": (40 * 128, 0, 64, 1)},
    ],
)
def test_what_tma_cannot_reach(x):
    x = real(3, 40, 2, 64, **x)
    assert launch_common.descriptor(x, 32) is None


def test_tma_is_not_used_without_pages():
    assert launch_common.descriptor(torch.empty(0, 128, 2, 64), 32) is None


def test_tma_loads_all_or_none():
    layout = ChunkLayout(30, 4)
    pages, narrow = real(9, 128, 1, 64), real(2, layout.rows, 1, 40)
    own = {"k": real(2, layout.rows, 1, 64), "v": real(2, layout.rows, 1, 64)}
    rest = (torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, dtype=torch.int32))

    def bulk(k, v, k_cache=pages, v_cache=pages):
        q = real(2, layout.rows, 3, k.shape[3])
        call = (q, k, v, k_cache, v_cache, *rest, ops.layout_to_ints(layout), 0.1)
        (first,) = launch.plan_attention(*call, "cuda:90")[0]
        names = ("k_desc", "v_desc", "k_cache_desc", "v_cache_desc")
        there = {first.arguments[name] is not None for name in names}
        assert there == {first.constexprs["TMA"]}
        return first.constexprs["TMA"]

    assert bulk(**own)
    for name in own:
        shifted = real(2, layout.rows, 1, 64, offset=4)
        assert not bulk(**own | {name: shifted})
    for name in ("k_cache", "v_cache"):
        assert not bulk(**own, **{name: real(9, 128, 1, 64, offset=4)})
    assert not bulk(narrow, narrow, real(9, 128, 1, 40), real(9, 128, 1, 40))
