"""The oracle of the benchmarks gives the same verdict on every BLAS and number of threads, and
finds every mistake."""

import dataclasses

import pytest
import torch

from benchmarks.common.backward import backward_answer, sdpa_backward
from benchmarks.common.cases import Case, Geometry, Inputs
from benchmarks.common.oracle import attention_answer
from benchmarks.peers.registry import PROVIDERS


def inputs(cache_len):
    geometry = Geometry(heads=4, kv_heads=2, head_dim=64)
    return Inputs(Case("decode", geometry, cache_len, 1, "fp32", "cpu", plain_rows=1))


def test_one_key_too_many_or_too_few_is_wrong():
    """Among 20,000 keys the mistake is one in 20,000."""
    x = inputs(cache_len=20_000)
    answer = attention_answer(x, with_rope=False)
    run = PROVIDERS["sdpa_gqa"].prepare(x)
    right = run.rows(run.call())
    assert answer.judge(right).ok
    k, v = (torch.cat(pair, 1) for pair in ((x.k_seen, x.k_rotated), (x.v_seen, x.v)))
    for keys in (slice(1, None), slice(None, -1)):
        wrong = torch.nn.functional.scaled_dot_product_attention(
            x.q_rotated.transpose(1, 2),
            k[:, keys].transpose(1, 2),
            v[:, keys].transpose(1, 2),
            enable_gqa=True,
        ).transpose(1, 2)
        assert not answer.judge(wrong).ok


def test_an_exact_plain_evaluation_fails_nobody():
    """If the plain evaluation happens to be exact, another order of summation still passes."""
    x = inputs(cache_len=20_000)
    answer = attention_answer(x, with_rope=False)
    lucky = dataclasses.replace(answer, plain=answer.exact)
    values = torch.cat([x.v_seen, x.v], 1).double().repeat_interleave(2, dim=2)
    keys = torch.cat([x.k_seen, x.k_rotated], 1).double().repeat_interleave(2, dim=2)
    p = torch.softmax((x.q_rotated.double() * keys).sum(-1) / 8, dim=1)
    one_by_one = torch.zeros(1, 4, 64)
    for part in (p[..., None] * values).float().split(1, dim=1):  # the worst order
        one_by_one = one_by_one + part[:, 0]
    assert lucky.judge(one_by_one[:, None]).ok
    without = dataclasses.replace(lucky, sums=None)
    assert not without.judge(one_by_one[:, None]).ok


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradients(dtype):
    from vxl_kernels import ChunkLayout

    geometry = Geometry(heads=4, kv_heads=2, head_dim=32)
    x = Inputs(Case("backward", geometry, 0, 1, dtype, "cpu", ChunkLayout(24, 4, chunks=2)))
    answer = backward_answer(x)
    run = sdpa_backward(x, "bool")
    right = run.rows(run.call())
    assert answer.judge(right).ok
    wrong = right.clone()
    wrong[:, answer.rows[3]] *= 1 + (1e-4 if dtype == "fp32" else 0.1)
    assert not answer.judge(wrong).ok
