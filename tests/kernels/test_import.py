"""What importing needs, costs and reports."""

import importlib
import os
import platform
import subprocess
import sys

import pytest
from helpers.paths import ROOT

import vxl_kernels


def run(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=300,
        check=False,
    )


# torch comes first: a CUDA build of it looks for triton itself.
BLOCK = """
import sys
import torch
for name in list(sys.modules):
    if name.split(".")[0] in {names}:
        del sys.modules[name]
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Block())
"""


def test_needs_neither_triton_nor_transformers():
    code = BLOCK.format(names={"triton", "transformers", "matplotlib", "flash_attn"})
    code += """
import torch, vxl_kernels
x = torch.randn(1, 5, 2, 16)
assert vxl_kernels.vst_attention(x, x, x).shape == x.shape
assert "vxl_model" not in sys.modules
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_import_adds_little_to_torch():
    """At most 0.3 s more than torch. Modules are counted too, as times are noisy."""
    code = """
import sys, time, torch
before, start = set(sys.modules), time.perf_counter()
import vxl_kernels
print(time.perf_counter() - start)
print(*sorted(m for m in set(sys.modules) - before if not m.startswith("vxl_kernels")))
"""
    runs = [run(code).stdout.split("\n") for _ in range(3)]
    assert min(float(r[0]) for r in runs) < 0.3
    assert len(runs[0][1].split()) < 15, runs[0][1]


@pytest.mark.parametrize("isa", ["avx512bf16", "avx512", "avx2", "baseline"])
def test_every_instruction_set_passes(isa):
    """The attention and RoPE tests again, with the kernels of lesser instruction sets."""
    ask = "import vxl_kernels._ext as e; print(e.extension.cpu_isa())"
    if run(ask, VXL_CPU_ISA=isa).stdout.strip() != isa or run(ask).stdout.strip() == isa:
        pytest.skip(f"this machine has no {isa}, or no more than that")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "tests/kernels/test_attention.py",
            "tests/kernels/test_rope.py",
            "tests/kernels/test_goldens.py",
        ],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        cwd=ROOT,
        env={**os.environ, "VXL_CPU_ISA": isa},
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_an_unknown_instruction_set_is_refused():
    done = run("import vxl_kernels._ext as e; e.extension.cpu_isa()", VXL_CPU_ISA="AVX512")
    names = {
        "x86_64": "amx, avx512bf16, avx512, avx2 or baseline",
        "aarch64": "neonbf16 or baseline",
    }
    expected = names.get(platform.machine(), "baseline")
    assert f"VXL_CPU_ISA: got AVX512, expected {expected}" in done.stderr


def test_without_the_extension_the_reference_warns_once():
    code = BLOCK.format(names=set()).replace(
        'name.split(".")[0] in set()', 'name == "vxl_kernels._C"'
    )
    code += """
import torch, warnings, vxl_kernels
x = torch.randn(1, 5, 2, 16)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    out = vxl_kernels.vst_attention(x, x, x)
    vxl_kernels.vst_attention(x, x, x)
assert [str(w.message).split(":")[0] for w in caught] == ["vxl_kernels"], caught
assert "reference" in str(caught[0].message)
causal = torch.nn.functional.scaled_dot_product_attention
expected = causal(*[x.transpose(1, 2)] * 3, is_causal=True).transpose(1, 2)
torch.testing.assert_close(out, expected)
from vxl_kernels.testing import inverse_frequencies, make_inputs
for inplace in (False, True):
    ours, theirs = make_inputs((5,), rows=3), make_inputs((5,), rows=3)
    inv_freq = inverse_frequencies(16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pair = vxl_kernels.rope_append(*ours.args(), inv_freq, inplace=inplace)
    expected = vxl_kernels.rope_append(*theirs.args(), inv_freq, backend="reference")
    for x_, y_ in zip((*pair, ours.k_cache), (*expected, theirs.k_cache)):
        torch.testing.assert_close(x_, y_, equal_nan=True)
try:
    vxl_kernels.vst_attention(x, x, x, backend="cpu")
except ValueError as error:
    assert "not built or does not load" in str(error)
else:
    raise SystemExit("backend='cpu' ran without the extension")
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def command(*words):
    done = [sys.executable, "-m", "vxl_kernels", *words]
    return subprocess.run(done, capture_output=True, text=True, check=False)


def test_the_command_tunes():
    pytest.importorskip("triton")
    assert "--head-dim" in command("tune", "--help").stdout
    done = command("tune", "tiles.json", "--head-dim", "8")
    assert (done.returncode, "--head-dim: got 8, expected 16" in done.stderr) == (2, True)


def test_the_command_cannot_tune_without_triton(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vxl_kernels._triton.tune", None)
    monkeypatch.setattr(vxl_kernels._triton, "_missing", lambda: "triton is not installed")
    assert importlib.import_module("vxl_kernels.__main__").main(["tune", "tiles.json"]) == 1
    assert capsys.readouterr().err == "tune: triton is not installed\n"


def test_the_command_refuses():
    for words, said in ((("tuna",), "invalid choice: 'tuna'"), (("info", "-x"), "info: got -x")):
        done = command(*words)
        assert done.returncode == 2
        assert said in done.stderr


@pytest.mark.parametrize("words", [(), ("info",)])
def test_report(words):
    done = command(*words)
    assert done.returncode == 0
    for word in ("torch", "CPU kernels", "CUDA", "reference", vxl_kernels.__version__):
        assert word in done.stdout
    assert "triton      no: " in done.stdout
