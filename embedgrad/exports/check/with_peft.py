"""Checks an exported adapter with PEFT, one conversation at a time."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from embedgrad.exports.check.ours import engine, next_logits
from embedgrad.exports.check.report import CheckReport, largest, require_close, same_likeliest
from embedgrad.exports.check.with_transformers import TOLERANCE, quiet
from embedgrad.exports.hf_config import hf_config
from embedgrad.exports.peft import rest_of, virtual_tokens
from embedgrad.exports.same_ids import QUERIES, quietly_rendered
from embedgrad.exports.source import EMBEDDING, HEAD, NamedPrompt, Source
from embedgrad.util.errors import ExportError
from embedgrad.util.shown import first_line


def check_peft(source: Source, prompts: Sequence[NamedPrompt], folder: Path) -> CheckReport:
    """Compares next-token logits through PEFT with ours. Raises ExportError where they differ by more than rounding."""
    (named,) = prompts
    tokens = virtual_tokens(source, named)
    rendered = [quietly_rendered(source, named.prompt, query) for query in QUERIES]
    with quiet() as transformers:
        import peft

        program = f"PEFT {importlib.metadata.version('peft')}"
        logging.getLogger("peft").setLevel(logging.ERROR)
        try:
            base = transformers_model(source, transformers)
            model: Any = peft.PeftModel.from_pretrained(base, folder).eval()
        except Exception as error:  # a foreign program's, of any class
            raise ExportError(f"{program} does not load the export: {first_line(error)}.") from error
        found = []
        for sequence in rendered:
            with torch.no_grad():
                ids = torch.tensor([rest_of(sequence, tokens)])
                found.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].float())
    theirs = torch.stack(found)
    ours = next_logits(engine(source), named.prompt.embeddings.detach().float(), rendered)
    difference = largest(theirs, ours)
    agreement = sum(same_likeliest(a, b, 2 * difference) for a, b in zip(theirs, ours, strict=True))
    require_close(program, difference, TOLERANCE * max(1.0, float(ours.abs().max())), agreement, len(rendered))
    return CheckReport(program, len(rendered), difference, 0.0, agreement)


def transformers_model(source: Source, transformers: Any) -> Any:
    """The model in transformers, in float32; a GGUF file's weights are dequantised."""
    if source.gguf is None:
        return transformers.AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()
    fields = hf_config(source, torch.float32)
    config = transformers.AutoConfig.for_model(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    state = {name: source.checkpoint.tensors.get(name).float() for name in source.config.shapes()}
    if source.tied:
        state[HEAD] = state[EMBEDDING]
    model.load_state_dict(state)
    return model
