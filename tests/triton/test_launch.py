"""Launches are planned from shapes alone. The meta device shows it on any machine."""

import ast
import dataclasses
from pathlib import Path

import pytest
import torch
from helpers.recorder import Recorder

pytest.importorskip("triton")

from torch._subclasses.fake_tensor import FakeTensorMode

import vxl_kernels
from vxl_kernels import ChunkLayout, _triton, ops, rope_append, vst_attention, vst_linear
from vxl_kernels._backends import BACKENDS
from vxl_kernels._triton import catalog, configs, launch, launch_backward

BF16 = torch.bfloat16
FOLDER = Path(vxl_kernels.__file__).parent / "_triton"
CALLERS = ("api.py", "ops.py", "_backends.py")


def plan(layout=None, rows=1, batch=1, heads=28, kv_heads=4, page_size=128, pages=256, **options):
    rows = rows if layout is None else layout.rows
    q = torch.empty(batch, rows, heads, 128, dtype=BF16, device="meta")
    k = torch.empty(batch, rows, kv_heads, 128, dtype=BF16, device="meta")
    cache = torch.empty(512, page_size, kv_heads, 128, dtype=BF16, device="meta")
    table = torch.empty(batch, pages, dtype=torch.int32, device="meta")
    lens = torch.empty(batch, dtype=torch.int32, device="meta")
    args = (q, k, k, cache, cache, table, lens, ops.layout_to_ints(layout), 0.1)
    return launch.plan_attention(*args, **options)[0]


# -- no value of a tensor comes to the host ----------------------------------------------------


def test_plans_from_shapes_alone():
    """The meta device has no values: reading one raises."""
    assert [x.name for x in plan(ChunkLayout(1440, 8))] == ["prefill"]
    assert [x.name for x in plan(rows=1)] == ["decode", "merge"]


def test_the_order_of_a_merge_follows_from_the_size_of_a_split():
    """From nothing else of a call, or a sequence would have other bits in another batch. Small
    splits, which are many, are read in wide blocks."""
    found = {}
    for rows in (1, 2, 5, 9, 40, 200):
        for batch, pages, page_size in ((1, 64, 128), (9, 64, 128), (1, 4, 128), (1, 64, 16)):
            _, merge = plan(rows=rows, batch=batch, pages=pages, page_size=page_size)
            sizes = merge.constexprs["SPLIT_SIZE"], merge.constexprs["BLOCK_S"]
            found.setdefault(rows, set()).add(sizes)
    assert all(len(sizes) == 1 for sizes in found.values())
    blocks = dict(sizes for (sizes,) in found.values())
    assert blocks == {each: 64 if each == 256 else 16 for each in blocks}
    assert len(blocks) > 2


# Conversions to a Python number between call and launch. None is of a tensor.
CONVERSIONS = {
    "float(scale)",  # an argument, a number already
    "int(n)",  # of a version
    "int(layout.order == 'split')",
    "int(name)",  # of an architecture
}


def test_no_synchronising_call_in_the_source():
    forbidden = {
        "item",
        "tolist",
        "cpu",
        "numpy",
        "nonzero",
        "synchronize",
        "unique",
        "masked_select",
        "is_nonzero",
        "equal",
        "any",
        "all",
    }
    allocations, conversions = set(), set()
    launchers = ("launch.py", "launch_backward.py", "remember.py", "configs.py", "__init__.py")
    for path in (*(FOLDER / name for name in launchers), *(FOLDER.parent / n for n in CALLERS)):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Attribute):
                assert node.func.attr not in forbidden, f"{path.name}:{node.lineno}"
                if isinstance(node.func.value, ast.Name) and node.func.value.id == "torch":
                    allocations |= {node.func.attr} if path.parent == FOLDER else set()
            elif isinstance(node.func, ast.Name) and node.func.id in ("int", "float", "bool"):
                conversions.add(ast.unparse(node))
                assert ast.unparse(node) in CONVERSIONS, f"{path.name}:{node.lineno}"
            elif isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{path.name}:{node.lineno}"
    assert allocations == {"empty", "empty_like"}  # of shapes, and filled by kernels
    assert conversions <= CONVERSIONS


@pytest.mark.parametrize("layout", [None, ChunkLayout(90, 8, 2)])
def test_a_step_backwards_on_a_fake_gpu(layout):
    """Gradients traced as on a GPU, where reading a value raises."""
    with FakeTensorMode():
        rows = 5 if layout is None else layout.rows
        q = torch.empty(2, rows, 4, 16, dtype=BF16, device="cuda")
        k = torch.empty(2, rows, 1, 16, dtype=BF16, device="cuda")
        cache = torch.empty(9, 64, 1, 16, dtype=BF16, device="cuda")
        table = torch.empty(2, 4, dtype=torch.int32, device="cuda")
        lens = torch.empty(2, dtype=torch.int32, device="cuda")
        lse = torch.empty(2, 4, rows, device="cuda")
        attention = (q, k, k, cache, cache, table, lens, q, lse, ops.layout_to_ints(layout), 0.1)
        grads = torch.ops.vxl.vst_attention_backward(q, lse, *attention)
    assert [x.shape for x in grads] == [x.shape for x in (q, k, k, cache, cache)]
    assert {x.device.type for x in grads} == {"cuda"}


def test_a_projection_with_gradients_is_two_products(monkeypatch):
    """The one launch has no gradient. Under autocast all its tensors have one dtype. The CPU takes
    the place of a GPU."""
    launches, dtypes = [], []

    def kernel(op):
        def launched(*args):
            launches.append(op)
            dtypes.append({x.dtype for x in args if isinstance(x, torch.Tensor)})
            return args[0].clone()

        return launched

    row = dataclasses.replace(BACKENDS["triton"], reasons=lambda x: [], kernel=kernel)
    monkeypatch.setitem(BACKENDS, "triton", row)
    layout = ChunkLayout(8, 4)
    x, weight = torch.randn(1, layout.rows, 16), torch.randn(4, 16, requires_grad=True)
    args = (x, weight, None, weight, None, layout)
    (grad,) = torch.autograd.grad(vst_linear(*args, backend="triton").sum(), weight)
    torch.testing.assert_close(grad, x.sum((0, 1)).expand(4, 16))
    assert not launches
    with torch.no_grad():
        vst_linear(*args, backend="triton")
    assert launches == ["vst_linear"]
    with torch.no_grad(), torch.autocast("cpu", BF16):
        for given in (x, x.to(BF16)):
            assert vst_linear(given, *args[1:], backend="triton").dtype == BF16
    assert dtypes == [{torch.float32}, {BF16}, {BF16}]


def test_the_projection_of_a_gpu_is_two_products_of_the_library(monkeypatch):
    """Of whatever width: q, k and v of one call then have one dtype under autocast too, which
    casts the library's products."""
    monkeypatch.setattr(_triton, "_too_old", lambda device: None)
    layout = ChunkLayout(8, 4)
    with FakeTensorMode(), torch.no_grad(), Recorder() as recorder:
        x = torch.empty(1, layout.rows, 16, device="cuda")
        for width in (4, 4096):
            weight = torch.empty(width, 16, device="cuda")
            vst_linear(x, weight, None, weight, None, layout)
    assert recorder.seen == []


@pytest.mark.parametrize("layout", [None, ChunkLayout(90, 8, 2)])
def test_a_step_on_a_fake_gpu(layout):
    """Projection, append and attention traced as on a GPU, where reading a value raises."""
    with FakeTensorMode(), torch.no_grad():
        rows = 5 if layout is None else layout.rows
        x = torch.empty(2, rows, 64, dtype=BF16, device="cuda")
        weight = torch.empty(64, 64, dtype=BF16, device="cuda")
        k = torch.empty(2, rows, 1, 16, dtype=BF16, device="cuda")
        cache, v_cache = torch.empty(2, 9, 64, 1, 16, dtype=BF16, device="cuda")
        table = torch.empty(2, 4, dtype=torch.int32, device="cuda")
        lens = torch.empty(2, dtype=torch.int32, device="cuda")
        inv_freq = torch.empty(8, device="cuda")
        args = (x, weight, None, weight, None)
        q = torch.ops.vxl.vst_linear(*args, ops.layout_to_ints(layout), "triton")
        q = q.unflatten(2, (4, 16))
        q, k = rope_append(q, k, k, cache, v_cache, table, lens, layout, inv_freq)
        out, lse = vst_attention(q, k, k, cache, v_cache, table, lens, layout, return_lse=True)
    assert out.shape == q.shape
    assert out.device.type == "cuda"
    assert lse.shape == (2, 4, rows)


def test_all_memory_is_known_from_shapes():
    """Other lengths give the same launch, as a captured CUDA graph needs."""
    first, second = plan(rows=3), plan(rows=3)
    assert [x.grid for x in first] == [x.grid for x in second]
    assert first[0].arguments["partial_ptr"].shape == (1, 1 + 256 * 128 // 256, 3, 28, 128)


# -- nothing recompiles ------------------------------------------------------------------------


def compiled(planned):
    """What Triton keys its cache by."""
    return [
        dataclasses.replace(catalog.compilation(x, "", BF16), config="", tile={}) for x in planned
    ]


def test_no_length_is_compiled_in():
    layouts = [
        ChunkLayout(1440, 8),
        ChunkLayout(1440, 8, 4),
        ChunkLayout(1439, 2),
        ChunkLayout(1, 1),
        ChunkLayout(160, 16, 16),
    ]
    reference = compiled(plan(layouts[0]))
    for layout in layouts:
        for pages, batch in ((256, 1), (17, 3), (16, 16)):
            assert compiled(plan(layout, pages=pages, batch=batch)) == reference
    assert compiled(plan(rows=1621)) == reference  # a text, too
    for pages in (1, 16, 17):
        assert compiled(plan(rows=1, pages=pages)) == compiled(plan(rows=1))


def launches_of(rows, batch, heads, kv_heads, head_dim, page_size=128, pages=16):
    """A text's attention, gradients and append."""
    q = torch.empty(batch, rows, heads, head_dim, dtype=BF16, device="meta")
    k = torch.empty(batch, rows, kv_heads, head_dim, dtype=BF16, device="meta")
    cache = torch.empty(512, page_size, kv_heads, head_dim, dtype=BF16, device="meta")
    table = torch.empty(batch, pages, dtype=torch.int32, device="meta")
    lens = torch.empty(batch, dtype=torch.int32, device="meta")
    lse = torch.empty(batch, heads, rows, device="meta")
    call = (q, k, k, cache, cache, table, lens)
    backward = launch_backward.plan_attention_backward(q, lse, *call, q, lse, [], 0.1)[0]
    inv_freq = torch.empty(head_dim // 2, device="meta")
    append = launch.plan_rope_append(*call, [], inv_freq, torch.empty_like(q), torch.empty_like(k))
    return [*launch.plan_attention(*call, [], 0.1)[0], *backward, append]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "most"),
    # most: combinations of whether 16 divides the strides of q's and of k's sequences
    [(28, 4, 128, 1), (7, 1, 72, 2), (2, 1, 100, 3), (6, 3, 100, 3), (8, 2, 75, 3)],
)
def test_odd_heads_compile_a_few_times(heads, kv_heads, head_dim, most):
    """Where heads x head_dim is not a multiple of 16, the number of rows decides what divides a
    sequence's stride. One sequence has no such stride."""
    for batch, bound in ((1, 1), (2, most), (3, most)):
        found = {}
        for rows in range(1600, 1632):
            for each in launches_of(rows, batch, heads, kv_heads, head_dim):
                keys = found.setdefault(each.name, [])
                key = compiled([each])[0]
                keys += [key] if key not in keys else []
        counts = {name: len(keys) for name, keys in found.items()}
        assert max(counts.values()) == bound, (batch, counts)


def test_a_table_of_one_page_is_another_compilation():
    """Blocks of keys fit no page here. A block never leaves a single page, so one page compiles
    another kernel than several."""
    one, *more = (compiled(launches_of(1600, 1, 28, 4, 128, 48, n)[:1]) for n in (1, 2, 3, 64))
    assert all(m == more[0] for m in more)
    assert one != more[0]


@pytest.mark.parametrize("what", ["attention", "backward", "append"])
def test_capacities_beyond_int32_are_refused(what):
    rows, most = 5, 2**31 - 1 - 2048

    def plan_with(pages, page_size):
        q = torch.empty(1, rows, 4, 16, dtype=BF16, device="meta")
        cache = torch.empty(2, page_size, 4, 16, dtype=BF16, device="meta")
        table = torch.empty(1, pages, dtype=torch.int32, device="meta")
        lens = torch.empty(1, dtype=torch.int32, device="meta")
        lse = torch.empty(1, 4, rows, device="meta")
        call = (q, q, q, cache, cache, table, lens)
        if what == "attention":
            return launch.plan_attention(*call, [], 0.1)
        if what == "append":
            inv_freq = torch.empty(8, device="meta")
            return launch.plan_rope_append(*call, [], inv_freq, q, q)
        return launch_backward.plan_attention_backward(q, lse, *call, q, lse, [], 0.1)

    plan_with(most - rows, 1)
    plan_with(1, most - rows)
    for pages, page_size in ((most - rows + 1, 1), (2**21, 2**10), (2**22, 2**10)):
        expected = f"block_table: got {pages} pages of {page_size} tokens, expected at most {most}"
        with pytest.raises(ValueError, match=expected):
            plan_with(pages, page_size)


def test_split_size_depends_on_rows_alone():
    for rows in (1, 64, 74, 400):
        sizes = {
            plan(rows=rows, batch=batch, pages=pages)[0].constexprs["SPLIT_SIZE"]
            for batch in (1, 64)
            for pages in (1, 4096)
        }
        assert len(sizes) == 1


@pytest.mark.parametrize(
    ("rows", "packed_rows", "split"),
    [(1, 16, 256), (3, 32, 256), (9, 64, 256), (18, 128, 256), (20, 128, 512), (64, 128, 1024),
     (74, 128, 2048), (256, 128, 4096), (438, 128, 8192)],
)  # fmt: skip
@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
def test_tiles_grow_with_the_rows(arch, rows, packed_rows, split):
    """7 query heads per KV head. 8100 entries make the same number of programs of 128 packed rows
    for any number of rows."""
    first = plan(rows=rows, arch=arch, pages=64)[0]
    assert (first.tile["rows"], first.constexprs["SPLIT_SIZE"]) == (packed_rows, split)
    tiles, splits = -(-rows * 7 // packed_rows), 1 + 64 * 128 // split
    assert first.grid == (tiles * 4 * splits, 1)
    assert first.constexprs["TMA"] == (arch in ("cuda:90", "cuda:100"))


@pytest.mark.parametrize("head_dim", [72, 120])
def test_odd_heads_have_tiles_that_do_not_spill(head_dim):
    """On sm_90, where the tables' tiles do: compiled, these take 173 to 255 registers and no
    stack."""
    for rows, packed_rows in ((1, 16), (3, 32), (9, 128), (1620, 128)):
        first = launches_of(rows, 1, 28, 4, head_dim, 128, 64)[0]
        arch = {"arch": "cuda:90"}
        tensors = [first.arguments[n] for n in ("q_ptr", "k_ptr", "v_ptr")]
        (narrow, *_), _, _ = launch.plan_attention(*tensors, *[None] * 4, [], 0.1, **arch)
        assert (narrow.tile["rows"], narrow.tile["keys"], narrow.num_warps) == (packed_rows, 64, 8)
        assert first.tile["keys"] != 64 or rows < 9


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_no_number_of_rows_leaves_a_gpu_empty(kv_heads):
    """Over a cache of 21,760 tokens, whether keys are split or not: a program each for 132 SMs."""
    for rows in range(1, 513):
        first = plan(rows=rows, heads=7 * kv_heads, kv_heads=kv_heads, pages=170)[0]
        assert first.grid[0] >= 100, (rows, first.name, first.grid)


@pytest.mark.parametrize("rows", [1, 18, 19, 73, 74, 146, 147, 292, 293, 438])
def test_parts_take_half_of_a_layer_at_most(rows):
    """Of the K and V that the table has room for, the new rows' part aside."""
    pages = 512
    partial = plan(rows=rows, pages=pages)[0].arguments["partial_ptr"]
    kept = 2 * pages * 128 * 4 * 128 * 2
    assert partial[:, 1:].nbytes <= kept / 2


@pytest.mark.parametrize(("rows", "batch"), [(73, 64), (1, 512), (438, 33)])
def test_parts_of_a_batch_are_bounded(rows, batch):
    """Groups of sequences follow one another in the same memory. Each sequence is in one."""
    launches = plan(rows=rows, batch=batch, pages=170)
    decodes, merges = launches[::2], launches[1::2]
    assert {x.name for x in decodes} == {"decode"}
    assert {x.name for x in merges} == {"merge"}
    assert len(decodes) > 1
    assert sum(x.grid[1] for x in decodes) == sum(x.grid[1] for x in merges) == batch
    (partial,) = {
        id(x.arguments["partial_ptr"]): x.arguments["partial_ptr"] for x in launches
    }.values()
    assert partial.nbytes <= 256 << 20
    assert len(partial) == max(x.grid[1] for x in decodes)
    for x in decodes:
        assert len(x.arguments["q_ptr"]) == len(x.arguments["block_table_ptr"]) == x.grid[1]


def test_a_sequence_too_large_for_the_bound_is_alone():
    launches = plan(rows=438, batch=2, pages=1 << 14)
    assert [x.grid[1] for x in launches] == [1, 1, 1, 1]


# -- memory read -------------------------------------------------------------------------------


def keys_read(planned, rows):
    """K and V rows that a launch fetches per key and output row: the programs that walk the keys
    (tiles x KV heads, in decode those of one split), divided by rows."""
    first = planned[0]
    return first.grid[0] / first.arguments.get("splits", 1) / rows


@pytest.mark.parametrize("rows", [1, 2])
def test_packed_heads_read_keys_once(rows):
    """28 query heads over 4 KV heads read a seventh of what tiles of one query head read."""
    packed = keys_read(plan(rows=rows), rows)
    per_head = keys_read(plan(rows=rows, kv_heads=28), rows)
    assert per_head == 7 * packed


def test_packing_wastes_no_row():
    """128 packed rows hold 18 positions of 7 heads (126 rows) and two sevenths of the next."""
    layout = ChunkLayout(1440, 8)
    first = plan(layout)[0]
    packed_rows = layout.rows * 28
    assert first.grid[0] * first.tile["rows"] - packed_rows < 4 * first.tile["rows"]


# -- what is shipped ---------------------------------------------------------------------------


@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
def test_the_catalog_is_complete(arch):
    entries = catalog.shipped(arch)
    backward = {"delta", "backward_q", "backward_new", "backward_cache", "sum_pages"}
    others = {"prefill", "decode", "merge", "linear", "invariant_linear", "rope_append"}
    ragged = {"plan_ragged", "prefill_ragged", "decode_ragged", "merge_ragged"}
    ragged |= {"rope_append_ragged", "plan_backward"}
    ragged |= {"backward_q_ragged", "backward_new_ragged", "backward_cache_ragged"}
    assert {e.kernel for e in entries} == backward | others | ragged
    assert len({(e.kernel, e.config) for e in entries}) == len(entries)
    for e in entries:
        assert set(e.signature) == {p.name for p in e.fn.params}
        constants = {name for name, kind in e.signature.items() if kind == "constexpr"}
        assert constants == set(e.constexprs)
    lengths = ("window", "ratio", "chunks", "rows", "page_size", "max_pages", "splits")
    lengths += ("sequences", "tiles")
    for e in entries:
        for name in lengths:
            assert e.signature.get(name, "i32") == "i32"


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match=r"arch: got 'cuda:75', expected one of cuda:80"):
        catalog.shipped("cuda:75")


@pytest.mark.parametrize(
    ("arch", "family"),
    [
        ("cuda:80", "cuda:80"),
        ("cuda:89", "cuda:86"),
        ("cuda:90", "cuda:90"),
        ("cuda:103", "cuda:100"),
        ("cuda:120", "cuda:86"),
        ("hip:gfx950", "hip:gfx942"),
    ],
)
def test_families(arch, family):
    assert configs.family(arch) == family


# -- reasons -----------------------------------------------------------------------------------


def test_reasons():
    x = torch.randn(1, 2, 2, 16)
    with pytest.raises(ValueError, match=r"'triton' cannot run this call: tensors are on the"):
        vst_attention(x, x, x, backend="triton")
    with pytest.raises(ValueError, match="tensors are on the CPU"):
        vst_linear(
            torch.randn(1, 2, 3), torch.randn(4, 3), None, None, None, None, backend="triton"
        )
    if not torch.cuda.is_available():
        assert "there is no GPU" in vxl_kernels.backends()["triton"][0]
