"""Holds the GPU kernels' machine code to bars without a GPU: compile, disassemble, count, model.

    python benchmarks/machine_code.py                        every kernel, every target
    python benchmarks/machine_code.py --target cuda:90 --kernel prefill
    python benchmarks/machine_code.py --check --json code.json

Compiles every shipped configuration (`vxl_kernels._triton.catalog`) and a plain flash attention
2 (`codegen/plain_flash.py`) ahead of time, with the tools in Triton's package; no device is needed.
`--check` looks for faults alone: it leaves the plain kernel out, and takes from Triton's cache what
is there.
In `codegen/`, `loops.py` describes how the loop over full tiles is found, `model.py` what its
counts mean, and `limits.py` what is assumed of each architecture.

The plain kernel gets its best configuration: among those of its sweep whose loop spills no
registers, the one with the highest modelled share of peak.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from benchmarks.codegen.compile import compile_kernel
from benchmarks.codegen.limits import LIMITS, TARGETS
from benchmarks.codegen.model import Measured, measure
from benchmarks.codegen.parse import ParseError
from benchmarks.codegen.table import (
    LEGEND,
    RELATION,
    compile_times,
    kv_table,
    save_json,
    table,
    violations,
)
from benchmarks.common.options import add_output_options, check_output_options

if TYPE_CHECKING:
    from vxl_kernels._triton.catalog import Compilation

Job = tuple[str, str, int, int, str]
"""(source, arch, index, head_dim, dtype): kernels themselves do not travel between processes."""


def kernels(
    source: str, arch: str, head_dim: int = 128, dtype: str = "bf16"
) -> Sequence[Compilation]:
    """Of "plain" or "shipped"."""
    if source == "plain":
        from benchmarks.codegen.plain_flash import sweep

        return sweep(arch, head_dim=head_dim, dtype=dtype)
    from vxl_kernels._triton.catalog import shipped

    return shipped(arch)


def run(job: Job) -> Measured:
    """Compiles and measures one kernel. An unreadable loop becomes an error in its line: the table
    continues, and the exit status reports it."""
    source, arch, index, head_dim, dtype = job
    kernel = kernels(source, arch, head_dim, dtype)[index]
    failed = Measured(
        kernel.kernel,
        kernel.config,
        LIMITS[arch].name,
        0,
        0,
        0,
        0,
        tile=dict(kernel.tile),
        head_dim=kernel.head_dim,
        dtype=kernel.dtype,
    )
    try:
        compiled = compile_kernel(kernel, arch)
    except Exception as error:  # any error of Triton, LLVM or ptxas
        first = (str(error).splitlines() or [""])[0]
        return replace(failed, error=f"does not compile: {type(error).__name__}: {first}")
    try:
        return measure(kernel, arch, compiled)
    except ParseError as error:
        return replace(failed, error=str(error), compile_seconds=compiled.seconds)


def comparable(target: str, dtype: str) -> str:
    """The dtype of the plain kernel that `dtype` is compared with. NVIDIA's code for both 16-bit
    types has the same instructions; AMD's rounds to bf16 in software."""
    return "bf16" if dtype == "fp16" and not target.endswith("gfx942") else dtype


def jobs(targets: Sequence[str], wanted: str | None, plain: bool = True) -> list[Job]:
    """The shipped kernels, and the plain one for each head size and 16-bit type among them. It has
    no padded head size."""
    result: list[Job] = []
    for arch in targets:
        compared = {(128, "bf16")}
        for i, k in enumerate(kernels("shipped", arch)):
            if wanted is None or wanted in k.kernel:
                result.append(("shipped", arch, i, 0, ""))
                forward = "keys" in k.tile and "products" not in k.tile
                padded = k.head_dim != k.tile.get("head_dim")
                if forward and not padded and k.dtype != "fp32" and k.tile["rows"] >= 64:
                    compared.add((k.head_dim, comparable(arch, k.dtype)))
        for head_dim, dtype in sorted(compared) if plain else ():
            count = len(kernels("plain", arch, head_dim, dtype))
            result += [("plain", arch, i, head_dim, dtype) for i in range(count)]
    return result


def with_baseline(rows: Sequence[Measured]) -> list[Measured]:
    """Fills `baseline`, and keeps only the best configuration of the plain kernel."""
    best: dict[tuple[str, int, str], Measured] = {}
    for r in rows:
        key = (r.target, r.head_dim, r.dtype)
        if r.kernel != "plain_flash" or r.share_of_peak is None or r.counts.get("local"):
            continue
        if key not in best or r.share_of_peak > (best[key].share_of_peak or 0.0):
            best[key] = r
    result = []
    for r in rows:
        plain = best.get((r.target, r.head_dim, comparable(r.target, r.dtype)))
        if r.kernel == "plain_flash" and r is not plain:
            continue
        forward = "keys" in r.tile and "products" not in r.tile
        if plain is not None and r.share_of_peak is not None and forward:
            r = replace(
                r,
                baseline=r.share_of_peak / (plain.share_of_peak or 1.0),
                baseline_config=plain.config,
                baseline_share=plain.share_of_peak,
                baseline_instructions_per_mflop=plain.instructions_per_mflop,
            )
        result.append(r)
    return result


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--kernel", help="only kernels whose name holds this")
    add_output_options(parser)
    parser.add_argument(
        "--check", action="store_true", help="fail if a kernel has a fault; no baseline"
    )
    parser.add_argument("--strict", action="store_true", help="also fail if a goal is not reached")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile"
    )
    options = parser.parse_args(arguments)
    check_output_options(parser, options)
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    return options


def collect(todo: Sequence[Job], workers: int) -> list[Measured]:
    if workers == 1:
        return [run(job) for job in todo]
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(run, todo))


@contextlib.contextmanager
def empty_cache() -> Iterator[None]:
    """Meanwhile Triton's cache is empty, so that times are those of compiling."""
    name = "TRITON_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    began = time.perf_counter()
    # What the tests have compiled is the same code. Faults need no times and no other kernel.
    faults_alone = options.check and not options.strict
    todo = jobs(options.target or TARGETS, options.kernel, plain=not faults_alone)
    with contextlib.nullcontext() if faults_alone else empty_cache():
        rows = with_baseline(collect(todo, options.jobs))
    for name in dict.fromkeys(r.target for r in rows):
        print(f"{name}\n{table([r for r in rows if r.target == name])}\n")
    print(f"{LEGEND}\n\n{RELATION}\n")
    print(
        "K and V fetched per key and output row, Qwen2-7B (28 query / 4 KV heads of 128), 16 bits,"
    )
    print(f"tiles of 128 rows, by the number of blocks in a launch:\n{kv_table(28, 4, 128, 128)}\n")
    if not faults_alone:
        times = ", ".join(
            f"{name} {seconds:.0f} s" for name, seconds in compile_times(rows).items()
        )
        print(f"compiling what is shipped, processor time: {times or '-'}")
    print(f"this run: {time.perf_counter() - began:.0f} s with {options.jobs} processes")
    if options.json:
        save_json(options.json, rows)
    faults, goals = violations(rows)
    for what, found in (("faults", faults), ("goals not reached", goals)):
        if found:
            print(f"\n{len(found)} {what}:", *found, sep="\n  ", file=sys.stderr)
    return int(bool((faults and (options.check or options.strict)) or (goals and options.strict)))


if __name__ == "__main__":
    sys.exit(main())
