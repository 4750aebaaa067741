"""Transfer: planted maps are recovered, tokens are matched by their bytes, and the command from prompt to table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.cli.commands.optimize import run as optimize
from embedgrad.cli.commands.transfer import Options, run
from embedgrad.engine.model import Model, load_model
from embedgrad.maths.trust_region import CosineCone, NoRegion
from embedgrad.model.tokenizer import Tokenizer
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.transfer.alignment import shares, spans
from embedgrad.transfer.carry import Bridge
from embedgrad.transfer.result import area, steps_to
from embedgrad.transfer.shared import shared_tokens, token_bytes
from embedgrad.transfer.translators import NAMES, Linear, Relative, fit
from embedgrad.util.errors import ConfigError
from embedgrad.util.folder_lock import locked
from tests.compare.test_compare import configure
from tests.model.tiny import STYLES, tokenizer_json, write_folder
from tests.train.training import model_folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of another family with another tokenizer."""
    folder = tmp_path_factory.mktemp("other") / "tiny-mistral"
    write_folder(folder, "mistral")
    return folder


def tokenizer(style: str, folder: Path) -> Tokenizer:
    """The tokenizer of a style, without a model."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json(style))
    return Tokenizer.from_folder(folder)


@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 2**16))
@settings(deadline=None, max_examples=15)
def test_ridge_and_coordinates_recover_a_planted_linear_map(d_s: int, d_t: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    source = torch.randn(400, d_s, generator=draw) + 1.5
    planted = torch.randn(d_s, d_t, generator=draw)
    target = source @ planted - 0.7
    ridge, relative = fit(["ridge", "relative"], source, target)
    delta, own = torch.randn(3, d_s, generator=draw), source[:3]
    wanted = delta.double() @ planted.double()
    assert ridge.fit is not None
    assert ridge.fit.explained > 0.999
    for translator, tolerance in ((ridge, 0.01), (relative, 0.05)):
        found = translator.translate(delta, own, target[:3])
        assert float((found - wanted).norm() / wanted.norm()) < tolerance


@given(st.integers(2, 12), st.integers(0, 6), st.floats(0.1, 10), st.integers(0, 2**16))
@settings(deadline=None, max_examples=15)
def test_the_orthogonal_map_recovers_a_planted_rotation(d: int, wider: int, scale: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    source = torch.randn(400, d, generator=draw)
    rotation = torch.linalg.qr(torch.randn(d + wider, d + wider, generator=draw))[0][:d]
    (found,) = fit(["orthogonal"], source, scale * source @ rotation)
    assert isinstance(found, Linear)
    assert found.fit is not None
    assert found.fit.cosine == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(found.matrix, scale * rotation.double(), rtol=1e-2, atol=1e-2 * scale)


def test_unrelated_spaces_explain_nothing() -> None:
    draw = torch.Generator().manual_seed(0)
    source, target = torch.randn(2000, 16, generator=draw), torch.randn(2000, 16, generator=draw)
    for translator in fit(["ridge", "orthogonal"], source, target):
        assert translator.fit is not None
        assert abs(translator.fit.cosine) < 0.1
        assert translator.fit.explained < 0.05


def test_too_few_shared_tokens_and_unknown_translators_are_refused() -> None:
    few = torch.randn(31, 4)
    with pytest.raises(ConfigError, match="share 31 tokens, but a translator needs at least 32"):
        fit(["ridge"], few, few)
    with pytest.raises(ConfigError, match="no translator 'mlp'; choose among ridge, orthogonal, relative"):
        fit(["mlp"], few, few)


@pytest.mark.parametrize("style", STYLES)
def test_a_tokens_bytes_are_those_of_its_text(style: str, tmp_path: Path) -> None:
    own = tokenizer(style, tmp_path)
    found = token_bytes(own)
    assert all(id not in found for id in own.eos_ids)
    text = "The movie was naïve, 你好 and 1234567 times 🙂 better."
    joined = b"".join(found[id] for id in own.encode(text))
    assert joined.strip() == text.encode()
    assert max(found.values(), key=len)


@pytest.mark.parametrize("style", STYLES)
def test_shared_tokens_spell_the_same_bytes(style: str, tmp_path: Path) -> None:
    one, two = tokenizer("smollm", tmp_path / "one"), tokenizer(style, tmp_path / "two")
    pairs = shared_tokens(one, two)
    left, right = token_bytes(one), token_bytes(two)
    assert all(left[a] == right[b] for a, b in pairs)
    assert len({a for a, _ in pairs}) == len(pairs) == len(set(left.values()) & set(right.values()))
    assert len(pairs) > 100


TEXTS = st.text(st.sampled_from("abc dé 你🙂"), min_size=1, max_size=20).map(str.strip).filter(bool)


@given(TEXTS, st.sampled_from(STYLES), st.sampled_from(STYLES))
@settings(deadline=None, max_examples=40)
def test_every_target_token_is_shared_out_once(
    tmp_path_factory: pytest.TempPathFactory, text: str, one: str, two: str
) -> None:
    folder = tmp_path_factory.mktemp("spans")
    left, right = (tokenizer(style, folder / style) for style in (one, two))
    a, b = left.encode(text), right.encode(text)
    found = shares(spans(left, text, a), spans(right, text, b))
    assert found.shape == (len(b), len(a))
    total = found.sum(dim=1)
    assert bool(((total - 1).abs() < 1e-9).logical_or(total == 0).all())
    if one == two:
        assert bool((found.diagonal() > 0).logical_or(total == 0).all())


def test_a_token_that_is_split_or_merged_shares_its_displacement() -> None:
    found = shares([(0, 4), (4, 8)], [(0, 2), (2, 4), (4, 8)])
    assert found.tolist() == [[1, 0], [1, 0], [0, 1]]
    assert shares([(0, 1), (1, 4)], [(0, 4), (4, 4)]).tolist() == [[0.25, 0.75], [0, 0]]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prompt in the folder of its run."""
    folder = tmp_path_factory.mktemp("transfer")
    assert optimize(configure(folder, optimize__learning_rate=0.05), [], None, False, True, False) == 0
    return folder / "runs/small/prompt.safetensors"


@pytest.fixture(scope="module")
def source() -> Model:
    return load_model(model_folder(), device="cpu")


def test_to_the_same_model_every_translator_carries_the_displacement_home(tuned: Path, source: Model) -> None:
    """With all of the vocabulary shared, e' = e, up to what a translator cannot express."""
    prompt = SoftPrompt.load(tuned, source)
    bridge = Bridge.build(source, prompt, source, list(NAMES))
    assert bridge.shared > 300
    for translator in bridge.translators:
        found = bridge.carried(translator, NoRegion())
        moved, wanted = found.embeddings - found.anchor, prompt.embeddings - prompt.anchor
        cosine = torch.nn.functional.cosine_similarity(moved, wanted, dim=1)
        assert float(cosine.min()) > (0.9 if isinstance(translator, Relative) else 0.999)
        torch.testing.assert_close(moved.norm(dim=1), wanted.norm(dim=1), rtol=1e-4, atol=1e-6)


def test_the_control_has_the_same_lengths_and_the_region_holds(tuned: Path, source: Model, other: Path) -> None:
    prompt = SoftPrompt.load(tuned, source)
    bridge = Bridge.build(source, prompt, load_model(other, device="cpu"), ["ridge"])
    free, held = NoRegion(), CosineCone(0.999)
    (ridge,) = bridge.translators
    carried, control = bridge.carried(ridge, free), bridge.shuffled(ridge, free, 1)
    lengths = [(one.embeddings - one.anchor).norm(dim=1) for one in (carried, control)]
    torch.testing.assert_close(*lengths, rtol=1e-4, atol=1e-6)
    assert not torch.equal(carried.embeddings, control.embeddings)
    assert float(bridge.carried(ridge, held).similarity().min()) >= 0.999
    assert float(bridge.shuffled(ridge, held, 1).similarity().min()) >= 0.999


def transferred(prompt: Path, to: Path, folder: Path, **options: Any) -> dict[str, Any]:
    """Runs the command. Returns the contents of transfer.json."""
    assert run(prompt, str(to), Options(output=folder, quiet=True, steps=3, **options)) == 0
    found = json.loads((folder / "transfer.json").read_text())
    assert isinstance(found, dict)
    return found


def test_the_command_measures_every_start(tuned: Path, other: Path, tmp_path: Path) -> None:
    found = transferred(tuned, other, tmp_path)
    starts = {"text", "ridge", "orthogonal", "relative", "shuffled"}
    assert set(found["curves"]) == starts
    for one in found["curves"].values():
        assert [[step for step, _ in curve] for curve in one["curves"]] == [[0, 1, 2, 3]] * 2
    arms = [(one["arm"], one["seed"]) for one in found["arms"]]
    assert set(arms) == {(name, 0) for name in starts} | {(f"{name}-trained", s) for name in starts for s in (0, 1)}
    assert found["warnings"]  # two steps on a random model gain nothing
    assert "is not shown" in (tmp_path / "transfer.md").read_text()
    target = load_model(other, device="cpu")
    for name in ("ridge", "orthogonal", "relative"):
        assert float(SoftPrompt.load(tmp_path / f"{name}.safetensors", target).similarity().min()) >= 0.9
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert transferred(tuned, other, tmp_path) == found
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    level = transferred(tuned, other, tmp_path, accuracy=0.0)
    assert level["levels"] == [0.0]
    assert level["curves"]["text"]["steps_to"] == [[0], [0]]


def test_what_cannot_be_done_is_refused_in_a_sentence(tuned: Path, other: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(tuned.read_bytes())
    with pytest.raises(ConfigError, match="there is no configuration beside"):
        transferred(alone, other, tmp_path / "out")
    with pytest.raises(ConfigError, match="needs validation and test data"):
        transferred(tuned, other, tmp_path / "out", overrides=["data.split.test=0"])
    with locked(tmp_path / "used"), pytest.raises(ConfigError, match=r"another process is working in .*used"):
        transferred(tuned, other, tmp_path / "used")
    folds = ["data.split=null", "data.folds=2"]
    with pytest.raises(ConfigError, match="not folds"):
        transferred(tuned, other, tmp_path / "out", overrides=folds)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9))
@settings(deadline=None)
def test_curves_are_read_right(accuracies: list[float]) -> None:
    curve = list(enumerate(accuracies))
    assert min(accuracies) - 1e-9 <= area(curve) <= max(accuracies) + 1e-9
    assert steps_to(curve, max(accuracies)) == accuracies.index(max(accuracies))
    assert steps_to(curve, 1.1) is None
