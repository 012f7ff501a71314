"""The table of backends: what an entry gives, and that a named backend runs or says why not."""

import pytest
import torch
from helpers.serving import serving

import vxl_kernels
from vxl_kernels import ChunkLayout, ops, reference, rope_append, vst_attention, vst_linear
from vxl_kernels._backends import BACKENDS, Backend
from vxl_kernels.layout import takes_ints
from vxl_kernels.testing import inverse_frequencies, make_inputs

LAYOUT = ChunkLayout(9, 2, 2)


def call(layout=LAYOUT, **options):
    inputs = make_inputs((5, 0), layout, rows=4, **options)
    inputs.k_cache.nan_to_num_()
    inputs.v_cache.nan_to_num_()
    return inputs


@pytest.fixture
def toy(monkeypatch):
    """A backend that somebody adds. It has attention alone, and its result is recognisable."""
    ran = []

    def attend(*args):
        ran.append(args)
        out, lse = takes_ints(reference.vst_attention)(*args)
        return out + 1, lse

    row = Backend(frozenset({"vst_attention"}), lambda x: [], {"vst_attention": attend}.get)
    monkeypatch.setitem(BACKENDS, "toy", row)
    return ran


def test_a_backend_is_a_row(toy):
    inputs = call()
    assert vxl_kernels.backends()["toy"] == []
    expected = vst_attention(*inputs.args(), backend="reference") + 1
    assert torch.equal(vst_attention(*inputs.args(), backend="toy"), expected)
    ((*tensors, ints, scale),) = toy
    assert ints == ops.layout_to_ints(LAYOUT)
    assert scale == 0.25
    assert all(ours is theirs for ours, theirs in zip(tensors, inputs.args()[:7], strict=True))


def test_what_a_backend_lacks_is_refused(toy):
    inputs = call()
    before = inputs.clone()
    with pytest.raises(ValueError, match="backend 'toy' cannot run this call: it has no rope_ap"):
        rope_append(*inputs.args(), inverse_frequencies(16), backend="toy")
    x, weight = torch.ones(1, 2, 3), torch.ones(4, 3)
    with pytest.raises(ValueError, match="backend 'toy' cannot run this call: it has no vst_lin"):
        vst_linear(x, weight, None, None, None, None, backend="toy")
    with pytest.raises(ValueError, match="backend 'toy' cannot run this call: inputs require a"):
        vst_attention(inputs.q.requires_grad_(), *inputs.args()[1:], backend="toy")
    for name in ("k_cache", "v_cache"):
        assert torch.equal(getattr(inputs, name), getattr(before, name))


def test_a_compiled_graph_keeps_the_name(toy):
    inputs = call()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(*tensors):
        return vst_attention(*tensors, LAYOUT, backend="toy")

    expected = vst_attention(*inputs.args(), backend="toy")
    assert torch.equal(attend(*inputs.args()[:-1]), expected)
    assert len(toy) == 2


def test_a_compiled_graph_refuses_when_it_runs(monkeypatch):
    inputs = call()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(*tensors):
        return vst_attention(*tensors, LAYOUT, backend="reference")

    assert torch.equal(
        attend(*inputs.args()[:-1]), vst_attention(*inputs.args(), backend="reference")
    )
    row = Backend(frozenset(), lambda x: ["it is away"], lambda op: None)
    monkeypatch.setitem(BACKENDS, "away", row)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def away(*tensors):
        return vst_attention(*tensors, LAYOUT, backend="away")

    with pytest.raises(ValueError, match="'away' cannot run this call: it has no vst_att"):
        away(*inputs.args()[:-1])


@pytest.mark.parametrize("name", ["", "gpu", 3, ["cpu"]])
def test_a_name_that_is_not_in_the_table(name):
    with pytest.raises(ValueError, match=r"backend: got .+, expected 'cpu', 'triton', 'ref"):
        vst_attention(*call().args(), backend=name)


def test_an_operator_takes_the_name_too():
    """The compiled kernel of the device leaves such a call, with all it returns and writes, to the
    named backend."""
    ints, inv_freq = ops.layout_to_ints(LAYOUT), inverse_frequencies(16)
    ours, theirs = call(), call()
    out = torch.ops.vxl.vst_attention(*ours.args()[:-1], ints, 0.25, "reference")
    assert torch.equal(out[0], vst_attention(*ours.args(), backend="reference"))
    versions = [ours.k_cache._version, ours.v_cache._version]
    pair = torch.ops.vxl.rope_append(*ours.args()[:-1], ints, inv_freq, "reference")
    expected = rope_append(*theirs.args(), inv_freq, backend="reference")
    for x, truth in zip((*pair, ours.k_cache), (*expected, theirs.k_cache), strict=True):
        assert torch.equal(x, truth)
    assert [ours.k_cache._version, ours.v_cache._version] > versions
    torch.ops.vxl.rope_append_(*ours.args()[:-1], ints, inv_freq, "reference")
    assert torch.equal(ours.q, expected[0])
    for name in {"nothing", "triton"} - set(serving()):
        with pytest.raises(ValueError, match=r"backend"):
            torch.ops.vxl.vst_attention(*ours.args()[:-1], ints, 0.25, name)


@pytest.mark.parametrize("layout", [None, LAYOUT, ChunkLayout(9, 2, 1, "interleaved")])
def test_the_linear_operator_has_the_gradients_of_the_products(layout):
    rows = 4 if layout is None else layout.rows
    x, weight, vst_weight = (
        torch.randn(s, dtype=torch.float64) for s in ((2, rows, 3), (5, 3), (5, 3))
    )
    bias = torch.randn(2, 5, dtype=torch.float64)
    args = [x, weight, bias[0]] + ([None, None] if layout is None else [vst_weight, bias[1]])
    args = [None if t is None else t.requires_grad_() for t in args]
    wanted = [t for t in args if t is not None]
    ints, grads = ops.layout_to_ints(layout), []
    for out in (torch.ops.vxl.vst_linear(*args, ints), vst_linear(*args, layout)):
        grads.append(torch.autograd.grad(out.sin().sum(), wanted))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)
