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
        order: of a chunk's rows, "split" or "interleaved". Training passes are always split.
        backend: a name of `vxl_kernels.backends()`. None takes the device's own.
        skip_last_layer_outputs: where the last layer's output is not read, the layer keeps K and V
            and computes nothing else. Turn it off only for comparisons.
        batch_invariant: a sequence's result is bitwise the same whatever else is in the batch.
            Decoding steps take `invariant_linear`, other passes one sequence at a time. Without
            it products are the matrix library's, which chooses its kernel by the number of rows:
            MKL rounds 1 row, 2 rows and 8 rows differently.
        packing: in training the sequences of a batch, of any shapes, are packed into one pass
            without padding. Without it each has a pass of its own, which takes less memory under
            gradient checkpointing.
        page_size: rows of a page of the cache.
        decode_graphs: a decoding step is captured as a CUDA graph, once for 1, 2, 4, 8, 16, 24 and
            so on sequences, and then started by the host as one. The model has to be on one CUDA
            device. Switch it off for a step after modules were replaced. It has not run on a GPU
            yet.
    """

    chunks_per_step: int | None = None
    order: Literal["split", "interleaved"] = "split"
    backend: str | None = None
    skip_last_layer_outputs: bool = True
    batch_invariant: bool = True
    packing: bool = True
    page_size: int = 128
    decode_graphs: bool = False
