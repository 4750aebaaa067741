"""Data-sheet rates of GPUs, for roofline times, and the limits that occupancy depends on.

All rates are dense (without structured sparsity) and the vendor's peak. A kernel on real hardware stays below them.
Nothing here was measured.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Accelerator:
    """Rates in operations per second (a multiply-add is two), bandwidth in bytes per second."""

    name: str
    arch: str
    bandwidth: float
    matrix: dict[str, float]  # "bf16", "fp16", "fp32": peak of the matrix instructions for these types
    vector_fp32: float
    source: str

    def matrix_rate(self, dtype: torch.dtype) -> float:
        """Peak of matrix instructions for products of this element type; fp32 products are not rounded to tf32."""
        return self.matrix[{torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32")]


@dataclass(frozen=True)
class Limits:
    """The limits of one multiprocessor (NVIDIA) or compute unit (AMD)."""

    warps: int  # resident at once
    blocks: int  # resident at once
    registers: int  # 32-bit, for all lanes
    shared: int  # bytes for all blocks
    shared_block: int  # bytes for one block
    shared_reserved: int  # bytes that the runtime takes of each block
    source: str


A100 = Accelerator(
    name="A100 SXM 80GB",
    arch="sm_80",
    bandwidth=2.039e12,
    matrix={"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12},
    vector_fp32=19.5e12,
    source="NVIDIA A100 Tensor Core GPU data sheet (2021), SXM4 80GB",
)
H100 = Accelerator(
    name="H100 SXM",
    arch="sm_90",
    bandwidth=3.35e12,
    matrix={"bf16": 989.4e12, "fp16": 989.4e12, "fp32": 66.9e12},
    vector_fp32=66.9e12,
    source="NVIDIA H100 Tensor Core GPU Architecture white paper (2022), table 2, SXM5; data sheet for HBM3",
)
B200 = Accelerator(
    name="B200 SXM",
    arch="sm_100",
    bandwidth=8.0e12,
    matrix={"bf16": 2250e12, "fp16": 2250e12, "fp32": 75e12},
    vector_fp32=75e12,
    source="NVIDIA Blackwell Architecture technical brief (2024), HGX B200, per GPU, dense = half of sparse",
)
MI300X = Accelerator(
    name="MI300X",
    arch="gfx942",
    bandwidth=5.3e12,
    matrix={"bf16": 1307.4e12, "fp16": 1307.4e12, "fp32": 163.4e12},
    vector_fp32=163.4e12,
    source="AMD Instinct MI300X accelerator data sheet (2023)",
)

ACCELERATORS = (A100, H100, B200, MI300X)

_CUDA = "CUDA C++ Programming Guide, technical specifications per compute capability"
LIMITS: dict[str, Limits] = {
    "sm_80": Limits(64, 32, 65536, 164 << 10, 163 << 10, 1 << 10, _CUDA + " 8.0"),
    "sm_90": Limits(64, 32, 65536, 228 << 10, 227 << 10, 1 << 10, _CUDA + " 9.0"),
    "sm_100": Limits(64, 32, 65536, 228 << 10, 227 << 10, 1 << 10, _CUDA + " 10.0"),
    "gfx942": Limits(32, 32, 4 * 512 * 64, 64 << 10, 64 << 10, 0, "AMD Instinct MI300 (CDNA3) ISA, chapters 2, 3"),
}


def occupancy(arch: str, registers: int, shared: int, warps: int) -> float:
    """Resident warps over the most a multiprocessor holds; 0 when one block does not fit.

    registers: 32-bit registers of a lane (AMD: vector and accumulation registers together, in granules of 8).
    shared: bytes of a block. warps: of a block.
    """
    limits = LIMITS[arch]
    if shared > limits.shared_block:
        return 0.0
    if arch.startswith("gfx"):
        # Four SIMDs of 512 registers a lane, eight wavefronts each at most.
        by_registers = 4 * min(512 // max(-(-registers // 8) * 8, 8), limits.warps // 4)
    else:
        # Registers go to a warp in units of 256; a quarter of the multiprocessor holds a quarter of the file.
        by_registers = 4 * (limits.registers // 4 // max(-(-registers * 32 // 256) * 256, 256))
    blocks = min(min(by_registers, limits.warps) // warps, limits.blocks)
    if shared:
        blocks = min(blocks, limits.shared // (-(-shared // 128) * 128 + limits.shared_reserved))
    return blocks * warps / limits.warps
