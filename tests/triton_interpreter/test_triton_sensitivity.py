"""Mistakes in the kernels that tests must see. Each of them exceeds the tolerance."""

import pytest
import triton
import triton.language as tl
from helpers.triton_cases import attend, call

from vxl_kernels._triton import decode, keys, prefill, primitives, softmax
from vxl_kernels.testing import check_attention


@triton.jit
def sees_one_more(position, ratio):
    vst = (position + 1) // (ratio + 1)
    return position + 2 - vst, vst


@triton.jit
def sees_vsts_late(position, ratio):
    vst = position // (ratio + 1)
    return position + 1 - vst, vst


@triton.jit
def without_vsts(position, runs, ratio):
    return runs.raw + position


@triton.jit
def first_chunks_vsts(chunk, window, ratio, chunks):
    return primitives.Runs(chunk * window, chunks * window)


@triton.jit
def first_page_only(table, entry):
    return tl.load(table.ptr + 0 * entry).to(tl.int64)


@triton.jit
def one_more_cached(cache_seqlens_ptr, i_batch, page_size, max_pages):
    return tl.load(cache_seqlens_ptr + i_batch) + 1


@triton.jit
def one_less_cached(cache_seqlens_ptr, i_batch, page_size, max_pages):
    return tl.maximum(tl.load(cache_seqlens_ptr + i_batch) - 1, 0)


@triton.jit
def no_rescaling(scores, scale, state, MAY_SKIP: tl.constexpr, ARITHMETIC: tl.constexpr):
    row_ref, row_sum, acc = state
    new_ref = tl.maximum(row_ref, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - new_ref[:, None])
    row_sum += tl.sum(p, 1)[:, None] / row_sum.shape[1]
    return p, softmax.Softmax(new_ref, row_sum, acc)


@triton.jit
def first_maximum(scores, scale, state, MAY_SKIP: tl.constexpr, ARITHMETIC: tl.constexpr):
    """row_ref never follows the maximum, so p overflows in float16."""
    row_ref, row_sum, acc = state
    new_ref = tl.where(row_ref == float("-inf"), tl.max(scores, 1) * scale, row_ref)
    p = tl.exp2(scores * scale - new_ref[:, None])
    row_sum += tl.sum(p, 1)[:, None] / row_sum.shape[1]
    return p, softmax.Softmax(new_ref, row_sum, acc)


@triton.jit
def rescales_late(acc, row_scale, WARP_SKIP_ELEMENTS: tl.constexpr):
    """As if a warp skipped the rescaling while a row's row_ref moves a little."""
    return tl.where(row_scale[:, None] > 2.0**-9, acc, acc * row_scale[:, None])


MISTAKES = [
    (prefill, "visible_new", sees_one_more, "split, whole pages"),
    (prefill, "visible_new", sees_vsts_late, "split, whole pages"),
    (primitives, "query_row", without_vsts, "split, whole pages"),
    (prefill, "chunk_runs", first_chunks_vsts, "split, whole pages"),
    (keys, "page_of", first_page_only, "split, whole pages"),
    (keys, "page_of", first_page_only, "split, parts"),
    (keys, "page_of", first_page_only, "decode, any pages"),
    (prefill, "cached_entries", one_more_cached, "text"),
    (prefill, "cached_entries", one_less_cached, "text"),
    (decode, "cached_entries", one_less_cached, "decode, whole pages"),
    (softmax, "_softmax_step", no_rescaling, "text"),
    (softmax, "_softmax_step", no_rescaling, "decode, whole pages"),
    (softmax, "_softmax_step", no_rescaling, "sharp"),
    (softmax, "_softmax_step", first_maximum, "sharp"),
    (softmax, "_rescale", rescales_late, "sharp"),
]


@pytest.mark.parametrize(("module", "name", "mistake", "case"), MISTAKES)
@pytest.mark.usefixtures("small_tiles")
def test_a_mistake_shows(module, name, mistake, case, monkeypatch):
    inputs = call(case)
    monkeypatch.setattr(module, name, mistake)
    with pytest.raises(AssertionError, match="output error"):
        check_attention(inputs, *attend(inputs))
