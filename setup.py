"""Builds the extension `vxl_kernels._C`.

Environment:
    VXL_BUILD_EXT   1 (default): build the extension. 0: install pure Python, which runs the
                    slow reference on a CPU.
    VXL_BUILD_CUDA  auto (default): compile csrc/cuda if nvcc and a CUDA build of torch are
                    found. 0: do not compile it. 1: fail if either is missing.
    VXL_BUILD_UNITS a folder for the objects of csrc/cpu/isa_*.cpp, which include neither Python nor
                    torch. Builds for several of these share the objects that are newer than csrc.
The build writes what it built, and why it left something out, to _build_info.json beside the
package. `python -m vxl_kernels` shows it.
"""

import json
import os
import platform
import shutil
import site
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.modified import newer_group

ROOT = Path(__file__).resolve().parent

# An isolated build hides the packages of the environment that it builds for. The extension must
# be compiled against the torch that will load it, so look for torch there before fetching another.
try:
    import torch
except ImportError:
    sys.path += [sysconfig.get_paths()["purelib"], site.getusersitepackages()]
    try:
        import torch
    except ImportError:
        torch = None

WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi"]
# GCC's own AVX-512 headers trip these two.
ISA_WARNINGS = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# No -std: torch adds the one that its headers need (C++20 for torch 2.14). -g0: Python's own -g
# would write debug information of torch's headers, which takes longer than all else.
COMMON = ["-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=fast", *WARNINGS]
# sm_80 code runs on 8.6 and 8.9 too; PTX for what comes after. Without a GPU to ask.
CUDA_ARCHITECTURES = "8.0;9.0;10.0+PTX"
# One unit an instruction set, chosen at run time: no wheel needs the machine it was built on.
ISA_FLAGS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [
        *ISA_FLAGS["avx2"],
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
    ]
    ISA_FLAGS["avx512bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16"]
    ISA_FLAGS["amx"] = [*ISA_FLAGS["avx512bf16"], "-mamx-tile", "-mamx-bf16"]
elif platform.machine() in ("aarch64", "arm64"):
    ISA_FLAGS["neonbf16"] = ["-march=armv8.2-a+bf16"]


def cuda_toolkit() -> Path | None:
    """CUDA_HOME, the usual place, or the toolkit of the nvcc on the PATH."""
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places += [str(Path(nvcc).resolve().parents[1])] if nvcc else []
    return next((Path(p) for p in places if p and (Path(p) / "bin" / "nvcc").exists()), None)


def cuda_decision() -> tuple[bool, str]:
    """Whether to compile csrc/cuda, and the reason."""
    wish = os.environ.get("VXL_BUILD_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"VXL_BUILD_CUDA: got {wish!r}, expected auto, 0 or 1")
    if wish == "0":
        return False, "VXL_BUILD_CUDA=0"
    missing = []
    if torch.version.cuda is None:
        missing.append(f"torch {torch.__version__} is a build without CUDA")
    if cuda_toolkit() is None:
        missing.append("no nvcc")
    if missing and wish == "1":
        raise SystemExit(f"VXL_BUILD_CUDA: got 1, expected auto or 0 ({'; '.join(missing)})")
    return not missing, "; ".join(missing) or "nvcc and a CUDA build of torch found"


def noting(command: type, **info: str) -> type:
    """The command that also writes `info` into the package where it has built it: in the source
    tree or, for a wheel, in the build's folder."""

    class Noting(command):
        def run(self) -> None:
            super().run()
            in_place = self.editable_mode or getattr(self, "inplace", False)
            folder = (ROOT if in_place else Path(self.build_lib)) / "vxl_kernels"
            (folder / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")

    return Noting


def extension_arguments() -> dict:
    if os.environ.get("VXL_BUILD_EXT", "1") == "0":
        info = {"extension": "not built: VXL_BUILD_EXT=0", "cuda": "not built"}
        return {"cmdclass": {"build_py": noting(build_py, **info)}}
    if torch is None:
        # torch becomes a requirement of the build only here. The build then runs again with it.
        return {"setup_requires": ["torch>=2.11"]}
    use_cuda, reason = cuda_decision()
    if use_cuda:  # before the import below, which looks for the toolkit
        os.environ["CUDA_HOME"] = str(cuda_toolkit())
        if not torch.cuda.is_available():  # with a GPU, torch takes its architecture
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    headers = [
        str(p.relative_to(ROOT))
        for p in ROOT.glob("csrc/**/*")
        if p.suffix in (".h", ".inc", ".cuh")
    ]

    class BuildWithIsaUnits(BuildExtension):
        """Compiles each ISA unit with its own flags and links the objects in."""

        def unit(self, isa: str) -> str:
            """The object of one unit, compiled or taken from VXL_BUILD_UNITS."""
            source = f"csrc/cpu/isa_{isa}.cpp"
            folder = os.environ.get("VXL_BUILD_UNITS")
            kept = Path(folder) / f"isa_{isa}.o" if folder else None
            if kept and not newer_group([__file__, source, *headers], kept):
                return str(kept)
            flags = ["-std=c++17", *COMMON, *ISA_WARNINGS, *ISA_FLAGS[isa], "-fPIC"]
            (made,) = self.compiler.compile(
                [source], output_dir=self.build_temp, extra_postargs=flags
            )
            if kept:
                kept.parent.mkdir(parents=True, exist_ok=True)
                part = kept.with_suffix(f".{os.getpid()}")
                shutil.copyfile(made, part)
                part.replace(kept)  # whole, also for a build beside this one
            return made

        def build_extensions(self) -> None:
            jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
            with ThreadPoolExecutor(jobs) as pool:
                objects = list(pool.map(self.unit, ISA_FLAGS))
            for extension in self.extensions:
                extension.extra_objects = [*extension.extra_objects, *objects]
            super().build_extensions()

    cuda_sources = ["csrc/bindings/cuda_ops.cpp", "csrc/cuda/pages.cu", "csrc/cuda/rope.cu"]
    make_extension = CUDAExtension if use_cuda else CppExtension
    extension = make_extension(
        "vxl_kernels._C",
        sources=[
            "csrc/bindings/linear_ops.cpp",
            "csrc/bindings/module.cpp",
            "csrc/bindings/ops.cpp",
            "csrc/bindings/page_manager.cpp",
            "csrc/bindings/page_ops.cpp",
            "csrc/bindings/varlen_ops.cpp",
            "csrc/cache/page_manager.cpp",
            "csrc/cpu/kernels.cpp",
            "csrc/cpu/pages.cpp",
            "csrc/cpu/pieces.cpp",
            "csrc/cpu/plan.cpp",
            *(cuda_sources if use_cuda else []),
        ],
        define_macros=[("VXL_WITH_CUDA", None)] if use_cuda else [],
        extra_compile_args={
            "cxx": [*COMMON, "-fopenmp", "-Wno-unused-parameter"],
            "nvcc": ["-O3", "-std=c++17", "-Xcompiler=-fvisibility=hidden,-Wall,-Wextra"],
        },
        extra_link_args=["-fopenmp"],
        depends=headers,
    )
    info = {
        "extension": f"built with torch {torch.__version__}, units: {', '.join(ISA_FLAGS)}",
        "cuda": ("built: " if use_cuda else "not built: ") + reason,
    }
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": noting(BuildWithIsaUnits, **info)},
    }


setup(**extension_arguments())
