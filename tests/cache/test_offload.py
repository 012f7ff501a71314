"""A sequence in host memory and back, from a device whose copies come late."""

import pytest
import torch
from helpers.late_stream import LateStream

from vxl_kernels import VstCache
from vxl_kernels.cache import host

pytestmark = pytest.mark.core


def filled(rows=11, seed=0):
    """A cache with a sequence of random rows; its contents by layer."""
    cache = VstCache(3, 2, 16, num_pages=16, page_size=4)
    seq = cache.new()
    cache.reserve(seq, rows)
    generator = torch.Generator().manual_seed(seed)
    for pages in (cache.k_cache, cache.v_cache):
        pages.copy_(torch.randn(pages.shape, generator=generator))
    cache.commit(seq, rows)
    return cache, seq, [cache.gather(seq, i) for i in range(3)]


def assert_holds(cache, seq, contents):
    for i, (k, v) in enumerate(contents):
        got_k, got_v = cache.gather(seq, i)
        assert torch.equal(got_k, k)
        assert torch.equal(got_v, v)


def test_restore_soon_after_offload_reads_nothing_on_the_host():
    """The copies to host memory are queued, so the host would read stale values. The stream waits
    for them, and the host does not."""
    cache, seq, contents = filled()
    with LateStream().playing(cache) as stream:
        kept = cache.offload(seq)
        assert len(stream.queue) == 2 * cache.num_layers
        again = cache.restore(kept)
        assert stream.left_to_the_stream == [kept._event]
        assert stream.waited == 0
    assert_holds(cache, again, contents)


def test_restore_on_a_cpu_waits_for_the_device():
    cache, seq, contents = filled()
    other = VstCache(3, 2, 16, num_pages=16, page_size=8)
    with LateStream().playing(cache) as stream:
        kept = cache.offload(seq)
        again = other.restore(kept)
        assert stream.waited == 1
    assert_holds(other, again, contents)


def test_wait_brings_what_is_read_on_the_host():
    cache, seq, contents = filled()
    with LateStream().playing(cache):
        data = cache.offload(seq).wait().data
    for i, (k, v) in enumerate(contents):
        assert torch.equal(data[0, i], k)
        assert torch.equal(data[1, i], v)


def test_the_pages_of_an_offloaded_sequence_may_be_written_at_once():
    """The copies come before the next step in the stream."""
    cache, seq, contents = filled()
    with LateStream().playing(cache):
        kept = cache.offload(seq)
        cache.k_cache.fill_(5.0)
        cache.v_cache.fill_(5.0)
        again = cache.restore(kept)
    assert_holds(cache, again, contents)


@pytest.mark.parametrize("block_rows", [1, 4, 7, 11, 25, 1000])
def test_a_sequence_lies_in_blocks_of_one_size(monkeypatch, block_rows):
    """Whatever its length, so that page-locked memory is not rounded up to a power of two and
    is used for the next sequence. Pieces are parts of blocks."""
    row = 2 * 16 * 4
    monkeypatch.setattr(host, "BLOCK_BYTES", block_rows * row)
    cache, seq, contents = filled()
    sizes = []
    with LateStream().playing(cache):
        empty = torch.empty

        def recorded(*args, **options):
            sizes.append(args[0]) if options.get("pin_memory") else None
            return empty(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", recorded)
            kept = cache.offload(seq)
        again = cache.restore(kept)
        data = kept.wait().data
    assert_holds(cache, again, contents)
    rows = 2 * 3 * 11
    assert sum(sizes) == rows
    assert set(sizes[:-1]) <= {block_rows}
    assert kept.bytes == rows * row == data.nbytes
    assert (kept.length, data.shape) == (11, (2, 3, 11, 2, 16))
    for i, (k, v) in enumerate(contents):
        assert torch.equal(data[0, i], k)
        assert torch.equal(data[1, i], v)


def test_an_empty_sequence_has_no_block():
    cache = VstCache(3, 2, 16, num_pages=16, page_size=4)
    with LateStream().playing(cache):
        kept = cache.offload(cache.new())
        assert cache.length(cache.restore(kept)) == 0
        assert kept.data.shape == (2, 3, 0, 2, 16)
