"""The file of tuned rows: what is written is read, a bad file is refused with a sentence, and tuned rows win."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from embedgrad.kernels import launch, launch_table, tuned_rows
from embedgrad.kernels.launch_row import Row, Tuned
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.needs_no_launch

names = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=12)
sizes = st.dictionaries(names, st.integers(0, 2**40), max_size=3)
times = st.dictionaries(names, st.floats(0, 1e6), max_size=3)
options = st.dictionaries(names, st.integers(1, 4096), max_size=3).map(lambda x: {**x, "num_warps": 4, "num_stages": 2})


@st.composite
def rows(draw: st.DrawFn) -> Row:
    tuned = Tuned(draw(names), draw(names), draw(names), draw(times), draw(times))
    return Row(
        draw(names), draw(names), dict(draw(options)), tuned_rows.reason(tuned),
        bytes=tuple(draw(st.lists(st.integers(1, 8), max_size=2))), at_most=draw(sizes), at_least=draw(sizes),
        tuned=tuned,
    )  # fmt: skip


@settings(deadline=None)
@given(st.lists(rows(), max_size=4), st.lists(rows(), max_size=2))
def test_what_is_written_is_read(old: list[Row], new: list[Row]) -> None:
    kept = tuned_rows.merged(old, new)
    assert tuned_rows.parse(tuned_rows.text_of(kept)) == kept
    by_key = {tuned_rows.key(row): row for row in [*old, *new]}
    assert {tuned_rows.key(row): row for row in kept} == by_key
    assert len(json.loads(tuned_rows.text_of(kept))) == len(by_key)


GOOD: dict[str, Any] = {
    "kernel": "rope", "arch": "sm_90", "bytes": [2], "at_least": {"head_dim": 65}, "at_most": {"head_dim": 128},
    "options": {"BLOCK_H": 8, "num_warps": 2, "num_stages": 1}, "triton": "3.6.0", "device": "H100",
    "date": "2026-11-28", "microseconds": {"shape": 3.5}, "before": {"shape": 7.0},
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        ("[", "not JSON"),
        ("{}", "a dict instead of a list"),
        ("[3]", "row 1 does not have exactly the fields"),
        (json.dumps([GOOD, {**GOOD, "more": 1}]), "row 2 does not have exactly the fields"),
        (json.dumps([{**GOOD, "kernel": 3}]), "row 1 has 3 as kernel"),
        (json.dumps([{**GOOD, "options": {"num_warps": 4}}]), "num_stages"),
        (json.dumps([{**GOOD, "options": {"num_warps": 0, "num_stages": 1}}]), "no 0"),
        (json.dumps([{**GOOD, "options": [1]}]), "as options; it must give numbers by name"),
        (json.dumps([{**GOOD, "at_most": {"head_dim": 1.5}}]), "as at_most"),
        (json.dumps([{**GOOD, "at_most": {"head_dim": True}}]), "as at_most"),
        (json.dumps([{**GOOD, "bytes": "2"}]), "as bytes"),
    ],
)
def test_a_bad_file_is_not_used_and_says_why(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.warns(RuntimeWarning, match=says) as told:
        assert tuned_rows.read(path) == ()
    assert str(path) in str(told[0].message)


def test_a_missing_file_is_not_used_and_says_why(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="No such file"):
        assert tuned_rows.read(tmp_path / "none.json") == ()


def test_a_tuned_row_wins_within_its_limits_and_leaves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tuned_rows.parse(json.dumps([GOOD]))
    assert found[0].reason == "tuned: 3.5 us at shape (before: 7.0); H100, Triton 3.6.0, 2026-11-28"
    monkeypatch.setattr(launch, "ROWS", (*found, *launch_table.WRITTEN))
    launch._looked_up.cache_clear()

    def block(arch: str, dtype: torch.dtype, head_dim: int) -> int:
        return launch.options("rope", arch, dtype=dtype, head_dim=head_dim)["BLOCK_H"]

    try:
        assert block("sm_90", torch.bfloat16, 65) == block("sm_90", torch.float16, 128) == 8
        assert block("sm_90", torch.bfloat16, 64) == block("sm_90", torch.bfloat16, 129) == 16
        assert block("sm_90", torch.float32, 128) == block("sm_80", torch.bfloat16, 128) == 16
    finally:
        launch._looked_up.cache_clear()


def test_the_shipped_file_can_be_used() -> None:
    assert tuned_rows.parse(tuned_rows.FILE.read_text()) == launch_table.ROWS[: -len(launch_table.WRITTEN)]
