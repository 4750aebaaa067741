"""The C ABI of csrc/: its structs, as ctypes sees them, and the library that `setup.py` builds.

Field by field those of `csrc/common/sampling.h`, `csrc/common/advance.h` and `csrc/decode/*.h`, where they are
explained. A struct holds addresses; whoever fills one keeps the arrays behind them.
"""

from __future__ import annotations

import ctypes
import re
from ctypes import c_double, c_float, c_int32, c_int64, c_uint64, c_void_p
from functools import lru_cache
from pathlib import Path

STORED = (
    "f32", "bf16", "f16",
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS",
    "int8", "int8_16", "int4",
)  # fmt: skip
"""How a part of a matrix is stored; its place is the number that csrc/ knows it by (decode/formats.h)."""
FIRST_QUANTISED = STORED.index("Q4_0")

LOOP_ENDS = ("all done", "slots free", "cache full", "stopped")
STEP = ctypes.CFUNCTYPE(c_int32, c_void_p)


class Part(ctypes.Structure):
    """Rows of a matrix that are stored alike (decode/matrix.h)."""

    _fields_ = [
        ("stored", c_int32),
        ("in_blocks", c_int32),
        *((name, c_int64) for name in ("first", "rows", "row_bytes")),
        ("data", c_void_p),
    ]


class Matrix(ctypes.Structure):
    """Parts on top of each other (decode/matrix.h)."""

    _fields_ = [
        ("parts", ctypes.POINTER(Part)),
        ("num_parts", c_int32),
        ("rows", c_int64),
        ("columns", c_int64),
        ("bias", c_void_p),
    ]


class LayerSpec(ctypes.Structure):
    """One block (decode/decoder.h)."""

    _fields_ = [
        *((name, c_void_p) for name in ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm")),
        *((name, c_void_p) for name in ("q_norm", "k_norm")),
        *((name, Matrix) for name in ("qkv", "out", "gate_up", "down")),
        ("window", c_int64),
        ("rotation", c_int32),
    ]


class DecoderSpec(ctypes.Structure):
    """The frozen model (decode/decoder.h)."""

    _fields_ = [
        *(
            (name, c_int32)
            for name in ("num_layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocabulary")
        ),
        *((name, c_int32) for name in ("gelu", "wide_qk_norm")),
        *((name, c_float) for name in ("eps", "scale", "embedding_scale", "residual_scale")),
        *((name, c_float) for name in ("attention_softcap", "logit_softcap")),
        ("layers", ctypes.POINTER(LayerSpec)),
        ("final_norm", c_void_p),
        ("embedding", Matrix),
        ("head", Matrix),
    ]


class Cache(ctypes.Structure):
    """Keys and values (decode/decoder.h)."""

    _fields_ = [
        ("prefix", c_void_p),
        ("own", c_void_p),
        *((name, c_int64) for name in ("prefix_length", "slots", "capacity")),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("rotary_positions", c_int64),
    ]


class Tokens(ctypes.Structure):
    """New tokens of several sequences (decode/decoder.h)."""

    _fields_ = [("count", c_int64), *((name, c_void_p) for name in ("slots", "positions", "ids", "embeddings"))]


class Wanted(ctypes.Structure):
    """Tokens whose logits are wanted (decode/decoder.h)."""

    _fields_ = [("count", c_int64), *((name, c_void_p) for name in ("tokens", "target", "logits"))]


class SamplingParams(ctypes.Structure):
    """The settings of one sequence (common/sampling.h)."""

    _fields_ = [
        ("temperature", c_float),
        ("top_k", c_int32),
        ("top_p", c_double),
        ("min_p", c_double),
        ("repetition", c_float),
        ("presence", c_float),
        ("frequency", c_float),
        ("seed", c_uint64),
    ]


class SamplingBatch(ctypes.Structure):
    """The sequences that a token is chosen for (common/sampling.h)."""

    _fields_ = [
        ("params", c_void_p),
        ("logits", c_void_p),
        ("logits_stride", c_int64),
        ("sequences", c_int32),
        ("vocabulary", c_int32),
        *((name, c_void_p) for name in ("streams", "steps", "counts", "bias", "bias_rows")),
        *((name, c_void_p) for name in ("nodes", "children", "child_tokens", "reasons")),
        ("tokens", c_void_p),
        ("status", c_void_p),
    ]


class AdvanceBatch(ctypes.Structure):
    """What a chosen token changes (common/advance.h)."""

    _fields_ = [
        *((name, c_int32) for name in ("sequences", "vocabulary", "capacity", "max_position", "stop_size")),
        *((name, c_void_p) for name in ("stop_tokens", "max_new_tokens", "tokens", "status")),
        *((name, c_void_p) for name in ("children", "child_tokens", "child_nodes")),
        *(
            (name, c_void_p)
            for name in ("ids", "lengths", "inputs", "positions", "steps", "counts", "nodes", "reasons")
        ),
        ("running", c_void_p),
    ]


class Loop(ctypes.Structure):
    """The generation loop's state (decode/loop.h)."""

    _fields_ = [
        ("cache", Cache),
        ("sampling", SamplingBatch),
        ("advance", AdvanceBatch),
        ("fresh", c_void_p),
        ("entropy", c_void_p),
        ("log_probability", c_void_p),
        ("refill", c_int32),
        ("on_step", STEP),
        ("user", c_void_p),
    ]


def library_path() -> Path:
    """Where the compiled library lies. Raises ImportError where csrc/ was not built, or for another torch.

    Its name says which torch it was compiled against: C++ has no stable interface there, and a library that is loaded
    into another minor version may crash instead of failing.
    """
    import torch

    folder = Path(__file__).parents[1]
    version = _minor(torch.__version__)
    library = folder / f"_native.torch{version}.so"
    if library.is_file():
        return library
    others = sorted(path.name.removeprefix("_native.torch").removesuffix(".so") for path in folder.glob("_native.*.so"))
    if others:
        raise ImportError(f"csrc/ was built for torch {', '.join(others)}, and this is torch {torch.__version__}")
    raise ImportError("csrc/ was not built: there is no embedgrad/_native library")


def _minor(version: str) -> str:
    """The first two numbers of a version, as setup.py writes them into the library's name."""
    return ".".join(re.findall(r"\d+", version)[:2])


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The compiled library's C functions. Raises ImportError as `library_path` does, or where it cannot be loaded."""
    path = library_path()  # imports torch, to whose shared objects the library is linked
    try:
        core = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(f"csrc/ cannot be loaded with this torch: {error}") from error
    return declared(core)


def declared(core: ctypes.CDLL) -> ctypes.CDLL:
    """`core` with the types of the functions that it has."""
    types: dict[str, tuple[type | None, list[type]]] = {
        "embedgrad_decoder_create": (c_void_p, [c_void_p]),
        "embedgrad_decoder_free": (None, [c_void_p]),
        "embedgrad_generate": (c_int32, [c_void_p, c_void_p, c_int32]),
        "embedgrad_decoder_advance": (None, [c_void_p, c_void_p, c_void_p, c_void_p, c_int32]),
        "embedgrad_linear": (None, [c_void_p, c_void_p, c_int64, c_void_p, c_int32]),
        "embedgrad_widen": (None, [c_void_p, c_int64, c_int64, c_void_p, c_int32]),
        "embedgrad_gather": (None, [c_void_p, c_void_p, c_int64, c_void_p, c_int32]),
        "embedgrad_tile_bytes": (c_int64, [c_int32, c_int64]),
        "embedgrad_repack": (None, [c_int32, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int32]),
        "embedgrad_sample_cpu": (c_int32, [c_void_p]),
    }
    for name, (result, arguments) in types.items():
        function = getattr(core, name, None)
        if function is not None:
            function.restype, function.argtypes = result, arguments
    return core
