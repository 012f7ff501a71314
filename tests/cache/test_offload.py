"""A sequence in host memory and back, from a device whose copies come late."""

import pytest
import torch
from helpers.late_stream import LateStream

from vxl_kernels import VstCache

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
        host = cache.offload(seq)
        assert len(stream.queue) == 2 * cache.num_layers
        again = cache.restore(host)
        assert stream.left_to_the_stream == [host._event]
        assert stream.waited == 0
    assert_holds(cache, again, contents)


def test_restore_on_a_cpu_waits_for_the_device():
    cache, seq, contents = filled()
    other = VstCache(3, 2, 16, num_pages=16, page_size=8)
    with LateStream().playing(cache) as stream:
        host = cache.offload(seq)
        again = other.restore(host)
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
        host = cache.offload(seq)
        cache.k_cache.fill_(5.0)
        cache.v_cache.fill_(5.0)
        again = cache.restore(host)
    assert_holds(cache, again, contents)
