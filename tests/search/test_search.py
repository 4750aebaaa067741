"""Discrete search: proposals against brute force, exact scoring in one pass, projections, equal budgets, resuming."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.data.example import Example
from embedgrad.distributed.ranks import ALONE, Ranks
from embedgrad.engine.gradient import loss_and_grad
from embedgrad.engine.model import Model, load_model
from embedgrad.engine.scorer import score
from embedgrad.engine.table_product import best_tokens
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.search.objective import Objective, text_nll
from embedgrad.search.pez import ProjectedEmbeddings
from embedgrad.search.plan import NAMES, make_search
from embedgrad.search.search import SearchState
from embedgrad.search.vocabulary import text_of, text_tokens
from embedgrad.util.errors import ConfigError
from tests.distributed.threads import model_of, on_ranks
from tests.train.training import TRAIN, model_folder, start_prompt, tiny_model

BATCH = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def exact() -> Model:
    """The tiny model in float64."""
    return load_model(model_folder(), dtype="float64", backend="reference", device="cpu")


def drawn_ids(model: Model, count: int, seed: int) -> list[int]:
    """Random tokens that may stand in a text."""
    usable = text_tokens(model).nonzero().squeeze(1).tolist()
    return random.Random(seed).choices(usable, k=count)


@given(st.integers(1, 6), st.integers(1, 30), st.integers(0, 2**16), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=20)
def test_the_best_products_are_those_of_the_whole_table(
    rows: int, count: int, seed: int, cosine: bool, limited: bool
) -> None:
    model = tiny_model()
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, model.config.hidden_size, generator=draw)
    table = torch.cat([block for _, block in model.embedding_table_chunks()])
    allowed = torch.rand(len(table), generator=draw) < 0.3 if limited else torch.ones(len(table), dtype=torch.bool)
    whole = x @ table.T
    if cosine:
        whole = whole / table.norm(dim=1) / x.norm(dim=1, keepdim=True)
    whole[:, ~allowed] = -torch.inf
    found = best_tokens(model, x, count, allowed=allowed, cosine=cosine)
    wanted = whole.topk(min(count, int(allowed.sum())), dim=1)
    torch.testing.assert_close(found.values, wanted.values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.gather(1, found.ids), found.values, rtol=1e-4, atol=1e-5)


def test_small_blocks_give_the_same_products(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    x = torch.randn(3, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    h = torch.randn(3, model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    whole = best_tokens(model, x, 9, head_rows=h)
    monkeypatch.setattr("embedgrad.engine.table_product.ROWS", 7)
    pieces = best_tokens(model, x, 9, head_rows=h)
    torch.testing.assert_close(pieces.values, whole.values)
    assert pieces.ids.tolist() == whole.ids.tolist()


@given(st.integers(1, 5), st.integers(0, 2**16), st.sampled_from([0.0, 0.5]))
@settings(deadline=None, max_examples=10)
def test_all_candidates_of_a_pass_have_the_loss_that_each_has_alone(candidates: int, seed: int, fluency: float) -> None:
    model = tiny_model()
    prompt = start_prompt(model)
    objective = Objective(model, prompt, TRAIN, fluency)
    several = [drawn_ids(model, len(prompt.token_ids), seed + i) for i in range(candidates)]
    found = objective.losses(several, BATCH)
    weights = torch.tensor([TRAIN[i].weight for i in BATCH], dtype=torch.float64)
    for ids, loss, nll in zip(several, found.task.tolist(), found.nll.tolist(), strict=True):
        alone = SoftPrompt.from_ids(model, ids, prompt.template)
        wanted = score(model, alone, [TRAIN[i] for i in BATCH]).example_loss.double()
        assert loss == pytest.approx(float(wanted @ (weights / weights.sum())), rel=1e-5)
        if fluency and model.tokenizer.encode(text := model.tokenizer.decode(ids, skip_special=False)) == ids:
            assert nll == pytest.approx(text_nll(model, text), rel=1e-5)


@pytest.mark.parametrize("fluency", [0.0, 0.3])
def test_the_gradient_is_that_of_the_loss(exact: Model, fluency: float) -> None:
    """Against central differences at the embeddings, in float64; the fluency term's targets stay what they are."""
    prompt = start_prompt(exact)
    objective = Objective(exact, prompt, TRAIN, fluency)
    ids = list(prompt.token_ids)
    loss, gradient = objective.gradient(ids, BATCH)
    losses = objective.losses([ids], BATCH)
    assert loss == pytest.approx(float(losses.task[0] + fluency * losses.nll[0]), rel=1e-9)
    rows, draw = exact.embedding_rows(ids).double(), torch.Generator().manual_seed(3)
    direction = torch.randn(rows.shape, generator=draw, dtype=torch.float64)
    step, sides = 1e-4, []
    for sign in (1, -1):
        objective._embeddings = lambda _, moved=rows + sign * step * direction: moved  # type: ignore[method-assign]
        sides.append(objective.gradient(ids, BATCH)[0])
    assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(float((gradient * direction).sum()), rel=1e-5)


@pytest.mark.parametrize("fluency", [0.0, 0.5])
def test_proposals_are_better_than_chance_by_brute_force(exact: Model, fluency: float) -> None:
    """All swaps of a place are scored exactly: those that the gradient proposes are, on average, better."""
    prompt = start_prompt(exact)
    ids = list(prompt.token_ids)
    name = "gcg-fluent" if fluency else "gcg"
    search = make_search(name, exact, prompt, TRAIN, batch_size=4, seed=0, fluency=fluency)
    objective = search.objective
    _, gradient = objective.gradient(ids, BATCH)
    proposed = search.proposed(ids, gradient)  # type: ignore[attr-defined]
    usable = text_tokens(exact).nonzero().squeeze(1).tolist()
    gains = []
    for place in range(len(ids)):
        swaps = [[*ids[:place], v, *ids[place + 1 :]] for v in usable]
        found = objective.losses(swaps, BATCH)
        loss = dict(zip(usable, (found.task + fluency * found.nll).tolist(), strict=True))
        chance = sum(loss.values()) / len(loss)
        best = proposed[place][:16]
        gains.append(chance - sum(loss[v] for v in best) / len(best))
        assert set(proposed[place]) <= set(usable) - {ids[place]}
    assert sum(gains) / len(gains) > 0
    assert sum(gain > 0 for gain in gains) > len(gains) / 2


@pytest.mark.parametrize("name", NAMES)
def test_a_search_lowers_the_loss_and_spends_its_budget_and_no_more(name: str) -> None:
    model = tiny_model()
    prompt = start_prompt(model)
    search = make_search(name, model, prompt, TRAIN, batch_size=len(TRAIN), seed=1)
    every = list(range(len(TRAIN)))
    budget = 200 * search.objective.tokens(every) + 17
    state = search.begin()
    while search.advance(state, budget):
        pass
    assert budget - search.least(every) < state.spent <= budget
    first = search.objective.losses([prompt.token_ids], every)
    weight = search.objective.fluency
    assert state.visited[0]["loss"] < float(first.task[0] + weight * first.nll[0])
    best = search.objective.losses([state.visited[0]["ids"]], every)
    assert state.visited[0]["loss"] == pytest.approx(float(best.task[0] + weight * best.nll[0]), rel=1e-4)
    assert 1 <= len(search.texts(state, 3)) <= 3


@pytest.mark.parametrize("name", NAMES)
def test_a_search_that_was_stopped_goes_on_to_the_same_result(name: str) -> None:
    model = tiny_model()
    whole, halved = (make_search(name, model, start_prompt(model), TRAIN, batch_size=4, seed=2) for _ in range(2))
    budget = 60 * whole.objective.tokens(whole.batches(0))
    state, half = whole.begin(), halved.begin()
    while whole.advance(state, budget):
        pass
    for _ in range(2):
        halved.advance(half, budget)
    saved = {key: value.clone() for key, value in half.tensors.items()}
    resumed = SearchState.of(half.to_json(), saved)
    again = make_search(name, model, start_prompt(model), TRAIN, batch_size=4, seed=2)
    while again.advance(resumed, budget):
        pass
    assert resumed.to_json() == state.to_json()


def test_the_projected_embeddings_have_the_loss_of_the_nearest_tokens_text() -> None:
    model = tiny_model()
    prompt = start_prompt(model)
    search = make_search("pez", model, prompt, TRAIN, batch_size=4, seed=0)
    assert isinstance(search, ProjectedEmbeddings)
    state = search.begin()
    for _ in range(3):
        search.advance(state, 1 << 40)
    ids = search.nearest(state.tensors["rows"])
    assert state.ids == ids
    batch = [TRAIN[i] for i in BATCH]
    loss, gradient = loss_and_grad(model, SoftPrompt.from_ids(model, ids, prompt.template), batch)
    own, own_gradient = search.objective.gradient(ids, BATCH)
    assert own == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(own_gradient, gradient, rtol=1e-4, atol=1e-6)


def test_texts_keep_their_tokens() -> None:
    model = tiny_model()
    prompt = start_prompt(model)
    for seed in range(50):
        text = text_of(model, prompt.template, ids := drawn_ids(model, 4, seed))
        if text is not None:
            assert SoftPrompt.from_text(model, text, prompt.template).token_ids == ids
    assert not any(text_tokens(model)[id] for id in model.tokenizer.eos_ids)


def test_an_unknown_search_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ConfigError, match="there is no search 'autoprompt'; choose one of gcg, gcg-fluent"):
        make_search("autoprompt", model, start_prompt(model), [Example("a", "b")], batch_size=1, seed=0)


@pytest.mark.parametrize("name", NAMES)
def test_ranks_share_a_search(name: str) -> None:
    """All find the same; losses are those of one process, and the first step's choice is too."""

    def found(rank: Ranks) -> tuple[SearchState, float, torch.Tensor]:
        model = model_of(rank.rank)
        search = make_search(name, model, start_prompt(model), TRAIN, batch_size=4, seed=0, ranks=rank)
        loss, gradient = search.objective.gradient(search.objective.prompt.token_ids, BATCH)
        state = search.begin()
        for _ in range(3):
            assert search.advance(state, 10**9)
        return state, loss, gradient

    one, loss, gradient = found(ALONE)
    for state, its_loss, its_gradient in on_ranks(3, found):
        assert state.to_json() == one.to_json() | {"visited": state.visited}
        for mine, other in zip(state.visited, one.visited, strict=True):
            assert mine["ids"] == other["ids"]
            assert mine["loss"] == pytest.approx(other["loss"], rel=3e-6)
        assert its_loss == pytest.approx(loss, rel=3e-6)
        assert float((its_gradient - gradient).abs().max()) < 3e-6 * float(gradient.abs().max())
