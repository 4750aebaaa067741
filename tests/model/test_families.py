"""The descriptions of the families: the table in README.md, and what they promise to the rest of the code."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from embedgrad.data.example import Example
from embedgrad.engine.gradient import loss_and_grad
from embedgrad.engine.model import load_model
from embedgrad.exports.hf_config import model_fields
from embedgrad.generation.generate import generate
from embedgrad.generation.sampling import Sampling
from embedgrad.model import families
from embedgrad.model.checkpoint import read_checkpoint
from embedgrad.model.config import ModelConfig
from embedgrad.model.rope import RopeConfig, inverse_frequencies, rotary_order
from embedgrad.prompt.rendering import render, render_query
from embedgrad.util.errors import ContextError, ModelError
from tests.engine.drawn import make_prompt, pair
from tests.model.tiny import EXTRA, FAMILIES, SMALL, write_folder, write_gguf
from tests.truth import relative_error, transformers_inputs, transformers_loss_and_grad

ROOT = Path(__file__).parents[2]


def test_the_readme_has_the_table() -> None:
    assert families.table() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_family_is_tested() -> None:
    assert {family.name for family in families.FAMILIES} == set(FAMILIES)
    assert set(families.ARCHITECTURES) == {model_class.__name__ for _, model_class in FAMILIES.values()}


def test_no_module_asks_for_a_family_by_name() -> None:
    names = "|".join(family.name for family in families.FAMILIES)
    asks = re.compile(rf"""family\s*(==|!=|in|not in)\s*\(?["']({names})["']""")
    folder = ROOT / "embedgrad"
    found = [path for path in folder.rglob("*.py") if asks.search(path.read_text(encoding="utf-8"))]
    assert not found


def test_the_gradient_is_that_of_the_table_row_not_of_the_scaled_one() -> None:
    """Gemma and Granite scale embeddings: a step ε along the row changes the first layer's input by scale · ε."""
    for family in ("gemma2", "granite"):
        model = pair(family, {}, dtype=torch.float64).model
        p = make_prompt(model, ([9, 30, 200], "system", 1))
        assert torch.equal(p.anchor, model.embedding_rows([9, 30, 200]))
        e = p.embeddings.double()
        batch = [Example([10, 11, 12], [20, 21])]
        _, grad = loss_and_grad(model, p.replace(embeddings=e), batch)
        step = 1e-6 * grad / grad.norm()
        ahead, _ = loss_and_grad(model, p.replace(embeddings=e + step), batch)
        behind, _ = loss_and_grad(model, p.replace(embeddings=e - step), batch)
        assert (ahead - behind) / 2 == pytest.approx(float((grad * step).sum()), rel=1e-5)


def test_the_text_part_of_a_multimodal_checkpoint(tmp_path: Path) -> None:
    """Both spellings of the tensors' names; the vision tower is left where it is."""
    twin = write_folder(tmp_path / "text", "gemma3_text", seed=3)
    batch, drawn = [Example([10, 11], [20])], ([9, 30, 200], "system", 1)
    text = load_model(tmp_path / "text")
    expected = loss_and_grad(text, make_prompt(text, drawn), batch)
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    whole = {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "image_token_index": 399,
        "mm_tokens_per_image": 4, "text_config": config, "vision_config": {"hidden_size": 8},
        "tie_word_embeddings": config["tie_word_embeddings"],
    }  # fmt: skip
    from safetensors.torch import save_file

    state = {name: x.contiguous() for name, x in twin.state_dict().items() if name != "lm_head.weight"}
    for number, prefix in enumerate(("language_model.model.", "model.language_model.")):
        folder = tmp_path / str(number)
        folder.mkdir()
        tensors = {prefix + name.removeprefix("model."): x for name, x in state.items()}
        tensors |= {"vision_tower.x.weight": torch.ones(2, 2), "model.multi_modal_projector.y": torch.ones(2)}
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(whole))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((tmp_path / "text" / name).read_bytes())
        model = load_model(folder)
        loss, grad = loss_and_grad(model, make_prompt(model, drawn), batch)
        assert loss == expected[0]
        assert torch.equal(grad, expected[1])


@pytest.mark.parametrize(("head_dim", "part"), [(8, 0.5), (16, 0.75), (10, 0.4), (128, 0.75)])
def test_heads_that_are_partly_rotated_are_reordered(head_dim: int, part: float) -> None:
    rope = RopeConfig(1e4, part=part)
    order, frequencies = rotary_order(rope, head_dim), inverse_frequencies(rope, head_dim)
    assert order is not None
    assert sorted(order.tolist()) == list(range(head_dim))
    turned, half = rope.rotated(head_dim), head_dim // 2
    for pair_ in range(turned // 2):  # pair i of the model is pair (i, i + D/2) here
        assert (int(order[pair_]), int(order[pair_ + half])) == (pair_, pair_ + turned // 2)
    assert not frequencies[turned // 2 :].any()
    assert torch.equal(frequencies[: turned // 2], inverse_frequencies(RopeConfig(1e4), turned))


def test_bfloat16_norms_are_multiplied_in_float32(tmp_path: Path) -> None:
    """1 + w of Gemma would lose its last bits in bfloat16, and OLMo 2 rounds the product only."""
    for family in ("gemma3_text", "olmo2", "llama"):
        write_folder(tmp_path / family, family, dtype=torch.bfloat16)
        layer = load_model(tmp_path / family, dtype="bfloat16").weights.layers[0]
        norm = layer.attention_norm if layer.attention_norm is not None else layer.attention_post_norm
        assert norm is not None
        assert norm.dtype == (torch.bfloat16 if family == "llama" else torch.float32)


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ("phi3", {"interpolate_factor": 2}, "interpolate_factor"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers"),
        ("granite", {"residual_multiplier": "x"}, "residual_multiplier"),
        ("olmo2", {"mlp_bias": True}, "mlp_bias"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters"),
    ],
)
def test_what_a_family_does_not_compute_is_refused_by_name(family: str, changes: dict, named: str) -> None:
    config = {**SMALL, **EXTRA.get(family, {}), "architectures": [FAMILIES[family][1].__name__], **changes}
    with pytest.raises(ModelError, match=named) as caught:
        ModelConfig.from_hf(config, "the/config.json")
    assert "\n" not in str(caught.value)


LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.3, 1.9],
        "long_factor": [1.2, 2.0, 5.0, 9.0], "original_max_position_embeddings": 24,
    },
    "original_max_position_embeddings": 24,
}  # fmt: skip


def test_longrope_has_two_contexts(tmp_path: Path) -> None:
    """The original one, and with long_context the stated one; from folders and GGUF files, and back into both."""
    twin = write_folder(tmp_path / "m", "phi3", **LONGROPE)
    write_gguf(tmp_path / "m.gguf", twin)
    for path in (tmp_path / "m", tmp_path / "m.gguf"):
        plain, long = (read_checkpoint(path, long_context=wanted).config for wanted in (False, True))
        assert (plain.max_position, plain.context_told) == (24, "24 (256 with long_context)")
        assert (long.max_position, long.context_told) == (256, "256")
        said = model_fields(plain, "m")
        assert ModelConfig.from_hf(said, "said") == replace(plain, family="phi3")
        theirs = transformers.Phi3Config(**said)
        assert theirs.max_position_embeddings == 256
        assert theirs.original_max_position_embeddings == 24
    write_folder(tmp_path / "llama")
    with pytest.raises(ModelError, match=r"long_context is for models with LongRoPE .* holds 256 tokens"):
        read_checkpoint(tmp_path / "llama", long_context=True)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_longrope_beyond_the_original_context(tmp_path: Path, backend: str) -> None:
    """Texts longer than the original context as in transformers: loss, gradient and a greedy answer."""
    twin = write_folder(tmp_path, "phi3", **LONGROPE).requires_grad_(False)
    twin.set_attn_implementation("eager")
    short, model = (load_model(tmp_path, backend=backend, long_context=wanted) for wanted in (False, True))
    batch, drawn = (
        [Example([10 + n % 7 for n in range(30 + more)], [20, 21]) for more in (0, 9)],
        ([9, 30], "system", 1),
    )
    prompt = make_prompt(model, drawn)
    with pytest.raises(ContextError, match=r"context holds 24 \(256 with long_context\)"):
        loss_and_grad(short, prompt, batch)
    loss, grad = loss_and_grad(model, prompt, batch)
    expected, theirs = transformers_loss_and_grad(
        twin, prompt.embeddings, [render(model, prompt, example) for example in batch]
    )
    assert loss == pytest.approx(expected, rel=2e-5)
    assert relative_error(grad, theirs) < 2e-5
    rendered = render_query(model, prompt, [10 + n % 7 for n in range(40)])
    x, _ = transformers_inputs(twin, prompt.embeddings, rendered)
    written = twin.generate(inputs_embeds=x[None], max_new_tokens=8, do_sample=False, eos_token_id=None)
    [answer] = generate(model, prompt, [[10 + n % 7 for n in range(40)]], Sampling(max_new_tokens=8))
    assert answer.ids == written[0].tolist()[: len(answer.ids)]
