"""Loads the compiled extension and keeps the reason when there is none."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch  # the extension links against the libraries that this loads

__all__ = ["extension", "has_cuda", "reason_missing", "reasons"]

extension: ModuleType | None = None
reason_missing: str = ""

try:
    extension = importlib.import_module("vxl_kernels._C")
except ImportError as error:
    reason_missing = str(error)

# Whether the extension has CUDA kernels of its own (csrc/cuda); one built earlier may not tell.
has_cuda: bool = getattr(extension, "has_cuda", False)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def reasons(x: torch.Tensor | None) -> list[str]:
    """Why the CPU kernels cannot run on x (for None: on this machine at all). Empty: they can."""
    found = []
    if extension is None:
        found.append(f"the extension is not built or does not load ({reason_missing})")
    if x is not None and x.device.type != "cpu":
        found.append(f"tensors are on {x.device}")
    if x is not None and x.dtype not in _DTYPES:
        found.append(f"dtype {x.dtype} is not float32, bfloat16 or float16")
    return found
