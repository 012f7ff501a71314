"""What the launchers share: a launch, and tensors as the kernels take them.

From shapes, strides and dtypes alone, as `launch.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from .._arguments import fail
from . import configs, interpreted, primitives

__all__ = [
    "NEVER",
    "OPTIONS",
    "Launch",
    "cache_arguments",
    "check_capacity",
    "dense_heads",
    "descriptor",
    "descriptors",
    "power_of_two",
    "precision",
    "row_strides",
]

NEVER = primitives.NEVER.value
_MAX_INT32 = 2**31 - 1
_MAX_TOKENS = _MAX_INT32 - 2048
# Said to the compiler because Triton 3.10 is to change its default.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Launch:
    """A kernel with all it takes. `tile` names its block sizes for reports."""

    name: str
    fn: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    tile: dict[str, int] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=lambda: OPTIONS)

    def __call__(self) -> Any:
        """Returns Triton's compiled kernel; None from the interpreter, or if there is no work."""
        if 0 in self.grid:
            return None
        return self.fn[self.grid](
            **self.arguments,
            **self.constexprs,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            **(OPTIONS if interpreted() else self.options),
        )


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def precision(dtype: torch.dtype, arch: str) -> str:
    """float32 products: three tf32 ones, 21 bits of mantissa; AMD has a float32 instruction."""
    return "tf32x3" if dtype == torch.float32 and arch.startswith("cuda") else "ieee"


def dense_heads(x: torch.Tensor) -> torch.Tensor:
    """x with head_dim dense, and a row not far from the next."""
    if x.stride(-1) == 1 and x.stride(1) <= primitives.MAX_STRIDE.value:
        return x
    # `contiguous` would keep the stride of a single row, and the kernels rely on the bound
    return x.clone(memory_format=torch.contiguous_format)


def page_mode(page_size: int, max_pages: int, k_cache, v_cache, block_n: int) -> str:
    """See `keys.locate`. A cache of one page a sequence is never left by a block."""
    if not (_within_reach(k_cache) and _within_reach(v_cache)):
        return "gather"
    if page_size % block_n == 0 or max_pages == 1:
        return "block_in_page"
    return "pages_in_block" if block_n % page_size == 0 else "gather"


def _within_reach(cache: torch.Tensor) -> bool:
    """Whether keys start at multiples of 8 elements, 32 bits count to the last of them, and one
    is not far from the next."""
    pages, page_size = cache.shape[:2]
    page, slot = cache.stride()[:2]
    reach = pages * page + page_size * slot
    return (
        page % 8 == 0
        and slot % 8 == 0
        and reach // 8 <= _MAX_INT32
        and slot <= primitives.MAX_STRIDE.value
    )


def cache_arguments(cache: tuple, config) -> tuple[dict, dict]:
    """Arguments and constexprs of the attention kernels' cache; all None without one."""
    names = ("k_cache_ptr", "v_cache_ptr", "block_table_ptr", "cache_seqlens_ptr")
    k_cache, v_cache, block_table, _ = cache
    if k_cache is None or block_table.shape[1] == 0:
        strides = dict.fromkeys(
            ("kc_page", "kc_slot", "kc_head", "vc_page", "vc_slot", "vc_head"), 0
        )
        numbers = {**strides, "page_size": 1, "max_pages": 0}
        constexprs = {"HAS_CACHE": False, "PAGE_MODE": "block_in_page", "SAME_STRIDES": True}
        return {**dict.fromkeys(names), **numbers}, constexprs
    page_size, max_pages = k_cache.shape[1], block_table.shape[1]
    kc, vc = k_cache.stride(), v_cache.stride()
    arguments = {
        **dict(zip(names, cache, strict=True)),
        **dict(zip(("kc_page", "kc_slot", "kc_head"), kc[:3], strict=True)),
        **dict(zip(("vc_page", "vc_slot", "vc_head"), vc[:3], strict=True)),
        "page_size": page_size,
        "max_pages": max_pages,
    }
    mode = page_mode(page_size, max_pages, k_cache, v_cache, config.block_n)
    return arguments, {"HAS_CACHE": True, "PAGE_MODE": mode, "SAME_STRIDES": kc == vc}


def row_strides(**tensors: torch.Tensor) -> dict[str, int]:
    """`q_batch, q_row, q_head` for q=..., and so on.

    Triton compiles a stride for whether 16 divides it: the widest loads rest on that. Those of rows
    and heads are the model's; a batch's is a multiple of its rows, so where heads x head_dim is not
    a multiple of 16, rows decide. A batch of one has no next sequence: its stride counts as 0, and
    its calls, of whatever length, are one compilation.
    """
    return {
        f"{name}_{axis}": 0 if axis == "batch" and x.shape[0] == 1 else x.stride(i)
        for name, x in tensors.items()
        for i, axis in enumerate(("batch", "row", "head"))
    }


def check_capacity(rows: int, k_cache, block_table) -> None:
    """Refuses a table for which a count of tokens could exceed 32 bits: its entries, the rows of
    the call, and the unused end of a split."""
    if k_cache is None:
        return
    page_size, max_pages = k_cache.shape[1], block_table.shape[1]
    if max_pages * page_size + rows > _MAX_TOKENS:
        fail(
            "block_table",
            f"{max_pages} pages of {page_size} tokens",
            f"at most {_MAX_TOKENS} tokens, the call's {rows} rows included",
        )


def descriptor(x: torch.Tensor, block_n: int) -> TensorDescriptor | None:
    """Blocks of `block_n` keys of x (batch or page, row, head, head_dim); None where TMA
    cannot reach them."""
    size, block_d = x.element_size(), x.shape[3]
    if not x.numel():
        return None
    aligned = x.data_ptr() % 16 == 0 and all(n * size % 16 == 0 for n in x.stride()[:3])
    if not aligned or block_d != power_of_two(block_d) or min(x.stride()[:3]) <= 0:
        return None
    x = x.transpose(1, 2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, block_n, block_d])


def descriptors(k, v, k_cache, v_cache, constexprs: dict, arch: str) -> dict[str, Any]:
    """TMA's view of each tensor, all of them or none."""
    tensors = {"k_desc": k, "v_desc": v, "k_cache_desc": k_cache, "v_cache_desc": v_cache}
    if not constexprs["HAS_CACHE"]:
        tensors |= {"k_cache_desc": None, "v_cache_desc": None}
    if not configs.has_tma(arch) or constexprs["PAGE_MODE"] != "block_in_page":
        return dict.fromkeys(tensors)
    found = {
        name: None if x is None else descriptor(x, constexprs["BLOCK_N"])
        for name, x in tensors.items()
    }
    missing = any(found[name] is None for name, x in tensors.items() if x is not None)
    return dict.fromkeys(tensors) if missing else found
