"""How a model computes: backend, windows per step, batch invariance, page size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["ExecutionSettings"]


@dataclass
class ExecutionSettings:
    """How a model computes. No setting changes what it computes. They are `model.settings`.

    Attributes:
        chunks_per_step: windows that go through the layers together. None chooses by the
            device's memory.
        order: of a chunk's rows, "split" or "interleaved".
        backend: a name of `vxl_kernels.backends()`. None takes the device's own.
        skip_last_layer_outputs: where the last layer's output is not read, the layer keeps K and V
            and computes nothing else. Turn it off only for comparisons.
        batch_invariant: dense products take the rows of one sequence at a time. A sequence's
            result is then bitwise the same whatever else is in the batch. Without it, decoding
            a batch reads each weight once instead of once per sequence. Matrix libraries choose
            their kernel by the number of rows: MKL rounds 1 row, 2 rows and 8 rows differently.
        page_size: rows of a page of the cache.
    """

    chunks_per_step: int | None = None
    order: Literal["split", "interleaved"] = "split"
    backend: str | None = None
    skip_last_layer_outputs: bool = True
    batch_invariant: bool = True
    page_size: int = 128
