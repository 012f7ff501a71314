"""What a wheel and an sdist hold. A fake compiler makes empty files, which nobody reads."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile

import pytest
from helpers.paths import ROOT

# Makes every file that it is asked for. The real compiler answers all other questions.
COMPILER = """#!/bin/sh
asked="$*"
while [ $# -gt 0 ]; do
  case "$1" in -o) made=$2; : > "$2" ;; esac
  shift
done
[ -n "$made" ] || exec c++ $asked
"""
MADE_HERE = shutil.ignore_patterns(
    ".git", ".venv*", ".hypothesis", ".*_cache", "__pycache__", "*.so", "build", "*.egg-info"
)


def built(kind, folder, machine=None, **env):
    """The file that the build backend writes for a tree in which something else was built,
    on such a machine."""
    tree, made = folder / "tree", folder / "made"
    made.mkdir()
    shutil.copytree(ROOT, tree, ignore=MADE_HERE)
    (tree / "vxl_kernels" / "_build_info.json").write_text('{"extension": "of last week"}')
    compiler = folder / "c++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    played = dict.fromkeys(("CC", "CXX", "LDSHARED", "LDCXXSHARED"), str(compiler))
    code = f"""
import platform
machine = {machine!r} or platform.machine()
platform.machine = lambda: machine
import setuptools.build_meta as b
b.build_{kind}({str(made)!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env={**os.environ, **played, "VXL_BUILD_CUDA": "0", **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(made.iterdir())


@pytest.mark.parametrize("extension", [True, False])
def test_a_wheel_says_what_was_built(tmp_path, extension):
    with zipfile.ZipFile(built("wheel", tmp_path, VXL_BUILD_EXT=str(int(extension)))) as wheel:
        names = wheel.namelist()
        note = json.loads(wheel.read("vxl_kernels/_build_info.json"))
    assert any(name.startswith("vxl_kernels/_C.") and name.endswith(".so") for name in names) == (
        extension
    )
    assert note["extension"].startswith("built with torch" if extension else "not built")
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        path.name for path in ROOT.glob("vxl_*") if path.is_dir()
    }


UNITS = {
    "x86_64": {"baseline", "avx2", "avx512", "avx512bf16", "amx"},
    "aarch64": {"baseline", "neonbf16"},
}


def test_every_unit_has_a_machine():
    assert set.union(*UNITS.values()) == {
        path.stem.removeprefix("isa_") for path in (ROOT / "csrc/cpu").glob("isa_*.cpp")
    }


@pytest.mark.parametrize("machine", UNITS)
def test_the_units_of_a_machine(tmp_path, machine):
    folder = tmp_path / "units"
    built("wheel", tmp_path, machine=machine, VXL_BUILD_UNITS=str(folder))
    assert {path.name for path in folder.iterdir()} == {f"isa_{x}.o" for x in UNITS[machine]}


def test_units_that_another_build_compiled(tmp_path):
    """Taken as they are while they are newer than their sources, compiled again otherwise. This
    compiler's objects are empty."""
    folder = tmp_path / "units"
    folder.mkdir()
    newer, older = folder / "isa_neonbf16.o", folder / "isa_baseline.o"
    for unit in (newer, older):
        unit.write_text("of another build")
    in_an_hour, of_old = time.time() + 3600, 0
    os.utime(newer, (in_an_hour, in_an_hour))
    os.utime(older, (of_old, of_old))
    built("wheel", tmp_path, machine="aarch64", VXL_BUILD_UNITS=str(folder))
    assert newer.read_text() == "of another build"
    assert older.read_text() == ""


def test_an_sdist_holds_what_its_tests_need(tmp_path):
    with tarfile.open(built("sdist", tmp_path, VXL_BUILD_EXT="0")) as sdist:
        held = {name.split("/", 1)[-1] for name in sdist.getnames()}
    tree = tmp_path / "tree"
    patterns = (
        "*/**/*",
        "Makefile",
        "*.md",
        "*.toml",
        "*.txt",
        "*.yml",
        ".import*",
        ".pre-commit*",
    )
    files = {path for pattern in patterns for path in tree.glob(pattern) if path.is_file()}
    missing = {str(path.relative_to(tree)) for path in files} - held
    assert missing == {"vxl_kernels/_build_info.json"}
