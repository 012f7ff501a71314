"""Every kernel in every configuration that is shipped, for compiling ahead of time.

Each entry comes from the launcher itself, given tensors of the real geometry on the meta device,
so what is compiled here is what a launch would compile: types, alignment, constants.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs, launch, launch_backward, launch_backward_ragged, launch_ragged
from .launch_common import Launch

__all__ = ["Compilation", "compilation", "shipped"]

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
}

# From 3.7 on a launch gives every constant an empty list of attributes, before that strings alone.
_CONSTANTS_HAVE_ATTRS = tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 7)


@dataclass(frozen=True)
class Compilation:
    """What `triton.compile(ASTSource(fn, signature, constexprs, attrs), ...)` takes, and what
    a report wants to know. `attrs` holds the divisibility by 16 that a launch finds."""

    kernel: str
    config: str
    fn: object
    signature: dict[str, str]
    constexprs: dict[str, object]
    attrs: dict
    num_warps: int
    num_stages: int
    options: dict
    tile: dict
    head_dim: int
    dtype: str


def _argument(value: object) -> tuple[str, bool]:
    """Triton's type of an argument, and whether it is a multiple of 16 (pointers: aligned)."""
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype]}{value.block_shape}>", False
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype], True
    if isinstance(value, float):
        return "fp32", False
    assert isinstance(value, int)
    return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0


def compilation(planned: Launch, config: str, dtype: torch.dtype) -> Compilation:
    """The compilation that a launch on an NVIDIA GPU makes or finds: Triton's cache knows it by all
    of these, `attrs` and their order included."""
    signature: dict[str, str] = {}
    constexprs = dict(planned.constexprs)
    attrs: dict = {}
    for i, parameter in enumerate(planned.fn.params):
        name = parameter.name
        value = planned.arguments.get(name)
        if name in constexprs or value is None:
            signature[name] = "constexpr"
            constexprs.setdefault(name, None)
            if _CONSTANTS_HAVE_ATTRS or isinstance(constexprs[name], str):
                attrs[(i,)] = []
            continue
        signature[name], divisible = _argument(value)
        if parameter.do_not_specialize:
            continue
        if divisible:
            attrs[(i,)] = [["tt.divisibility", 16]]
        elif value == 1 and signature[name] == "i32":
            signature[name], constexprs[name] = "constexpr", 1
            if _CONSTANTS_HAVE_ATTRS:
                attrs[(i,)] = []
    return Compilation(
        planned.name,
        config,
        planned.fn,
        signature,
        constexprs,
        attrs,
        planned.num_warps,
        planned.num_stages,
        planned.options,
        planned.tile,
        planned.constexprs.get("HEAD_DIM", 0),
        _TYPES[dtype],
    )


# Qwen2-7B: 28 query heads over 4 KV heads of 128, hidden 3584; window 1440, ratio 8.
_HEADS, _KV_HEADS, _HIDDEN, _WINDOW, _RATIO = 28, 4, 3584, 1440, 8


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _attention(
    arch: str,
    dtype: torch.dtype,
    head_dim: int,
    layout: list[int],
    rows: int,
    page_size: int | None,
) -> Iterator[Compilation]:
    rows = layout[2] * (layout[0] + layout[0] // layout[1]) if layout else rows
    q = _empty(1, rows, _HEADS, head_dim, dtype=dtype)
    k = _empty(1, rows, _KV_HEADS, head_dim, dtype=dtype)
    pages = table = lens = None
    if page_size is not None:
        pages = _empty(512, page_size, _KV_HEADS, head_dim, dtype=dtype)
        table = _empty(1, 256, dtype=torch.int32)
        lens = _empty(1, dtype=torch.int32)
    planned, _, _ = launch.plan_attention(q, k, k, pages, pages, table, lens, layout, 1.0, arch)
    for each in planned:
        tile, how = each.tile, [f"{_TYPES[dtype]} d{head_dim}"]
        if each.name == "merge":
            yield compilation(each, how[0], dtype)
            continue
        how.append(f"BM{tile['rows']} BN{tile['keys']} w{each.num_warps} s{each.num_stages}")
        how.append(f"pages {each.constexprs['PAGE_MODE']}" if page_size else "no cache")
        yield compilation(each, " ".join(how), dtype)


def _ragged(
    arch: str, dtype: torch.dtype, head_dim: int, page_size: int | None
) -> Iterator[Compilation]:
    """A window, a text and 22 decode rows."""
    rows, sequences = _WINDOW + _WINDOW // _RATIO + 122, 24
    q = _empty(rows, _HEADS, head_dim, dtype=dtype)
    k = _empty(rows, _KV_HEADS, head_dim, dtype=dtype)
    pages = table = lens = None
    if page_size is not None:
        pages = _empty(512, page_size, _KV_HEADS, head_dim, dtype=dtype)
        table = _empty(sequences, 256, dtype=torch.int32)
        lens = _empty(sequences, dtype=torch.int32)
    layout = _empty(sequences, 5, dtype=torch.int32)
    planned, _ = launch_ragged.plan_attention_varlen(
        q, k, k, pages, pages, table, lens, layout, sequences, 1.0, arch
    )
    for each in planned:
        tile, how = each.tile, [f"{_TYPES[dtype]} d{head_dim}"]
        if "keys" in tile:
            how.append(f"BM{tile['rows']} BN{tile['keys']} w{each.num_warps} s{each.num_stages}")
            how.append(f"pages {each.constexprs['PAGE_MODE']}" if page_size else "no cache")
        elif not page_size:
            how.append("no cache")
        if not page_size and each.name not in ("plan_ragged", "prefill_ragged"):
            continue  # without a cache there are no splits
        if page_size == 16 and arch == "cuda:80" and each.name == "prefill_ragged":
            continue  # spills 16 bytes, see docs/machine-code.md
        yield compilation(each, " ".join(how), dtype)


def _backward(
    arch: str, dtype: torch.dtype, head_dim: int, page_size: int | None
) -> Iterator[Compilation]:
    """Four chunks of a sequence, as in training, over one page (None) or over small ones."""
    layout = [_WINDOW, _RATIO, 4, 1]
    rows = 4 * (_WINDOW + _WINDOW // _RATIO)
    q = _empty(1, rows, _HEADS, head_dim, dtype=dtype)
    k = _empty(1, rows, _KV_HEADS, head_dim, dtype=dtype)
    pages = _empty(
        1 if page_size is None else 512, page_size or 1024, _KV_HEADS, head_dim, dtype=dtype
    )
    table = _empty(1, 1 if page_size is None else 64, dtype=torch.int32)
    lens, lse = _empty(1, dtype=torch.int32), _empty(1, _HEADS, rows, dtype=torch.float32)
    planned, _ = launch_backward.plan_attention_backward(
        q, lse, q, k, k, pages, pages, table, lens, q, lse, layout, 1.0, arch
    )
    for each in planned:
        tile, how = each.tile, f"{_TYPES[dtype]} d{head_dim}"
        if "keys" in tile:
            how += f" BM{tile['rows']} BN{tile['keys']} w{each.num_warps} s{each.num_stages}"
        if each.name == "backward_q":
            how += f" pages {each.constexprs['PAGE_MODE']}"
        elif page_size is not None:
            continue  # the same again
        yield compilation(each, how, dtype)


def _ragged_backward(
    arch: str, dtype: torch.dtype, head_dim: int, page_size: int
) -> Iterator[Compilation]:
    """Eight samples of other shapes, as in packed training."""
    rows, sequences = 4 * (_WINDOW + _WINDOW // _RATIO) + 999, 8
    q = _empty(rows, _HEADS, head_dim, dtype=dtype)
    k = _empty(rows, _KV_HEADS, head_dim, dtype=dtype)
    pages = _empty(512, page_size, _KV_HEADS, head_dim, dtype=dtype)
    table, lens = _empty(sequences, 64, dtype=torch.int32), _empty(sequences, dtype=torch.int32)
    lse, layout = _empty(_HEADS, rows, dtype=torch.float32), _empty(sequences, 5, dtype=torch.int32)
    planned, _ = launch_backward_ragged.plan_attention_varlen_backward(
        q, lse, q, k, k, pages, pages, table, lens, q, lse, layout, sequences, 1.0, arch
    )
    for each in planned:
        if each.name == "delta":
            continue  # the fixed call's
        tile, how = each.tile, f"{_TYPES[dtype]} d{head_dim}"
        if "keys" in tile:
            how += f" BM{tile['rows']} BN{tile['keys']} w{each.num_warps} s{each.num_stages}"
        if each.name == "backward_q_ragged":
            how += f" pages {each.constexprs['PAGE_MODE']}"
        elif page_size == 16:
            continue  # the same again
        if each.name == "sum_pages":
            how += " ragged"
        yield compilation(each, how, dtype)


def _linear(arch: str, dtype: torch.dtype) -> Compilation:
    layout = [_WINDOW, _RATIO, 1, 1]
    rows = _WINDOW + _WINDOW // _RATIO
    x = _empty(1, rows, _HIDDEN, dtype=dtype)
    weight, bias = _empty(_HIDDEN, _HIDDEN, dtype=dtype), _empty(_HIDDEN, dtype=dtype)
    out = _empty(1, rows, _HIDDEN, dtype=dtype)
    planned = launch.plan_linear(x, weight, bias, weight, bias, layout, out, arch)
    m, n, k = (planned.tile[name] for name in "mnk")
    how = f"{_TYPES[dtype]} {m}x{n}x{k} w{planned.num_warps} s{planned.num_stages}"
    return compilation(planned, how, dtype)


def _invariant(arch: str, dtype: torch.dtype) -> Compilation:
    x, out = _empty(32, _HIDDEN, dtype=dtype), _empty(32, _HIDDEN, dtype=dtype)
    weight, bias = _empty(_HIDDEN, _HIDDEN, dtype=dtype), _empty(_HIDDEN, dtype=dtype)
    planned = launch.plan_invariant_linear(x, weight, bias, out, arch)
    m, n, k = (planned.tile[name] for name in "mnk")
    how = f"{_TYPES[dtype]} {m}x{n}x{k} w{planned.num_warps} s{planned.num_stages}"
    return compilation(planned, how, dtype)


def _rope(dtype: torch.dtype, layout: list[int]) -> Compilation:
    rows = _WINDOW + _WINDOW // _RATIO if layout else 1
    q = _empty(1, rows, _HEADS, 128, dtype=dtype)
    k = _empty(1, rows, _KV_HEADS, 128, dtype=dtype)
    pages = _empty(512, 64, _KV_HEADS, 128, dtype=dtype)
    table, lens = _empty(1, 256, dtype=torch.int32), _empty(1, dtype=torch.int32)
    inv_freq = _empty(64, dtype=torch.float32)
    planned = launch.plan_rope_append(q, k, k, pages, pages, table, lens, layout, inv_freq, q, k)
    return compilation(planned, f"{_TYPES[dtype]} d128 {'chunk' if layout else 'plain'}", dtype)


def _ragged_rope(dtype: torch.dtype) -> Compilation:
    rows, sequences = _WINDOW + _WINDOW // _RATIO + 122, 24
    q, k = (_empty(rows, heads, 128, dtype=dtype) for heads in (_HEADS, _KV_HEADS))
    pages, table = _empty(512, 64, _KV_HEADS, 128, dtype=dtype), _empty(24, 256, dtype=torch.int32)
    lens, layout = _empty(24, dtype=torch.int32), _empty(sequences, 5, dtype=torch.int32)
    inv_freq = _empty(64, dtype=torch.float32)
    planned = launch_ragged.plan_rope_append_varlen(
        q, k, k, pages, pages, table, lens, layout, inv_freq, q, k
    )
    return compilation(planned, f"{_TYPES[dtype]} d128", dtype)


def shipped(arch: str) -> list[Compilation]:
    """Every kernel for "cuda:80", "cuda:90", "cuda:100" or "hip:gfx942", in the configurations
    that Qwen2-7B takes, and main loops at other head_dims.

    Pages that hold whole blocks of keys, are parts of one, and no cache at all. Both storage
    orders run the same code. DESIGN.md tells what of the tables is not here and spills.

    Raises:
        ValueError: arch has no table in `configs.py`.
    """
    if arch not in configs.ARCHITECTURES:
        raise ValueError(f"arch: got {arch!r}, expected one of {', '.join(configs.ARCHITECTURES)}")
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    split = [_WINDOW, _RATIO, 1, 1]
    attention = [
        # dtype, head_dim, layout, rows, page_size
        (bf16, 128, split, 0, 128),
        (bf16, 128, split, 0, 16),
        (bf16, 128, split, 0, None),
        (bf16, 64, split, 0, 128),
        (bf16, 256, split, 0, 128),
        (fp16, 128, split, 0, 128),
        (fp32, 128, split, 0, 128),
        (bf16, 128, [], 1, 128),
        (bf16, 128, [], 1, 16),
        (bf16, 128, [], 4, 128),
        (bf16, 128, [], 9, 128),
        (bf16, 128, [], 64, 128),
        (bf16, 128, [], 64, 16),
        (fp16, 128, [], 1, 128),
        (fp32, 128, [], 1, 128),
    ]
    entries = [entry for call in attention for entry in _attention(arch, *call)]
    ragged = [
        # dtype, head_dim, page_size
        (bf16, 128, 128),
        (bf16, 128, 16),
        (bf16, 128, None),
        (bf16, 80, 128),
    ]
    entries += [entry for call in ragged for entry in _ragged(arch, *call)]
    backward = [
        # dtype, head_dim, page_size
        (bf16, 128, None),
        (bf16, 128, 16),
        (bf16, 64, None),
        (bf16, 256, None),
        (fp16, 128, None),
        (fp32, 128, None),
    ]
    entries += [entry for call in backward for entry in _backward(arch, *call)]
    ragged_backward = [
        # dtype, head_dim, page_size
        (bf16, 128, 1024),
        (bf16, 128, 16),
    ]
    entries += [entry for call in ragged_backward for entry in _ragged_backward(arch, *call)]
    entries += [_linear(arch, dtype) for dtype in (bf16, fp16, fp32)]
    entries += [_invariant(arch, dtype) for dtype in (bf16, fp16, fp32)]
    entries += [_rope(bf16, split), _rope(bf16, []), _rope(fp32, split)]
    entries += [_ragged_rope(dtype) for dtype in (bf16, fp32)]
    return list({(e.kernel, e.config): e for e in entries}.values())
