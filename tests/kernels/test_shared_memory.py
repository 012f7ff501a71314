"""Memory that `rope_append` writes must not be shared. Such a call is refused, or its result is
right."""

import dataclasses
import re

import pytest
import torch
from helpers.serving import serving

from vxl_kernels import ChunkLayout, checks, rope_append
from vxl_kernels.testing import inverse_frequencies, make_inputs

INV_FREQ = inverse_frequencies(16)


def inputs(**changes):
    """Two sequences of 5 and 9 tokens in pages of 4, three rows each, one query head per KV
    head."""
    base = make_inputs((5, 9), rows=3, heads=2, kv_heads=2, head_dim=16, page_size=4)
    return dataclasses.replace(base, **{name: f(base) for name, f in changes.items()})


def spread(shape, strides, offset=0):
    """A new buffer of elements with these strides."""
    size = offset + 1 + sum(s * (n - 1) for s, n in zip(strides, shape, strict=True))
    return torch.randn(size).as_strided(shape, strides, offset)


def shifted(name, by):
    """Rows with the shape of an argument's, in the same memory with a shift."""

    def of(x):
        x = getattr(x, name)
        flat = torch.randn(x.numel() + by)
        x.set_(flat[: x.numel()].view(x.shape))
        return flat[by:].view(x.shape)

    return of


SHARED = [
    # changes, whether only in place, the message
    ({"q": lambda x: x.k}, True, "k: got memory that q shares"),
    ({"v": lambda x: x.k}, True, "v: got memory that k shares"),
    ({"v": lambda x: x.q}, True, "v: got memory that q shares"),
    ({"q": shifted("k", 8)}, True, "k: got memory that q shares"),
    ({"q": lambda x: x.q[:1].expand_as(x.q)}, True, "q: got elements that share memory"),
    ({"k": lambda x: x.k[:, :1].expand_as(x.k)}, True, "k: got elements that share memory"),
    (
        {
            "q": lambda x: spread(x.q.shape, (96, 16, 16, 1))
        },  # head 1 of a row is head 0 of the next
        True,
        "q: got elements that share memory",
    ),
    ({"q": lambda x: spread(x.q.shape, (96, 24, 8, 1))}, True, "q: got elements that share memory"),
    ({"v_cache": lambda x: x.k_cache}, False, "v_cache: got memory that k_cache shares"),
    ({"v_cache": shifted("k_cache", 40)}, False, "v_cache: got memory that k_cache shares"),
    (
        {"v_cache": lambda x: x.v_cache[:1].expand_as(x.v_cache)},
        False,
        "v_cache: got elements that share memory",
    ),
    ({"v": lambda x: x.v_cache.flatten()[: x.v.numel()].view(x.v.shape)}, False, "v: got memory "),
    ({"q": lambda x: x.k_cache.flatten()[-x.q.numel() :].view(x.q.shape)}, False, "q: got memory "),
]


def copies(call):
    return [x.clone() for x in call.args()[:-1]]


def changed(call, before):
    return any(
        not torch.equal(x.nan_to_num(), y.nan_to_num())
        for x, y in zip(call.args()[:-1], before, strict=True)
    )


@pytest.mark.parametrize("backend", serving())
@pytest.mark.parametrize(("changes", "only_inplace", "message"), SHARED)
def test_refused(changes, only_inplace, message, backend):
    call = inputs(**changes)
    before = copies(call)
    for inplace in (False, True):
        if only_inplace and not inplace:  # only read: right
            caches = {"k_cache": call.k_cache.clone(), "v_cache": call.v_cache.clone()}
            shared, apart = dataclasses.replace(call, **caches), call.clone()
            pairs = (rope_append(*x.args(), INV_FREQ, backend=backend) for x in (shared, apart))
            assert all(torch.equal(x, y) for x, y in zip(*pairs, strict=True))
            continue
        with pytest.raises(ValueError, match=rf"^{re.escape(message)}.*expected memory of its own"):
            rope_append(*call.args(), INV_FREQ, backend=backend, inplace=inplace)
        assert not changed(call, before)


def fused(x):
    """q, k and v as slices of one product's rows, K and V pages in turns."""
    batch, rows = x.q.shape[:2]
    qkv = torch.cat([x.q, x.k, x.v], dim=2)
    q, k, v = qkv.split(2, dim=2)
    pages = torch.stack([x.k_cache, x.v_cache], dim=2)
    heads_first = x.k_cache.transpose(1, 2).contiguous().transpose(1, 2)
    yield dataclasses.replace(x, q=q, k=k, v=v)
    yield dataclasses.replace(x, k_cache=pages[:, :, 0], v_cache=pages[:, :, 1])
    yield dataclasses.replace(x, k_cache=heads_first)
    in_turns = torch.randn(rows, batch, 2, 16).transpose(0, 1)
    yield dataclasses.replace(x, q=in_turns)


@pytest.mark.parametrize("backend", serving())
def test_views_side_by_side_are_accepted(backend):
    for call in fused(inputs()):
        apart = call.clone()
        expected = rope_append(*apart.args(), INV_FREQ, backend=backend)
        q, k = rope_append(*call.args(), INV_FREQ, backend=backend, inplace=True)
        assert q is call.q
        for x, truth in ((q, expected[0]), (k, expected[1]), (call.v, apart.v)):
            assert torch.equal(x, truth)
        for name in ("k_cache", "v_cache"):
            assert torch.equal(getattr(call, name).nan_to_num(), getattr(apart, name).nan_to_num())


@pytest.mark.parametrize("name", ["k", "v_cache"])
def test_a_tensor_given_twice_is_refused_in_a_compiled_graph(name):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def append(q, k, v, k_cache, v_cache, *rest):
        rope_append(q, k, v, k_cache, v_cache, *rest, None, INV_FREQ, inplace=True)
        return q.sum()

    call = inputs()
    append(*call.args()[:-1])
    same = dataclasses.replace(call, **{name: call.q if name == "k" else call.k_cache})
    with pytest.raises(Exception, match=f"{name}: got memory that"):
        append(*same.args()[:-1])


@pytest.mark.parametrize("seed", range(10))
def test_overlap_is_found_exactly(seed):
    """Against a list of the elements, for any strides in one buffer."""
    generator = torch.Generator().manual_seed(seed)
    buffer, found = torch.zeros(200), set()

    def draw(low, high, n=4):
        return torch.randint(low, high, (n,), generator=generator).tolist()

    for _ in range(50):
        views = [(draw(1, 5), draw(0, 9), draw(0, 100, 1)[0]) for _ in range(2)]
        x, y = (buffer.as_strided(*view) for view in views)
        at, to = (torch.arange(200).as_strided(*view).flatten() for view in views)
        itself, each_other = len(at.unique()) < len(at), bool(torch.isin(at, to).any())
        assert checks._overlaps_itself(x) == itself
        assert checks._share(x, y) == each_other
        found |= {(itself, each_other)}
    assert len(found) == 4


def table(entries):
    return lambda x: torch.tensor(entries, dtype=torch.int32)


PAGES = [
    # Sequence 0 appends tokens 5 to 7 in its second page, sequence 1 tokens 9 to 11 in its third.
    ([[0, 1, 0], [2, 3, 1]], "page 1 at sequences 0 and 1"),
    (
        [[0, 1, 0], [1, 3, 4]],
        "page 1 at sequences 0 and 1",
    ),  # written, and read as another sequence's
    ([[0, 4, 0], [2, 3, 4]], "page 4 at sequences 0 and 1"),
    ([[0, 0, 0], [2, 3, 4]], "page 0 twice at sequence 0"),
    ([[0, 1, 0], [2, 4, 4]], "page 4 twice at sequence 1"),
]


@pytest.mark.parametrize("backend", serving())
@pytest.mark.parametrize(("entries", "message"), PAGES)
def test_a_written_page_has_one_place(entries, message, backend):
    if backend == "triton":
        pytest.skip("as on a GPU, nothing looks at a table's values")
    call = inputs(block_table=table(entries))
    before = copies(call)
    for inplace in (False, True):
        with pytest.raises(ValueError, match=f"^block_table: got {message}, expected"):
            rope_append(*call.args(), INV_FREQ, backend=backend, inplace=inplace)
        assert not changed(call, before)


@pytest.mark.parametrize("backend", serving())
def test_pages_that_are_only_read_may_be_shared(backend):
    """A prefix of two sequences, and unused entries of the table."""
    call = make_inputs((6, 4), ChunkLayout(4, 2), heads=2, page_size=4)
    table = torch.tensor([[0, 1, 1], [0, 3, 1]], dtype=torch.int32)
    call = dataclasses.replace(call, block_table=table)
    rope_append(*call.args(), INV_FREQ, backend=backend)
    nothing = make_inputs((8, 8), rows=0, heads=2, page_size=4)  # appends nothing
    table = torch.tensor([[0, 1], [0, 1]], dtype=torch.int32)
    rope_append(*dataclasses.replace(nothing, block_table=table).args(), INV_FREQ, backend=backend)
