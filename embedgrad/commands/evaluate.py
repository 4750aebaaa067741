"""`embedgrad evaluate`: the figures of a prompt file on a data file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from embedgrad.commands.shared import MEASURES, with_interval, write_text
from embedgrad.data import read_jsonl
from embedgrad.evaluation import Evaluation, evaluate
from embedgrad.files import check_target
from embedgrad.model.model import Model
from embedgrad.prompt import SoftPrompt
from embedgrad.sampling import Sampling


def run(
    model: Model,
    prompt_path: Path,
    data: Path,
    labels: Sequence[str] | None,
    before: bool,
    limit: int | None,
    output: Path | None,
    query_field: str,
    target_field: str,
    max_new_tokens: int | None,
    as_json: bool,
) -> None:
    """The command; see `embedgrad evaluate --help`. Raises EmbedGradError."""
    if output is not None:
        check_target(output)
    prompt = SoftPrompt.load(prompt_path, model)
    test = read_jsonl(data, query_field, target_field, limit)
    sampling = None if max_new_tokens is None else Sampling(max_new_tokens=max_new_tokens)
    prompts = {"before": prompt.replace(embeddings=prompt.anchor)} if before else {}
    prompts["after"] = prompt
    results = {
        when: evaluate(model, one, test, labels=labels or None, sampling=sampling) for when, one in prompts.items()
    }
    content: dict[str, Any] = {"prompt": str(prompt_path), "model": model.name, "data": str(data)}
    content |= {when: result.to_dict() for when, result in results.items()} if before else results["after"].to_dict()
    _show(content, results, as_json)  # first, so that a full disk takes nothing away
    if output is not None:
        write_text(output, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _show(content: Mapping[str, Any], results: Mapping[str, Evaluation], as_json: bool) -> None:
    if as_json:
        print(json.dumps(content, indent=2))
        return
    for name, told in MEASURES.items():
        shares = {when: getattr(result, name) for when, result in results.items()}
        if shares["after"] is not None:
            print(f"{told}: " + "; ".join(f"{when} {with_interval(share)}" for when, share in shares.items()))
    print(f"{len(results['after'].records)} examples")
