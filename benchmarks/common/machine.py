"""The machine: its description, and its ceilings, measured throughout the run."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

import vxl_kernels
from benchmarks.common.cases import DTYPES
from benchmarks.common.timing import Clock

__all__ = ["Ceilings", "describe", "git_state"]

_MIB = 1 << 20
_ROOT = Path(__file__).resolve().parents[2]
_CACHE_FILE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _last_level_bytes() -> int:
    try:
        return int(_CACHE_FILE.read_text().strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 32 * _MIB


# What results depend on.
_CODE = ("benchmarks", "csrc", "tests", "vxl_kernels", "vxl_model", "pyproject.toml", "setup.py")
_SUFFIXES = (".py", ".cpp", ".cu", ".cuh", ".h", ".inc", ".toml")


def _code_digest() -> str:
    digest = hashlib.sha256()
    for name in _CODE:
        for path in [_ROOT / name, *sorted((_ROOT / name).rglob("*"))]:
            if path.is_file() and path.suffix in _SUFFIXES:
                digest.update(str(path.relative_to(_ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]


def git_state() -> str:
    """The commit. Where none names the code, a digest of the code does."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        # The results that gpu_check.py keeps are not code, wherever in the tree they are.
        code = [f":(top){name}" for name in _CODE]
        changed = git("status", "-s", "--", *code, ":(top,exclude)benchmarks/results")
        commit = git("rev-parse", "--short", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return f"unknown {_code_digest()}"
    return f"{commit} dirty {_code_digest()}" if changed else commit


def describe(device: str) -> list[tuple[str, str]]:
    """Header lines, name and text."""
    extension = vxl_kernels._ext.extension
    isa = f"vxl {extension.cpu_isa()}" if extension is not None else "vxl extension not loaded"
    count = torch.get_num_threads()
    cores = f"{count} thread{'s' if count > 1 else ''}"
    capability = torch.backends.cpu.get_cpu_capability()
    lines = [("machine", f"{_cpu_model()}, {cores}; torch {capability}, {isa}")]
    if device == "cuda":
        lines.append(("gpu", torch.cuda.get_device_name()))
    versions = f"python {platform.python_version()}, torch {torch.__version__}"
    if device == "cuda":  # Triton's version by its wheel, and those of installed peers
        for name in ("triton", "flash-attn", "flashinfer-python", "transformers"):
            with suppress(importlib.metadata.PackageNotFoundError):
                versions += f", {name} {importlib.metadata.version(name)}"
    lines.append(("versions", f"{versions}, vxl {vxl_kernels.__version__}, git {git_state()}"))
    lines.append(("command", " ".join(["python", *sys.argv])))
    return lines


Product = tuple[int, Callable[[], object]]  # FLOPs of a call, and the call


class Ceilings:
    """The rates that the machine reaches: matrix product in FLOP/s, read and copy in bytes/s.

    On a CPU the matrix product is torch's, of bf16 for bf16 and of float32 for the other dtypes,
    and oneDNN's with a prepacked weight, as MKL's own is slow on some CPUs. The better one is the
    ceiling. On a GPU it is torch.mm of the dtype.
    """

    def __init__(self, device: str, dtypes: Sequence[str], small: bool) -> None:
        self._readings: dict[str, list[float]] = {}
        least = 16 * _MIB if small else 256 * _MIB
        last = _last_level_bytes()
        size = least if small else max(least, 4 * last, min(1024 * _MIB, 8 * last))
        # Four times the last-level cache or more. Reading the part `evict` empties that cache.
        self.buffer = torch.ones(size // 4, device=device)
        self.evict = self.buffer[: max(least, 2 * last) // 4]
        self._copy = torch.empty_like(self.buffer)
        self._clock = Clock(device, torch.empty(0, device=device))
        make = _cuda_products if device == "cuda" else _cpu_products
        self._products = {name: make(name, small) for name in dtypes}

    def read(self) -> None:
        """Measures every ceiling once more."""
        for name, (flops, call) in self._each_product().items():
            self._add(name, flops / self._best(call))
        buffer, copy = self.buffer, self._copy
        size = buffer.numel() * buffer.element_size()
        self._add("read", size / self._best(buffer.sum))
        self._add("copy", 2 * size / self._best(lambda: copy.copy_(buffer)))

    def _each_product(self) -> dict[str, Product]:
        return {name: p for products in self._products.values() for name, p in products.items()}

    def sample(self, kind: str, dtype: str) -> float:
        """Measures "read", "copy" or "product" (of the dtype, the better library so far) once,
        between repeats of a case; returns its rate."""
        size = self.buffer.numel() * self.buffer.element_size()
        if kind == "product":
            name = self.product_name(dtype)
            flops, call = self._products[dtype][name]
            rate = flops / self._clock.seconds(call)
        elif kind == "read":
            name, rate = kind, size / self._clock.seconds(self.buffer.sum)
        else:
            copy = partial(self._copy.copy_, self.buffer)
            name, rate = kind, 2 * size / self._clock.seconds(copy)
        self._add(name, rate)
        return rate

    def _best(self, call: Callable[[], object]) -> float:
        # The better of two: the first one wakes threads and raises the clock frequency.
        first = self._clock.seconds(call)
        return first if first > 0.3 else min(first, self._clock.seconds(call))

    def _add(self, name: str, value: float) -> None:
        self._readings.setdefault(name, []).append(value)

    def median(self, name: str) -> float:
        return statistics.median(self._readings[name])

    def product_name(self, dtype: str) -> str:
        return max(self._products[dtype], key=self.median)

    def describe(self) -> list[tuple[str, str]]:
        def text(name: str, unit: str) -> str:
            values = [v / 1e9 for v in self._readings[name]]
            low, high = min(values), max(values)
            middle = statistics.median(values)
            return f"{name} {middle:.0f} {unit} ({low:.0f} to {high:.0f})"

        count = sum(len(values) for values in self._readings.values())
        products = "; ".join(text(name, "GFLOP/s") for name in self._each_product())
        best = ", ".join(dict.fromkeys(self.product_name(dtype) for dtype in self._products))
        memory = "; ".join(text(name, "GB/s") for name in ("read", "copy"))
        return [
            ("matmul", f"{products}; 100 % is {best}"),
            ("memory", f"{memory}; copy counts bytes read and written"),
            ("", f"medians (range) of {count} readings; a case counts those between its repeats"),
        ]


def _cpu_products(dtype_name: str, small: bool) -> dict[str, Product]:
    n = 256 if small else 2048  # 4096 measures 2 % less for MKL and takes 8 times as long
    bf16 = dtype_name == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    x, b, out = (torch.ones(n, n, dtype=dtype) for _ in range(3))
    name = f"bf16 mm {n}" if bf16 else f"sgemm {n}"
    products: dict[str, Product] = {name: (2 * n**3, partial(torch.mm, x, b, out=out))}
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(b, n)
        linear = torch.ops.mkldnn._linear_pointwise

        def call() -> object:
            return linear(x, packed, None, "none", [], "")

        call()
        products[f"oneDNN prepacked {'bf16 ' if bf16 else ''}{n}"] = (2 * n**3, call)
    except (AttributeError, RuntimeError, NotImplementedError):
        pass  # a build of torch without oneDNN
    return products


def _cuda_products(dtype_name: str, small: bool) -> dict[str, Product]:
    n = 256 if small else 8192
    a = torch.randn(n, n, device="cuda", dtype=DTYPES[dtype_name])
    out = torch.empty_like(a)
    return {f"{dtype_name} mm {n}": (2 * n**3, lambda: torch.mm(a, a, out=out))}
