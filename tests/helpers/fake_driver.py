"""Triton's driver of a GPU that is not there: kernels are compiled or found in Triton's cache, then
loaded and launched by name alone. For what the host does before a launch, in Triton 3.6 to 3.9."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

__all__ = ["FakeDriver"]


class _Utils:
    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536}

    def load_binary(self, name, kernel, shared, device):
        return 1, 1, 255, 0, 1024

    def unload_module(self, module):
        pass

    def fill_tma_descriptor(self, *args):
        return object()

    fill_tma_descriptor_tiled = fill_tma_descriptor_im2col = fill_tma_descriptor

    def launch(self, *args):
        pass


class FakeDriver:
    """Attributes:
    launches: (name, grid, arguments) of every launch, in order. Names are those of the kernels'
        functions, arguments those of the functions' parameters.
    """

    def __init__(self, capability: int = 90, stream: int = 0) -> None:
        self.utils = _Utils()
        self.launches: list[tuple[str, tuple[int, int, int], tuple]] = []
        self._target = GPUTarget("cuda", capability, 32)
        self.stream = stream
        launches = self.launches

        class Launcher:
            def __init__(self, source, metadata):
                self.name = source.fn.__name__

            def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *args):
                launches.append((self.name, (x, y, z), args))

        self.launcher_cls = Launcher

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return self.stream

    def get_active_torch_device(self):
        return torch.device("cpu")

    @contextmanager
    def active(self, *functions):
        """Meanwhile Triton takes this driver, and `functions`, JIT functions, know no kernel."""
        before = driver._active  # the public way back asks for a real driver
        caches = [f.device_caches for f in functions]
        driver.set_active(self)
        for f in functions:
            f.device_caches = type(f.device_caches)(f.create_binder)
        try:
            yield self
        finally:
            for f, cache in zip(functions, caches, strict=True):
                f.device_caches = cache
            driver._active = before
