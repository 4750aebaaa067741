"""The kernels' gfx942 machine code, executed in an emulator against the float64 reference; the judging and counting.

The emulator runs where TINYGRAD_REPO names a checkout of tinygrad, in a process of its own, because Triton decides when
it is imported whether it interprets or compiles.
"""

from collections import Counter
from pathlib import Path

import pytest
import torch

from bench.harness.rows import Row
from bench.machine_code import emulator
from bench.machine_code.executed import TYPES, cast, three_way
from bench.machine_code.specimens import trials
from bench.machine_code.specimens.base import Trial
from embedgrad.backends.reference import OPS as reference
from tests.bench.machine_code.test_static import run_bench

NAMES = {dtype: name for name, dtype in TYPES.items()}
ALL = [(t.name, NAMES[dtype]) for t in trials() for dtype in t.types]
QUICK = {t.op: (t.name, NAMES[t.types[0]]) for t in reversed(trials())}
needs_emulator = pytest.mark.skipif(emulator.unavailable() is not None, reason=str(emulator.unavailable()))


def executed(folder: Path, *options: str) -> dict[tuple[str, str], Row]:
    return {(one.contender, str(one.case["dtype"])): one for one in run_bench(folder, "--executed", *options)}


@pytest.fixture(scope="module")
def quick_rows(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Row]:
    return executed(tmp_path_factory.mktemp("executed"), "--quick")


@pytest.fixture(scope="module")
def all_rows(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Row]:
    return executed(tmp_path_factory.mktemp("executed"))


def check(row: Row) -> None:
    assert row.more["right"], f"{row.more['output']}: error {row.median:.3e}, allowed {row.more['allowed']:.3e}"
    assert row.more["global"] > 0  # it did run
    if row.more["useful_operations"]:
        assert row.more["matrix"] > 0


@needs_emulator
@pytest.mark.parametrize("op", QUICK)
def test_one_case_of_each(op: str, quick_rows: dict[tuple[str, str], Row]) -> None:
    check(quick_rows[QUICK[op]])


@needs_emulator
@pytest.mark.slow
@pytest.mark.parametrize(("trial", "dtype"), ALL)
def test_every_type_and_case(trial: str, dtype: str, all_rows: dict[tuple[str, str], Row]) -> None:
    check(all_rows[trial, dtype])


def test_three_way_allows_twice_plain_torch_and_the_tolerance() -> None:
    truth = torch.ones(4, dtype=torch.float64)
    off = truth + torch.tensor([1e-3, 0, 0, 0])
    error, allowed = three_way(off, off, truth, 0.0)
    assert error == pytest.approx(5e-4)
    assert allowed == pytest.approx(1e-3)
    error, allowed = three_way(truth + 0.1, off, truth, 1e-3)
    assert error > allowed == pytest.approx(2e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_three_way_wants_infinities_met(value: float) -> None:
    truth = torch.tensor([1.0, -torch.inf], dtype=torch.float64)
    assert three_way(truth, truth, truth, 0.0)[0] == 0
    error, allowed = three_way(torch.tensor([1.0, value]), truth, truth, 1e-3)
    assert error > allowed


def test_counting_by_kind_and_matrix_operations() -> None:
    names = {
        "v_mfma_f32_16x16x16_bf16": 3,
        "v_add_f32_e32": 5,
        "s_add_u32": 7,
        "global_load_dwordx4": 2,
        "ds_read_b64": 1,
    }
    executed = emulator.Execution("k", (1, 1, 1), 4, Counter(names))
    assert executed.by_kind() == {"matrix": 3, "vector": 5, "scalar": 7, "global": 2, "shared": 1, "other": 0}
    assert executed.matrix_operations() == 3 * 2 * 16**3


# Short and long words put together by hand from the fields in the ISA manual.
@pytest.mark.parametrize(
    ("kind", "short", "long"),
    [
        ("VOP1", 0x7F00151C, (0xD14A0080, 0x0000011C)),  # v_cvt_f16_f32 v128, v28
        ("VOP1", 0x7E0A1780, (0xD14B0005, 0x00000180)),  # v_cvt_f32_f16 v5, v128
        ("VOP2", 0x3F010503, (0xD11F0080, 0x00030503)),  # v_add_f16 v128, v3, v130
        ("VOP1", 0x7E0A151C, None),  # v_cvt_f16_f32 v5, v28: no register from 128 on
        ("VOP1_SDWA", 0x7F0014F9, None),
    ],
)
def test_long_encodings(kind: str, short: int, long: tuple[int, int] | None) -> None:
    raw = short.to_bytes(4, "little") + bytes(12)
    found = emulator._long_encoding(kind, raw)
    if long is None:
        assert found is None
    else:
        assert found == b"".join(word.to_bytes(4, "little") for word in long)


def test_what_has_no_long_encoding_is_refused() -> None:
    with pytest.raises(RuntimeError, match="128"):
        emulator._long_encoding("VOP1_DPP16", (0x7F0014FA).to_bytes(4, "little") + bytes(12))


def test_the_reason_for_skipping(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TINYGRAD_REPO", raising=False)
    assert "is not set" in str(emulator.unavailable())
    monkeypatch.setenv("TINYGRAD_REPO", str(tmp_path))
    assert "no tinygrad checkout" in str(emulator.unavailable())


@pytest.mark.parametrize("trial", trials(), ids=lambda t: t.name)
def test_trials_are_well_posed(trial: Trial) -> None:
    """The truth is finite (or −∞ on purpose), depends on the seed, and plain torch's outputs have its shape."""
    inputs = trial.inputs(0)
    truth = trial.run(reference, cast(inputs, torch.float64))
    plain = trial.run(reference, cast(inputs, torch.float32))
    assert {k: v.shape for k, v in truth.items()} == {k: v.shape for k, v in plain.items()}
    assert not any(v.isnan().any() for v in truth.values())
    other = trial.run(reference, cast(trial.inputs(1), torch.float64))
    assert any(not torch.equal(truth[k], other[k]) for k in truth) or all(v.numel() < 8 for v in truth.values())
