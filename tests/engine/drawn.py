"""Models, prompts and batches that hypothesis draws."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from embedgrad.data.example import Example
from embedgrad.engine.model import Model, load_model
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.template import Template
from tests.model.tiny import EXTRA, FAMILIES, write_folder

TEMPLATES = {
    "system": Template.chat([{"role": "system", "content": "{prompt}"}, {"role": "user", "content": "{query}"}]),
    "before": Template.chat([{"role": "user", "content": "Note: {prompt}\n{query}"}]),
    "after": Template.chat([{"role": "user", "content": "{query}\n{prompt} Now."}]),
    "both": Template.chat(
        [{"role": "system", "content": "{prompt}"}, {"role": "user", "content": "{query} again: {prompt}"}]
    ),
    "plain": Template.plain(),
}
VOCABULARY = 400  # ids that the tiny tokenizers know


@dataclass(frozen=True)
class Pair:
    """The same weights twice: ours, and the transformers model they were written by."""

    model: Model
    twin: torch.nn.Module


@st.composite
def configs(draw: Any) -> tuple[str, dict[str, Any]]:
    """A family and the sizes of a tiny model of it."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    groups = draw(st.sampled_from([1, 2, 3]))
    heads = groups * draw(st.sampled_from([1, 2, 3]))
    head_dim, layers = draw(st.sampled_from([4, 8, 10])), draw(st.integers(1, 4))
    sizes: dict[str, Any] = {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "hidden_size": heads * head_dim,
        "intermediate_size": draw(st.sampled_from([17, 48, 96])),
        "tie_word_embeddings": draw(st.booleans()),
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
    }
    if "head_dim" in EXTRA.get(family, {}) or family in ("mistral", "llama"):
        sizes["head_dim"] = head_dim
        sizes["hidden_size"] = heads * draw(st.sampled_from([4, 6, 10]))
    if family == "llama":
        sizes["attention_bias"], sizes["mlp_bias"] = draw(st.booleans()), draw(st.booleans())
        sizes["rope_parameters"] = draw(st.sampled_from(_ROPES))
    if family == "mistral":
        sizes["sliding_window"] = draw(st.sampled_from([None, 3, 7, 64]))
    if family == "ministral":
        sizes |= {"sliding_window": draw(st.sampled_from([3, 7])), "layer_types": draw(layer_types(layers))}
    if family in ("gemma2", "gemma3_text"):
        sizes["hidden_size"] = heads * draw(st.sampled_from([4, 6]))
        sizes |= {"sliding_window": draw(st.sampled_from([3, 7])), "query_pre_attn_scalar": draw(st.integers(2, 20))}
        sizes["final_logit_softcapping"] = draw(st.sampled_from([None, 3.0]))
    if family == "gemma2":
        sizes["attn_logit_softcapping"] = draw(st.sampled_from([None, 0.5, 5.0]))
    if family == "gemma3_text":
        sizes["layer_types"] = draw(layer_types(layers))
        sizes["attention_bias"] = draw(st.booleans())
    if family in ("granite", "smollm3"):
        sizes["attention_bias"], sizes["mlp_bias"] = draw(st.booleans()), draw(st.booleans())
    if family in ("granite", "smollm3", "olmo2", "mistral"):
        sizes["rope_parameters"] = draw(st.sampled_from(_ROPES))
    if family == "granite":
        names = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
        sizes |= {name: draw(st.sampled_from([0.3, 1.0, 4.0])) for name in names}
    if family == "smollm3":
        sizes["no_rope_layers"] = draw(st.lists(st.sampled_from([0, 1]), min_size=4, max_size=4))
        if draw(st.booleans()):
            sizes |= {"use_sliding_window": True, "sliding_window": 3}
    if family == "phi3":
        sizes |= draw(phi_rotations(head_dim))
        sizes["sliding_window"] = draw(st.sampled_from([None, 3, 7]))
    if family in ("qwen2", "qwen3") and draw(st.booleans()):
        sizes |= {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": draw(st.integers(0, 2))}
    return family, sizes


def layer_types(layers: int) -> st.SearchStrategy[list[str]]:
    """Layers with and without a window, in any order."""
    return st.lists(st.sampled_from(["full_attention", "sliding_attention"]), min_size=layers, max_size=layers)


@st.composite
def phi_rotations(draw: Any, head_dim: int) -> dict[str, Any]:
    """Whole or partial rotation, plain or LongRoPE; texts in these tests are shorter than the original context."""
    turned = draw(st.sampled_from([2, 4, head_dim]))
    rope: dict[str, Any] = {"rope_theta": 10000.0, "partial_rotary_factor": (turned + 0.5) / head_dim}
    if turned == head_dim:
        rope["partial_rotary_factor"] = 1.0
    if draw(st.booleans()):
        factors = st.lists(st.floats(0.5, 8), min_size=turned // 2, max_size=turned // 2)
        rope |= {"rope_type": "longrope", "short_factor": draw(factors), "long_factor": draw(factors)}
        rope["original_max_position_embeddings"] = 128
    return {"rope_parameters": rope, "original_max_position_embeddings": 128}


_ROPES = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
]  # fmt: skip


@functools.lru_cache(maxsize=64)
def _written(key: str, dtype: torch.dtype) -> Pair:
    family, sizes, seed = eval(key)
    with tempfile.TemporaryDirectory() as folder:
        twin = write_folder(Path(folder), family, seed=seed, **sizes)
        twin.set_attn_implementation("eager")
        return Pair(load_model(folder, dtype=dtype), twin.requires_grad_(False))


def pair(family: str, sizes: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32) -> Pair:
    """The drawn model in both libraries."""
    return _written(repr((family, sizes, seed)), dtype)


@st.composite
def batches(draw: Any, most: int = 5) -> list[Example]:
    """Examples of token ids with shared and repeated queries, and targets that share their beginning."""
    tokens = st.lists(st.integers(5, VOCABULARY - 1), min_size=1, max_size=12)
    pool = draw(st.lists(tokens, min_size=1, max_size=3))
    examples = []
    for _ in range(draw(st.integers(1, most))):
        query = draw(st.sampled_from(pool)) + draw(st.lists(st.integers(5, 8), max_size=3))
        target = draw(st.lists(st.integers(5, 7), min_size=1, max_size=4))
        examples.append(Example(query, target, draw(st.sampled_from([1.0, 1.0, 0.5, 3.0]))))
    return examples


@st.composite
def prompts(draw: Any) -> tuple[list[int], str, int]:
    """Token ids, the name of a template, and a seed for the noise on the embeddings."""
    ids = draw(st.lists(st.integers(5, VOCABULARY - 1), min_size=1, max_size=9))
    return ids, draw(st.sampled_from(sorted(TEMPLATES))), draw(st.integers(0, 99))


def make_prompt(model: Model, drawn: tuple[list[int], str, int]) -> SoftPrompt:
    """The drawn prompt, moved away from its anchor."""
    ids, template, seed = drawn
    prompt = SoftPrompt.from_ids(model, ids, template=TEMPLATES[template])
    noise = torch.randn(prompt.embeddings.shape, generator=torch.Generator().manual_seed(seed))
    return prompt.replace(embeddings=prompt.embeddings + 0.1 * noise)
