"""The gradients' Triton kernels against the float64 truth, and against themselves."""

import dataclasses

import pytest
import torch
import triton
import triton.language as tl
from helpers.step_gradients import step_gradients
from helpers.triton_backward_cases import CASES, HALF, SMALL, WITHOUT_CACHE, backward, call

from vxl_kernels import ChunkLayout, ops
from vxl_kernels._triton import (
    backward_kv,
    backward_q,
    configs,
    launch,
    launch_backward,
    primitives,
)
from vxl_kernels.testing import check_gradients, inverse_frequencies, make_inputs, poisoned_memory

core = pytest.mark.core


@pytest.fixture(autouse=True)
def small_backward_tiles(request, monkeypatch, small_tiles):
    if "shipped" not in request.node.name:
        monkeypatch.setattr(configs, "backward_config", lambda *args: SMALL)
        monkeypatch.setattr(launch_backward, "_ROWS_OF_A_SPLIT", 50)


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@core
@pytest.mark.parametrize("name", CASES)
def test_against_the_truth(name):
    inputs = call(name)
    with poisoned_memory():
        grad_out, grad_lse, grads = backward(inputs)
    check_gradients(inputs, grad_out, grad_lse, grads)


@core
@pytest.mark.parametrize("name", WITHOUT_CACHE)
def test_without_a_cache(name):
    inputs = call(name)
    with poisoned_memory():
        grad_out, grad_lse, grads = backward(inputs, cache=False)
    assert [x.numel() for x in grads[3:]] == [0, 0]
    nothing = [torch.zeros_like(inputs.k_cache)] * 2
    check_gradients(inputs, grad_out, grad_lse, [*grads[:3], *nothing])
    _, _, empty = backward(inputs)
    assert equal(grads[:3], empty[:3])
    assert not any(x.any() for x in empty[3:])


def plans(name):
    inputs = call(name)
    args = list(inputs.args()[:7])
    if name in WITHOUT_CACHE:
        args[3:] = [None] * 4
    lse = torch.empty(inputs.q.shape[0], inputs.q.shape[2], inputs.q.shape[1])
    layout = ops.layout_to_ints(inputs.layout)
    return launch_backward.plan_attention_backward(
        inputs.q, lse, *args, inputs.q, lse, layout, 1.0
    )[0]


def test_the_cases_take_every_branch():
    """Without a case, a branch would be compiled for users and never run here."""
    taken = {}
    for name in (*CASES, *WITHOUT_CACHE):
        for each in plans(name):
            c = each.constexprs
            found = taken.setdefault(each.name, {})
            for branch in ("HAS_CACHE", "PAGE_MODE", "ADVANCE"):
                found.setdefault(branch, set()).add(c.get(branch))
            found.setdefault("odd", set()).add(c.get("HEAD_DIM") != c.get("BLOCK_D"))
            found.setdefault("chunk_splits", set()).add(each.arguments.get("chunk_splits", 1) > 1)
    assert taken["backward_q"]["HAS_CACHE"] == {True, False}
    modes = {"block_in_page", "pages_in_block", "gather"}
    assert taken["backward_q"]["PAGE_MODE"] == modes
    assert taken["backward_q"]["ADVANCE"] == {True, False}
    for kernel in ("delta", "backward_q", "backward_new", "backward_cache"):
        assert taken[kernel]["odd"] == {True, False}, kernel
    for kernel in ("backward_cache", "sum_pages"):
        assert taken[kernel]["chunk_splits"] == {True, False}, kernel


@core
@pytest.mark.parametrize("name", ["split, one page"])
def test_tma_loads_the_same(name, monkeypatch):
    """Blocks by descriptor, as on sm_90, and by pointers: the same bits."""
    inputs = call(name)
    keys = configs.DkvConfig(32, 32, 32, 4, 2)
    even = dataclasses.replace(SMALL, dkv_new=keys, dkv_cached=keys)
    monkeypatch.setattr(configs, "backward_config", lambda *args: even)
    _, _, grads = backward(inputs)
    monkeypatch.setattr(configs, "has_tma", lambda arch: True)
    tma = {each.name: each.constexprs.get("TMA") for each in plans(name)}
    assert [tma[n] for n in ("backward_q", "backward_new", "backward_cache")] == [True] * 3
    _, _, by_tma = backward(inputs)
    assert equal(grads, by_tma)


@pytest.mark.parametrize("name", ["split, one page", "split, small pages"])
def test_the_lookup_of_each_architecture(name, monkeypatch):
    """The interpreter plans for sm_80. gfx942 locates every block, and sums offsets in another
    order: the same bits."""
    inputs = call(name)
    _, _, grads = backward(inputs)
    monkeypatch.setattr(launch_backward, "architecture", lambda device: "hip:gfx942")
    dq = next(each for each in plans(name) if each.name == "backward_q")
    assert (dq.constexprs["ADVANCE"], dq.constexprs["SUM_KEYS"]) == (False, True)
    assert dq.constexprs["PAGE_MODE"] != "pages_in_block"
    _, _, located = backward(inputs)
    assert equal(grads, located)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_shipped_tiles(dtype):
    inputs = make_inputs(
        (60,), ChunkLayout(90, 8, 2), heads=2, kv_heads=1, head_dim=64, page_size=96, dtype=dtype
    )
    with poisoned_memory():
        grad_out, grad_lse, grads = backward(inputs)
    check_gradients(inputs, grad_out, grad_lse, grads)


# -- bits --------------------------------------------------------------------------------------


def test_neighbours_change_no_bit():
    """Gradients are the same a second time, alone, and in another order."""
    inputs = make_inputs((10, 0, 17), ChunkLayout(12, 3, 2), heads=2, kv_heads=1)
    grad_out, grad_lse, grads = backward(inputs)
    assert equal(grads, backward(inputs)[2])
    take = ("q", "k", "v", "block_table", "cache_seqlens")
    apart = torch.zeros_like(grads[3]), torch.zeros_like(grads[4])
    for b in range(3):
        one = dataclasses.replace(inputs, **{n: getattr(inputs, n)[b : b + 1] for n in take})
        alone = backward(one, (grad_out[b : b + 1], grad_lse[b : b + 1]))[2]
        assert equal([x[b : b + 1] for x in grads[:3]], alone[:3])
        for total, x in zip(apart, alone[3:], strict=True):
            total += x
    assert equal(grads[3:], apart)  # pages are their own: the other sequences leave zeros
    turned = dataclasses.replace(inputs, **{n: getattr(inputs, n).flip(0) for n in take})
    flipped = backward(turned, (grad_out.flip(0), grad_lse.flip(0)))[2]
    assert equal(grads, [*(x.flip(0) for x in flipped[:3]), *flipped[3:]])


def test_nan_stays_in_its_sequence():
    inputs = make_inputs((30, 9), ChunkLayout(20, 3), heads=3, kv_heads=1)
    grad_out, grad_lse, grads = backward(inputs)
    inputs.q[1, 5] = torch.nan
    poisoned = backward(inputs, (grad_out, grad_lse))[2]
    assert all(x[1].isnan().any() for x in poisoned[:3])
    assert equal([x[0] for x in grads[:3]], [x[0] for x in poisoned[:3]])


def test_sequences_that_share_pages_add_up():
    """Two forks of one prefix, and a page that a table names twice."""
    inputs = make_inputs((64, 50), rows=9, page_size=16, heads=4, kv_heads=2)
    table = inputs.block_table.clone()
    table[1, :3] = table[0, :3]
    table[0, 3] = table[0, 1]
    shared = dataclasses.replace(inputs, block_table=table)
    with poisoned_memory():
        grad_out, grad_lse, grads = backward(shared)
    check_gradients(shared, grad_out, grad_lse, grads)
    assert grads[3][table[0, :3].long()].abs().min() > 0


def test_what_pads_a_table_costs_no_scan(monkeypatch):
    """A padded table names page 0 in every unused entry. Its program must not scan for each."""
    inputs = make_inputs((20,), ChunkLayout(12, 3, 2), heads=2, kv_heads=1, page_size=16)
    padded = torch.zeros(1, 60, dtype=torch.int32)
    used = inputs.block_table.shape[1]
    padded[:, :used] = inputs.block_table
    pages, find, scans = inputs.k_cache.shape[0], backward_kv._find_page, []

    def counted(*args):
        scans.append(args)
        return find(*args)

    monkeypatch.setattr(backward_kv, "_find_page", counted)
    grad_out, grad_lse, grads = backward(dataclasses.replace(inputs, block_table=padded))
    # One scan by each program, and one more after each entry that rows see.
    assert 0 < len(scans) <= pages + used
    check_gradients(inputs, grad_out, grad_lse, grads)


def test_a_wider_table_changes_no_bit_of_many_chunks():
    """The number of parts does not depend on the widest sequence of the batch."""
    inputs = make_inputs((1,), ChunkLayout(6, 3, 14), heads=1, kv_heads=1, page_size=40)
    wide = torch.zeros(1, 9, dtype=torch.int32)
    wide[:, : inputs.block_table.shape[1]] = inputs.block_table
    grad_out, grad_lse, grads = backward(inputs)
    again = backward(dataclasses.replace(inputs, block_table=wide), (grad_out, grad_lse))[2]
    assert equal(grads, again)


def test_spare_capacity_and_strides_change_no_bit():
    """Table entries past the length are garbage, and tensors have any strides."""
    inputs = x = make_inputs((20, 9), ChunkLayout(12, 3, 2), heads=4, kv_heads=2)
    grad_out, grad_lse, grads = backward(inputs)

    def restride(t):
        """The same values, rows outermost, NaN between them."""
        wide = torch.full([n + 1 for n in (t.shape[1], t.shape[0], *t.shape[2:])], torch.nan)
        return wide[1:, 1:, 1:, 1:].transpose(0, 1).copy_(t)

    odd = {n: restride(getattr(x, n)) for n in ("q", "k", "v", "k_cache", "v_cache")}
    again = backward(dataclasses.replace(x, **odd), (restride(grad_out), grad_lse))[2]
    assert equal(grads, again)
    wider = torch.full((2, x.block_table.shape[1] + 2), 10**6, dtype=torch.int32)
    wider[:, : x.block_table.shape[1]] = x.block_table
    again = backward(dataclasses.replace(x, block_table=wider), (grad_out, grad_lse))[2]
    assert equal(grads, again)


# -- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [1e-6, 1e3])
def test_extreme_logits_stay_finite(spread):
    inputs = make_inputs((30,), ChunkLayout(20, 3, 2), heads=2, kv_heads=1, spread=spread)
    grad_out, grad_lse, grads = backward(inputs)
    assert all(x.isfinite().all() for x in grads)
    check_gradients(inputs, grad_out, grad_lse, grads)


def test_large_float16_gradients_stay_finite():
    """scale * dS is in float16's range where dS is not."""
    inputs = make_inputs((30,), ChunkLayout(20, 3, 2), heads=2, kv_heads=1, dtype=HALF)
    inputs = dataclasses.replace(inputs, q=inputs.q / 16)
    grad_out, grad_lse, _ = backward(inputs)
    inputs = dataclasses.replace(inputs, v=inputs.v * 1024)
    grad_out = grad_out * 512
    large = backward(inputs, (grad_out, grad_lse), scale=1 / 64)[2]
    assert all(x.isfinite().all() for x in large)


def test_a_negative_scale():
    inputs = make_inputs((30,), ChunkLayout(20, 3, 2), heads=2, kv_heads=1)
    grad_out, grad_lse, grads = backward(inputs, scale=-0.25)
    twin = dataclasses.replace(inputs, q=-inputs.q)
    grads = [-grads[0], *grads[1:]]
    check_gradients(twin, grad_out, grad_lse, grads)


@pytest.mark.parametrize(("batch", "rows"), [(0, 3), (2, 0)])
def test_zero_sizes(batch, rows):
    inputs = make_inputs((4,) * batch, rows=rows)
    _, _, grads = backward(inputs)
    for x, grad in zip(inputs.args(), grads, strict=False):
        assert grad.shape == x.shape
        assert not grad.any()


# -- mistakes that must show ---------------------------------------------------------------------


@triton.jit
def sees_one_more(position, ratio):
    vst = (position + 1) // (ratio + 1)
    return position + 2 - vst, vst


@triton.jit
def first_rows_late(key, is_vst, ratio):
    return tl.where(is_vst, (key + 1) * ratio, key) + 1, tl.where(is_vst, key, key // ratio)


@triton.jit
def split_unmasked(base, first, all_seen, end, BLOCK_M: tl.constexpr):
    full = (end - tl.minimum(first, end)) // BLOCK_M
    return backward_kv.RowRun(base, base + first, base + end - full * BLOCK_M, full)


@triton.jit
def one_less_cached(cache_seqlens_ptr, i_batch, page_size, max_pages):
    return tl.maximum(tl.load(cache_seqlens_ptr + i_batch) - 1, 0)


@triton.jit
def without_the_last_chunk(i, chunks, chunk_splits):
    return i * chunks // chunk_splits, (i + 1) * chunks // chunk_splits - 1


@triton.jit
def first_find_only(
    block_table_ptr, cache_seqlens_ptr, table_ptr, i_page, last, kept, chunks, page_size, max_pages,
    batch,
):  # fmt: skip
    return tl.load(block_table_ptr) * 0, (i_page == tl.load(block_table_ptr)).to(tl.int32)


@triton.jit
def first_chunks_vsts(chunk, window, ratio, chunks):
    return primitives.Runs(chunk * window, chunks * window)


@triton.jit
def next_chunks_vsts(is_vst, index, chunk, window, ratio, chunks, SPLIT: tl.constexpr):
    return tl.where(is_vst, chunks * window, chunk * window) + index


MISTAKES = [
    (backward_q, "visible_new", sees_one_more),
    (backward_kv, "_first_rows", first_rows_late),
    (backward_kv, "_split", split_unmasked),
    (backward_q, "cached_entries", one_less_cached),
    (backward_kv, "cached_entries", one_less_cached),
    (backward_kv, "_chunks_of", without_the_last_chunk),
    (backward_kv, "_find_page", first_find_only),
    (backward_q, "chunk_runs", first_chunks_vsts),
    (backward_kv, "chunk_row", next_chunks_vsts),
]


@pytest.mark.parametrize(("module", "name", "mistake"), MISTAKES)
def test_a_mistake_shows(module, name, mistake, monkeypatch):
    inputs = make_inputs((40,), ChunkLayout(48, 4, 2), heads=1, kv_heads=1, page_size=32)
    args = inputs.args()
    layout, scale = ops.layout_to_ints(inputs.layout), 0.25
    out, lse = launch.vst_attention(*args[:7], layout, scale)
    grads = torch.randn(out.shape), torch.randn(lse.shape)
    monkeypatch.setattr(module, name, mistake)
    wrong = launch_backward.vst_attention_backward(*grads, *args[:7], out, lse, layout, scale)
    with pytest.raises(AssertionError, match="gradient of"):
        check_gradients(inputs, *grads, wrong)


def test_the_gradient_of_the_lse_counts():
    inputs = make_inputs((20,), ChunkLayout(30, 4), heads=4, kv_heads=2)
    grad_out, grad_lse, grads = backward(inputs)
    with pytest.raises(AssertionError, match="gradient of q"):
        check_gradients(inputs, grad_out, torch.zeros_like(grad_lse), grads)


# -- with the other operators ---------------------------------------------------------------------


@core
@pytest.mark.parametrize(
    ("lens", "layout"),
    [((5,), None), ((4,), ChunkLayout(6, 2, 2)), ((3, 21), ChunkLayout(7, 3, 3, "interleaved"))],
)
def test_a_step_backwards(lens, layout):
    """Gradients through rotation, append and attention against the reference's."""
    inputs = make_inputs(lens, layout, rows=6, head_dim=32, page_size=4)
    inv_freq = inverse_frequencies(32)
    found = step_gradients(inputs, inv_freq, "triton")
    truth = step_gradients(inputs.to(torch.float64), inv_freq, "reference")
    for ours, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
