"""The page manager against a plain model that holds real contents.

Every token written is a new number, so a page that is copied too late, not at all or with too
few rows, or one that is handed out twice, shows as a wrong number in some sequence. Pages that
nobody holds are overwritten after each step.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from vxl_kernels._C import PageManager, PoolExhausted

NO_SUCH_SEQUENCE = 1 << 40
POISON = -1


def append(manager: PageManager, seq: int, rows: int) -> None:
    """For tests that look at pages, not at contents."""
    manager.reserve(seq, rows)
    manager.commit(seq, rows)


def sequence_of(manager: PageManager, rows: int) -> int:
    seq = manager.new_sequence()
    append(manager, seq, rows)
    return seq


def snapshot(manager: PageManager, seqs: list[int]) -> tuple:
    """All that can be seen of a manager from outside."""
    sequences = [
        (manager.length(s), manager.reserved(s), manager.block_table(s).tolist()) for s in seqs
    ]
    references = [manager.ref_count(p) for p in range(manager.num_pages)]
    return sequences, references, manager.stats()


# ---- the model


class Page:
    """A page as the model knows it; which page of the pool it is, the manager chooses."""


@dataclass(eq=False)
class Sequence:
    pages: list[Page] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # committed
    pending: list[int] = field(default_factory=list)  # written, not committed
    reserved: int = 0


class Model:
    """Pages and contents of every sequence, by the rules in page_manager.h."""

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages, self.page_size = num_pages, page_size
        self.sequences: dict[int, Sequence] = {}
        self.copies = 0

    def pages_for(self, rows: int) -> int:
        return -(-rows // self.page_size)

    def holders(self) -> Counter[Page]:
        return Counter(p for s in self.sequences.values() for p in s.pages)

    def free_pages(self) -> int:
        return self.num_pages - len(self.holders())

    def reserve(self, seqs: list[int], rows: int) -> tuple[int, dict[int, Sequence]]:
        """Pages that it takes, and the sequences as they are afterwards."""
        holders, taken, after = self.holders(), 0, {}
        for seq in seqs:
            s = self.sequences[seq]
            pages = list(s.pages)
            partly_filled = len(s.tokens) % self.page_size > 0
            if rows > 0 and s.reserved == 0 and partly_filled and holders[pages[-1]] > 1:
                holders[pages[-1]] -= 1
                pages[-1] = Page()
                taken += 1
            reserved = max(s.reserved, rows)
            more = self.pages_for(len(s.tokens) + reserved) - len(pages)
            taken += more
            pages += [Page() for _ in range(more)]
            after[seq] = Sequence(pages, s.tokens, s.pending, reserved)
        return taken, after


class PageManagerMachine(RuleBasedStateMachine):
    seqs = Bundle("seqs")

    @initialize(num_pages=st.integers(1, 40), page_size=st.sampled_from([1, 2, 4, 8]))
    def start(self, num_pages, page_size):
        self.manager = PageManager(num_pages, page_size)
        self.model = Model(num_pages, page_size)
        self.pool = np.full((num_pages, page_size), POISON)
        self.next_token = 0
        self.last_id = -1

    # -- sequences

    def accept_id(self, seq: int, sequence: Sequence) -> int:
        assert seq > self.last_id, "an id was used again"
        self.last_id = seq
        self.model.sequences[seq] = sequence
        return seq

    @rule(target=seqs)
    def new(self):
        return self.accept_id(self.manager.new_sequence(), Sequence())

    @rule(target=seqs, seq=seqs, times=st.integers(1, 3))
    def fork(self, seq, times):
        parent = self.model.sequences[seq]
        shared = parent.pages[: self.model.pages_for(len(parent.tokens))]
        return multiple(
            *(
                self.accept_id(self.manager.fork(seq), Sequence(list(shared), list(parent.tokens)))
                for _ in range(times)
            )
        )

    @rule(seq=seqs, data=st.data())
    def truncate(self, seq, data):
        s = self.model.sequences[seq]
        length = data.draw(st.integers(0, len(s.tokens)), label="length")
        self.manager.truncate(seq, length)
        pages = s.pages[: self.model.pages_for(length)]
        self.model.sequences[seq] = Sequence(pages, s.tokens[:length])

    @rule(seq=consumes(seqs))
    def free(self, seq):
        self.manager.free(seq)
        del self.model.sequences[seq]

    # -- growing

    @rule(seq=seqs, rows=st.integers(0, 12), write=st.booleans())
    def reserve(self, seq, rows, write):
        self.check_reserve([seq], rows, write, lambda: self.manager.reserve(seq, rows))

    @rule(seq=seqs, rows=st.integers(1, 5))
    def append(self, seq, rows):
        """reserve and commit of a whole step: what leaves partly filled pages behind."""
        if self.check_reserve([seq], rows, True, lambda: self.manager.reserve(seq, rows)):
            rows = self.model.sequences[seq].reserved
            self.manager.commit(seq, rows)
            self.commit_model(seq, rows)

    @precondition(lambda self: len(self.model.sequences) > 1)
    @rule(data=st.data(), rows=st.integers(0, 6), write=st.booleans())
    def reserve_many(self, data, rows, write):
        live = st.sampled_from(sorted(self.model.sequences))
        seqs = data.draw(st.lists(live, unique=True), label="seqs")
        self.check_reserve(seqs, rows, write, lambda: self.manager.reserve_many(seqs, rows))

    def check_reserve(self, seqs, rows, write, call) -> bool:
        """Reserves if the pages are there, else checks the refusal; True if reserved."""
        needed, after = self.model.reserve(seqs, rows)
        free = self.model.free_pages()
        if needed > free:
            before = self.snapshot()
            with pytest.raises(PoolExhausted) as raised:
                call()
            assert (raised.value.pages_needed, raised.value.pages_free) == (needed, free)
            assert self.snapshot() == before
            return False
        self.perform(call(), seqs, after)
        self.model.sequences.update(after)
        for seq in seqs if write else []:
            self.write(seq, self.model.sequences[seq].reserved)
        return True

    def perform(self, copies, seqs, after):
        """The copies, in any order, are those of the sequences whose last page was shared."""
        page_size = self.model.page_size
        moved = [s for s in seqs if after[s].pages[: len(self.pages_of(s))] != self.pages_of(s)]
        assert copies.dtype == np.int32
        assert copies[:, 2].tolist() == [len(after[s].tokens) % page_size for s in moved]
        assert not set(copies[:, 0]) & set(copies[:, 1])
        for source, target, rows in reversed(copies.tolist()):
            self.pool[target, :rows] = self.pool[source, :rows]
        self.model.copies += len(moved)

    def pages_of(self, seq: int) -> list[Page]:
        return self.model.sequences[seq].pages

    def write(self, seq: int, rows: int) -> None:
        """Writes the first `rows` reserved rows that have not been written yet."""
        s, page_size = self.model.sequences[seq], self.model.page_size
        table = self.manager.block_table(seq)
        while len(s.pending) < rows:
            row = len(s.tokens) + len(s.pending)
            self.pool[table[row // page_size], row % page_size] = self.next_token
            s.pending.append(self.next_token)
            self.next_token += 1

    def commit_model(self, seq: int, rows: int) -> None:
        s = self.model.sequences[seq]
        s.tokens, s.pending = s.tokens + s.pending[:rows], s.pending[rows:]
        s.reserved -= rows

    @rule(seq=seqs, data=st.data())
    def commit(self, seq, data):
        rows = data.draw(st.integers(0, self.model.sequences[seq].reserved), label="rows")
        self.write(seq, rows)
        self.manager.commit(seq, rows)
        self.commit_model(seq, rows)

    @precondition(lambda self: any(s.reserved for s in self.model.sequences.values()))
    @rule()
    def commit_many(self):
        seqs = [k for k, s in self.model.sequences.items() if s.reserved]
        rows = min(self.model.sequences[k].reserved for k in seqs)
        for seq in seqs:
            self.write(seq, rows)
        self.manager.commit_many(seqs, rows)
        for seq in seqs:
            self.commit_model(seq, rows)

    # -- calls that must fail and change nothing

    def snapshot(self):
        return snapshot(self.manager, list(self.model.sequences))

    @rule(seq=seqs, data=st.data())
    def bad_call(self, seq, data):
        m, s = self.manager, self.model.sequences[seq]
        seqs = list(self.model.sequences)
        calls = [
            (KeyError, lambda: m.fork(NO_SUCH_SEQUENCE)),
            (KeyError, lambda: m.free(-1)),
            (KeyError, lambda: m.free(self.last_id + 1)),
            (KeyError, lambda: m.reserve_many([*seqs, NO_SUCH_SEQUENCE], 1)),
            (KeyError, lambda: m.commit_many([*seqs, NO_SUCH_SEQUENCE], 0)),
            (ValueError, lambda: m.reserve_many([*seqs, seq], 1)),
            (ValueError, lambda: m.commit_many([*seqs, seq], 0)),
            (ValueError, lambda: m.reserve(seq, -1)),
            (ValueError, lambda: m.reserve(seq, 1 << 31)),
            (ValueError, lambda: m.reserve(seq, (1 << 63) - 1)),
            (TypeError, lambda: m.reserve(seq, 1 << 63)),
            (PoolExhausted, lambda: m.reserve(seq, 40 * 8 + 1)),
            (ValueError, lambda: m.commit(seq, -1)),
            (ValueError, lambda: m.commit(seq, s.reserved + 1)),
            (ValueError, lambda: m.commit_many(seqs, s.reserved + 1)),
            (ValueError, lambda: m.truncate(seq, -1)),
            (ValueError, lambda: m.truncate(seq, len(s.tokens) + 1)),
            (ValueError, lambda: m.ref_count(m.num_pages)),
        ]
        before = self.snapshot()
        expected, call = data.draw(st.sampled_from(calls), label="call")
        with pytest.raises(expected):
            call()
        assert self.snapshot() == before

    # -- what always holds

    @invariant()
    def lengths_and_tables(self):
        for seq, s in self.model.sequences.items():
            table = self.manager.block_table(seq)
            assert table.dtype == np.int32
            assert self.manager.length(seq) == len(s.tokens)
            assert self.manager.reserved(seq) == s.reserved
            assert self.manager.capacity(seq) == len(table) * self.model.page_size
            assert len(table) == len(s.pages)

    @invariant()
    def sharing_is_exact(self):
        """The model's pages and the pool's pages are the same but for their names."""
        in_pool: dict[Page, int] = {}
        for seq, s in self.model.sequences.items():
            for page, number in zip(s.pages, self.manager.block_table(seq).tolist(), strict=True):
                assert in_pool.setdefault(page, number) == number
        assert len(set(in_pool.values())) == len(in_pool), "one page in two pages' place"
        holders = self.model.holders()
        expected = {number: holders[page] for page, number in in_pool.items()}
        for number in range(self.model.num_pages):
            assert self.manager.ref_count(number) == expected.get(number, 0)
            if number not in expected:
                self.pool[number] = POISON

    @invariant()
    def contents(self):
        for seq, s in self.model.sequences.items():
            written = s.tokens + s.pending
            rows = self.pool[self.manager.block_table(seq)].reshape(-1)
            assert rows[: len(written)].tolist() == written

    @invariant()
    def one_writer(self):
        """A row that somebody may write is in nobody else's sight, and a page has one writer."""
        page_size = self.model.page_size
        readers: Counter[tuple[Page, int]] = Counter()
        writable: Counter[tuple[Page, int]] = Counter()
        writers: Counter[Page] = Counter()
        for s in self.model.sequences.values():
            place = [(p, row) for p in s.pages for row in range(page_size)]
            end = len(s.tokens) + s.reserved
            readers.update(place[: len(s.tokens)])
            writable.update(place[len(s.tokens) : end])
            writers.update({page for page, _ in place[len(s.tokens) : end]})
        assert all(n == 1 for n in writers.values())
        assert not readers.keys() & writable.keys()

    @invariant()
    def totals(self):
        holders, stats = self.model.holders(), self.manager.stats()
        assert self.manager.free_pages() == stats["free_pages"] == self.model.free_pages()
        assert stats["used_pages"] == len(holders) <= stats["peak_used_pages"]
        assert stats["shared_pages"] == sum(n > 1 for n in holders.values())
        assert stats["sequences"] == len(self.model.sequences)
        assert stats["tokens"] == sum(len(s.tokens) for s in self.model.sequences.values())
        assert stats["page_copies"] == self.model.copies

    def teardown(self):
        """Nothing leaks: with every sequence gone, every page can be had again."""
        if not hasattr(self, "manager"):
            return
        for seq in self.model.sequences:
            self.manager.free(seq)
        assert self.manager.free_pages() == self.model.num_pages
        seq = self.manager.new_sequence()
        self.manager.reserve(seq, self.model.num_pages * self.model.page_size)
        table = self.manager.block_table(seq)
        assert sorted(table) == list(range(self.model.num_pages))


TestPageManager = PageManagerMachine.TestCase
TestPageManager.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


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
    # a may have written row 2 into the shared page already: a must not move.
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
        (lambda m: m.commit(0, 3), ValueError, "rows: got 3, expected 0 to 2, what is reserved"),
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
    with pytest.raises(PoolExhausted, match="rows: got 10, which takes 3 pages, expected at most 2"
                       r" \(free of 4\)") as raised:  # fmt: skip
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
    """What a reader sees is always a state between two calls, never half of one."""
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
