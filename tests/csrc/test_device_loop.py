"""The loop that runs on a GPU, on the CPU: csrc/cuda emulated, where a device address is a host address. It writes what
the plain loop and the one in csrc/decode write."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from embedgrad.backends.cuda_core import declared
from embedgrad.engine.model import Model, load_model
from embedgrad.generation import generate as generation
from embedgrad.generation.generate import Generation, generate
from embedgrad.generation.kv_cache import GROWTH
from embedgrad.generation.loops import device as device_loop
from embedgrad.generation.loops.device import DeviceLoop
from embedgrad.generation.loops.plain import PlainLoop
from embedgrad.generation.sampling import Sampling
from embedgrad.generation.slots import Limits, Slots
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.template import Template
from embedgrad.util.errors import BackendError, ConfigError
from tests.csrc.core import Core
from tests.model.tiny import write_folder

ASKED = [[50 + i, *range(60, 60 + i % 5)] for i in range(7)]
VOCABULARY = 420
POSITIONS = 100


class Counted(DeviceLoop):
    """Counts what would be launched and what would be waited for."""

    steps = looks = 0

    def _step(self) -> None:
        Counted.steps += 1
        super()._step()

    def _read(self) -> None:
        Counted.looks += 1
        super()._read()


@contextmanager
def loops(make: Callable[..., Any]) -> Iterator[None]:
    """Inside, generation uses the loop that `make(model, slots, each_token=…, callbacks=…)` gives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "loop_for", make)
        yield


def plainly(model: Model, *arguments: Any, **options: Any) -> list[Generation]:
    with loops(lambda model, slots, **_: PlainLoop(model, slots)):
        return generate(model, *arguments, **options)


def on_device(core: Core, model: Model, *arguments: Any, **options: Any) -> list[Generation]:
    """Through the device loop; also looks for faults that the emulation has seen."""
    library = declared(core.lib)

    def make(model: Model, slots: Slots, each_token: bool, callbacks: bool) -> DeviceLoop:
        return Counted(model, slots, library, each_token=each_token)

    with loops(make):
        answers = generate(model, *arguments, **options)
    assert core.emulation_error() == ""
    return answers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_folder(path, "mistral", sliding_window=20, max_position_embeddings=POSITIONS)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    """In float64, where the order in which a batch is multiplied cannot change a float32 logit that decides."""
    return load_model(folder, dtype="float64")


def prompt_of(model: Model) -> SoftPrompt:
    return SoftPrompt.from_ids(model, [9, 30, 200, 31], template=Template.plain())


def assert_same(ours: list[Generation], theirs: list[Generation]) -> None:
    assert ours == theirs
    for one, other in zip(ours, theirs, strict=True):
        assert len(one.entropies) == len(one.log_probabilities) == len(other.entropies) >= len(one.ids)
        np.testing.assert_allclose(one.entropies, other.entropies, atol=2e-5)
        np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, atol=2e-5, rtol=2e-5)


@st.composite
def samplings(draw: st.DrawFn) -> Sampling:
    options: dict[str, Any] = {
        "max_new_tokens": draw(st.sampled_from([1, 2, 7, 8, 9, 25, 90, 200])),
        "temperature": draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])),
        "seed": draw(st.integers(0, 2**64 - 1)),
    }
    optional = {
        "top_k": st.sampled_from([1, 5, 50]),
        "top_p": st.sampled_from([0.3, 0.95]),
        "min_p": st.sampled_from([0.01, 0.5]),
        "repetition_penalty": st.floats(0.5, 2),
        "presence_penalty": st.floats(-1, 1),
        "frequency_penalty": st.floats(-0.1, 1),
        "logit_bias": st.dictionaries(
            st.integers(0, VOCABULARY - 1), st.one_of(st.just(-float("inf")), st.floats(-3, 3)), max_size=5
        ),
        "choices": st.lists(st.sampled_from(["a movie", "a film", "a", "no", "yes!"]), min_size=1, unique=True),
        "stop": st.lists(st.sampled_from(["e", "th", " "]), min_size=1, unique=True),
    }
    for name, values in optional.items():
        if draw(st.booleans()):
            options[name] = draw(values)
    return Sampling(**options)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(sampling=samplings(), size=st.integers(1, len(ASKED)), order=st.integers(1, 2**32))
@example(Sampling(max_new_tokens=200), 1, 1)  # more than the context holds
def test_writes_what_the_plain_loop_writes(core: Core, model: Model, sampling: Sampling, size: int, order: int) -> None:
    core.lib.embedgrad_emulation_seed(order)
    p = prompt_of(model)
    expected = plainly(model, p, ASKED, sampling, batch_size=size)
    assert_same(on_device(core, model, p, ASKED, sampling, batch_size=size), expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_writes_what_the_loop_in_csrc_writes(core: Core, folder: Path, temperature: float) -> None:
    pytest.importorskip("embedgrad.backends.native")
    model = load_model(folder, backend="native")
    p, sampling = prompt_of(model), Sampling(max_new_tokens=70, temperature=temperature, seed=4)
    expected = generate(model, p, ASKED, sampling, batch_size=3)
    assert_same(on_device(core, model, p, ASKED, sampling, batch_size=3), expected)


def test_the_host_looks_every_few_tokens_only(core: Core, model: Model) -> None:
    p, sampling = prompt_of(model), Sampling(max_new_tokens=40, logit_bias={2: -float("inf"), 1: -float("inf")})
    steps = []
    for options in ({}, {"on_token": lambda index, token: None}):
        Counted.steps = Counted.looks = 0
        answers = on_device(core, model, p, ASKED, sampling, batch_size=len(ASKED), **options)
        steps.append((Counted.steps, Counted.looks))
    longest = max(len(a.log_probabilities) for a in answers)
    assert steps[0][1] == -(-steps[0][0] // device_loop.LOOK)
    assert longest <= steps[0][0] < longest + device_loop.LOOK
    assert steps[1] == (longest, longest)


def test_no_address_moves_while_the_cache_has_room(core: Core, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph relies on: between two moves of the cache, all steps read and write the same memory."""
    seen: list[tuple[int, ...]] = []
    step = DeviceLoop._next_logits

    def noted(self: DeviceLoop) -> None:
        step(self)
        assert self._cache is not None
        tensors = [*self._state.values(), self._logits, self._cache.lengths, self._cache.own]
        seen.append(tuple(x.data_ptr() for x in tensors))

    monkeypatch.setattr(DeviceLoop, "_next_logits", noted)
    sampling = Sampling(max_new_tokens=80, logit_bias={2: -float("inf"), 1: -float("inf")})
    answers = on_device(core, model, prompt_of(model), ASKED[:3], sampling, batch_size=2)
    assert max(len(a.ids) for a in answers) > GROWTH
    assert len({addresses[:-1] for addresses in seen}) == 1
    assert 1 < len({addresses[-1] for addresses in seen}) <= 3


def test_what_is_heard_and_raised(core: Core, model: Model) -> None:
    p, heard = prompt_of(model), {}
    sampling = Sampling(max_new_tokens=12, temperature=1.0, seed=1)
    answers = on_device(
        core, model, p, ASKED, sampling, batch_size=3, on_token=lambda i, token: heard.setdefault(i, []).append(token)
    )
    assert heard == {i: a.ids for i, a in enumerate(answers) if a.ids}

    def fail(index: int, token: int) -> None:
        raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        on_device(core, model, p, ASKED, sampling, on_token=fail)


def test_ctrl_c_ends_a_call(core: Core, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pressed while a step is launched, no other is, although nobody looks at the tokens yet."""
    step = DeviceLoop._choose
    steps = []

    def interrupted(self: DeviceLoop) -> None:
        step(self)
        steps.append(1)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(DeviceLoop, "_choose", interrupted)
    with pytest.raises(KeyboardInterrupt):
        on_device(core, model, prompt_of(model), ASKED, Sampling(max_new_tokens=60))
    assert len(steps) == 3


def test_logits_that_are_no_distribution(core: Core, folder: Path) -> None:
    """Told by their own name, although other rows go on for some tokens before the host looks."""
    model = load_model(folder, backend="reference")
    p = prompt_of(model)
    forbidden = dict.fromkeys(range(model.config.vocab_size), -float("inf"))
    with pytest.raises(ConfigError, match="query 0: every token is forbidden"):
        on_device(core, model, p, ASKED, Sampling(max_new_tokens=20, logit_bias=forbidden))
    model.weights.final_norm[3] = float("nan")
    for temperature in (0.0, 1.0):
        with pytest.raises(ConfigError, match="query 0: the logits hold NaN"):
            on_device(core, model, p, ASKED, Sampling(max_new_tokens=20, temperature=temperature))


def test_one_row_that_fails_late(core: Core, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    step = DeviceLoop._next_logits

    def spoiled(self: DeviceLoop) -> None:
        step(self)
        self._logits[1, 17] = float("inf")

    monkeypatch.setattr(DeviceLoop, "_next_logits", spoiled)
    with pytest.raises(ConfigError, match=r"query 1: the logits hold \+inf"):
        on_device(core, model, prompt_of(model), ASKED, Sampling(max_new_tokens=30))


def test_settings_are_refused_by_the_library(core: Core, model: Model) -> None:
    slots = Slots(1, VOCABULARY, 8, Limits(frozenset(), 9))
    loop = DeviceLoop(model, slots, declared(core.lib))
    loop._sampling.vocabulary = 1 << 20
    with pytest.raises(BackendError, match=r"sample failed \(number 1"):
        loop._choose()
