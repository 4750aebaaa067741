"""The generation loop in csrc/ against the plain one, and what both promise: batches, threads, callbacks, Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedgrad.engine.model import Model, load_model
from embedgrad.generation.entropy import token_entropy
from embedgrad.generation.generate import Generation, generate, limits_of
from embedgrad.generation.kv_cache import GROWTH, KeyValueCache
from embedgrad.generation.loops import loop_for
from embedgrad.generation.prefill import prefill_prefix, prefill_suffixes
from embedgrad.generation.sampler import Penalties, choose_token
from embedgrad.generation.sampling import Sampling
from embedgrad.generation.writer import Request, Writer
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.rendering import render_query
from embedgrad.prompt.template import Template
from embedgrad.util.errors import ConfigError
from tests.engine.drawn import configs, make_prompt, pair, prompts
from tests.model.blocks import HALVES_AT
from tests.model.tiny import random_model, write_folder, write_gguf
from tests.truth import relative_error

pytest.importorskip("embedgrad.backends.native")

drawn = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
ASKED = [[50 + i, *range(60, 60 + i % 5)] for i in range(11)]


def plain(model: Model) -> Model:
    """The same model without csrc/'s loop."""
    vars(model)["native_decoder"] = None
    return model


def tiny(folder: Path, weights: str = "compute", family: str = "llama", **config: Any) -> Model:
    write_folder(folder, family, **{**WIDE, **config})
    return load_model(folder, backend="native", weights=weights)


def prompt_of(model: Model) -> SoftPrompt:
    return SoftPrompt.from_ids(model, [9, 30, 200, 31], template=Template.plain())


def numbers(answers: list[Generation]) -> list[tuple[list[int], list[float], list[float]]]:
    return [(a.ids, a.log_probabilities, a.entropies) for a in answers]


@drawn
@given(config=configs(), prompt=prompts(), seed=st.integers(0, 1000))
def test_decoded_logits_are_those_of_the_decoder(config: Any, prompt: Any, seed: int) -> None:
    """Every family, biases, head norms, windows, head sizes that fill no vector; the prefix and the suffixes."""
    model = pair(*config).model
    p = make_prompt(model, prompt)
    batch = [render_query(model, p, [50 + i, *range(60, 60 + i)]) for i in range(3)]
    prefix = prefill_prefix(model, p.embeddings, batch[0], min(2, *(len(rendered.ids) - 1 for rendered in batch)))
    results = []
    assert model.native_decoder is not None
    for native in (model.native_decoder, None):
        vars(model)["native_decoder"] = native
        cache, logits = prefill_suffixes(model, p.embeddings, batch, prefix)
        found = [logits]
        for step in range(4):
            found.append(cache.next_logits(torch.tensor([(seed + 7 * step + i) % 390 for i in range(3)])))
        results.append(torch.stack(found))
        if native is None:
            vars(model).pop("native_decoder")
    assert relative_error(results[0], results[1].double()) < 2e-5


@pytest.mark.parametrize("weights", ["compute", "int8", "int4"])
def test_an_answer_does_not_depend_on_its_neighbours_or_threads(tmp_path: Path, weights: str) -> None:
    """Bit for bit with weights in blocks. In the prefill, BLAS multiplies float weights and rounds by the batch."""
    model = tiny(tmp_path, weights)
    p, sampling = prompt_of(model), Sampling(max_new_tokens=12, temperature=0.8, seed=5)
    together = generate(model, p, ASKED, sampling)
    assert len({a.text for a in together}) > 5
    assert generate(model, p, ASKED, sampling, batch_size=3) == together
    if weights != "compute":
        assert numbers(generate(model, p, ASKED, sampling, batch_size=2)) == numbers(together)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert generate(model, p, ASKED, sampling) == together
    finally:
        torch.set_num_threads(threads)
    assert numbers(generate(model, p, ASKED, sampling)) == numbers(together)


SAMPLINGS = [
    Sampling(max_new_tokens=9),
    Sampling(max_new_tokens=70, temperature=1.0, seed=1),
    Sampling(max_new_tokens=9, temperature=1.5, top_k=20, top_p=0.9, min_p=0.01, seed=2),
    Sampling(max_new_tokens=30, repetition_penalty=1.3, presence_penalty=0.1, frequency_penalty=0.2),
    Sampling(max_new_tokens=9, logit_bias={50: -float("inf"), 61: 3.0}, temperature=0.5),
    Sampling(max_new_tokens=9, choices=("a movie", "a film", "no"), temperature=1.0),
    Sampling(max_new_tokens=9, stop=("e", "a")),
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_both_loops_write_the_same(tmp_path: Path, sampling: Sampling) -> None:
    model = tiny(tmp_path, max_position_embeddings=80)
    p = prompt_of(model)
    native = generate(model, p, ASKED, sampling, batch_size=4)
    slow = generate(plain(model), p, ASKED, sampling, batch_size=4)
    assert native == slow
    for ours, theirs in zip(native, slow, strict=True):
        assert len(ours.entropies) == len(ours.log_probabilities) == len(theirs.entropies) >= len(ours.ids)
        assert np.allclose(ours.entropies, theirs.entropies, atol=1e-5)
        assert np.allclose(ours.log_probabilities, theirs.log_probabilities, atol=1e-4)
    if sampling.choices:
        assert {a.text for a in native} <= set(sampling.choices)
        assert {a.stop_reason for a in native} == {"stop"}
    if sampling.logit_bias:
        assert all(50 not in a.ids for a in native)


def test_tokens_are_chosen_as_the_reference_sampler_does(tmp_path: Path) -> None:
    """Each token is chosen again from the logits of a whole forward; the ids of the input count as seen."""
    model = tiny(tmp_path)
    p = prompt_of(model)
    sampling = Sampling(max_new_tokens=15, temperature=0.9, top_k=50, seed=3, repetition_penalty=1.2)
    for index, answer in enumerate(generate(model, p, ASKED[:4], sampling)):
        rendered = render_query(model, p, ASKED[index])
        counts = np.bincount(rendered.ids, minlength=model.config.vocab_size)
        empty = prefill_prefix(model, p.embeddings, rendered, 0)
        cache, logits = prefill_suffixes(model, p.embeddings, [rendered], empty)
        for step, token in enumerate(answer.ids):
            row = logits[0].float().numpy()
            chosen = choose_token(
                row, sampling, stream=index, step=step, penalties=Penalties.of(sampling), counts=counts
            )
            assert chosen == token
            assert answer.entropies[step] == pytest.approx(float(token_entropy(logits[0])), abs=1e-5)
            assert answer.log_probabilities[step] == pytest.approx(float(logits[0].log_softmax(0)[token]), abs=1e-4)
            counts[token] += 1
            logits = cache.next_logits(torch.tensor([token]))


@pytest.mark.parametrize("kind", HALVES_AT)
def test_a_files_blocks_are_decoded_as_they_are(tmp_path: Path, kind: str) -> None:
    """The logits differ from those of the dequantised weights by the rounding of activations, and by no more."""
    model = random_model("llama", scale=0.06, **{**WIDE, "hidden_size": 256, "intermediate_size": 256})
    path = tmp_path / "model.gguf"
    write_gguf(path, model, kind=kind)
    stored, wide = (load_model(path, backend="native", weights=w) for w in ("stored", "compute"))
    assert stored.native_decoder is not None
    assert stored.native_decoder.in_blocks
    results = []
    for m in (stored, wide):
        p = prompt_of(m)
        batch = [render_query(m, p, query) for query in ASKED[:3]]
        cache, logits = prefill_suffixes(m, p.embeddings, batch, prefill_prefix(m, p.embeddings, batch[0], 4))
        results.append(torch.stack([logits, cache.next_logits(torch.tensor([70, 71, 72]))]).double())
    assert relative_error(*results) < 0.03


def test_long_inputs_in_pieces(tmp_path: Path) -> None:
    """More tokens than csrc/ computes at once give the same bits as single tokens, and any prefix the same as none."""
    model = tiny(tmp_path, "int8", max_position_embeddings=1024)
    p = prompt_of(model)
    rendered = render_query(model, p, [5 + i % 390 for i in range(600)])
    _, whole = prefill_suffixes(model, p.embeddings, [rendered], prefill_prefix(model, p.embeddings, rendered, 0))
    for length in (1, 130, 300, len(rendered.ids) - 1):
        shared = prefill_prefix(model, p.embeddings, rendered, length)
        assert torch.equal(prefill_suffixes(model, p.embeddings, [rendered], shared)[1], whole)
    short = replace(rendered, ids=rendered.ids[:250], prompt_rows=rendered.prompt_rows[:250])
    cache, logits = prefill_suffixes(model, p.embeddings, [short], prefill_prefix(model, p.embeddings, short, 20))
    for token in rendered.ids[250:]:
        logits = cache.next_logits(torch.tensor([token]))
    assert torch.equal(logits, whole)


@pytest.mark.parametrize("weights", ["compute", "int8"])
def test_a_prompts_prefix_is_computed_once(tmp_path: Path, weights: str) -> None:
    """Calls with the same prompt reuse it and give the answers of a fresh model. Another prompt does not reuse it."""
    model, fresh = tiny(tmp_path, weights), load_model(tmp_path, backend="native", weights=weights)
    p = prompt_of(model)
    other = replace(p, embeddings=p.embeddings + 0.3)
    sampling = Sampling(max_new_tokens=5)
    for prompt, asked in ((p, ASKED[:1]), (p, ASKED), (p, ASKED[2:3]), (other, ASKED), (p, ASKED[:2])):
        fresh.last_prefix.clear()
        assert generate(model, prompt, asked, sampling) == generate(fresh, prompt, asked, sampling)
    rendered = render_query(model, p, ASKED[0])
    assert model.last_prefix.get(other.embeddings, rendered, 4) is None
    known = model.last_prefix.get(p.embeddings, rendered, len(rendered.ids))
    assert known is not None
    assert known.shape[2] >= 4
    model.release_memory()
    assert model.last_prefix.get(p.embeddings, rendered, 4) is None


@pytest.mark.parametrize("native", [True, False])
def test_callbacks_and_what_they_raise(tmp_path: Path, native: bool) -> None:
    model = tiny(tmp_path)
    model = model if native else plain(model)
    p = prompt_of(model)
    heard: dict[int, list[int]] = {}
    finished: list[int] = []

    def on_token(index: int, token: int) -> None:
        assert index not in finished
        heard.setdefault(index, []).append(token)

    answers = generate(
        model, p, ASKED, Sampling(max_new_tokens=6), batch_size=4, on_token=on_token,
        on_answer=lambda index, _: finished.append(index),
    )  # fmt: skip
    assert {i: a.ids for i, a in enumerate(answers) if a.ids} == heard
    assert sorted(finished) == list(range(len(ASKED)))

    def fail(index: int, token: int) -> None:
        raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        generate(model, p, ASKED, Sampling(max_new_tokens=6), on_token=fail)


@pytest.mark.parametrize("native", [True, False])
def test_ctrl_c_stops_within_a_token(tmp_path: Path, native: bool) -> None:
    model = tiny(tmp_path, max_position_embeddings=4096)
    model = model if native else plain(model)
    heard: list[int] = []

    def on_token(index: int, token: int) -> None:
        heard.append(token)
        if len(heard) == 5:
            signal.raise_signal(signal.SIGINT)

    p = prompt_of(model)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        generate(model, p, [[50]], Sampling(max_new_tokens=4000), on_token=on_token)
    assert len(heard) <= 6
    assert signal.getsignal(signal.SIGINT) is before
    assert len(generate(model, p, [[50]], Sampling(max_new_tokens=3))[0].ids) <= 3


@pytest.mark.parametrize("native", [True, False])
def test_logits_that_are_no_distribution(tmp_path: Path, native: bool) -> None:
    model = tiny(tmp_path)
    model = model if native else plain(model)
    p = prompt_of(model)
    model.weights.final_norm[3] = float("nan")
    with pytest.raises(ConfigError, match="query 0: the logits hold NaN"):
        generate(model, p, [[50]], Sampling(max_new_tokens=3))
    model.weights.final_norm[3] = 1.0
    with pytest.raises(ConfigError, match="names token 420, but the vocabulary has 420"):
        generate(model, p, [[50]], Sampling(logit_bias={420: 1.0}))
    forbidden = dict.fromkeys(range(model.config.vocab_size), -float("inf"))
    with pytest.raises(ConfigError, match="every token is forbidden"):
        generate(model, p, [[50]], Sampling(logit_bias=forbidden))


def test_the_cache_is_rewound_and_joined() -> None:
    model = pair("llama", {}).model
    p = prompt_of(model)
    batch = [render_query(model, p, query) for query in ([50, 51], [52])]
    prefix = prefill_prefix(model, p.embeddings, batch[0], 2)
    cache, _ = prefill_suffixes(model, p.embeddings, batch, prefix)
    mark = cache.mark()
    first = cache.next_logits(torch.tensor([7, 8]))
    cache.rewind(mark)
    assert torch.equal(cache.next_logits(torch.tensor([7, 8])), first)
    cache.rewind(mark)
    one, two = (prefill_suffixes(model, p.embeddings, [sequence], prefix)[0] for sequence in batch)
    assert isinstance(one, KeyValueCache)
    one.join(two)
    assert relative_error(one.next_logits(torch.tensor([7, 8])), first.double()) < 1e-5


def test_any_number_of_threads_writes_the_same() -> None:
    """One thread, and more threads than cores, decode the same text in a process of their own."""
    program = (
        "import sys, tempfile, torch\n"
        "from pathlib import Path\n"
        "from tests.generation.test_loops import ASKED, prompt_of, tiny\n"
        "from embedgrad.generation.generate import generate\n"
        "from embedgrad.generation.sampling import Sampling\n"
        "torch.set_num_threads(int(sys.argv[1]))\n"
        "torch.manual_seed(0)\n"
        "model = tiny(Path(tempfile.mkdtemp()), 'int8')\n"
        "print([a.ids for a in generate(model, prompt_of(model), ASKED, Sampling(max_new_tokens=8))])\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program, threads], check=True, capture_output=True, text=True, env={**os.environ}
        ).stdout
        for threads in ("1", "5")
    ]
    assert outputs[0] == outputs[1]
    assert "[" in outputs[0]


@pytest.mark.parametrize("callbacks", [False, True])
@pytest.mark.parametrize("native", [True, False])
def test_the_cache_fills_at_a_step_at_which_the_loop_ends(tmp_path: Path, native: bool, callbacks: bool) -> None:
    """At the caller's wish, or because a slot is free: the next call makes room first, and no neighbour is touched."""
    model = tiny(tmp_path, "int8", max_position_embeddings=1024)
    model = model if native else plain(model)
    p = prompt_of(model)
    rendered = render_query(model, p, ASKED[0])
    prefix = prefill_prefix(model, p.embeddings, rendered, 1)
    endless = {token: float("-inf") for token in model.tokenizer.eos_ids}

    def written(lengths: list[int], stopped: bool) -> dict[int, list[int]]:
        answers: dict[int, list[int]] = {}

        def request(index: int, most: int) -> Request:
            sampling = Sampling(max_new_tokens=most, temperature=1.0, seed=3, logit_bias=endless)
            return Request(rendered, sampling, lambda a: answers.update({index: a.ids}), pytest.fail, index)

        waiting = [request(index, most) for index, most in enumerate(lengths)]
        make_loop = partial(loop_for, model, each_token=True, callbacks=callbacks)
        writer = Writer(model, p.embeddings, prefix, limits_of(model, None), 2, 200, make_loop)
        while len(answers) < len(lengths):
            entering = waiting[: len(writer.slots.free())]
            del waiting[: len(entering)]
            if entering:
                writer.enter(entering)
            writer.run(1 if waiting else 0, lambda: stopped)
        return answers

    right = written([180, 180], stopped=False)
    assert written([180, 180], stopped=True) == right
    for most in range(GROWTH - 3, GROWTH + 5):  # the first cache has room for the input and GROWTH tokens
        assert written([180, most, 5], stopped=False)[0] == right[0], most
