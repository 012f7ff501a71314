"""attn.py as on a GPU, with the CPU in its place: groups, clock, and the peers that run only there,
replaced by what they are documented to compute."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers.paths import ROOT, TESTS

# -- the peers ---------------------------------------------------------------------------------


def causal(q, k, v):
    """Causal, aligned to the lower right, one sequence per batch entry; (batch, rows, heads,
    head_dim)."""
    seen = k.shape[1] - q.shape[1]
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(seen)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2)


def flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens, causal):
    assert causal
    assert len(set(cache_seqlens.tolist())) == 1
    seen, rows = int(cache_seqlens[0]), q.shape[1]
    k_cache[:, seen : seen + rows], v_cache[:, seen : seen + rows] = k, v
    return globals()["causal"](q, k_cache[:, : seen + rows], v_cache[:, : seen + rows])


class BatchPrefillWithPagedKVCacheWrapper:
    def __init__(self, workspace, kv_layout):
        assert kv_layout == "NHD"

    def plan(self, rows, pages, indices, last, *sizes, causal, q_data_type):
        assert causal
        self.rows, self.pages, self.indices = rows.tolist(), pages.tolist(), indices
        self.last, self.page_size = last.tolist(), sizes[-1]

    def run(self, q, cache):
        outs = []
        for b, last in enumerate(self.last):
            own = self.indices[self.pages[b] : self.pages[b + 1]].long()
            keys = (len(own) - 1) * self.page_size + last
            k, v = (x[own].flatten(0, 1)[None, :keys] for x in cache)
            outs.append(causal(q[None, self.rows[b] : self.rows[b + 1]], k, v)[0])
        return torch.cat(outs)


PLAYED = {
    "flash_attn": {"flash_attn_with_kvcache": flash_attn_with_kvcache},
    "flashinfer": {"BatchPrefillWithPagedKVCacheWrapper": BatchPrefillWithPagedKVCacheWrapper},
}


@pytest.mark.parametrize("name", PLAYED)
@pytest.mark.parametrize(("chunks", "order"), [(1, "split"), (4, "split"), (3, "interleaved")])
def test_peers_take_a_call_for_each_chunk(monkeypatch, name, chunks, order):
    from benchmarks.common.cases import Case, Geometry, Inputs
    from benchmarks.common.oracle import attention_answer
    from benchmarks.peers.registry import PROVIDERS
    from vxl_kernels import ChunkLayout

    module = ModuleType(name)
    vars(module).update(PLAYED[name])
    monkeypatch.setitem(sys.modules, name, module)
    layout = ChunkLayout(48, 8, chunks, order)
    case = Case("chunk", Geometry.small(), 54, 2, "fp32", "cpu", layout=layout)
    assert PROVIDERS[name].unsupported(case) is None
    x = Inputs(case)
    run = PROVIDERS[name].prepare(x)
    answer = attention_answer(x, with_rope=False)
    assert answer.judge(run.rows(run.call())).ok
    assert answer.judge(run.rows(run.call())).ok  # a second call finds what the first left
    assert len(run.call()) == chunks


# -- the groups --------------------------------------------------------------------------------


def groups(*arguments):
    from benchmarks import attn
    from benchmarks.attention.groups import geometry, make_groups

    options = attn.parse(["--device", "cuda", *arguments])
    return options, make_groups(options, geometry(options))


def test_groups_of_a_gpu():
    _, found = groups()
    by_case = {g.competitors[0].case.name: g for g in found}
    four = by_case["chunk_c4"].competitors
    assert {e.case.layout.chunks for e in four} == {4}
    assert {e.case.cache_len for e in four} == {8100}
    assert {"vxl", "flash_attn", "flashinfer", "sdpa_bool"} <= {e.label for e in four}
    for group in found:
        labels = [e.label for e in group.competitors]
        assert "triton" not in labels, f"{group.name}: the same launches as vxl, timed twice"
    pages = [e.case.geometry.page_size for e in by_case["pages"].competitors]
    assert pages == [16, 128]
    main = [g for g in found if g.name != "pages"]
    assert {e.case.geometry.page_size for g in main for e in g.competitors} == {128}
    _, asked = groups("--provider", "triton", "--case", "chunk")
    assert {e.label for g in asked for e in g.competitors} == {"triton"}


# -- the clock ---------------------------------------------------------------------------------


class PlayedGpu:
    """A queue with its own clock. Work starts when it is queued, or when the work before it
    ends."""

    def __init__(self):
        self.free_at = 0.0

    def queue(self, seconds):
        self.free_at = max(self.free_at, time.perf_counter()) + seconds

    def event(self, enable_timing):
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", max(self.free_at, time.perf_counter()))
        event.query = lambda: time.perf_counter() >= event.at
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event

    def synchronize(self):
        time.sleep(max(0.0, self.free_at - time.perf_counter()))


@pytest.fixture
def gpu(monkeypatch):
    played = PlayedGpu()
    monkeypatch.setattr(torch.cuda, "Event", played.event)
    monkeypatch.setattr(torch.cuda, "synchronize", played.synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: played.queue(cycles / 1.7e9))
    return played


def test_no_number_includes_the_hosts_time(gpu):
    """A call of 5 ms in Python and 1 ms on the GPU takes 1 ms."""
    from benchmarks.common.timing import Clock

    def call():
        gpu.queue(0.0005)
        time.sleep(0.005)
        gpu.queue(0.0005)

    clock = Clock("cuda", torch.empty(0))
    for _ in range(3):
        assert clock.seconds(call) == pytest.approx(0.001, rel=1e-3)
        assert clock.queued_ahead
        assert clock.host_seconds >= 0.005


def test_a_call_that_waits_for_the_gpu_is_known(gpu):
    from benchmarks.common.timing import Clock

    calls = []

    def call():
        calls.append(1)
        gpu.synchronize()
        gpu.queue(0.001)

    clock = Clock("cuda", torch.empty(0))
    clock.seconds(call)
    assert not clock.queued_ahead
    first = len(calls)
    assert first > 1
    clock.seconds(call)
    assert not clock.queued_ahead
    assert len(calls) == first + 1  # it is remembered
    clock.seconds(lambda: gpu.queue(0.001))
    assert clock.queued_ahead


# -- what is wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "status"), [("sdpa_bool", 0), ("vxl", 1)])
def test_only_our_wrong_results_are_failures(monkeypatch, tmp_path, name, status):
    from benchmarks import attn
    from benchmarks.common.run import Run
    from benchmarks.peers.registry import PROVIDERS

    right = PROVIDERS[name].prepare

    def wrong(x):
        run = right(x)
        return Run(run.call, lambda out: run.rows(out) + 1)

    monkeypatch.setitem(PROVIDERS, name, dataclasses.replace(PROVIDERS[name], prepare=wrong))
    path = tmp_path / "a.json"
    options = ["--small", "--device", "cpu", "--case", "tail", "--provider", "vxl,sdpa_bool"]
    assert attn.main([*options, "--repeats", "1", "--json", str(path)]) == status
    records = {r["provider"]: r for r in json.loads(path.read_text())}
    assert records[name]["ok"] is False
    assert records[name]["ms"] is None
    assert "WRONG" in records[name]["note"]


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("where", ["kernel", "judge"])
def test_a_late_error_is_the_providers(monkeypatch, where, ours):
    """A GPU's kernel fails after the call has returned. A result of another shape fails in the
    check."""
    from benchmarks import attn
    from benchmarks.common.report import Result
    from benchmarks.common.run import Run

    def fail(*args):
        raise RuntimeError(f"in the {where}")

    monkeypatch.setattr(torch.cuda, "synchronize", fail if where == "kernel" else lambda: None)
    provider = SimpleNamespace(prepare=lambda x: Run(lambda: None, lambda out: out), ours=ours)
    answer = SimpleNamespace(judge=fail)
    x = SimpleNamespace(case=SimpleNamespace(device="cuda"))
    result = Result("chunk", "a", "bf16", 0, 1)
    competitor = SimpleNamespace(provider=provider, threads=None)
    assert attn.Runner._checked(competitor, x, answer, result) == (None, 0.0)
    assert result.note == f"failed: RuntimeError: in the {where}"
    assert result.ok is (False if ours else None)


# -- all of it ---------------------------------------------------------------------------------


def test_attn_to_its_end(tmp_path):
    """The interpreter replaces compiled kernels, and the host's clock that of events."""
    pytest.importorskip("triton")
    path = tmp_path / "a.json"
    code = (
        "import sys; from helpers import fake_cuda; from benchmarks import attn; "
        "fake_cuda.play(); sys.exit(attn.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            "--small",
            "--case",
            "decode",
            "--dtype",
            "fp32",
            "--repeats",
            "1",
            "--json",
            str(path),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, TESTS))),
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads(path.read_text())
    ours = [r for r in records if r["provider"].startswith("vxl")]
    assert len(ours) == 4
    assert all(r["ok"] and r["ms"] > 0 and r["host_ms"] > 0 for r in ours)
    assert "host ms  % H100" in done.stdout
    assert all(r["of_h100"] == pytest.approx(r["gb_per_s"] / 3000) for r in ours if r["gb_per_s"])
    assert "of copy\nbandwidth" in done.stdout
