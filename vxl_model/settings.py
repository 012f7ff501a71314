"""How the model runs: backend, chunks a call, which bits are promised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["ExecutionSettings"]


@dataclass
class ExecutionSettings:
    """How a model computes; none of it changes what it computes. `model.settings`.

    Attributes:
        chunks_per_step: windows that go through the layers together; None chooses by the
            device's memory.
        order: of a chunk's rows, "split" or "interleaved".
        backend: a name of `vxl_kernels.backends()`; None for the device's own.
        skip_last_layer_outputs: the last layer keeps K and V and computes nothing else where its
            output is not read. Off only for comparisons.
        batch_invariant: dense products take the rows of one sequence at a time, so that a
            sequence's result does not depend on its neighbours, to the bit. Off, decoding a
            batch reads each weight once instead of once a sequence. Matrix libraries choose
            their kernel by the number of rows: MKL rounds 1 row, 2 rows and 8 rows differently.
        page_size: rows of a page of the cache.
    """

    chunks_per_step: int | None = None
    order: Literal["split", "interleaved"] = "split"
    backend: str | None = None
    skip_last_layer_outputs: bool = True
    batch_invariant: bool = True
    page_size: int = 128
