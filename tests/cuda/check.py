"""The part of `make cuda-check` that needs nvcc. It compiles csrc/cuda for every architecture with
warnings as errors, and checks the result. It uses the standard library only.

- ptxas reports no more than MAX_REGISTERS registers, no spill and no stack frame.
- In SASS, kernels with 16-byte words have LDG and STG of 128 bits and no narrower access to data.
  No kernel has local memory, a barrier or the subroutine call of a 64-bit division.
- No source line synchronises or allocates.

Without nvcc it prints one line and succeeds. Without cuobjdump (part of the CUDA toolkit and of
the Triton package) it says that it did not check SASS.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("rope", "pages")
ARCHITECTURES = (80, 90, 100)
FLAGS = [
    "-O3",
    "-std=c++17",
    "-Werror",
    "all-warnings",
    "-Xcompiler=-Wall,-Wextra,-Werror",
    "-Xptxas=-v,-warn-spills,-warn-lmem-usage",
]
MAX_REGISTERS = 128  # two blocks of 256 threads to a multiprocessor
FORBIDDEN = re.compile(
    r"\b(cuda(Device|Stream|Event)Synchronize|cudaMemcpy\w*|cudaMalloc\w*|cudaFree\w*|"
    r"__syncthreads|printf|assert)\s*\("
)
# Local memory, barriers, and the return from a subroutine such as a 64-bit division. A CALL alone
# proves nothing: for sm_80 ptxas uses one to leave a loop.
LOCAL_OR_CALLED = ("LDL", "STL", "BAR", "RET")
WORDS = {"uint4": "16 bytes", "j": "4 bytes", "t": "2 bytes", "h": "1 byte"}
TYPES = {"f": "fp32", "13__nv_bfloat16": "bf16", "6__half": "fp16"}


@dataclass
class Kernel:
    name: str
    registers: int
    stack: int
    spills: int
    sass: dict[str, int] = field(default_factory=dict)

    @property
    def wide(self) -> bool:
        return "16 bytes" in self.name


def readable(symbol: str) -> str:
    """`rope_append bf16 16 bytes` for a mangled name."""
    found = re.search(r"\d+(\w+)_kernelI(.*)EEv", symbol)
    if not found:
        return symbol
    name, arguments = re.sub(r"^.*?(?=rope_append|copy_pages|transfer)", "", found[1]), found[2]
    if name == "rope_append":
        kind, n = re.fullmatch(r"(\w+)Li(\d+)E?", arguments).groups()
        return f"{name} {TYPES[kind]} {'16 bytes' if n != '1' else 'one value'}"
    word = re.match(r"5uint4|[jth]", arguments)[0].removeprefix("5")
    if name == "transfer_rows":
        name = "gather_rows" if "Lb1" in arguments else "scatter_rows"
    return f"{name} {WORDS[word]}"


def find_cuobjdump(nvcc: Path) -> Path | None:
    places = [shutil.which("cuobjdump"), nvcc.parent / "cuobjdump"]
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        places.append(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")
    return next((Path(p) for p in places if p and Path(p).exists()), None)


def find_nvcc() -> Path | None:
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    found = str(home) if home.exists() else shutil.which("nvcc")
    return Path(found) if found else None


def sass_of(cubin: Path, cuobjdump: Path) -> dict[str, dict[str, int]]:
    """For each symbol, the counts of the instructions that this check reads."""
    text = subprocess.run(
        [cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True
    ).stdout
    counts: dict[str, dict[str, int]] = {}
    for part in text.split("Function : ")[1:]:
        symbol, _, body = part.partition("\n")
        own = counts.setdefault(symbol.strip(), {})
        for opcode in re.findall(
            r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", body, re.M
        ):
            if opcode.startswith(("LDG", "STG")):
                width = (
                    "128" if ".128" in opcode else "CONSTANT" if "CONSTANT" in opcode else "narrow"
                )
                opcode = f"{opcode[:3]}.{width}"
            elif not opcode.startswith(LOCAL_OR_CALLED):
                continue
            own[opcode] = own.get(opcode, 0) + 1
    return counts


def compile_one(
    nvcc: Path, cuobjdump: Path | None, source: str, sm: int, folder: str
) -> list[Kernel]:
    cubin = Path(folder) / f"{source}.{sm}.cubin"
    command = [nvcc, *FLAGS, f"-arch=sm_{sm}", "-cubin", "-o", cubin, f"csrc/cuda/{source}.cu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    sass = sass_of(cubin, cuobjdump) if cuobjdump else {}
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers"
    )
    return [
        Kernel(
            readable(symbol),
            int(registers),
            int(stack),
            int(stores) + int(loads),
            sass.get(symbol, {}),
        )
        for symbol, stack, stores, loads, registers in re.findall(pattern, done.stderr, re.S)
    ]


def complaints(kernel: Kernel, sm: int, has_sass: bool) -> list[str]:
    found = []
    if kernel.spills or kernel.stack:
        found.append(f"{kernel.spills} bytes of spills, {kernel.stack} bytes of stack")
    if kernel.registers > MAX_REGISTERS:
        found.append(f"got {kernel.registers} registers, expected at most {MAX_REGISTERS}")
    for opcode in kernel.sass:
        if opcode.startswith(LOCAL_OR_CALLED):
            found.append(f"{opcode} in the SASS")
    if has_sass and kernel.wide:
        missing = [x for x in ("LDG.128", "STG.128") if not kernel.sass.get(x)]
        narrow = [x for x in ("LDG.narrow", "STG.narrow") if kernel.sass.get(x)]
        found += [f"no {x}" for x in missing] + [f"{kernel.sass[x]} {x}" for x in narrow]
    return [f"{kernel.name}, sm_{sm}: {x}" for x in found]


def source_complaints() -> list[str]:
    found = []
    for path in sorted((ROOT / "csrc" / "cuda").iterdir()):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if FORBIDDEN.search(line.partition("//")[0]):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
            if re.match(r"\s*#include\s*[<\"](torch|ATen|c10)", line):
                found.append(f"{path.relative_to(ROOT)}:{number}: a torch header")
    return found


def main() -> int:
    wrong = source_complaints()
    nvcc = find_nvcc()
    if nvcc is None:
        print("cuda-check: compilation skipped: nvcc not found (CUDA_HOME or PATH)")
        for line in wrong:
            print(line)
        return bool(wrong)
    cuobjdump = find_cuobjdump(nvcc)
    jobs = [(source, sm) for sm in ARCHITECTURES for source in SOURCES]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda j: compile_one(nvcc, cuobjdump, *j, folder), jobs))
    kernels: dict[str, dict[int, Kernel]] = {}
    for (_, sm), compiled in zip(jobs, results, strict=True):
        if not compiled:
            wrong.append(f"sm_{sm}: ptxas reported no kernel")
        for kernel in compiled:
            kernels.setdefault(kernel.name, {})[sm] = kernel
            wrong += complaints(kernel, sm, cuobjdump is not None)
    columns = "".join(f"{f'sm_{sm}':>8}" for sm in ARCHITECTURES)
    print(f"{'registers':<28}{columns}   spills  stack  128-bit loads, stores (sm_90)")
    for name, by_sm in sorted(kernels.items()):
        registers = "".join(f"{by_sm[sm].registers:>8}" for sm in ARCHITECTURES)
        spills, stack = (max(getattr(k, x) for k in by_sm.values()) for x in ("spills", "stack"))
        sass = by_sm[90].sass
        wide = f"{sass.get('LDG.128', 0)}, {sass.get('STG.128', 0)}" if cuobjdump else "-"
        print(f"{name:<28}{registers}{spills:>9}{stack:>7}  {wide:>8}")
    if cuobjdump is None:
        print("cuda-check: SASS not checked: no cuobjdump (CUDA toolkit, or pip install triton)")
    print(
        "\n".join(wrong)
        or f"cuda-check: {len(kernels)} kernels, {len(ARCHITECTURES)} architectures, passed"
    )
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
