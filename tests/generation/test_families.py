"""Greedy answers of every family, token for token those of transformers, on every backend that a CPU has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from embedgrad.data.example import Example
from embedgrad.engine.model import load_model
from embedgrad.generation.generate import generate
from embedgrad.generation.prefill import prefill_prefix, prefill_suffixes
from embedgrad.generation.sampling import Sampling
from embedgrad.prompt.rendering import render, render_query
from tests.engine.drawn import make_prompt
from tests.model.tiny import FAMILIES, random_model, write_folder, write_gguf
from tests.truth import relative_error, transformers_inputs

QUERIES = [[10, 11, 12, 13, 14, 15, 16], [50, 60]]
PROMPT = ([9, 30, 200, 50, 60], "system", 1)
# GGUF files hold neither of these numbers; llama.cpp's rule for them is what the tiny models have here.
IN_GGUF = {
    "smollm3": {"no_rope_layer_interval": 4},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8, "sliding_window_pattern": 6},
    "ministral": {"sliding_window": 300},
    "mistral": {"sliding_window": 300},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_equal_transformers(tmp_path: Path, family: str) -> None:
    twin = write_folder(tmp_path / "m", family, num_hidden_layers=4, **IN_GGUF.get(family, {}))
    twin.set_attn_implementation("eager")
    write_gguf(tmp_path / "m.gguf", twin)
    wanted: list[list[int]] = []
    for backend, name in (("reference", "m"), ("native", "m"), ("naive", "m"), ("native", "m.gguf")):
        model = load_model(tmp_path / name, backend=backend)
        prompt = make_prompt(model, PROMPT)
        answers = generate(model, prompt, QUERIES, Sampling(max_new_tokens=12, temperature=0))
        for number, (query, answer) in enumerate(zip(QUERIES, answers, strict=True)):
            if number == len(wanted):
                rendered = render(model, prompt, Example(query, [5]))
                count = len(rendered.ids) - sum(rendered.target_mask)
                x, table = transformers_inputs(twin, prompt.embeddings, rendered)
                wanted.append(_greedy(twin, x[:count], table, len(answer.ids)))
            assert list(answer.ids) == wanted[number], (backend, name)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stored_blocks_decode_in_csrc(tmp_path: Path, family: str, kind: str) -> None:
    """The logits of the dequantised weights, but for activations rounded to 8 bits: prefix, suffixes and new tokens."""
    pytest.importorskip("embedgrad.backends.native")
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    own = {"head_dim": 64, **IN_GGUF.get(family, {})}
    own |= {"query_pre_attn_scalar": 64} if family.startswith("gemma") else {}
    twin = random_model(family, scale=0.05, num_hidden_layers=6, **sizes, **own)
    write_gguf(tmp_path / "m.gguf", twin, kind=kind)
    stored = load_model(tmp_path / "m.gguf", weights="stored", backend="native")
    wide = load_model(tmp_path / "m.gguf", weights="fp32", backend="reference")
    assert stored.native_decoder is not None
    assert stored.native_decoder.in_blocks
    prompt, found = make_prompt(wide, PROMPT), []
    rendered = [render_query(wide, prompt, query) for query in QUERIES]
    for model in (stored, wide):
        prefix = prefill_prefix(model, prompt.embeddings, rendered[0], 3)
        cache, logits = prefill_suffixes(model, prompt.embeddings, rendered, prefix)
        steps = [cache.next_logits(torch.tensor([30 + step + i for i in range(len(QUERIES))])) for step in range(9)]
        found.append(torch.stack([logits, *steps]))
    assert relative_error(found[0], found[1]) < 0.03


def _greedy(twin: torch.nn.Module, x: torch.Tensor, table: torch.Tensor, count: int) -> list[int]:
    """The likeliest tokens behind the inputs x [T, d], each computed without a cache."""
    found: list[int] = []
    with torch.no_grad():
        for _ in range(count):
            found.append(int(twin(inputs_embeds=x[None], use_cache=False).logits[0, -1].argmax()))
            x = torch.cat([x, table[found[-1]][None]])
    return found
