"""Where a module's weights are: cut by tensor parallelism, or moved out by accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["execution_device", "local", "onloaded"]


def local(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter that tensor parallelism has cut."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes. Weights that accelerate has moved out are on another device, or on
    none."""
    hook: Any = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device(device)
    for own in module._parameters.values():  # several times a step: without walking the modules
        if own is not None:
            return own.device
    return next(module.parameters()).device


@contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    """The module's own weights are where it computes. A call of the module does this by itself."""
    if getattr(module, "_hf_hook", None) is None:
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield
