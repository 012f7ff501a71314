"""The Triton kernels. Importing this loads neither triton nor them: `reasons` and `kernel` do.

primitives.py keys.py softmax.py
               what kernels share: rows and positions, keys in pages, the online softmax
prefill.py decode.py backward_q.py backward_kv.py linear.py invariant.py rope.py   the kernels
configs.py     tile shapes per architecture, with reasons; tune.py can override them
ragged.py attention_ragged.py backward_ragged.py   those of ragged calls
launch.py launch_ragged.py launch_backward.py launch_backward_ragged.py launch_common.py
               tensors -> launches, without reading a tensor's values
remember.py    launches of earlier calls, for calls like them
catalog.py     what is shipped, for compiling ahead of time
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable

import torch

__all__ = ["architecture", "interpreted", "kernel", "reasons"]

_OLDEST = (3, 6)
_MAX_BATCH = 65535  # of a grid's second axis


@functools.cache
def _missing() -> str | None:
    """Why triton cannot be used at all, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        triton = importlib.import_module("triton")
        importlib.import_module("triton.language")
    except Exception as error:  # a broken install raises anything
        return f"triton does not import ({type(error).__name__}: {error})"
    version = tuple(int(n) for n in triton.__version__.split(".")[:2])
    if version < _OLDEST:
        return f"triton is {triton.__version__}, older than {'.'.join(map(str, _OLDEST))}"
    return None


def kernel(op: str) -> Callable:
    """The launcher of an operator."""
    module = "launch_backward" if op.endswith("_backward") else "launch"
    module += "_ragged" if "varlen" in op else ""
    return getattr(importlib.import_module(f".{module}", __name__), op)


@functools.cache
def interpreted() -> bool:
    """Whether the kernels were loaded under TRITON_INTERPRET=1, for the CPU."""
    triton, prefill = (importlib.import_module(m) for m in ("triton", f"{__name__}.prefill"))
    return not isinstance(prefill.prefill_kernel, triton.JITFunction)


@functools.cache
def _too_old(device: torch.device) -> str | None:
    if torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"the GPU is sm_{major}{minor}, older than sm_80" if major < 8 else None


def _interpreter_breaks() -> str | None:
    """Why the interpreter fails with this numpy, or None. Triton 3.6's takes arrays of one element
    for numbers (3.7.1's does not)."""
    triton, numpy = (importlib.import_module(name) for name in ("triton", "numpy"))
    ours, theirs = (tuple(int(n) for n in m.__version__.split(".")[:2]) for m in (triton, numpy))
    if ours >= (3, 7) or theirs < (2, 4):
        return None
    return (
        f"the interpreter of triton {triton.__version__} does not work with numpy "
        f"{numpy.__version__}: it needs numpy < 2.4, or triton >= 3.7"
    )


def reasons(x: torch.Tensor | None) -> list[str]:
    """Why the kernels cannot run on x (for None: on this machine at all). Empty: they can."""
    missing = _missing()
    if missing:
        return [missing]
    on_cpu = interpreted()
    broken = _interpreter_breaks() if on_cpu else None
    if broken:
        return [broken]
    if x is None:
        if on_cpu or torch.cuda.is_available():
            return []
        return ["there is no GPU (and TRITON_INTERPRET=1 was not set for the interpreter)"]
    found = []
    if x.device.type == "cuda":
        too_old = _too_old(x.device)
        found += [too_old] if too_old else []
    elif x.device.type != "cpu":
        found.append(f"tensors are on {x.device}")
    elif not on_cpu:
        found.append("tensors are on the CPU (and TRITON_INTERPRET=1 was not set)")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        found.append(f"dtype {x.dtype} is not float32, float16 or bfloat16")
    elif x.dtype == torch.bfloat16 and on_cpu:
        found.append("Triton's interpreter computes products of bfloat16 wrongly")
    if x.dim() == 4 and x.shape[0] > _MAX_BATCH:
        found.append(f"batch {x.shape[0]} is larger than {_MAX_BATCH}")
    return found


@functools.cache
def architecture(device: torch.device) -> str:
    """ "cuda:90", "hip:gfx942"; for the interpreter and meta tensors "cuda:80"."""
    if device.type != "cuda":
        return "cuda:80"
    if torch.version.hip:
        return "hip:" + torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda:{major}{minor}"
