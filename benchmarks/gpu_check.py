"""`make gpu-check`: the tests marked gpu, then attn.py, on the GPU of this machine.

Writes `benchmarks/results/<gpu>-<commit>.json`, records as `attn.py --json`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def result_path() -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    sha = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    return ROOT / "benchmarks" / "results" / f"{name}-{sha}.json"


def main() -> int:
    if not torch.cuda.is_available():
        print(
            f"gpu-check: this machine has no GPU that torch {torch.__version__} can use; nothing "
            "was checked. `make test` runs the same kernels under Triton's interpreter.",
            file=sys.stderr,
        )
        return 1
    path = result_path()
    path.parent.mkdir(exist_ok=True)
    for command in (
        ["-m", "pytest", "-m", "gpu", "tests"],
        ["benchmarks/attn.py", "--json", str(path)],
    ):
        status = subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode
        if status:
            return status
    print(f"\nwrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
