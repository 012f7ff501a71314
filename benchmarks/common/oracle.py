"""The oracle: a float64 answer and a derived tolerance decide whether a result is right.

A subset of rows (random ones, and those at the edges of chunks and VSTs) is computed in
float64 from the same quantised inputs. With errors measured relative to the largest output
of their row, a provider may err, in each row, at most

    2 * (the worst error of a plain evaluation of these rows) + 8 * eps(float32)
      + (4 + |LSE| / 2) * eps(float32) * (sum p |v|) / (the row's largest output)

The plain evaluation is one dense softmax in float32. With 16 bits of storage it rounds what its
peers round: the weights before the second product, the result, and RoPE's tables and steps
(`published`). So the first term is the error of an honest evaluation of the same numbers, and
twice that leaves room for another order of summation. The second term allows a few roundings
where the plain evaluation is exact (one row that sees one key). The last term is what float32
sums and scores may cost in any order of summation. Without it the verdict would depend on the
BLAS library and its number of threads, whose plain evaluation can be accurate by luck. For
gradients it is `4 * eps(float32)` times their sums of absolute terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.common.cases import Case, Inputs
from vxl_kernels import reference

__all__ = ["ROWS_CHECKED", "TOLERANCE_TEXT", "Answer", "Verdict", "attention_answer", "rope_answer"]

ROWS_CHECKED = 96
EPS = torch.finfo(torch.float32).eps
TOLERANCE_TEXT = "error <= 2x that of a plain softmax + what float32 sums may cost, row by row"


@dataclass(frozen=True)
class Verdict:
    max_error: float
    ok: bool


@dataclass(frozen=True)
class Answer:
    """Exact rows of an output, the plain low-precision evaluation of the same, and what float32
    sums may cost in each."""

    rows: torch.Tensor
    exact: torch.Tensor  # (batch, rows, heads, head_dim), float64
    plain: torch.Tensor
    sums: torch.Tensor | None = None  # (batch, rows)

    def judge(self, output: torch.Tensor) -> Verdict:
        """output: all rows, `(batch, rows, heads, head_dim)`."""
        error = (output[:, self.rows].double() - self.exact).abs().amax((2, 3))
        plain_error = (self.plain.double() - self.exact).abs().amax((2, 3))
        largest = self.exact.abs().amax((2, 3))
        relative = 2 * (plain_error / largest).max() + 8 * EPS
        allowed = relative * largest + (0 if self.sums is None else self.sums)
        # A NaN compares false, so it fails.
        ok = bool((error <= allowed).all()) and bool(output.isfinite().all())
        return Verdict(error.max().item(), ok)


def rows_to_check(case: Case) -> torch.Tensor:
    """Rows at the edges of every chunk and around its first and last VST, and random ones."""
    sequence = case.sequence_rows().cpu()
    length = sequence.shape[1]
    edges = {0, 1, length - 2, length - 1}
    if case.layout is not None:
        step = case.layout.ratio + 1
        last = (case.layout.vsts_per_chunk - 1) * step
        edges |= {at + step + d for at in (0, last) for d in (-2, -1, 0, 1)}
    inside = sorted(e for e in edges if 0 <= e < length)
    random = torch.randperm(case.rows, generator=torch.Generator().manual_seed(2))
    rows = torch.cat([sequence[:, inside].flatten(), random[:ROWS_CHECKED]]).unique()
    if len(rows) > ROWS_CHECKED:
        # Keep all edges; drop random rows.
        edge = torch.isin(rows, sequence[:, inside])
        others = rows[~edge][: max(0, ROWS_CHECKED - int(edge.sum()))]
        rows = torch.cat([rows[edge], others]).sort().values
    return rows.to(case.device)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    dtype: torch.dtype,
    storage: torch.dtype,
    rotate: Callable[[torch.Tensor], torch.Tensor] = lambda k: k,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense softmax attention in `dtype`, its weights and result rounded to `storage`, and what
    float32 sums may cost in each row, `(batch, rows)`. One KV head at a time, to bound the memory;
    `rotate` turns its keys, `(1, keys, 1, head_dim)`."""
    batch, rows, heads, head_dim = q.shape
    group = heads // k.shape[2]
    out = torch.empty(q.shape, dtype=storage, device=q.device)
    sums = torch.zeros(q.shape[:2], dtype=torch.float64, device=q.device)
    for b in range(batch):
        for h in range(k.shape[2]):
            packed = slice(h * group, (h + 1) * group)
            queries = q[b, :, packed].to(dtype).reshape(rows * group, head_dim)
            keys = rotate(k[b : b + 1, :, h : h + 1])[0, :, 0].to(dtype)
            scores = (queries @ keys.T).div_(math.sqrt(head_dim))
            scores = scores.view(rows, group, -1).masked_fill_(~mask[:, None], -math.inf)
            # Not divided by the sum yet: small weights would be subnormal in float16.
            largest = scores.amax(-1, keepdim=True)
            weights = scores.sub_(largest).exp_()
            total = weights.sum(-1, keepdim=True)
            values = v[b, :, h].to(dtype)
            out[b, :, packed] = weights.to(storage).to(dtype) @ values / total
            mass = (weights @ values.abs() / total).amax(-1)
            lse = (largest + total.log()).squeeze(-1)
            cost = (EPS * (4 + lse.abs() / 2) * mass).amax(1)
            sums[b] = torch.maximum(sums[b], cost.double())
    return out, sums


def _rotate64(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """RoPE in float64, at angles rounded to float32. That rounding is part of the trained model;
    near position 20,000 it changes results by 1e-3."""
    angle = (positions.float()[:, None] * inv_freq[None, :]).double()
    cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]
    first, second = x.double().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _rotate_plain(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """RoPE with tables and steps in the storage dtype, as transformers does it."""
    angle = positions.float()[:, None] * inv_freq[None, :]
    cos, sin = (t.to(x.dtype)[None, :, None] for t in (angle.cos(), angle.sin()))
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention_answer(inputs: Inputs, with_rope: bool) -> Answer:
    """The result of attention over the rotated inputs; with `with_rope`, of RoPE and attention
    together over the unrotated inputs."""
    case = inputs.case
    rows = rows_to_check(case)
    mask = case.mask()[rows]
    v = torch.cat([inputs.v_seen, inputs.v], dim=1)
    if not with_rope:
        q, k = inputs.q_rotated[:, rows], torch.cat([inputs.k_seen, inputs.k_rotated], dim=1)
        plain, _ = _attend(q, k, v, mask, torch.float32, case.dtype)
        exact, sums = _attend(q, k, v, mask, torch.float64, torch.float64)
        return Answer(rows, exact, plain, sums)

    at = case.positions()
    kept = inputs.with_earlier_vsts(inputs.k_kept, inputs.k)
    places = torch.cat([torch.arange(kept.shape[1], device=at.device), at])
    q, k = inputs.q[:, rows], torch.cat([kept, inputs.k], dim=1)

    def attend(rotate, dtype: torch.dtype, storage: torch.dtype):
        def turned(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return rotate(x, positions, inputs.inv_freq)

        queries = turned(q, at[rows])
        return _attend(queries, k, v, mask, dtype, storage, lambda x: turned(x, places))

    plain, _ = attend(_rotate_plain, torch.float32, case.dtype)
    exact, sums = attend(_rotate64, torch.float64, torch.float64)
    return Answer(rows, exact, plain, sums)


def rope_answer(inputs: Inputs) -> Answer:
    """The whole result of `rope_append`, side by side as heads: the rotated q and k, and the cached
    K and V of appended rows. Rows that are not appended have their own k and v there."""
    case, turn, at = inputs.case, inputs.inv_freq, inputs.case.positions()
    rows = torch.arange(case.rows, device=case.device)
    kept = rows if case.layout is None else case.layout.vst_rows(case.device)
    place = at.clone()
    place[kept] = case.cache_len + torch.arange(len(kept), device=case.device)

    def both(rotate) -> torch.Tensor:
        v = inputs.v.double()
        parts = [rotate(inputs.q, at), rotate(inputs.k, at), rotate(inputs.k, place), v]
        return torch.cat([p.double() for p in parts], dim=2)

    def low(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return torch.stack([reference.rotate(one, positions, turn) for one in x])

    return Answer(rows, both(lambda x, p: _rotate64(x, p, turn)), both(low))
