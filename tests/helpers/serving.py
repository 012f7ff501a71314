"""Which backends a test can run here."""

import torch

from vxl_kernels._backends import BACKENDS


def serving(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[str]:
    """Names of the backends that take such tensors on this machine."""
    x = torch.empty(0, dtype=dtype, device=device)
    return [name for name, backend in BACKENDS.items() if not backend.reasons(x)]
