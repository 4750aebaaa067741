"""The README.md of an export: what is inside and how it is called."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from embedgrad.exports.chat_template import BARE, VARIABLE
from embedgrad.exports.source import NamedPrompt, Source
from embedgrad.exports.vocabulary import Vocabulary
from embedgrad.prompt.template import PROMPT, Template


def hf_card(source: Source, prompts: Sequence[NamedPrompt], words: Vocabulary, facts: Mapping[str, Any]) -> str:
    """The card of a folder for transformers, vLLM, SGLang and MLX."""
    return "\n".join(
        [
            *_head(source, prompts),
            *_prompt_table(prompts, words),
            *_calling(prompts, words),
            "## What was changed",
            "",
            *_facts(facts),
            "",
            "`generation_config.json` suppresses the new tokens. An engine that ignores `suppress_tokens` (vLLM, for",
            "one) may choose one, which decodes to nothing; `embedgrad export --untie` gives them logits of 0."
            if facts["head"] == "tied"
            else "one) sees the head's own rows for them, which are 0 or were never trained.",
            "",
        ]
    )


def gguf_card(
    source: Source, prompts: Sequence[NamedPrompt], words: Vocabulary, facts: Mapping[str, Any], file: str
) -> str:
    """The card of a GGUF file."""
    command = [f"    llama-server --model {file} --jinja", ""]
    return "\n".join(
        [
            *_head(source, prompts), *_prompt_table(prompts, words), "## How it is called", "", *command,
            *_choosing(prompts, words), "## What was changed", "", *_facts(facts), "",
        ]
    )  # fmt: skip


def _head(source: Source, prompts: Sequence[NamedPrompt]) -> list[str]:
    return [
        f"# {source.name} with {'tuned prompts' if len(prompts) > 1 else 'a tuned prompt'}",
        "",
        f"A copy of {source.name} whose vocabulary has new tokens. Their embeddings are prompts that embedgrad tuned.",
        "The chat template puts a prompt where it was tuned. All other weights are the model's, and so is the licence.",
        "",
    ]


def _prompt_table(prompts: Sequence[NamedPrompt], words: Vocabulary) -> list[str]:
    lines = ["| prompt | rows | first and last id | starts from | stands in |", "| --- | --- | --- | --- | --- |"]
    for named, tokens in zip(prompts, words.tokens, strict=True):
        text = " ".join(named.prompt.text.split()).replace("|", "\\|")
        short = text if len(text) <= 80 else text[:77] + "..."
        place = _place(named.prompt.template)
        cells = (named.name, len(tokens.shown_ids), f"{tokens.ids[0]}, {tokens.ids[-1]}", short, place)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return [*lines, ""]


def _place(template: Template) -> str:
    if template.kind != "chat":
        return "plain text"
    roles = [role for role, content in template.messages if PROMPT in content]
    return " and ".join(f"the {role} turn" for role in dict.fromkeys(roles))


def _calling(prompts: Sequence[NamedPrompt], words: Vocabulary) -> list[str]:
    return [
        "## How it is called",
        "",
        "    from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        '    tokenizer = AutoTokenizer.from_pretrained("PATH")',
        '    model = AutoModelForCausalLM.from_pretrained("PATH")',
        '    messages = [{"role": "user", "content": "..."}]',
        "    inputs = tokenizer.apply_chat_template(",
        '        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        "    )",
        "    answer = model.generate(**inputs, max_new_tokens=32, do_sample=False)",
        "",
        "or `vllm serve PATH`, `python -m sglang.launch_server --model-path PATH`, `mlx_lm.server --model PATH`, and",
        "any OpenAI client.",
        "",
        *_choosing(prompts, words),
    ]


def _choosing(prompts: Sequence[NamedPrompt], words: Vocabulary) -> list[str]:
    first = prompts[0].name
    lines = [
        f"- `{first}` is used where nothing is chosen. `chat_template_kwargs` chooses another one: "
        f'`{{"{VARIABLE}": "{prompts[-1].name}"}}`; `"{BARE}"` is the model without a prompt.'
    ]
    if any(_has_system(named) for named in prompts):
        lines.append("- A system message of the caller takes the place of a prompt that stands in the system turn.")
    lines.append("- In a text of your own, a prompt is the text of its tokens, one after the other:")
    for tokens in words.tokens:
        shown = json.dumps(tokens.placeholder) if not words.special else f"`{tokens.texts[0]}…{tokens.texts[-1]}`"
        lines.append(f"  {tokens.name}: {shown}")
    return [*lines, ""]


def _has_system(named: NamedPrompt) -> bool:
    return any(role == "system" and PROMPT in content for role, content in named.prompt.template.messages)


def _facts(facts: Mapping[str, Any]) -> list[str]:
    return [f"- {name}: {f'{value:.2g}' if isinstance(value, float) else value}" for name, value in facts.items()]
