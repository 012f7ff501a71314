"""The operators as PyTorch sees them: schemas, opcheck, compile, export, gradients."""

import pytest
import torch
from helpers.serving import serving

from vxl_kernels import ChunkLayout, ops, rope_append, vst_attention, vst_linear
from vxl_kernels.testing import inverse_frequencies, make_inputs

pytestmark = pytest.mark.core

LAYOUTS = [None, ChunkLayout(9, 2, 2), ChunkLayout(9, 2, 1, "interleaved")]


def call(layout, **options):
    inputs = make_inputs((5, 0), layout, rows=4, head_dim=16, **options)
    inputs.k_cache.nan_to_num_()
    inputs.v_cache.nan_to_num_()
    return inputs


def test_schemas_are_pinned():
    """Other stacks call these by name, so a change here is a breaking change."""
    assert str(torch.ops.vxl.vst_attention.default._schema) == (
        "vxl::vst_attention(Tensor q, Tensor k, Tensor v, Tensor? k_cache, Tensor? v_cache, "
        "Tensor? block_table, Tensor? cache_seqlens, int[] layout, float scale, "
        'str backend="") -> (Tensor, Tensor)'
    )
    assert str(torch.ops.vxl.rope_append.default._schema) == (
        "vxl::rope_append(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
        "Tensor block_table, Tensor cache_seqlens, int[] layout, Tensor inv_freq, "
        'str backend="") -> (Tensor, Tensor)'
    )
    assert str(torch.ops.vxl.rope_append_.default._schema) == (
        "vxl::rope_append_(Tensor(a!) q, Tensor(b!) k, Tensor v, Tensor(c!) k_cache, "
        "Tensor(d!) v_cache, Tensor block_table, Tensor cache_seqlens, int[] layout, "
        'Tensor inv_freq, str backend="") -> ()'
    )
    assert str(torch.ops.vxl.vst_linear.default._schema) == (
        "vxl::vst_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? vst_weight, "
        'Tensor? vst_bias, int[] layout, str backend="") -> Tensor'
    )
    assert str(torch.ops.vxl.invariant_linear.default._schema) == (
        'vxl::invariant_linear(Tensor x, Tensor weight, Tensor? bias, str backend="") -> Tensor'
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    inputs, inv_freq = call(layout), inverse_frequencies(16)
    ints = ops.layout_to_ints(layout)
    tensors = inputs.args()[:-1]
    leaves = [x.detach().clone().requires_grad_() for x in tensors[:5]]
    for backend in ("", "reference"):
        rest = ints, inv_freq, backend
        torch.library.opcheck(torch.ops.vxl.vst_attention, (*tensors, ints, 0.25, backend))
        both = (*leaves, *tensors[5:], ints, 0.25, backend)
        torch.library.opcheck(torch.ops.vxl.vst_attention, both)
        torch.library.opcheck(torch.ops.vxl.rope_append, (*tensors, *rest))
        torch.library.opcheck(torch.ops.vxl.rope_append_, (*inputs.clone().args()[:-1], *rest))
        torch.library.opcheck(torch.ops.vxl.rope_append_copy, (*leaves, *tensors[5:], *rest))
        x = torch.randn(2, inputs.q.shape[1], 6, requires_grad=True)
        sets = (torch.randn(4, 6, requires_grad=True), torch.randn(4), torch.randn(4, 6), None)
        torch.library.opcheck(torch.ops.vxl.vst_linear, (x, *sets, ints, backend))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compile_without_graph_breaks(layout):
    inv_freq = inverse_frequencies(16)
    weight = torch.randn(2, 4 * 16, 24)

    def step(x, k, v, k_cache, v_cache, table, lens):
        q = vst_linear(x, weight[0], None, weight[1], None, layout).unflatten(2, (4, 16))
        q, k = rope_append(q, k, v, k_cache, v_cache, table, lens, layout, inv_freq)
        return vst_attention(q, k, v, k_cache, v_cache, table, lens, layout, return_lse=True)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        inputs = call(layout, seed=seed)
        x = torch.randn(2, inputs.q.shape[1], 24)
        eager, traced = inputs.clone(), inputs.clone()
        expected = step(x, *eager.args()[1:-1])
        actual = compiled(x, *traced.args()[1:-1])
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(traced.k_cache, eager.k_cache)


def test_other_lengths_do_not_recompile():
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def decode(*args):
        return vst_attention(*args)

    for length in (3, 70, 500):
        decode(*make_inputs((length,), rows=1, page_size=1024).args())
    assert counter.frame_count == 1


def test_export():
    class Step(torch.nn.Module):
        def forward(self, q, k, v, k_cache, v_cache, table, lens):
            return vst_attention(q, k, v, k_cache, v_cache, table, lens, ChunkLayout(9, 2, 2))

    inputs = call(ChunkLayout(9, 2, 2))
    program = torch.export.export(Step(), inputs.args()[:-1])
    torch.testing.assert_close(program.module()(*inputs.args()[:-1]), vst_attention(*inputs.args()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_the_reference(layout):
    inputs = call(layout, dtype=torch.float64)
    leaves = [x.detach().requires_grad_() for x in inputs.args()[:5]]

    def attend(*tensors):
        rest = inputs.block_table, inputs.cache_seqlens, layout
        return vst_attention(*tensors, *rest, return_lse=True, backend="reference")

    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_the_kernel(layout):
    """Those of q, k, v and both caches against the reference's."""
    inputs = call(layout)
    grads = {}
    for backend in serving():
        leaves = [x.detach().clone().requires_grad_() for x in inputs.args()[:5]]
        rest = inputs.block_table, inputs.cache_seqlens, layout
        out, lse = vst_attention(*leaves, *rest, return_lse=True, backend=backend)
        (out.square().sum() + lse.sin().sum()).backward()
        grads[backend] = [x.grad for x in leaves]
    truth = grads.pop("reference")
    for each in grads.values():
        for ours, theirs in zip(each, truth, strict=True):
            torch.testing.assert_close(ours, theirs)
    inputs = make_inputs((0,), rows=4)
    q = inputs.q.requires_grad_()
    vst_attention(q, inputs.k, inputs.v).sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize(("batch", "rows"), [(0, 3), (2, 0)])
def test_gradients_of_nothing(batch, rows):
    inputs = make_inputs((4,) * batch, rows=rows)
    q = inputs.q.requires_grad_()
    vst_attention(*inputs.args()).sum().backward()
    assert q.grad.shape == q.shape


def test_there_is_no_second_derivative():
    inputs = make_inputs((0,), rows=4)
    q = inputs.q.requires_grad_()
    out = vst_attention(q, inputs.k, inputs.v).square().sum()
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(out, q, create_graph=True)


def test_autocast_does_not_depend_on_the_order():
    dtypes = set()
    for order in ("split", "interleaved"):
        layout = ChunkLayout(4, 2, order=order)
        with torch.autocast("cpu", torch.bfloat16):
            x, w = torch.randn(1, layout.rows, 8), torch.randn(2, 5, 8)
            dtypes.add(vst_linear(x, w[0], None, w[1], None, layout).dtype)
    assert dtypes == {torch.bfloat16}
