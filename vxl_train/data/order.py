"""The order in which samples are trained, grouped by length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

__all__ = ["TrainingOrder"]
_MEGABATCH = 50  # batches whose samples are sorted by length together


class TrainingOrder(Sampler):
    """A sampler: the keys of `TrainingData`, epoch by epoch.

    Args:
        lengths: of the samples, estimated.
        batch: samples of a step, over all processes.
        seed: the order depends only on it and the epoch.
        by_length: each step holds samples of similar lengths. Processes then wait little for one
            another, and there is little padding.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int, by_length: bool) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.batch, self.seed, self.by_length = batch, seed, by_length
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(len(self.lengths))
        if self.by_length:
            order = self._grouped(order, generator)
        offset = self.epoch * len(order)
        return iter([offset + int(i) for i in order])

    def _grouped(self, order: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        size = self.batch * _MEGABATCH
        pieces = [order[i : i + size] for i in range(0, len(order), size)]
        order = np.concatenate([p[np.argsort(-self.lengths[p], kind="stable")] for p in pieces])
        full = len(order) // self.batch * self.batch
        steps = order[:full].reshape(-1, self.batch)
        steps = steps[generator.permutation(len(steps))]
        if len(steps):  # the longest first: a lack of memory shows at once
            longest = int(np.argmax(self.lengths[steps].max(axis=1)))
            steps = np.concatenate([steps[longest : longest + 1], np.delete(steps, longest, 0)])
        return np.concatenate([steps.reshape(-1), order[full:]])
