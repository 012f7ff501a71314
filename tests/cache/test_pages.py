"""copy_pages_, gather_rows and scatter_rows_ against plain loops, with and without the
extension."""

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from vxl_kernels.cache import page_ops
from vxl_kernels.testing import poisoned_memory

pytestmark = pytest.mark.core

OPS = {"extension": torch.ops.vxl, "plain": page_ops}
NAMES = ("copy_pages_", "gather_rows", "scatter_rows_")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8)


def pool(layers=2, pages=8, page_size=4, kv_heads=2, head_dim=6, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (layers, pages, page_size, kv_heads, head_dim)
    return torch.randint(0, 200, shape, generator=generator).to(dtype)


def strided(cache, layer_gap, page_gap):
    """The same values with room between layers and between pages, which holds 77."""
    layers, pages, *page = cache.shape
    big = torch.full((layers + layer_gap, pages + page_gap, *page), 77, dtype=cache.dtype)
    view = big[:layers, page_gap:]
    view.copy_(cache)
    return big, view


@st.composite
def pools(draw):
    cache = pool(
        layers=draw(st.integers(0, 3)),
        pages=draw(st.integers(1, 9)),
        page_size=draw(st.sampled_from([1, 2, 3, 16, 64])),
        kv_heads=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([1, 3, 16, 33])),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 99)),
    )
    return strided(cache, draw(st.integers(0, 1)), draw(st.integers(0, 2)))


@pytest.mark.parametrize("ops", OPS)
@settings(max_examples=60)
@given(pools(), st.data())
def test_copies_against_a_loop(ops, caches, data):
    big, k = caches
    v = k.clone()
    pages, page_size = k.shape[1:3]
    order = data.draw(st.permutations(range(pages)))
    targets = order[: data.draw(st.integers(0, pages // 2))]
    sources = st.sampled_from(order[len(targets) :])
    rows = st.integers(0, page_size)
    copies = [[data.draw(sources), target, data.draw(rows)] for target in targets]
    unused = data.draw(st.lists(st.just([-9, 10**9, 0])))
    expected = [k.clone(), v.clone()]
    for source, target, n in copies:
        for cache in expected:
            cache[:, target, :n] = cache[:, source, :n]
    gap = (big.shape[1] - pages, k.shape[0])
    table = torch.tensor(copies + unused, dtype=torch.int32).reshape(-1, 3)
    OPS[ops].copy_pages_(k, v, table)
    assert torch.equal(k, expected[0])
    assert torch.equal(v, expected[1])
    assert (big[:, : gap[0]] == 77).all()
    assert (big[gap[1] :] == 77).all()


@pytest.mark.parametrize("ops", OPS)
@settings(max_examples=60)
@given(pools(), st.data())
def test_rows_against_a_loop(ops, caches, data):
    big, cache = caches
    pages, page_size = cache.shape[1:3]
    length = data.draw(st.integers(0, pages))
    table = torch.tensor(data.draw(st.permutations(range(pages)))[:length], dtype=torch.int32)
    first = data.draw(st.integers(0, length * page_size))
    n = data.draw(st.integers(0, length * page_size - first))
    before = big.clone()
    with poisoned_memory():
        rows = OPS[ops].gather_rows(cache, table, first, n)
    assert rows.shape == (cache.shape[0], n, *cache.shape[3:])
    assert rows.is_contiguous()
    for i in range(n):
        at = first + i
        assert torch.equal(rows[:, i], cache[:, table[at // page_size], at % page_size])
    assert torch.equal(big, before)

    # Changed rows go back to their places and nowhere else. Rows may be a strided tensor.
    OPS[ops].scatter_rows_(cache, table, first, (rows + 1).transpose(0, 1).clone().transpose(0, 1))
    assert torch.equal(OPS[ops].gather_rows(cache, table, first, n), rows + 1)
    OPS[ops].scatter_rows_(cache, table, first, rows)
    assert torch.equal(big, before)


def test_large_copies_use_all_threads():
    """Beyond a megabyte the work is cut in parts. Every part must arrive."""
    k = torch.randn(3, 40, 64, 2, 64)
    v, table = k + 1, torch.randperm(40).int()
    rows = torch.ops.vxl.gather_rows(k, table, 17, 2400)
    assert torch.equal(rows, k[:, table.long()].flatten(1, 2)[:, 17 : 17 + 2400])
    back = torch.zeros_like(k)
    torch.ops.vxl.scatter_rows_(back, table, 17, rows)
    assert torch.equal(torch.ops.vxl.gather_rows(back, table, 17, 2400), rows)
    assert back.count_nonzero() == rows.count_nonzero()
    copies = torch.stack([table[:20], table[20:], torch.full((20,), 63, dtype=torch.int32)], 1)
    expected = [x.clone() for x in (k, v)]
    for x in expected:
        x[:, table[20:].long(), :63] = x[:, table[:20].long(), :63]
    torch.ops.vxl.copy_pages_(k, v, copies)
    assert torch.equal(k, expected[0])
    assert torch.equal(v, expected[1])


REFUSED = [
    ("copy_pages_", {"copies": [[8, 0, 1]]}, "copies: got page 8 at entry 0, expected 0 to 7"),
    ("copy_pages_", {"copies": [[0, 1, 1], [2, -1, 1]]}, "copies: got page -1 at entry 1"),
    ("copy_pages_", {"copies": [[0, 1, 5]]}, "copies: got 5 rows at entry 0, expected 0 to 4"),
    ("copy_pages_", {"copies": [[0, 1, -1]]}, "copies: got -1 rows at entry 0, expected 0 to 4"),
    ("copy_pages_", {"copies": [[0, 2, 1], [1, 2, 1]]}, "page 2 as the target of two entries"),
    ("copy_pages_", {"copies": [[0, 2, 1], [2, 3, 1]]}, "page 2 as a source and a target"),
    ("copy_pages_", {"copies": [[0, 2]]}, "copies: got"),
    ("copy_pages_", {"copies": torch.zeros(1, 3)}, "copies: got"),
    ("copy_pages_", {"v": pool(pages=7)}, "v_cache: got"),
    ("copy_pages_", {"k": pool()[0]}, "k_cache: got shape [8, 4, 2, 6], expected 5 dimensions"),
    ("gather_rows", {"first": -1}, "first, rows: got -1, 3, expected a range in the 3 pages of 4"),
    ("gather_rows", {"rows": 13}, "first, rows: got 0, 13, expected a range"),
    ("gather_rows", {"table": [0, 9, 1], "rows": 5}, "block_table_row: got page 9 at 1"),
    ("gather_rows", {"table": [[0, 1]]}, "block_table_row: got"),
    ("scatter_rows_", {"table": [0, -1, 1], "rows": torch.zeros(2, 5, 2, 6)}, "page -1 at 1"),
    ("scatter_rows_", {"rows": torch.zeros(2, 5, 2, 7)}, "rows: got"),
    ("scatter_rows_", {"rows": torch.zeros(2, 5, 2, 6).half()}, "rows: got"),
    ("scatter_rows_", {"rows": torch.zeros(5, 2, 6)}, "rows: got"),
]


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize(("op", "changes", "words"), REFUSED)
def test_refusals_write_nothing(ops, op, changes, words):
    def int32(x):
        return x if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=torch.int32)

    k, v = changes.get("k", pool()), changes.get("v", pool(seed=1))
    before = k.clone(), v.clone()
    table = int32(changes.get("table", [2, 0, 1]))
    args = {
        "copy_pages_": (k, v, int32(changes.get("copies", [[0, 1, 2]]))),
        "gather_rows": (k, table, changes.get("first", 0), changes.get("rows", 3)),
        "scatter_rows_": (k, table, 0, changes.get("rows", torch.zeros(2, 3, 2, 6))),
    }
    with pytest.raises(ValueError, match="expected") as refusal:
        getattr(OPS[ops], op)(*args[op])
    assert words in str(refusal.value)
    assert torch.equal(k, before[0])
    assert torch.equal(v, before[1])


@pytest.mark.parametrize("change", [lambda x: x.transpose(2, 3), lambda x: x[..., :3]])
def test_the_extension_wants_dense_pages(change):
    cache, table = change(pool()), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="expected dense pages"):
        torch.ops.vxl.gather_rows(cache, table, 0, 1)
    expanded = pool(layers=1).expand(3, -1, -1, -1, -1)
    with pytest.raises(ValueError, match="do not overlap"):
        torch.ops.vxl.scatter_rows_(expanded, table, 0, torch.zeros(3, 1, 2, 6))


def test_as_operators():
    k, v = pool(), pool(seed=1)
    table = torch.tensor([2, 0, 1], dtype=torch.int32)
    copies = torch.tensor([[0, 3, 2], [1, 4, 4]], dtype=torch.int32)
    torch.library.opcheck(torch.ops.vxl.copy_pages_, (k, v, copies))
    torch.library.opcheck(torch.ops.vxl.gather_rows, (k, table, 1, 5))
    torch.library.opcheck(torch.ops.vxl.scatter_rows_, (k, table, 1, torch.zeros(2, 5, 2, 6)))
    versions = k._version, v._version
    torch.ops.vxl.copy_pages_(k, v, copies)
    torch.ops.vxl.scatter_rows_(v, table, 0, torch.zeros(2, 1, 2, 6))
    assert (k._version, v._version) == (versions[0] + 1, versions[1] + 2)
    schemas = {name: str(getattr(torch.ops.vxl, name).default._schema) for name in NAMES}
    assert schemas == {
        "copy_pages_": "vxl::copy_pages_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor copies) "
        "-> ()",
        "gather_rows": "vxl::gather_rows(Tensor cache, Tensor block_table_row, SymInt first, "
        "SymInt rows) -> Tensor",
        "scatter_rows_": "vxl::scatter_rows_(Tensor(a!) cache, Tensor block_table_row, "
        "SymInt first, Tensor rows) -> ()",
    }


def test_nothing_waits_for_a_gpu():
    """The meta device has no values: reading one raises."""
    k, v, table = pool().to("meta"), pool().to("meta"), torch.empty(3, dtype=torch.int32)
    rows = torch.empty(2, 5, 2, 6, device="meta")
    page_ops.copy_pages_(k, v, torch.empty(4, 3, dtype=torch.int32, device="meta"))
    page_ops.scatter_rows_(k, table.to("meta"), 1, rows)
    assert page_ops.gather_rows(k, table.to("meta"), 1, 5).shape == rows.shape


def test_other_lengths_do_not_recompile():
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def gather(cache, table, first, rows):
        return torch.ops.vxl.gather_rows(cache, table, first, rows)

    cache, table = pool(), torch.tensor([2, 0, 1], dtype=torch.int32)
    for first, rows in ((2, 5), (3, 6), (4, 7)):
        assert gather(cache, table, first, rows).shape[1] == rows
    assert counter.frame_count == 1
