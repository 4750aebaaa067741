"""Launch parameters of the attention kernels: part of launch_table.ROWS.

BLOCK_Q counts rows, that is (query, head of the group) pairs. What bounds a tile on every target is registers: of the
sum of outputs (fp32, BLOCK_Q × head dimension for o or dq, twice BLOCK_K × head dimension for dk and dv), of the tiles
that stay (q, and do in the backward), and of the logits (BLOCK_Q × BLOCK_K). Every row is the largest tile that
compiles without a spill among those tried; the number in its reason is what the compiler makes of it, in registers of
a lane for bf16 (`python -m bench kernels --static`). No row here was chosen by its time; `python -m bench tune` does
that (tuned_rows.py).
"""

from .launch_row import Row

_HALF, _FLOAT = (2,), (4,)
FORWARD, DQ, DKV = "tree_attention_forward", "tree_attention_backward_dq", "tree_attention_backward_dkv"
DECODE = "decode_attention"
_PROGRAMS = {"gfx942": 304}
"""Programs that a launch's long ranges are shared out over: one for each compute unit of an MI300X; otherwise two for
each multiprocessor of an H100."""


def _row(
    kernel: str,
    arch: str,
    bytes: tuple[int, ...],
    head_dim: int,
    tile: tuple[int, int, int, int],
    reason: str,
    plain: bool = False,
) -> Row:
    """tile: BLOCK_Q, BLOCK_K, num_warps, num_stages; for head dimensions up to head_dim.

    plain: only without a sliding window and without a softcap, which need registers of their own (size "extras").
    """
    block_q, block_k, warps, stages = tile
    options = {"BLOCK_Q": block_q, "BLOCK_K": block_k, "num_warps": warps, "num_stages": stages}
    if kernel in (DKV, DECODE):
        options["PROGRAMS"] = _PROGRAMS.get(arch, 264)
    limits = {"head_dim": head_dim, "extras": 0} if plain else {"head_dim": head_dim}
    return Row(kernel, arch, {**options}, reason, bytes=bytes, at_most=limits)


_AMPERE = (
    _row(FORWARD, "sm_80", _HALF, 64, (128, 64, 8, 3), "172; with 4 warps 20 bytes spill"),
    _row(FORWARD, "sm_80", _HALF, 128, (128, 32, 8, 2), "197; 64 keys spill 30, because q is held in registers"),
    _row(FORWARD, "sm_80", _HALF, 256, (64, 32, 8, 2), "240"),
    _row(DQ, "sm_80", _HALF, 64, (128, 64, 8, 2), "248"),
    _row(DQ, "sm_80", _HALF, 128, (64, 32, 8, 2), "162; 128 rows spill 7: q and do are both held in registers"),
    _row(DQ, "sm_80", _HALF, 256, (32, 32, 8, 1), "174; one stage, since two would not leave room in shared memory"),
    _row(DKV, "sm_80", _HALF, 64, (64, 128, 8, 2), "244"),
    _row(DKV, "sm_80", _HALF, 128, (32, 64, 8, 2), "169"),
    _row(DKV, "sm_80", _HALF, 256, (32, 32, 8, 1), "173"),
)
_HOPPER = (
    _row(FORWARD, "sm_90", _HALF, 64, (128, 64, 8, 3), "148; two warp groups of 64 rows, three stages of K and V"),
    _row(FORWARD, "sm_90", _HALF, 128, (128, 64, 8, 2), "234; 128 keys spill 28"),
    _row(FORWARD, "sm_90", _HALF, 256, (128, 32, 8, 2), "240; 64 keys spill"),
    _row(DQ, "sm_90", _HALF, 64, (128, 64, 8, 2), "179"),
    _row(DQ, "sm_90", _HALF, 128, (128, 64, 8, 2), "243; 64 rows with 4 warps spill 26", plain=True),
    _row(DQ, "sm_90", _HALF, 128, (128, 32, 8, 2), "with a window and a softcap, 64 keys spill 26"),
    _row(DQ, "sm_90", _HALF, 256, (64, 32, 8, 2), "250", plain=True),
    _row(DQ, "sm_90", _HALF, 256, (64, 16, 8, 2), "213 with a window and a softcap (Gemma 2); 32 keys spill 51"),
    _row(DKV, "sm_90", _HALF, 64, (64, 128, 8, 2), "203"),
    _row(DKV, "sm_90", _HALF, 128, (64, 64, 8, 2), "220"),
    _row(DKV, "sm_90", _HALF, 256, (32, 32, 8, 1), "168; 64 keys spill over 240: k, v, dk and dv are 256 registers"),
)
_BLACKWELL = (
    _row(FORWARD, "sm_100", _HALF, 64, (128, 64, 8, 3), "142; with 4 warps 50 spill: a thread reads whole rows of S"),
    _row(FORWARD, "sm_100", _HALF, 128, (128, 64, 8, 2), "216; the sums are in tensor memory", plain=True),
    _row(FORWARD, "sm_100", _HALF, 128, (128, 32, 8, 2), "with a window and a softcap, 64 keys spill 27"),
    _row(FORWARD, "sm_100", _HALF, 256, (128, 32, 8, 2), "248"),
    _row(DQ, "sm_100", _HALF, 128, (128, 64, 8, 2), "158", plain=True),
    _row(DQ, "sm_100", _HALF, 128, (128, 32, 8, 2), "with a window and a softcap, 64 keys spill 19"),
    _row(DQ, "sm_100", _HALF, 256, (64, 32, 8, 2), "128"),
    _row(DKV, "sm_100", _HALF, 64, (64, 128, 8, 2), "126"),
    _row(DKV, "sm_100", _HALF, 128, (64, 64, 8, 2), "106"),
    _row(DKV, "sm_100", _HALF, 256, (32, 64, 8, 1), "217"),
)
_CDNA = (
    _row(
        FORWARD, "gfx942", _HALF, 64, (128, 64, 4, 1), "206; a wavefront has whole rows of 32, so P needs no exchange"
    ),
    _row(FORWARD, "gfx942", _HALF, 128, (128, 32, 4, 1), "220: two wavefronts a SIMD; 64 keys take 296"),
    _row(FORWARD, "gfx942", _HALF, 256, (64, 32, 4, 1), "276"),
    _row(DQ, "gfx942", _HALF, 64, (128, 64, 8, 1), "222; 4 warps take 263, one wavefront a SIMD"),
    _row(DQ, "gfx942", _HALF, 128, (64, 32, 4, 1), "234"),
    _row(DQ, "gfx942", _HALF, 256, (64, 32, 4, 1), "439; 8 warps may have 256 each and spill"),
    _row(DKV, "gfx942", _HALF, 64, (32, 64, 4, 1), "176; 64 rows take 280"),
    _row(DKV, "gfx942", _HALF, 128, (32, 64, 8, 1), "232; 4 warps take 303", plain=True),
    _row(DKV, "gfx942", _HALF, 128, (16, 64, 4, 1), "182 with a window and a softcap; 32 rows take 303, or spill 29"),
    _row(DKV, "gfx942", _HALF, 256, (32, 32, 4, 1), "446"),
    _row(FORWARD, "gfx942", _FLOAT, 64, (64, 32, 4, 1), "fp32 has matrix instructions here"),
    _row(FORWARD, "gfx942", _FLOAT, 128, (32, 32, 4, 1), "232; 64 rows take 288"),
    _row(FORWARD, "gfx942", _FLOAT, 256, (32, 16, 4, 1), "246; 64 rows fill the shared memory"),
    _row(DQ, "gfx942", _FLOAT, 64, (64, 32, 4, 1), "218"),
    _row(DQ, "gfx942", _FLOAT, 128, (32, 16, 4, 1), "207; 32 keys take 344, one wavefront a SIMD"),
    _row(DQ, "gfx942", _FLOAT, 256, (32, 16, 4, 1), "418"),
    _row(DKV, "gfx942", _FLOAT, 64, (32, 64, 4, 1), "246"),
    _row(DKV, "gfx942", _FLOAT, 128, (16, 32, 4, 1), "214; 32 rows take 374, one wavefront a SIMD"),
    _row(DKV, "gfx942", _FLOAT, 256, (16, 16, 4, 1), "340"),
    _row(DECODE, "gfx942", _HALF, 128, (64, 64, 4, 1), "250"),
    _row(DECODE, "gfx942", _HALF, 256, (32, 32, 4, 1), "244"),
    _row(DECODE, "gfx942", _FLOAT, 128, (32, 32, 4, 1), "234"),
    _row(DECODE, "gfx942", _FLOAT, 256, (32, 16, 4, 1), "242"),
)
_IEEE = "exact fp32 products have no matrix instruction on NVIDIA; both operands of a product are held in registers"
_NVIDIA = (
    *(_row(kernel, "sm_*", _FLOAT, 64, (32, 32, 8, 1), _IEEE) for kernel in (FORWARD, DQ, DKV)),
    *(_row(kernel, "sm_*", _FLOAT, 128, (32, 16, 8, 1), _IEEE) for kernel in (FORWARD, DQ)),
    _row(DECODE, "sm_*", _FLOAT, 128, (16, 32, 8, 1), "80; 32 rows spill 6"),
    _row(DKV, "sm_*", _FLOAT, 128, (16, 32, 8, 1), _IEEE),
    _row(FORWARD, "sm_*", _FLOAT, 256, (16, 32, 8, 1), "128; with 16 keys ptxas keeps to 80 and on sm_100 spills 6"),
    *(_row(kernel, "sm_*", _FLOAT, 256, (16, 16, 8, 1), _IEEE) for kernel in (DQ, DKV)),
    _row(DECODE, "sm_90", _FLOAT, 256, (16, 16, 4, 1), "174; 8 warps spill 10"),
    _row(DECODE, "sm_100", _FLOAT, 256, (32, 32, 8, 1), "210; 16 keys spill 8"),
    _row(DECODE, "sm_80", _FLOAT, 256, (16, 16, 8, 1), _IEEE),
    _row(DECODE, "sm_90", _HALF, 128, (64, 64, 4, 2), "238"),
    *(_row(DECODE, arch, _HALF, 128, (64, 32, 4, 2), "227 on sm_80; 64 keys spill 3") for arch in ("sm_80", "sm_100")),
    _row(DECODE, "sm_*", _HALF, 256, (32, 32, 4, 2), "168 on sm_80"),
)

ATTENTION: tuple[Row, ...] = (*_AMPERE, *_HOPPER, *_BLACKWELL, *_CDNA, *_NVIDIA)
