"""rope_append's Triton kernel: positions, what it writes, and what it leaves unchanged."""

import dataclasses

import pytest
import torch
from helpers.far import FAR_OUT, check_angles
from helpers.strategies import calls
from hypothesis import HealthCheck, given, settings

from vxl_kernels import ChunkLayout, reference, rope_append
from vxl_kernels.testing import inverse_frequencies, make_inputs, poisoned_memory

core = pytest.mark.core


def append(inputs, **options):
    inv_freq = inverse_frequencies(inputs.q.shape[3])
    return rope_append(*inputs.args(), inv_freq, backend="triton", **options)


def check(inputs):
    """Against the reference: rotations to two roundings, and no other byte of the caches."""
    ours, theirs, kept = inputs.clone(), inputs.clone(), inputs.clone()
    with poisoned_memory():
        q, k = append(ours)
    q_ref, k_ref = reference.rope_append(*theirs.args(), inverse_frequencies(q.shape[3]))
    for x, truth in ((q, q_ref), (k, k_ref), (ours.k_cache, theirs.k_cache)):
        largest = float(truth.nan_to_num().abs().max())
        allowed = 2 * torch.finfo(x.dtype).eps * largest + 1e-6
        torch.testing.assert_close(x, truth, rtol=0, atol=allowed, equal_nan=True)
    torch.testing.assert_close(ours.v_cache, theirs.v_cache, rtol=0, atol=0, equal_nan=True)
    for name in ("q", "k", "v"):
        assert torch.equal(getattr(ours, name), getattr(kept, name))
    with poisoned_memory():
        same = append(kept, inplace=True)
    assert same[0] is kept.q
    assert torch.equal(kept.q, q)
    assert torch.equal(kept.k, k)
    assert torch.equal(kept.k_cache.nan_to_num(), ours.k_cache.nan_to_num())


@core
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [
        {"layout": ChunkLayout(13, 3, 2)},
        {"layout": ChunkLayout(13, 3, 2, "interleaved"), "heads": 6},
        {"rows": 5, "heads": 7, "kv_heads": 1},
        {"rows": 1, "head_dim": 100},
        {"layout": ChunkLayout(5, 5), "heads": 66, "kv_heads": 3},
    ],
)
def test_against_the_reference(shape, dtype):
    check(make_inputs((9, 0), page_size=4, dtype=dtype, **shape))


@settings(max_examples=4, suppress_health_check=list(HealthCheck))
@given(calls(dtypes=(torch.float32, torch.float16), even_head_dim=True))
def test_random_calls(inputs):
    check(inputs)


@core
@pytest.mark.parametrize("position", FAR_OUT[:-1])
def test_angles_far_out(position):
    check_angles(position, "triton")


def test_more_than_32_bits_count_is_refused():
    with pytest.raises(
        ValueError, match=r"^block_table: got 524288 pages of 4096 tokens, expected at most "
    ):
        check_angles(FAR_OUT[-1], "triton")


@pytest.mark.parametrize("layout", [None, ChunkLayout(12, 3)])
def test_a_full_table_is_not_overrun(layout):
    """Lengths are not checked on a GPU. Rows without room must not land in another's page."""
    inputs = make_inputs((9, 9), layout, rows=4, page_size=4)
    inputs.cache_seqlens[0] = 4 * inputs.block_table.shape[1] - 1
    before = inputs.clone()
    append(inputs)
    mine = set(inputs.block_table[0].tolist())
    append(alone := dataclasses.replace(before, cache_seqlens=before.cache_seqlens.clone()))
    for page in range(inputs.k_cache.shape[0]):
        if page in mine:
            continue
        assert torch.equal(inputs.k_cache[page].nan_to_num(), alone.k_cache[page].nan_to_num())
    first_page = int(inputs.block_table[0, 0])
    assert torch.equal(inputs.k_cache[first_page], before.clone().k_cache[first_page])


def test_negative_lengths_stay_inside():
    inputs = make_inputs((9,), rows=2, page_size=4)
    inputs.cache_seqlens[0] = -5
    zero = inputs.clone()
    zero.cache_seqlens[0] = 0
    assert torch.equal(append(inputs)[0], append(zero)[0])


@pytest.mark.parametrize("layout", [None, ChunkLayout(12, 3)])
def test_a_table_without_pages(layout):
    """Rows are rotated, and nothing is written to the cache or read from it (see `guarded.py`)."""
    inputs = make_inputs((9, 4), layout, rows=4, page_size=4)
    before = inputs.clone()
    q, k = append(inputs.clone())
    empty = dataclasses.replace(inputs, block_table=inputs.block_table[:, :0])
    empty_q, empty_k = append(empty)
    assert torch.equal(empty_q, q)
    assert torch.equal(empty_k, k)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(getattr(empty, name).nan_to_num(), getattr(before, name).nan_to_num())


def test_lengths_near_the_end_of_int32_stay_inside():
    """A slot that wraps is negative, which is not a slot."""
    inputs = make_inputs((9,), rows=4, page_size=4)
    inputs.cache_seqlens[0] = 2**31 - 2
    before = inputs.clone()
    append(inputs)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(getattr(inputs, name).nan_to_num(), getattr(before, name).nan_to_num())
