"""rope_append: positions, what it writes, and what it leaves unchanged."""

import pytest
import torch
from helpers.far import FAR_OUT, check_angles, far_inputs
from helpers.serving import serving
from helpers.strategies import calls
from hypothesis import given, settings

from vxl_kernels import ChunkLayout, reference, rope_append, vst_attention
from vxl_kernels.testing import inverse_frequencies, make_inputs, poisoned_memory

pytestmark = pytest.mark.core


def append(inputs, **options):
    inv_freq = inverse_frequencies(inputs.q.shape[3])
    return rope_append(*inputs.args(), inv_freq, backend="cpu", **options)


def allowed(x, truth):
    """Two roundings of values up to the largest, plus the error of a float32 angle's cosine."""
    eps = torch.finfo(x.dtype).eps
    return 2 * eps * float(truth.abs().max()) + 1e-6


@settings(max_examples=100)
@given(calls(even_head_dim=True))
def test_against_the_reference(inputs):
    ours, theirs = inputs.clone(), inputs.clone()
    with poisoned_memory():
        q, k = append(ours)
    inv_freq = inverse_frequencies(inputs.q.shape[3])
    q_ref, k_ref = reference.rope_append(*theirs.args(), inv_freq)
    for x, truth in ((q, q_ref), (k, k_ref)):
        torch.testing.assert_close(x, truth, rtol=0, atol=allowed(x, truth))
    for x, truth in ((ours.k_cache, theirs.k_cache), (ours.v_cache, theirs.v_cache)):
        # equal_nan: everything that was not written is still NaN.
        torch.testing.assert_close(x, truth, rtol=0, atol=allowed(k, k_ref), equal_nan=True)
    for name in ("q", "k", "v"):
        assert torch.equal(getattr(ours, name), getattr(inputs, name))


@given(calls(even_head_dim=True))
@settings(max_examples=30)
def test_inplace_is_the_same(inputs):
    ours, twin = inputs.clone(), inputs.clone()
    q, k = append(ours)
    same = append(twin, inplace=True)
    assert same[0] is twin.q
    assert same[1] is twin.k
    for x, y in ((q, twin.q), (k, twin.k), (ours.k_cache, twin.k_cache)):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())


@pytest.mark.parametrize("backend", serving())
@pytest.mark.parametrize("layout", [None, ChunkLayout(7, 2), ChunkLayout(7, 2, 2, "interleaved")])
def test_positions_by_hand(layout, backend):
    """A plane is rotated by the position in radians, so the position can be read back."""
    rows = 5 if layout is None else layout.rows
    inputs = make_inputs((3,), layout, rows=rows, heads=1, kv_heads=1, head_dim=16, page_size=4)
    inv_freq = torch.zeros(8)
    inv_freq[0] = 0.01
    for x in (inputs.q, inputs.k):
        x.zero_()
        x[..., 0] = 1
    q, k = rope_append(*inputs.args(), inv_freq, backend=backend)
    position = (torch.atan2(q[0, :, 0, 8], q[0, :, 0, 0]) / 0.01).round().long().tolist()
    kept = [
        round(float(torch.atan2(row[0, 8], row[0, 0]) / 0.01))
        for page in inputs.block_table[0].long()
        for row in inputs.k_cache[page].nan_to_num()
    ]
    if layout is None:
        assert position == [3, 4, 5, 6, 7]
        assert kept[3:8] == [3, 4, 5, 6, 7]
    elif layout.chunks == 1:  # x0 x1 v0 x2 x3 v1 x4 x5 v2 x6 from position 3 on
        assert position == [3, 4, 6, 7, 9, 10, 12, 5, 8, 11]
        assert kept[3:6] == [3, 4, 5]
    else:  # the second chunk starts after the first one's three VSTs
        assert position == [*range(3, 13), *range(6, 16)]
        assert kept[3:9] == [3, 4, 5, 6, 7, 8]
    assert torch.equal(q, k)


@pytest.mark.parametrize("backend", serving())
@pytest.mark.parametrize("position", FAR_OUT)
def test_angles_far_out(position, backend):
    check_angles(position, backend)


def test_gradients_far_out():
    """Gradients are rotated the other way."""
    grads = []
    for backend in ("cpu", "reference"):
        inputs = far_inputs(FAR_OUT[-1])
        leaves = [x.requires_grad_() for x in (inputs.q, inputs.k)]
        q, k = rope_append(*inputs.args(), inverse_frequencies(128), backend=backend)
        weights = torch.linspace(-1, 1, 128)
        grads.append(torch.autograd.grad(((q + k + inputs.k_cache[1, -1]) * weights).sum(), leaves))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


def test_rotating_once_equals_rotating_everything():
    """The upstream code keeps K unrotated and rotates the whole cache at every step."""
    layout, theta = ChunkLayout(40, 4), inverse_frequencies(32)
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, layout.rows, n, 32) for n in (4, 2, 2))
    k_cache, v_cache = torch.zeros(2, 1, 64, 2, 32)
    table, lens = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    kept_k, kept_v = torch.empty(0, 2, 32), torch.empty(0, 2, 32)  # unrotated
    vsts = layout.vst_rows()
    for chunk in range(3):
        parts = (q[chunk][None], k[chunk][None], v[chunk][None])
        q_rot, k_rot = rope_append(*parts, k_cache, v_cache, table, lens, layout, theta)
        ours = vst_attention(q_rot, k_rot, parts[2], k_cache, v_cache, table, lens, layout)

        length = len(kept_k)
        keys = reference.rotate(kept_k, torch.arange(length), theta)
        own = reference.rotate(k[chunk], length + layout.positions(), theta)
        queries = reference.rotate(q[chunk], length + layout.positions(), theta)
        keys = torch.cat([keys, own]).repeat_interleave(2, 1)
        values = torch.cat([kept_v, v[chunk]]).repeat_interleave(2, 1)
        theirs = torch.nn.functional.scaled_dot_product_attention(
            queries.transpose(0, 1),
            keys.transpose(0, 1),
            values.transpose(0, 1),
            attn_mask=layout.materialize(length),
        ).transpose(0, 1)
        torch.testing.assert_close(ours[0], theirs, rtol=1e-5, atol=1e-5)
        kept_k = torch.cat([kept_k, k[chunk, vsts]])
        kept_v = torch.cat([kept_v, v[chunk, vsts]])
        lens += layout.vsts_per_chunk


def test_gradients_flow_through_the_reference():
    inputs = make_inputs((4,), ChunkLayout(6, 2, 2), head_dim=16, dtype=torch.float64)
    inv_freq = inverse_frequencies(16)
    cache = inputs.k_cache.nan_to_num(), inputs.v_cache.nan_to_num()

    def step(q, k, v):
        caches = cache[0].clone(), cache[1].clone()
        rest = (*caches, inputs.block_table, inputs.cache_seqlens, inputs.layout)
        q, k = rope_append(q, k, v, *rest, inv_freq, backend="reference")
        return vst_attention(q, k, v, *rest, backend="reference")

    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    assert torch.autograd.gradcheck(step, leaves)


@pytest.mark.parametrize("inplace", [False, True])
def test_what_is_written_counts_as_written(inplace):
    """Autograd refuses a backward whose saved tensors were overwritten."""
    inputs = make_inputs((4,), rows=3)
    append(inputs, inplace=inplace)
    versions = {n: getattr(inputs, n)._version for n in ("q", "k", "v", "k_cache", "v_cache")}
    before = {n: x._version for n, x in zip("qkv", (inputs.q, inputs.k, inputs.v), strict=True)}
    append(inputs, inplace=inplace)
    assert inputs.k_cache._version > versions["k_cache"]
    assert inputs.v_cache._version > versions["v_cache"]
    assert (inputs.q._version > before["q"]) == inplace
    assert (inputs.k._version > before["k"]) == inplace
    assert inputs.v._version == before["v"]
