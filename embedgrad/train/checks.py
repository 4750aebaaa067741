"""What is checked before the first step, so that no run fails after hours of work for a line of its data."""

from __future__ import annotations

from embedgrad.engine.model import Model
from embedgrad.evaluation.evaluate import check_evaluation
from embedgrad.evaluation.targets import check_targets
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.rendering import render
from embedgrad.tasks.parts import Parts
from embedgrad.train.plan import Plan


def check_parts(plan: Plan, model: Model, prompt: SoftPrompt, parts: Parts) -> None:
    """Raises DataError, ContextError or PromptError for the first example of any part that cannot be used.

    Every target is among the labels, where there are labels, and right by the grader when it is the answer. Every
    sequence fits the model's context.
    """
    for name, part in (("training", parts.train), ("validation", parts.validation)):
        check_targets(part, f"{name} example", plan.labels, plan.grader)
        for number, example in enumerate(part, 1):
            render(model, prompt, example, example.where or f"{name} example {number}")
    if parts.test:
        check_evaluation(model, prompt, parts.test, plan.labels, plan.grader)
