"""The page manager against a plain model that holds real contents.

Every token written is a new number. So a page that is copied too late, not at all or with too few
rows, or that is given to two sequences, shows as a wrong number in a sequence. Pages that nobody
holds are overwritten after each step.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from helpers.page_model import Model, Page, Sequence, snapshot
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
        """reserve and commit of a whole step, which leaves partly filled pages."""
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
        """Reserves if there are enough pages, else checks the refusal. Returns whether it
        reserved."""
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
        """Makes the copies in any order. They are those of the sequences whose last page was
        shared."""
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
        """The pages of the model and of the pool are the same except for their numbers."""
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
        """A row that a sequence may write is not visible to another, and a page has one writer."""
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
        """Nothing leaks: once every sequence is freed, every page is free."""
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
