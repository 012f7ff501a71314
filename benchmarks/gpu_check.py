"""Everything that a machine with a GPU should be asked, in parts, the most telling first.

`make gpu-check`, or straight from a checkout with any Python that has torch and triton:

    python benchmarks/gpu_check.py [PART ...] [--smoke] [--within SECONDS] [--resume]
        [--limit SECONDS] [--out DIR|FILE.json] [--no-build] [-k EXPRESSION] [--small]

    extension     built where it is missing (`setup.py build_ext --inplace`)
    compile       every kernel that Qwen2-7B reaches, in parallel, into Triton's cache
    day           the numbers that an H100 should give, each beside its range (gpu_first_day.py)
    tests         the tests marked gpu, in parallel where pytest-xdist is installed
    attn          one layer's attention and its peers
    backward      its gradients
    parity        two layers in float32 against the upstream method
    prefill       whole windows and questions through Qwen2-7B's shape
    memcheck      a few tests under compute-sanitizer

Each part ends within `--limit` seconds (480), well under ten minutes. Without names all parts run.
`--smoke` runs the parts compile and day on a few kernels in two minutes, and builds nothing.
`--within` ends the whole command in time: parts that would begin too late are not run. `--resume`
runs only what the file does not have as passed. Nothing is downloaded, and git is not needed.

The exit status is 0 only if every part that was asked for has run and passed: else that of the
worst part, or 77 if all that ran passed and something did not run. The last line says what is
missing, and the command that runs it.

Numbers go to `benchmarks/results/<gpu>-<commit>.json`, `-dirty-<digest>` where the tree is not the
commit's, `-unknown-<digest>` without git, written before and after every part: `{machine, parts:
{name: {command, status, seconds, note}}, day, attn, backward, parity, prefill}`, records as the
scripts' own `--json`. What a part says is beside it in `<name>-<part>.log`. Parts that an earlier
run left there with the same GPU, versions and code stay until they run again, and those that were
killed keep the numbers that they had.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout need not be installed

from benchmarks.common import machine as this_machine
from vxl_kernels import _ext
from vxl_kernels.files import atomic_write

NOT_RUN = 77  # as the test drivers of automake and meson
LIMIT, SMOKE_SECONDS = 480.0, 120.0
# By name: collecting every test needs packages that a machine with a GPU may not have.
TEST_FILES = (
    "tests/triton/test_gpu.py",
    "tests/cuda/test_cuda.py",
    "tests/cuda/test_on_gpu.py",
    "tests/cuda/test_model_on_gpu.py",
)
BUILD = "python setup.py build_ext --inplace"


def needs(*modules: str) -> str:
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


def _built() -> bool:
    """Whether the extension loads now. It may have been built since this process began."""
    code = "import sys; from vxl_kernels import _ext; sys.exit(_ext.extension is None)"
    return (
        _ext.extension is not None
        or not subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=_environment(), check=False
        ).returncode
    )


def _build_needs() -> str:
    if not shutil.which(os.environ.get("CXX", "g++")):
        return f"not built here, and there is no C++ compiler (g++, then {BUILD})"
    return needs("pybind11", "setuptools")


def _model_needs() -> str:
    if not _built():
        return f"the page cache needs the extension, which is not built here ({BUILD})"
    return needs("transformers", "safetensors")


def _sanitizer() -> str | None:
    found = shutil.which("compute-sanitizer")
    beside = Path("/usr/local/cuda/bin/compute-sanitizer")
    return found or (str(beside) if beside.exists() else None)


def _memcheck_needs() -> str:
    return needs("pytest") if _sanitizer() else "compute-sanitizer is not installed"


@dataclass(frozen=True)
class Part:
    """`command` without the interpreter; `missing` says why it cannot run here, or "". With `json`
    the numbers of the command's own `--json` are kept. `small`: what is added with `--small`, and
    `smoke` with `--smoke`. `before`: a program that runs the interpreter. `done`: whether there is
    nothing to do."""

    command: tuple[str, ...]
    missing: Callable[[], str]
    json: bool = True
    small: tuple[str, ...] = ("--small",)
    smoke: tuple[str, ...] | None = None
    before: Callable[[], tuple[str, ...]] = lambda: ()
    done: Callable[[], bool] = lambda: False


IN_SMALL = ("--small", "--dtype", "fp32")  # as Triton's interpreter can
PYTEST = ("-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider")
PARTS = {
    "extension": Part(
        ("setup.py", "-q", "build_ext", "--inplace"),
        _build_needs, json=False, small=(), smoke=(), done=lambda: _built(),
    ),
    "compile": Part(
        ("benchmarks/codegen/ahead.py",),
        lambda: needs("triton"), json=False, smoke=("--few",),
    ),
    "day": Part(
        ("benchmarks/gpu_first_day.py",), lambda: "", small=IN_SMALL, smoke=("--smoke",)
    ),
    "tests": Part((*PYTEST, *TEST_FILES), lambda: needs("pytest"), json=False, small=()),
    "attn": Part(
        ("benchmarks/attn.py",),
        lambda: "", small=(*IN_SMALL, "--case", "decode", "--repeats", "1"),
    ),
    "backward": Part(("benchmarks/attn.py", "--backward"), lambda: "", small=IN_SMALL),
    # In float32, vxl and the published method may differ by 1e-4.
    "parity": Part(
        ("benchmarks/prefill.py", "--case", "encode", "--dtype", "fp32", "--layers", "2",
         "--chunks", "3"),
        _model_needs,
    ),
    "prefill": Part(
        ("benchmarks/prefill.py", "--full", "--case", "encode", "--case", "questions",
         "--questions", "10"),
        _model_needs, small=("--small", "--layers", "2", "--frames", "4"),
    ),
    "memcheck": Part(
        (*PYTEST, "-q", "tests/cuda/test_cuda.py", "-k", "strided"),
        _memcheck_needs, json=False, small=(),
        before=lambda: (_sanitizer() or "", "--tool", "memcheck", "--error-exitcode", "9"),
    ),
}  # fmt: skip
SMOKE = tuple(name for name, part in PARTS.items() if part.smoke is not None)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default all")
    add("--smoke", action="store_true", help=f"{', '.join(SMOKE)}, a few kernels each: 2 minutes")
    add("--within", type=float, metavar="SECONDS", help="for the whole command")
    add("--limit", type=float, default=LIMIT, metavar="SECONDS", help="for each part (%(default)g)")
    add("--resume", action="store_true", help="only what the file does not have as passed")
    add("--no-build", action="store_true", help="do not build a missing extension")
    add("--small", action="store_true", help="tiny shapes, to see that everything runs")
    add("-k", metavar="EXPRESSION", help="of the tests those that match, as pytest's -k")
    add("--out", type=Path, metavar="DIR|FILE.json", help="default benchmarks/results")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown:
        parser.error(f"part: got {', '.join(unknown)}; valid are {', '.join(PARTS)}")
    if options.smoke:
        options.within = min(options.within or SMOKE_SECONDS, SMOKE_SECONDS)
        options.no_build = True  # it takes longer
    chosen = options.parts or (SMOKE if options.smoke else PARTS)
    options.parts = [name for name in PARTS if name in chosen]
    return options


def result_path(out: Path | None) -> Path:
    """FILE.json as given; in a folder, a file named after the GPU and the commit."""
    if out is not None and out.suffix == ".json":
        return out.absolute()
    gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    state = this_machine.git_state().replace(" ", "-")
    return (out or ROOT / "benchmarks" / "results").absolute() / f"{gpu}-{state}.json"


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}


def _dies_with_parent() -> None:
    """Of a part: it ends with this process, however that ends (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def run(command: list[str], limit: float, log: Path) -> tuple[int, str]:
    """Returns the status and a note. What the part says goes to the terminal and to `log`. A part
    that is ended takes its own processes with it."""
    part = subprocess.Popen(
        command, cwd=ROOT, env=_environment(), start_new_session=True,
        preexec_fn=_dies_with_parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    tee = subprocess.Popen(["tee", str(log)], stdin=part.stdout)
    try:
        status = part.wait(limit)
    except subprocess.TimeoutExpired:
        return 124, f"ended after {limit:g} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(part.pid, signal.SIGKILL)
        part.wait()
        tee.wait()
    if status < 0:
        return 128 - status, f"ended by signal {-status}"
    return status, ""


def begin(path: Path) -> dict[str, Any]:
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


class Check:
    """One run of the command. The file at `path` holds all results so far."""

    def __init__(self, options: argparse.Namespace, path: Path) -> None:
        self.options, self.path, self.report = options, path, begin(path)
        within = options.within
        self.end = None if within is None else time.perf_counter() + within
        for name, entry in self.report["parts"].items():  # of a run that was killed
            if entry.get("status") is None:
                entry["note"] = "was killed" + self._take_numbers(name)
                self.save()

    def _numbers(self, name: str) -> Path:
        return self.path.with_name(f"{self.path.stem}-{name}.json")

    def _take_numbers(self, name: str) -> str:
        """Moves a part's own numbers into the report. Returns what is wrong with them."""
        own, note = self._numbers(name), ""
        if PARTS[name].json and own.exists():  # also of a failed part, as far as it got
            try:
                self.report[name] = json.loads(own.read_text())
            except ValueError as error:
                note = f"; its numbers cannot be read: {error}"
            own.unlink()
        return note

    def command(self, name: str) -> list[str]:
        part, options = PARTS[name], self.options
        command = [*part.before(), sys.executable, *part.command]
        if options.small:
            command += part.small
        if options.smoke:
            command += part.smoke or ()
        if part.json:
            command += ["--json", str(self._numbers(name))]
        if name == "tests":
            if not needs("xdist"):
                command += ["-n", str(min(8, os.cpu_count() or 1))]
            command += ["-k", options.k] if options.k else []
        return command

    def why_not(self, name: str) -> str:
        if name == "extension" and self.options.no_build:
            return f"it is not built here ({BUILD})"
        if self.end is not None and time.perf_counter() >= self.end:
            return f"no time left of {self.options.within:g} s"
        return PARTS[name].missing()

    def one(self, name: str) -> None:
        """Runs a part. An entry without a status is in the file meanwhile."""
        part, command = PARTS[name], self.command(name)
        entry: dict[str, Any] = {"command": command, "status": None, "seconds": 0.0, "note": ""}
        known = self.report["parts"].get(name)
        start, done = time.perf_counter(), part.done()
        why_not = "" if done else self.why_not(name)
        if why_not:
            print(f"\n== {name}: not run: {why_not}", flush=True)
            if known is None or known["status"] != 0:  # an earlier success stays
                self.report["parts"][name] = entry | {"status": NOT_RUN, "note": why_not}
            self.asked[name] = (NOT_RUN, why_not)
            self.save()
            return
        self.report.pop(name, None)
        self._numbers(name).unlink(missing_ok=True)
        self.report["parts"][name] = entry
        self.save()
        if done:
            status, note = 0, "there is one"
        else:
            print(f"\n== {name}: {shlex.join(command)}", flush=True)
            limit = self.options.limit
            if self.end is not None:
                limit = max(1.0, min(limit, self.end - time.perf_counter()))
            log = self.path.with_name(f"{self.path.stem}-{name}.log")
            status, note = run(command, limit, log)
        wrong = self._take_numbers(name)
        entry["status"] = status or (1 if wrong else 0)
        entry["note"] = (note + wrong).removeprefix("; ")
        entry["seconds"] = round(time.perf_counter() - start, 1)
        self.asked[name] = (entry["status"], entry["note"])
        self.save()

    def save(self) -> None:
        atomic_write(self.path, json.dumps(self.report, indent=1) + "\n", durable=False)

    def all(self) -> int:
        self.asked: dict[str, tuple[int, str]] = {}
        for name in self.options.parts:
            known = self.report["parts"].get(name)
            if self.options.resume and known is not None and known["status"] == 0:
                self.asked[name] = (0, "passed in an earlier run")
            else:
                self.one(name)
        print("\ngpu-check")
        for name, (status, note) in self.asked.items():
            said = {0: "ok", NOT_RUN: "NOT RUN"}.get(status, f"FAILED, status {status}")
            seconds = self.report["parts"][name]["seconds"]
            print(f"  {name:<9} {said}{f': {note}' if note else ''} ({seconds} s)")
        print(f"wrote {self.path}")
        return self.conclude()

    def conclude(self) -> int:
        """The last line, and the exit status."""
        failed = [name for name, (status, _) in self.asked.items() if status not in (0, NOT_RUN)]
        left = [name for name, (status, _) in self.asked.items() if status == NOT_RUN]
        if not failed and not left:
            print(f"gpu-check: complete: {', '.join(self.asked)} passed")
            return 0
        said = [f"failed: {', '.join(failed)}"] if failed else []
        said += [f"not run: {', '.join(left)}"] if left else []
        again = f"python benchmarks/gpu_check.py {' '.join(failed + left)} --out {self.path}"
        print(f"gpu-check: INCOMPLETE: {'; '.join(said)}. Again: {again}")
        return max((self.asked[name][0] for name in failed), default=NOT_RUN)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if not torch.cuda.is_available():
        print(
            f"gpu-check: this machine has no GPU that torch {torch.__version__} can use; nothing "
            "was checked. `make test` runs the same kernels under Triton's interpreter.",
            file=sys.stderr,
        )
        return 1

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)  # so that the part that runs is ended too

    before = signal.signal(signal.SIGTERM, stop)
    try:
        path = result_path(options.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"gpu-check: results go to {path}", flush=True)
        return Check(options, path).all()
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
