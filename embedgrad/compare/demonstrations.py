"""Few-shot prompting: solved training examples in front of the query, behind the same prompt text."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from embedgrad.errors import ConfigError, EmbedGradError
from embedgrad.example import Example
from embedgrad.model.model import Model
from embedgrad.prompt import SoftPrompt
from embedgrad.rendering import render_query
from embedgrad.template import PROMPT, QUERY, Template

DRAWS = 16  # sets of demonstrations that may be tried
ROOM = 4  # a quarter of the context is left for queries and answers


def few_shot(
    model: Model, text: str, template: Template, train: Sequence[Example], shots: int, seed: int
) -> list[SoftPrompt]:
    """DRAWS prompts with `shots` demonstrations each, drawn by `seed`, targets as even as they can be.

    Raises ConfigError where no set fits into the model's context, or the training data has not so many examples.
    """
    if template.kind == "plain":
        raise ConfigError("a plain template has no turns in which demonstrations could stand.")
    draw = random.Random(f"{seed}/demonstrations")
    usable = [example for example in train if _usable(example)]
    if len(usable) < shots:
        raise ConfigError(f"{shots} demonstrations need as many training examples of text; there are {len(usable)}.")
    found = []
    for _ in range(DRAWS):
        shown = _evenly(usable, shots, draw)
        try:
            prompt = SoftPrompt.from_text(model, text, _with(template, shown))
            length = len(render_query(model, prompt, "x").ids)
        except EmbedGradError:
            continue
        if length <= model.config.max_position * (ROOM - 1) // ROOM:
            found.append(prompt)
    if not found:
        raise ConfigError(f"no {shots} demonstrations leave room in the model's context; set compare.shots lower.")
    return found


def _usable(example: Example) -> bool:
    """Text without anything that a template would take for a slot."""
    texts = (example.query, example.target)
    return all(isinstance(text, str) and PROMPT not in text and QUERY not in text for text in texts)


def _evenly(examples: Sequence[Example], shots: int, draw: random.Random) -> list[Example]:
    """One example of each target in turn, in a drawn order."""
    by_target: dict[object, list[Example]] = defaultdict(list)
    for example in draw.sample(list(examples), len(examples)):
        by_target[example.target].append(example)
    rounds = sorted(by_target.values(), key=len, reverse=True)
    turns = [group[number] for number in range(shots) for group in rounds if number < len(group)]
    return draw.sample(turns[:shots], shots)


def _with(template: Template, shown: Sequence[Example]) -> Template:
    """`template` with the demonstrations in front of its last turn; a prompt that stands in that turn stands once, in
    the first demonstration's."""
    if template.kind == "chat":
        *before, (role, content) = template.messages
        bare = content.replace(PROMPT, "").strip()
        turns: list[tuple[str, str]] = []
        for example in shown:
            body = bare if turns else content
            turns += [(role, body.replace(QUERY, str(example.query))), ("assistant", str(example.target))]
        return replace(template, messages=(*before, *turns, (role, bare)))
    bare = template.body.replace(PROMPT, "").lstrip()
    solved = ""
    for example in shown:
        body = bare if solved else template.body
        solved += body.replace(QUERY, str(example.query)) + str(example.target) + "\n\n"
    return replace(template, body=solved + bare)
