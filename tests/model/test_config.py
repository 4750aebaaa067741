"""ModelConfig against transformers' own configuration classes."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.model.config import ModelConfig
from embedgrad.model.rope import inverse_frequencies
from embedgrad.util.errors import ModelError
from tests.engine.drawn import phi_rotations
from tests.model.published import PUBLISHED_FAMILIES
from tests.model.tiny import EXTRA, FAMILIES, SMALL

ARCHITECTURE = {family: model_class.__name__ for family, (_, model_class) in FAMILIES.items()}
# config.json files as published, in the spelling of transformers 4.
PUBLISHED: dict[str, dict[str, Any]] = {
    "SmolLM2-135M-Instruct": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 576,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        "transformers_version": "4.42.3",
        "use_cache": True,
        "vocab_size": 49152,
    },
    "Llama-3.2-1B": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0",
        "use_cache": True,
        "vocab_size": 128256,
    },
    "Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.34.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
    },
    "Qwen2.5-Math-1.5B-Instruct": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 1536,
        "initializer_range": 0.02,
        "intermediate_size": 8960,
        "max_position_embeddings": 4096,
        "max_window_layers": 21,
        "model_type": "qwen2",
        "num_attention_heads": 12,
        "num_hidden_layers": 28,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.42.4",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    **PUBLISHED_FAMILIES,
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}


def rotary(config: Any) -> Any:
    """transformers' rotary embedding."""
    kind = config.model_type.removesuffix("_text")
    module = getattr(transformers.models, kind)
    name = f"{type(config).__name__.removesuffix('Config').removesuffix('Text')}RotaryEmbedding"
    return getattr(getattr(module, f"modeling_{kind}"), name)(config)


def windows_of(config: Any) -> list[int | None]:
    """What transformers' layers do, by their type where they have one."""
    window = getattr(config, "sliding_window", None)
    if config.model_type in ("mistral", "phi3"):
        return [window] * config.num_hidden_layers
    if not hasattr(config, "layer_types") or not getattr(config, "use_sliding_window", True):
        return [None] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in config.layer_types]


def same_rotations(ours: ModelConfig, theirs: Any) -> None:
    """The frequencies and the attention factor, of both kinds of layers where there are two."""
    embedding = rotary(theirs)
    ropes = {"": ours.rope}
    if ours.local_rope is not None:
        kinds = {"full_attention": ours.rope, "sliding_attention": ours.local_rope}
        ropes = {f"{kind}_": rope for kind, rope in kinds.items() if kind in theirs.layer_types}
    for prefix, rope in ropes.items():
        turned = rope.rotated(ours.head_dim) // 2
        found = inverse_frequencies(rope, ours.head_dim)
        assert torch.equal(found[:turned], getattr(embedding, f"{prefix}inv_freq"))
        assert not found[turned:].any()
        assert rope.attention_factor == getattr(embedding, f"{prefix}attention_scaling")


def assert_same(ours: ModelConfig, theirs: Any) -> None:
    """Every value that transformers' configuration object and layers would use."""
    family = theirs.model_type
    assert ours.family == family
    assert ours.num_layers == theirs.num_hidden_layers
    assert ours.num_heads == theirs.num_attention_heads
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    for name in ("hidden_size", "intermediate_size", "vocab_size"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.rms_eps == theirs.rms_norm_eps
    rope = theirs.rope_parameters
    kind = rope.get("rope_type")
    longest = theirs.max_position_embeddings
    if kind == "yarn":
        longest = max(longest, int(rope["factor"] * rope["original_max_position_embeddings"]))
    if kind == "longrope":
        longest = min(longest, rope["original_max_position_embeddings"])
    assert ours.max_position == longest
    assert ours.tied == theirs.tie_word_embeddings
    assert list(ours.windows) == windows_of(theirs)
    same_rotations(ours, theirs)
    scalar = getattr(theirs, "query_pre_attn_scalar", ours.head_dim)
    assert ours.scale == getattr(theirs, "attention_multiplier", scalar**-0.5)
    for name, own in (
        ("embedding_multiplier", ours.embedding_scale), ("residual_multiplier", ours.residual_scale),
        ("logits_scaling", ours.logit_divisor), ("final_logit_softcapping", ours.logit_softcap),
        ("attn_logit_softcapping", ours.attention_softcap),
    ):  # fmt: skip
        assert own == getattr(theirs, name, own)
    rotated = getattr(theirs, "no_rope_layers", [1] * ours.num_layers)[: ours.num_layers]
    assert [int(layer not in ours.unrotated) for layer in range(ours.num_layers)] == list(rotated)


def assert_shapes(ours: ModelConfig, theirs: Any) -> None:
    with torch.device("meta"):
        model = FAMILIES[theirs.model_type][1](theirs)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if theirs.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert ours.shapes() == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files(name: str) -> None:
    raw = PUBLISHED[name]
    text = {**raw, **raw.get("text_config", {})}
    fields = {key: value for key, value in text.items() if key not in ("text_config", "vision_config")}
    theirs = FAMILIES[fields["model_type"]][0](**json.loads(json.dumps(fields)))
    assert_same(ModelConfig.from_hf(raw, name), theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults(family: str) -> None:
    """What transformers writes for its default configuration, whole or only what differs, and with no architecture."""
    theirs = FAMILIES[family][0]()
    for use_diff in (True, False):
        written = json.loads(theirs.to_json_string(use_diff=use_diff))
        assert_same(ModelConfig.from_hf(written, family), theirs)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    bare = {name: getattr(theirs, name) for name in sizes} | {"architectures": [ARCHITECTURE[family]]}
    assert_same(ModelConfig.from_hf(bare, family), theirs)


def yarn_keys() -> st.SearchStrategy[dict[str, Any]]:
    """The keys that transformers reads for YaRN, each of which may be missing."""
    scale = st.floats(0.5, 2)
    keys: dict[str, st.SearchStrategy[Any]] = {
        "original_max_position_embeddings": st.integers(8, 9000), "attention_factor": st.floats(0.5, 2),
        "beta_fast": st.integers(8, 64), "beta_slow": st.integers(1, 4), "mscale": scale, "mscale_all_dim": scale,
        "truncate": st.booleans(),
    }  # fmt: skip
    return st.fixed_dictionaries({}, optional=keys)


@st.composite
def hf_configs(draw: st.DrawFn) -> Any:
    """A random configuration object of one of the families."""
    family = draw(st.sampled_from(list(FAMILIES)))
    groups, kv_heads = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    heads, layers = groups * kv_heads, draw(st.integers(1, 6))
    half = draw(st.integers(1, 9))
    values: dict[str, Any] = {
        "vocab_size": draw(st.integers(1, 500)),
        "hidden_size": heads * 2 * half,
        "intermediate_size": draw(st.integers(1, 90)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": draw(st.integers(1, 10000)),
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "tie_word_embeddings": draw(st.booleans()),
    }
    without = ("qwen2", "olmo2", "smollm3", "phi3", "granite")
    if "head_dim" in EXTRA.get(family, {}) or (family not in without and draw(st.booleans())):
        values["head_dim"] = 2 * draw(st.integers(1, 9))
    rope: dict[str, Any] = {"rope_theta": draw(st.sampled_from([10000, 10000.0, 5e5, 1e6])), "rope_type": "default"}
    kind = "default" if family == "phi3" else draw(st.sampled_from(["default", "linear", "llama3", "yarn"]))
    if kind != "default":
        rope |= {"rope_type": kind, "factor": draw(st.floats(1, 64))}
    if kind == "llama3":
        low = draw(st.floats(0.5, 3))
        rope |= {"low_freq_factor": low, "high_freq_factor": low + draw(st.floats(0.5, 6))}
        if draw(st.booleans()):
            rope["original_max_position_embeddings"] = draw(st.integers(1, 9000))
    if kind == "yarn":
        rope |= draw(yarn_keys())
    values["rope_parameters"] = rope
    values |= {name: value for name, value in EXTRA.get(family, {}).items() if name not in values}
    if family == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": draw(st.sampled_from([10000.0, 3e4]))}
        kinds = st.sampled_from(["full_attention", "sliding_attention"])
        values["layer_types"] = draw(st.lists(kinds, min_size=layers, max_size=layers))
        values["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    if family == "phi3":
        values["rope_parameters"] = draw(phi_rotations(2 * half))["rope_parameters"]
    if family in ("llama", "qwen3", "granite", "smollm3", "olmo2"):
        values["attention_bias"] = draw(st.booleans())
    if family in ("llama", "granite", "smollm3"):
        values["mlp_bias"] = draw(st.booleans())
    window = draw(st.none() | st.integers(1, 50))
    if family in ("mistral", "phi3"):
        values["sliding_window"] = window
    if family in ("qwen2", "qwen3"):
        values |= {"use_sliding_window": draw(st.booleans()), "sliding_window": window}
        values["max_window_layers"] = draw(st.integers(0, 7))
        if values["use_sliding_window"] and window and draw(st.booleans()):
            kinds = st.sampled_from(["full_attention", "sliding_attention"])
            values["layer_types"] = draw(st.lists(kinds, min_size=layers, max_size=layers))
    return FAMILIES[family][0](**values)


@settings(max_examples=60, deadline=None)
@given(hf_configs(), st.booleans(), st.booleans())
def test_any_configuration(theirs: Any, old_spelling: bool, use_diff: bool) -> None:
    written = json.loads(theirs.to_json_string(use_diff=use_diff))
    if old_spelling and theirs.model_type == "gemma3_text":
        ropes = written.pop("rope_parameters")
        full, local = ropes["full_attention"], ropes["sliding_attention"]
        written |= {"rope_theta": full.pop("rope_theta"), "rope_local_base_freq": local["rope_theta"]}
        written["rope_scaling"] = full if full["rope_type"] != "default" else None
    elif old_spelling:
        rope = written.pop("rope_parameters")
        written["rope_theta"] = rope.pop("rope_theta")
        written["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    ours = ModelConfig.from_hf(written, "config.json")
    assert_same(ours, theirs)
    assert_shapes(ours, theirs)


def llama(**changes: Any) -> dict[str, Any]:
    return {**SMALL, "architectures": ["LlamaForCausalLM"], "model_type": "llama", **changes}


def qwen(**changes: Any) -> dict[str, Any]:
    return {**SMALL, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **changes}


@pytest.mark.parametrize(
    ("config", "named", "value"),
    [
        (llama(hidden_act="gelu"), "hidden_act", "gelu"),
        (llama(rope_scaling={"type": "yarn", "factor": "4"}), "factor", "'4'"),
        (llama(rope_scaling={"type": "yarn", "factor": 4.0, "short_factor": [1]}), "short_factor", "[1]"),
        (llama(rope_scaling={"type": "yarn", "factor": 4.0, "beta_fast": 1, "beta_slow": 2}), "beta_slow", "beta_fast"),
        (llama(rope_scaling={"rope_type": "dynamic", "factor": 4.0}), "scaling", "dynamic"),
        (llama(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}), "short_factor", "None"),
        (llama(rope_scaling={"type": "longrope", "short_factor": [1.0, "x"]}), "short_factor", "'x'"),
        (llama(rope_scaling={"type": "longrope", "short_factor": [1.0]}), "short_factor has 1 values", "4"),
        (llama(rope_scaling={"type": "mrope", "mrope_section": [1, 2]}), "scaling", "mrope"),
        (llama(rope_scaling={"rope_type": "linear"}), "factor", "missing"),
        (llama(rope_scaling={"rope_type": "linear", "factor": 0}), "factor", "0"),
        (llama(rope_scaling={"rope_type": "linear", "factor": math.nan}), "factor", "nan"),
        (llama(rope_scaling="linear"), "rope_scaling", "linear"),
        (llama(rope_theta=-1), "rope_theta", "-1"),
        (llama(partial_rotary_factor=0.5), "partial_rotary_factor", "0.5"),
        (llama(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}), "partial_rotary_factor", "0.5"),
        (llama(quantization_config={"quant_method": "gptq"}), "quantised by 'gptq'", "GGUF"),
        (llama(quantization_config={"load_in_4bit": True}), "quantised", "weights=int8"),
        (llama(compression_config={"quant_method": "compressed-tensors"}), "quantised by", "compressed-tensors"),
        (llama(quantization={"quant_algo": "FP8"}), "quantised by", "FP8"),
        (llama(embedding_multiplier=12.0), "embedding_multiplier", "12.0"),
        (llama(logits_scaling=8), "logits_scaling", "8"),
        (llama(residual_multiplier=0.2), "residual_multiplier", "0.2"),
        (llama(num_local_experts=8), "num_local_experts", "8"),
        (llama(rope_interleaved=True), "rope_interleaved", "True"),
        (llama(sliding_window=8), "sliding_window", "8"),
        (llama(something_new=""), "something_new", "''"),
        (llama(pruned_heads={"0": [1]}), "pruned_heads", "[1]"),
        (llama(hidden_size=0), "hidden_size", "0"),
        (llama(hidden_size="32"), "hidden_size", "'32'"),
        (llama(hidden_size=None), "hidden_size", "missing"),
        (llama(num_hidden_layers=10**9), "num_hidden_layers", "1000000000"),
        (llama(num_key_value_heads=3), "key/value heads", "3"),
        (llama(head_dim=7), "head size", "7"),
        (llama(rms_norm_eps=0), "rms_norm_eps", "0"),
        (llama(tie_word_embeddings="yes"), "tie_word_embeddings", "yes"),
        (llama(architectures=["GPT2LMHeadModel"]), "architecture", "LlamaForCausalLM, MistralForCausalLM"),
        (llama(architectures=["MistralForCausalLM"]), "model_type", "llama"),
        (llama(architectures=None, model_type="gemma"), "architecture", "gemma"),
        (llama(architectures=["LlamaForCausalLM", "X"]), "architecture", "X"),
        (qwen(attention_bias=True), "attention_bias", "True"),
        (qwen(layer_types=["full_attention"]), "layer_types", "full_attention"),
        (qwen(layer_types=["full_attention", "linear_attention"]), "layer_types", "linear_attention"),
        (qwen(layer_types=["full_attention", "sliding_attention"]), "layer_types", "use_sliding_window"),
        (qwen(use_sliding_window=True, sliding_window=0), "sliding_window", "0"),
        (qwen(use_sliding_window=True, max_window_layers="x"), "max_window_layers", "x"),
    ],
)
def test_refused(config: dict[str, Any], named: str, value: str) -> None:
    """The sentence names the file, the field and its value."""
    with pytest.raises(ModelError) as caught:
        ModelConfig.from_hf(config, "the/config.json")
    message = str(caught.value)
    assert message.startswith("the/config.json")
    assert named in message
    assert value in message
    assert "\n" not in message


def test_fields_that_say_nothing_pass() -> None:
    plain = ModelConfig.from_hf(llama(), "x")
    harmless = llama(quantization_config=None, use_mrope=False, is_decoder=False, torch_dtype="bfloat16", top_k=5)
    assert ModelConfig.from_hf(harmless, "x") == plain


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_sequence_length", 2048), ("model_max_length", 4096), ("max_seq_len", 9),
        ("tokenizer_padding_side", "left"),
        ("auto_map", {"AutoModelForCausalLM": "modeling_x.X"}), ("use_flash_attn", True),
    ],
)  # fmt: skip
def test_fields_that_compute_nothing_pass(name: str, value: Any) -> None:
    assert ModelConfig.from_hf(llama(**{name: value}), "x") == ModelConfig.from_hf(llama(), "x")


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["resid", "embd", "attn", "ffn", "hidden", "attention_probs", "classifier", "mlp", "embedding"]),
    st.sampled_from(["dropout", "pdrop", "dropout_prob", "dropout_rate", "layerdrop"]),
    st.sampled_from([0, 0.0, 0.1, None]),
)
def test_dropouts_act_in_training_only(part: str, kind: str, value: float | None) -> None:
    assert ModelConfig.from_hf(llama(**{f"{part}_{kind}": value}), "x") == ModelConfig.from_hf(llama(), "x")


def one_sentence(error: ModelError) -> None:
    assert "\n" not in str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([llama(), qwen()]), st.data())
def test_any_value_is_read_or_refused(config: dict[str, Any], data: st.DataObject) -> None:
    names = [*config, "rope_scaling", "rope_parameters", "rope_theta", "layer_types", "sliding_window", "head_dim"]
    names += ["use_sliding_window", "max_window_layers", "rms_norm_eps", "hidden_act", "tie_word_embeddings"]
    changes = data.draw(st.dictionaries(st.sampled_from(names), JSON, max_size=3))
    try:
        result = ModelConfig.from_hf({**config, **changes}, "x")
    except ModelError as error:
        one_sentence(error)
    else:
        assert inverse_frequencies(result.rope, result.head_dim).shape == (result.head_dim // 2,)


def test_float64_frequencies_round_to_the_float32_ones() -> None:
    for raw in PUBLISHED.values():
        config = ModelConfig.from_hf(raw, "x")
        wide = inverse_frequencies(config.rope, config.head_dim, torch.float64)
        assert wide.dtype == torch.float64
        torch.testing.assert_close(wide.float(), inverse_frequencies(config.rope, config.head_dim), rtol=2e-6, atol=0)
