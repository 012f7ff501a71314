"""CUDA graphs without a GPU: what is captured is run again, operator by operator, on the tensors of
the capture. Python takes no part in a replay, so a number that the host read at the capture stays.
A read of a tensor's value during a capture raises, as on a GPU."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["PlayedGraph", "playing"]

READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")


class _Recorder(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(name in func.__name__ for name in READS):
            raise RuntimeError(f"{func} while a graph is captured")
        out = func(*args, **kwargs)
        self.graph.calls.append((func, args, kwargs, out))
        return out


class PlayedGraph:
    """Attributes:
    calls: (operator, arguments, keywords, result) of the capture.
    how: keywords of the capture.
    replays: how often it was run again.
    made: all of them.
    log: ("replay", graph), and ("record" or "wait", event) of streams, in order.
    """

    made: list[PlayedGraph] = []  # noqa: RUF012
    log: list[tuple] = []  # noqa: RUF012

    def __init__(self):
        self.calls, self.replays, self.how = [], 0, {}
        self.made.append(self)

    def replay(self):
        self.replays += 1
        self.log.append(("replay", self))
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs))
                         if isinstance(x, torch.Tensor)}  # fmt: skip
                again = tree_leaves(func(*args, **kwargs))
                for kept, fresh in zip(tree_leaves(out), again, strict=True):
                    own = isinstance(kept, torch.Tensor)
                    if own and kept.untyped_storage().data_ptr() not in given:
                        kept.copy_(fresh)


@contextmanager
def playing():
    """Meanwhile torch.cuda's graphs and streams are played; yields the graphs made."""

    @contextmanager
    def graph(played, **how):
        played.how = how
        with _Recorder(played):
            yield

    @contextmanager
    def stream(one):
        yield

    def record_event():
        event = object()
        PlayedGraph.log.append(("record", event))
        return event

    def a_stream(*args):
        return SimpleNamespace(
            wait_stream=lambda other: None,
            wait_event=lambda event: PlayedGraph.log.append(("wait", event)),
            record_event=record_event,
            device=args[0],
        )

    PlayedGraph.made, PlayedGraph.log = [], []
    with (
        mock.patch.object(torch.cuda, "CUDAGraph", PlayedGraph),
        mock.patch.object(torch.cuda, "graph", graph),
        mock.patch.object(torch.cuda, "graph_pool_handle", return_value="pool"),
        mock.patch.object(torch.cuda, "Stream", a_stream),
        mock.patch.object(torch.cuda, "current_stream", a_stream),
        mock.patch.object(torch.cuda, "stream", stream),
    ):
        yield PlayedGraph.made
