"""The launch table: one row per kernel, architecture and size class, each with its reason; see launch.py.

Kernels and the keys their rows have, besides num_warps and num_stages:

    tree_attention_forward, tree_attention_backward_dq   BLOCK_Q, BLOCK_K            sizes: head_dim
    tree_attention_backward_dkv                          BLOCK_Q, BLOCK_K, PROGRAMS  sizes: head_dim
    decode_attention                                     BLOCK_Q, BLOCK_K, PROGRAMS  sizes: head_dim
    rms_norm, rms_norm_backward, prompt_step             BLOCK                       sizes: width (of a row)
    rope, rope_backward                                  BLOCK_H                     sizes: head_dim
    swiglu, swiglu_backward, embed, embed_backward       BLOCK                       sizes: width (of a row)
    softmax_loss                                         BLOCK, PROGRAMS             sizes: width (of a row)
    quantized_linear, quantized_linear_backward          BLOCK_M, BLOCK_N, BLOCK_K, PROGRAMS   sizes: rows (of x or dy)
    quantized_linear_reduce                              BLOCK                       sizes: width (of a row)
    dequantize                                           BLOCK_N, BLOCK_K            sizes: width (of a packed row)

PROGRAMS: how many programs a long range (queries of a prefix key, keys, rows of logits) is shared out over. BLOCK_Q of
the attention kernels counts rows, that is (query, head of the group) pairs. BLOCK_H: heads of one token.

Rows that `python -m bench tune` has measured come first (tuned_rows.py). A row written here is chosen by what the
compiler makes of it (`python -m bench kernels --static`: no spills, matrix instructions, 128-bit loads, occupancy) and
by the instructions its gfx942 code executes, unless its reason says that it was measured.
"""

from . import tuned_rows
from .launch_attention import ATTENTION
from .launch_row import Fit, Options, Row, power_of_two

SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory one block may have (CUDA C++ Programming Guide, compute capabilities; CDNA3 ISA, LDS)."""

_SMALLEST_SHARED = 64 << 10
_HALF, _FLOAT = (2,), (4,)

_ROWWISE = (
    Row(
        "rope*", "sm_*", {"BLOCK_H": 16, "num_warps": 1, "num_stages": 1},
        "a thread has several heads of the same columns and loads their cos and sin once; one warp, because a token's "
        "heads are few",
    ),
    Row(
        "rope*", "gfx942", {"BLOCK_H": 32, "num_warps": 1, "num_stages": 1},
        "as on sm_*, with 64 lanes to a wavefront",
    ),
    Row(
        "swiglu*", "sm_*", {"BLOCK": 1024, "num_warps": 4, "num_stages": 1},
        "8 elements of 2 bytes a thread are one 128-bit load; one power of two over a row of 8,960 would idle 45 %",
    ),
    Row(
        "swiglu*", "gfx942", {"BLOCK": 2048, "num_warps": 4, "num_stages": 1},
        "8 elements a thread as on sm_*, with 64 lanes to a wavefront",
    ),
    Row(
        "embed", "sm_*", {"BLOCK": 1024, "num_warps": 4, "num_stages": 1},
        "one 128-bit load of 2-byte elements a thread",
    ),
    Row(
        "embed", "gfx942", {"BLOCK": 2048, "num_warps": 4, "num_stages": 1},
        "as on sm_*, with 64 lanes to a wavefront",
    ),
    Row(
        "embed_backward", "sm_*", {"BLOCK": 256, "num_warps": 1, "num_stages": 1},
        "only the prompt's rows have programs, so more and smaller ones; 8 elements a thread",
    ),
    Row(
        "embed_backward", "gfx942", {"BLOCK": 512, "num_warps": 1, "num_stages": 1},
        "as on sm_*, with 64 lanes to a wavefront",
    ),
)  # fmt: skip

_PRODUCTS = (
    Row(
        "softmax_loss", "sm_90", {"BLOCK": 8192, "PROGRAMS": 132, "num_warps": 32, "num_stages": 1},
        "measured: 255 us for 441 rows of 151,936; 72 programs, whose rows fit the L2 cache, with 16 warps take 477",
    ),
    Row(
        "softmax_loss", "sm_100", {"BLOCK": 8192, "PROGRAMS": 148, "num_warps": 16, "num_stages": 1},
        "as on sm_90; 126 MB of L2 cache hold a row for each multiprocessor",
    ),
    Row(
        "dequantize", "gfx942", {"BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 1},
        "16 bytes of W a lane, as on sm_*",
    ),
    Row(
        "quantized_linear", "sm_*",
        {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 32, "PROGRAMS": 528, "num_warps": 4, "num_stages": 4},
        "few rows: the weights are streamed, 16 bytes a thread and stage, and 16 columns are the least that mma takes; "
        "four programs a multiprocessor", bytes=_HALF, at_most={"rows": 16},
    ),
    Row(
        "quantized_linear", "sm_*",
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "PROGRAMS": 264, "num_warps": 4, "num_stages": 3},
        "every row of x at once, so that W is read once; two programs a multiprocessor", bytes=_HALF,
    ),
    Row(
        "quantized_linear_backward", "sm_*",
        {"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 32, "PROGRAMS": 1056, "num_warps": 4, "num_stages": 4},
        "measured: of 24 candidates the fastest at 37,888 x 3,584", bytes=_HALF, at_most={"rows": 16},
    ),
    Row(
        "quantized_linear_backward", "sm_*",
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "PROGRAMS": 264, "num_warps": 4, "num_stages": 3},
        "every row of dy at once, as the forward", bytes=_HALF,
    ),
)  # fmt: skip

WRITTEN: tuple[Row, ...] = _ROWWISE + _PRODUCTS + ATTENTION
ROWS: tuple[Row, ...] = tuned_rows.read() + WRITTEN

_ATTENTION = ("tree_attention_forward", "tree_attention_backward_dq", "tree_attention_backward_dkv", "decode_attention")
_WHOLE_ROW = {"rms_norm": 512, "rms_norm_backward": 512, "prompt_step": 512}
_ANY_BLOCK = ("swiglu", "swiglu_backward", "embed", "embed_backward")
_PROGRAMS = 264
"""Two waves over the 132 multiprocessors of an H100; close to one wave over the 304 compute units of an MI300X."""


def heuristic(kernel: str, arch: str, element_bytes: int, sizes: dict[str, int]) -> Options:
    """Parameters where no row fits: usual tiles, halved until two blocks fit into shared memory.

    Raises KeyError for an unknown kernel.
    """
    limit = SHARED_LIMIT.get(arch, _SMALLEST_SHARED)
    amd, interpreter = arch.startswith("gfx"), arch == "interpreter"
    stages = 1 if amd or interpreter else 2
    small = interpreter or element_bytes > 2
    programs = 8 if interpreter else _PROGRAMS
    if kernel in _WHOLE_ROW:
        block = Fit("width", 64).value(sizes)
        return {"BLOCK": block, "num_warps": min(max(block // _WHOLE_ROW[kernel], 1), 32), "num_stages": 1}
    if kernel in _ANY_BLOCK:
        return {"BLOCK": 1024, "num_warps": 4, "num_stages": 1}
    if kernel in ("rope", "rope_backward"):
        return {"BLOCK_H": 16, "num_warps": 1, "num_stages": 1}
    if kernel in _ATTENTION:
        found = _attention(limit, element_bytes, sizes, stages, interpreter)
        split = kernel in ("tree_attention_backward_dkv", "decode_attention")
        return {**found, "PROGRAMS": programs} if split else found
    if kernel == "softmax_loss":
        return {"BLOCK": 4096 if not interpreter else 1024, "PROGRAMS": programs, "num_warps": 8, "num_stages": 1}
    if kernel == "quantized_linear_reduce":
        return {"BLOCK": 512, "num_warps": 4, "num_stages": 1}
    if kernel == "dequantize":
        return {"BLOCK_N": 16, "BLOCK_K": 128, "num_warps": 4, "num_stages": 1}
    if kernel in ("quantized_linear", "quantized_linear_backward"):
        m = 16 if sizes.get("rows", 64) <= 16 else 32 if small else 64
        n = 32 if small else 64
        tiles = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": 32, "PROGRAMS": programs}
        return {**tiles, "num_warps": 4, "num_stages": stages}
    raise KeyError(f"no launch parameters for a kernel named {kernel!r}")


def _attention(limit: int, element_bytes: int, sizes: dict[str, int], stages: int, interpreter: bool) -> Options:
    width = power_of_two(max(sizes.get("head_dim", 128), 16))
    block = 16 if interpreter else 64
    # q, do, k and v tiles, twice for a second block on the same multiprocessor.
    while block > 16 and 4 * block * width * element_bytes * stages * 2 > limit:
        block //= 2
    return {"BLOCK_Q": block, "BLOCK_K": block, "num_warps": 4, "num_stages": stages}
