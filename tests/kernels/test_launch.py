"""Launch parameters: lookup, fallback, overrides."""

import itertools
from fnmatch import fnmatchcase

import pytest
import torch
from embedgrad.kernels import launch
from embedgrad.kernels.launch_row import Fit, Row
from embedgrad.kernels.launch_table import ROWS, SHARED_LIMIT, WRITTEN, heuristic

pytestmark = pytest.mark.needs_no_launch

SIZES = {"head_dim": 128, "width": 1536, "group": 32, "rows": 4096}
KERNELS = (
    "tree_attention_forward", "tree_attention_backward_dq", "tree_attention_backward_dkv", "decode_attention",
    "rms_norm", "rms_norm_backward", "rope", "rope_backward", "swiglu", "swiglu_backward", "embed", "embed_backward",
    "prompt_step", "softmax_loss", "quantized_linear", "quantized_linear_backward", "quantized_linear_reduce",
    "dequantize",
)  # fmt: skip
ARCHES = (*SHARED_LIMIT, "sm_86", "sm_120", "gfx90a", "gfx1100", "interpreter")


@pytest.mark.parametrize(("kernel", "arch"), list(itertools.product(KERNELS, ARCHES)))
def test_every_kernel_has_powers_of_two_everywhere(kernel: str, arch: str) -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        found = launch.options(kernel, arch, dtype=dtype, **SIZES)
        assert found["num_stages"] >= 1
        for key, value in found.items():
            if key.startswith(("BLOCK", "num_warps")):
                assert value > 0, key
                assert value & (value - 1) == 0, key


def test_rows_and_heuristic_agree_on_the_keys() -> None:
    for row in ROWS:
        for kernel in KERNELS:
            if fnmatchcase(kernel, row.kernel):
                arch = row.arch.replace("*", "90")
                assert row.options.keys() == heuristic(kernel, arch, 2, SIZES).keys(), row


def test_every_row_has_a_reason_and_can_be_reached() -> None:
    for i, row in enumerate(WRITTEN):
        assert row.reason
        kernel = next(k for k in KERNELS if fnmatchcase(k, row.kernel))
        dtype = torch.float32 if row.bytes == (4,) else torch.bfloat16
        sizes = {**SIZES, **row.at_most}
        first = next(r for r in WRITTEN if r.fits(kernel, row.arch.replace("*", "90"), dtype, sizes))
        assert first is row, f"row {i} is hidden by {first}"


def test_the_first_row_that_fits_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Row("k", "sm_90", {"BLOCK": 1}, "small", bytes=(2,), at_most={"width": 64})
    large = Row("k", "sm_*", {"BLOCK": Fit("width", 16, 256)}, "the rest")
    monkeypatch.setattr(launch, "ROWS", (small, large))
    monkeypatch.setattr(launch, "heuristic", lambda *_: {"BLOCK": 7})
    launch._looked_up.cache_clear()

    def block(arch: str, dtype: torch.dtype, width: int) -> int:
        return launch.options("k", arch, dtype=dtype, width=width)["BLOCK"]

    try:
        assert block("sm_90", torch.float16, 64) == 1
        assert block("sm_90", torch.float16, 65) == 128
        assert block("sm_90", torch.float32, 3) == 16
        assert block("sm_80", torch.float16, 5000) == 256
        assert block("gfx942", torch.float16, 64) == 7
        with launch.observed() as used:
            block("sm_80", torch.float16, 64)
            block("gfx942", torch.float16, 64)
        assert used == [("k", large), ("k", None)]
    finally:
        launch._looked_up.cache_clear()


def test_unknown_kernels_and_missing_sizes_are_refused() -> None:
    with pytest.raises(KeyError, match="no_such_kernel"):
        launch.options("no_such_kernel", "sm_90", dtype=torch.float16)
    with pytest.raises(KeyError, match="width"):
        launch.options("rms_norm", "sm_90", dtype=torch.float16, head_dim=4)


def test_overrides_nest_and_end() -> None:
    def block() -> int:
        return launch.options("swiglu", "sm_90", dtype=torch.float16, width=8)["BLOCK"]

    before = block()
    with launch.overridden("swiglu", BLOCK=16):
        with launch.overridden("swiglu", BLOCK=32):
            assert block() == 32
        assert block() == 16
    assert block() == before


def test_pretending_decides_the_architecture() -> None:
    cpu = torch.device("cpu")
    assert launch.architecture(cpu) == "interpreter"
    with launch.pretending("sm_100"):
        assert launch.architecture(cpu) == "sm_100"
    assert launch.architecture(cpu) == "interpreter"
