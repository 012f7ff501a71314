"""The registry of what is timed. To add a provider, write a `prepare` function and list it.

`prepare(inputs)` builds, untimed, everything that may be built ahead, and returns a `Run`. So
peers do not pay for masks, for joining `[cache | chunk]`, for repeated heads, or for their own
layout (rows in the order of the sequence, `(batch, heads, rows, head_dim)`). With several chunks
they make one call for each, so that none computes pairs that the mask forbids.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import vxl_kernels
from benchmarks.common.backward import sdpa_backward, triton_backward, vxl_backward
from benchmarks.common.cases import Case, Inputs, Paged
from benchmarks.common.run import Run
from benchmarks.peers.gpu import flash_attn, flashinfer
from benchmarks.peers.upstream import published
from benchmarks.peers.vllm_cpu import vllm_cpu, vllm_unsupported

__all__ = ["BACKWARD", "PROVIDERS", "ROPE_APPEND", "Provider"]


@dataclass(frozen=True)
class Provider:
    """`ours` marks this package's providers; the others are peers. `with_rope` providers also time
    the rotation, ours the append too; they are compared only with one another."""

    name: str
    prepare: Callable[[Inputs], Run]
    cases: tuple[str, ...] = ("chunk", "tail", "decode")
    devices: tuple[str, ...] = ("cpu", "cuda")
    ours: bool = False
    with_rope: bool = False
    only_if_asked: bool = False
    unsupported: Callable[[Case], str | None] = lambda case: None


# -- ours ----------------------------------------------------------------------------------


def _backend(case: Case) -> str:
    return "triton" if case.device == "cuda" else "cpu"


def _vxl_unsupported(case: Case) -> str | None:
    """Why vxl is not timed: the reference would run instead, and its time means nothing."""
    backend = _backend(case)
    reasons = vxl_kernels.backends()[backend]
    return f"backend {backend!r} cannot run here: {'; '.join(reasons)}" if reasons else None


def _vxl(x: Inputs, backend: str | None = None) -> Run:
    case = x.case
    cache = x.pages(x.k_seen, x.v_seen).arguments()
    q, k, v, layout = x.q_rotated, x.k_rotated, x.v, case.layout
    backend = backend or _backend(case)

    def call() -> torch.Tensor:
        return vxl_kernels.vst_attention(q, k, v, *cache, layout, backend=backend)

    return Run(call, lambda out: out)


def _kept_rows(case: Case) -> torch.Tensor:
    if case.layout is None:
        return torch.arange(case.rows, device=case.device)
    return case.layout.vst_rows(case.device)


def _rotated_cache(x: Inputs) -> Paged:
    """Pages that hold the cache before the call, with room for what it appends."""
    before = slice(0, x.case.cache_len)
    return x.pages(x.k_seen[:, before], x.v_seen[:, before], room=len(_kept_rows(x.case)))


def _vxl_rope(x: Inputs) -> Run:
    # In place: later repeats rotate rotated rows, which is the same work.
    case, q, k, v = x.case, x.q.clone(), x.k.clone(), x.v
    cache, layout, backend = _rotated_cache(x).arguments(), case.layout, _backend(case)

    def call() -> torch.Tensor:
        vxl_kernels.rope_append(q, k, v, *cache, layout, x.inv_freq, inplace=True, backend=backend)
        return vxl_kernels.vst_attention(q, k, v, *cache, layout, backend=backend)

    return Run(call, lambda out: out)


def _rope_append(x: Inputs) -> Run:
    case, q, k, v = x.case, x.q.clone(), x.k.clone(), x.v
    paged, layout, backend = _rotated_cache(x), case.layout, _backend(case)

    def call() -> object:
        return vxl_kernels.rope_append(
            q, k, v, *paged.arguments(), layout, x.inv_freq, inplace=True, backend=backend
        )

    def rows(out: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """As `rope_answer` lays it out."""
        kept, size = _kept_rows(case), case.geometry.page_size
        slots = case.cache_len + torch.arange(len(kept), device=case.device)
        page = paged.block_table[:, slots // size].long()
        place, values = x.k_rotated.clone(), x.v.clone()
        place[:, kept] = paged.k[page, slots % size]
        values[:, kept] = paged.v[page, slots % size]
        return torch.cat([*out, place, values], dim=2)

    return Run(call, rows)


# -- torch's SDPA ----------------------------------------------------------------------------


def _as_peers_like(case: Case, x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous()


def _join(case: Case, outs: list[torch.Tensor]) -> torch.Tensor:
    """Outputs of each chunk `(batch, heads, rows, head_dim)`, back to the case's rows."""
    back = case.sequence_rows().flatten().argsort()
    return torch.cat(outs, dim=2).transpose(1, 2)[:, back]


def _sdpa(x: Inputs, mask: str, **options: bool) -> Run:
    """One call a chunk. mask: "bool", "float", "causal" or "none"."""
    case = x.case
    group = case.geometry.heads // case.geometry.kv_heads
    calls = []
    for rows, seen in case.each_chunk():
        q = _as_peers_like(case, x.q_rotated[:, rows])
        k = _as_peers_like(case, torch.cat([x.k_seen[:, :seen], x.k_rotated[:, rows]], 1))
        v = _as_peers_like(case, torch.cat([x.v_seen[:, :seen], x.v[:, rows]], 1))
        keyword: dict = dict(options)
        if mask == "causal":
            keyword |= _causal_arguments(case, len(rows), k.shape[2])
        elif mask != "none":
            every = torch.ones(len(rows), k.shape[2], dtype=torch.bool, device=q.device)
            keyword["attn_mask"] = allowed = every.tril(diagonal=seen)
        if mask == "float":
            zero = torch.zeros(allowed.shape, dtype=q.dtype, device=q.device)
            keyword["attn_mask"] = zero.masked_fill_(~allowed, -torch.inf)
            k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        calls.append((q, k, v, keyword))

    def call() -> list[torch.Tensor]:
        return [F.scaled_dot_product_attention(q, k, v, **kw) for q, k, v, kw in calls]

    return Run(call, lambda outs: _join(case, outs))


def _cudnn(x: Inputs) -> Run:
    """cuDNN's attention alone, with the mask that it takes for the case."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    case = x.case
    square = case.cache_len + case.earlier_vsts == 0
    mask = "none" if case.is_decode else "causal" if square else "bool"
    run = _sdpa(x, mask, enable_gqa=True)

    def call() -> object:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return run.call()

    return Run(call, run.rows)


def _causal_arguments(case: Case, rows: int, keys: int) -> dict:
    if rows == keys:
        return {"is_causal": True}
    from torch.nn.attention.bias import causal_lower_right

    return {"attn_mask": causal_lower_right(rows, keys)}


def _causal_unsupported(case: Case) -> str | None:
    # On a GPU the flash kernel takes the mask aligned to the lower right. A CPU would only
    # build it densely.
    if case.device == "cpu" and (case.cache_len or case.earlier_vsts):
        return "is_causal is aligned to the top left: right only without a cache"
    return None


def _sdpa_packed(x: Inputs) -> Run:
    """Decode: the query heads of a KV head as rows, so that K and V are read once."""
    case, g = x.case, x.case.geometry
    group = g.heads // g.kv_heads
    q = x.q_rotated.view(case.batch, g.kv_heads, group, g.head_dim)
    k = _as_peers_like(case, torch.cat([x.k_seen, x.k_rotated], 1))
    v = _as_peers_like(case, torch.cat([x.v_seen, x.v], 1))
    shape = (case.batch, 1, g.heads, g.head_dim)
    return Run(lambda: F.scaled_dot_product_attention(q, k, v), lambda out: out.reshape(shape))


# -- FlexAttention ---------------------------------------------------------------------------


def _flex(x: Inputs) -> Run:
    """One call for all chunks, compiled for its shape. Rows are in sequence order, so that
    the mask is arithmetic on indices."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case, order = x.case, x.case.sequence_rows()
    length, flat = order.shape[1], order.flatten()
    cache_len, first_row = case.cache_len, case.cache_len + case.earlier_vsts
    vsts = case.layout.vsts_per_chunk if case.layout else 0

    def allowed(b, h, row, key):
        own = key - first_row
        same_chunk = (own >= 0) & (own // length == row // length)
        return (key < cache_len + row // length * vsts) | (same_chunk & (own <= row))

    q = _as_peers_like(case, x.q_rotated[:, flat])
    k = _as_peers_like(case, torch.cat([x.k_seen, x.k_rotated[:, flat]], 1))
    v = _as_peers_like(case, torch.cat([x.v_seen, x.v[:, flat]], 1))
    mask = create_block_mask(allowed, None, None, case.rows, k.shape[2], device=case.device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def call() -> list[torch.Tensor]:
        return [compiled(q, k, v, block_mask=mask, enable_gqa=True)]

    return Run(call, lambda outs: _join(case, outs))


# -- the registry ------------------------------------------------------------------------------


def _needs(module: str) -> Callable[[Case], str | None]:
    def unsupported(case: Case) -> str | None:
        try:
            importlib.import_module(module)
        except ImportError as error:
            return f"not installed ({error})"
        return None

    return unsupported


def _triton_unsupported(case: Case) -> str | None:
    return "; ".join(vxl_kernels.backends()["triton"]) or None


_ALL = (
    Provider("vxl", _vxl, ours=True, unsupported=_vxl_unsupported),
    Provider(
        "triton",
        lambda x: _vxl(x, "triton"),
        devices=("cuda",),  # and a CPU with --interpret
        ours=True,
        unsupported=_triton_unsupported,
    ),
    Provider("sdpa_bool", lambda x: _sdpa(x, "bool", enable_gqa=True), ("chunk", "tail")),
    Provider("sdpa_float", lambda x: _sdpa(x, "float"), ("chunk", "tail")),
    Provider(
        "sdpa_causal",
        lambda x: _sdpa(x, "causal", enable_gqa=True),
        ("chunk", "tail"),
        unsupported=_causal_unsupported,
    ),
    Provider("sdpa_gqa", lambda x: _sdpa(x, "none", enable_gqa=True), ("decode",)),
    Provider("sdpa_packed", _sdpa_packed, ("decode",)),
    Provider("sdpa_cudnn", _cudnn, devices=("cuda",)),
    Provider("flex", _flex, only_if_asked=True),
    Provider("vllm", lambda x: Run(*vllm_cpu(x)), devices=("cpu",), unsupported=vllm_unsupported),
    Provider(
        "flash_attn",
        lambda x: Run(*flash_attn(x)),
        devices=("cuda",),
        unsupported=_needs("flash_attn"),
    ),
    Provider(
        "flashinfer",
        lambda x: Run(*flashinfer(x)),
        devices=("cuda",),
        unsupported=_needs("flashinfer"),
    ),
    Provider("vxl+rope", _vxl_rope, ours=True, with_rope=True, unsupported=_vxl_unsupported),
    Provider("published", lambda x: Run(*published(x)), with_rope=True),
)
PROVIDERS = {p.name: p for p in _ALL}

# The case "backward": the same names, other calls.
BACKWARD = {
    p.name: p
    for p in (
        Provider("vxl", vxl_backward, ("backward",), ours=True, unsupported=_vxl_unsupported),
        Provider(
            "triton",
            triton_backward,
            ("backward",),
            devices=("cuda",),
            ours=True,
            unsupported=_triton_unsupported,
        ),
        Provider("sdpa_bool", lambda x: sdpa_backward(x, "bool"), ("backward",)),
        Provider("sdpa_float", lambda x: sdpa_backward(x, "float"), ("backward",)),
    )
}

# Not attention, so it has a case of its own.
ROPE_APPEND = Provider(
    "vxl", _rope_append, ("rope_append",), ours=True, unsupported=_vxl_unsupported
)
