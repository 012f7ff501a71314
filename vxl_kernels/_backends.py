"""The backends: one table. A new one is a folder with functions of the operators' names, and a line
in `BACKENDS`.

A named backend runs the call or raises a ValueError with every reason. Nothing falls back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import _ext, _triton, linear, reference
from ._arguments import fail
from .layout import takes_ints

__all__ = ["BACKENDS", "OPERATORS", "Backend", "backends", "chosen", "default", "named", "serves"]


@dataclass(frozen=True)
class Backend:
    """What the operators need to know of a backend.

    Attributes:
        implements: names of the operators that it has. One without "vst_attention_backward"
            refuses inputs that require a gradient.
        reasons: a function. Given a tensor, it returns why the backend cannot compute on it; given
            None, why it cannot run on this machine at all. An empty list means that it can.
        kernel: from an operator's name to its function, which takes the arguments of the
            operator's schema but `backend`. Called below autograd, on the tensors' device.
        device: the backend runs by default, when a call names none, on devices of this type.
    """

    implements: frozenset[str]
    reasons: Callable[[torch.Tensor | None], list[str]]
    kernel: Callable[[str], Callable]
    device: str = ""

    def refusals(self, op: str, x: torch.Tensor) -> list[str]:
        """Every reason why it cannot run op on x."""
        missing = [] if op in self.implements else [f"it has no {op}"]
        return missing + self.reasons(x)


FIXED = frozenset(
    (
        "vst_attention",
        "vst_attention_backward",
        "rope_append",
        "rope_append_",
        "vst_linear",
        "invariant_linear",
    )
)
RAGGED = frozenset(
    (
        "vst_attention_varlen",
        "vst_attention_varlen_backward",
        "rope_append_varlen",
        "rope_append_varlen_",
    )
)
OPERATORS = FIXED | RAGGED
BACKENDS = {
    # The extension registers its kernels with the dispatcher itself: all but the linear products.
    "cpu": Backend(OPERATORS, _ext.reasons, lambda op: takes_ints(linear.vst_linear), "cpu"),
    "triton": Backend(OPERATORS, _triton.reasons, _triton.kernel, "cuda"),
    # The last one, and the one for every device that no other backend names.
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
        raise ValueError(f"backend {name!r} cannot run this call: {'; '.join(reasons)}")
    return BACKENDS[name]


def default(op: str, x: torch.Tensor) -> tuple[Backend, list[str]]:
    """The backend of x's device, or the reference with the reasons why that one cannot run."""
    if op == "vst_linear":  # PyTorch's products run on every device and dtype
        return BACKENDS["cpu"], []
    why = []
    for backend in BACKENDS.values():
        if backend.device == x.device.type:
            reasons = backend.refusals(op, x)
            if not reasons:
                return backend, []
            why += reasons
    return BACKENDS["reference"], why or [f"no backend is made for {x.device.type}"]


def serves(op: str, x: torch.Tensor, backend: str | None = None) -> bool:
    """Whether `backend` has a kernel of an operator for tensors like x. None: the device's own, and
    False where the slow reference would run in place of a kernel.

    Args:
        op: its name in `torch.ops.vxl`, such as "vst_attention_varlen_backward".
    """
    if not isinstance(op, str) or op not in OPERATORS:
        fail("op", repr(op), f"one of {', '.join(sorted(OPERATORS))}")
    if not isinstance(x, torch.Tensor):
        fail("x", type(x).__name__, "a tensor")
    if backend is None:
        return not default(op, x)[1]
    if not isinstance(backend, str) or backend not in BACKENDS:
        fail("backend", repr(backend), f"{', '.join(map(repr, BACKENDS))} or None")
    return not BACKENDS[backend].refusals(op, x)


def chosen(name: str | None, op: str, x: torch.Tensor, argument: str = "q") -> str:
    """The operators' `backend` argument: "" for the device's own, else a name that runs op on x."""
    if name is None:
        if x.dtype == torch.float64 and x.device.type == "cpu":
            fail(argument, x.dtype, "float32, bfloat16 or float16 (or backend='reference')")
        return ""
    # While a graph is traced only the name is looked at; the operator asks when the graph runs.
    if not isinstance(name, str) or name not in BACKENDS or not torch.compiler.is_compiling():
        named(name, op, x)
    return name
