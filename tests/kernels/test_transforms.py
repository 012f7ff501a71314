"""Derivatives that an operator does not have are refused, never zero; torch.vmap; and a loop over
windows that is trained."""

import dataclasses

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from helpers.serving import serving

from vxl_kernels import (
    ChunkLayout,
    VstCache,
    invariant_linear,
    rope_append,
    vst_attention,
    vst_linear,
)
from vxl_kernels.testing import inverse_frequencies, make_inputs

INV_FREQ = inverse_frequencies(16)
LAYOUT = ChunkLayout(4, 2)


CALL = make_inputs((5, 7), LAYOUT)


def inputs():
    clean = {name: getattr(CALL, name).nan_to_num() for name in ("k_cache", "v_cache")}
    return dataclasses.replace(CALL.clone(), **clean)


def attend(q, backend=None):
    return vst_attention(q, *inputs().args()[1:], backend=backend)


def append(q, backend=None):
    return rope_append(q, *inputs().args()[1:], INV_FREQ, backend=backend)[0]


def append_in_place(q, backend=None):
    q = q.clone()
    rope_append(q, *inputs().args()[1:], INV_FREQ, backend=backend, inplace=True)
    return q


def tangent(fn):
    def call(q):
        with fwAD.dual_level():
            return fwAD.unpack_dual(fn(fwAD.make_dual(q, torch.ones_like(q)))).tangent

    return call


TRANSFORMS = {
    "dual": tangent,
    "jvp": lambda fn: lambda q: torch.func.jvp(fn, (q,), (torch.ones_like(q),))[1],
    "grad": lambda fn: torch.func.grad(lambda q: fn(q).sum()),
    "vjp": lambda fn: lambda q: torch.func.vjp(fn, q)[1](q)[0],
    "grad of vmap": lambda fn: torch.func.grad(lambda q: torch.vmap(fn)(q[None]).sum()),
    "vmap of grad": lambda fn: lambda q: torch.vmap(TRANSFORMS["grad"](fn))(q[None])[0],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("fn", [attend, append])
def test_a_transform_is_refused_or_served_by_the_reference(fn, name):
    q = inputs().q
    with pytest.raises(NotImplementedError, match=r"got a tensor of (torch|forward)"):
        TRANSFORMS[name](fn)(q)
    if not (fn is append and "vmap" in name):
        served = TRANSFORMS[name](lambda q: fn(q, "reference"))(q)
        assert served.abs().sum() > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["dual", "jvp"])
def test_forward_mode_in_place_is_refused(name):
    with pytest.raises(NotImplementedError, match="got a tensor of"):
        TRANSFORMS[name](append_in_place)(inputs().q)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["jvp", "grad"])
def test_a_transform_in_a_compiled_graph_is_refused(name):
    fn = torch.compile(TRANSFORMS[name](attend), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"got tensors of torch\.func in a compiled"):
        fn(inputs().q)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["", "reference"])
def test_operators_called_by_name_refuse_too(backend):
    call = inputs()
    ints = [4, 2, 1, 1]
    attention = torch.ops.vxl.vst_attention, (*call.args()[1:-1], ints, 0.25, backend)
    rope = torch.ops.vxl.rope_append, (*call.args()[1:-1], ints, INV_FREQ, backend)
    for op, args in (attention, rope):
        with pytest.raises(NotImplementedError, match=r"vxl::\w+: got a tensor"):
            tangent(lambda q, op=op, args=args: op(q, *args)[0])(call.q)
    q = call.q.clone().requires_grad_() * 1
    with pytest.raises(NotImplementedError, match="vxl::rope_append_: got a tensor that requires"):
        torch.ops.vxl.rope_append_(q, *rope[1])


@pytest.mark.filterwarnings("ignore")
def test_vmap_is_one_call_after_the_other():
    q = torch.stack([inputs().q, inputs().q + 1])
    assert torch.equal(torch.vmap(attend)(q), torch.stack([attend(x) for x in q]))
    with pytest.raises(NotImplementedError, match=r"rope_append: got a tensor of torch\.vmap"):
        torch.vmap(append)(q)


def nested(layout):
    return torch.nested.nested_tensor([torch.randn(3, 4, 16), torch.randn(2, 4, 16)], layout=layout)


OTHER_LAYOUTS = {
    "nested": lambda: nested(torch.strided),
    "jagged": lambda: nested(torch.jagged),
    "sparse": lambda: torch.eye(16).expand(1, 2, 16, 16).to_sparse(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", serving())
@pytest.mark.parametrize("kind", OTHER_LAYOUTS)
def test_tensors_of_other_layouts_are_refused(kind, backend):
    x, dense = OTHER_LAYOUTS[kind](), torch.randn(1, 2, 16, 16)
    for name, args in (
        ("q", (x, dense, dense)),
        ("k", (dense, x, dense)),
        ("v", (dense, dense, x)),
    ):
        with pytest.raises(ValueError, match=f"^{name}: got a {kind} tensor, expected a dense one"):
            vst_attention(*args, backend=backend)
    with pytest.raises(ValueError, match=f"^x: got a {kind} tensor, expected a dense one"):
        vst_linear(x, torch.ones(4, 16), None, None, None, None, backend=backend)
    with pytest.raises(ValueError, match=f"^x: got a {kind} tensor, expected a dense one"):
        invariant_linear(x, torch.ones(4, 16), backend=backend)


def windows(backend):
    """Gradients of a loop over three windows and two layers, as the README has it."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, LAYOUT.rows, n, 16, generator=generator) for n in (4, 2, 2) * 3]
    leaves = [x.requires_grad_() for x in leaves]
    cache = VstCache(2, 2, 16, num_pages=4, page_size=4)
    cache.k_cache.zero_()
    cache.v_cache.zero_()
    video, loss = cache.batch(cache.new()), torch.zeros(())
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        for i in range(0, 9, 3):
            video.reserve(LAYOUT.vsts_per_chunk)
            for layer in range(2):
                q, k, v = leaves[i : i + 3]
                q, k = rope_append(q, k, v, *video.layer(layer), LAYOUT, INV_FREQ, backend=backend)
                out = vst_attention(q, k, v, *video.layer(layer), LAYOUT, backend=backend)
                loss = loss + out.sin().sum() * (layer + 1)
            video.commit(LAYOUT.vsts_per_chunk)
        return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("backend", [name for name in serving() if name != "reference"])
def test_a_loop_over_windows_is_trained(backend):
    for ours, theirs in zip(windows(backend), windows("reference"), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_cache_that_was_written_is_said():
    call = inputs()
    q = call.q.requires_grad_()
    for written in ("k_cache", "cache_seqlens"):
        out = vst_attention(*call.args())
        getattr(call, written).add_(1)
        with pytest.raises(RuntimeError, match="allow_mutation_on_saved_tensors"):
            out.sum().backward()
    out = vst_attention(q, *call.args()[1:])
    out.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()
