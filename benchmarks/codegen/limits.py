"""What the model of `machine_code.py` assumes about each architecture: the one table of its
constants.

All rates are per clock and per SM (CU on AMD), so no clock frequency is needed. Results per
clock divided by the lanes of a warp (32; 64 on AMD) give the cycles a unit is busy with one
instruction of one warp.

Sources
  [guide]   CUDA C++ Programming Guide, "Arithmetic Instructions": results per clock and SM for
            compute capability 8.0 / 9.0 / 10.0, and "Compute Capabilities", technical
            specifications: registers, shared memory, warps, threads and blocks per SM.
  [a100]    NVIDIA A100 whitepaper: 4 tensor cores x 256 FMA per clock for dense FP16/BF16;
            312 TFLOP/s = 108 SMs x 1.41 GHz x 2048.
  [h100]    NVIDIA H100 whitepaper: twice the A100's tensor throughput per SM and clock;
            989 TFLOP/s = 132 SMs x 1.83 GHz x 4096.
  [b200]    Blackwell datasheet, 2.25 PFLOP/s dense BF16 = 148 SMs x 1.85 GHz x 8192; the
            FlashAttention-4 authors calculate with 8192 FLOP, 16 exponentials and 128 bytes of
            shared memory per clock and SM as well.
  [cdna3]   AMD CDNA 3 whitepaper and MI300 ISA guide: 2048 FLOP per clock and CU of dense
            FP16/BF16 (1307 TFLOP/s = 304 CUs x 2.1 GHz x 2048), 4 SIMDs of 16 lanes, packed FP32
            at twice the rate, 512 vector registers per lane, 64 KB and 128 bytes per clock of LDS.
            Transcendental functions run at a quarter of the rate of an FMA.
  [memory]  Data sheets: A100 80 GB 2.04 TB/s, H100 SXM 3.35 TB/s, B200 8 TB/s, MI300X 5.3 TB/s,
            over the SMs and clocks above.
  [assumed] No published figure was found; the value favours neither kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LIMITS", "TARGETS", "Limits"]


@dataclass(frozen=True)
class Limits:
    name: str
    warp: int
    # -- throughput, per clock and SM --
    matrix_flops: dict[str, int]
    """Dense FLOP of each kind of matrix instruction: 16-bit ones, and after a dot 32-bit ones,
    which run at half the rate on tf32 [a100] [h100] [b200]."""
    slots: int
    """Instructions issued, in lanes: 4 schedulers x one warp instruction."""
    fma: int
    alu: int
    mufu: int
    shuffle: int
    shared_bytes: int
    tensor_memory_bytes: int
    memory_bytes: float
    """Of the GPU's memory, an SM's part."""
    # -- residency --
    registers: int
    register_granule: int
    """Registers are handed to a warp in this many (NVIDIA); per lane on AMD."""
    shared_total: int
    shared_reserved: int
    """Shared memory that the driver takes for every resident block [guide]."""
    warps: int
    threads: int
    ctas: int
    tensor_memory_columns: int = 0

    def peak(self, dtype: str) -> int:
        """FLOP per clock of the fastest matrix instruction for "bf16", "fp16" or "fp32"."""
        wide = dtype == "fp32"
        return max(n for kind, n in self.matrix_flops.items() if ("." in kind) == wide)


LIMITS = {
    "cuda:80": Limits(
        name="sm_80",
        warp=32,
        matrix_flops={"HMMA": 2048, "HMMA.TF32": 1024},  # [a100]
        slots=128,  # [a100] 4 sub-cores, one warp instruction a clock each
        fma=64,  # [guide] 32-bit add, multiply, multiply-add; 32-bit integer multiply-add
        alu=64,  # [guide] integer add, compare, minimum, maximum, shift, logic
        mufu=16,  # [guide] reciprocal, ex2, ...; also conversions other than packing
        shuffle=32,  # [guide] warp shuffle
        shared_bytes=128,  # [guide] 32 banks of 4 bytes
        tensor_memory_bytes=0,
        memory_bytes=13.4,  # [memory]
        registers=65536,  # [guide] from here on: technical specifications
        register_granule=256,
        shared_total=164 * 1024,
        shared_reserved=1024,
        warps=64,
        threads=2048,
        ctas=32,
    ),
    "cuda:90": Limits(
        name="sm_90",
        warp=32,
        # [h100]; warp-level mma.sync is measured at about 62 % of wgmma's rate (Luo et al.,
        # "Dissecting the NVIDIA Hopper Architecture through Microbenchmarking", 2025)
        matrix_flops={"HGMMA": 4096, "HMMA": 2540, "HGMMA.TF32": 2048, "HMMA.TF32": 1270},
        slots=128,
        fma=128,  # [guide]
        alu=64,  # [guide]
        mufu=16,  # [guide]
        shuffle=32,  # [guide]
        shared_bytes=128,  # [guide]
        tensor_memory_bytes=0,
        memory_bytes=13.9,  # [memory]
        registers=65536,
        register_granule=256,
        shared_total=228 * 1024,
        shared_reserved=1024,
        warps=64,
        threads=2048,
        ctas=32,
    ),
    "cuda:100": Limits(
        name="sm_100",
        warp=32,
        # [b200]; HMMA [assumed]
        matrix_flops={"UTCHMMA": 8192, "HMMA": 2048, "UTCHMMA.TF32": 4096, "HMMA.TF32": 1024},
        slots=128,
        fma=128,  # [guide]; FFMA2 and similar instructions hold the unit twice as long
        alu=64,  # [guide]
        mufu=16,  # [guide] [b200]
        shuffle=32,  # [guide]
        shared_bytes=128,  # [b200]
        tensor_memory_bytes=512,  # [assumed] one 32-bit column per lane and clock
        memory_bytes=29.2,  # [memory]
        registers=65536,
        register_granule=256,
        shared_total=228 * 1024,
        shared_reserved=1024,
        warps=64,
        threads=2048,
        ctas=32,
        tensor_memory_columns=512,  # PTX ISA, tcgen05: 512 columns of 128 lanes
    ),
    "hip:gfx942": Limits(
        name="gfx942",
        warp=64,
        matrix_flops={"MFMA": 2048, "MFMA.F32": 256, "MFMA.XF32": 1024},  # [cdna3]
        slots=64,  # [cdna3] every SIMD issues one vector instruction in 4 clocks
        fma=64,  # [cdna3]
        alu=64,
        mufu=16,  # [cdna3]
        shuffle=64,  # [assumed] ds_bpermute moves 4 bytes a lane through the LDS
        shared_bytes=128,  # [cdna3]
        tensor_memory_bytes=0,
        memory_bytes=8.3,  # [memory]
        registers=512,
        register_granule=8,
        shared_total=64 * 1024,
        shared_reserved=0,
        warps=32,  # 8 waves on each of 4 SIMDs
        threads=2048,
        ctas=32,
    ),
}
TARGETS = tuple(LIMITS)
