"""The launch table: one row per kernel, architecture and size class, each with its reason; see launch.py.

Kernels and the keys their rows have, besides num_warps and num_stages:

    tree_attention_forward, tree_attention_backward_dq       BLOCK_Q, BLOCK_K           sizes: head_dim
    tree_attention_backward_dkv                              BLOCK_Q, BLOCK_K, CHUNK    sizes: head_dim
        CHUNK: queries that one program of the split launch walks (a multiple of BLOCK_Q)
    decode_attention                                         BLOCK_B, BLOCK_K, CHUNK    sizes: head_dim
        BLOCK_B: sequences × query heads of a group that share one read of the trunk; CHUNK: keys per split
    rms_norm, rms_norm_backward                              BLOCK                      sizes: width (of a row)
    rope, rope_backward                                      BLOCK_T                    sizes: head_dim
    swiglu, swiglu_backward                                  BLOCK                      sizes: width (F)
    embed, embed_backward, prompt_step                       BLOCK                      sizes: width (d)
    linear_cross_entropy, linear_cross_entropy_backward      BLOCK_N, BLOCK_V, BLOCK_D  sizes: width (d)
    quantized_linear, quantized_linear_backward              BLOCK_M, BLOCK_N, BLOCK_K  sizes: group, rows (of x)
"""

from .launch import Fit, Options, Row, power_of_two

IN_PLACE = frozenset(
    {"rms_norm", "rms_norm_backward", "rope", "rope_backward", "swiglu", "swiglu_backward", "prompt_step"}
)
"""Kernels that write what they read (or may, when the caller lets the output alias an input): never autotuned."""

SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory one block may have (CUDA C++ Programming Guide, compute capabilities; CDNA3 ISA, LDS)."""

_SMALLEST_SHARED = 64 << 10

ROWS: tuple[Row, ...] = ()

_ATTENTION = ("tree_attention_forward", "tree_attention_backward_dq", "tree_attention_backward_dkv", "decode_attention")
_ROWWISE = ("rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "embed", "embed_backward", "prompt_step")


def heuristic(kernel: str, arch: str, element_bytes: int, sizes: dict[str, int]) -> Options:
    """Parameters where no row fits: the largest usual tiles that leave shared memory for a second block.

    Raises KeyError for an unknown kernel.
    """
    limit = SHARED_LIMIT.get(arch, _SMALLEST_SHARED)
    amd, interpreter = arch.startswith("gfx"), arch == "interpreter"
    stages = 1 if amd or interpreter else 2
    if kernel in _ROWWISE:
        block = Fit("width", 64, 8192).value(sizes) if "width" in sizes else 1024
        return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 8), "num_stages": 1}
    if kernel in ("rope", "rope_backward"):
        return {"BLOCK_T": 4, "num_warps": 4, "num_stages": 1}
    if kernel in _ATTENTION:
        return _attention(kernel, limit, element_bytes, sizes, stages, interpreter)
    if kernel.startswith("linear_cross_entropy"):
        small = interpreter or element_bytes > 2
        n, v = (32, 64) if small else (64, 128)
        return {"BLOCK_N": n, "BLOCK_V": v, "BLOCK_D": 32, "num_warps": 4, "num_stages": stages}
    if kernel.startswith("quantized_linear"):
        m = 16 if sizes.get("rows", 64) <= 16 else 32 if interpreter or element_bytes > 2 else 64
        return {"BLOCK_M": m, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": stages}
    raise KeyError(f"no launch parameters for a kernel named {kernel!r}")


def _attention(
    kernel: str, limit: int, element_bytes: int, sizes: dict[str, int], stages: int, interpreter: bool
) -> Options:
    width = power_of_two(max(sizes.get("head_dim", 128), 16))
    block = 16 if interpreter else 64
    # q, do, k and v tiles, twice for a second block on the same multiprocessor.
    while block > 16 and 4 * block * width * element_bytes * stages * 2 > limit:
        block //= 2
    common = {"BLOCK_K": block, "num_warps": 4, "num_stages": stages}
    if kernel == "decode_attention":
        return {"BLOCK_B": 16, "CHUNK": 4 * block if interpreter else 512, **common}
    if kernel == "tree_attention_backward_dkv":
        return {"BLOCK_Q": block, "CHUNK": 4 * block if interpreter else 512, **common}
    return {"BLOCK_Q": block, **common}
