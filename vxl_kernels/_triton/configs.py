"""Tile shapes, warps and stages, per architecture. Nothing is tuned at import or in a call:
`tune.py` can be asked to, and writes a file that is read here.

How they were chosen: compiled for each target and read as machine code, for no spilled register
and few instructions beside the matrix ones in the loop of unmasked tiles. For prefill at head_dim
128, bf16, instructions of a warp per 128 x 128 scores and 8 warps, Triton 3.9:

    sm_80   128 x 128: 547         128 x 64: 610
    sm_90   128 x 128 by TMA: 442  128 x 64 by TMA: 620
    sm_100  128 x 128 by TMA: 384  128 x 64 by TMA: 558

4 warps spill on all of them; at head_dim 256 8 warps repeat products on sm_90 (0.83 of a plain
kernel's share of peak, 4 warps 1.07). A wider block of keys rescales the accumulator less
often. MASKED_BLOCK_N, the block where masks are needed, is small for less masked waste and fewer
registers. Pages of at least BLOCK_N (128) tokens hold whole blocks; of 64 or 16 cost 2 % more
on sm_80, a tenth on sm_90 and 15 % on sm_100, where TMA cannot follow. Two blocks of 64, each from
a page of its own, in one step were no better (614 on sm_90).
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .._arguments import fail
from . import interpreted

__all__ = [
    "ARCHITECTURES",
    "AttentionConfig",
    "BackwardConfig",
    "DkvConfig",
    "DqConfig",
    "LinearConfig",
    "RaggedSplits",
    "backward_config",
    "decode_config",
    "family",
    "has_tma",
    "invariant_config",
    "linear_config",
    "merge_block",
    "prefill_config",
    "prefill_options",
    "ragged_splits",
    "read_tuned",
    "softmax_constants",
    "split_size",
    "tuned_path",
    "tuning_key",
    "tuning_name",
]

# Families with a table. An architecture without a table of its own is compiled as one of these.
# "cuda:86" means GPUs with 100 KiB of shared memory (RTX 30, 40 and 50).
ARCHITECTURES = ("cuda:80", "cuda:86", "cuda:90", "cuda:100", "hip:gfx942")


@dataclass(frozen=True)
class AttentionConfig:
    """BLOCK_M packed rows (rows x query heads of a KV head) against blocks of BLOCK_N keys."""

    block_m: int
    block_n: int
    masked_block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class DqConfig(AttentionConfig):
    """Of dQ. allow_licm: whether the compiler may hoist loop invariants, which take registers."""

    allow_licm: bool = True


@dataclass(frozen=True)
class DkvConfig:
    """Of dK and dV: BLOCK_N keys of a program against blocks of BLOCK_M query rows, or of
    MASKED_BLOCK_M rows where a mask is needed (with TMA all blocks have BLOCK_M rows)."""

    block_n: int
    block_m: int
    masked_block_m: int
    num_warps: int
    num_stages: int
    allow_licm: bool = True


@dataclass(frozen=True)
class BackwardConfig:
    """`dkv_kernel` has two: for the call's new keys, and for the cache's."""

    dq: DqConfig
    dkv_new: DkvConfig
    dkv_cached: DkvConfig


@dataclass(frozen=True)
class LinearConfig:
    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int


def family(arch: str) -> str:
    """The table's name for "cuda:<major><minor>" or "hip:<gfx name>"."""
    kind, _, name = arch.partition(":")
    if kind == "hip":
        return "hip:gfx942"
    capability = int(name)
    if capability in (80, 87) or capability < 80:
        return "cuda:80"
    if capability < 90 or capability >= 120:
        return "cuda:86"
    return "cuda:90" if capability < 100 else "cuda:100"


def _table(*entries: tuple[int, tuple[int, int, int, int, int]]) -> dict[int, AttentionConfig]:
    return {block_d: AttentionConfig(*values) for block_d, values in entries}


# By head_dim (up to this many, a power of two), for 16-bit types and for float32.
_PREFILL_16 = {
    "cuda:80": _table(
        (64, (128, 128, 64, 8, 2)),
        (128, (128, 128, 64, 8, 2)),
        (256, (64, 64, 32, 8, 2)),
    ),
    "cuda:86": _table(
        (64, (128, 128, 32, 8, 2)),
        (128, (128, 128, 32, 8, 2)),
        (256, (64, 32, 32, 8, 2)),
    ),
    "cuda:90": _table(
        (64, (128, 128, 64, 8, 3)),
        (128, (128, 128, 32, 8, 2)),
        (256, (64, 64, 16, 4, 2)),  # a third stage spills with Triton 3.6
    ),
    "cuda:100": _table(
        (64, (128, 128, 64, 8, 3)),
        (128, (128, 128, 32, 8, 2)),
        (256, (128, 64, 16, 8, 2)),
    ),
    "hip:gfx942": _table(
        (64, (128, 64, 32, 4, 2)),
        (128, (128, 64, 32, 4, 2)),
        (256, (128, 32, 32, 4, 2)),
    ),
}
# float32 is three tf32 products for one (AMD has its own): registers decide. At head_dim 256 no
# tile was found that does not spill; it is right, and slow.
_32 = _table((64, (32, 32, 32, 4, 1)), (128, (32, 32, 16, 4, 1)), (256, (32, 16, 16, 4, 1)))
_PREFILL_32 = {
    "cuda:80": _32,
    "cuda:86": _32,
    "cuda:90": _table(
        (64, (32, 32, 16, 8, 1)), (128, (32, 32, 16, 8, 1)), (256, (32, 16, 16, 4, 1))
    ),
    "cuda:100": _table(
        (64, (32, 32, 32, 4, 1)), (128, (32, 64, 16, 8, 1)), (256, (32, 16, 16, 4, 1))
    ),
    "hip:gfx942": _table(
        (64, (64, 32, 32, 8, 2)), (128, (64, 32, 32, 8, 2)), (256, (32, 16, 16, 4, 1))
    ),
}


def _backward(*entries: tuple) -> dict[int, BackwardConfig]:
    """Entries (head_dim, dq, dkv_new[, dkv_cached: else as dkv_new])."""
    return {
        block_d: BackwardConfig(DqConfig(*dq), DkvConfig(*keys[0]), DkvConfig(*keys[-1]))
        for block_d, dq, *keys in entries
    }


# Gradients, chosen as above: where a tile could be larger, the next one spills or repeats products.
# sm_90's wgmma takes 64 keys or more, which at head_dim 256 do not fit the registers: 32 keys go
# through mma.sync. Without hoisting, sm_80 would spill kilobytes (dQ), sm_90 needs it to be off.
_BACKWARD_16 = {
    "cuda:80": _backward(
        (64, (128, 64, 32, 8, 2), (128, 64, 32, 8, 2)),
        (128, (128, 64, 32, 8, 2), (64, 128, 32, 8, 2)),
        (256, (32, 32, 32, 4, 1), (32, 64, 32, 8, 1)),
    ),
    "cuda:86": _backward(
        (64, (128, 64, 32, 8, 2), (128, 64, 32, 8, 2)),
        (128, (128, 64, 32, 8, 2), (64, 64, 32, 8, 2)),
        (256, (32, 32, 32, 4, 1), (32, 32, 32, 8, 1)),
    ),
    "cuda:90": _backward(
        (64, (128, 128, 32, 8, 2), (128, 64, 64, 8, 2)),
        (128, (128, 128, 32, 8, 2), (128, 64, 64, 8, 2, False), (128, 32, 32, 8, 2)),
        (256, (64, 64, 32, 4, 1, False), (32, 64, 64, 8, 2)),
    ),
    "cuda:100": _backward(
        (64, (128, 128, 32, 8, 2), (128, 64, 64, 8, 2)),
        (128, (128, 128, 32, 8, 2), (128, 64, 64, 8, 2)),
        (256, (64, 64, 32, 8, 1), (64, 64, 64, 8, 1)),
    ),
    "hip:gfx942": _backward(
        (64, (128, 64, 32, 4, 1), (128, 32, 32, 4, 1)),
        (128, (128, 32, 32, 4, 1), (128, 32, 32, 4, 1)),
        (256, (32, 32, 32, 4, 1), (64, 16, 16, 4, 1)),
    ),
}
_BACKWARD_32 = _backward(
    (64, (32, 16, 16, 4, 1), (32, 32, 32, 4, 1)),
    (128, (16, 32, 32, 4, 1), (16, 16, 16, 4, 1)),
    (256, (16, 16, 16, 4, 1), (16, 16, 16, 4, 1)),
)


def backward_config(arch: str, block_d: int, itemsize: int, padded: bool = False) -> BackwardConfig:
    """padded: head_dim is less than block_d. Threads then load what TMA would, which takes
    registers: on sm_90 dkv_new would spill 96 bytes with its own tile, with the cache's none."""
    table = _BACKWARD_16[family(arch)] if itemsize == 2 else _BACKWARD_32
    config = table[max(block_d, 64)]
    if padded and itemsize == 2 and family(arch) == "cuda:90" and block_d == 128:
        return replace(config, dkv_new=config.dkv_cached)
    return config


def tuning_key(device: torch.device) -> str:
    """What a tuned entry holds for: this GPU and this Triton."""
    import triton

    return f"{torch.cuda.get_device_name(device)}, triton {triton.__version__}"


def tuning_name(block_d: int, itemsize: int) -> str:
    return f"prefill head_dim {block_d}, {8 * itemsize} bit"


_FILE = "VXL_TRITON_CONFIGS"
_EXPECTED = (
    "[block_m, block_n, masked_block_n, num_warps, num_stages]: block_m and block_n powers of two "
    "from 16 to 128, masked_block_n a power of two from 16 to block_n, 4 or 8 warps, at least 1 "
    "stage"
)


def _usable(entry: object) -> bool:
    """Whether `prefill_kernel` is right with these tiles. A masked_block_n above block_n would
    count keys twice, and no compiler would say so."""
    if not isinstance(entry, list) or len(entry) != 5 or {type(n) for n in entry} != {int}:
        return False
    block_m, block_n, masked_block_n, warps, stages = entry
    tiles = all(16 <= n <= 128 and n & (n - 1) == 0 for n in (block_m, block_n, masked_block_n))
    return tiles and masked_block_n <= block_n and warps in (4, 8) and stages >= 1


def read_tuned(path: str | Path) -> dict[str, dict[str, list[int]]]:
    """What `tune.py` wrote: entries by `tuning_name` by `tuning_key`.

    Raises:
        ValueError: path cannot be read, or holds anything that is not what `tune.py` writes.
    """
    argument = f"{_FILE} {path}"
    try:
        known = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        fail(argument, f"{type(error).__name__}: {error}", "a file written by tune.py")
    if not isinstance(known, dict):
        fail(argument, type(known).__name__, "an object of GPUs")
    for key, entries in known.items():
        if not isinstance(entries, dict):
            fail(f"{argument}, {key!r}", type(entries).__name__, "an object of tiles")
        for name, entry in entries.items():
            if not _usable(entry):
                fail(f"{argument}, {key!r}, {name!r}", entry, _EXPECTED)
    return known


def tuned_path() -> str | None:
    """The file of tuned tiles that applies now."""
    return os.environ.get(_FILE)


@functools.cache
def _tuned(path: str, device: torch.device) -> dict[str, list[int]]:
    """The file's entries for a device; read once."""
    return read_tuned(path).get(tuning_key(device), {})


def has_tma(arch: str) -> bool:
    """Whether blocks of K and V may come by TMA: fewer registers and instructions."""
    return family(arch) in ("cuda:90", "cuda:100")


# Of the softmax, by family: how far, in log2, a row's maximum grows before its accumulator is
# rescaled; how many elements a warp jumps over if it rescales no row; in how many parts a row's sum
# is kept, in 16-bit types up to head_dim 64 and else; what `softmax` does by hand.
# The jump in gfx942's assembly makes LLVM move the whole accumulator (312 -> 409 instructions a
# tile), and in float32 it would spill. Sums in parts save shuffles: worth it on sm_90 and gfx942,
# and on sm_80 where a tile's products are few (head_dim 64: 462 -> 454 instructions; 128: 554 ->
# 564).
_SOFTMAX = {
    "cuda:80": (8.0, 64, 8, 1, ""),
    "cuda:86": (8.0, 64, 8, 1, ""),
    "cuda:90": (8.0, 64, 8, 8, ""),
    "cuda:100": (8.0, 64, 1, 1, "f32x2"),
    "hip:gfx942": (0.0, 0, 8, 8, "no_bf16_cvt"),
}


def softmax_constants(
    arch: str, config: AttentionConfig, block_d: int, itemsize: int
) -> dict[str, Any]:
    """Constants of `softmax.Arithmetic`, and the parts of a row's sum. In the interpreter rows
    rescale as seldom as on a GPU, every block is multiplied, and arithmetic is the plain one."""
    threshold, skip, narrow, wide, isa = _SOFTMAX[family(arch)]
    each = config.block_m * block_d // (32 * config.num_warps)
    by_hand = not interpreted()
    return {
        "RESCALE_THRESHOLD": threshold,
        "WARP_SKIP_ELEMENTS": min(each, skip) if itemsize == 2 and by_hand else 0,
        "ROW_SUM_SPLITS": narrow if block_d <= 64 and itemsize == 2 else wide,
        "ISA": isa if by_hand else "",
    }


def prefill_options(arch: str) -> dict[str, int]:
    """For Triton's compiler. gfx942: a tile's registers leave room for one wave a SIMD; told so,
    the compiler reads shared memory further ahead (fp16: 312 -> 302 instructions a tile)."""
    return {"waves_per_eu": 1} if family(arch) == "hip:gfx942" else {}


def _narrow(arch: str, head_dim: int, itemsize: int) -> bool:
    """Whether sm_90 needs narrower tiles for head_dims like 72 and 120. TMA cannot load them, and
    16 does not divide a head's offset: threads need more registers for their addresses. The tables'
    tiles spill 16 to 1816 bytes, these none, with Triton 3.6 and 3.9."""
    wide = 64 < head_dim <= 128 and itemsize == 2
    return wide and head_dim % 16 != 0 and family(arch) == "cuda:90"


def prefill_config(
    arch: str,
    block_d: int,
    itemsize: int,
    device: torch.device | None = None,
    head_dim: int | None = None,
) -> AttentionConfig:
    """device: whose tuned tiles go before the table's; None (also for a CPU) for none. head_dim:
    block_d if it is not given."""
    path = tuned_path()
    if path and device is not None and device.type == "cuda":
        tuned = _tuned(path, device).get(tuning_name(max(block_d, 64), itemsize))
        if tuned is not None:
            return AttentionConfig(*tuned)
    if _narrow(arch, head_dim or block_d, itemsize):
        return AttentionConfig(128, 64, 32, 8, 2)
    table = (_PREFILL_16 if itemsize == 2 else _PREFILL_32)[family(arch)]
    return table[max(block_d, 64)]


_PROGRAMS = 96  # of 128 packed rows, that fill a GPU without splits


def split_size(packed_rows: int, kv_heads: int) -> int | None:
    """Cache entries of a split, from `packed_rows` = rows x query heads of a KV head; None where
    rows fill the GPU by themselves. It depends on nothing else: not on batch or lengths.

    At 8100 cached tokens and 4 KV heads, 256 entries make 128 programs for the 132 SMs of an
    H100, each reading 128 KiB (bf16, head_dim 128). From 128 packed rows on there is a program for
    each 128: a split grows with their number, as parts cost more to write and merge. So the parts
    of a sequence take at most half the bytes of its K and V (16-bit types), up to splits of 8192.
    A single KV head has half as many entries in a split: else there would be a program for only
    half of the SMs.
    """
    if packed_rows * kv_heads > _PROGRAMS * 128:
        return None
    entries = max(256, 2 << (packed_rows - 1).bit_length())
    return min(entries // 2 if kv_heads == 1 else entries, 8192)


@dataclass(frozen=True)
class RaggedSplits:
    """How texts of a ragged call split their keys. Texts of more than `limit` packed rows do not.
    Up to `rows` packed rows a split has `size` cache entries, then twice as many for each doubling
    of the rows, `doublings` times at most."""

    size: int
    rows: int
    doublings: int
    limit: int

    def of(self, packed_rows: int) -> int:
        """Cache entries of a split, as `ragged.split_size`."""
        return self.size << sum(packed_rows > self.rows << i for i in range(self.doublings))


def ragged_splits(kv_heads: int) -> RaggedSplits:
    """Tiles have the same rows for texts of any length, so that sequences can share them. Splits
    grow with the rows from 32 packed rows on: a text of more rows has more tiles, and its parts
    take memory. Over a table of 21,760 entries and 4 KV heads, a text is 170 programs or more."""
    size = 128 if kv_heads == 1 else 256
    return RaggedSplits(size, 32, 5, _PROGRAMS * 128 // kv_heads)


def merge_block(split_size: int) -> int:
    """Splits that the merge kernel reads at once. Few rows have many small splits and few programs,
    so wide blocks save rounds. It depends on the size of a split alone, because it decides the
    order of the sum."""
    return 64 if split_size <= 256 else 16


# Decode of 16-bit types by head_dim: more than 32 packed rows, more than 64. Half the rows with
# half the warps are the same work for a warp. Up to head_dim 128 they are prefill's tiles with a
# smaller MASKED_BLOCK_N: what a program keeps for its new keys as well would spill. 8 warps on 64
# rows repeat products on sm_90, 4 on gfx942. sm_80's warps share 64 rows, because Triton lays them
# along the keys where a product has more columns than rows: 755 instructions per MFLOP instead of
# 513. Summing two halves of head_dim apart avoids that (628, spills 8 bytes), not worth its code.
# At head_dim 256 a wider block spills on sm_90 (small pages) and repeats products on gfx942.
_DECODE_16 = {
    "cuda:80": (
        _table((64, (64, 128, 32, 4, 2)), (128, (64, 128, 16, 4, 2)), (256, (64, 64, 16, 8, 2))),
        _table((64, (128, 128, 64, 8, 2)), (128, (128, 128, 16, 8, 2)), (256, (64, 64, 16, 8, 2))),
    ),
    "cuda:86": (
        _table((64, (64, 128, 32, 4, 2)), (128, (64, 128, 16, 4, 2)), (256, (64, 32, 32, 8, 2))),
        _table((64, (128, 128, 64, 8, 2)), (128, (128, 128, 16, 8, 2)), (256, (64, 32, 32, 8, 2))),
    ),
    "cuda:90": (
        _table((64, (64, 128, 32, 4, 2)), (128, (64, 128, 32, 4, 2)), (256, (64, 32, 16, 4, 2))),
        _table((64, (128, 128, 64, 8, 2)), (128, (128, 128, 32, 8, 2)), (256, (64, 32, 16, 4, 2))),
    ),
    "cuda:100": (
        _table((64, (64, 128, 32, 4, 2)), (128, (64, 128, 32, 4, 2)), (256, (64, 64, 16, 8, 2))),
        _table((64, (128, 128, 64, 8, 2)), (128, (128, 128, 32, 8, 2)), (256, (64, 64, 16, 8, 2))),
    ),
    "hip:gfx942": (
        _table((64, (64, 64, 64, 2, 2)), (128, (64, 64, 32, 2, 2)), (256, (64, 16, 16, 2, 2))),
        _table((64, (128, 64, 64, 4, 2)), (128, (128, 64, 32, 4, 2)), (256, (64, 16, 16, 2, 2))),
    ),
}


def decode_config(
    arch: str, block_d: int, itemsize: int, packed_rows: int, head_dim: int | None = None
) -> AttentionConfig:
    """Decode waits for memory: the tile is what the matrix instruction needs at least, and the
    stages keep several blocks of K and V in flight. float32 has no tile of more than 32 packed
    rows that does not spill."""
    if _narrow(arch, head_dim or block_d, itemsize):
        block_m = 16 if packed_rows <= 16 else 32 if packed_rows <= 32 else 128
        return AttentionConfig(block_m, 64, 32, 8, 2 if block_m == 128 else 3)
    if packed_rows > 32 and itemsize == 2:
        return _DECODE_16[family(arch)][packed_rows > 64][max(block_d, 64)]
    wide = block_d * itemsize > 256
    block_m = 16 if packed_rows <= 16 else 32
    block_n = 64 if not wide else 32 if block_d * itemsize <= 512 else 16
    stages = 2 if family(arch) in ("cuda:86", "hip:gfx942") or wide else 3
    if block_m == 32 and itemsize == 4 and arch.startswith("hip"):  # 64 keys spill
        block_n = min(block_n, 32)
    elif wide and block_m == 32 and itemsize == 4:  # 4 warps spill
        return AttentionConfig(32, block_n, 16, 8, stages)
    # Blocks of 64 keys in the masked loops too would take 189 registers instead of 118 on sm_90:
    # two programs an SM instead of three.
    return AttentionConfig(block_m, block_n, min(block_n, 32), 4, stages)


def invariant_config(arch: str, itemsize: int) -> LinearConfig:
    """block_m rows of weights, block_n rows of x. One choice for any number of rows: another could
    sum in another order. Reading weights is the time of such a call, so blocks are long in `k` and
    several are on their way."""
    if itemsize == 4:
        return LinearConfig(64, 32, 32, 1, 4, 4 if arch.startswith("cuda") else 2)
    stages = {"cuda:86": 3, "hip:gfx942": 2}.get(family(arch), 4)
    return LinearConfig(64, 32, 128, 1, 4, stages)


def linear_config(arch: str, itemsize: int) -> LinearConfig:
    if itemsize == 4:
        return LinearConfig(64, 64, 32, 8, 4, 2)
    return {
        "cuda:80": LinearConfig(128, 128, 32, 8, 4, 4),
        "cuda:86": LinearConfig(128, 128, 32, 8, 4, 3),
        "cuda:90": LinearConfig(128, 256, 64, 8, 8, 3),
        "cuda:100": LinearConfig(128, 128, 64, 8, 8, 4),
        "hip:gfx942": LinearConfig(128, 128, 64, 8, 4, 2),
    }[family(arch)]
