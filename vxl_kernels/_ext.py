"""Loads the compiled extension and keeps the reason when there is none."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["extension", "has_cuda", "reason_missing"]

extension: ModuleType | None = None
reason_missing: str = ""

try:
    import torch  # noqa: F401  the extension links against the libraries torch has loaded

    extension = importlib.import_module("vxl_kernels._C")
except ImportError as error:
    reason_missing = str(error)

# Whether the extension has CUDA kernels of its own (csrc/cuda); one built earlier may not tell.
has_cuda: bool = getattr(extension, "has_cuda", False)
