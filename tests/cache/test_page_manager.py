"""The page manager case by case: which sequences share a page and which copies it, refusals and
their messages, arrays, sizes and threads. test_page_manager_model.py tests it against a model."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from helpers.page_model import snapshot

from vxl_kernels._C import PageManager, PoolExhausted


def append(manager: PageManager, seq: int, rows: int) -> None:
    """For tests that look at pages, not at contents."""
    manager.reserve(seq, rows)
    manager.commit(seq, rows)


def sequence_of(manager: PageManager, rows: int) -> int:
    seq = manager.new_sequence()
    append(manager, seq, rows)
    return seq


# ---- sharing


def test_the_example_of_the_header():
    m = PageManager(num_pages=4, page_size=4)
    a = sequence_of(m, 6)
    b = m.fork(a)
    assert m.reserve(b, 3).tolist() == [[1, 2, 2]]
    assert m.reserve(a, 1).tolist() == []
    assert m.block_table(a).tolist() == [0, 1]
    assert m.block_table(b).tolist() == [0, 2, 3]


def test_32_forks_share_one_video():
    page_size, video, question, forks = 16, 1000, 40, 32
    m = PageManager(4096, page_size)
    parent = sequence_of(m, video)
    one_video = m.stats()["used_pages"]
    children = [m.fork(parent) for _ in range(forks)]
    assert m.stats()["used_pages"] == m.stats()["shared_pages"] == one_video
    assert {m.ref_count(p) for p in m.block_table(parent)} == {forks + 1}

    copies = m.reserve_many(children, question)
    m.commit_many(children, question)
    assert copies[:, 2].tolist() == [video % page_size] * forks
    assert set(copies[:, 0]) == {m.block_table(parent)[-1]}
    tails = -(-(video + question) // page_size) - video // page_size
    assert m.stats()["used_pages"] == one_video + forks * tails
    assert m.ref_count(m.block_table(parent)[-1]) == 1

    for child in children:
        m.free(child)
    assert m.stats()["used_pages"] == one_video


def test_a_fork_at_a_page_boundary_copies_nothing():
    m = PageManager(8, 4)
    a = sequence_of(m, 8)
    b = m.fork(a)
    assert len(m.reserve(b, 4)) == len(m.reserve(a, 4)) == 0
    assert m.block_table(a)[:2].tolist() == m.block_table(b)[:2].tolist()
    assert m.block_table(a)[2] != m.block_table(b)[2]


@pytest.mark.parametrize("reserved", [1, 5])
def test_a_fork_leaves_the_reservation_with_the_parent(reserved):
    m = PageManager(8, 4)
    a = sequence_of(m, 2)
    m.reserve(a, reserved)
    b = m.fork(a)
    assert (m.length(b), m.reserved(b), m.capacity(b)) == (2, 0, 4)
    assert (m.length(a), m.reserved(a)) == (2, reserved)
    # a may have written row 2 into the shared page already, so a must not move.
    page = m.block_table(a)[0]
    assert len(m.reserve(a, 6)) == 0
    assert m.block_table(a)[0] == page
    m.commit(a, 6)
    assert m.reserve(b, 1)[:, [0, 2]].tolist() == [[page, 2]]


def test_growing_after_truncating_into_a_shared_page_copies_it():
    m = PageManager(8, 4)
    a = sequence_of(m, 8)
    b = m.fork(a)
    m.truncate(b, 3)
    first, second = m.block_table(a).tolist()
    assert (m.ref_count(first), m.ref_count(second)) == (2, 1)
    assert m.reserve(b, 1)[:, [0, 2]].tolist() == [[first, 3]]
    assert m.block_table(a).tolist() == [first, second]


def test_the_last_of_a_batch_keeps_the_shared_page():
    m = PageManager(3, 4)
    a = sequence_of(m, 2)
    b, c = m.fork(a), m.fork(a)
    page = m.block_table(a)[0]
    assert m.reserve_many([c, a, b], 1)[:, 0].tolist() == [page, page]
    assert m.block_table(b)[0] == page
    assert m.free_pages() == 0


def test_a_reservation_is_absolute_and_truncate_drops_it():
    m = PageManager(8, 4)
    a = sequence_of(m, 4)
    m.reserve(a, 8)
    m.reserve(a, 3)
    assert (m.reserved(a), m.capacity(a)) == (8, 12)
    m.commit(a, 5)
    assert (m.length(a), m.reserved(a), m.capacity(a)) == (9, 3, 12)
    m.truncate(a, 9)
    assert (m.length(a), m.reserved(a), m.capacity(a)) == (9, 0, 12)
    m.truncate(a, 8)
    assert (m.length(a), m.reserved(a), m.capacity(a)) == (8, 0, 8)


# ---- errors


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: PageManager(0, 4), ValueError, "num_pages: got 0, expected 1 to 2147483647"),
        (lambda m: PageManager(4, 3), ValueError, "page_size: got 3, expected a power of two"),
        (lambda m: PageManager(4, 1 << 31), ValueError, "page_size: got 2147483648"),
        (lambda m: m.fork(7), KeyError, "seq: got 7, expected one of the 1 live sequences"),
        (lambda m: m.reserve_many([0, 7], 1), KeyError, r"seqs\[1\]: got 7"),
        (lambda m: m.reserve_many([0, 0], 1), ValueError, r"seqs\[1\]: got 0, .* each sequence on"),
        (lambda m: m.reserve_many([[0]], 1), ValueError, "seqs: got 2 dimensions, expected 1"),
        (lambda m: m.reserve_many([0.0], 1), TypeError, "seqs: got float64, expected integers"),
        (lambda m: m.reserve(0, -1), ValueError, "rows: got -1, expected 0 to 2147483641"),
        (lambda m: m.reserve(0, 1.0), TypeError, "rows"),
        (lambda m: m.commit(0, 3), ValueError, "rows: got 3, expected 0 to 2, the reserved rows"),
        (lambda m: m.truncate(0, 7), ValueError, "length: got 7, expected 0 to 6"),
        (lambda m: m.ref_count(4), ValueError, "page: got 4, expected 0 to 3"),
    ],
)
def test_messages_name_argument_got_and_expected(call, error, message):
    m = PageManager(4, 4)
    seq = sequence_of(m, 6)
    m.reserve(seq, 2)
    before = snapshot(m, [seq])
    with pytest.raises(error, match=message):
        call(m)
    assert snapshot(m, [seq]) == before


def test_exhaustion_says_how_much_is_missing():
    m = PageManager(4, 4)
    a = sequence_of(m, 6)
    b = m.fork(a)
    before = snapshot(m, [a, b])
    # b: its copy of page 1, then rows 8 to 15 in two pages; the pool has two.
    with pytest.raises(
        PoolExhausted,
        match="rows: got 10, which needs 3 pages, expected at most 2"
        r" \(free pages; the pool has 4\)",
    ) as raised:
        m.reserve(b, 10)
    assert (raised.value.pages_needed, raised.value.pages_free) == (3, 2)
    assert isinstance(raised.value, MemoryError)
    assert snapshot(m, [a, b]) == before
    m.free(a)
    assert len(m.reserve(b, 10)) == 0


def test_a_batch_is_all_or_nothing():
    m = PageManager(5, 4)
    a = sequence_of(m, 2)
    seqs = [a, m.fork(a), m.fork(a)]
    before = snapshot(m, seqs)
    with pytest.raises(PoolExhausted) as raised:
        m.reserve_many(seqs, 4)
    assert raised.value.pages_needed == 5
    assert snapshot(m, seqs) == before
    m.reserve_many(seqs[:2], 1)
    before = snapshot(m, seqs)
    with pytest.raises(ValueError, match="rows: got 1, expected 0 to 0"):
        m.commit_many(seqs, 1)
    assert snapshot(m, seqs) == before


# ---- arrays


def test_fill_block_tables_and_lengths():
    m = PageManager(8, 4)
    a, b, c = sequence_of(m, 9), sequence_of(m, 4), m.new_sequence()
    tables = np.full((4, 5), 99, np.int32)
    m.fill_block_tables([a, b, c, a], tables, pad=-1)
    for row, seq in zip(tables, [a, b, c, a], strict=True):
        pages = m.block_table(seq)
        assert row.tolist() == pages.tolist() + [-1] * (5 - len(pages))
    lengths = np.full(3, 99, np.int32)
    m.fill_lengths(np.array([c, b, a], np.int32), lengths)
    assert lengths.tolist() == [0, 4, 9]


@pytest.mark.parametrize(
    ("out", "got"),
    [
        (np.zeros((2, 5), np.int64), "int64"),
        (np.zeros((2, 5), np.int32)[:, ::2], "not contiguous"),
        (np.zeros((3, 5), np.int32), r"\(3, 5\)"),
        (np.zeros(10, np.int32), r"\(10,\)"),
        (np.zeros((2, 2), np.int32), r"stride: got 2, expected at least 3, the pages of seqs\[1\]"),
        (np.frombuffer(bytes(40), np.int32).reshape(2, 5), "read-only"),
    ],
)
def test_fill_block_tables_refuses_before_it_writes(out, got):
    m = PageManager(8, 4)
    seqs = [sequence_of(m, 4), sequence_of(m, 9)]
    with pytest.raises(ValueError, match=got):
        m.fill_block_tables(seqs, out, pad=7)
    assert not out.any()


def test_results_are_copies():
    m = PageManager(8, 4)
    a = sequence_of(m, 4)
    m.block_table(a)[:] = 5
    assert m.block_table(a).tolist() == [0]


# ---- sizes and threads


def test_10000_sequences():
    m = PageManager(40_000, 16)
    base = sequence_of(m, 100)
    seqs = [m.fork(base) for _ in range(10_000)]
    assert m.ref_count(m.block_table(base)[0]) == 10_001
    copies = m.reserve_many(seqs, 20)
    m.commit_many(seqs, 20)
    assert len(copies) == len(set(copies[:, 1])) == 10_000
    tables = np.empty((10_000, 8), np.int32)
    m.fill_block_tables(seqs, tables)
    assert (tables[:, :6] == m.block_table(base)[:6]).all()
    assert len(set(tables[:, 6:].ravel())) == 20_000
    for seq in seqs:
        m.free(seq)
    assert m.stats()["used_pages"] == 7


def test_readers_beside_a_thread_that_forks_grows_and_frees():
    """A reader always sees a state between two calls."""
    m = PageManager(512, 4)
    base = sequence_of(m, 203)
    table = m.block_table(base).tolist()
    children: list[int] = []
    done = threading.Event()
    errors: list[BaseException] = []

    def churn():
        for _ in range(300):
            children[:] = [m.fork(base) for _ in range(8)]
            m.reserve_many(children, 9)
            m.commit_many(children, 9)
            for child in children:
                m.free(child)
        done.set()

    def read():
        while not done.is_set():
            assert m.block_table(base).tolist() == table
            stats = m.stats()
            assert stats["free_pages"] + stats["used_pages"] == 512
            assert 1 <= m.ref_count(table[0]) <= 9
            for child in list(children):
                try:
                    pages = m.block_table(child).tolist()
                    assert m.length(child) in (203, 212)
                except KeyError:  # freed in the meantime
                    continue
                assert pages[:50] == table[:50]
                assert len(pages) in (51, 53)

    def run(body):
        try:
            body()
        except BaseException as e:
            errors.append(e)
            done.set()

    threads = [threading.Thread(target=run, args=(body,)) for body in (read, read, churn)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors
    assert m.stats()["used_pages"] == len(table)
    assert m.stats()["sequences"] == 1
