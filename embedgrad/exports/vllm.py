"""The target `vllm`: a prompt as requests with `prompt_embeds`, and a program that sends them.

vLLM takes embeddings as base64 of what torch.save writes; it reads them with weights_only, so that nothing in them is
executed, and safetensors are refused. Nothing of embedgrad reads these files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embedgrad.exports import send_to_vllm
from embedgrad.exports.same_ids import QUERIES, quietly_rendered
from embedgrad.exports.send_to_vllm import encoded
from embedgrad.exports.source import NamedPrompt, Source
from embedgrad.prompt.conversation import Conversation
from embedgrad.prompt.template import PROMPT, QUERY
from embedgrad.prompt.tokenise import Slot
from embedgrad.util.errors import ExportError


def write_vllm(source: Source, prompts: Sequence[NamedPrompt], out: Path) -> dict[str, Any]:
    """Writes the folder `out`, which exists and is empty. Returns facts. Raises ExportError."""
    facts: dict[str, Any] = {}
    for named in prompts:
        content = requests(source, named)
        (out / f"{named.name}.json").write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
        ways = ["completions", "mixed ids"] + (["chat"] if content["chat"] is not None else [])
        facts[named.name] = f"{len(named.prompt.token_ids)} rows, for {', '.join(ways)}"
    shutil.copyfile(Path(send_to_vllm.__file__), out / "send_to_vllm.py")
    (out / "README.md").write_text(_card(source, prompts), encoding="utf-8")
    return facts


def requests(source: Source, named: NamedPrompt) -> dict[str, Any]:
    """Everything that `send_to_vllm.py` needs of one prompt. Raises ExportError where its ids would not be ours."""
    prompt = named.prompt
    slot = Slot(tuple(prompt.token_ids), PROMPT, True)
    conversation = Conversation(source.tokenizer, prompt.template, source.name)
    pieces = conversation.parts(slot, Slot((-1,), QUERY))
    parts: list[str] = []
    for piece in pieces:
        text = piece if isinstance(piece, str) else piece.text
        if text == PROMPT or not parts or parts[-1] == PROMPT:
            parts.append(text)
        else:
            parts[-1] += text  # a query and the texts around it are tokenised together
    bos = source.tokenizer.bos_id
    begins = prompt.template.kind == "text" and source.tokenizer.adds_bos and bos is not None
    scale = _scale(source)
    data = encoded(prompt.embeddings.detach().float() * scale)
    chat, refused = _chat(named, data)
    content = {
        "model": source.asked,
        "token_ids": list(prompt.token_ids),
        "begin": [bos] if begins else [],
        "parts": parts,
        "chat": chat,
        "chat_refused": refused,
        "prompt_embeds": data,
        "embedding_scale": scale,
    }
    wanted = [quietly_rendered(source, prompt, query) for query in QUERIES]
    for own in ({}, {"behind": "\n"}, {"behind": "\n", "parts": _without_spaces(parts)}):
        tried = {**content, **own}
        if all(
            send_to_vllm.sequence(tried, _Calling(source), query) == (rendered.ids, rendered.prompt_rows)
            for query, rendered in zip(QUERIES, wanted, strict=True)
        ):
            return tried
    raise ExportError(
        f"the prompt {named.name} needs a text that is tokenised together with it, which a client of vLLM cannot do; "
        f"export it as hf."
    )


def _without_spaces(parts: Sequence[str]) -> list[str]:
    """The texts without a space in front of the prompt, which is in its first token."""
    return [
        part.removesuffix(" ") if behind == PROMPT else part
        for part, behind in zip(parts, [*parts[1:], ""], strict=True)
    ]


def _scale(source: Source) -> float:
    """What vLLM expects embeddings to be multiplied by."""
    return 1.0 if source.config.kind.vllm_scales else source.input_scale


class _Calling:
    """Our tokenizer, called as transformers' tokenizers are."""

    def __init__(self, source: Source) -> None:
        self._tokenizer = source.tokenizer

    def __call__(self, text: str, add_special_tokens: bool) -> Any:
        return _Ids(self._tokenizer.encode(text))


class _Ids:
    def __init__(self, input_ids: list[int]) -> None:
        self.input_ids = input_ids


def _chat(named: NamedPrompt, data: str) -> tuple[list[dict[str, Any]] | None, str]:
    """(messages with the prompt as a content part, why there are none)."""
    template = named.prompt.template
    if template.kind != "chat":
        return None, f"the prompt {named.name} stands in plain text; use a completion."
    if template.chat_template is not None or template.variables != "{}":
        return None, f"the prompt {named.name} has a chat template or variables of its own; use a completion."
    messages: list[dict[str, Any]] = []
    for role, content in template.messages:
        if PROMPT not in content:
            messages.append({"role": role, "content": content})
        elif content == PROMPT:
            messages.append({"role": role, "content": [{"type": "prompt_embeds", "data": data}]})
        else:
            return None, (
                f"the prompt {named.name} stands beside text in one message, where vLLM would add a line break; use a "
                f"completion."
            )
    return messages, ""


def _card(source: Source, prompts: Sequence[NamedPrompt]) -> str:
    names = ", ".join(f"`{named.name}.json`" for named in prompts)
    return "\n".join(
        [
            f"# Prompts for {source.name} as embeddings",
            "",
            f"{names}: what embedgrad tuned, as requests to vLLM. `send_to_vllm.py` sends them:",
            "",
            f"    vllm serve {source.asked} --enable-prompt-embeds",
            f'    python send_to_vllm.py {prompts[0].name}.json http://127.0.0.1:8000 "a great film"',
            "",
            "`chat(prompt, query)` is the body for /v1/chat/completions, where the prompt fills a message.",
            "`completion(prompt, tokenizer, table, query)` is the body for /v1/completions, and",
            "`mixed(prompt, tokenizer, query)` a prompt for `LLM(model, enable_prompt_embeds=True).generate`; with",
            "both the prompt may stand anywhere.",
            "",
        ]
    )
