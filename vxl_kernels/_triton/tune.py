"""`python -m vxl_kernels._triton.tune FILE`: times tile shapes on this GPU and keeps the best.

Nothing runs this by itself. A process uses the file if VXL_TRITON_CONFIGS names it; entries are
kept by GPU and Triton version, so one file may serve several machines. Results change in their
last bits with the tile shape, as they do from one GPU to another.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch

from . import architecture, configs, launch

__all__ = ["candidates", "main", "tune"]

_HEADS, _KV_HEADS, _PAGE_SIZE, _CACHED = 28, 4, 128, 8192
_LAYOUT = [1440, 8, 1, 1]


def candidates(block_d: int, itemsize: int) -> list[configs.AttentionConfig]:
    """Tiles worth a try: up to 64 KiB of accumulator and scores for 4 warps, 128 for 8."""
    found = []
    for m, n, warps, stages in product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)):
        registers = m * (block_d + n) * 4
        shared = (m + 2 * stages * n) * block_d * itemsize
        if registers <= warps * (16 << 10) * 1.5 and shared <= 220 << 10:
            found.append(configs.AttentionConfig(m, n, min(n, 64), warps, stages))
    return found


def _call(dtype: torch.dtype, head_dim: int) -> dict[str, Any]:
    """One chunk over a cache."""
    rows = _LAYOUT[0] + _LAYOUT[0] // _LAYOUT[1]
    pages = _CACHED // _PAGE_SIZE

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").to(dtype)

    q, k = normal(1, rows, _HEADS, head_dim), normal(1, rows, _KV_HEADS, head_dim)
    cache = normal(pages, _PAGE_SIZE, _KV_HEADS, head_dim)
    table = torch.arange(pages, device="cuda", dtype=torch.int32)[None]
    lens = torch.full((1,), _CACHED, device="cuda", dtype=torch.int32)
    return {
        "q": q, "k": k, "v": k, "k_cache": cache, "v_cache": cache, "block_table": table,
        "cache_lens": lens, "layout": _LAYOUT, "scale": head_dim**-0.5,
    }  # fmt: skip


def tune(dtype: torch.dtype, head_dim: int) -> list[int]:
    """The fastest tile for a chunk over 8192 cached tokens: the fields of its config."""
    import triton

    arguments = _call(dtype, head_dim)
    best, best_ms = None, float("inf")
    for config in candidates(head_dim, dtype.itemsize):
        planned, _, _ = launch.plan_attention(**arguments, config=config)
        try:
            ms = triton.testing.do_bench(planned[0], warmup=20, rep=100, return_mode="median")
        except triton.runtime.errors.OutOfResources:
            continue
        print(f"{dtype} head_dim {head_dim} {config}: {ms:.3f} ms", flush=True)
        if ms < best_ms:
            best, best_ms = config, ms
    assert best is not None
    return [best.block_m, best.block_n, best.edge_n, best.num_warps, best.num_stages]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tune: this machine has no GPU that torch can use", file=sys.stderr)
        return 1
    known = json.loads(options.file.read_text()) if options.file.exists() else {}
    entry = known.setdefault(configs.tuning_key(), {})
    print(f"{configs.tuning_key()} ({architecture(torch.device('cuda'))})")
    for head_dim, dtype in product(options.head_dim, (torch.bfloat16, torch.float32)):
        entry[configs.tuning_name(head_dim, dtype.itemsize)] = tune(dtype, head_dim)
        options.file.write_text(json.dumps(known, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
