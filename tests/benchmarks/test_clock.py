"""The clock of a GPU, with its events played by the host."""

from types import SimpleNamespace

import torch
from helpers import fake_cuda

from benchmarks.common.timing import Clock


def test_the_cache_is_emptied_by_reading(monkeypatch):
    """Written lines would go back to memory within the time of the call, and count as its own."""
    steps = []
    monkeypatch.setattr(torch.cuda, "Event", fake_cuda.Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: steps.append("wait"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    buffer = SimpleNamespace(sum=lambda: steps.append("read"))
    clock = Clock("cuda", buffer)
    seconds = clock.seconds(lambda: steps.append("call"))
    assert steps == ["read", "wait", "call"]
    assert seconds > 0
