"""Modes around a call: torch.autocast, inference mode, other defaults."""

import pytest
import torch
from helpers.modes import default_dtype
from helpers.serving import serving

from vxl_kernels import ChunkLayout, VstCache, rope_append, vst_attention, vst_linear
from vxl_kernels.testing import inverse_frequencies, make_inputs

BF16 = torch.bfloat16
LAYOUTS = [None, ChunkLayout(9, 2, 2), ChunkLayout(9, 2, 2, "interleaved")]
INV_FREQ = inverse_frequencies(16)


def call(layout, dtype=torch.float32, cache_dtype=None):
    inputs = make_inputs((5, 7), layout, rows=4)
    inputs.k_cache.nan_to_num_()
    inputs.v_cache.nan_to_num_()
    q, k, v, *caches = (x.to(dtype) for x in inputs.args()[:5])
    caches = [x.to(cache_dtype or dtype) for x in caches]
    return [q, k, v, *caches, inputs.block_table, inputs.cache_seqlens, layout]


def step(args, backend, inplace=False):
    """Rotation and attention. Returns the results and the caches."""
    args = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
    q, k = rope_append(*args, INV_FREQ, inplace=inplace, backend=backend)
    out, lse = vst_attention(q, k, *args[2:], return_lse=True, backend=backend)
    return out, lse, args[3], args[4]


@pytest.mark.parametrize("backend", serving(dtype=BF16))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("inplace", [False, True])
def test_autocast_is_a_cast_of_the_rows(layout, backend, inplace):
    args = call(layout, torch.float32, BF16)
    with torch.autocast("cpu", BF16):
        found = step(args, backend, inplace)
    rounded = [x.to(BF16) for x in args[:3]] + args[3:]
    expected = step(rounded, backend, inplace)
    assert found[0].dtype == BF16
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("backend", serving())
def test_autocast_keeps_the_precision_of_a_cache(backend):
    """With a float32 cache under bf16 autocast, only the result is cast."""
    args = call(LAYOUTS[1])
    with torch.autocast("cpu", BF16):
        out, lse, *caches = step(args, backend)
    plain = step(args, backend)
    assert torch.equal(out, plain[0].to(BF16))
    for ours, theirs in zip((lse, *caches), plain[1:], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", serving(dtype=BF16))
def test_autocast_without_a_cache_is_that_of_pytorch(backend):
    q, k, v = call(None)[:3]
    with torch.autocast("cpu", BF16):
        out = vst_attention(q, k.to(BF16), v, backend=backend)  # mixed, as SDPA takes them
        heads_first = [x.transpose(1, 2) for x in (q, k.to(BF16), v)]
        sdpa = torch.nn.functional.scaled_dot_product_attention
        expected = sdpa(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)
    assert out.dtype == expected.dtype == BF16
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
    with torch.autocast("cpu", BF16):
        double = vst_attention(*(x.double() for x in (q, k, v)), backend="reference")
    assert double.dtype == torch.float64


@pytest.mark.parametrize("backend", serving(dtype=BF16))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_autocast_of_the_projection(layout, backend):
    rows = 4 if layout is None else layout.rows
    x, weights = torch.randn(2, rows, 6), torch.randn(2, 5, 6)
    sets = (weights[0], torch.randn(5), *((None, None) if layout is None else (weights[1], None)))
    rounded = [None if t is None else t.to(BF16) for t in (x, *sets)]
    expected = vst_linear(*rounded, layout, backend=backend)
    with torch.autocast("cpu", BF16):
        for given in (x, x.to(BF16)):
            out = vst_linear(given, *sets, layout, backend=backend)
            assert out.dtype == BF16  # PyTorch's products round differently with other strides
            torch.testing.assert_close(out, expected, rtol=0, atol=2**-7 * float(out.abs().max()))


def test_gradients_under_autocast():
    args = call(LAYOUTS[1], torch.float32, BF16)
    grads = []
    for autocast in (True, False):
        leaves = [x.clone().requires_grad_() for x in args[:5]]
        rows = leaves[:3] if autocast else [x.to(BF16) for x in leaves[:3]]
        caches = [x.clone() for x in leaves[3:]]
        with torch.autocast("cpu", BF16, enabled=autocast):
            q, k = rope_append(*rows, *caches, *args[5:], INV_FREQ)
            out = vst_attention(q, k, rows[2], *caches, *args[5:])
        grads.append(torch.autograd.grad(out.float().square().sum(), leaves))
    for ours, theirs in zip(*grads, strict=True):
        assert ours.dtype == theirs.dtype  # v's two gradients are added up in float32, or bfloat16
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2**-8 * float(ours.abs().max()))


def test_autocast_in_a_compiled_graph():
    args = call(LAYOUTS[1], torch.float32, BF16)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(*tensors):
        with torch.autocast("cpu", BF16):
            return vst_attention(*tensors, LAYOUTS[1])

    with torch.autocast("cpu", BF16):
        expected = vst_attention(*args)
    assert torch.equal(attend(*args[:-1]), expected)


# -- what a call leaves for those after it ---------------------------------------------------------


def everything():
    """A result of each kind, compared bit by bit. The inputs were made before."""
    found = []
    for backend in (None, "reference"):
        for layout, args in zip(LAYOUTS, ARGUMENTS, strict=True):
            found += step(args, backend)
            rows = args[0].shape[1]
            sets = (WEIGHTS[0], None, *((None, None) if layout is None else (WEIGHTS[1], None)))
            found.append(vst_linear(X[:, :rows], *sets, layout, backend=backend))
            with torch.inference_mode(False), torch.enable_grad():
                leaves = [x.clone().requires_grad_() for x in args[:5]]
                out = vst_attention(*leaves, *args[5:], backend=backend)
                found += torch.autograd.grad(out.square().sum(), leaves)
    return found


ARGUMENTS = [call(layout) for layout in LAYOUTS]
X, WEIGHTS = torch.randn(2, LAYOUTS[1].rows, 6), torch.randn(2, 5, 6)


def use(cache, video):
    """Steps of one window each until the block table has grown, then a file and back."""
    layout = ChunkLayout(4, 2)
    for _ in range(20):
        video.reserve(layout.vsts_per_chunk)
        q, k, v = (torch.ones(1, layout.rows, n, 16, device="cpu") for n in (4, 2, 2))
        q, k, v = (x.to(torch.float32) for x in (q, k, v))
        rope_append(q, k, v, *video.layer(0), layout, INV_FREQ, inplace=True)
        video.commit(layout.vsts_per_chunk)
    host = cache.offload(cache.fork(video.seqs[0]))
    return cache.gather(cache.restore(host), 0)


SURROUNDINGS = {
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "default device": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_surroundings_change_nothing_within_and_leave_nothing(name, tmp_path):
    plain = everything()
    with SURROUNDINGS[name]():
        within = everything()
        cache = VstCache(1, 2, 16, num_pages=64, page_size=4)
        video = cache.batch(cache.new())
        first = use(cache, video)
        cache.save(tmp_path / "video.vxl", video.seqs[0])
        loaded = cache.gather(cache.load(tmp_path / "video.vxl"), 0)
    after = everything()
    for x, inside, y in zip(plain, within, after, strict=True):
        for other in (inside, y):
            assert (other.dtype, other.device) == (x.dtype, x.device)
            assert torch.equal(other, x)
    assert all(torch.equal(x, y) for x, y in zip(first, loaded, strict=True))
    again = use(cache, video)  # made inside, used outside
    assert all(torch.equal(x, y[: len(x)]) for x, y in zip(first, again, strict=True))


def test_a_cache_of_inference_mode_can_be_written_outside():
    """The tensors of a caller, too."""
    with torch.inference_mode():
        args = call(LAYOUTS[1])
    assert args[3].is_inference()
    expected = step(call(LAYOUTS[1]), None, inplace=True)
    for inplace in (False, True):
        ours = [x.clone() if i < 3 else x for i, x in enumerate(args[:-1])] + args[-1:]
        q, k = rope_append(*ours, INV_FREQ, inplace=inplace)
        assert torch.equal(vst_attention(q, k, *ours[2:]), expected[0])
        assert torch.equal(args[3], expected[2])
