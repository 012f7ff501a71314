"""VstCache: contents of every sequence against a plain model, sharing, batches, refusals."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from vxl_kernels import ChunkLayout, PoolExhausted, VstCache, rope_append, vst_attention
from vxl_kernels.testing import inverse_frequencies

pytestmark = pytest.mark.core

LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 16


def small_cache(num_pages: int = 32, page_size: int = 4, **kwargs) -> VstCache:
    cache = VstCache(LAYERS, KV_HEADS, HEAD_DIM, num_pages=num_pages, page_size=page_size, **kwargs)
    cache.k_cache.fill_(torch.nan)
    cache.v_cache.fill_(torch.nan)
    return cache


def write(cache: VstCache, seq: int, tokens: list[int]) -> None:
    """Appends rows that hold their token's number. Sign and scale tell K and layers apart."""
    batch = cache.batch(seq)
    batch.reserve(len(tokens))
    start = int(batch.cache_seqlens[0])
    for i in range(cache.num_layers):
        k, v, table, _ = batch.layer(i)
        for j, token in enumerate(tokens):
            page = table[0, (start + j) // cache.page_size]
            k[page, (start + j) % cache.page_size] = token + 0.25 * i
            v[page, (start + j) % cache.page_size] = -token - 0.25 * i
    batch.commit(len(tokens))


def read(cache: VstCache, seq: int) -> list[int]:
    """The tokens of a sequence. Every layer, head and dimension must agree."""
    tokens: list[int] = []
    for i in range(cache.num_layers):
        k, v = cache.gather(seq, i)
        assert torch.equal(k, -v)
        numbers = k - 0.25 * i
        assert (numbers == numbers[:, :1, :1]).all()
        here = numbers[:, 0, 0].int().tolist()
        assert i == 0 or here == tokens
        tokens = here
    return tokens


def free_of(cache: VstCache, seqs: list[int]) -> tuple:
    return cache.free_pages, [(cache.length(s), read(cache, s)) for s in seqs]


class CacheMachine(RuleBasedStateMachine):
    """Random steps of several sequences. Every content is a unique number."""

    seqs = Bundle("seqs")

    @initialize(num_pages=st.integers(4, 24), page_size=st.sampled_from([1, 2, 4, 8]))
    def start(self, num_pages, page_size):
        self.cache = small_cache(num_pages, page_size)
        self.model: dict[int, list[int]] = {}
        self.hosts: list[tuple] = []
        self.token = 0

    def tokens(self, n: int) -> list[int]:
        self.token += n
        return list(range(self.token - n, self.token))

    def unless_exhausted(self, call):
        """The result of the call. None if the pool was too small, and then nothing may have
        changed."""
        before = free_of(self.cache, list(self.model))
        try:
            return call()
        except PoolExhausted as error:
            needed, free = error.pages_needed, error.pages_free
        assert needed > free == self.cache.free_pages
        assert free_of(self.cache, list(self.model)) == before
        return None

    @rule(target=seqs)
    def new(self):
        seq = self.cache.new()
        self.model[seq] = []
        return seq

    @rule(target=seqs, seq=seqs)
    def fork(self, seq):
        child = self.cache.fork(seq)
        self.model[child] = list(self.model[seq])
        return child

    @rule(seq=seqs, n=st.integers(0, 9))
    def append(self, seq, n):
        tokens = self.tokens(n)
        if self.unless_exhausted(lambda: write(self.cache, seq, tokens) or True):
            self.model[seq] += tokens

    @rule(seq=seqs, data=st.data())
    def truncate(self, seq, data):
        length = data.draw(st.integers(0, len(self.model[seq])))
        self.cache.truncate(seq, length)
        del self.model[seq][length:]

    @rule(seq=consumes(seqs))
    def free(self, seq):
        self.cache.free(seq)
        del self.model[seq]

    @rule(seq=consumes(seqs))
    def offload(self, seq):
        self.hosts.append((self.cache.offload(seq), self.model.pop(seq)))

    @rule(target=seqs, data=st.data())
    def restore(self, data):
        if not self.hosts:
            return self.new()
        host, tokens = data.draw(st.sampled_from(self.hosts))
        seq = self.unless_exhausted(lambda: self.cache.restore(host))
        if seq is None:
            return self.new()
        self.model[seq] = list(tokens)
        return seq

    @invariant()
    def contents(self):
        if not hasattr(self, "cache"):
            return
        for seq, tokens in self.model.items():
            assert read(self.cache, seq) == tokens

    def teardown(self):
        if hasattr(self, "cache"):
            for seq in self.model:
                self.cache.free(seq)
            assert self.cache.free_pages == self.cache.num_pages, "pages leak"


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


# -- batches ---------------------------------------------------------------------------------


def test_a_batch_is_what_the_operators_take():
    cache = small_cache()
    seqs = [cache.new() for _ in range(3)]
    for seq, n in zip(seqs, (0, 5, 9), strict=True):
        write(cache, seq, list(range(n)))
    batch = cache.batch(seqs)
    assert batch.cache_seqlens.tolist() == [0, 5, 9]
    assert batch.block_table.dtype == batch.cache_seqlens.dtype == torch.int32
    k_cache, v_cache, table, lens = batch.layer(1)
    assert k_cache.data_ptr() == cache.k_cache[1].data_ptr()
    assert v_cache.data_ptr() == cache.v_cache[1].data_ptr()
    assert table is batch.block_table
    assert lens is batch.cache_seqlens
    q = torch.randn(3, 1, 4, HEAD_DIM)
    k, v = torch.randn(2, 3, 1, KV_HEADS, HEAD_DIM)
    together = vst_attention(q, k, v, *batch.layer(1))
    for b, seq in enumerate(seqs):
        part = slice(b, b + 1)
        alone = vst_attention(q[part], k[part], v[part], *cache.batch(seq).layer(1))
        assert torch.equal(together[part], alone)


def test_addresses_stay_when_max_tokens_is_given():
    cache = small_cache()
    batch = cache.batch([cache.new(), cache.new()], max_tokens=32)
    addresses = batch.block_table.data_ptr(), batch.cache_seqlens.data_ptr()
    for _ in range(8):
        batch.reserve(4)
        batch.commit(4)
        assert (batch.block_table.data_ptr(), batch.cache_seqlens.data_ptr()) == addresses
    assert batch.cache_seqlens.tolist() == [32, 32]
    with pytest.raises(ValueError, match=r"33 tokens, expected at most 32 \(max_tokens\)"):
        batch.reserve(1)
    assert [cache.length(s) for s in batch.seqs] == [32, 32]


def test_a_batch_grows_past_its_first_table():
    cache = small_cache(num_pages=100, page_size=1)
    batch = cache.batch(cache.new())
    for _ in range(50):
        batch.reserve(2)
        batch.commit(2)
    table = batch.block_table[0, :100].tolist()
    assert sorted(table) == list(range(100))


def test_a_batch_notices_what_happens_through_the_cache():
    cache = small_cache()
    seq = cache.new()
    write(cache, seq, list(range(10)))
    batch = cache.batch(seq)
    child = cache.fork(seq)  # the last page is shared now, so the next step copies it
    cache.truncate(seq, 9)
    batch.reserve(1)
    assert batch.cache_seqlens.tolist() == [9]
    assert batch.block_table[0, 2] != cache.batch(child).block_table[0, 2]
    batch.commit(1)
    assert read(cache, child) == list(range(10))


def test_a_batch_of_a_freed_sequence_writes_nowhere():
    """Its pages may belong to another sequence."""
    cache = small_cache()
    kept, freed = cache.new(), cache.new()
    for seq in (kept, freed):
        write(cache, seq, [1, 2, 3])
    batch = cache.batch([kept, freed])
    batch.reserve(4)
    cache.free(freed)
    thief = cache.new()
    write(cache, thief, list(range(10)))
    for call in (lambda: batch.layer(0), lambda: batch.reserve(1), lambda: batch.commit(4)):
        with pytest.raises(KeyError):
            call()
    assert read(cache, thief) == list(range(10))
    assert read(cache, kept) == [1, 2, 3]


@pytest.mark.parametrize("length", [3, 1])
def test_a_batch_of_a_truncated_sequence_writes_nowhere(length):
    """Not even where only its reserved pages were released. Another sequence's end changes
    nothing."""
    cache = small_cache()
    other, seq = cache.new(), cache.new()
    write(cache, seq, [1, 2, 3])
    batch = cache.batch(seq)
    batch.reserve(4)
    cache.free(other)
    batch.layer(0)
    cache.truncate(seq, length)
    with pytest.raises(ValueError, match=rf"batch: got sequence {seq}, which changed since"):
        batch.layer(0)
    batch.reserve(4)
    batch.layer(0)


def test_a_cache_outlives_inference_mode():
    with torch.inference_mode():
        cache = small_cache(page_size=1, num_pages=64)
        seq = cache.new()
        write(cache, seq, list(range(20)))  # more pages than the first table has room for
        batch = cache.batch(seq)
    write(cache, seq, [20])
    batch.reserve(1)
    assert read(cache, seq) == list(range(21))
    assert not any(x.is_inference() for x in batch.layer(0))


def test_a_failed_reserve_of_a_batch_changes_nothing():
    cache = small_cache(num_pages=4, page_size=4)
    seqs = [cache.new(), cache.new()]
    batch = cache.batch(seqs)
    batch.reserve(4)
    batch.commit(4)
    with pytest.raises(PoolExhausted) as caught:
        batch.reserve(8)
    assert (caught.value.pages_needed, caught.value.pages_free) == (4, 2)
    assert cache.free_pages == 2
    assert batch.cache_seqlens.tolist() == [4, 4]


def fail_once(monkeypatch, cache):
    """The next upload finds no memory."""
    upload = cache._upload

    def failing(array):
        monkeypatch.setattr(cache, "_upload", upload)
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(cache, "_upload", failing)


@pytest.mark.parametrize("rows", [5, 60])  # the second one needs a wider table
def test_a_table_that_did_not_reach_the_device_is_uploaded_again(monkeypatch, rows):
    cache = small_cache(num_pages=64, page_size=4)
    seqs = [cache.new(), cache.new()]
    batch = cache.batch(seqs)
    batch.reserve(4)
    batch.commit(4)
    fail_once(monkeypatch, cache)
    with pytest.raises(torch.OutOfMemoryError):
        batch.reserve(rows)
    with pytest.raises(ValueError, match="batch: got tensors that an interrupted reserve"):
        batch.layer(0)
    batch.reserve(rows)
    for seq, table in zip(seqs, batch.block_table, strict=True):
        pages = cache._manager.block_table(seq).tolist()
        assert table.tolist() == pages + [0] * (len(table) - len(pages))
    assert batch.cache_seqlens.tolist() == [4, 4]
    batch.layer(0)


def test_lengths_that_did_not_reach_the_device_are_uploaded_again(monkeypatch):
    cache = small_cache()
    seqs = [cache.new(), cache.new()]
    batch = cache.batch(seqs)
    batch.reserve(4)
    fail_once(monkeypatch, cache)
    with pytest.raises(torch.OutOfMemoryError):
        batch.commit([1, 2])
    assert [cache.length(seq) for seq in seqs] == batch.cache_seqlens.tolist() == [0, 0]
    batch.commit([1, 2])
    cache.commit(seqs, 1)
    fail_once(monkeypatch, cache)
    with pytest.raises(torch.OutOfMemoryError):
        batch.reserve(4)
    with pytest.raises(ValueError, match="batch: got tensors that an interrupted reserve"):
        batch.layer(0)
    batch.reserve(4)
    batch.layer(0)
    assert [cache.length(seq) for seq in seqs] == batch.cache_seqlens.tolist() == [2, 3]


# -- many questions over one video -----------------------------------------------------------

VIDEO = ChunkLayout(window=24, ratio=4)
HEADS = 4


def step(cache, batch, layout, seed, backend=None):
    """One step of a model without weights. K and V of a layer come from a seed."""
    rows = VIDEO.rows if layout else 5
    kept = VIDEO.vsts_per_chunk if layout else rows
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(len(batch), rows, h, HEAD_DIM, generator=generator)
        for h in (HEADS, KV_HEADS, KV_HEADS)
    )
    batch.reserve(kept)
    outs = []
    for i in range(LAYERS):
        q_rotated, k_rotated = rope_append(
            q, k, v, *batch.layer(i), layout, inverse_frequencies(HEAD_DIM)
        )
        outs.append(vst_attention(q_rotated, k_rotated, v, *batch.layer(i), layout))
    batch.commit(kept)
    return torch.stack(outs)


def watch(cache):
    seq = cache.new()
    batch = cache.batch(seq)
    for chunk in range(3):
        step(cache, batch, VIDEO, seed=chunk)
    return seq


def test_32_questions_over_one_video_share_it_and_give_the_bits_of_32_runs():
    page_size, questions = 4, 32
    cache = small_cache(num_pages=120, page_size=page_size)
    video = watch(cache)
    video_pages = cache.num_pages - cache.free_pages
    forks = [cache.fork(video) for _ in range(questions)]
    assert cache.num_pages - cache.free_pages == video_pages, "a fork took a page"
    shared = [step(cache, cache.batch(f), None, seed=100 + i) for i, f in enumerate(forks)]
    # 18 rows of video: the last page holds two rows. Each question copies it and adds a page.
    assert cache.length(video) == 18
    assert cache.num_pages - cache.free_pages == video_pages + 2 * questions
    for i, expected in enumerate(shared):
        alone = small_cache(num_pages=8, page_size=page_size)
        assert torch.equal(step(alone, alone.batch(watch(alone)), None, seed=100 + i), expected)


def test_64_questions_take_one_video_and_64_suffixes():
    cache = small_cache(num_pages=256, page_size=4)
    video = watch(cache)
    used = cache.num_pages - cache.free_pages
    for i in range(64):
        step(cache, cache.batch(cache.fork(video)), None, seed=i)
    suffixes = 64 * -(-5 // 4)  # pages of a suffix of 5 rows, alone
    assert cache.num_pages - cache.free_pages <= used + suffixes + 64


@pytest.mark.parametrize("prefix", [0, 3, 4])
@pytest.mark.parametrize(("frames", "suffix", "questions"), [(0, 5, 1), (7, 9, 3), (20, 4, 2)])
def test_memory_for_is_what_a_run_takes(prefix, frames, suffix, questions):
    plan = VstCache.memory_for(
        frames,
        4,
        prefix=prefix,
        suffix=suffix,
        questions=questions,
        window=24,
        tokens_per_frame=6,
        num_layers=LAYERS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        page_size=4,
        dtype=torch.float32,
    )
    cache = small_cache(num_pages=plan.pages)
    assert cache.bytes == plan.bytes
    video = cache.new()
    whole, rest = divmod(frames * 6, 24)
    for rows in [prefix, *[6] * whole, rest // 4]:
        cache.reserve(video, rows)
        cache.commit(video, rows)
    assert cache.length(video) == plan.video_tokens
    for _ in range(questions):
        question = cache.fork(video)
        cache.reserve(question, suffix)
        cache.commit(question, suffix)
    assert cache.stats()["tokens"] - questions * plan.video_tokens == plan.tokens
    assert cache.free_pages <= questions, "the plan asks for more than a page a question too much"


# -- threads ---------------------------------------------------------------------------------


def test_reading_while_other_threads_fork_and_append():
    """Committed rows do not change, whatever other threads do."""
    cache = small_cache(num_pages=400, page_size=4)
    video = cache.new()
    write(cache, video, list(range(30)))
    failures: list[BaseException] = []
    done = threading.Event()

    def asks(worker: int) -> None:
        for i in range(25):
            question = cache.fork(video)
            tokens = list(range(1000 * worker + 10 * i, 1000 * worker + 10 * i + 7))
            write(cache, question, tokens)
            assert read(cache, question) == list(range(30)) + tokens
            cache.free(question)

    def reads() -> None:
        while not done.is_set():
            assert read(cache, video) == list(range(30))

    def guarded(work, *args) -> None:
        try:
            work(*args)
        except BaseException as error:
            failures.append(error)

    reader = threading.Thread(target=guarded, args=(reads,))
    workers = [threading.Thread(target=guarded, args=(asks, w)) for w in range(1, 5)]
    for thread in [reader, *workers]:
        thread.start()
    for thread in workers:
        thread.join()
    done.set()
    reader.join()
    assert not failures, failures
    assert cache.free_pages == 400 - 8


def test_reading_a_sequence_that_grows():
    """Its shared last page is copied when it grows. Nobody may see half a copy."""
    cache = small_cache(num_pages=64, page_size=4)
    failures: list[BaseException] = []
    sequences: dict[int, list[int]] = {}
    for i in range(6):
        seq = cache.new()
        write(cache, seq, list(range(100 * i, 100 * i + 6)))
        sequences[seq] = read(cache, seq)
    done = threading.Event()

    def reads() -> None:
        try:
            while not done.is_set():
                for seq, tokens in sequences.items():
                    assert read(cache, seq)[:6] == tokens
        except BaseException as error:
            failures.append(error)

    readers = [threading.Thread(target=reads) for _ in range(2)]
    for reader in readers:
        reader.start()
    for _ in range(60):
        for seq in sequences:
            other = cache.fork(seq)  # shares the page, so the sequence moves to a copy
            cache.reserve(seq, 1)
            cache.free(other)
            cache.truncate(seq, 6)
    done.set()
    for reader in readers:
        reader.join()
    assert not failures, failures


# -- refusals --------------------------------------------------------------------------------


GOOD = {"num_layers": 1, "kv_heads": 1, "head_dim": 16, "num_pages": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers: got 0, expected an integer of at least 1"),
        ({"kv_heads": 1.5}, "kv_heads: got 1.5"),
        ({"head_dim": True}, "head_dim: got True"),
        ({"num_pages": -3}, "num_pages: got -3"),
        ({"num_pages": 2**40}, "num_pages: got 1099511627776"),
        ({"page_size": 48}, "page_size: got 48, expected a power of two"),
        ({"dtype": torch.int8}, "dtype: got torch.int8, expected torch.float32"),
        ({"dtype": torch.float64}, "dtype: got torch.float64"),
    ],
)
def test_a_cache_of_impossible_sizes_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        VstCache(**{**GOOD, **changes})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c, s: c.fork(99), KeyError, "99"),
        (lambda c, s: c.free(-1), KeyError, "-1"),
        (lambda c, s: c.length(99), KeyError, "99"),
        (lambda c, s: c.gather(99, 0), KeyError, "99"),
        (lambda c, s: c.gather(s, 2), ValueError, "layer: got 2, expected 0 to 1"),
        (lambda c, s: c.batch([s, 99]), KeyError, "99"),
        (lambda c, s: c.batch([s], max_tokens=0), ValueError, "max_tokens: got 0"),
        (lambda c, s: c.truncate(s, 11), ValueError, "length: got 11"),
        (lambda c, s: c.reserve(s, -1), ValueError, "rows: got -1"),
        (lambda c, s: c.reserve([s, s], 1), ValueError, "expected each sequence once"),
        (lambda c, s: c.reserve(s, 10**6), PoolExhausted, "pages"),
        (lambda c, s: c.reserve(s, 2**40), ValueError, "rows"),
        (lambda c, s: c.commit(s, 1), ValueError, "rows: got 1"),
        (lambda c, s: c.offload(99), KeyError, "99"),
        (lambda c, s: c.save("/nonexistent/x", s), FileNotFoundError, "nonexistent"),
    ],
)
def test_a_wrong_call_changes_nothing(call, error, message):
    cache = small_cache()
    seq = cache.new()
    write(cache, seq, list(range(10)))
    before = free_of(cache, [seq]), cache.stats()
    with pytest.raises(error, match=message):
        call(cache, seq)
    assert (free_of(cache, [seq]), cache.stats()) == before


def test_restore_refuses_another_geometry():
    cache = small_cache()
    seq = cache.new()
    write(cache, seq, [1, 2, 3])
    host = cache.offload(seq)
    other = VstCache(LAYERS, KV_HEADS, 32, num_pages=4, page_size=4)
    with pytest.raises(ValueError, match=r"host: got \(layers, kv_heads, head_dim, dtype\)"):
        other.restore(host)
    assert other.stats()["sequences"] == 0


def test_page_bytes_and_bytes():
    cache = small_cache(num_pages=6, page_size=8, dtype=torch.bfloat16)
    assert cache.bytes == 2 * LAYERS * 6 * 8 * KV_HEADS * HEAD_DIM * 2
    assert cache.page_bytes * 6 == cache.bytes
    assert np.isclose(cache.bytes, cache.k_cache.nbytes + cache.v_cache.nbytes)
