"""Fills Triton's cache ahead, in parallel: launches then find their kernels there.

    python benchmarks/codegen/ahead.py [--target cuda:90] [--jobs N] [--reached | --few]

Compiles what Qwen2-7B reaches (prefill, decode of any number of rows, append, gradients) and what
the catalog ships. It needs no GPU. On a machine with one, the target is that GPU's.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout need not be installed

from vxl_kernels import ChunkLayout, ops

if TYPE_CHECKING:
    from vxl_kernels._triton.catalog import Compilation

__all__ = ["compile_all", "distinct", "reached"]

# Rows of a text, one for each tile and split of Qwen2-7B's seven heads a KV head, up to prefill.
_ROWS = (1, 3, 9, 18, 36, 73, 146, 292, 438, 439)


def reached(
    arch: str,
    heads: int = 28,
    kv_heads: int = 4,
    head_dim: int = 128,
    dtypes: Iterable[torch.dtype] = (torch.bfloat16,),
    page_sizes: Iterable[int] = (128,),
    gradients: bool = True,
) -> list[Compilation]:
    """Every kernel that a model of this geometry launches over a paged cache, batches of one and
    of several, window by window, and sequences of different rows in one call."""
    from vxl_kernels._triton import catalog, launch, launch_backward, launch_ragged

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    calls = [(None, rows) for rows in _ROWS]
    chunk = ChunkLayout(1440, 8)
    found: list[Compilation] = []
    for dtype in dtypes:
        for page_size in page_sizes:
            for of_call, rows in [(chunk, chunk.rows), *calls]:
                layout = ops.layout_to_ints(of_call)
                for batch in (1, 2):
                    q = empty(batch, rows, heads, head_dim, dtype=dtype)
                    k = empty(batch, rows, kv_heads, head_dim, dtype=dtype)
                    pages = empty(512, page_size, kv_heads, head_dim, dtype=dtype)
                    table = empty(batch, 64, dtype=torch.int32)
                    lens = empty(batch, dtype=torch.int32)
                    cache = (pages, pages, table, lens)
                    scale = head_dim**-0.5
                    planned = launch.plan_attention(q, k, k, *cache, layout, scale, arch)[0]
                    inv_freq = empty(head_dim // 2, dtype=torch.float32)
                    rotate = (q, k, k, *cache, layout, inv_freq, q, k)
                    planned.append(launch.plan_rope_append(*rotate))
                    if gradients and layout and batch == 1:
                        lse = empty(batch, heads, rows, dtype=torch.float32)
                        planned += launch_backward.plan_attention_backward(
                            q, lse, q, k, k, *cache, q, lse, layout, scale, arch
                        )[0]
                    how = f"d{head_dim} pages of {page_size} {'chunk' if layout else rows}"
                    found += [catalog.compilation(p, how, dtype) for p in planned]
            rows, sequences = chunk.rows + 122, 24  # a window, a text and 22 decode rows
            q, k = (empty(rows, n, head_dim, dtype=dtype) for n in (heads, kv_heads))
            table, layouts = (empty(sequences, n, dtype=torch.int32) for n in (64, 5))
            lens = empty(sequences, dtype=torch.int32)
            call = (q, k, k, pages, pages, table, lens, layouts)
            planned = launch_ragged.plan_attention_varlen(*call, sequences, scale, arch)[0]
            planned.append(launch_ragged.plan_rope_append_varlen(*call, inv_freq, q, k))
            how = f"d{head_dim} pages of {page_size} ragged"
            found += [catalog.compilation(p, how, dtype) for p in planned]
    return distinct(found)


def distinct(entries: Iterable[Compilation]) -> list[Compilation]:
    """One of all configurations that compile to the same code."""
    found: dict[str, Compilation] = {}
    for e in entries:
        same = (e.kernel, e.signature, e.constexprs, str(e.attrs), e.num_warps, e.num_stages)
        found.setdefault(json.dumps([*same, e.options], default=str, sort_keys=True), e)
    return list(found.values())


def _compile(entries: Sequence[Compilation], arch: str, failed: dict[str, str]) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, _, name = arch.partition(":")
    target = GPUTarget(backend, int(name), 32)
    for e in entries:
        options = {"num_warps": e.num_warps, "num_stages": e.num_stages, **e.options}
        source = ASTSource(e.fn, e.signature, e.constexprs, e.attrs)
        try:
            triton.compile(source, target=target, options=options)
        except Exception as error:  # a compiler raises anything
            failed[f"{e.kernel} {e.config}"] = f"{type(error).__name__}: {error}"[:300]


def compile_all(entries: Sequence[Compilation], arch: str, jobs: int) -> dict[str, str]:
    """Compiles into Triton's cache. Returns what failed, by name."""
    if jobs == 1:
        failed: dict[str, str] = {}
        _compile(entries, arch, failed)
        return failed
    # Forked: kernels cannot be pickled. Nothing here has touched a GPU, which would not survive it.
    fork = multiprocessing.get_context("fork")
    with fork.Manager() as manager:
        shared = manager.dict()
        workers = [
            fork.Process(target=_compile, args=(entries[i::jobs], arch, shared))
            for i in range(min(jobs, len(entries)))
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        ended = {
            f"process {i}": f"status {w.exitcode}" for i, w in enumerate(workers) if w.exitcode
        }
        return {**dict(shared), **ended}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", help="of cuda:80, cuda:90, cuda:100; default the GPU's")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--reached", action="store_true", help="not the rest of the catalog")
    parser.add_argument(
        "--few", action="store_true", help="decode of one row and append: what a smoke test runs"
    )
    parser.add_argument("--small", action="store_true", help="one kernel, to see that it compiles")
    options = parser.parse_args(arguments)
    from vxl_kernels._triton import catalog, configs

    arch = options.target or "cuda:90"
    if options.target is None and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        arch = f"cuda:{major}{minor}"
    torch.set_num_threads(1)
    entries = reached(arch)
    if options.few or options.small:
        wanted = ("rope_append",) if options.small else ("decode", "merge", "rope_append")
        entries = [e for e in entries if e.kernel in wanted and not e.config.endswith("chunk")]
        entries = entries[:1] if options.small else [e for e in entries if e.config.endswith(" 1")]
    elif not options.reached:
        entries = distinct([*entries, *catalog.shipped(configs.family(arch))])
    start = time.perf_counter()
    failed = compile_all(entries, arch, options.jobs)
    for name, why in failed.items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    seconds = time.perf_counter() - start
    print(
        f"compiled {len(entries) - len(failed)} of {len(entries)} kernels for {arch} in "
        f"{seconds:.0f} s with {options.jobs} processes"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
