"""vst_attention's Triton kernels against the float64 truth, and against themselves."""

import dataclasses

import pytest
import torch
from helpers.attention_properties import check_chunks_at_once, check_neighbours, check_strides
from helpers.strategies import calls
from helpers.triton_cases import CASES, HALF, WITHOUT_CACHE, attend, call
from hypothesis import HealthCheck, given, settings

from vxl_kernels import ChunkLayout, ops
from vxl_kernels._triton import configs, launch
from vxl_kernels.testing import check_attention, make_inputs, poisoned_memory

core = pytest.mark.core


@core
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("small_tiles")
def test_against_the_truth(name):
    inputs = call(name)
    with poisoned_memory():
        out, lse = attend(inputs)
    check_attention(inputs, out, lse)


@core
@pytest.mark.parametrize("name", WITHOUT_CACHE)
@pytest.mark.usefixtures("small_tiles")
def test_without_a_cache(name):
    inputs = call(name)
    with poisoned_memory():
        out, lse = attend(inputs, cache=False)
    check_attention(inputs, out, lse)
    empty_out, empty_lse = attend(inputs)
    assert torch.equal(out, empty_out)
    assert torch.equal(lse, empty_lse)


@pytest.mark.usefixtures("small_tiles")
def test_the_cases_take_every_branch():
    """Without a case, a branch would be compiled for users and never run here."""
    taken: dict[str, set] = {}
    for name in (*CASES, *WITHOUT_CACHE):
        x = call(name)
        tensors = list(x.args()[:-1])
        if name in WITHOUT_CACHE:
            tensors[3:] = [None] * 4
        launches, _, _ = launch.plan_attention(*tensors, ops.layout_to_ints(x.layout), 1.0)
        c = launches[0].constexprs
        odd = c["HEAD_DIM"] != c["BLOCK_D"]
        branch = (c["HAS_CACHE"], c["PAGE_MODE"], odd)
        taken.setdefault(launches[0].name, set()).add(branch)
    for kernel, column in (("prefill", 0), ("prefill", 2), ("decode", 0), ("decode", 2)):
        assert {b[column] for b in taken[kernel]} == {True, False}, (kernel, column)
    for kernel in ("prefill", "decode"):
        assert {b[1] for b in taken[kernel]} == {"block_in_page", "pages_in_block", "gather"}


@core
@pytest.mark.parametrize(
    "name", ["split, whole pages", "interleaved", "text", "one page a sequence", "split, no cache",
             "decode, whole pages", "decode, two tiles"]
)  # fmt: skip
@pytest.mark.usefixtures("small_tiles")
def test_tma_loads_the_same(name, monkeypatch):
    """Blocks by descriptor, as on sm_90, and by pointers: the same bits."""
    cache = name in CASES
    inputs = make_inputs(**CASES[name] | {"page_size": 64}) if name == "text" else call(name)
    out, lse = attend(inputs, cache)
    constants, make = [], launch.Launch
    monkeypatch.setattr(configs, "has_tma", lambda arch: True)
    monkeypatch.setattr(
        launch, "Launch", lambda *args, **options: constants.append(args[4]) or make(*args)
    )
    tma_out, tma_lse = attend(inputs, cache)
    assert constants[0]["TMA"]
    assert torch.equal(out, tma_out)
    assert torch.equal(lse, tma_lse)


@core
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(
    "shape",
    [
        {"layout": ChunkLayout(150, 8), "cache_seqlens": (150,)},
        {"rows": 60, "cache_seqlens": (200,)},
        {"rows": 100, "cache_seqlens": (200,)},
        {"rows": 9, "cache_seqlens": (330,)},
        {"rows": 1, "cache_seqlens": (600,)},
    ],
)
def test_shipped_tiles(shape, dtype):
    inputs = make_inputs(**shape, heads=7, kv_heads=1, head_dim=64, page_size=64, dtype=dtype)
    with poisoned_memory():
        out, lse = attend(inputs)
    check_attention(inputs, out, lse)


@core
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.usefixtures("small_tiles")
def test_groups_of_a_batch_are_the_whole_batch(cache, monkeypatch):
    """Where parts of all sequences are too much memory at once: the same bits."""
    inputs = make_inputs((130, 0, 70, 64, 9), rows=3, heads=4, kv_heads=2, page_size=16)
    whole = attend(inputs, cache)
    parts = 4 * inputs.q[0].numel() * (1 + -(-inputs.block_table.shape[1] * 16 // 64) * cache)
    for sequences in (1, 2):
        monkeypatch.setattr(launch, "_PARTS_BYTES", sequences * parts)
        with poisoned_memory():
            out, lse = attend(inputs, cache)
        assert torch.equal(out, whole[0])
        assert torch.equal(lse, whole[1])


@core
@pytest.mark.parametrize(
    ("arch", "width", "slack", "parts"),
    [("cuda:80", 64, 8.0, 8), ("cuda:80", 128, 8.0, 1), ("cuda:90", 128, 8.0, 8),
     ("hip:gfx942", 128, 0.0, 8)],
)  # fmt: skip
@pytest.mark.parametrize("name", ["sharp", "sharp, decode"])
@pytest.mark.usefixtures("small_tiles")
def test_the_softmax_of_each_architecture(arch, width, slack, parts, name, monkeypatch):
    """The interpreter plans for sm_80. Other architectures keep references and sums in other ways.
    Decode runs in tiles of 64 packed rows. With fewer, all warps share rows and sums."""
    constants, used = configs.softmax_constants, []

    def of_arch(_arch, config, _width, itemsize):
        used.append(constants(arch, config, width, 2))
        return used[-1]

    monkeypatch.setattr(configs, "softmax_constants", of_arch)
    if name == "sharp, decode":
        tile = configs.AttentionConfig(64, 32, 16, 4, 2)
        monkeypatch.setattr(configs, "decode_config", lambda *args: tile)
    inputs = call(name)
    with poisoned_memory():
        out, lse = attend(inputs)
    check_attention(inputs, out, lse)
    assert (used[0]["RESCALE_THRESHOLD"], used[0]["ROW_SUM_SPLITS"], used[0]["ISA"]) == (
        slack,
        parts,
        "",
    )


@settings(max_examples=5, suppress_health_check=list(HealthCheck))
@given(calls(dtypes=(torch.float32, HALF)))
def test_random_calls(inputs):
    with poisoned_memory():
        out, lse = attend(inputs)
    check_attention(inputs, out, lse)


# -- bits --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_tiles")
def test_chunks_at_once_equal_one_after_the_other():
    check_chunks_at_once(attend, make_inputs((25,), ChunkLayout(33, 7, 3), heads=6, kv_heads=2))


SHAPES = [
    pytest.param({"layout": ChunkLayout(24, 5, 2)}, id="chunks"),
    pytest.param({"rows": 36}, id="text"),
    pytest.param({"rows": 1}, id="decode"),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("small_tiles")
def test_a_sequence_does_not_see_its_neighbours(shape):
    check_neighbours(attend, make_inputs((170, 0, 70), heads=3, kv_heads=1, **shape))


@pytest.mark.usefixtures("small_tiles")
def test_spare_capacity_changes_no_bit():
    """More pages in the table make more programs, which find nothing to do."""
    inputs = make_inputs((130,), rows=1, heads=7, kv_heads=1)
    wider = torch.full((1, 40), 10**6, dtype=torch.int32)  # entries past the length: garbage
    wider[:, : inputs.block_table.shape[1]] = inputs.block_table
    out, lse = attend(inputs)
    wide_out, wide_lse = attend(dataclasses.replace(inputs, block_table=wider))
    assert torch.equal(out, wide_out)
    assert torch.equal(lse, wide_lse)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("small_tiles")
def test_strides_are_free(shape):
    inputs = make_inputs((70, 9), heads=4, kv_heads=2, **shape)
    orders = {
        "q": [3, 1, 0, 2],
        "k": [0, 2, 1, 3],
        "v": [2, 0, 1, 3],
        "k_cache": [0, 2, 1, 3],
        "v_cache": [1, 0, 2, 3],
        "block_table": [1, 0],
    }
    check_strides(attend, inputs, orders)


# -- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spread", [1e-6, 20.0, 1e4])
@pytest.mark.usefixtures("small_tiles")
def test_extreme_logits_stay_finite(shape, spread):
    inputs = make_inputs((70,), heads=2, kv_heads=1, head_dim=32, spread=spread, **shape)
    out, lse = attend(inputs)
    assert out.isfinite().all()
    check_attention(inputs, out, lse)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("small_tiles")
def test_any_scale(shape, scale):
    inputs = make_inputs((40,), heads=2, kv_heads=1, **shape)
    out, lse = attend(inputs, scale=scale)
    twin = dataclasses.replace(inputs, q=inputs.q * scale * 4)  # head_dim 16: scale 1/4
    check_attention(twin, out, lse)


@pytest.mark.parametrize(("batch", "rows"), [(0, 3), (2, 0)])
def test_zero_sizes(batch, rows):
    inputs = make_inputs((4,) * batch, rows=rows)
    out, lse = attend(inputs)
    assert out.shape == inputs.q.shape
    assert lse.shape == (batch, inputs.q.shape[2], rows)


# -- refusals ----------------------------------------------------------------------------------


def test_refusals():
    bf16 = make_inputs((3,), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="interpreter computes products of bfloat16 wrongly"):
        attend(bf16)
    fp64 = make_inputs((3,), dtype=torch.float64)
    with pytest.raises(ValueError, match=r"dtype torch\.float64 is not float32"):
        attend(fp64)
