"""Properties of an instruction: its class, its FLOPs and the bytes it moves."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from benchmarks.codegen.parse import Instruction, ParseError

__all__ = ["Counts", "Shape", "classify", "count", "matrix_flops", "tensor_core_shapes"]

FMA = "fma"
ALU = "alu"
MUFU = "mufu"
MATRIX = "matrix"
UNIFORM = "uniform"
SHUFFLE = "shuffle"
SHARED = "shared"
PLAIN = "plain load"
ASYNC = "async load"
BULK = "bulk load"
CONSTANT = "constant"
STORE = "store"
LOCAL = "local"
TMEM = "tensor memory"
BARRIER = "barrier"
CONTROL = "control"
OTHER = "unclassified"

_NVIDIA = {
    FMA: "FFMA FMUL FADD FFMA2 FMUL2 FADD2 FFMA32I FMUL32I FADD32I IMAD HFMA2 HADD2 HMUL2 FSWZADD "
    "HFMA2_32I HADD2_32I IMAD32I",
    ALU: "FMNMX FMNMX3 FSEL FSET FSETP FCHK ISETP IADD3 IADD IADD32I VIADD VIADDMNMX VIMNMX "
    "VIMNMX3 IMNMX LOP3 LOP PLOP3 SEL SHF SHL SHR PRMT LEA F2FP MOV MOV32I IABS SGXT BMSK BREV "
    "HMNMX2 HSETP2 HSET2 ICMP R2P P2R VABSDIFF CSET CSETP IDP CS2R I2FP F2IP",
    MUFU: "MUFU F2F F2I I2F FRND I2I POPC FLO",
    MATRIX: "HMMA HGMMA IMMA IGMMA QGMMA DMMA UTCHMMA UTCQMMA UTCOMMA UTCIMMA UTCMMA BGMMA",
    SHUFFLE: "SHFL REDUX CREDUX VOTE MATCH",
    SHARED: "LDS LDSM STS STSM ATOMS",
    PLAIN: "LDG LD ATOMG ATOM",
    ASYNC: "LDGSTS",
    BULK: "UTMALDG UBLKCP UTMAPF UBLKPF UTMACCTL UTMACMDFLUSH",
    CONSTANT: "LDC ULDC LDCU",
    STORE: "STG ST RED UTMASTG UTMAREDG",
    LOCAL: "LDL STL",
    TMEM: "LDTM STTM UTCCP UTCATOMSWS UTCSHIFT",
    BARRIER: "BAR SYNCS WARPGROUP DEPBAR LDGDEPBAR MEMBAR FENCE WARPSYNC UTCBAR NANOSLEEP ERRBAR "
    "WARPGROUPSET UCGABAR_ARV UCGABAR_WAIT ARRIVES B2R CCTL USETMAXREG ACQBULK "
    "CGAERRBAR CCTLL",
    UNIFORM: "R2UR S2UR S2R VOTEU ELECT UR2UP UP2UR CS2UR",
    CONTROL: "BRA BRX JMP CALL RET EXIT BSSY BSYNC BREAK NOP YIELD BMOV KILL BPT PREEXIT BRXU "
    "WARPGROUP_ ENDCOLLECTIVE",
}
_NVIDIA_CLASS = {base: name for name, bases in _NVIDIA.items() for base in bases.split()}
# two results a lane, which keep the unit busy twice as long
_DOUBLE = {"FFMA2", "FMUL2", "FADD2"}

_AMD_TRANSCENDENTAL = re.compile(r"^v_(exp|log|rcp|rsq|sqrt|sin|cos)_")
_AMD = (
    (re.compile(r"^v_s?mfma"), MATRIX),
    (_AMD_TRANSCENDENTAL, MUFU),
    (re.compile(r"^v_(pk_)?(fma|fmac|mul|add|sub|mad|dot\d*c?)_(f|i|u|nc|co|hi|lo)"), FMA),
    (re.compile(r"^v_"), ALU),
    (re.compile(r"^ds_(bpermute|permute|swizzle)"), SHUFFLE),
    (re.compile(r"^ds_"), SHARED),
    (re.compile(r"^(scratch_|buffer_(load|store)\w* .*\bscratch)"), LOCAL),
    (re.compile(r"^(global|buffer|flat)_load_lds|^buffer_load.* lds$"), ASYNC),
    (re.compile(r"^(global|buffer|flat)_load"), PLAIN),
    (re.compile(r"^(global|buffer|flat)_(store|atomic)"), STORE),
    (re.compile(r"^(buffer_(wbl2|inv|gl\d)|s_(barrier|waitcnt|sleep|setprio|sendmsg))"), BARRIER),
    (re.compile(r"^s_(load|buffer_load|store)"), CONSTANT),
    (re.compile(r"^s_(branch|cbranch|endpgm|nop|setpc|trap|sethalt)"), CONTROL),
    (re.compile(r"^s_"), UNIFORM),
)


class Shape(NamedTuple):
    """The product of a tcgen05 instruction, M x K by K x N, with `element` bytes a number."""

    m: int
    n: int
    k: int
    element: int = 2


def classify(instruction: Instruction) -> str:
    if instruction.opcode[:1].isupper():
        base = instruction.base
        if base in _NVIDIA_CLASS:
            return _NVIDIA_CLASS[base]
        # the other U... instructions: the scalar ("uniform") data path
        return UNIFORM if base.startswith("U") else OTHER
    text = f"{instruction.opcode} {instruction.operands}"
    return next((name for pattern, name in _AMD if pattern.search(text)), OTHER)


# -- FLOPs of matrix instructions, for one warp ---------------------------------------------------
_HMMA = re.compile(r"^HMMA\.(\d+)\.F(?:16|32)(\.TF32)?")
_HMMA_SHAPES = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}
_HGMMA = re.compile(r"^HGMMA\.(\d+)x(\d+)x(\d+)\.F(?:16|32)(\.TF32)?")
_MFMA = re.compile(r"^v_mfma_f32_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?_(bf16|f16|f32|xf32)")
_IDESC_USE = re.compile(
    r"tcgen05\.mma\.cta_group::1\.kind::(f16|tf32)\s+\[[^\]]+\],\s*\S+.*?,\s*(%r\d+),"
)


def matrix_flops(instruction: Instruction) -> tuple[str, int]:
    """`(kind, FLOP)` that one warp contributes. wgmma is one instruction of four warps, each
    doing a quarter: 16 of its 64 rows. tcgen05 carries its shape in a register: see
    `tensor_core_shapes`."""
    opcode = instruction.opcode
    if found := _HMMA.match(opcode):
        if found.group(1) not in _HMMA_SHAPES:
            raise ParseError(f"{opcode}: a shape that is not in the table")
        m, n, k = _HMMA_SHAPES[found.group(1)]
        return "HMMA" + (found.group(2) or ""), 2 * m * n * k
    if found := _HGMMA.match(opcode):
        m, n, k = (int(g) for g in found.groups()[:3])
        return "HGMMA" + (found.group(4) or ""), 2 * m * n * k // 4
    if found := _MFMA.match(opcode):
        m, n, k = (int(g) for g in found.groups()[:3])
        wide = {"f32": ".F32", "xf32": ".XF32"}.get(found.group(5), "")
        return "MFMA" + wide, 2 * m * n * k * int(found.group(4) or 1)
    raise ParseError(f"{opcode}: a matrix instruction whose FLOPs are not known")


def tensor_core_shapes(ptx: str) -> list[Shape]:
    """The shape of every `tcgen05.mma`, in the order of the text.

    The shape is in the instruction descriptor (PTX ISA, "Instruction descriptor", kinds f16 and
    tf32: bits 17-22 hold N / 8, bits 24-28 M / 16; K is 32 bytes), which Triton moves from a
    constant."""
    constants: dict[str, int] = {}
    shapes = []
    for line in ptx.splitlines():
        if move := re.search(r"mov\.[bu]32\s+(%r\d+),\s*(-?\d+);", line):
            constants[move.group(1)] = int(move.group(2))
        elif "tcgen05.mma." in line:
            use = _IDESC_USE.search(line)
            if use is None or use.group(2) not in constants:
                raise ParseError(f"the shape of this instruction is not known: {line.strip()}")
            bits = constants[use.group(2)]
            element = 2 if use.group(1) == "f16" else 4
            shapes.append(
                Shape((bits >> 24 & 31) * 16, (bits >> 17 & 63) * 8, 32 // element, element)
            )
    return shapes


# -- bytes ----------------------------------------------------------------------------------------
def _access_bytes(instruction: Instruction, warp: int) -> int:
    """Bytes one warp moves with a load, store, or matrix operand fetch."""
    opcode = instruction.opcode
    base = instruction.base
    if base in ("LDSM", "STSM"):
        matrices = int(opcode.rsplit(".", 1)[-1]) if opcode[-2:] in (".2", ".4") else 1
        return matrices * 128
    if opcode.startswith("ds_"):
        width = re.search(r"_b(\d+)|_[uif](\d+)", opcode)
        bits = int(next(g for g in width.groups() if g)) if width else 32
        return bits // 8 * (2 if re.search(r"(read|write)2", opcode) else 1) * warp
    if base in ("LDS", "STS", "LDGSTS", "LDG", "STG", "LDL", "STL"):
        width = re.search(r"\.(?:U|S)?(8|16|64|128|256)(?:\.|$)", opcode)
        return (int(width.group(1)) if width else 32) // 8 * warp
    return 0


def _operand_bytes(instruction: Instruction, shape: Shape | None) -> int:
    """Shared memory that a wgmma or tcgen05 instruction reads, per warp for wgmma. B is always
    there; A only if its operand is a descriptor too."""
    operands = instruction.operands.split(",")
    if instruction.base == "HGMMA" and (found := _HGMMA.match(instruction.opcode)):
        m, n = int(found.group(1)), int(found.group(2))
        # K is 32 bytes of either type; one gdesc names both operands where A is in shared
        # memory too
        return (n + (m if "gdesc" in operands[1] else 0)) * 32 // 4
    if shape is not None:
        return (shape.n + (shape.m if "gdesc" in operands[0] else 0)) * 32
    return 0


@dataclass
class Counts:
    """One iteration of a loop: per warp, except `cta_*`, which one thread does for the block."""

    classes: Counter[str] = field(default_factory=Counter)
    opcodes: Counter[str] = field(default_factory=Counter)
    matrix: Counter[str] = field(default_factory=Counter)
    matrix_flops: Counter[str] = field(default_factory=Counter)
    cta_matrix_flops: Counter[str] = field(default_factory=Counter)
    double: int = 0
    shared_bytes: int = 0
    async_bytes: int = 0
    cta_shared_bytes: int = 0
    tensor_memory_bytes: int = 0

    @property
    def instructions(self) -> int:
        return sum(self.classes.values())

    @property
    def other_instructions(self) -> int:
        """Everything but matrix instructions."""
        return self.instructions - self.classes[MATRIX]

    def without(self, other: Counts) -> Counts:
        """These counts minus those of skipped instructions, which are arithmetic only."""
        return replace(
            self,
            classes=self.classes - other.classes,
            opcodes=self.opcodes - other.opcodes,
            double=self.double - other.double,
        )

    @property
    def scalar_math(self) -> int:
        return self.classes[FMA] + self.classes[ALU]


def _tmem_bytes(instruction: Instruction, warp: int) -> int:
    columns = re.search(r"\.x(\d+)$", instruction.opcode)
    lanes = 16 if "16dp" in instruction.opcode else warp
    return (int(columns.group(1)) if columns else 1) * 4 * lanes


def count(
    instructions: Iterable[Instruction],
    *,
    warp: int,
    shapes: Sequence[Shape] = (),
) -> Counts:
    """Counts over instructions. `shapes` are those of the tcgen05 instructions among them."""
    result = Counts()
    remaining: Iterator[Shape] = iter(shapes)
    for instruction in instructions:
        name = classify(instruction)
        result.classes[name] += 1
        result.opcodes[instruction.opcode] += 1
        if instruction.base in _DOUBLE:
            result.double += 1
        if name == MATRIX and instruction.base.startswith("UTC"):
            shape = next(remaining, None)
            if shape is None:
                raise ParseError("more UTC*MMA instructions than shapes known for them")
            kind = "UTCHMMA" + (".TF32" if shape.element == 4 else "")
            result.matrix[kind] += 1
            result.cta_matrix_flops[kind] += 2 * shape.m * shape.n * shape.k
            result.cta_shared_bytes += _operand_bytes(instruction, shape)
        elif name == MATRIX:
            kind, flops = matrix_flops(instruction)
            result.matrix[kind] += 1
            result.matrix_flops[kind] += flops
            result.shared_bytes += _operand_bytes(instruction, None)
        elif name == TMEM and instruction.base in ("LDTM", "STTM"):
            result.tensor_memory_bytes += _tmem_bytes(instruction, warp)
        elif name in (SHARED, ASYNC, LOCAL):
            result.shared_bytes += _access_bytes(instruction, warp)
            result.async_bytes += _access_bytes(instruction, warp) * (name == ASYNC)
    return result
