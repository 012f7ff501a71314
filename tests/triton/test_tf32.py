"""float32 attention on a GPU takes three products of tf32 numbers for one, and tensor cores cut
their sums. Both are played here, with the sums cut as coarsely as on any GPU, to see that what a
correct kernel gives is within the tolerance of `check_attention`."""

import pytest
import torch

from vxl_kernels.testing import check_attention, make_inputs

BLOCK = 32  # keys


def tf32(x):
    """As `cvt.rna.tf32.f32`: 10 bits of mantissa, ties away from zero."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def tensor_core(acc, a, b):
    """acc + a b. An instruction takes 8 products, shifts them and acc to the exponent of the
    largest, and cuts what is below 24 bits."""
    for i in range(0, a.shape[1], 8):
        terms = a[:, i : i + 8, None].double() * b[None, i : i + 8].double()
        terms = torch.cat([terms, acc[:, None].double()], 1)
        largest = terms.abs().amax(1, keepdim=True).clamp_min(1e-300)
        unit = torch.exp2(torch.floor(torch.log2(largest)) - 23)
        exact = (torch.trunc(terms / unit) * unit).sum(1)
        acc = exact.float()
        too_far = acc.double().abs() > exact.abs()
        acc = torch.where(too_far, torch.nextafter(acc, torch.zeros_like(acc)), acc)
    return acc


def product(acc, a, b, products):
    """Triton's "tf32x3": the small parts first, without the product of both. Or one of tf32."""
    wide_a, wide_b = tf32(a), tf32(b)
    if products == 3:
        acc = tensor_core(acc, tf32(a - wide_a), wide_b)
        acc = tensor_core(acc, wide_a, tf32(b - wide_b))
    return tensor_core(acc, wide_a, wide_b)


def attend(q, k, v, seen, products):
    """One head's output and LSE, by blocks of keys, as `_triton/softmax.py`."""
    scale = torch.tensor(q.shape[1] ** -0.5 * 1.4426950408889634)
    top, total = torch.full(q.shape[:1], -torch.inf), torch.zeros(q.shape[:1])
    acc = torch.zeros_like(q)
    for i in range(0, len(k), BLOCK):
        keys, values = k[i : i + BLOCK], v[i : i + BLOCK]
        scores = product(torch.zeros(len(q), len(keys)), q, keys.T, products)
        scores = scores.masked_fill(~seen[:, i : i + BLOCK], -torch.inf)
        highest = scores.amax(1) * scale
        new = torch.where(highest > top + 8.0, highest, top)
        p = torch.exp2(scores * scale - new[:, None])
        p *= 1 + 2.0**-22 * (2 * torch.rand(p.shape) - 1)  # ex2.approx.f32
        before = torch.exp2(top - new)
        total = total * before + p.sum(1)
        acc = product(acc * before[:, None], p, values, products)
        top = new
    return acc / total[:, None], (top + torch.log2(total)) * 0.6931471805599453


@pytest.mark.parametrize("cached", [64, 250])
@pytest.mark.parametrize("products", [3, 1])
def test_float32_by_tensor_cores_is_within_the_tolerance(cached, products):
    """One tf32 product for a float32 one is not."""
    torch.manual_seed(0)
    x = make_inputs((cached,), rows=4, heads=2, kv_heads=1, head_dim=128, page_size=64)
    entries = torch.arange(cached)
    at = x.block_table[0, entries // 64].long(), entries % 64
    k = torch.cat([x.k_cache[at][:, 0], x.k[0, :, 0]])
    v = torch.cat([x.v_cache[at][:, 0], x.v[0, :, 0]])
    seen = torch.arange(len(k)) <= cached + torch.arange(4)[:, None]
    heads = [attend(x.q[0, :, h], k, v, seen, products) for h in range(2)]
    outs, lses = zip(*heads, strict=True)
    out, lse = torch.stack(outs, 1)[None], torch.stack(lses)[None]
    if products == 3:
        check_attention(x, out, lse)
    else:
        with pytest.raises(AssertionError, match="output error"):
            check_attention(x, out, lse)
