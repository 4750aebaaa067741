"""Few-shot prompts: solved training examples (demonstrations) between the prompt's text and the query."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from embedgrad.data.example import Example
from embedgrad.engine.model import Model
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.rendering import render_query
from embedgrad.prompt.template import PROMPT, QUERY, Template
from embedgrad.util.errors import ConfigError, EmbedGradError

DRAWS = 16  # sets of demonstrations that are drawn
ROOM = 4  # 1/ROOM of the model's context is reserved for queries and answers


def few_shot(
    model: Model, text: str, template: Template, train: Sequence[Example], shots: int, seed: int
) -> list[SoftPrompt]:
    """At most DRAWS prompts with `shots` demonstrations each, drawn by `seed`. Targets are balanced where possible.

    Sets that do not fit into the model's context are left out. Raises ConfigError where no set fits, where there are
    too few training examples of text, or for a plain template.
    """
    if template.kind == "plain":
        raise ConfigError("a plain template has no turns in which demonstrations could stand.")
    draw = random.Random(f"{seed}/demonstrations")
    usable = [example for example in train if _usable(example, model)]
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


def _usable(example: Example, model: Model) -> bool:
    """Whether query and target are texts that hold no slot of a template and no control token."""
    return all(
        isinstance(text, str) and PROMPT not in text and QUERY not in text and not model.tokenizer.controls.within(text)
        for text in (example.query, example.target)
    )


def _evenly(examples: Sequence[Example], shots: int, draw: random.Random) -> list[Example]:
    """`shots` examples in a drawn order, taken from the targets in turn."""
    by_target: dict[object, list[Example]] = defaultdict(list)
    for example in draw.sample(list(examples), len(examples)):
        by_target[example.target].append(example)
    rounds = sorted(by_target.values(), key=len, reverse=True)
    turns = [same_target[number] for number in range(shots) for same_target in rounds if number < len(same_target)]
    return draw.sample(turns[:shots], shots)


def _with(template: Template, shown: Sequence[Example]) -> Template:
    """`template` with the demonstrations before its last turn.

    If the prompt's slot is in the last turn, only the first demonstration has the slot.
    """
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
