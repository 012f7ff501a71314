"""The backends: one table. A new one is a folder with functions of the operators' names, and a line
in `BACKENDS`.

A named backend serves or raises a ValueError with every reason; nothing falls back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import _ext, _triton, linear, reference
from ._arguments import fail
from .layout import takes_ints

__all__ = ["BACKENDS", "OPERATORS", "Backend", "backends", "chosen", "default", "named"]


@dataclass(frozen=True)
class Backend:
    """What the operators need to know of a backend.

    Attributes:
        implements: names of the operators that it has. One without "vst_attention_backward"
            refuses inputs that require a gradient.
        reasons: from a tensor, why it cannot serve that one; from None, why it cannot serve any
            on this machine. An empty list means that it can.
        kernel: from an operator's name to its function, which takes the arguments of the
            operator's schema but `backend`. Called below autograd, on the tensors' device.
        device: type of the device whose tensors it serves when no backend is named.
    """

    implements: frozenset[str]
    reasons: Callable[[torch.Tensor | None], list[str]]
    kernel: Callable[[str], Callable]
    device: str = ""

    def refusals(self, op: str, x: torch.Tensor) -> list[str]:
        """Every reason why it cannot run op on x."""
        missing = [] if op in self.implements else [f"it has no {op}"]
        return missing + self.reasons(x)


OPERATORS = frozenset(
    ("vst_attention", "vst_attention_backward", "rope_append", "rope_append_", "vst_linear")
)
BACKENDS = {
    # The extension registers its kernels with the dispatcher itself: all but the linear products.
    "cpu": Backend(OPERATORS, _ext.reasons, lambda op: takes_ints(linear.vst_linear), "cpu"),
    "triton": Backend(OPERATORS, _triton.reasons, _triton.kernel, "cuda"),
    # The last, and the one that serves a device which is nobody's.
    "reference": Backend(OPERATORS, lambda x: [], lambda op: takes_ints(getattr(reference, op))),
}


def backends() -> dict[str, list[str]]:
    """Every backend with the reasons why it cannot run here; an empty list means it can."""
    return {name: backend.reasons(None) for name, backend in BACKENDS.items()}


def named(name: str, op: str, x: torch.Tensor) -> Backend:
    """The backend of that name. Raises a ValueError with every reason why it cannot run op on x."""
    if not isinstance(name, str) or name not in BACKENDS:
        fail("backend", repr(name), f"{', '.join(map(repr, BACKENDS))} or None")
    reasons = BACKENDS[name].refusals(op, x)
    if reasons:
        raise ValueError(f"backend {name!r} cannot serve this call: {'; '.join(reasons)}")
    return BACKENDS[name]


def default(op: str, x: torch.Tensor) -> tuple[Backend, list[str]]:
    """The backend of x's device, or the reference with the reasons why it has to serve."""
    if op == "vst_linear":  # PyTorch's products serve every device and dtype
        return BACKENDS["cpu"], []
    why = []
    for backend in BACKENDS.values():
        if backend.device == x.device.type:
            reasons = backend.refusals(op, x)
            if not reasons:
                return backend, []
            why += reasons
    return BACKENDS["reference"], why or [f"no backend is made for {x.device.type}"]


def chosen(name: str | None, op: str, x: torch.Tensor) -> str:
    """The operators' `backend` argument: "" for the device's own, else a name that can serve x."""
    if name is None:
        if x.dtype == torch.float64 and x.device.type == "cpu":
            fail("q", x.dtype, "float32, bfloat16 or float16 (or backend='reference')")
        return ""
    # While a graph is traced only the name is looked at; the operator asks when the graph runs.
    if not isinstance(name, str) or name not in BACKENDS or not torch.compiler.is_compiling():
        named(name, op, x)
    return name
