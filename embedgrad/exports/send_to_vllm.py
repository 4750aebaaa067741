"""Sends a tuned prompt to vLLM as embeddings. This file stands alone: it needs the files beside it, torch, and for
`completion` and `mixed` the model's folder and its tokenizer.

    vllm serve MODEL --enable-prompt-embeds
    python send_to_vllm.py prompt.json http://127.0.0.1:8000 "a great film"
"""

from __future__ import annotations

import base64
import io
import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import torch


def load(path: str | Path) -> dict[str, Any]:
    """The contents of NAME.json."""
    content: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    return content


def chat(prompt: dict[str, Any], query: str, **options: Any) -> dict[str, Any]:
    """The body of a request to /v1/chat/completions: the prompt is a content part of a message."""
    if prompt["chat"] is None:
        raise SystemExit(prompt["chat_refused"])
    messages = json.loads(json.dumps(prompt["chat"]))
    for message in messages:
        if isinstance(message["content"], str):
            message["content"] = message["content"].replace("{query}", query)
    return {"model": prompt["model"], "messages": messages, **options}


def sequence(prompt: dict[str, Any], tokenizer: Any, query: str) -> tuple[list[int], list[int]]:
    """(ids, for each the prompt row or −1) of a whole conversation. tokenizer: transformers' one of the model.

    Every text around the prompt is tokenised by itself, where it is not the first one behind `prompt["behind"]`, whose
    tokens are removed: some tokenizers put a space before what begins a text.
    """
    behind = prompt.get("behind", "")
    before = _ids(tokenizer, behind) if behind else []
    ids: list[int] = list(prompt["begin"])
    rows = [-1] * len(ids)
    for part in prompt["parts"]:
        if part == "{prompt}":
            ids += prompt["token_ids"]
            rows += range(len(prompt["token_ids"]))
        else:
            text = part.replace("{query}", query)
            new = _ids(tokenizer, behind + text)[len(before) :] if ids else _ids(tokenizer, text)
            ids += new
            rows += [-1] * len(new)
    return ids, rows


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def embeddings(prompt: dict[str, Any]) -> torch.Tensor:
    """The prompt's rows as the model takes them, [k, d] float32."""
    data = base64.b64decode(prompt["prompt_embeds"])
    tensor: torch.Tensor = torch.load(io.BytesIO(data), weights_only=True)
    return tensor


def mixed(prompt: dict[str, Any], tokenizer: Any, query: str) -> dict[str, Any]:
    """A prompt for `LLM(model, enable_prompt_embeds=True).generate`: ids, and rows where no id counts."""
    ids, rows = sequence(prompt, tokenizer, query)
    place = torch.tensor(rows)
    own = embeddings(prompt)
    full = torch.where((place >= 0)[:, None], own[place.clamp_min(0)], torch.zeros(1, own.shape[1]))
    return {"prompt_token_ids": ids, "prompt_embeds": full, "prompt_is_token_ids": [row < 0 for row in rows]}


def completion(
    prompt: dict[str, Any], tokenizer: Any, table: torch.Tensor, query: str, **options: Any
) -> dict[str, Any]:
    """The body of a request to /v1/completions: embeddings of the whole conversation.

    table: the model's embedding table [V, d], such as `model.get_input_embeddings().weight`.
    """
    ids, rows = sequence(prompt, tokenizer, query)
    place = torch.tensor(rows)
    known = table.detach()[torch.tensor(ids)].float() * prompt.get("embedding_scale", 1.0)
    full = torch.where((place >= 0)[:, None], embeddings(prompt)[place.clamp_min(0)], known)
    return {"model": prompt["model"], "prompt_embeds": encoded(full), **options}


def encoded(tensor: torch.Tensor) -> str:
    """A tensor as vLLM takes it: base64 of what torch.save writes."""
    buffer = io.BytesIO()
    torch.save(tensor.contiguous().clone(), buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def send(server: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """POSTs a body and returns the answer."""
    request = urllib.request.Request(server + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        content: dict[str, Any] = json.load(answer)
    return content


if __name__ == "__main__":
    file, server, text = sys.argv[1:]
    answer = send(server, "/v1/chat/completions", chat(load(file), text, temperature=0, max_tokens=32))
    print(answer["choices"][0]["message"]["content"])
