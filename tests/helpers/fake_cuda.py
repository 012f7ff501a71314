"""A fake GPU: `play()` makes torch take every "cuda" for the CPU, and events for the host's clock.

With TRITON_INTERPRET=1 the project's kernels run on it. It shows that code written for a GPU runs
to its end and gives the right numbers. It shows neither speed nor behaviour of real hardware. It is
also a plugin of pytest, for tests that do not need a GPU's memory, graphs or compiler, in float32
(dtype0; the interpreter's products of bf16 are wrong). These 24 tests take 4 minutes:

    PYTHONPATH=tests:. TRITON_INTERPRET=1 python -m pytest -p helpers.fake_cuda -m gpu \\
        tests/triton/test_gpu.py -k "head_dims and dtype0"
"""

import time
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode


def _is_cuda(x):
    return (isinstance(x, str) and x.startswith("cuda")) or (
        isinstance(x, torch.device) and x.type == "cuda"
    )


class _Played(TorchFunctionMode):
    def __torch_function__(self, fn, types, args=(), kwargs=None):
        args = tuple("cpu" if _is_cuda(x) else x for x in args)
        kwargs = {n: "cpu" if _is_cuda(x) else x for n, x in (kwargs or {}).items()}
        return fn(*args, **kwargs)


class Event:
    """Complete as soon as it is recorded. `query` says that the queue is still busy."""

    def __init__(self, enable_timing=False):
        self.at = 0.0

    def record(self):
        self.at = time.perf_counter()

    def query(self):
        return False

    def elapsed_time(self, end):
        return max(1e-6, 1e3 * (end.at - self.at))


@contextmanager
def _nothing(*args, **kwargs):
    yield


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu" if _is_cuda(device) else device)


_PROPERTIES = SimpleNamespace(total_memory=80 << 30, multi_processor_count=132, name="played")


def play() -> None:
    """Starts it. Importing does not, since collecting doctests imports this file."""
    for name, fake in {
        "is_available": lambda: True,
        "get_device_name": lambda *args: "played GPU",
        "get_device_capability": lambda *args: (9, 0),
        "get_device_properties": lambda *args: _PROPERTIES,
        "synchronize": lambda *args: None,
        "set_sync_debug_mode": lambda mode: None,
        "_sleep": lambda cycles: None,
        "device": _nothing,
        "Event": Event,
    }.items():
        setattr(torch.cuda, name, fake)
    torch.Generator = Generator
    torch.Tensor.cuda = lambda self, *args, **kwargs: self.clone()
    _Played().__enter__()


def pytest_configure(config):
    """As a plugin (`-p helpers.fake_cuda`)."""
    play()
