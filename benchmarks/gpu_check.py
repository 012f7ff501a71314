"""Runs all checks that need a GPU, one after the other: the tests marked gpu, attn.py, its
gradients, and whole windows through Qwen2-7B's shape (prefill.py).

`make gpu-check`, or straight from a checkout with any Python that has torch and triton:

    python benchmarks/gpu_check.py [--tests] [--attn] [--backward] [--prefill] [--bench]
        [-k EXPRESSION] [--limit SECONDS] [--out DIR|FILE.json]

It installs and builds nothing. A part that cannot run says why and does not stop the others; the
exit status is the worst of all. Without pytest the tests count as failed, status 1. Without the
extension, transformers or safetensors, prefill.py is not run and counts as status 0.

Numbers go to `benchmarks/results/<gpu>-<commit>.json`, `-dirty` where the tree is not the commit's,
written after every part: `{machine, parts: {name: {command, status, seconds, note}}, attn,
backward, prefill, parity}`, records as the scripts' own `--json`. Parts that an earlier run left
there with the same GPU and versions stay until they run again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout need not be installed

from benchmarks.common import machine as this_machine
from vxl_kernels import _ext
from vxl_kernels.files import atomic_write

# By name: collecting every test needs packages that a machine with a GPU may not have.
TEST_FILES = ("tests/triton/test_gpu.py", "tests/cuda/test_cuda.py")


def needs(*modules: str) -> str:
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


def _model_needs() -> str:
    if _ext.extension is None:
        return (
            "the page cache needs the extension, which is not built here "
            "(python setup.py build_ext --inplace; needs g++ and pybind11)"
        )
    return needs("transformers", "safetensors")


@dataclass(frozen=True)
class Part:
    """`command` without the interpreter; `missing` says why it cannot run here, or "". With `json`
    the numbers of the command's own `--json` are kept."""

    flag: str
    command: tuple[str, ...]
    missing: Callable[[], str]
    json: bool = True


# parity: in float32, vxl and the published method may differ by 1e-4.
PARTS = {
    "tests": Part(
        "tests",
        ("-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *TEST_FILES),
        lambda: needs("pytest"),
        json=False,
    ),
    "attn": Part("attn", ("benchmarks/attn.py",), lambda: ""),
    "backward": Part("backward", ("benchmarks/attn.py", "--backward"), lambda: ""),
    "parity": Part(
        "prefill",
        (
            "benchmarks/prefill.py",
            "--case",
            "encode",
            "--dtype",
            "fp32",
            "--layers",
            "2",
            "--chunks",
            "3",
        ),
        _model_needs,
    ),
    "prefill": Part(
        "prefill",
        (
            "benchmarks/prefill.py",
            "--full",
            "--case",
            "encode",
            "--case",
            "questions",
            "--questions",
            "10",
        ),
        _model_needs,
    ),
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tests", action="store_true", help="the tests; with others of these, those alone")
    add("--bench", action="store_true", help="all numbers: --attn --backward --prefill")
    add("--attn", action="store_true", help="one layer's attention and its peers")
    add("--backward", action="store_true", help="its gradients")
    add("--prefill", action="store_true", help="whole windows")
    add("-k", metavar="EXPRESSION", help="of the tests those that match, as pytest's -k")
    add("--limit", type=float, metavar="SECONDS", help="for each part; then it is ended")
    add("--out", type=Path, metavar="DIR|FILE.json", help="default benchmarks/results")
    options = parser.parse_args(arguments)
    if options.bench:
        options.attn = options.backward = options.prefill = True
    flags = ("tests", "attn", "backward", "prefill")
    chosen = [f for f in flags if getattr(options, f)] or flags
    options.parts = [name for name, part in PARTS.items() if part.flag in chosen]
    return options


def result_path(out: Path | None) -> Path:
    """FILE.json as given; in a folder, a file named after the GPU and the commit."""
    if out is not None and out.suffix == ".json":
        return out.absolute()
    gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    state = this_machine.git_state().replace(" ", "-")
    return (out or ROOT / "benchmarks" / "results").absolute() / f"{gpu}-{state}.json"


def run(command: list[str], limit: float | None) -> tuple[int, str]:
    """Returns the status and a note; the part's output goes to the terminal."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 124, f"ended after {limit:g} s"
    if done.returncode < 0:
        return 128 - done.returncode, f"ended by signal {-done.returncode}"
    return done.returncode, ""


def begin(path: Path) -> dict:
    """The report of an earlier run with this GPU and these versions, or an empty one."""
    machine = dict(this_machine.describe("cuda"))
    try:
        known = json.loads(path.read_text())
        same = all(known["machine"][n] == machine[n] for n in ("gpu", "versions"))
        if same and isinstance(known["parts"], dict):
            return {**known, "machine": machine}
    except (OSError, ValueError, KeyError, TypeError):  # missing, or not a report
        pass
    return {"machine": machine, "parts": {}}


def check(options: argparse.Namespace, path: Path) -> dict:
    """Runs the parts; the file holds all results so far after each part."""
    report = begin(path)
    for name in options.parts:
        part = PARTS[name]
        command, own = list(part.command), path.with_name(f"{path.stem}-{name}.json")
        if part.json:
            command += ["--json", str(own)]
        elif options.k:
            command += ["-k", options.k]
        print(f"\n== {name}: python {' '.join(command)}", flush=True)
        report.pop(name, None)
        own.unlink(missing_ok=True)  # left by an interrupted run
        start, note = time.perf_counter(), part.missing()
        if note:
            status = 1 if name == "tests" else 0
            print(f"not run: {note}", flush=True)
        else:
            status, note = run(command, options.limit)
        seconds = round(time.perf_counter() - start, 1)
        if part.json and own.exists():  # also of a failed part, as far as it got
            try:
                report[name] = json.loads(own.read_text())
            except ValueError as error:
                status = status or 1
                note = "; ".join(filter(None, [note, f"its numbers cannot be read: {error}"]))
            own.unlink()
        entry = {"command": command, "status": status, "seconds": seconds, "note": note}
        report["parts"][name] = entry
        atomic_write(path, json.dumps(report, indent=1) + "\n", durable=False)
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if not torch.cuda.is_available():
        print(
            f"gpu-check: this machine has no GPU that torch {torch.__version__} can use; nothing "
            "was checked. `make test` runs the same kernels under Triton's interpreter.",
            file=sys.stderr,
        )
        return 1
    path = result_path(options.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"gpu-check: results go to {path}", flush=True)
    report = check(options, path)
    print("\ngpu-check")
    ran = {name: report["parts"][name] for name in options.parts}
    for name, part in ran.items():
        said = "ok" if part["status"] == 0 else f"FAILED, status {part['status']}"
        if part["note"]:
            said = f"{'not run' if part['status'] == 0 else said}: {part['note']}"
        print(f"  {name:<9} {said} ({part['seconds']} s)")
    print(f"wrote {path}")
    return max(part["status"] for part in ran.values())


if __name__ == "__main__":
    sys.exit(main())
