"""Gradients of vst_attention's kernel against float64, and of rope_append."""

import dataclasses

import pytest
import torch
from helpers.step_gradients import step_gradients
from helpers.strategies import DTYPES, calls
from hypothesis import example, given, settings

from vxl_kernels import ChunkLayout, rope_append, vst_attention
from vxl_kernels.testing import check_gradients, inverse_frequencies, make_inputs, poisoned_memory

pytestmark = pytest.mark.core


def gradients(inputs, seed=0, lse_weight=1.0):
    """Random grad_out and grad_lse, and the kernel's five gradients for them."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs.args()[:5]]
    out, lse = vst_attention(*leaves, *inputs.args()[5:], return_lse=True, backend="cpu")
    generator = torch.Generator().manual_seed(seed)
    grad_out = torch.randn(out.shape, generator=generator).to(out.dtype)
    grad_lse = torch.randn(lse.shape, generator=generator) * lse_weight
    grads = torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse))
    return grad_out, grad_lse, grads


@settings(max_examples=30)
@given(calls())
@example(make_inputs((0,), ChunkLayout(1, 1)))
@example(make_inputs((700, 0), ChunkLayout(130, 3, 2), heads=7, kv_heads=1, head_dim=256))
@example(make_inputs((0,), ChunkLayout(40, 8, 40), heads=4, kv_heads=2))  # several per segment
@example(make_inputs((1000,), rows=1, heads=28, kv_heads=4, head_dim=128, page_size=64))
@example(make_inputs((300,), rows=200, heads=12, kv_heads=1, head_dim=64))  # several parts
def test_against_the_truth(inputs):
    with poisoned_memory():
        grad_out, grad_lse, grads = gradients(inputs)
    check_gradients(inputs, grad_out, grad_lse, grads)


def test_without_a_cache():
    inputs = make_inputs((0,), rows=70, heads=6, kv_heads=2, head_dim=40)
    leaves = [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out = vst_attention(*leaves, backend="cpu")
    grad_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, grad_out)
    nothing = [torch.zeros_like(inputs.k_cache)] * 2
    check_gradients(inputs, grad_out, torch.zeros(1, 6, 70), [*grads, *nothing])


@pytest.mark.parametrize("dtype", DTYPES)
def test_orders_are_equal_to_the_bit(dtype):
    split = make_inputs((37, 0), ChunkLayout(100, 8, 3), heads=6, kv_heads=2, dtype=dtype)
    index = split.layout.interleaved_to_split().argsort()
    twin = dataclasses.replace(
        split,
        layout=ChunkLayout(100, 8, 3, "interleaved"),
        **{n: getattr(split, n)[:, index] for n in ("q", "k", "v")},
    )
    results = []
    for inputs, order in ((split, index), (twin, slice(None))):
        leaves = [x.detach().clone().requires_grad_() for x in inputs.args()[:5]]
        out = vst_attention(*leaves, *inputs.args()[5:], backend="cpu")
        grad = torch.sin(torch.arange(out.numel()).float()).view(out.shape).to(dtype)
        dq, dk, dv, *caches = torch.autograd.grad(out[:, order], leaves, grad)
        results.append([dq[:, order], dk[:, order], dv[:, order], *caches])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_threads_and_neighbours_change_no_bit():
    inputs = make_inputs((90, 0, 300), ChunkLayout(150, 8, 2), heads=14, kv_heads=2, head_dim=32)
    grad_out, grad_lse, grads = gradients(inputs)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = gradients(inputs)[2]
    finally:
        torch.set_num_threads(before)
    for a, b in zip(grads, alone, strict=True):
        assert torch.equal(a, b)
    for b in range(3):
        take = {n: getattr(inputs, n)[b : b + 1] for n in ("q", "k", "v", "block_table")}
        one = dataclasses.replace(inputs, **take, cache_seqlens=inputs.cache_seqlens[b : b + 1])
        leaves = [x.detach().clone().requires_grad_() for x in one.args()[:5]]
        out, lse = vst_attention(*leaves, *one.args()[5:], return_lse=True)
        alone = torch.autograd.grad((out, lse), leaves, (grad_out[b : b + 1], grad_lse[b : b + 1]))
        for i in range(3):
            assert torch.equal(grads[i][b : b + 1], alone[i])
    swapped = dataclasses.replace(
        inputs,
        **{n: getattr(inputs, n).flip(0) for n in ("q", "k", "v", "block_table")},
        cache_seqlens=inputs.cache_seqlens.flip(0),
    )
    leaves = [x.detach().clone().requires_grad_() for x in swapped.args()[:5]]
    out, lse = vst_attention(*leaves, *swapped.args()[5:], return_lse=True)
    turned = torch.autograd.grad((out, lse), leaves, (grad_out.flip(0), grad_lse.flip(0)))
    for i, (a, b) in enumerate(zip(grads, turned, strict=True)):
        assert torch.equal(a, b.flip(0) if i < 3 else b)


def test_sequences_that_share_pages_add_up():
    """Two forks of one prefix: its entries get the gradients of both."""
    inputs = make_inputs((64, 64), rows=9, page_size=16, heads=4, kv_heads=2)
    table = inputs.block_table.clone()
    table[1, :4] = table[0, :4]
    shared = dataclasses.replace(inputs, block_table=table)
    grad_out, grad_lse, grads = gradients(shared)
    check_gradients(shared, grad_out, grad_lse, grads)
    assert grads[3][table[0, :4].long()].abs().min() > 0


WRONG = {
    "one cache entry too few": lambda x: {"cache_seqlens": x.cache_seqlens - 1},
    "one cache entry too many": lambda x: {"cache_seqlens": x.cache_seqlens + 1},
    "another ratio": lambda x: {"layout": ChunkLayout(99, 11, 2)},
    "the other order": lambda x: {"layout": ChunkLayout(96, 8, 2, "interleaved")},
    "the neighbour's pages": lambda x: {"block_table": x.block_table.flip(0)},
    "swapped KV heads": lambda x: {"k": x.k.flip(2)},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WRONG)
def test_gradients_of_a_wrong_call_are_noticed(name, dtype):
    inputs = make_inputs(
        (100, 40), ChunkLayout(96, 8, 2), heads=4, kv_heads=2, head_dim=32, dtype=dtype
    )
    noise = torch.randn(inputs.k_cache.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for cache in (inputs.k_cache, inputs.v_cache):  # numbers wherever a wrong call may look
        cache.copy_(torch.where(cache.isnan(), noise, cache))
    grad_out, grad_lse, grads = gradients(inputs)
    check_gradients(inputs, grad_out, grad_lse, grads)
    *_, wrong = gradients(dataclasses.replace(inputs, **WRONG[name](inputs)))
    with pytest.raises(AssertionError, match="gradient of"):
        check_gradients(inputs, grad_out, grad_lse, wrong)
    for i in range(5 if dtype == torch.float32 else 0):  # here even each one alone
        mixed = [*grads[:i], wrong[i], *grads[i + 1 :]]
        with pytest.raises(AssertionError, match="gradient of"):
            check_gradients(inputs, grad_out, grad_lse, mixed)


def test_the_gradient_of_the_lse_counts():
    inputs = make_inputs((20,), ChunkLayout(30, 4), heads=4, kv_heads=2)
    grad_out, grad_lse, grads = gradients(inputs)
    check_gradients(inputs, grad_out, grad_lse, grads)
    with pytest.raises(AssertionError, match="gradient of q"):
        check_gradients(inputs, grad_out, torch.zeros_like(grad_lse), grads)


# -- rope_append -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lens", "layout"),
    [((5,), None), ((4,), ChunkLayout(6, 2, 2)), ((3, 21), ChunkLayout(7, 3, 3, "interleaved"))],
)
def test_a_step_with_both_operators(lens, layout):
    """The kernels' gradients through rotation, append and attention against the reference's."""
    inputs = make_inputs(lens, layout, rows=6, head_dim=32, page_size=4)
    inv_freq = inverse_frequencies(32)
    found = step_gradients(inputs, inv_freq, "cpu")
    truth = step_gradients(inputs.to(torch.float64), inv_freq, "reference")
    for ours, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_a_step_with_gradients_compiles():
    layout = ChunkLayout(6, 2, 2)
    inputs = make_inputs((4,), layout, head_dim=32)
    inv_freq = inverse_frequencies(32)

    def step(q, k, v, k_cache, v_cache, table, lens):
        caches = k_cache.clone(), v_cache.clone()
        q, k = rope_append(q, k, v, *caches, table, lens, layout, inv_freq)
        return vst_attention(q, k, v, *caches, table, lens, layout).square().sum()

    grads = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [x.nan_to_num().requires_grad_() for x in inputs.args()[:5]]
        grads.append(
            torch.autograd.grad(function(*leaves, inputs.block_table, inputs.cache_seqlens), leaves)
        )
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(eager, compiled)
