"""Modes of a caller that must not reach later calls."""

import contextlib

import torch


@contextlib.contextmanager
def default_dtype(dtype):
    """Another default dtype inside a `with` block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
