"""Remembers the launches of a call, so that a later call of the same shapes is not planned again.

Planning, and Triton's inspection of every argument, take longer than the kernels of a short call.
Both depend only on shapes, strides, dtypes and alignment. A later call in which these are equal
makes the same launches with other pointers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from . import interpreted
from .launch_common import Launch

__all__ = ["remembered", "run"]

_new = object.__new__
_MAX_CALLS = 4096  # of `remembered`: lengths that never repeat would fill the memory
Tensors = Sequence[torch.Tensor | None]


@dataclass(frozen=True)
class _Prepared:
    """A compiled kernel with its grid, and its arguments but for the tensors of a call."""

    start: Callable[..., None]
    arguments: tuple[Any, ...]
    pointers: tuple[tuple[int, int], ...]
    """(place among the arguments, number of the tensor)"""
    descriptors: tuple[tuple[int, int, dict[str, Any]], ...]
    """The same, and the fields of the descriptor."""

    def __call__(self, tensors: Tensors) -> None:
        arguments = list(self.arguments)
        for place, number in self.pointers:
            arguments[place] = tensors[number]
        for place, number, fields in self.descriptors:
            arguments[place] = one = _new(TensorDescriptor)  # checked when it was made first
            one.__dict__ = {**fields, "base": tensors[number]}
        self.start(*arguments)


@dataclass(frozen=True)
class _Plan:
    launches: tuple[_Prepared, ...]
    made: tuple[torch.Tensor, ...]
    """Like the tensors that a call makes, of one element: results first, then what it needs."""


remembered: dict[tuple, _Plan] = {}


def _aspect(x: torch.Tensor | None) -> tuple | None:
    """What plans and Triton look at of a tensor. Kernels are compiled for aligned pointers."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % 16 == 0)


def run(
    rest: tuple,
    tensors: Tensors,
    plan: Callable[[], tuple[list[Launch], Tensors]],
) -> Tensors:
    """Launches a call's kernels.

    Args:
        rest: what decides the launches beside the tensors.
        tensors: the call's. The first one is on the device that runs it.
        plan: returns the launches and the tensors that it has made for them, results first.

    Returns:
        The tensors that were made for this call.
    """
    first = tensors[0]
    assert first is not None
    if interpreted():
        launches, made = plan()
        for launch in launches:
            launch()
        return made
    key = (rest, first.device, *map(_aspect, tensors))
    known = remembered.get(key)
    if known is None:
        launches, made = plan()
        kernels = [launch() for launch in launches]
        fresh = _prepare(launches, kernels, [*tensors, *made], made)
        if fresh is not None:
            if len(remembered) >= _MAX_CALLS:
                remembered.clear()
            remembered[key] = fresh
        return made
    made = [torch.empty_like(x) for x in known.made]  # a third less time than by shape and dtype
    every = [*tensors, *made]
    for prepared in known.launches:
        prepared(every)
    return made


def _prepare(
    launches: list[Launch], kernels: list[Any], tensors: Tensors, made: Tensors
) -> _Plan | None:
    """None where a launch takes a tensor that is neither the call's nor made for it (a copy, or a
    part of one), or where two are the same memory. Such a call is planned again each time."""
    numbers = {id(x): i for i, x in enumerate(tensors) if x is not None}
    places = {x.data_ptr(): i for i, x in enumerate(tensors) if x is not None}
    if len(places) < sum(x is not None for x in tensors):
        return None  # a tensor that is given twice may be two in a later call
    prepared = []
    for launch, kernel in zip(launches, kernels, strict=True):
        if kernel is None:
            return None
        arguments, pointers, descriptors = [], [], []
        for place, parameter in enumerate(launch.fn.params):
            value = launch.constexprs.get(parameter.name, launch.arguments.get(parameter.name))
            if isinstance(value, torch.Tensor):
                if id(value) not in numbers:
                    return None
                pointers.append((place, numbers[id(value)]))
                value = None
            elif isinstance(value, TensorDescriptor):
                if value.base.data_ptr() not in places:
                    return None
                fields = {name: x for name, x in vars(value).items() if name != "base"}
                descriptors.append((place, places[value.base.data_ptr()], fields))
                value = None
            arguments.append(value)
        grid = (*launch.grid, 1, 1)[:3]
        prepared.append(
            _Prepared(kernel[grid], tuple(arguments), tuple(pointers), tuple(descriptors))
        )
    like = (x.new_empty(1).expand(x.shape) for x in made if x is not None)
    return _Plan(tuple(prepared), tuple(like))
