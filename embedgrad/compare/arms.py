"""The arms of a comparison: the optimised prompt and its controls."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace

from embedgrad.compare.arm import Arm, Candidates, Training, only
from embedgrad.compare.demonstrations import few_shot
from embedgrad.compare.twin import no_twin
from embedgrad.data.example import Example
from embedgrad.engine.model import Model
from embedgrad.maths.trust_region import CosineCone, NoRegion
from embedgrad.prompt.prompt import PLAIN_TEXT, SYSTEM_TURN, USER_TURN, SoftPrompt
from embedgrad.prompt.template import PROMPT, QUERY, Template
from embedgrad.train.plan import Plan
from embedgrad.util.errors import ConfigError, TemplateError

ORIGINAL, OPTIMISED = "original", "optimised"
AFTER_QUERY = Template.chat([{"role": "user", "content": f"{QUERY}\n\n{PROMPT}"}])
TEXT_AFTER_QUERY = Template.text(f"{QUERY}\n\n{PROMPT}\n\n")


def arms(plan: Plan, model: Model) -> tuple[list[Arm], list[str]]:
    """(arms of the configuration in the order in which they run, a sentence for each arm that is not possible).

    Raises ConfigError for an unknown arm in the configuration.
    """
    found, left_out = _all(plan, model)
    wanted = plan.config.compare.arms
    if wanted is None:
        return found, left_out
    known = [arm.name for arm in found]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ConfigError(f"compare.arms: there is no arm {unknown[0]!r}; there are {', '.join(known)}.")
    return [arm for arm in found if arm.name in wanted], []


def _all(plan: Plan, model: Model) -> tuple[list[Arm], list[str]]:
    section, text = plan.config.compare, plan.prompt
    template = plan.template(model)
    left_out: list[str] = []

    def original(model: Model) -> SoftPrompt:
        return SoftPrompt.from_text(model, text, template)

    start = plan.start
    found = [
        Arm(ORIGINAL, "the original text", only(original)),
        Arm(OPTIMISED, "optimised", only(start), Training(), repeated=True),
        Arm("no-prompt", "no prompt", only(lambda model: absent(model, template))),
        *_templates(model, text, template),
        Arm("format-only", "optimised on shuffled labels", only(start), Training(shuffled=True), repeated=True),
        Arm("unconstrained", "no trust region", only(start), Training(NoRegion()), repeated=True),
        *_sweep(plan, only(start)),
        Arm("few-shot", f"best of few-shot, {section.shots} examples", _demonstrations(plan, template)),
    ]
    paraphrases = section.paraphrases if section.paraphrases is not None else plan.task.paraphrases
    if paraphrases:
        found.append(Arm("paraphrases", "best of paraphrases", _paraphrases((text, *paraphrases), template)))
    else:
        left_out.append("best of paraphrases is left out: the task has none, and compare.paraphrases gives none.")
    problem = _no_peft(model)
    if problem is None:
        front = only(lambda model: in_front(model, text, template))
        found.append(Arm("peft", "PEFT prompt tuning", front, Training(peft=True)))
    else:
        left_out.append(f"PEFT prompt tuning is left out: {problem}")
    return found, left_out


def absent(model: Model, template: Template) -> SoftPrompt:
    """A prompt whose template has no slot for it. Its one prompt row, which every prompt needs, is never shown."""
    return SoftPrompt.from_ids(model, [0], template.without_prompt())


def in_front(model: Model, text: str, template: Template) -> SoftPrompt:
    """`text` before the whole conversation, where PEFT puts its virtual tokens. The rest is `template` without
    prompt."""
    rest = template.without_prompt()
    if rest.kind == "text":
        return SoftPrompt.from_text(model, text, Template.text(PROMPT + rest.body, rest.end))
    source = rest.chat_template or model.tokenizer.chat_template
    first = "{{ messages[0]['content'] }}{% set messages = messages[1:] %}"
    moved = replace(rest, messages=(("system", PROMPT), *rest.messages), chat_template=f"{first}{source}")
    return SoftPrompt.from_text(model, text, moved)


def _templates(model: Model, text: str, template: Template) -> list[Arm]:
    """Arms with the original text in other places of the template, as far as the model's chat template allows."""
    chat = model.tokenizer.chat_template is not None
    places = (
        {"system-turn": SYSTEM_TURN, "user-turn-before": USER_TURN, "user-turn-after": AFTER_QUERY}
        if chat
        else {"before-query": PLAIN_TEXT, "after-query": TEXT_AFTER_QUERY}
    )
    titles = {
        "system-turn": "original in the system turn",
        "user-turn-before": "original in the user's turn, first",
        "user-turn-after": "original in the user's turn, last",
        "before-query": "original before the query",
        "after-query": "original after the query",
    }
    found = []
    for name, place in places.items():
        if chat and template.kind == "chat":
            kept = (template.chat_template, template.variables, template.control_tokens)
            place = replace(place, chat_template=kept[0], variables=kept[1], control_tokens=kept[2])
        if place == template:
            continue
        try:
            SoftPrompt.from_text(model, text, place)
        except TemplateError:  # for instance a chat template that refuses system messages
            continue
        found.append(Arm(name, titles[name], _at(text, place)))
    return found


def _at(text: str, template: Template) -> Candidates:
    return only(lambda model: SoftPrompt.from_text(model, text, template))


def _sweep(plan: Plan, start: Candidates) -> list[Arm]:
    """Arms with cosine cones for the values of τ in compare.taus, except the configuration's own cone."""
    region = plan.config.optimize.trust_region
    return [
        Arm(f"tau-{tau:g}", f"cone of τ = {tau:g}", start, Training(CosineCone(tau)))
        for tau in plan.config.compare.taus
        if CosineCone(tau) != region
    ]


def _demonstrations(plan: Plan, template: Template) -> Candidates:
    def draw(model: Model, train: Sequence[Example], seed: int) -> list[SoftPrompt]:
        return few_shot(model, plan.prompt, template, train, plan.config.compare.shots, seed)

    return draw


def _paraphrases(texts: Sequence[str], template: Template) -> Candidates:
    return lambda model, train, seed: [SoftPrompt.from_text(model, text, template) for text in texts]


def _no_peft(model: Model) -> str | None:
    """Why PEFT's prompt tuning is not possible, in one sentence; None where it is."""
    if any(importlib.util.find_spec(name) is None for name in ("peft", "transformers")):
        return "pip install 'embedgrad[compare]' brings it."
    return no_twin(model)
