"""A plain model of the page manager, by the rules in page_manager.h, and the state of a manager as
seen from outside."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from vxl_kernels._C import PageManager


def snapshot(manager: PageManager, seqs: list[int]) -> tuple:
    """The state of a manager as seen from outside."""
    sequences = [
        (manager.length(s), manager.reserved(s), manager.block_table(s).tolist()) for s in seqs
    ]
    references = [manager.ref_count(p) for p in range(manager.num_pages)]
    return sequences, references, manager.stats()


class Page:
    """A page of the model. The manager chooses which page of the pool it is."""


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
        """How many pages it takes, and the sequences after it."""
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
