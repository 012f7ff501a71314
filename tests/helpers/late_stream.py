"""A late stream of a fake GPU: copies that the host does not wait for are made only when it waits.
It shows host reads of memory that a device has not written yet. The CPU does the work."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import torch

from vxl_kernels import VstCache

__all__ = ["LateStream"]


class _Device:
    """A device of type "cuda", for code that asks for the type."""

    type = "cuda"
    index = 0


class LateStream:
    """Makes copies with `non_blocking=True` from and to `device`, in their order, when the host
    waits or when the device's own work, which comes after them, is read."""

    def __init__(self) -> None:
        self.device = _Device()
        self.queue: list[Callable[[], object]] = []
        self.waited = 0
        self.left_to_the_stream: list[object] = []

    def finish(self) -> None:
        while self.queue:
            self.queue.pop(0)()

    def _synchronize(self) -> None:
        self.waited += 1
        self.finish()

    @contextmanager
    def playing(self, *caches: VstCache):
        """`caches`, which are on the CPU, count as on the device until the end."""
        copy_, to, empty = torch.Tensor.copy_, torch.Tensor.to, torch.empty

        def late_copy(x, source, non_blocking=False):
            if not non_blocking:
                return copy_(x, source)
            taken = source.clone()  # the device's work up to here
            self.queue.append(lambda: copy_(x, taken))
            return x

        def late_to(x, *args, **kwargs):
            if not args or args[0] is not self.device:
                return to(x, *args, **kwargs)
            if not kwargs.get("non_blocking"):
                return x.clone()
            # Only the device waits: it reads the host's memory after all that was queued before.
            self.finish()
            return x.clone()

        def empty_unpinned(*args, pin_memory=False, **kwargs):
            x = empty(*args, **kwargs)
            return x.fill_(-77) if pin_memory and x.is_floating_point() else x

        def event():
            return SimpleNamespace(record=lambda stream: None, synchronize=self._synchronize)

        stream = SimpleNamespace(wait_event=self.left_to_the_stream.append)
        before = [cache.device for cache in caches]
        with (
            mock.patch.object(torch.Tensor, "copy_", late_copy),
            mock.patch.object(torch.Tensor, "to", late_to),
            mock.patch.object(torch.Tensor, "pin_memory", torch.Tensor.clone),
            mock.patch.object(torch, "empty", empty_unpinned),
            mock.patch.object(torch.cuda, "Event", event),
            mock.patch.object(torch.cuda, "current_stream", return_value=stream),
        ):
            for cache in caches:
                cache.device = self.device
            try:
                yield self
            finally:
                for cache, device in zip(caches, before, strict=True):
                    cache.device = device
                self.finish()
