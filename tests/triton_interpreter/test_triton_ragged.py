"""Ragged calls against the truth, and against themselves alone and in company."""

import pytest
import torch
import triton
import triton.language as tl
from helpers.ragged import Ragged, gradients
from helpers.triton_backward_cases import SMALL

from vxl_kernels import ChunkLayout, ops, rope_append, rope_append_varlen, vst_attention_varlen
from vxl_kernels._triton import (
    attention_ragged,
    backward_kv,
    backward_ragged,
    configs,
    launch_backward,
    launch_backward_ragged,
    launch_ragged,
    ragged,
)
from vxl_kernels.testing import check_attention, inverse_frequencies, poisoned_memory

HALF = torch.float16


@pytest.fixture(autouse=True)
def tiles(small_tiles, monkeypatch):
    monkeypatch.setattr(
        configs, "ragged_splits", lambda kv_heads: configs.RaggedSplits(64, 8, 2, 64)
    )
    monkeypatch.setattr(configs, "backward_config", lambda *args: SMALL)


def call(*args, **options):
    return Ragged(*args, dim=16, **options)


CASES = {
    "windows and texts": ([1, ChunkLayout(12, 4, 2), 3, 20], [70, 33, 150, 5], 0, {}),
    "forks in parts of a block": (
        [1, 1, ChunkLayout(7, 3), 0, 2, 1],
        [200, 190, 10, 0, 130, 131],
        128,
        {"dtype": HALF},
    ),
    "forks in odd pages": ([1, 1, 5], [150, 140, 64], 130, {"page": 17}),
}


@pytest.mark.parametrize("name", CASES)
def test_ragged_attention_is_as_exact_as_its_precision_allows(name):
    *args, options = CASES[name]
    x = call(*args, **options)
    out, lse = x.run(backend="triton")
    for i, part in enumerate(x.layout.unpack(out)):
        if len(part):
            check_attention(x.alone(i), part[None], lse[:, x.layout.rows_of(i)][None])


def test_forks_have_the_bits_that_they_have_with_pages_of_their_own():
    shared = call([1, 1, 1, 1, 2], [200, 190, 70, 150, 200], 128)
    out, lse = shared.run(backend="triton")
    pages = shared.table.long()
    own = call([1, 1, 1, 1, 2], [200, 190, 70, 150, 200], 0)
    own.q, own.k, own.v = shared.q, shared.k, shared.v
    for mine, theirs in ((own.k_cache, shared.k_cache), (own.v_cache, shared.v_cache)):
        mine[own.table.long().flatten()] = theirs[pages.flatten()]
    own_out, own_lse = own.run(backend="triton")
    assert torch.equal(out, own_out)
    assert torch.equal(lse, own_lse)


def test_memory_for_parts_holds_every_mixture_of_texts():
    splits = configs.ragged_splits(4)
    for rows in ([1] * 7, [8, 1, 1], [9], [2, 2, 2, 3], [0, 9, 0]):
        parts = sum(n * (1 + -(-1000 // splits.of(7 * n))) for n in rows if 7 * n <= splits.limit)
        assert parts <= launch_ragged.part_rows(len(rows), sum(rows), 7, 1000, splits)


def plan(x):
    args = x.q, x.k, x.v, *x.cache(), x.layout.table, x.layout.chunks, 0.25
    return launch_ragged.plan_attention_varlen(*args)


@pytest.mark.parametrize("inplace", [False, True])
def test_rotation_and_append_are_those_of_single_calls(inplace):
    sequences = [1, ChunkLayout(12, 5, 2), 0, 3, ChunkLayout(7, 3)]
    x = call(sequences, [20, 33, 5, 0, 16])
    x.k_cache, x.v_cache = (t.nan_to_num(7) for t in (x.k_cache, x.v_cache))
    caches = [t.clone() for t in (x.k_cache, x.v_cache)]
    inv_freq = inverse_frequencies(16)
    given = [t.clone() for t in (x.q, x.k)]
    rotated = rope_append_varlen(
        *given, x.v, *x.cache(), x.layout, inv_freq, inplace=inplace, backend="triton"
    )
    assert (rotated[0] is given[0]) == inplace
    for i in (0, 1, 3, 4):
        alone = x.alone(i)
        expected = rope_append(
            *alone.args()[:3], *caches, *alone.args()[5:], inv_freq, backend="triton"
        )
        for mine, theirs in zip(rotated, expected, strict=True):
            assert torch.equal(x.layout.unpack(mine)[i], theirs[0])
    assert torch.equal(x.k_cache, caches[0])
    assert torch.equal(x.v_cache, caches[1])


def test_a_shared_split_is_read_by_few_programs():
    x = call([1] * 32, [64] * 32, 64)
    launches, _ = plan(x)
    launches[0]()
    ranks, sizes = (launches[0].arguments[f"{name}_ptr"] for name in ("ranks", "sizes"))
    block_m = launches[2].constexprs["BLOCK_M"]
    own, shared = ((ranks * block_m < sizes * 7).sum(1).tolist())[:2]
    assert (shared, own) == launch_ragged.split_reads(32, 1, 7, block_m)
    assert launch_ragged.split_reads(32, 1, 7, 64) == (4, 32)


# -- gradients -----------------------------------------------------------------------------------

GRADIENTS = {
    "many chunks and no rows": ([0, ChunkLayout(4, 2, 3)], [3, 9], 0, {"page": 17}),
    "forks": ([2, ChunkLayout(18, 5), 17], [36, 40, 33], 32, {"page": 32}),
}


def backward(x, cache=True, **options):
    """(grad_out, grad_lse, the kernels' gradients of a ragged call)."""
    paged = x.cache() if cache else [None] * 4
    args = (x.q, x.k, x.v, *paged)
    settings = x.layout.table, x.layout.chunks, x.q.shape[2] ** -0.5
    out, lse = vst_attention_varlen(*args, x.layout, return_lse=True)
    torch.manual_seed(1)
    grads = torch.randn_like(out), torch.randn_like(lse)
    with poisoned_memory():
        found = launch_backward_ragged.vst_attention_varlen_backward(
            *grads, *args, out, lse, *settings
        )
    return *grads, out, lse, found


@pytest.mark.parametrize("name", [*GRADIENTS, "no cache"])
def test_gradients_have_the_bits_of_single_calls(name):
    cache = name in GRADIENTS
    sequences, lens, shared, options = GRADIENTS.get(name, ([ChunkLayout(9, 4), 3], [0] * 2, 0, {}))
    x = call(sequences, lens, shared, heads=4, **options)
    grad_out, grad_lse, out, lse, found = backward(x, cache)
    pages = [torch.zeros_like(t) for t in (x.k_cache, x.v_cache)]
    for i in range(len(x.layout)):
        rows = x.layout.rows_of(i)
        alone = x.alone(i).args()
        paged = alone[3:7] if cache else [None] * 4
        layout = ops.layout_to_ints(x.alone(i).layout)
        *new, k_cache, v_cache = launch_backward.vst_attention_backward(
            grad_out[rows][None], grad_lse[:, rows][None], *alone[:3], *paged,
            out[rows][None], lse[:, rows][None], layout, x.q.shape[2] ** -0.5,
        )  # fmt: skip
        for ours, theirs in zip(found[:3], new, strict=True):
            assert torch.equal(ours[rows], theirs[0]), f"sequence {i}"
        if cache:
            for total, own in zip(pages, (k_cache, v_cache), strict=True):
                total += own
    if not cache:
        assert [t.numel() for t in found[3:]] == [0, 0]
        return
    for ours, total in zip(found[3:], pages, strict=True):
        assert torch.equal(ours, total)


def test_a_step_backwards():
    """Through rotation, append and attention against the reference in float64."""
    x = call([1, ChunkLayout(4, 2)], [17, 18], 16, heads=2)
    ours = gradients(x, "triton")
    x.q, x.k, x.v, x.k_cache, x.v_cache = (
        t.double() for t in (x.q, x.k, x.v, x.k_cache, x.v_cache)
    )
    for grad, truth in zip(ours, gradients(x, "reference"), strict=True):
        torch.testing.assert_close(grad.double(), truth, atol=1e-5, rtol=1e-5)


def test_a_call_without_rows_has_gradients_of_zero():
    x = call([0, 0], [20, 9])
    *_, found = backward(x)
    for grad, tensor in zip(found, (x.q, x.k, x.v, x.k_cache, x.v_cache), strict=True):
        assert grad.shape == tensor.shape
        assert not grad.any()


# -- mistakes that must show ---------------------------------------------------------------------

sequence_at, group_rows = ragged.sequence_at, attention_ragged._group_rows


@triton.jit
def another_vst_row(table_ptr, at, inside):
    x = sequence_at(table_ptr, at, inside)
    return ragged.Sequence(x.window, x.ratio, x.chunks, x.raw, x.vst - 1)


@triton.jit
def no_pages(at, rows, size, i_split, block_table_ptr, page_size, max_pages):
    return block_table_ptr + at.to(tl.int64) * max_pages, at * 0


@triton.jit
def first_of_group(offs_m, rows, order, plan, GROUP_SIZE: tl.constexpr):
    at_seq, row = group_rows(offs_m, rows, order, plan, GROUP_SIZE)
    return tl.load(plan.order_ptr + order + at_seq * 0), row


@triton.jit
def no_later(table_ptr, i_batch, kept, chunks):
    return kept * 0


MISTAKES = [
    (attention_ragged, "sequence_at", another_vst_row),
    (attention_ragged, "_group_rows", first_of_group),
    (ragged, "_pages_of_split", no_pages),
    (backward_ragged, "sequence_at", another_vst_row),
    (backward_kv, "_later", no_later),
]


@pytest.mark.parametrize(("module", "name", "mistake"), MISTAKES)
def test_a_mistake_shows(module, name, mistake, monkeypatch):
    splits = configs.RaggedSplits(32, 8, 2, 64)
    monkeypatch.setattr(configs, "ragged_splits", lambda kv_heads: splits)
    x = call([1, 1, 1, ChunkLayout(4, 2, 2), 2], [34, 33, 32, 5, 0], 32, heads=4)
    x.table[2, :2] = 2 + 2 * x.table.shape[1] + torch.arange(2)  # its own pages
    x.k_cache, x.v_cache = (t.nan_to_num(3) for t in (x.k_cache, x.v_cache))
    forward = "backward" not in module.__name__
    args = x.q, x.k, x.v, *x.cache()
    truth = vst_attention_varlen(*args, x.layout, return_lse=True)
    if not forward:
        grads = torch.randn(truth[0].shape), torch.randn(truth[1].shape)
        args = *grads, *args, *truth
        settings = x.layout.table, x.layout.chunks, 0.25
        truth = torch.ops.vxl.vst_attention_varlen_backward(*args, *settings)
    monkeypatch.setattr(module, name, mistake)
    if forward:
        found = x.run(backend="triton")
    else:
        found = launch_backward_ragged.vst_attention_varlen_backward(*args, *settings)
    near = [torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(found, truth, strict=True)]
    assert not all(near)
