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
from embedgrad.exports.same_ids import Conversation, conversations
from embedgrad.exports.source import EMBEDDING, NamedPrompt, Source
from embedgrad.exports.vocabulary import Vocabulary
from embedgrad.model.files.safetensors import SafetensorsFiles
from embedgrad.prompt.rendering import Rendered
from embedgrad.util.errors import ExportError
from embedgrad.util.shown import first_line

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
    return _compared(program, source, prompts, asked, theirs, words, folder, probability)


def _compared(
    program: str,
    source: Source,
    prompts: Sequence[NamedPrompt],
    asked: Sequence[Conversation],
    theirs: torch.Tensor,
    words: Vocabulary,
    folder: Path,
    probability: float,
) -> CheckReport:
    """theirs: [conversations, V'], in the order of `asked`."""
    ours = engine(source)
    stored = SafetensorsFiles(folder).get(EMBEDDING).dtype
    tuned, rounded = [], []
    for named in prompts:
        rendered = [each.rendered for each in asked if each.name == named.name]
        rows = named.prompt.embeddings.detach().float()
        tuned.append(next_logits(ours, rows, rendered))
        kept = as_stored(rows, stored)
        rounded.append(tuned[-1] if torch.equal(kept, rows) else next_logits(ours, kept, rendered))
    if source.gguf is not None and stored != torch.float32:  # the other weights are rounded, too
        copy = [Rendered(each.ids, [-1] * len(each.ids), [False] * len(each.ids), 0) for each in asked]
        rounded = [next_logits(engine(Source.open(folder)), words.embeddings[:1], copy)]
    known = sorted(set(range(source.config.vocab_size)) - set(words.ids))
    theirs, exact, stored_rows = (logits[:, known] for logits in (theirs, torch.cat(tuned), torch.cat(rounded)))
    allowed = TOLERANCE * max(1.0, float(exact.abs().max()))
    noise = largest(theirs, stored_rows)
    agreement = sum(same_likeliest(a, b, 2 * noise) for a, b in zip(theirs, stored_rows, strict=True))
    require_close(program, noise, allowed, agreement, len(theirs))
    exactly = sum(same_likeliest(a, b, 2 * noise) for a, b in zip(theirs, exact, strict=True))
    return CheckReport(
        program,
        len(theirs),
        largest(theirs, exact),
        largest(exact, stored_rows),
        exactly,
        new_token_probability=probability,
    )


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
