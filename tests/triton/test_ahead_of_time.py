"""Ahead-of-time compilation without a GPU: no spills, and matrix instructions for every product.

A sample of the catalog, a few configurations of each kernel, for each architecture.
`make gpu-static` reads all of it.
"""

import os
import re
import subprocess
from collections import Counter

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vxl_kernels._triton import catalog

# One of each compiler's back ends with every Triton. Four take two minutes on two cores.
core = pytest.mark.core
ARCHITECTURES = (
    "cuda:80",
    pytest.param("cuda:90", marks=core),
    "cuda:100",
    pytest.param("hip:gfx942", marks=core),
)
MATRIX = {
    "cuda:80": r"\bHMMA\.",
    "cuda:90": r"\bHGMMA\.",
    "cuda:100": r"\bUTCHMMA\b",
    "hip:gfx942": r"\bv_mfma_",
}
# The first of each: the main configuration of its kernel.
SAMPLE = (
    "prefill bf16",
    "prefill fp32",
    "decode bf16",
    "merge bf16",
    "linear bf16",
    "invariant_linear bf16",
    "rope_append bf16",
    "delta bf16",
    "backward_q bf16",
    "backward_new bf16",
    "backward_cache bf16",
    "sum_pages bf16",
)

TRITON = tuple(int(n) for n in triton.__version__.split(".")[:2])


def sample(arch):
    entries = catalog.shipped(arch)
    return [next(e for e in entries if f"{e.kernel} {e.config}".startswith(s)) for s in SAMPLE]


def target(arch):
    kind, _, name = arch.partition(":")
    return GPUTarget("cuda", int(name), 32) if kind == "cuda" else GPUTarget("hip", name, 64)


def sass(cubin, path):
    path.write_bytes(cubin)
    tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
    return subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True).stdout


@pytest.mark.core
def test_every_kernel_compiles():
    """One configuration of each. What one Triton accepts, another may refuse."""
    sampled = {e.kernel for e in sample("cuda:90")}
    others = {e.kernel: e for e in catalog.shipped("cuda:90") if e.kernel not in sampled}
    assert "backward_new_ragged" in others
    for e in others.values():
        options = {"num_warps": e.num_warps, "num_stages": e.num_stages, **e.options}
        source = ASTSource(e.fn, e.signature, e.constexprs, e.attrs)
        done = triton.compile(source, target=target("cuda:90"), options=options)
        assert done.asm["cubin"], e.kernel


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_machine_code(arch, tmp_path):
    for e in sample(arch):
        name = f"{arch} {e.kernel} {e.config}"
        options = {"num_warps": e.num_warps, "num_stages": e.num_stages, **e.options}
        source = ASTSource(e.fn, e.signature, e.constexprs, e.attrs)
        done = triton.compile(source, target=target(arch), options=options)
        if e.kernel.startswith(("prefill", "decode", "delta", "backward")):
            # A head's offset may need 64 bits: its stride is widened before anything else.
            stride = re.compile(r"%(q|k|v|kc|vc|out|grad_out)_head\b")
            uses = [x for x in done.asm["ttir"].splitlines() if stride.search(x)]
            uses = [x for x in uses if "tt.func" not in x]
            assert uses, name
            assert all("arith.extsi" in x for x in uses), (name, uses)
        if "amdgcn" in done.asm:
            code = done.asm["amdgcn"]
            spills = re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", code)
            assert spills
            assert set(spills) == {"0"}, name
        else:
            code = sass(done.asm["cubin"], tmp_path / "a.cubin")
            opcodes = Counter(re.findall(r"\b(LDL|STL)\b", code))
            # Triton 3.6 keeps a few registers of the float32 tile on the stack, on sm_80.
            if TRITON >= (3, 9) or e.dtype != "fp32":
                assert not opcodes, f"{name}: {opcodes}"
        if "dot" in done.asm["ttir"]:
            # Few rows would leave the wide instructions of sm_90 and sm_100 empty: HMMA instead.
            pattern = MATRIX["cuda:80" if e.kernel == "decode" and "cuda" in arch else arch]
            if e.kernel == "prefill" and e.dtype == "fp32" and "cuda" in arch:
                pattern = f"{pattern}|{MATRIX['cuda:80']}"
            assert re.search(pattern, code), name


# -- the table of GPUs with 100 KiB of shared memory, of which a block may take 99 ---------------

SMALL = {  # compute capability: architecture that its code is compiled for
    86: (
        "prefill bf16 d128",
        "decode bf16 d128",
        "backward_q bf16 d128",
        "backward_new bf16 d128",
        "backward_cache bf16 d128",
    ),
    89: ("decode bf16 d128",),
    120: ("prefill bf16 d128",),
}


@pytest.mark.parametrize(("capability", "name"), [(c, n) for c in SMALL for n in SMALL[c]])
def test_small_gpus(capability, name, tmp_path):
    e = next(e for e in catalog.shipped("cuda:86") if f"{e.kernel} {e.config}".startswith(name))
    options = {"num_warps": e.num_warps, "num_stages": e.num_stages, **e.options}
    source = ASTSource(e.fn, e.signature, e.constexprs, e.attrs)
    done = triton.compile(source, target=target(f"cuda:{capability}"), options=options)
    assert done.metadata.shared <= 99 << 10
    path = tmp_path / "a.cubin"
    path.write_bytes(done.asm["cubin"])
    tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
    said = subprocess.run(
        [tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True
    ).stdout
    (stack,) = re.findall(r"REG:\d+ STACK:(\d+)", said)
    assert int(stack) == 0, said
    code = sass(done.asm["cubin"], path)
    assert re.search(MATRIX["cuda:80"], code)
    # The compiler loads a vector number by number if it knows too little of its indices.
    assert not re.search(r"LDG[.\w]*\.[US]16\b", code)


def test_a_head_dim_that_is_padded_does_not_spill(tmp_path):
    """Of all that a Qwen2 with heads of 64, 80 or 128 reaches on sm_90, this kernel has the fewest
    registers left: 96 bytes were spilled with the tile of head_dim 128."""
    from benchmarks.codegen import ahead

    kernels = ahead.reached("cuda:90", head_dim=80)
    (e,) = (e for e in kernels if e.kernel == "backward_new")
    options = {"num_warps": e.num_warps, "num_stages": e.num_stages, **e.options}
    source = ASTSource(e.fn, e.signature, e.constexprs, e.attrs)
    done = triton.compile(source, target=target("cuda:90"), options=options)
    assert not re.search(r"\b(LDL|STL)\b", sass(done.asm["cubin"], tmp_path / "a.cubin"))
