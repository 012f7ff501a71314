"""Inputs, tolerances and poison for testing these operators, ours and other backends'.

`make_inputs` builds a paged call whose unused cache entries are NaN, so that a kernel that
reads where it must not shows it. `check_attention` holds a result to what its precision
allows, measured on the same inputs, not to a guessed constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial

import torch

from . import reference
from .layout import ChunkLayout

__all__ = [
    "Inputs",
    "check_attention",
    "check_gradients",
    "inverse_frequencies",
    "make_inputs",
    "poisoned_memory",
]


def inverse_frequencies(head_dim: int, theta: float = 1e6) -> torch.Tensor:
    """RoPE's `theta ** (-2 i / head_dim)`: float32 `(head_dim / 2,)`, as Qwen2's."""
    return theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


@dataclass(frozen=True, repr=False)
class Inputs:
    """One call's tensors (shapes as in `vxl_kernels.api`) and its layout."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_table: torch.Tensor
    cache_seqlens: torch.Tensor
    layout: ChunkLayout | None

    def __repr__(self) -> str:
        return (
            f"Inputs(q {tuple(self.q.shape)} {self.q.dtype}, kv_heads {self.k.shape[2]}, "
            f"pages {tuple(self.k_cache.shape[:2])}, cache_seqlens {self.cache_seqlens.tolist()}, "
            f"{self.layout})"
        )

    def _repr_pretty_(self, printer, cycle) -> None:  # hypothesis would print every tensor
        printer.text(repr(self))

    def args(self) -> tuple:
        """Positional arguments of `vst_attention`. `rope_append` takes inv_freq after them."""
        return tuple(getattr(self, f.name) for f in fields(self))

    def clone(self) -> Inputs:
        return replace(
            self,
            **{f.name: getattr(self, f.name).clone() for f in fields(self) if f.name != "layout"},
        )

    def to(self, dtype: torch.dtype) -> Inputs:
        names = ("q", "k", "v", "k_cache", "v_cache")
        return replace(self, **{name: getattr(self, name).to(dtype) for name in names})

    def appended(self) -> int:
        """Tokens that `rope_append` adds to each sequence."""
        if self.layout is None:
            return self.q.shape[1]
        return self.layout.chunks * self.layout.vsts_per_chunk


def make_inputs(
    cache_seqlens: Sequence[int] = (0,),
    layout: ChunkLayout | None = None,
    rows: int = 1,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    spread: float = 1.0,
) -> Inputs:
    """A random call. Pages are shuffled; every cache entry that no row may see yet is NaN.

    With a layout of several chunks, the entries that earlier chunks of the call append hold
    numbers too, as after `rope_append`. `spread` scales q, for sharp softmaxes.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cpu")

    rows = rows if layout is None else layout.rows
    batch = len(cache_seqlens)
    appended = rows if layout is None else layout.chunks * layout.vsts_per_chunk
    seen = 0 if layout is None else (layout.chunks - 1) * layout.vsts_per_chunk
    pages_each = max(-(-(n + appended) // page_size) for n in cache_seqlens) if batch else 0
    pages = batch * pages_each + 2
    order = torch.randperm(pages, generator=generator, device="cpu")[: batch * pages_each]
    block_table = order.reshape(batch, pages_each).to(torch.int32)
    caches = []
    for _ in range(2):
        cache = torch.full((pages, page_size, kv_heads, head_dim), torch.nan, device="cpu")
        for b, length in enumerate(cache_seqlens):
            slots = torch.arange(length + seen, device="cpu")
            cache[block_table[b, slots // page_size].long(), slots % page_size] = normal(
                length + seen, kv_heads, head_dim
            )
        caches.append(cache)
    return Inputs(
        q=normal(batch, rows, heads, head_dim) * spread,
        k=normal(batch, rows, kv_heads, head_dim),
        v=normal(batch, rows, kv_heads, head_dim),
        k_cache=caches[0],
        v_cache=caches[1],
        block_table=block_table,
        cache_seqlens=torch.tensor(cache_seqlens, dtype=torch.int32, device="cpu"),
        layout=layout,
    ).to(dtype)


def _error(x: torch.Tensor, truth: torch.Tensor) -> float:
    if x.numel() == 0:
        return 0.0
    error = (x.double() - truth).abs()
    return float("inf") if error.isnan().any() else float(error.max())


def _plain_attention(inputs: Inputs) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The plain reference in the inputs' precision. Kernels multiply bfloat16 by bfloat16 where a
    processor can, so with bfloat16 it rounds the weights and the gradients of the scores."""
    operands = torch.bfloat16 if inputs.q.dtype == torch.bfloat16 else None
    return partial(reference.vst_attention, operands=operands)


def check_attention(inputs: Inputs, out: torch.Tensor, lse: torch.Tensor | None = None) -> None:
    """Raises AssertionError unless out (and lse) are as near to the float64 truth of the same
    inputs as their precision allows: twice the error of the plain reference in that precision
    (see `_plain_attention`), and a floor for where that error is lucky. The floor is what float32
    may cost: a few rounding units of `sum p |v|` for the sums, half a unit of the scores for the
    weights (scores that count are of the LSE's size), and the last rounding to the output's own
    type."""
    exact = inputs.to(torch.float64)
    truth, truth_lse = reference.vst_attention(*exact.args())
    absolute = replace(exact, v=exact.v.abs(), v_cache=exact.v_cache.abs())
    mass, _ = reference.vst_attention(*absolute.args())
    plain, plain_lse = _plain_attention(inputs)(*inputs.args())
    allowed = 2 * _error(plain, truth)
    if truth.numel():
        unit = torch.finfo(torch.float32).eps
        scores = float(truth_lse.abs().max())
        allowed += (4 + scores / 2) * unit * float(mass.max())
        allowed += torch.finfo(out.dtype).eps * float(truth.abs().max())
    assert out.shape == truth.shape, f"shape {tuple(out.shape)}, expected {tuple(truth.shape)}"
    error = _error(out, truth)
    assert error <= allowed, f"output error {error:.3e}, allowed {allowed:.3e}"
    if lse is not None:
        assert lse.shape == truth_lse.shape
        largest = max(float(truth_lse.abs().max()), 1.0) if truth_lse.numel() else 1.0
        allowed = 2 * _error(plain_lse, truth_lse) + 8 * torch.finfo(lse.dtype).eps * largest
        error = _error(lse, truth_lse)
        assert error <= allowed, f"LSE error {error:.3e}, allowed {allowed:.3e}"


def _reference_gradients(
    inputs: Inputs, grad_out: torch.Tensor, grad_lse: torch.Tensor
) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs.args()[:5]]
    out, lse = _plain_attention(inputs)(*leaves, *inputs.args()[5:])
    grads = [grad_out.to(out.dtype), grad_lse.to(lse.dtype)]
    return list(torch.autograd.grad((out, lse), leaves, grads, materialize_grads=True))


def _of_kv_heads(x: torch.Tensor, group: int) -> torch.Tensor:
    """`(keys, heads, head_dim)` summed over the query heads of each KV head."""
    return x.unflatten(1, (-1, group)).sum(2)


def _largest(x: torch.Tensor) -> float:
    return float(x.max()) if x.numel() else 0.0


def _gradient_masses(
    inputs: Inputs, grad_out: torch.Tensor, grad_lse: torch.Tensor
) -> tuple[list[float], list[float], float]:
    """Bounds of rounding in the gradients of q, k and v (and so of the caches), in float64: the
    largest sums of absolute terms, the same for the terms of `sum dO . out` alone, and the largest
    sum of |q| |k| of a score."""
    x, group = inputs.to(torch.float64), inputs.q.shape[2] // inputs.k.shape[2]
    scale = x.q.shape[3] ** -0.5
    masses, delta_masses, score = [0.0] * 3, [0.0] * 3, 0.0
    earlier = 0 if x.layout is None else (x.layout.chunks - 1) * x.layout.vsts_per_chunk
    for b, length in enumerate(x.cache_seqlens.tolist()):
        slots = torch.arange(length + earlier)
        page_size = x.k_cache.shape[1]
        at = x.block_table[b, slots // page_size].long(), slots % page_size
        keys = torch.cat([x.k_cache[at], x.k[b]]).repeat_interleave(group, dim=1).abs()
        values = torch.cat([x.v_cache[at], x.v[b]]).repeat_interleave(group, dim=1).abs()
        q, grad = x.q[b].abs(), grad_out[b].double().abs()
        signed_keys = torch.cat([x.k_cache[at], x.k[b]]).repeat_interleave(group, dim=1)
        scores = torch.einsum("rhd,khd->hrk", x.q[b], signed_keys) * scale
        mask = reference.visible(x.layout, len(q), length, q.device)
        p = torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1)
        dp = torch.einsum("rhd,khd->hrk", grad, values)
        ds = p * (dp + (p * dp).sum(-1, keepdim=True) + grad_lse[b].double().abs()[..., None])
        signed_values = torch.cat([x.v_cache[at], x.v[b]]).repeat_interleave(group, dim=1)
        out = torch.einsum("hrk,khd->rhd", p, signed_values)
        delta = p * (grad * out.abs()).sum(-1).T[..., None]
        q_mass = torch.einsum("hrk,khd->rhd", ds, keys) * scale
        k_mass = torch.einsum("hrk,rhd->khd", ds, q) * scale
        v_mass = torch.einsum("hrk,rhd->khd", p, grad)
        q_delta = torch.einsum("hrk,khd->rhd", delta, keys) * scale
        k_delta = torch.einsum("hrk,rhd->khd", delta, q) * scale
        found = q_mass, _of_kv_heads(k_mass, group), _of_kv_heads(v_mass, group)
        masses = [max(old, _largest(x)) for old, x in zip(masses, found, strict=True)]
        found = q_delta, _of_kv_heads(k_delta, group), torch.zeros(0)  # V has no delta
        delta_masses = [max(old, _largest(x)) for old, x in zip(delta_masses, found, strict=True)]
        products = torch.einsum("rhd,khd->hrk", q, keys) * scale
        score = max(score, _largest(products.masked_fill(~mask, 0)))
    return masses, delta_masses, score


def check_gradients(
    inputs: Inputs,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    grads: Sequence[torch.Tensor],
) -> None:
    """Raises AssertionError unless the gradients (of q, k, v, k_cache, v_cache) are as near to
    the float64 truth as their precision allows: twice the error of the plain reference, and a
    floor. In the floor, sums of absolute terms may be off by some units of float32, and by as
    many as a score is large, since probabilities are recomputed from it; `out` was rounded to
    the output's type before it was used, and so is the gradient itself."""
    truth = _reference_gradients(inputs.to(torch.float64), grad_out, grad_lse)
    plain = _reference_gradients(inputs, grad_out, grad_lse)
    masses, delta_masses, score = _gradient_masses(inputs, grad_out, grad_lse)
    unit = 4 * torch.finfo(torch.float32).eps * (1 + score)
    eps = torch.finfo(inputs.q.dtype).eps
    names = ("q", "k", "v", "k_cache", "v_cache")
    for i, (name, x, exact, other) in enumerate(zip(names, grads, truth, plain, strict=True)):
        assert x.shape == exact.shape, f"{name}: {tuple(x.shape)}, expected {tuple(exact.shape)}"
        kind = i if i < 3 else i - 2
        largest = float(exact.abs().max()) if exact.numel() else 0.0
        allowed = 2 * _error(other, exact) + unit * masses[kind]
        allowed += eps * (delta_masses[kind] + largest)
        error = _error(x, exact)
        assert error <= allowed, f"gradient of {name}: error {error:.3e}, allowed {allowed:.3e}"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN inside: an output element that no one writes shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills, unless someone has switched that off
    try:
        assert torch.empty(4).isnan().all(), "torch.utils.deterministic does not fill memory"
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
