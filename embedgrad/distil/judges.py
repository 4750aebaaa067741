"""Models that are only asked: they get a text and a query, and their answers are graded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from embedgrad.data.example import Example
from embedgrad.distil.openai_client import Client, Unanswered
from embedgrad.engine.model import Model
from embedgrad.evaluation.evaluate import default_sampling, evaluate
from embedgrad.evaluation.grading.grader import Grader
from embedgrad.generation.sampling import Sampling
from embedgrad.prompt.carry import carried
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.template import Template
from embedgrad.util.errors import ContextError, ModelError, PromptError

AT_ONCE = 8  # requests to an address that are under way at the same time
PATIENCE = 16  # requests in a row without an answer, after which a judge counts as gone


class TextJudge(ABC):
    """A model that is only asked. name: for people."""

    name: str

    @abstractmethod
    def ask(self, text: str, examples: Sequence[Example]) -> list[bool | None]:
        """For each example whether the answer under the instruction `text` is right; None: no answer came.

        Raises ModelError where the judge is gone.
        """


class LocalJudge(TextJudge):
    """Another model on this machine, with the template's messages in its own chat template."""

    def __init__(
        self, model: Model, template: Template, labels: Sequence[str] | None, sampling: Sampling | None, grader: Grader
    ) -> None:
        self.name = model.name
        self._model, self._grader, self._sampling = model, grader, sampling
        self._labels = labels
        self.template = carried(model, template)

    def ask(self, text: str, examples: Sequence[Example]) -> list[bool | None]:
        """See `TextJudge`. All answers come."""
        try:
            prompt = SoftPrompt.from_text(self._model, text, self.template)
        except (PromptError, ContextError):  # such as a control token of this model
            return [None] * len(examples)
        sampling = self._sampling or default_sampling(self._model, examples, self._labels)
        return list(evaluate(self._model, prompt, examples, None, sampling, self._grader).correct("generated_accuracy"))


class RemoteJudge(TextJudge):
    """A model behind an OpenAI-compatible address. `longest`: tokens of an answer."""

    def __init__(self, client: Client, template: Template, grader: Grader, longest: int) -> None:
        self.name = f"{client.model} at {client.address}"
        self._client, self._template, self._grader, self._longest = client, template, grader, longest
        self._silent = 0  # requests in a row without an answer

    def ask(self, text: str, examples: Sequence[Example]) -> list[bool | None]:
        """See `TextJudge`. AT_ONCE requests are under way at a time; each is repeated where the judge asks for it."""
        found: list[bool | None] = []
        with ThreadPoolExecutor(AT_ONCE) as workers:
            for first in range(0, len(examples), AT_ONCE):
                part = examples[first : first + AT_ONCE]
                answers = list(workers.map(lambda example: self._answer(text, str(example.query)), part))
                for example, answer in zip(part, answers, strict=True):
                    silent = isinstance(answer, Unanswered)
                    self._silent = self._silent + 1 if silent else 0
                    found.append(None if silent else self._grader.grade(str(answer), str(example.target)).correct)
                if self._silent >= PATIENCE:
                    raise ModelError(
                        f"the judge {self.name} gave no answer to {self._silent} requests in a row ({answers[-1]}); "
                        "the texts judged before are saved, and the same command goes on from them."
                    )
        return found

    def _answer(self, text: str, query: str) -> str | Unanswered:
        try:
            asked = self._template.fill(text, query) if self._template.kind != "plain" else f"{text}\n\n{query}\n\n"
            return self._client.answer(asked, self._longest)
        except Unanswered as error:
            return error
