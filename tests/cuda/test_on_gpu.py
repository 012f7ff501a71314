"""The cache and gradients of the operators, on a GPU where there is one, and on the CPU."""

import dataclasses

import pytest
import torch

from vxl_kernels import (
    ChunkLayout,
    VstCache,
    _ext,
    rope_append,
    vst_attention,
    vst_linear,
)
from vxl_kernels.testing import inverse_frequencies, make_inputs

pytestmark = pytest.mark.skipif(_ext.extension is None, reason="the cache needs the extension")
LAYERS, HEADS, DIM = 3, 2, 16
SLEEP = 1 << 28  # cycles: a sixth of a second


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


def on(device, inputs):
    names = ("q", "k", "v", "k_cache", "v_cache", "block_table", "cache_seqlens")
    return dataclasses.replace(inputs, **{n: getattr(inputs, n).to(device) for n in names})


# -- the cache -----------------------------------------------------------------------------------


def filled(device, rows=300, pages=48, page_size=16, dtype=torch.bfloat16):
    """A cache of random pages with a sequence of `rows` rows, and its contents on the host."""
    cache = VstCache(
        LAYERS, HEADS, DIM, num_pages=pages, page_size=page_size, dtype=dtype, device=device
    )
    for pool in (cache.k_cache, cache.v_cache):
        pool.normal_()
    seq = cache.new()
    cache.reserve(seq, rows)
    cache.commit(seq, rows)
    return cache, seq, contents(cache, seq)


def contents(cache, seq):
    return [x.cpu() for i in range(LAYERS) for x in cache.gather(seq, i)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_offload_and_restore_behind_a_busy_stream(device):
    """The host asks for both while the copies have not begun."""
    cache, seq, want = filled(device)
    for _ in range(3):
        if device == "cuda":
            torch.cuda._sleep(SLEEP)
        host = cache.offload(seq)
        for pool in (cache.k_cache, cache.v_cache):
            pool.zero_()
        seq = cache.restore(host)
        assert same(contents(cache, seq), want)
    other, _, _ = filled("cpu")
    if device == "cuda":
        torch.cuda._sleep(SLEEP)
    host = cache.offload(seq)
    assert same(contents(other, other.restore(host)), want)


def test_forks_copy_on_write(device):
    cache, seq, want = filled(device, rows=290)
    children = [cache.fork(seq) for _ in range(3)]
    for n, child in enumerate(children):
        cache.reserve(child, 20)
        table = torch.from_numpy(cache._manager.block_table(child))
        for pool in (cache.k_cache, cache.v_cache):
            for row in range(290, 310):
                pool[:, int(table[row // 16]), row % 16] = n + 1
        cache.commit(child, 20)
    assert same(contents(cache, seq), want)
    for n, child in enumerate(children):
        for x, first in zip(contents(cache, child), want, strict=True):
            assert torch.equal(x[:290], first)
            assert bool((x[290:] == n + 1).all())


def test_files(device, tmp_path):
    cache, seq, want = filled(device)
    cache.save(tmp_path / "a.vxl", seq)
    for where in (device, "cpu"):
        other = VstCache(
            LAYERS, HEADS, DIM, num_pages=8, page_size=64, dtype=torch.bfloat16, device=where
        )
        assert same(contents(other, other.load(tmp_path / "a.vxl")), want)


def test_a_batch_grows_and_steps(device):
    """Appends of one batch by operators, against the same on the CPU."""
    found = []
    for where in (device, "cpu"):
        cache = VstCache(1, HEADS, DIM, num_pages=40, page_size=16, device=where)
        batch = cache.batch([cache.new(), cache.new()])
        generator = torch.Generator().manual_seed(0)
        inv_freq = inverse_frequencies(DIM).to(where)
        outs = []
        for rows in (5, 200, 1, 1, 64):
            x = [torch.randn(2, rows, h, DIM, generator=generator).to(where) for h in (4, 2, 2)]
            batch.reserve(rows)
            q, k = rope_append(*x, *batch.layer(0), None, inv_freq)
            outs.append(vst_attention(q, k, x[2], *batch.layer(0)).cpu())
            batch.commit(rows)
        found.append([*outs, *(x.cpu() for s in batch.seqs for x in cache.gather(s, 0))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_captured_step_over_a_batch(device):
    """The graph follows what reserve and commit change: lengths, pages, copies of shared pages."""
    if device != "cuda":
        pytest.skip("graphs are a GPU's")
    cache = VstCache(1, HEADS, DIM, num_pages=60, page_size=16, dtype=torch.float16, device=device)
    first = cache.new()
    cache.reserve(first, 30)
    for pool in (cache.k_cache, cache.v_cache):
        pool.normal_()
    cache.commit(first, 30)
    batch = cache.batch([first, cache.fork(first)], max_tokens=256)
    q, k, v = (torch.randn(2, 1, h, DIM, device=device, dtype=torch.float16) for h in (4, 2, 2))
    inv_freq = inverse_frequencies(DIM).to(device)

    def step():
        rotated, own = rope_append(q, k, v, *batch.layer(0), None, inv_freq)
        return vst_attention(rotated, own, v, *batch.layer(0))

    batch.reserve(1)
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for _ in range(40):
        batch.reserve(1)
        q.normal_(), k.normal_(), v.normal_()
        graph.replay()
        captured = out.clone()
        assert torch.equal(captured, step())
        batch.commit(1)


# -- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [None, ChunkLayout(48, 8, 2)])
def test_gradients_of_rope_append(layout, device):
    options = {"rows": 40} if layout is None else {"layout": layout}
    inputs = make_inputs((37, 5), **options, head_dim=32, page_size=256)
    grads = []
    for where in (device, "cpu"):
        x = on(where, inputs)
        names = ("q", "k", "v", "k_cache", "v_cache")
        leaves = [getattr(x, n).nan_to_num(0.5).requires_grad_() for n in names]
        caches = [c.clone() for c in leaves[3:]]
        tables = (x.block_table, x.cache_seqlens, x.layout)
        q, k = rope_append(*leaves[:3], *caches, *tables, inverse_frequencies(32).to(where))
        loss = q.sin().sum() + k.cos().sum() + sum(c.square().sum() for c in caches)
        grads.append([g.cpu() for g in torch.autograd.grad(loss, leaves)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ["split", "interleaved"])
def test_gradients_of_the_projection(order, device):
    layout = ChunkLayout(48, 8, 2, order)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, layout.rows, 64, generator=generator)
    weights = [torch.randn(*s, generator=generator) / 8 for s in ((32, 64), (32,)) * 2]
    grads = []
    for where in (device, "cpu"):
        leaves = [t.to(where).requires_grad_() for t in (x, *weights)]
        loss = vst_linear(*leaves, layout).sin().sum()
        grads.append([g.cpu() for g in torch.autograd.grad(loss, leaves)])
    for a, b in zip(*grads, strict=True):
        # The library's products may be of tf32.
        torch.testing.assert_close(a, b, rtol=5e-3, atol=5e-3 * float(b.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_attention_have_the_same_bits_again(dtype, device):
    """No atomic additions, no race: two sequences of many programs."""
    inputs = make_inputs((700, 333), layout=ChunkLayout(480, 8, 2), head_dim=64, dtype=dtype)
    x = on(device, inputs)
    names = ("q", "k", "v", "k_cache", "v_cache")
    leaves = [getattr(x, n).nan_to_num(0.5).requires_grad_() for n in names]
    out = vst_attention(*leaves, x.block_table, x.cache_seqlens, x.layout)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    for _ in range(5):
        assert same(torch.autograd.grad(out, leaves, grad, retain_graph=True), first)
