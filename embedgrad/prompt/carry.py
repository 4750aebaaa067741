"""A template on its way to another model."""

from __future__ import annotations

from embedgrad.prompt.belonging import PromptModel
from embedgrad.prompt.prompt import SoftPrompt, default_template
from embedgrad.prompt.template import Template
from embedgrad.util.errors import TemplateError


def carried(model: PromptModel, template: Template) -> Template:
    """`template` for `model`: the same messages in the model's own chat template, or the model's default template
    where it has none or refuses them. Templates of plain text stay what they are."""
    if template.kind != "chat":
        return template
    try:
        own = Template.chat([{"role": role, "content": content} for role, content in template.messages])
        SoftPrompt.from_text(model, "x", own)
        return own
    except TemplateError:
        return default_template(model)
