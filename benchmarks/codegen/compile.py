"""Ahead-of-time compilation without a GPU, and what the tools report about the result."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.codegen.limits import LIMITS
from benchmarks.codegen.parse import Function, ParseError, read_amdgcn, read_sass

if TYPE_CHECKING:
    from vxl_kernels._triton.catalog import Compilation

__all__ = ["Compiled", "compile_kernel", "read_resources", "target_of"]


@dataclass(frozen=True)
class Compiled:
    """Machine code and resources. `spill_bytes` is stack per thread; `local` counts the
    instructions that touch it; `dots` counts the products of Triton's own intermediate form."""

    function: Function
    text: str
    ptx: str
    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_memory_columns: int
    dots: int
    seconds: float
    """Processor time of compiling."""


def target_of(arch: str) -> Any:
    """Triton's target of "cuda:80", "cuda:90", "cuda:100" or "hip:gfx942"."""
    from triton.backends.compiler import GPUTarget

    if arch not in LIMITS:
        raise ValueError(f"target is {arch!r}, expected one of {', '.join(LIMITS)}")
    backend, name = arch.split(":")
    return GPUTarget(backend, int(name) if name.isdigit() else name, LIMITS[arch].warp)


def _tool(name: str) -> str:
    """The path of a program in Triton's package."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: this needs Triton with its NVIDIA tools")
    return str(path)


def read_resources(text: str) -> tuple[int, int]:
    """`(registers, stack bytes)` per thread from `cuobjdump --dump-resource-usage`."""
    found = re.search(r"\bREG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise ParseError("no line with REG: and STACK: in the resource usage")
    return int(found.group(1)), int(found.group(2))


def _amd_number(text: str, key: str) -> int:
    found = re.search(rf"^\s*\.{key}:\s*(\d+)", text, flags=re.MULTILINE)
    if found is None:
        raise ParseError(f"no .{key} in the assembly's metadata")
    return int(found.group(1))


def _processor_seconds() -> float:
    """Processor time of this process and its tools; other work on the machine does not count."""
    return sum(os.times()[:4])


def compile_kernel(kernel: Compilation, arch: str) -> Compiled:
    """Compiles one configuration for `arch` without a device."""
    import triton
    from triton.compiler import ASTSource

    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages, **kernel.options}
    # 3.10 changes the default; all released kernels were tuned with fusion
    options.setdefault("enable_fp_fusion", True)
    source = ASTSource(kernel.fn, kernel.signature, kernel.constexprs, kernel.attrs)
    began = _processor_seconds()
    built = triton.compile(source, target=target_of(arch), options=options)
    seconds = _processor_seconds() - began
    dots = len(re.findall(r"\btt\.dot(?:_scaled)?\b", built.asm["ttir"]))
    shared = int(built.metadata.shared)
    name = built.metadata.name
    if "amdgcn" in built.asm:
        text = built.asm["amdgcn"]
        spills = 4 * _amd_number(text, "vgpr_spill_count") + 4 * _amd_number(
            text, "sgpr_spill_count"
        )
        stack = _amd_number(text, "private_segment_fixed_size")
        return Compiled(
            read_amdgcn(text, name),
            text,
            "",
            built.metadata.num_warps,
            _amd_number(text, "vgpr_count"),
            max(spills, stack),
            shared,
            0,
            dots,
            seconds,
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(built.asm["cubin"])
        text = subprocess.run(
            [_tool("nvdisasm"), "-c", str(path)], check=True, capture_output=True, text=True
        ).stdout
        usage = subprocess.run(
            [_tool("cuobjdump"), "--dump-resource-usage", str(path)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    registers, stack = read_resources(usage)
    return Compiled(
        read_sass(text, name),
        text,
        built.asm["ptx"],
        built.metadata.num_warps,
        registers,
        stack,
        shared,
        int(getattr(built.metadata, "tmem_size", 0) or 0),
        dots,
        seconds,
    )
