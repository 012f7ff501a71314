"""What is compiled ahead is what a launch looks for in Triton's cache. The launches are real, down
to the driver, which is played."""

import os
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
from helpers.fake_driver import FakeDriver
from triton.compiler import ASTSource
from triton.compiler import compiler as triton_compiler

from benchmarks.codegen import ahead
from vxl_kernels._triton import catalog, launch, launch_ragged

pytestmark = pytest.mark.core


class AskedError(Exception):
    """Triton has looked up a key in its cache on disk."""


def key_asked(call):
    with (
        mock.patch.object(triton_compiler, "get_cache_manager", side_effect=AskedError) as cache,
        pytest.raises(AskedError),
    ):
        call()
    (key,) = cache.call_args.args
    return key


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_a_launch_finds_what_was_compiled_ahead(capability):
    """Every kernel of the catalog, by Triton's own key."""
    planned, make = [], catalog.compilation

    def recorded(one, *args):
        planned.append(one)
        return make(one, *args)

    with mock.patch.object(catalog, "compilation", recorded):
        catalog.shipped(f"cuda:{capability}")
    assert len(planned) > 20
    assert {"plan_ragged", "rope_append_ragged"} < {one.name for one in planned}
    functions = {p.fn for p in planned}
    with FakeDriver(capability).active(*functions) as driver:
        for one in planned:
            entry = make(one, "", torch.bfloat16)
            source = ASTSource(entry.fn, entry.signature, entry.constexprs, entry.attrs)
            options = {"num_warps": entry.num_warps, "num_stages": entry.num_stages}
            options |= entry.options
            target = driver.get_current_target()
            ahead_key = key_asked(lambda: triton.compile(source, target=target, options=options))  # noqa: B023
            assert key_asked(one) == ahead_key, (entry.kernel, one.constexprs)


RAGGED = [(1, 1, 9), (32, 32, 170), (1620, 1, 170), (3300, 40, 256)]
"""(rows, sequences, pages of a table)"""


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("page_size", [16, 128])
def test_ragged_calls_of_any_lengths_find_it(page_size, capability):
    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    arch, planned = f"cuda:{capability}", []
    ints = {"dtype": torch.int32}
    for rows, sequences, pages in RAGGED:
        q, k = empty(rows, 28, 128), empty(rows, 4, 128)
        cache = empty(700, page_size, 4, 128)
        table, lens = empty(sequences, pages, **ints), empty(sequences, **ints)
        call = (q, k, k, cache, cache, table, lens, empty(sequences, 5, **ints))
        planned += launch_ragged.plan_attention_varlen(*call, sequences, 1.0, arch)[0]
        inv_freq = empty(64, dtype=torch.float32)
        planned.append(launch_ragged.plan_rope_append_varlen(*call, inv_freq, q, k))
    entries = ahead.reached(arch, page_sizes=[page_size], gradients=False)
    entries = [e for e in entries if e.kernel.endswith("_ragged")]
    with FakeDriver(capability).active(*{p.fn for p in planned}) as driver:
        target, keys = driver.get_current_target(), set()
        for e in entries:
            source = ASTSource(e.fn, e.signature, e.constexprs, e.attrs)
            options = {"num_warps": e.num_warps, "num_stages": e.num_stages, **e.options}
            keys.add(key_asked(lambda: triton.compile(source, target=target, options=options)))  # noqa: B023
        assert {key_asked(one) for one in planned} == keys


def test_a_launch_compiles_nothing_after_it(tmp_path, monkeypatch):
    """From end to end, in a cache of its own."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x = torch.zeros(1, 1, 4, 32, dtype=torch.float16)
    cache = torch.zeros(4, 16, 4, 32, dtype=torch.float16)
    table, lens = torch.zeros(1, 4, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    inv_freq = torch.zeros(16)
    call = (x, x, x, cache, cache, table, lens, [], inv_freq, x, x)
    one = launch.plan_rope_append(*call)
    entry = catalog.compilation(one, "rope", torch.float16)
    assert ahead.compile_all([entry], "cuda:90", jobs=1) == {}
    files = sorted(p for p in tmp_path.rglob("*") if p.suffix == ".cubin")
    assert len(files) == 1
    with FakeDriver(90).active(one.fn) as driver:
        one()
    assert [(name, grid) for name, grid, _ in driver.launches] == [
        ("rope_append_kernel", (1, 1, 1))
    ]
    assert sorted(p for p in tmp_path.rglob("*") if p.suffix == ".cubin") == files


def test_what_does_not_compile_is_named():
    x = torch.zeros(1, 1, 4, 32)
    cache, table = torch.zeros(4, 16, 4, 32), torch.zeros(1, 4, dtype=torch.int32)
    lens, inv_freq = torch.zeros(1, dtype=torch.int32), torch.zeros(16)
    call = (x, x, x, cache, cache, table, lens, [], inv_freq, x, x)
    entry = catalog.compilation(launch.plan_rope_append(*call), "rope", torch.float32)
    entry.constexprs["BLOCK_H"] = 3  # no power of two
    failed = ahead.compile_all([entry], "cuda:90", jobs=1)
    assert list(failed) == ["rope_append rope"]
