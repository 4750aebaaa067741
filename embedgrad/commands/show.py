"""`embedgrad show`: what is in a prompt file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from embedgrad.model.model import Model
from embedgrad.neighbours import neighbours
from embedgrad.prompt import SoftPrompt
from embedgrad.trust_region import norm_ratio


def run(path: Path, model: Model | None, as_json: bool) -> None:
    """The command. Raises PromptError: not a prompt file, or one of another model."""
    prompt = SoftPrompt.load(path, model)
    content = describe(prompt, model)
    if as_json:
        print(json.dumps(content, indent=2))
    else:
        _print(content)


def describe(prompt: SoftPrompt, model: Model | None) -> dict[str, Any]:
    """All there is to say about a prompt, as JSON-able values; `rows` has one entry per token.

    With a model, each row also has its token's text, and the vocabulary's token whose embedding has the largest cosine
    with the row.
    """
    similarity, ratio = prompt.similarity().tolist(), norm_ratio(prompt.embeddings, prompt.anchor).tolist()
    rows: list[dict[str, Any]] = [
        {"id": token, "similarity": similarity[i], "norm_ratio": ratio[i]} for i, token in enumerate(prompt.token_ids)
    ]
    if model is not None:
        near = neighbours(model, prompt.embeddings, prompt.token_ids)
        for row, token, cosine, rank in zip(rows, near.nearest, near.cosine, near.own_rank, strict=True):
            row["token"] = model.tokenizer.decode([row["id"]], skip_special=False)
            row["nearest_id"], row["nearest_cosine"] = token, cosine
            row["own_rank"] = rank
            row["nearest_token"] = model.tokenizer.decode([token], skip_special=False)
    return {
        "text": prompt.text,
        "tokens": len(prompt.token_ids),
        "hidden_size": prompt.embeddings.shape[1],
        "model": prompt.model_name,
        "template": json.loads(prompt.template.to_json()),
        "metadata": prompt.metadata,
        "min_similarity": min(similarity),
        "mean_similarity": sum(similarity) / len(similarity),
        "rows": rows,
    }


def _print(content: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for name in ("text", "model", "tokens", "hidden_size"):
        console.print(f"{name.replace('_', ' ')}: {content[name]}", markup=False, soft_wrap=True)
    for name in ("template", "metadata"):
        console.print(f"{name}: {json.dumps(content[name], ensure_ascii=False)}", markup=False, soft_wrap=True)
    console.print(f"similarity: lowest {content['min_similarity']:.4f}, mean {content['mean_similarity']:.4f}")
    with_tokens = "token" in content["rows"][0]
    table = Table("row", "id", *(["token"] if with_tokens else []), "similarity", "norm", box=None)
    if with_tokens:
        table.add_column("nearest")
        table.add_column("cosine")
    for number, row in enumerate(content["rows"]):
        cells = [str(number), str(row["id"])] + ([_quoted(row["token"])] if with_tokens else [])
        cells += [f"{row['similarity']:.4f}", f"{row['norm_ratio']:.4f}"]
        if with_tokens:
            cells += [_quoted(row["nearest_token"]), f"{row['nearest_cosine']:.4f}"]
        table.add_row(*cells)
    console.print(table)


def _quoted(text: str) -> str:
    """Quoted, so that spaces and line breaks show; square brackets are no markup."""
    return repr(text).replace("[", "\\[")
