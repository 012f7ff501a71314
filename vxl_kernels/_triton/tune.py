"""`python -m vxl_kernels tune FILE`: times tile shapes on this GPU and keeps the best.

Nothing runs this by itself. A process uses the file if VXL_TRITON_CONFIGS names it; entries are
kept by GPU and Triton version, so one file can hold those of several machines. Results change in
their last bits with the tile shape, as they do from one GPU to another.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ..files import atomic_write
from . import architecture, configs, launch
from .launch_common import Launch

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
        "cache_seqlens": lens, "layout": _LAYOUT, "scale": head_dim**-0.5,
    }  # fmt: skip


def _run(
    config: configs.AttentionConfig | None, arguments: dict[str, Any]
) -> tuple[Launch, torch.Tensor, torch.Tensor]:
    """The launch with a config (None: the table's), and what came of it."""
    arch = architecture(arguments["q"].device)
    (planned,), out, lse = launch.plan_attention(**arguments, arch=arch, config=config)
    planned()
    return planned, out, lse


def _differs(x: torch.Tensor, y: torch.Tensor, eps: float) -> bool:
    """A block of 32 keys too many among 10,000 moves an LSE by 3e-3."""
    allowed = max(4 * eps * float(y.abs().max()), 1e-5)
    return not bool(((x.float() - y.float()).abs() <= allowed).all())


def tune(dtype: torch.dtype, head_dim: int) -> list[int]:
    """The fastest tile for a chunk over 8192 cached tokens: the fields of its config. A tile that
    does not compile, or whose result is not the shipped one's, is named and left out."""
    import triton

    arguments = _call(dtype, head_dim)
    _, *expected = _run(None, arguments)
    block_d = 1 << (head_dim - 1).bit_length()
    best, best_ms = None, float("inf")
    for config in candidates(block_d, dtype.itemsize):
        named = f"{dtype} head_dim {head_dim} {config}"
        try:
            planned, out, lse = _run(config, arguments)
            eps = torch.finfo(dtype).eps
            if _differs(out, expected[0], eps) or _differs(lse, expected[1], 2.0**-18):
                print(f"{named}: left out, its result is not the shipped tile's", flush=True)
                continue
            ms = triton.testing.do_bench(planned, warmup=20, rep=100, return_mode="median")
        except Exception as error:  # compilers, assemblers and drivers raise anything
            first = str(error).partition("\n")[0]
            print(f"{named}: left out, {type(error).__name__}: {first}", flush=True)
            continue
        print(f"{named}: {ms:.3f} ms", flush=True)
        if ms < best_ms:
            best, best_ms = config, ms
    if best is None:
        raise RuntimeError(f"tune: no tile works for {dtype} at head_dim {head_dim}, see above")
    return [best.block_m, best.block_n, best.masked_block_n, best.num_warps, best.num_stages]


def _widths(parser: argparse.ArgumentParser, head_dims: list[int]) -> dict[int, int]:
    """By the width that a tile is kept for (64, 128 or 256), the head_dim that it is timed at."""
    widths: dict[int, int] = {}
    for head_dim in head_dims:
        if not 16 <= head_dim <= 256:
            parser.error(f"--head-dim: got {head_dim}, expected 16 to 256")
        width = max(1 << (head_dim - 1).bit_length(), 64)
        if widths.setdefault(width, head_dim) != head_dim:
            parser.error(
                f"--head-dim: got {widths[width]} and {head_dim}, expected one of them: tiles are "
                "kept for head_dim up to 64, 128 and 256"
            )
    return widths


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m vxl_kernels tune", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    options = parser.parse_args(arguments)
    widths = _widths(parser, options.head_dim)
    if not torch.cuda.is_available():
        print("tune: this machine has no GPU that torch can use", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        known = configs.read_tuned(options.file) if options.file.exists() else {}
    except ValueError as error:
        print(f"tune: {error}", file=sys.stderr)
        return 1
    entry = known.setdefault(configs.tuning_key(device), {})
    print(f"{configs.tuning_key(device)} ({architecture(device)})")
    for (width, head_dim), dtype in product(widths.items(), (torch.bfloat16, torch.float32)):
        entry[configs.tuning_name(width, dtype.itemsize)] = tune(dtype, head_dim)
        atomic_write(options.file, json.dumps(known, indent=1) + "\n", durable=False)
    return 0
