"""One model used by several threads, and by the callbacks of its own calls: the results of one call after the other."""

from __future__ import annotations

import copy
import functools
import pickle
import tempfile
import threading
from collections.abc import Callable, Sequence
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import pytest

from embedgrad.engine.gradient import loss_and_grad
from embedgrad.engine.model import Model, load_model
from embedgrad.engine.scorer import score
from embedgrad.evaluation.evaluate import evaluate
from embedgrad.generation.generate import generate
from embedgrad.generation.sampling import Sampling
from embedgrad.model.streaming import StreamedLayers
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.train.optimize import optimize
from embedgrad.train.progress import Quiet
from embedgrad.util.errors import ModelError
from embedgrad.util.memo import PerObject
from tests.model.tiny import random_model, write_folder, write_gguf
from tests.train.training import TRAIN, VALIDATION, model_folder, quick_config

ROUNDS = 4
WAIT = 120.0  # seconds after which a thread counts as hung
QUERIES = ["a great film", "what a bore, really"]
Call = Callable[[Model, SoftPrompt], Any]


@functools.cache
def model(form: str) -> Model:
    """A tiny model with float matrices, with the blocks of a GGUF file, with streamed layers, or of plain torch."""
    if form == "float":
        return load_model(model_folder(), device="cpu")
    if form == "reference":
        return load_model(model_folder(), device="cpu", backend="reference")
    keeper = tempfile.TemporaryDirectory()
    if form == "streamed":
        write_folder(Path(keeper.name), num_hidden_layers=5)
        loaded = load_model(keeper.name, device="cpu", weights="stored", max_device_memory=300_000)
        assert isinstance(loaded.weights.layers, StreamedLayers)
        loaded.keeper = keeper  # type: ignore[attr-defined]
        return loaded
    path = Path(keeper.name) / "tiny.gguf"
    write_gguf(path, random_model(), kind="Q8_0")
    loaded = load_model(path, device="cpu", weights="stored")
    loaded.keeper = keeper  # type: ignore[attr-defined]
    return loaded


def _optimized(model: Model, prompt: SoftPrompt) -> Any:
    result = optimize(model, prompt, TRAIN, VALIDATION, quick_config(steps=3, validate_every=1))
    return result.prompt.embeddings.tolist(), [record["loss"] for record in result.history]


def _gradient(model: Model, prompt: SoftPrompt) -> Any:
    loss, grad = loss_and_grad(model, prompt, TRAIN)
    return loss, grad.tolist()


CALLS: dict[str, Call] = {
    "generate": lambda model, prompt: generate(model, prompt, QUERIES, Sampling(max_new_tokens=24)),
    "loss_and_grad": _gradient,
    "optimize": _optimized,
    "score": lambda model, prompt: score(model, prompt, TRAIN).example_loss.tolist(),
    "evaluate": lambda model, prompt: evaluate(model, prompt, VALIDATION, ["positive", "negative"]).to_dict(),
}
FORMS = ("float", "stored", "streamed", "reference")
PAIRS = [(form, pair) for form in ("float", "stored") for pair in combinations_with_replacement(CALLS, 2)]
SMALL = tuple(combinations_with_replacement(("generate", "loss_and_grad"), 2))
PAIRS += [(form, pair) for form in FORMS[2:] for pair in SMALL]


def _prompts(model: Model) -> list[SoftPrompt]:
    return [SoftPrompt.from_text(model, text) for text in ("Rate it.", "Say what the review thinks of the film.")]


def _together(jobs: Sequence[Callable[[], Any]]) -> None:
    """Runs `jobs` in threads that begin at the same time; raises what one of them raises."""
    begin, raised = threading.Barrier(len(jobs)), list[BaseException]()

    def work(job: Callable[[], Any]) -> None:
        begin.wait()
        try:
            job()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=work, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
        assert not thread.is_alive(), "a thread hangs"
    if raised:
        raise raised[0]


@pytest.mark.parametrize(("form", "pair"), PAIRS, ids=str)
def test_two_threads_get_what_one_after_the_other_gets(form: str, pair: tuple[str, str]) -> None:
    used, calls = model(form), [CALLS[name] for name in pair]
    prompts = _prompts(used)
    right = [call(used, prompt) for call, prompt in zip(calls, prompts, strict=True)]
    found: list[list[Any]] = [[], []]

    def job(n: int) -> Callable[[], None]:
        return lambda: found[n].extend(calls[n](used, prompts[n]) for _ in range(ROUNDS))

    _together([job(0), job(1)])
    assert found == [[right[0]] * ROUNDS, [right[1]] * ROUNDS]


@pytest.mark.parametrize("form", FORMS)
def test_callbacks_may_use_the_model_that_calls_them(form: str) -> None:
    """The inner generations are longer than the outer one, so that tables and buffers grow under it."""
    used = model(form)
    outer, inner = _prompts(used)
    short, long = Sampling(max_new_tokens=3), Sampling(max_new_tokens=30)
    right = generate(used, outer, QUERIES, short, batch_size=1)
    want = [_gradient(used, inner), generate(used, inner, QUERIES, long)]
    found = []

    def ask(*_: object) -> None:
        used.release_memory()
        found.append([_gradient(used, inner), generate(used, inner, QUERIES, long)])

    assert generate(used, outer, QUERIES, short, batch_size=1, on_token=ask) == right
    assert generate(used, outer, QUERIES, short, batch_size=1, on_answer=ask) == right
    assert len(found) > 4
    assert found == [want] * len(found)


@pytest.mark.parametrize("form", FORMS)
def test_a_listener_may_use_the_model_of_the_run(form: str) -> None:
    used, short = model(form), Sampling(max_new_tokens=3)
    outer, inner = _prompts(used)
    right, want, found = _optimized(used, outer), generate(used, inner, QUERIES, short), []

    class Asks(Quiet):
        def step(self, record: Any) -> None:
            found.append(generate(used, inner, QUERIES, short))

        validation = step

    result = optimize(used, outer, TRAIN, VALIDATION, quick_config(steps=3, validate_every=1), progress=Asks())
    assert result.prompt.embeddings.tolist() == right[0]
    assert found == [want] * len(found)
    assert len(found) == 7


def test_a_thread_gets_its_turn_between_the_steps_of_a_run() -> None:
    used = model("float")
    outer, inner = _prompts(used)
    turns: list[int] = []

    class Counts(Quiet):
        def step(self, record: Any) -> None:
            asked = threading.Thread(target=lambda: turns.append(len(generate(used, inner, QUERIES))), daemon=True)
            asked.start()
            asked.join(WAIT)

    optimize(used, outer, TRAIN, VALIDATION, quick_config(steps=3), progress=Counts())
    assert turns == [2, 2, 2]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_model_is_not_copied(copied: Callable[[object], Any]) -> None:
    with pytest.raises(ModelError, match=r"^the model 'tiny' cannot be pickled or copied; .*load_model.*\.$"):
        copied(model("float"))
    with pytest.raises(ModelError, match="cannot be pickled or copied"):
        copied([model("float")]) if copied is not copy.copy else copied(model("float"))


def test_memo_under_threads() -> None:
    """A cache of two places, asked for five keys by four threads at once."""
    memo, owner = PerObject[int](limit=2), CALLS.__class__  # any object that can be weakly referenced

    def ask() -> None:
        for n in range(4000):
            assert memo.get(owner, n % 5, lambda n=n: n % 5) == n % 5

    _together([ask] * 4)
