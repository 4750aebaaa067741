"""A run on several ranks beside the same run on one."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.data.example import Example
from embedgrad.distributed.ranks import ALONE, Ranks
from embedgrad.engine.prompt_trainer import PromptTrainer, StepResult
from embedgrad.engine.tree import prepare
from embedgrad.evaluation.evaluate import evaluate
from embedgrad.evaluation.grading.labels import GeneratedLabel
from embedgrad.generation.sampling import Sampling
from embedgrad.maths.optimizer import SGD
from embedgrad.maths.trust_region import NoRegion
from embedgrad.prompt.rendering import render
from embedgrad.train.agreement import check_devices
from embedgrad.train.monitors import Judge
from embedgrad.train.optimize import OptimizeResult, optimize
from embedgrad.train.ranked_trainer import RankedTrainer
from embedgrad.util.errors import ConfigError
from tests.distributed.threads import model_of, on_ranks
from tests.train.training import TRAIN, VALIDATION, outcome, quick_config, start_prompt, tiny_model

TIMES = ("seconds", "tokens_per_second")


def one_step(rank: Ranks, batch: list[Example]) -> tuple[StepResult, torch.Tensor]:
    """A step of plain gradient descent with rate 1, so that the prompt's move is the gradient."""
    model = model_of(rank.rank)
    prompt = start_prompt(model)
    e = prompt.embeddings.clone()
    state = (e, torch.zeros_like(e), torch.zeros_like(e))
    settings: dict[str, Any] = {"region": NoRegion(), "rule": SGD(), "clip_norm": None}
    settings |= {"policy": "all", "memory_budget": None}
    made = PromptTrainer if rank.size == 1 else functools.partial(RankedTrainer, ranks=rank)
    trainer = made(model, state, prompt.anchor, (), **settings)
    sequences = prepare([render(model, prompt, example) for example in batch])
    weights = [example.weight for example in batch]
    result = trainer.read(trainer.launch(trainer.prepare((sequences, weights)), 1, 1.0))
    return result, e - trainer.state()[0]


IDS = st.integers(10, 60)
EXAMPLES = st.builds(
    Example, st.lists(IDS, min_size=1, max_size=12), st.lists(IDS, min_size=1, max_size=3), st.floats(0.01, 50)
)


@settings(deadline=None, max_examples=25)
@given(st.lists(EXAMPLES, min_size=1, max_size=9), st.integers(2, 4))
def test_gradient_loss_and_figures_are_those_of_one_process(batch: list[Example], size: int) -> None:
    alone, gradient = one_step(ALONE, batch)
    scale = float(gradient.abs().max())
    found = on_ranks(size, lambda rank: one_step(rank, batch))
    for result, move in found:
        assert abs(result.loss - alone.loss) <= 3e-6 * abs(alone.loss)
        assert float((move - gradient).abs().max()) <= 3e-6 * max(scale, 1.0)
        assert torch.equal(result.exact, alone.exact)
        assert torch.equal(move, found[0][1])
        assert result.loss == found[0][0].loss


def run(rank: Ranks, folder: Path | None, **changes: Any) -> OptimizeResult:
    """The test run on one rank."""
    model = model_of(rank.rank)
    judge = changes.pop("judge", None)
    options = {name: changes.pop(name) for name in ("resume", "allow_other_bits") if name in changes}
    return optimize(
        model, start_prompt(model), TRAIN, VALIDATION, quick_config(**changes), run_dir=folder, ranks=rank, judge=judge,
        **options,
    )  # fmt: skip


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_all_ranks_end_with_the_same_bits(size: int, tmp_path: Path) -> None:
    """More ranks than the last batch has examples are among them."""
    alone = run(ALONE, None)
    results = on_ranks(size, lambda rank: run(rank, tmp_path / "run"))
    for result in results:
        assert torch.equal(result.prompt.embeddings, results[0].prompt.embeddings)
        assert torch.equal(result.last_prompt.embeddings, results[0].last_prompt.embeddings)
        assert timeless(result.history) == timeless(results[0].history)
        assert timeless(result.validations) == timeless(results[0].validations)
        assert torch.allclose(result.last_prompt.embeddings, alone.last_prompt.embeddings, atol=1e-5)
    for one, other in zip(results[0].history, alone.history, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=3e-6)
        assert (one["tokens"], one["accuracy"]) == (other["tokens"], other["accuracy"])
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) >= 7


def test_generated_answers_are_shared(tmp_path: Path) -> None:
    """Validations that grade generated answers, whose sampled tokens depend on the query and not on the rank."""
    judge = Judge(GeneratedLabel(("positive", "negative")), Sampling(max_new_tokens=4, temperature=1.0), generated=True)
    alone = run(ALONE, None, judge=judge)
    for result in on_ranks(3, lambda rank: run(rank, tmp_path / "run", judge=judge)):
        for one, other in zip(result.validations, alone.validations, strict=True):
            found, right = ({k: v for k, v in each["answers"].items() if v is not None} for each in (one, other))
            assert found == pytest.approx(right, rel=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_evaluation_is_that_of_one_process(temperature: float) -> None:
    def evaluation(rank: Ranks) -> dict[str, Any]:
        model, sampling = model_of(rank.rank), Sampling(max_new_tokens=5, temperature=temperature)
        labels = ("positive", "negative")
        found = evaluate(model, start_prompt(model), TRAIN, labels, sampling, GeneratedLabel(labels), rank).to_dict()
        del found["statistics"]["token_entropy"]  # rounded by the batch
        return found

    alone = evaluation(ALONE)
    assert on_ranks(3, evaluation) == [alone] * 3


def test_a_run_goes_on_with_as_many_ranks_as_before(tmp_path: Path) -> None:
    """Steps 1 to 4, then the rest: the bits of a run of two ranks that was not interrupted."""
    whole = on_ranks(2, lambda rank: run(rank, tmp_path / "whole"))
    on_ranks(2, lambda rank: run(rank, tmp_path / "run", steps=4, schedule="constant"))
    longer = on_ranks(2, lambda rank: run(rank, tmp_path / "run", schedule="constant", resume=True))
    constant = on_ranks(2, lambda rank: run(rank, tmp_path / "constant", schedule="constant"))
    assert torch.equal(longer[1].last_prompt.embeddings, constant[0].last_prompt.embeddings)
    more = {"steps": 9, "resume": True}
    with pytest.raises(ConfigError, match=r"ranks \(2, now 3\)"):
        on_ranks(3, lambda rank: run(rank, tmp_path / "whole", **more))
    with pytest.raises(ConfigError, match=r"ranks \(2, now 1\)"):
        run(ALONE, tmp_path / "whole", **more)
    declared = {"steps": 9, "resume": True, "allow_other_bits": True}
    assert on_ranks(3, lambda rank: run(rank, tmp_path / "whole", **declared))[2].steps == 9
    assert outcome(tmp_path / "whole")["summary"]["steps"] == 9
    assert whole[0].steps == 7


def test_ranks_that_begin_with_other_things_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"rank 1 differs from rank 0 in: optimize.seed \(0, now 1\)"):
        on_ranks(2, lambda rank: run(rank, None, seed=rank.rank))


def test_a_gpu_that_all_ranks_would_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for device in ("cpu", "cuda", "cuda:0"):
        on_ranks(2, functools.partial(check_devices, device=torch.device(device)))
    with pytest.raises(ConfigError, match=r"one GPU \(cuda:.\) for 2 processes"):
        on_ranks(2, lambda rank: check_devices(rank, torch.device("cuda", rank.rank)))


def test_one_process_needs_no_launcher() -> None:
    assert run(ALONE, None).steps == 7
    assert tiny_model() is tiny_model()
