"""Every argument of every public function gets numbers of the wrong kind. One ValueError names the
argument, and nothing changes."""

import inspect
import re

import numpy as np
import pytest
import torch

import vxl_kernels
from vxl_kernels import CacheBatch, ChunkLayout, VarlenLayout, VstCache
from vxl_kernels.testing import inverse_frequencies, make_inputs

LAYOUT = ChunkLayout(6, 2)
CALL = dict(zip(("q", "k", "v", "k_cache", "v_cache", "block_table", "cache_seqlens", "layout"),
                make_inputs((5,), LAYOUT, head_dim=16).args(), strict=True))  # fmt: skip
TEXT = dict(zip(CALL, make_inputs((5,), None, rows=5, head_dim=16).args(), strict=True))
LINEAR = {"x": torch.ones(1, LAYOUT.rows, 3), "weight": torch.ones(5, 3), "bias": torch.ones(5),
          "vst_weight": torch.ones(5, 3), "vst_bias": torch.ones(5), "layout": LAYOUT}  # fmt: skip
SIZES = {"num_layers": 2, "kv_heads": 1, "head_dim": 16, "num_pages": 4, "page_size": 4}
METHODS = {
    "fork": {},
    "truncate": {"length": 1},
    "free": {},
    "length": {},
    "gather": {"layer": 0},
    "offload": {},
    "save": {"path": "/nowhere/at.all"},
}


def make_cache():
    cache = VstCache(**SIZES)
    seq = cache.new()
    cache.reserve(seq, 3)
    cache.commit(seq, 2)
    return cache, seq


def public_calls():
    """Name, function, good arguments and what to look at afterwards."""
    cache, seq = make_cache()
    batch = cache.batch([seq])
    yield "vst_attention", vxl_kernels.vst_attention, {**CALL, "scale": 0.5}
    rope = {**CALL, "inv_freq": inverse_frequencies(16)}
    yield "rope_append", vxl_kernels.rope_append, rope
    ragged = VarlenLayout([5])
    flat = {name: x[0] if name in ("q", "k", "v") else x for name, x in TEXT.items()}
    flat["layout"] = ragged
    yield "vst_attention_varlen", vxl_kernels.vst_attention_varlen, {**flat, "scale": 0.5}
    flat = {**flat, "inv_freq": rope["inv_freq"]}
    yield "rope_append_varlen", vxl_kernels.rope_append_varlen, flat
    yield "VarlenLayout", VarlenLayout, {"sequences": [5]}
    yield "vst_linear", vxl_kernels.vst_linear, LINEAR
    rows = {name: LINEAR[name] for name in ("x", "weight", "bias")}
    yield "invariant_linear", vxl_kernels.invariant_linear, rows
    yield "backends", vxl_kernels.backends, {}
    yield "serves", vxl_kernels.serves, {"op": "vst_attention", "x": torch.zeros(1)}
    yield "ChunkLayout", ChunkLayout, {"window": 6, "ratio": 2}
    for name, given in (("materialize", {}), ("draw", {}), ("pairs", {})):
        yield f"ChunkLayout.{name}", getattr(LAYOUT, name), given
    x = torch.zeros(1, LAYOUT.rows, 4)
    raw, vst = LAYOUT.split_rows(x)
    yield "ChunkLayout.split_rows", LAYOUT.split_rows, {"x": x}
    yield "ChunkLayout.join_rows", LAYOUT.join_rows, {"raw": raw, "vst": vst}
    yield "ChunkLayout.flops", LAYOUT.flops, {"heads": 2, "head_dim": 16}
    yield "VstCache", VstCache, SIZES
    yield "VstCache.memory_for", VstCache.memory_for, {"frames": 8, "ratio": 8}
    for name, given in METHODS.items():
        yield f"VstCache.{name}", getattr(cache, name), {"seq": seq, **given}
    yield "VstCache.reserve", cache.reserve, {"seqs": seq, "rows": 1}
    yield "VstCache.commit", cache.commit, {"seqs": seq, "rows": 1}
    yield "VstCache.batch", cache.batch, {"seqs": seq}
    yield "VstCache.restore", cache.restore, {"host": make_cache()[0].offload(0)}
    yield "CacheBatch", CacheBatch, {"cache": cache, "seqs": [seq]}
    yield "CacheBatch.reserve", batch.reserve, {"rows": 1}
    yield "CacheBatch.commit", batch.commit, {"rows": 1}
    yield "CacheBatch.layer", batch.layer, {"i": 0}


CALLS = {name: rest for name, *rest in public_calls()}

NAN, HUGE, GRADIENT = float("nan"), 2**70, torch.tensor(0.5, requires_grad=True)
INTEGERS = set(SIZES) | {
    "window", "ratio", "chunks", "cache_len", "heads", "length", "layer", "rows", "max_tokens", "i",
    "frames", "prompt", "tail", "questions", "tokens_per_frame",
}  # fmt: skip
WRONG_INTEGERS = [
    2.5, -1, HUGE, 2**100_000, True, NAN, 1j, "1", [1], (1,), np.ones(1, int), torch.ones(2).int(),
    np.float64(1), np.True_, torch.tensor(True),
]  # fmt: skip
WRONG_ROWS = [  # a number, or one for each of one sequence
    2.5, -1, HUGE, 2**100_000, True, NAN, 1j, "1", [], [1, 1], [2.5], [-1], [HUGE], [True], [[1]],
    torch.ones(2).int(), np.float64(1), np.True_, torch.tensor(True),
]  # fmt: skip
WRONG_IDS = [2.5, HUGE, True, NAN, "0", [0.0], [[0]], [HUGE], np.zeros(1), np.zeros((1, 1), int)]
WRONG = {
    "scale": [
        NAN, float("inf"), -float("inf"), 1e39, 2**5000, True, "0.5", 1j, [0.5], (0.5,),
        np.ones(1), torch.ones(2), GRADIENT,
    ],
    "seqs": WRONG_IDS,
    "seq": [*WRONG_IDS, [0]],
    **dict.fromkeys(INTEGERS, WRONG_INTEGERS),
}  # fmt: skip
FREE = {"path", "device", "inplace", "return_lse", "cache"}  # no numbers, and said by Python


def parameters():
    for name, (function, _) in CALLS.items():
        for parameter in inspect.signature(function).parameters:
            if parameter not in FREE:
                yield name, parameter


@pytest.mark.parametrize(("name", "parameter"), list(parameters()))
def test_wrong_numbers_are_refused_by_name(name, parameter):
    function, given = CALLS[name]
    cache = getattr(function, "__self__", None)
    pool = cache if isinstance(cache, VstCache) else getattr(cache, "cache", None)
    before = pool.stats() if pool else None
    wrong = WRONG.get(parameter, [2.5, HUGE])
    if parameter == "rows" and name.endswith((".reserve", ".commit")):
        wrong = WRONG_ROWS
    for value in wrong:
        with pytest.raises(ValueError, match=rf"^{re.escape(parameter)}(\[0\])?: got ") as caught:
            function(**{**given, parameter: value})
        assert len(str(caught.value)) < 300
        assert "\n" not in str(caught.value)
    assert (pool.stats() if pool else None) == before


def test_the_table_has_every_public_function():
    public = set()
    for name in vxl_kernels.__all__:
        thing = getattr(vxl_kernels, name)
        if callable(thing) and thing not in (vxl_kernels.PoolExhausted, vxl_kernels.HostSequence):
            public.add(name)
        if thing in (ChunkLayout, VstCache, CacheBatch):
            public |= {
                f"{name}.{method}"
                for method, function in vars(thing).items()
                if not method.startswith("_") and callable(getattr(thing, method))
                and set(inspect.signature(getattr(thing, method)).parameters)
                - {"self", "device", "path"}
            }  # fmt: skip
    assert public <= set(CALLS)


GOOD_INTEGERS = [2, np.int64(2), np.uint8(2), torch.tensor(2)]


@pytest.mark.parametrize("two", GOOD_INTEGERS, ids=lambda x: type(x).__name__)
def test_integers_of_other_packages_are_numbers(two):
    layout = ChunkLayout(two, two, chunks=two)
    assert layout == ChunkLayout(2, 2, chunks=2)
    assert layout.pairs(two) == ChunkLayout(2, 2, chunks=2).materialize(2).sum()
    cache = VstCache(two, two, 16, num_pages=two, page_size=two)
    seq = cache.new()
    for seqs in (np.int64(seq), np.array([seq]), torch.tensor([seq]), iter([seq])):
        cache.reserve(seqs, two)
    batch = cache.batch(np.array([seq], np.uint64), max_tokens=two)
    batch.commit(two)
    assert cache.length(torch.tensor(seq)) == 2


@pytest.mark.parametrize("scale", [0, 1, -0.3, 1e-30, np.float32(0.5), torch.tensor(0.5)])
def test_any_finite_scale(scale):
    inputs = make_inputs((5,), LAYOUT, head_dim=16)
    ours = vxl_kernels.vst_attention(*inputs.args(), scale=scale)
    theirs = vxl_kernels.vst_attention(*inputs.args(), scale=float(scale), backend="reference")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
