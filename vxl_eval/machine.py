"""What a number was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

__all__ = ["describe_machine"]


def describe_machine(device: torch.device) -> str:
    """The device in words, with the releases that decide numbers."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()}, {len(os.sched_getaffinity(0))} cores" if _linux() else _processor()
    return f"{name}, torch {torch.__version__}"


def _linux() -> bool:
    return hasattr(os, "sched_getaffinity")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
