"""Checkpoints of a model sharded by FSDP2: weights in one file, optimizer state in shards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["gather_weights", "load_optimizer", "load_weights", "save_optimizer"]

OPTIMIZER = "optimizer"


def gather_weights(
    model: nn.Module, keep: bool, names: set[str] | None = None
) -> dict[str, Tensor]:
    """The named weights, or all, whole, on the CPU, for the process with `keep`. Every process
    calls it; one weight at a time is gathered."""
    gathered = {}
    for name, value in model.state_dict().items():
        if names is not None and name not in names:
            continue
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            gathered[name] = whole.detach().cpu().clone()
    return gathered


@torch.no_grad()
def load_weights(
    model: nn.Module, folder: str | os.PathLike[str], names: set[str] | None = None
) -> None:
    """Loads the safetensors of a folder; each process reads all and keeps its shards.

    Args:
        names: of the weights that must be there; by default all.
    """
    held = model.state_dict()
    missing = set(held if names is None else names)
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name not in held:
                    raise ValueError(f"checkpoint: got one of another model ({name})")
                missing.discard(name)
                to, value = held[name], file.get_tensor(name)
                if isinstance(to, DTensor):
                    value = value.to(to.device, to.dtype)
                    value = distribute_tensor(
                        value, to.device_mesh, to.placements, src_data_rank=None
                    )
                to.copy_(value)
    if missing:
        raise ValueError(f"checkpoint: {folder} lacks {sorted(missing)[0]}")


def save_optimizer(model: nn.Module, optimizer: Any, folder: str | os.PathLike[str]) -> None:
    """Each process writes its shards; another number of processes can read them."""
    state = get_optimizer_state_dict(model, optimizer)
    dcp.save(state, checkpoint_id=Path(folder) / OPTIMIZER)


def load_optimizer(model: nn.Module, optimizer: Any, folder: str | os.PathLike[str]) -> None:
    state = get_optimizer_state_dict(model, optimizer)  # the shapes to read into
    dcp.load(state, checkpoint_id=Path(folder) / OPTIMIZER)
    set_optimizer_state_dict(model, optimizer, optim_state_dict=state)
