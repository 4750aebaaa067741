"""Comparisons and studies that several ranks share, beside one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from embedgrad.cli.commands.study import run as study
from embedgrad.compare.arm import Arm, only
from embedgrad.compare.arms import arms
from embedgrad.compare.outcome import Outcome
from embedgrad.compare.runner import Runner
from embedgrad.distributed.ranks import ALONE, Ranks
from embedgrad.train.plan import plan
from embedgrad.train.settings import load_run_config
from tests.compare.test_compare import configure
from tests.distributed.launched import ends, start
from tests.distributed.threads import model_of, on_ranks

CHOSEN = ["original", "optimised", "few-shot", "paraphrases"]
SEARCHES = ["gcg", "pez"]  # which studies have


def test_a_comparison_is_that_of_one_process(tmp_path: Path) -> None:
    """Every arm that ranks share, the discrete searches among them; each outcome is written once."""
    config = configure(tmp_path, compare__arms=CHOSEN)

    def outcomes(rank: Ranks) -> list[dict[str, Any]]:
        planned = plan(load_run_config(config, []))
        model = model_of(rank.rank)
        runner = Runner(planned, model, tmp_path / f"of-{rank.size}", rank)
        chosen, _ = arms(runner.plan, model)
        chosen += [Arm(name, name, only(runner.plan.start), search=name) for name in SEARCHES]
        runner.check(chosen)
        found: list[Outcome] = []
        for arm in chosen:
            for seed in runner.seeds(arm):
                found.append(runner.run(arm, seed, 0, runner.budget(found, 0)))
        return [vars(one) for one in found]

    alone = outcomes(ALONE)
    assert [one["arm"] for one in alone if one["seed"] == 0] == CHOSEN + SEARCHES
    for told in on_ranks(2, outcomes):
        for one, other in zip(told, alone, strict=True):
            for name in ("arm", "seed", "items", "correct", "steps", "candidates", "forward_tokens", "backward_tokens"):
                assert one[name] == other[name], (one["arm"], name)
            assert one["similarity"] == (other["similarity"] and pytest.approx(other["similarity"], rel=1e-4))


@pytest.mark.slow
def test_the_studies_are_those_of_one_process(tmp_path: Path) -> None:
    """In real processes; figures that a rounding could change are compared as what they are, the others exactly."""
    config = configure(tmp_path, compare__seeds=[3], optimize__validate_every=1)
    assert study("all", config, [], None, tmp_path / "alone") == 0
    sets = ("--set", f"run.folder={tmp_path / 'shared'}", "--output", str(tmp_path / "together"))
    found = ends(start(2, "-m", "embedgrad", "study", "all", str(config), *sets, cwd=tmp_path), 600)
    assert [code for code, _, _ in found] == [0, 0], found
    assert sum("Written to" in out for _, out, _ in found) == 1
    names = sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert sorted(path.name for path in (tmp_path / "together").iterdir()) == names
    for path in sorted((tmp_path / "alone").glob("*.json")):
        _alike(json.loads((tmp_path / "together" / path.name).read_text()), json.loads(path.read_text()), path.name)


def _alike(one: Any, other: Any, where: str) -> None:
    if isinstance(other, dict):
        assert one.keys() == other.keys(), where
        for key in other.keys() - {"seconds"}:
            _alike(one[key], other[key], f"{where}.{key}")
    elif isinstance(other, list):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            _alike(*pair, f"{where}[{number}]")
    else:
        assert one == (pytest.approx(other, rel=1e-3, abs=1e-6) if isinstance(other, float) else other), where
