"""Checks an exported folder with transformers."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from embedgrad.exports.chat_template import VARIABLE
from embedgrad.exports.check.ours import engine, next_logits
from embedgrad.exports.check.report import CheckReport, as_stored, largest, require_close, require_ids, same_likeliest
from embedgrad.exports.same_ids import conversations
from embedgrad.exports.source import EMBEDDING, NamedPrompt, Source
from embedgrad.exports.vocabulary import Vocabulary
from embedgrad.model.files.safetensors import SafetensorsFiles
from embedgrad.util.errors import ExportError

# Both compute in float32 and add in other orders: SmolLM2 differs by 1e-5, deep random models by more.
TOLERANCE = 1e-3  # of the largest logit


def check_hf(source: Source, prompts: Sequence[NamedPrompt], words: Vocabulary, folder: Path) -> CheckReport:
    """Renders conversations with the folder's tokenizer and template and compares ids and next-token logits.

    Raises ExportError where they differ by more than rounding.
    """
    with quiet() as transformers:
        program = f"transformers {transformers.__version__}"
        try:
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        except Exception as error:  # a foreign program's, of any class
            raise ExportError(f"{program} does not load the export: {first_line(error)}.") from error
        asked = conversations(source, prompts, words)
        found = []
        for each in asked:
            ids = tokenizer.apply_chat_template(
                each.messages, add_generation_prompt=True, tokenize=True, return_dict=False, **{VARIABLE: each.name}
            )
            require_ids(program, each.name, each.query, ids, each.ids)
            with torch.no_grad():
                found.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float())
        suppressed = list(getattr(model.generation_config, "suppress_tokens", None) or [])
        del model
    if not set(words.ids) <= set(suppressed):
        raise ExportError(f"{program} does not read the list of suppressed tokens from generation_config.json.")
    theirs = torch.stack(found)
    probability = float(theirs.softmax(dim=1)[:, words.ids].max())
    theirs[:, words.ids] = -torch.inf
    stored = SafetensorsFiles(folder).get(EMBEDDING).dtype
    return compared(program, source, prompts, asked_by_prompt(asked), theirs, words, stored, probability)


def asked_by_prompt(asked: Sequence[Any]) -> dict[str, list[Any]]:
    """Conversations by the name of their prompt, in order."""
    grouped: dict[str, list[Any]] = {}
    for each in asked:
        grouped.setdefault(each.name, []).append(each)
    return grouped


def compared(
    program: str,
    source: Source,
    prompts: Sequence[NamedPrompt],
    asked: dict[str, list[Any]],
    theirs: torch.Tensor,
    words: Vocabulary,
    stored: torch.dtype,
    probability: float | None,
) -> CheckReport:
    """theirs: [conversations, V'], in the order of `asked`. stored: the type of the prompt's rows in the export."""
    ours = engine(source)
    tuned, rounded = [], []
    for named in prompts:
        rendered = [each.rendered for each in asked[named.name]]
        rows = named.prompt.embeddings.detach().float()
        tuned.append(next_logits(ours, rows, rendered))
        rounded.append(next_logits(ours, as_stored(rows, stored), rendered))
    known = [i for i in range(source.config.vocab_size) if i not in set(words.ids)]
    theirs, exact, stored_rows = theirs[:, known], torch.cat(tuned)[:, known], torch.cat(rounded)[:, known]
    allowed = TOLERANCE * max(1.0, float(exact.abs().max()))
    noise = largest(theirs, stored_rows)
    agreement = sum(same_likeliest(a, b, 2 * noise) for a, b in zip(theirs, stored_rows, strict=True))
    require_close(program, noise, allowed, agreement, len(theirs))
    exactly = sum(same_likeliest(a, b, 2 * noise) for a, b in zip(theirs, exact, strict=True))
    return CheckReport(
        program, len(theirs), largest(theirs, exact), largest(exact, stored_rows), exactly,
        new_token_probability=probability,
    )  # fmt: skip


@contextlib.contextmanager
def quiet() -> Iterator[Any]:
    """The transformers package without progress bars and advice."""
    import transformers

    level = transformers.utils.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield transformers
    finally:
        transformers.utils.logging.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """The first line of an exception's message."""
    lines = str(error).strip().splitlines()
    return (lines[0].rstrip(".") if lines else type(error).__name__)[:200]
