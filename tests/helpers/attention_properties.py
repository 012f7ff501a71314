"""Properties of attention that every implementation has, to the bit.

`attend(inputs)` returns (out, lse) of one implementation.
"""

import dataclasses
from collections.abc import Callable

import torch

from vxl_kernels import ChunkLayout
from vxl_kernels.testing import Inputs

Attend = Callable[[Inputs], tuple[torch.Tensor, torch.Tensor]]


def _sequence(inputs: Inputs, b: int) -> Inputs:
    """The call with sequence b alone."""
    names = ("q", "k", "v", "block_table", "cache_seqlens")
    return dataclasses.replace(inputs, **{n: getattr(inputs, n)[b : b + 1] for n in names})


def check_chunks_at_once(attend: Attend, inputs: Inputs) -> None:
    """The chunks of one call give what they give one after the other."""
    layout = inputs.layout
    assert layout is not None
    assert layout.chunks > 1
    one = ChunkLayout(layout.window, layout.ratio, order=layout.order)
    out, lse = attend(inputs)
    for c in range(layout.chunks):
        rows = torch.nonzero(layout.chunk_index() == c).squeeze(1)
        alone = dataclasses.replace(
            inputs,
            layout=one,
            cache_seqlens=inputs.cache_seqlens + c * one.vsts_per_chunk,
            **{n: getattr(inputs, n)[:, rows] for n in ("q", "k", "v")},
        )
        alone_out, alone_lse = attend(alone)
        assert torch.equal(out[:, rows], alone_out)
        assert torch.equal(lse[:, :, rows], alone_lse)


def check_neighbours(attend: Attend, inputs: Inputs) -> None:
    """A sequence of a batch gives what it gives alone, even if sequence 1 is NaN."""
    out, lse = attend(inputs)
    others = [b for b in range(len(inputs.q)) if b != 1]
    for b in (1, *others):
        alone_out, alone_lse = attend(_sequence(inputs, b))
        assert torch.equal(out[b : b + 1], alone_out)
        assert torch.equal(lse[b : b + 1], alone_lse)
    for x in (inputs.q, inputs.k, inputs.v):
        x[1].fill_(torch.nan)
    poisoned, _ = attend(inputs)
    assert poisoned[1].isnan().all()
    for b in others:
        assert torch.equal(poisoned[b], out[b])


def check_strides(attend: Attend, inputs: Inputs, orders: dict[str, list[int]]) -> None:
    """Arguments whose dimensions lie in memory in another order, from an offset on and with poison
    between them, give the same.

    Args:
        orders: dimensions of each argument, from the outermost in memory to the innermost.
    """

    def restride(x: torch.Tensor, order: list[int]) -> torch.Tensor:
        poison = torch.nan if x.is_floating_point() else 10**6
        wide = torch.full([n + 1 for n in x.permute(order).shape], poison, dtype=x.dtype)
        back = torch.tensor(order).argsort().tolist()
        return wide[tuple(slice(1, None) for _ in order)].permute(back).copy_(x)

    odd = {name: restride(getattr(inputs, name), order) for name, order in orders.items()}
    out, lse = attend(dataclasses.replace(inputs, **odd))
    plain_out, plain_lse = attend(inputs)
    assert torch.equal(out, plain_out)
    assert torch.equal(lse, plain_lse)
