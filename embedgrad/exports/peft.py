"""The target `peft`: a prompt-tuning adapter, whose virtual tokens are everything in front of the query.

PEFT puts virtual tokens before the whole sequence. So the chat header, the prompt and the end of its turn become
virtual tokens as well, and the program feeds the tokens of the query and of what follows. This is exact where nothing
of the prompt stands behind the query. In a batch that is padded on the left PEFT puts the padding between virtual
tokens and query (peft #1093), which is not the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embedgrad.exports.same_ids import QUERIES, quietly_rendered
from embedgrad.exports.source import NamedPrompt, Source
from embedgrad.exports.tensor_file import tensor_entry, write_entries
from embedgrad.generation.generate import common_prefix
from embedgrad.prompt.conversation import Conversation
from embedgrad.prompt.rendering import Rendered
from embedgrad.prompt.tokenise import Slot
from embedgrad.util.errors import ExportError

CONFIG, WEIGHTS, TENSOR = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"
_OTHERS = ("x", "7", "Ünï", "«", '"', "<", "a film")  # queries that begin with characters of several kinds


@dataclass(frozen=True)
class VirtualTokens:
    """Everything in front of the query. ids, rows: [n] each; rows: the prompt row that a token shows, or −1.

    suffix: the text behind the query.
    """

    ids: list[int]
    rows: list[int]
    prefix_text: str
    suffix: str


def write_peft(source: Source, prompts: Sequence[NamedPrompt], out: Path) -> dict[str, Any]:
    """Writes the folder `out`, which exists and is empty. Returns facts. Raises ExportError."""
    if len(prompts) != 1:
        raise ExportError(f"a PEFT adapter holds one prompt, not {len(prompts)}; export each to a folder of its own.")
    (named,) = prompts
    tokens = virtual_tokens(source, named)
    rows = virtual_rows(source, named, tokens)
    c = source.config
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source.asked,
        "inference_mode": True,
        "num_virtual_tokens": len(rows),
        "token_dim": c.hidden_size,
        "num_transformer_submodules": 1,
        "num_attention_heads": c.num_heads,
        "num_layers": c.num_layers,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_name_or_path": None,
        "revision": None,
    }
    (out / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_entries(out / WEIGHTS, [tensor_entry(TENSOR, torch.float32, rows.shape, lambda: [rows])])
    (out / "README.md").write_text(_card(source, named, tokens), encoding="utf-8")
    return {"virtual tokens": len(rows), "prompt rows among them": sum(row >= 0 for row in tokens.rows)}


def virtual_tokens(source: Source, named: NamedPrompt) -> VirtualTokens:
    """Raises ExportError where the query does not stand behind all of the prompt, or does not begin a token."""
    template = named.prompt.template
    slot = Slot(tuple(named.prompt.token_ids), named.prompt.text, True)
    parts = Conversation(source.tokenizer, template, source.name).parts(slot, Slot((-1,), "x"))
    places = [number for number, part in enumerate(parts) if isinstance(part, Slot) and not part.is_prompt]
    shown = [number for number, part in enumerate(parts) if isinstance(part, Slot) and part.is_prompt]
    if len(places) != 1 or max(shown) > places[0]:
        raise ExportError(
            f"the prompt {named.name} stands behind the query or around it, and PEFT can only put it in front; "
            f"export it as hf or gguf."
        )
    texts = [part if isinstance(part, str) else part.text for part in parts]
    prefix, suffix = "".join(texts[: places[0]]), "".join(texts[places[0] + 1 :])
    rendered = [quietly_rendered(source, named.prompt, query) for query in (*QUERIES, *_OTHERS)]
    length = common_prefix(rendered)
    ids, rows = rendered[0].ids[:length], rendered[0].prompt_rows[:length]
    if any(row >= 0 for sequence in rendered for row in sequence.prompt_rows[length:]):
        raise ExportError(
            f"the prompt {named.name} does not stand in a prefix that all queries share; PEFT cannot hold it."
        )
    return VirtualTokens(ids, rows, prefix, suffix)


def virtual_rows(source: Source, named: NamedPrompt, tokens: VirtualTokens) -> Tensor:
    """The embeddings of the virtual tokens as the model takes them, [n, d] float32."""
    rows = torch.tensor(tokens.rows)
    fixed = source.embedding_rows(tokens.ids)
    found = torch.where((rows >= 0)[:, None], named.prompt.embeddings.detach().float()[rows.clamp_min(0)], fixed)
    return found if source.input_scale == 1 else found * source.input_scale


def rest_of(rendered: Rendered, tokens: VirtualTokens) -> list[int]:
    """The ids that the program feeds behind the virtual tokens."""
    return rendered.ids[len(tokens.ids) :]


def _card(source: Source, named: NamedPrompt, tokens: VirtualTokens) -> str:
    return "\n".join(
        [
            f"# A prompt for {source.name}",
            "",
            f"A PEFT prompt-tuning adapter of {len(tokens.ids)} virtual tokens: everything in front of the query, with",
            f"the prompt {named.name}, which embedgrad tuned. The program feeds the tokens behind the virtual ones:",
            "",
            "    import torch",
            "    from peft import PeftModel",
            "    from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"    BASE = {source.asked!r}",
            f"    PREFIX = {tokens.prefix_text!r}",
            f"    SUFFIX = {tokens.suffix!r}  # behind the query",
            "    tokenizer = AutoTokenizer.from_pretrained(BASE)",
            '    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), "PATH")',
            f"    ids = {_tokenising(source, named, tokens)}",
            "    answer = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=32, do_sample=False)",
            "",
            "One query at a time: in a batch that is padded on the left PEFT puts the padding between prompt and query",
            "(peft #1093), and the answers change.",
            "",
        ]
    )


def _tokenising(source: Source, named: NamedPrompt, tokens: VirtualTokens) -> str:
    """A line of Python that gives the ids behind the virtual tokens."""
    rest = rest_of(quietly_rendered(source, named.prompt, QUERIES[0]), tokens)
    whole = source.tokenizer.encode(tokens.prefix_text + QUERIES[0] + tokens.suffix)
    if whole[len(whole) - len(rest) :] == rest:  # the virtual tokens may hold a BOS token that `whole` lacks
        return f"tokenizer(PREFIX + query + SUFFIX, add_special_tokens=False).input_ids[{len(whole) - len(rest)}:]"
    return "tokenizer(query + SUFFIX, add_special_tokens=False).input_ids"
