"""The same contract on a real GPU, with bf16, CUDA graphs and torch.compile."""

import dataclasses

import pytest
import torch

from vxl_kernels import ChunkLayout, _triton, ops, reference, rope_append, vst_attention, vst_linear
from vxl_kernels.testing import (
    check_attention,
    check_gradients,
    inverse_frequencies,
    make_inputs,
    poisoned_memory,
)

pytest.importorskip("triton")
_OLD = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_OLD, reason="the GPU is older than sm_80"),
]
# On sm_90 and newer, TMA loads pages of 128, and threads load those of 64.
page_sizes = pytest.mark.parametrize("page_size", [64, 128])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TENSORS = ("q", "k", "v", "k_cache", "v_cache", "block_table", "cache_seqlens")
QWEN = {"heads": 28, "kv_heads": 4, "head_dim": 128}


def on_gpu(inputs):
    return dataclasses.replace(inputs, **{n: getattr(inputs, n).cuda() for n in TENSORS})


def attend(inputs, **options):
    return vst_attention(*inputs.args(), return_lse=True, backend="triton", **options)


SHAPES = [
    {"cache_seqlens": (0, 1000), "layout": ChunkLayout(1440, 8)},
    {"cache_seqlens": (333,), "layout": ChunkLayout(1440, 16, 3)},
    {"cache_seqlens": (100,), "layout": ChunkLayout(1001, 2, 1, "interleaved")},
    {"cache_seqlens": (2000, 7), "rows": 700},
    {"cache_seqlens": (2000, 7), "rows": 40},
    {"cache_seqlens": (5000, 0, 64), "rows": 1},
    {"cache_seqlens": (5000,), "rows": 5},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [16, 48, 64, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(shape, page_size, dtype):
    inputs = on_gpu(make_inputs(**shape, **QWEN, page_size=page_size, dtype=dtype))
    with poisoned_memory():
        out, lse = attend(inputs)
    check_attention(inputs, out, lse)


@page_sizes
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 40, 64, 75, 100, 256])
@pytest.mark.parametrize("rows", [1, 300])
def test_head_dims(rows, head_dim, dtype, page_size):
    shape = {"heads": 6, "kv_heads": 2, "head_dim": head_dim, "page_size": page_size}
    inputs = on_gpu(make_inputs((500, 3), rows=rows, **shape, dtype=dtype))
    check_attention(inputs, *attend(inputs))


@page_sizes
@pytest.mark.parametrize("dtype", DTYPES)
def test_orders_agree_and_chunks_are_equal_to_the_bit(dtype, page_size):
    """The two orders take keys in different order, so they agree up to rounding."""
    layout = ChunkLayout(720, 8, 2)
    split = on_gpu(make_inputs((700,), layout, **QWEN, page_size=page_size, dtype=dtype))
    out, lse = attend(split)
    check_attention(split, out, lse)
    index = split.layout.interleaved_to_split("cuda").argsort()
    twin = dataclasses.replace(
        split,
        layout=ChunkLayout(720, 8, 2, "interleaved"),
        **{n: getattr(split, n)[:, index] for n in ("q", "k", "v")},
    )
    check_attention(twin, *attend(twin))
    one = ChunkLayout(720, 8)
    for c in range(2):
        rows = torch.nonzero(split.layout.chunk_index("cuda") == c).squeeze(1)
        alone = dataclasses.replace(
            split,
            layout=one,
            cache_seqlens=split.cache_seqlens + c * one.vsts_per_chunk,
            **{n: getattr(split, n)[:, rows] for n in ("q", "k", "v")},
        )
        assert torch.equal(out[:, rows], attend(alone)[0])


@page_sizes
@pytest.mark.parametrize("rows", [1, 9, 30, 64, 900])
def test_repeats_and_neighbours_change_no_bit(rows, page_size):
    options = {**QWEN, "page_size": page_size, "dtype": torch.bfloat16}
    inputs = on_gpu(make_inputs((9000, 0, 2500), rows=rows, **options))
    out, _ = attend(inputs)
    for _ in range(5):
        assert torch.equal(attend(inputs)[0], out)
    take = ("q", "k", "v", "block_table", "cache_seqlens")
    for b in range(3):
        alone = dataclasses.replace(inputs, **{n: getattr(inputs, n)[b : b + 1] for n in take})
        assert torch.equal(attend(alone)[0], out[b : b + 1])


def far_away(inputs, pages):
    """The first sequence moved by `pages` pages. They share a page that nobody uses or reads."""
    table, page_size = inputs.block_table, inputs.k_cache.shape[1]
    spare = min(set(range(len(inputs.k_cache))) - set(table.flatten().tolist()))
    pad = table.new_full((len(table), pages), spare)
    rows = [torch.cat([pad[0], table[0]])]
    rows += [torch.cat([own, more]) for own, more in zip(table[1:], pad[1:], strict=True)]
    lens = inputs.cache_seqlens.clone()
    lens[0] += pages * page_size
    return dataclasses.replace(inputs, block_table=torch.stack(rows), cache_seqlens=lens)


def launched(*args):
    """Calls the Triton kernel, also where the extension has a kernel for the operator."""
    *tensors, layout, inv_freq = args
    return _triton.kernel("rope_append")(*tensors, ops.layout_to_ints(layout), inv_freq)


def as_operator(*args):
    return rope_append(*args, backend="triton")


@pytest.mark.parametrize("call", [as_operator, launched])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "layout", [None, ChunkLayout(77, 5, 2), ChunkLayout(77, 5, 2, "interleaved")]
)
def test_rope_append(layout, dtype, call):
    """Position 300,000 too."""
    inv_freq = inverse_frequencies(128).cuda()
    inputs = make_inputs((100, 5), layout, rows=4, **QWEN, page_size=64, dtype=dtype)
    inputs = on_gpu(far_away(inputs, 300_000 // 64))
    ours, theirs = inputs.clone(), inputs.clone()
    with poisoned_memory():
        q, k = call(*ours.args(), inv_freq)
    q_ref, k_ref = reference.rope_append(*theirs.args(), inv_freq)
    for x, truth in ((q, q_ref), (k, k_ref), (ours.k_cache, theirs.k_cache)):
        largest = float(truth.nan_to_num().abs().max())
        allowed = 2 * torch.finfo(dtype).eps * largest + 1e-6
        torch.testing.assert_close(x, truth, rtol=0, atol=allowed, equal_nan=True)
    torch.testing.assert_close(ours.v_cache, theirs.v_cache, rtol=0, atol=0, equal_nan=True)
    if call is as_operator:
        rope_append(*inputs.args(), inv_freq, inplace=True, backend="triton")
        assert torch.equal(inputs.q, q)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_features", [512, 3584])
@pytest.mark.parametrize("order", ["split", "interleaved"])
def test_linear(order, out_features, dtype):
    layout = ChunkLayout(1440, 8, 1, order)
    torch.manual_seed(0)
    x = torch.randn(1, layout.rows, 3584, device="cuda").to(dtype)
    weight, vst_weight = torch.randn(2, out_features, 3584, device="cuda").to(dtype)
    bias = torch.randn(out_features, device="cuda").to(dtype)
    args = (x, weight, bias, vst_weight, -bias, layout)
    truth = reference.vst_linear(*(t.double() if isinstance(t, torch.Tensor) else t for t in args))
    # The result is rounded once. Sums of 3584 products in float32 round as many times, each by half
    # a unit of at most the largest one: a random walk. Simulated, 200,000 sums one after the other:
    # 7.7e-4 of the 1.2e-3 allowed; with factors cut to tf32 8.6e-2.
    largest, walk = float(truth.abs().max()), 3584**0.5 * torch.finfo(torch.float32).eps / 2
    allowed = (torch.finfo(dtype).eps + walk) * largest
    for out in (vst_linear(*args, backend="triton"), vst_linear(*args)):
        assert (out.double() - truth).abs().max() <= allowed


def project(x, weights, layout):
    return vst_linear(x, weights[0], None, weights[1], None, layout).unflatten(2, (28, 128))


def after_projection(q, k, v, k_cache, v_cache, table, lens, layout, inv_freq):
    q, k = rope_append(q, k, v, k_cache, v_cache, table, lens, layout, inv_freq)
    return vst_attention(q, k, v, k_cache, v_cache, table, lens, layout)


def step(x, weights, *rest):
    q = project(x, weights, rest[-2])
    return q, after_projection(q, *rest)


def step_arguments(layout, cache_len, page_size):
    options = {**QWEN, "page_size": page_size, "dtype": STEP_DTYPE}
    x = on_gpu(make_inputs((cache_len,), layout, **options))
    torch.manual_seed(1)
    hidden = torch.randn(1, x.q.shape[1], 256, device="cuda").to(STEP_DTYPE)
    weights = torch.randn(2, 28 * 128, 256, device="cuda").to(STEP_DTYPE) / 16
    cache = (x.k_cache.nan_to_num_(), x.v_cache.nan_to_num_(), x.block_table, x.cache_seqlens)
    return hidden, weights, x.k, x.v, *cache, layout, inverse_frequencies(128).cuda()


STEP_DTYPE = torch.bfloat16
STEP_LAYOUTS = pytest.mark.parametrize("layout", [None, ChunkLayout(360, 8)])
# A library may sum a projection in another order where it is captured or compiled: a unit of a
# query near 1, and far below what another length does to a result (some tenths).
STEP_ERROR = {"rtol": 2**-6, "atol": 2**-6}


@page_sizes
@STEP_LAYOUTS
def test_a_captured_step_follows_the_lengths(layout, page_size):
    """Nothing synchronises. Lengths are read when the graph runs."""
    args = step_arguments(layout, 600, page_size)
    lens = args[7]
    with torch.no_grad():
        step(*args)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            q, out = step(*args)
        results = []
        for length in (600, 100, 333):
            lens.fill_(length)
            graph.replay()
            torch.cuda.synchronize()
            torch.testing.assert_close(q, project(*args[:2], layout), **STEP_ERROR)
            assert torch.equal(out, after_projection(q, *args[2:]))
            results.append(out.clone())
    assert not torch.allclose(results[0], results[1], **STEP_ERROR)


@page_sizes
@STEP_LAYOUTS
def test_compile(layout, page_size):
    args = step_arguments(layout, 600, page_size)
    with torch.no_grad():
        expected = step(*args)
        actual = torch.compile(step, fullgraph=True)(*args)
    torch.testing.assert_close(actual, expected, **STEP_ERROR)


@page_sizes
@STEP_LAYOUTS
def test_nothing_synchronises(layout, page_size):
    args = step_arguments(layout, 600, page_size)
    with torch.no_grad():
        step(*args)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@page_sizes
def test_offsets_beyond_32_bits(page_size):
    """A cache of more than 2**31 elements, its last pages in use."""
    free, _ = torch.cuda.mem_get_info()
    if free < 12 * 2**30:
        pytest.skip("needs 12 GiB")
    pages = 2**31 // (page_size * 4 * 128) + 64
    options = {**QWEN, "page_size": page_size, "dtype": torch.bfloat16}
    small = make_inputs((640,), ChunkLayout(360, 8), **options)
    out, _ = attend(on_gpu(small))
    shift = pages - small.k_cache.shape[0]
    caches = {}
    for name in ("k_cache", "v_cache"):
        cache = torch.empty(pages, page_size, 4, 128, dtype=torch.bfloat16, device="cuda")
        cache[shift:] = getattr(small, name).cuda()
        caches[name] = cache
    far = dataclasses.replace(
        on_gpu(small), block_table=(small.block_table + shift).int().cuda(), **caches
    )
    assert torch.equal(attend(far)[0], out)


GRADIENT_SHAPES = [
    {"cache_seqlens": (14,), "layout": ChunkLayout(720, 8, 4), "page_size": 512},
    {"cache_seqlens": (100, 9), "layout": ChunkLayout(301, 4, 2), "page_size": 48},
    {"cache_seqlens": (100,), "layout": ChunkLayout(500, 2, 2, "interleaved"), "page_size": 1024},
    {"cache_seqlens": (700, 0), "rows": 200, "page_size": 64},
]


def gradients(inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs.args()[:5]]
    out, lse = vst_attention(*leaves, *inputs.args()[5:], return_lse=True, backend="triton")
    generator = torch.Generator("cuda").manual_seed(1)
    grad_out = torch.randn(out.shape, generator=generator, device="cuda").to(out.dtype)
    grad_lse = torch.randn(lse.shape, generator=generator, device="cuda")
    return grad_out, grad_lse, torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("shape", GRADIENT_SHAPES)
def test_gradients(shape, head_dim, dtype):
    inputs = make_inputs(**shape, heads=6, kv_heads=2, head_dim=head_dim, dtype=dtype)
    inputs = on_gpu(inputs)
    with poisoned_memory():
        grad_out, grad_lse, grads = gradients(inputs)
    check_gradients(inputs, grad_out, grad_lse, grads)
    for first, second in zip(grads, gradients(inputs)[2], strict=True):
        assert torch.equal(first, second)


def test_gradients_synchronise_nothing():
    inputs = on_gpu(make_inputs((14,), ChunkLayout(360, 8, 2), **QWEN, dtype=torch.bfloat16))
    gradients(inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
