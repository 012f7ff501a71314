"""The case "backward": gradients of attention, ours and torch's, and their float64 answer.

Only the backward pass is timed, for a given gradient of the output; the forward pass ran before.
All chunks of a sequence are one call for us. Peers make one call a chunk, as in the forward cases,
and autograd joins their gradients of K and V.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

import vxl_kernels
from benchmarks.common.cases import Case, Inputs, Paged
from benchmarks.common.oracle import EPS, Answer
from benchmarks.common.run import Run
from vxl_kernels.layout import layout_to_ints

__all__ = ["backward_answer", "sdpa_backward", "triton_backward", "vxl_backward"]

Forward = Callable[..., torch.Tensor]


def _grad_out(case: Case) -> torch.Tensor:
    g = case.geometry
    generator = torch.Generator(case.device).manual_seed(3)
    shape = (case.batch, case.rows, g.heads, g.head_dim)
    return torch.randn(shape, generator=generator, device=case.device).to(case.dtype)


def _checked_part(case: Case, grads: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """What is compared, `(batch, rows, group + 2, head_dim)`: dQ of the query heads of KV head
    0, its dK and dV. After the rows of the call come the cache entries, which have no dQ."""
    group = case.geometry.heads // case.geometry.kv_heads
    dq, dk, dv, dk_seen, dv_seen = grads
    own = torch.cat([dq[:, :, :group], dk[:, :, :1], dv[:, :, :1]], dim=2)
    seen = torch.cat([dk_seen[:, :, :1], dv_seen[:, :, :1]], dim=2)
    return torch.cat([own, F.pad(seen, (0, 0, group, 0))], dim=1)


def _run(leaves: list[torch.Tensor], forward: Forward, part: Callable) -> Run:
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in leaves]
        out = forward(*leaves)

    def call() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out[0], leaves, out[1], retain_graph=True)

    return Run(call, part)


def vxl_backward(x: Inputs) -> Run:
    case, layout = x.case, x.case.layout
    paged = x.pages(x.k_seen, x.v_seen)
    grad = _grad_out(case)

    def forward(q, k, v, k_cache, v_cache):
        table = paged.block_table, paged.cache_seqlens
        return vxl_kernels.vst_attention(q, k, v, k_cache, v_cache, *table, layout), grad

    return _run([x.q_rotated, x.k_rotated, x.v, paged.k, paged.v], forward, _paged_part(x, paged))


def _paged_part(x: Inputs, paged: Paged) -> Callable:
    def part(grads: tuple[torch.Tensor, ...]) -> torch.Tensor:
        size = x.case.geometry.page_size
        slots = torch.arange(x.k_seen.shape[1], device=x.case.device)
        at = paged.block_table[:, slots // size].long(), slots % size
        return _checked_part(x.case, (*grads[:3], grads[3][at], grads[4][at]))

    return part


def triton_backward(x: Inputs) -> Run:
    """The launches alone, without autograd; under the interpreter too."""
    case = x.case
    paged, grad = x.pages(x.k_seen, x.v_seen), _grad_out(case)
    tensors = (
        x.q_rotated,
        x.k_rotated,
        x.v,
        paged.k,
        paged.v,
        paged.block_table,
        paged.cache_seqlens,
    )
    how = layout_to_ints(case.layout), case.geometry.head_dim**-0.5, "triton"
    out, lse = torch.ops.vxl.vst_attention(*tensors, *how)
    grads = grad, torch.zeros_like(lse)

    def call() -> tuple[torch.Tensor, ...]:
        return torch.ops.vxl.vst_attention_backward(*grads, *tensors, out, lse, *how)

    return Run(call, _paged_part(x, paged))


def sdpa_backward(x: Inputs, mask: str) -> Run:
    """mask: "bool" with enable_gqa, or "float" with K and V repeated."""
    case, group = x.case, x.case.geometry.heads // x.case.geometry.kv_heads
    order, grad = case.sequence_rows(), _grad_out(case)
    masks = []
    for rows, seen in case.each_chunk():
        allowed = torch.ones(len(rows), seen + len(rows), dtype=torch.bool, device=grad.device)
        allowed = allowed.tril(diagonal=seen)
        if mask == "float":
            zero = torch.zeros(allowed.shape, dtype=case.dtype, device=grad.device)
            allowed = zero.masked_fill_(~allowed, -torch.inf)
        masks.append((rows, seen, allowed))

    def forward(q, k, v, k_seen, v_seen):
        outs = []
        for rows, seen, allowed in masks:
            keys, values = (
                torch.cat([cache[:, :seen], own[:, rows]], 1).transpose(1, 2)
                for cache, own in ((k_seen, k), (v_seen, v))
            )
            if mask == "float":
                keys, values = (t.repeat_interleave(group, dim=1) for t in (keys, values))
            queries = q[:, rows].transpose(1, 2)
            outs.append(
                F.scaled_dot_product_attention(
                    queries, keys, values, attn_mask=allowed, enable_gqa=mask == "bool"
                )
            )
        flat = order.flatten()
        return torch.cat(outs, dim=2).transpose(1, 2), grad[:, flat]

    leaves = [x.q_rotated, x.k_rotated, x.v, x.k_seen, x.v_seen]
    return _run(leaves, forward, lambda grads: _checked_part(case, grads))


def backward_answer(x: Inputs) -> Answer:
    """KV head 0 in float64 and in float32, a dense softmax a chunk. With 16 bits of storage the
    second rounds P and dS to the storage."""
    (exact, mass), (plain, _) = (_dense(x, dtype) for dtype in (torch.float64, torch.float32))
    rows = torch.arange(exact.shape[1], device=x.case.device)
    return Answer(rows, exact, plain.to(x.case.dtype), 4 * EPS * mass.amax((2, 3)))


def _dense(x: Inputs, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients, and their sums of absolute terms."""
    case, group = x.case, x.case.geometry.heads // x.case.geometry.kv_heads
    q, grad = (t[:, :, :group].to(dtype) for t in (x.q_rotated, _grad_out(case)))
    k, v, k_seen, v_seen = (t[:, :, 0].to(dtype) for t in (x.k_rotated, x.v, x.k_seen, x.v_seen))
    found = [[torch.zeros_like(t) for t in (q, k, v, k_seen, v_seen)] for _ in range(2)]
    scale = 1 / math.sqrt(q.shape[3])
    for rows, seen in case.each_chunk():
        hidden = torch.ones(len(rows), seen + len(rows), device=q.device).tril(seen) == 0
        for b in range(case.batch):
            keys = torch.cat([k_seen[b, :seen], k[b, rows]])
            values = torch.cat([v_seen[b, :seen], v[b, rows]])
            for h in range(group):
                queries, out_grad = q[b, rows, h], grad[b, rows, h]
                scores = queries @ keys.T * scale
                p = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
                dp, dp_mass = out_grad @ values.T, out_grad.abs() @ values.abs().T
                ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
                ds_mass = p * (dp_mass + (p * dp_mass).sum(-1, keepdim=True)) * scale
                if dtype == torch.float32:  # a plain evaluation multiplies numbers of the storage
                    p, ds = (t.to(case.dtype).to(dtype) for t in (p, ds))
                signed = ds, queries, keys, out_grad
                absolute = ds_mass, queries.abs(), keys.abs(), out_grad.abs()
                for sums, terms in zip(found, (signed, absolute), strict=True):
                    _add_products(sums, terms, p, (b, rows, seen, h))
    dense, masses = (
        _checked_part(case, (dq, *(t[:, :, None] for t in (dk, dv, dk_seen, dv_seen))))
        for dq, dk, dv, dk_seen, dv_seen in found
    )
    return dense, masses


def _add_products(sums: list[torch.Tensor], terms: tuple, p: torch.Tensor, at: tuple) -> None:
    dq, dk, dv, dk_seen, dv_seen = sums
    ds, queries, keys, out_grad = terms
    b, rows, seen, h = at
    dq[b, rows, h] = ds @ keys
    key_grad, value_grad = ds.T @ queries, p.T @ out_grad
    dk_seen[b, :seen] += key_grad[:seen]
    dv_seen[b, :seen] += value_grad[:seen]
    dk[b, rows] += key_grad[seen:]
    dv[b, rows] += value_grad[seen:]
