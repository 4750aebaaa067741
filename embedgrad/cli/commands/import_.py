"""`embedgrad import`: makes a starting prompt of a PEFT prompt-tuning adapter."""

from __future__ import annotations

import json
from pathlib import Path

from embedgrad.exports.import_peft import import_prompt
from embedgrad.train.paths import expand_path
from embedgrad.util.files import check_target


def run(adapter: Path, model: str, out: Path, place: str, as_json: bool) -> None:
    """Runs the command. Raises EmbedGradError."""
    check_target(out)
    prompt = import_prompt(adapter, model=expand_path(model), place=place)
    prompt.save(out)
    similarity = prompt.similarity()
    found = {"path": str(out), "tokens": len(prompt.token_ids), "text": prompt.text}
    found |= {"min_similarity": float(similarity.min()), "mean_similarity": float(similarity.mean())}
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
        return
    print(f"{out}: {len(prompt.token_ids)} rows, nearest tokens {prompt.text!r}")
    print(
        f"  similarity to them: lowest {found['min_similarity']:.3f}, mean {found['mean_similarity']:.3f}; an "
        f"optimisation first projects the rows into its trust region."
    )
