"""The Python reference, the C++ sampler and the CUDA kernel choose the same token."""

from __future__ import annotations

import ctypes
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.backends.native_core import SamplingBatch, SamplingParams
from embedgrad.generation.constrained import ForcedChoice
from embedgrad.generation.sampler import MAX_VOCABULARY, Penalties, choose_token, weights
from embedgrad.generation.sampling import Sampling
from embedgrad.util.errors import ConfigError
from tests.csrc.core import STATUS, Call, Core, params_of, pointer

DEVICES = ("cpu", "cuda")


def reference(call: Call) -> tuple[list[int], list[str]]:
    """What a sampler must answer, row by row."""
    tokens, status = [], []
    for row, logits in enumerate(call.logits):
        if call.reasons is not None and call.reasons[row]:
            tokens.append(-7)
            status.append("left alone")
            continue
        try:
            tokens.append(choose_token(np.ascontiguousarray(logits), call.sampling, **call.row_options(row)))
            status.append("sampled")
        except ConfigError as error:
            tokens.append(-1)
            words = {"NaN": "NaN", "+inf": "+inf", "forbidden": "all -inf", "complete": "no candidate"}
            status.append(next(short for word, short in words.items() if word in str(error)))
    return tokens, status


EXTREME = [0.0, -0.0, 1.0, -1.0, 1e-45, 3e38, -3e38, -np.inf]
NUMBERS = st.one_of(
    st.sampled_from(EXTREME),
    st.floats(-30, 30, width=32),
    st.integers(-3, 3).map(float),  # ties
)


@st.composite
def calls(draw: st.DrawFn, numbers: st.SearchStrategy[float] = NUMBERS) -> Call:
    vocabulary = draw(st.sampled_from([1, 2, 3, 31, 32, 33, 127, 128, 129, 300]))
    rows = draw(st.integers(1, 2))
    width = vocabulary + draw(st.integers(0, 3))
    some = draw(st.lists(numbers, min_size=1, max_size=12))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = np.array(some, np.float32)[random.integers(0, len(some), (rows, width))]
    if draw(st.booleans()):
        logits = logits + random.normal(0, 2, logits.shape).astype(np.float32)
    options: dict = {}
    if draw(st.booleans()):
        options["penalties"] = Penalties(draw(st.floats(0.25, 4)), draw(st.floats(-2, 2)), draw(st.floats(-1, 1)))
        options["counts"] = random.integers(0, 3, (rows, vocabulary)).astype(np.int32)
    if draw(st.booleans()):
        bias = random.normal(0, 1, vocabulary).astype(np.float32)
        bias[random.random(vocabulary) < 0.3] = -np.inf
        options["bias"] = bias
    if draw(st.booleans()):
        continuations = [random.integers(0, vocabulary, 1 + random.integers(0, 3)).tolist() for _ in range(5)]
        tree = ForcedChoice.among(continuations, end=0)
        options["choice"] = tree
        options["nodes"] = random.integers(-1, len(tree.children) - 1, rows).tolist()
    return Call(
        logits[:, :vocabulary],
        Sampling(
            temperature=draw(st.sampled_from([0, 1e-6, 0.3, 1.0, 1.7, 1e30])),
            top_k=draw(st.sampled_from([0, 1, 2, 5, 200])),
            top_p=draw(st.sampled_from([1.0, 0.999, 0.9, 0.5, 1e-3, 1e-12])),
            min_p=draw(st.sampled_from([0.0, 0.05, 0.9, 1.0])),
            seed=draw(st.integers(0, 2**63)),
        ),
        streams=random.integers(0, 2**63, rows),
        steps=random.integers(0, 2**31, rows),
        **options,
    )


@settings(max_examples=150, deadline=None)
@given(call=calls(), order=st.integers(1, 2**32))
def test_same_token_with_every_option(core: Core, call: Call, order: int) -> None:
    core.lib.embedgrad_emulation_seed(order)
    expected = reference(call)
    for device in DEVICES:
        assert core.sample(device, call) == expected, device


@settings(max_examples=50, deadline=None)
@given(call=calls(st.sampled_from([*EXTREME, np.nan, np.inf])))
def test_what_is_no_distribution_is_a_status(core: Core, call: Call) -> None:
    expected = reference(call)
    for device in DEVICES:
        assert core.sample(device, call) == expected, device


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_clear_error_for_each_unusable_row(core: Core, device: str, temperature: float) -> None:
    logits = np.zeros((5, 40), np.float32)
    logits[0, 39] = np.nan
    logits[1, 0] = np.inf
    logits[2] = -np.inf
    logits[3] = -np.inf
    logits[3, 17] = -3e38
    logits[4, [3, 5]] = np.inf, np.nan  # NaN says more
    tokens, status = core.sample(device, Call(logits, Sampling(temperature=temperature, top_k=5, top_p=0.5)))
    assert status == ["NaN", "+inf", "all -inf", "sampled", "NaN"]
    assert tokens == [-1, -1, -1, 17, -1]


@pytest.mark.parametrize("device", DEVICES)
def test_ties_go_to_the_lowest_id(core: Core, device: str) -> None:
    logits = np.zeros((60, 70), np.float32)
    logits[:, 10:] = 1
    logits[:, 69] = -0.0
    greedy, _ = core.sample(device, Call(logits, Sampling()))
    assert set(greedy) == {10}
    limited, _ = core.sample(device, Call(logits, Sampling(temperature=1, top_k=4)))
    assert set(limited) == {10, 11, 12, 13}
    nucleus, _ = core.sample(device, Call(logits[:, 10:69], Sampling(temperature=1, top_p=2.5 / 59)))
    assert set(nucleus) == {0, 1, 2}


@pytest.mark.parametrize("vocabulary", [5000, 49152, 151936, 262144])
def test_same_token_in_large_vocabularies(core: Core, vocabulary: int) -> None:
    """More than 4096 tokens: blocks of 1024 threads, several tiles per warp."""
    random = np.random.default_rng(vocabulary)
    logits = (random.normal(0, 3, (1, vocabulary)) // 0.125 * 0.125).astype(np.float32)  # ties, as in bfloat16
    samplings = [Sampling(temperature=1.5, top_k=400, top_p=0.95, seed=3)]
    if vocabulary <= 49152:
        samplings += [Sampling(temperature=2.0, seed=1), Sampling(temperature=0.8, top_p=0.7, min_p=0.01, seed=2)]
    for sampling in samplings:
        call = Call(logits, sampling)
        expected = reference(call)
        for device in DEVICES:
            assert core.sample(device, call) == expected, (device, sampling)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_extreme_rows_of_the_largest_vocabulary(core: Core, temperature: float) -> None:
    """Token, status and entropy of rows that a real model should not give, but may."""
    v = MAX_VOCABULARY
    rows = np.zeros((6, v), np.float32)  # all equal
    rows[1:3] = -np.inf  # one finite value in the last place; none
    rows[1, -1] = -3e38
    rows[3, v // 2] = np.nan
    rows[4, v - 1] = np.inf
    rows[5, ::2], rows[5, 1::2] = -3e38, 3e38
    call = Call(rows, Sampling(temperature=temperature, seed=8))
    expected = reference(call)
    assert expected[1] == ["sampled", "sampled", "all -inf", "NaN", "+inf", "sampled"]
    assert expected[0][1] == v - 1
    for device in DEVICES:
        assert core.sample(device, call) == expected, device
        entropy, log_p = core.token_entropy(device, rows, np.array(expected[0], np.int32))
        np.testing.assert_allclose(entropy[[0, 1, 5]], [1, 0, np.log(v / 2) / np.log(v)], atol=1e-6, err_msg=device)
        np.testing.assert_allclose(log_p[[0, 1, 5]], [-np.log(v), 0, -np.log(v / 2)], atol=1e-5, err_msg=device)
        assert np.isnan(entropy[2:5]).all()
        assert np.isnan(log_p[2:5]).all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_rows_token_does_not_depend_on_its_neighbours(core: Core, device: str) -> None:
    random = np.random.default_rng(0)
    call = Call(random.normal(0, 2, (6, 50)).astype(np.float32), Sampling(temperature=1, seed=5), steps=range(6))
    together, _ = core.sample(device, call)
    alone = [
        core.sample(device, call.with_(logits=call.logits[i : i + 1], streams=[i], steps=[i]))[0][0] for i in range(6)
    ]
    assert together == alone


@pytest.mark.parametrize("device", DEVICES)
def test_ended_rows_are_left_alone(core: Core, device: str) -> None:
    """Whoever looks some steps later still finds why a row has failed."""
    logits = np.full((3, 9), np.nan, np.float32)
    logits[1] = 0
    tokens, status = core.sample(device, Call(logits, Sampling(temperature=1), reasons=[1, 0, 4]))
    assert [tokens[0], tokens[2]] == [-7, -7]
    assert 0 <= tokens[1] < 9
    assert status == ["left alone", "sampled", "left alone"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wrong", [{"vocabulary": 0}, {"vocabulary": (1 << 18) + 1}, {"logits_stride": 3}])
def test_unusable_calls_are_refused_by_number(core: Core, device: str, wrong: dict) -> None:
    batch = SamplingBatch(logits_stride=1 << 20, sequences=1, vocabulary=4)
    for name, value in wrong.items():
        setattr(batch, name, value)
    assert core.raw_sample(device, batch) == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1}, {"temperature": np.nan}, {"temperature": np.inf}, {"top_k": -1}, {"top_p": 0},
        {"top_p": np.nan}, {"min_p": 1.5}, {"repetition": 0}, {"presence": np.nan}, {"frequency": -np.inf},
    ],
)  # fmt: skip
def test_a_row_with_unusable_settings_fails_alone(core: Core, device: str, wrong: dict) -> None:
    logits = np.arange(12, dtype=np.float32).reshape(3, 4)
    params = (SamplingParams * 3)(*[params_of(Sampling())] * 3)
    for name, value in wrong.items():
        setattr(params[1], name, value)
    tokens, status, streams, steps = (np.zeros(3, kind) for kind in (np.int32, np.int32, np.uint64, np.uint32))
    batch = SamplingBatch(
        params=ctypes.addressof(params), logits=pointer(logits), logits_stride=4, sequences=3, vocabulary=4,
        streams=pointer(streams), steps=pointer(steps), tokens=pointer(tokens), status=pointer(status),
    )  # fmt: skip
    assert core.raw_sample(device, batch) == 0
    assert tokens.tolist() == [3, -1, 3]
    assert [STATUS[n] for n in status] == ["sampled", "bad settings", "sampled"]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), order=st.integers(1, 2**32))
def test_every_row_has_settings_of_its_own(core: Core, data: st.DataObject, order: int) -> None:
    """Rows with different temperatures, cuts, penalties, seeds and rows of bias, in one call."""
    core.lib.embedgrad_emulation_seed(order)
    vocabulary, rows = data.draw(st.sampled_from([3, 33, 129])), data.draw(st.integers(2, 5))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    logits = random.normal(0, 2, (rows, vocabulary)).astype(np.float32)
    counts = random.integers(0, 3, (rows, vocabulary)).astype(np.int32)
    bias = random.normal(0, 1, (2, vocabulary)).astype(np.float32)
    bias_rows = random.integers(-1, 2, rows).astype(np.int32)
    drawn = [
        (
            Sampling(
                temperature=data.draw(st.sampled_from([0, 0.5, 2.0])), top_k=data.draw(st.sampled_from([0, 2])),
                top_p=data.draw(st.sampled_from([1.0, 0.7])), min_p=data.draw(st.sampled_from([0.0, 0.2])), seed=row,
            ),
            Penalties(data.draw(st.sampled_from([1.0, 1.5])), data.draw(st.sampled_from([0.0, 0.5])), 0.1),
        )
        for row in range(rows)
    ]  # fmt: skip
    expected = [
        choose_token(
            logits[row], sampling, stream=7 + row, step=row, penalties=penalties, counts=counts[row],
            bias=None if bias_rows[row] < 0 else bias[bias_rows[row]],
        )
        for row, (sampling, penalties) in enumerate(drawn)
    ]  # fmt: skip
    params = (SamplingParams * rows)(*[params_of(*each) for each in drawn])
    streams, steps = np.arange(7, 7 + rows, dtype=np.uint64), np.arange(rows, dtype=np.uint32)
    for device in DEVICES:
        tokens, status = np.full((2, rows), -7, np.int32)
        batch = SamplingBatch(
            ctypes.addressof(params), pointer(logits), vocabulary, rows, vocabulary,
            *(pointer(a) for a in (streams, steps, counts, bias, bias_rows)), None, None, None, None,
            pointer(tokens), pointer(status),
        )  # fmt: skip
        assert core.raw_sample(device, batch) == 0
        assert core.emulation_error() == ""
        assert (tokens.tolist(), status.tolist()) == (expected, [0] * rows), device


def test_weights_are_the_exponential(core: Core) -> None:
    d = np.concatenate([np.linspace(0, 33, 20_011), 2.0 ** -np.arange(1, 60), [np.inf, 1e38]]).astype(np.float32)
    d.sort()
    ours = weights(d)
    assert ours[0] == 1 << 40
    assert np.all(np.diff(ours.astype(np.int64)) <= 0)
    exact = np.exp(-d.astype(np.float64)) * 2.0**40
    assert np.all(np.abs(ours - exact) <= exact * 2.0**-23 + 1)
    assert [core.lib.embedgrad_weight(x) for x in d[::7].tolist()] == ours[::7].tolist()


def test_penalties_that_cannot_be_used() -> None:
    for wrong in ({"repetition": 0.0}, {"presence": np.nan}, {"frequency": np.inf}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Penalties(**wrong)


def test_the_reference_refuses_what_is_no_row() -> None:
    with pytest.raises(ConfigError, match="float32"):
        choose_token(np.zeros((2, 3), np.float32), Sampling())
    with pytest.raises(ConfigError, match="float32"):
        choose_token(np.zeros(3), Sampling())


def test_the_structs_agree_with_sampling() -> None:
    names = {name for name, _ in SamplingParams._fields_}
    assert {f.name for f in dataclasses.fields(Penalties)} <= names
