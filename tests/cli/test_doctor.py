"""`doctor`: compilers, what is known against them, and the launch rows of a device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from embedgrad.kernels import launch
from embedgrad.kernels.launch_row import Row, Tuned
from embedgrad.kernels.launch_table import WRITTEN
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.backends.launch_check import table
from embedgrad.cli import compilers, doctor
from embedgrad.util.errors import BackendError

OLD = {"path": "/none", "version": "12.9.86"}
NEW = {"path": "/none", "version": "13.4.59"}


def told(arch: str, triton: str, assembler: dict[str, Any] = OLD) -> set[str]:
    found = {"triton": triton, "ptxas": assembler}
    version = compilers.parsed(assembler["version"])
    return {one.source for one in compilers.KNOWN if one.concerns(arch, compilers.parsed(found["triton"]), version)}


@pytest.mark.parametrize(
    ("arch", "triton", "assembler", "numbers"),
    [
        ("sm_90", "3.6.0", OLD, ("#11781", "chunk_o")),
        ("sm_90", "3.6.0", NEW, ("chunk_o",)),
        ("sm_90", "3.5.1", NEW, ("chunk_o", "#8554")),
        ("sm_90", "3.7.1", NEW, ("#11366",)),
        ("sm_90", "3.9.0", OLD, ("#11781",)),
        ("sm_90", "3.9.0", NEW, ()),
        ("sm_100", "3.6.0", NEW, ("#10821", "#9871")),
        ("sm_103", "3.8.0+git1", NEW, ("#10821",)),
        ("sm_120", "3.8.0", NEW, ()),
        ("sm_80", "3.5.0", OLD, ("#8554",)),
        ("sm_80", "3.6.0", OLD, ()),
        ("gfx942", "3.5.0", OLD, ()),
    ],
)
def test_known_wrong_code_by_release_and_architecture(
    arch: str, triton: str, assembler: dict[str, Any], numbers: tuple[str, ...]
) -> None:
    found = told(arch, triton, assembler)
    assert len(found) == len(numbers)
    assert all(any(number in source for source in found) for number in numbers)


def test_a_warning_is_a_sentence_with_source_release_and_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "assembler", lambda arch, found: "ptxas")
    (one,) = compilers.warnings("sm_90", {"triton": "3.9.0", "ptxas": OLD})
    for part in ("Triton 3.9.0 with ptxas 12.9.86 on sm_90", "#11781", "TRITON_PTXAS_PATH", "doctor --device cuda"):
        assert part in one
    assert "unknown version" in compilers.warnings("sm_90", {"triton": "3.9.0", "ptxas": {**OLD, "version": None}})[0]
    assert compilers.warnings("sm_90", {}) == []


@settings(deadline=None)
@given(st.lists(st.integers(0, 99), min_size=1, max_size=4), st.sampled_from(["", "+git12", "a0", "-dev", ".post1"]))
def test_versions_are_read_as_numbers(parts: list[int], end: str) -> None:
    assert compilers.parsed(".".join(map(str, parts)) + end) == tuple(parts)


def test_no_version_is_older_than_all() -> None:
    assert compilers.parsed("unknown") == ()


def test_the_assemblers_of_the_wheel_are_asked() -> None:
    found = compilers.versions()
    assert found["triton"] == __import__("triton").__version__
    assert compilers.parsed(found["ptxas"]["version"]) > (11,)
    assert compilers.assembler("sm_80", found) == "ptxas"
    assert compilers.assembler("gfx942", found) is None


def test_an_assembler_that_does_not_run_has_no_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "ptxas"
    broken.write_text("no program")
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(broken))
    assert compilers.versions()["ptxas"] == {"path": str(broken), "version": None}


def test_rows_of_another_release_are_remarked_once_a_release() -> None:
    def row(kernel: str, release: str, arch: str = "sm_90") -> Row:
        return Row(kernel, arch, {}, "", tuned=Tuned(release, "a GPU", "2026-11-28", {}, {}))

    rows = (
        row("rope", "3.6.0"), row("swiglu", "3.6.0"), row("rope", "3.7.1"), row("embed", "3.9.0"),
        row("embed", "3.6.0", "sm_80"), Row("written", "sm_90", {}, "by hand"),
    )  # fmt: skip
    first, second = compilers.remarks("sm_90", {"triton": "3.9.0"}, rows)
    assert first.startswith("2 launch rows of sm_90 were tuned with Triton 3.6.0, and this is 3.9.0")
    assert "rope, swiglu" in first
    assert "Triton 3.7.1" in second
    assert compilers.remarks("sm_90", {"triton": "3.9.0+local"}, (row("embed", "3.9.0"),)) == []


def test_a_device_that_is_not_there_is_refused() -> None:
    for name in ("cuda:99", "nonsense", "cpu:1"):
        with pytest.raises(BackendError, match=rf"no device '{name}': .* leave --device out"):
            doctor.run(as_json=False, device=name)


def test_interpreted_kernels_are_no_check_of_a_gpu() -> None:
    with pytest.raises(BackendError, match="TRITON_INTERPRET is set"):
        doctor.launch_rows(torch.device("cuda:0"))


def test_a_wrong_launch_row_is_named_and_the_exit_code_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command with a device "cuda:0" that is the interpreter, and one kernel whose launches do nothing."""
    device = torch.device("cpu")
    real = doctor.launch_rows
    monkeypatch.setattr(launch, "ROWS", WRITTEN)
    launch._looked_up.cache_clear()

    def here(_: Any) -> list[dict[str, Any]]:
        with launch.pretending("sm_90"):
            made = table.subjects("sm_90", WRITTEN, half=torch.float16, scale=table.TINY)
            found = [one for one in made if "swiglu" in one.kernel]
            monkeypatch.setattr(table, "subjects", lambda *_, **how: found)
            return real(device)

    monkeypatch.setattr(doctor, "_present", lambda name: "cuda:0")
    monkeypatch.setattr(doctor, "_checks", lambda *_: [])
    monkeypatch.setattr(doctor, "_compilers", lambda gpus: {"found": {}, "devices": []})
    monkeypatch.setattr(doctor, "_backend", lambda *_: {"name": "x", "device": "y", "available": True})
    monkeypatch.setattr(doctor, "launch_rows", here)
    assert doctor.run(as_json=False, device="cuda") == 0
    assert "launch row 2 of 2 are right" in capsys.readouterr().out
    with launch.recorded(lambda one: "backward" not in one[0].fn.__name__):
        assert doctor.run(as_json=False, device="cuda") == 1
        out = capsys.readouterr().out
        assert doctor.run(as_json=True, device="cuda") == 1
    (line,) = (line for line in out.splitlines() if "DO NOT TRUST" in line)
    assert "swiglu_backward, the row for sm_*" in line
    assert "BLOCK 1024" in line
    launch._looked_up.cache_clear()
    report = json.loads(capsys.readouterr().out)
    assert [row["trusted"] for row in report["launch_rows"]] == [True, False]
