"""Texts that may stand for a soft prompt, except those of a discrete search.

- nearest: the tokens nearest to the prompt rows; and those nearest to e₀ + a (e − e₀) for several a, because inside a
  trust region the nearest token is as a rule the row's own.
- words: what the model says about the soft prompt, which stands in a request to repeat, rephrase, explain or improve
  it, or in its own place before such a question. The idea of reading an embedding by asking the model is that of
  Patchscopes and SelfIE; the requests here are ours.
- induced: instructions that the model, without the soft prompt, makes up for labelled examples (as in Honovich et al.,
  "Instruction Induction", arXiv 2205.10782).
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from embedgrad.data.example import Example
from embedgrad.engine.model import Model
from embedgrad.engine.table_product import best_tokens
from embedgrad.generation.generate import Generation, generate
from embedgrad.generation.sampling import Sampling
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.rendering import render_query
from embedgrad.prompt.template import PROMPT, QUERY, Template
from embedgrad.search.vocabulary import text_tokens
from embedgrad.util.errors import ContextError, EmbedGradError

AMPLIFIED = (1.0, 3.0, 10.0, 30.0)
ABOUT = {  # requests in which the soft prompt stands in quotation marks
    "repeat": "Repeat the following instruction word for word. Write nothing else.",
    "rephrase": "Rephrase the following instruction in other words. Write only the new instruction.",
    "explain": "Explain in one sentence what the following instruction asks for.",
    "improve": "Write a clearer and more detailed version of the following instruction. Write only the instruction.",
}
IN_PLACE = "Repeat your instructions word for word."  # the soft prompt stands where it was trained
INDUCE = (
    "The examples show an input and the answer that is wanted. Write the instruction that gives these answers for "
    "these inputs. Write only the instruction."
)
SHOTS = 6  # labelled examples in a request for an instruction
_SHOWN = 400  # characters of an example's input
_QUOTES = "\"'“”‘’«»`"
_TEMPERATURE, _TOP_P = 0.9, 0.95  # of all samples but the first, which is greedy


@dataclass(frozen=True)
class Candidates:
    """Texts by their source. spent: tokens passed forward, answers included."""

    texts: list[tuple[str, str]]
    spent: int = 0


def nearest(model: Model, prompt: SoftPrompt) -> Candidates:
    """Texts of the nearest tokens. No token is passed through the model."""
    moved = prompt.embeddings.float() - prompt.anchor
    found: list[tuple[str, str]] = []
    for factor in AMPLIFIED:
        rows = prompt.anchor + factor * moved
        ids = best_tokens(model, rows, 1, allowed=text_tokens(model), cosine=True).ids[:, 0].tolist()
        text = model.tokenizer.decode(ids, skip_special=True).strip()
        name = "nearest tokens" if factor == 1 else f"nearest tokens, displacement times {factor:g}"
        if text:
            found.append((name, text))
    return Candidates(found)


def words(model: Model, prompt: SoftPrompt, name: str, samples: int, seed: int, longest: int) -> Candidates:
    """`samples` answers to the request `name`, a key of ABOUT or "in place", the first of them greedy.

    longest: tokens of a text; an answer that is longer is cut at its last sentence. Raises what `generate` raises.
    """
    request = IN_PLACE if name == "in place" else ABOUT[name]
    asked = prompt if name == "in place" else prompt.behind(model, around(prompt.template, f'{QUERY}\n\n"{PROMPT}"'))
    answers = _sampled(model, asked, [request] * samples, seed, longest)
    spent = samples * len(render_query(model, asked, request).ids)
    return _cleaned(model, f"own words: {name}", answers, spent)


def induced(
    model: Model, template: Template, train: Sequence[Example], samples: int, seed: int, longest: int
) -> Candidates:
    """`samples` instructions, each for SHOTS examples of its own, or as many as fit into the context.

    None where not even one fits, or where there are no examples of text.
    """
    draw = random.Random(f"{seed}/induced")
    usable = [e for e in train if isinstance(e.query, str) and isinstance(e.target, str)]
    asked = SoftPrompt.from_text(model, INDUCE, around(template, f"{QUERY}\n\n{PROMPT}"))
    shown, spent = [], 0
    for _ in range(samples if usable else 0):
        chosen = draw.sample(usable, min(SHOTS, len(usable)))
        while chosen:
            text = "\n\n".join(f"Input: {str(e.query)[:_SHOWN]}\nAnswer: {e.target}" for e in chosen)
            length = _length(model, asked, text)
            if length is not None and length + longest < model.config.max_position:
                shown.append(text)
                spent += length
                break
            chosen.pop()
    return _cleaned(model, "induced from examples", _sampled(model, asked, shown, seed, longest), spent)


def _length(model: Model, prompt: SoftPrompt, query: str) -> int | None:
    """The tokens of a request; None where it is longer than the context."""
    try:
        return len(render_query(model, prompt, query).ids)
    except ContextError:
        return None


def around(template: Template, content: str) -> Template:
    """A template whose user's turn, or whose text, is `content` with its slots; other settings are those of
    `template`."""
    if template.kind == "chat":
        return replace(template, messages=(("user", content),))
    return Template.text(f"{content}\n\n")


def _sampled(model: Model, prompt: SoftPrompt, queries: Sequence[str], seed: int, longest: int) -> list[Generation]:
    if not queries:
        return []
    first = generate(model, prompt, queries[:1], Sampling(max_new_tokens=longest))
    rest = Sampling(max_new_tokens=longest, temperature=_TEMPERATURE, top_p=_TOP_P, seed=seed)
    return first + generate(model, prompt, queries[1:], rest)


def _cleaned(model: Model, source: str, answers: Sequence[Generation], spent: int) -> Candidates:
    texts: dict[str, None] = {}
    for answer in answers:
        text = clean(answer.text, cut_off=answer.stop_reason == "length")
        if text and not model.tokenizer.controls.within(text):
            texts[text] = None
    return Candidates([(source, text) for text in texts], spent + sum(len(answer.ids) for answer in answers))


def clean(answer: str, cut_off: bool = False) -> str:
    """The instruction in a model's answer: without an announcement that ends in a colon, quotation marks around it,
    and what follows an empty line. cut_off: the answer was not finished; it then ends with its last sentence."""
    lines = answer.strip().split("\n")
    if len(lines) > 1 and lines[0].rstrip().endswith(":"):
        lines = "\n".join(lines[1:]).strip().split("\n")
    text = "\n".join(lines).split("\n\n")[0]
    if cut_off and (ends := list(re.finditer(r"[.!?](?=\s|$)", text))):
        text = text[: ends[-1].end()]
    text = " ".join(text.split())
    while len(text) > 1 and text[0] in _QUOTES and text[-1] in _QUOTES:
        text = text[1:-1].strip()
    return text


def usable(model: Model, text: str, template: Template) -> bool:
    """Whether `text` can be a prompt: one that this model and template take, and that names no slot."""
    try:
        SoftPrompt.from_text(model, text, template)
    except EmbedGradError:
        return False
    return PROMPT not in text and QUERY not in text
