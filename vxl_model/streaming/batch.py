"""What HF's `generate` carries from step to step: sequences that read and write text together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from transformers.cache_utils import Cache

from .encoder import StreamEncoder
from .state import VideoState

__all__ = ["StreamBatch"]


class StreamBatch(Cache):
    """Sequences in a cache, one for each row of a batch.

    Attributes:
        states: their states.
    """

    is_compileable = False  # pages are added as a sequence grows

    def __init__(self, states: Iterable[VideoState]) -> None:
        super().__init__(layers=[])
        self.states = list(states)

    def __len__(self) -> int:
        return len(self.states)

    def __repr__(self) -> str:
        return f"StreamBatch({len(self)} sequences of up to {self.get_seq_length()} tokens)"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Kept tokens of the longest sequence."""
        return max(state.sequence.length for state in self.states)

    def select(self, rows: Sequence[int]) -> StreamBatch:
        """The sequences of these rows, some perhaps several times. Copies nothing."""
        used: set[int] = set()
        states = []
        for row in rows:
            states.append(self.states[row].fork() if row in used else self.states[row])
            used.add(row)
        return StreamBatch(states)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """HF's beam search: row i continues row `beam_idx[i]`."""
        self.states = self.select(beam_idx.tolist()).states

    def flushed(self, encoder: StreamEncoder) -> StreamBatch:
        """The sequences as if their videos ended here."""
        return StreamBatch(encoder.flush(state) for state in self.states)

    def forks(self, rows: int) -> StreamBatch:
        """A fork for each of `rows` rows of text. A batch of one is forked for every row."""
        states = self.states * (rows if len(self) == 1 else 1)
        return StreamBatch(state.fork() for state in states)
