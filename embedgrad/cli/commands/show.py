"""`embedgrad show`: shows the contents of a prompt file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from embedgrad.cli.terminal import cell
from embedgrad.engine.model import Model
from embedgrad.evaluation.neighbours import neighbours
from embedgrad.maths.trust_region import norm_ratio
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.util.shown import visible


def run(path: Path, model: Model | None, as_json: bool) -> None:
    """Runs the command. Raises PromptError where the file is not a prompt file or belongs to another model."""
    prompt = SoftPrompt.load(path, model)
    content = describe(prompt, model)
    if as_json:
        print(json.dumps(content, indent=2))
    else:
        _print(content)


def describe(prompt: SoftPrompt, model: Model | None) -> dict[str, Any]:
    """The contents of a prompt as JSON-able values. "rows" has one entry per prompt row.

    With a model, each entry also has the text of the prompt row's token, the vocabulary's token with the largest cosine
    to the prompt row, and the rank of the prompt row's own token.
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
        console.print(visible(f"{name.replace('_', ' ')}: {content[name]}"), markup=False, soft_wrap=True)
    for name in ("template", "metadata"):
        told = json.dumps(content[name], ensure_ascii=False)
        console.print(visible(f"{name}: {told}"), markup=False, soft_wrap=True)
    console.print(f"similarity: lowest {content['min_similarity']:.4f}, mean {content['mean_similarity']:.4f}")
    with_tokens = "token" in content["rows"][0]
    table = Table("row", "id", *(["token"] if with_tokens else []), "similarity", "norm", box=None)
    if with_tokens:
        table.add_column("nearest")
        table.add_column("cosine")
    for number, row in enumerate(content["rows"]):
        cells = [str(number), str(row["id"])] + ([repr(row["token"])] if with_tokens else [])
        cells += [f"{row['similarity']:.4f}", f"{row['norm_ratio']:.4f}"]
        if with_tokens:
            cells += [repr(row["nearest_token"]), f"{row['nearest_cosine']:.4f}"]
        table.add_row(*map(cell, cells))
    console.print(table)
