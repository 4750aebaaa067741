"""`SoftPrompt`: a prompt's embeddings and everything that is needed to use them, in memory and in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as dataclass_replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from embedgrad.maths.trust_region import cosine_similarity
from embedgrad.model.fingerprint import Fingerprint
from embedgrad.prompt import belonging
from embedgrad.prompt.belonging import PromptModel
from embedgrad.prompt.conversation import dated
from embedgrad.prompt.prompt_file import read_prompt_file, write_prompt_file
from embedgrad.prompt.rendering import ModelLike, check_ids, layout, prompt_tokens
from embedgrad.prompt.template import Template
from embedgrad.util.errors import PromptError, TemplateError
from embedgrad.util.shown import short

SYSTEM_TURN = Template.chat([{"role": "system", "content": "{prompt}"}, {"role": "user", "content": "{query}"}])
USER_TURN = Template.chat([{"role": "user", "content": "{prompt}\n\n{query}"}])
PLAIN_TEXT = Template.text("{prompt}\n\n{query}\n\n")


@dataclass(frozen=True, eq=False)
class SoftPrompt:
    """A prompt of k tokens for a model with hidden size d. Immutable.

    embeddings: [k, d] float32 or float64, the prompt rows. They replace the embeddings of the prompt's tokens.
    anchor: [k, d] float32, the rows of the model's embedding table that the prompt starts from.
    token_ids: ids of these k rows. text: the text that the prompt was made of.
    template: where the prompt stands.
    model_name, anchor_hash: the model and the sha256 of the anchor (`hash_rows`), which identify the embedding table.
    metadata: JSON values, such as trust region and metrics.
    layout_ids, layout_rows: the tokens before the answer with the query as one id −1, and for each of them the prompt
        row that it shows, or −1. A prompt in use is compared with them (`check_model`).
    fingerprint: tells the model from fine-tunes of it, which have the same table; None in files of earlier versions.
    """

    embeddings: torch.Tensor
    anchor: torch.Tensor
    token_ids: list[int]
    text: str
    template: Template
    model_name: str
    anchor_hash: str
    metadata: dict[str, Any] = field(default_factory=dict)
    layout_ids: list[int] = field(default_factory=list)
    layout_rows: list[int] = field(default_factory=list)
    fingerprint: Fingerprint | None = None

    def __post_init__(self) -> None:
        if self.embeddings.dtype not in (torch.float32, torch.float64) or self.anchor.dtype != torch.float32:
            raise PromptError("a prompt's embeddings must be float32 (or float64) and its anchor float32.")
        if self.anchor.dim() != 2 or 0 in self.anchor.shape or self.embeddings.shape != self.anchor.shape:
            raise PromptError(
                "a prompt's embeddings and anchor must have one shape [tokens, hidden size], "
                f"not {short(list(self.embeddings.shape))} and {short(list(self.anchor.shape))}."
            )
        if len(self.token_ids) != self.anchor.shape[0]:
            raise PromptError(f"a prompt of {self.anchor.shape[0]} rows must not have {len(self.token_ids)} token ids.")

    @classmethod
    def from_text(cls, model: PromptModel, text: str, template: Template | None = None) -> SoftPrompt:
        """A prompt whose embeddings are those of `text`.

        template: where it stands; None: `default_template(model)`. Raises PromptError, ContextError, TemplateError.
        """
        if not isinstance(text, str):
            raise PromptError(f"the prompt must be text, not {type(text).__name__}; from_ids takes token ids.")
        if not text.strip():
            raise PromptError("the prompt is empty: it needs at least one token.")
        template = default_template(model, template)
        return cls._start(model, prompt_tokens(model, template, text), text, template)

    @classmethod
    def from_ids(cls, model: PromptModel, ids: Sequence[int], template: Template | None = None) -> SoftPrompt:
        """A prompt of exactly these token ids; its text is the decoded ids. Raises the same errors as `from_text`."""
        values = check_ids(ids, int(model.config.vocab_size), "the prompt", PromptError)
        text = model.tokenizer.decode(values, skip_special=False)
        return cls._start(model, values, text, default_template(model, template))

    @classmethod
    def _start(cls, model: PromptModel, ids: list[int], text: str, template: Template) -> SoftPrompt:
        check_ids(ids, int(model.config.vocab_size), "the prompt", PromptError)
        template = dated(template, model.tokenizer)
        layout_ids, layout_rows = layout(model, template, ids, text)
        anchor = model.embedding_rows(ids).detach().to("cpu", torch.float32).clone()
        return cls(
            embeddings=anchor.clone(),
            anchor=anchor,
            token_ids=ids,
            text=text,
            template=template,
            model_name=model.name,
            anchor_hash=belonging.hash_rows(anchor),
            layout_ids=layout_ids,
            layout_rows=layout_rows,
            fingerprint=getattr(model, "fingerprint", None),
        )

    @classmethod
    def _from_file(cls, tensors: Mapping[str, torch.Tensor], fields: Mapping[str, str]) -> SoftPrompt:
        embeddings, anchor = tensors["embeddings"], tensors["anchor"]
        token_ids, layout_ids, layout_rows = (_integers(tensors[name], name) for name in _TENSORS[2:])
        try:
            metadata = json.loads(fields["metadata"])
        except (ValueError, RecursionError):
            metadata = None
        if not isinstance(metadata, dict):
            raise PromptError("its metadata is not a JSON object.")
        template = Template.from_json(fields["template"])
        if not template.has_messages:
            raise PromptError("its template has no messages.")
        numbers = tensors.get("fingerprint")
        if numbers is not None and (numbers.dtype != torch.float32 or numbers.dim() != 1):
            raise PromptError("its fingerprint of the model is no list of float32.")
        prompt = cls(
            embeddings=embeddings,
            anchor=anchor,
            token_ids=token_ids,
            text=fields["text"],
            template=template,
            model_name=fields["model"],
            anchor_hash=fields["anchor_hash"],
            metadata=metadata,
            layout_ids=layout_ids,
            layout_rows=layout_rows,
            fingerprint=None if numbers is None else Fingerprint(numbers, fields.get("fingerprint_exact") == "true"),
        )
        if min(token_ids) < 0:
            raise PromptError("its token ids are negative.")
        if not belonging.fits(layout_ids, layout_rows, token_ids):
            raise PromptError("its layout does not fit its prompt rows.")
        if not (bool(embeddings.isfinite().all()) and bool(anchor.isfinite().all())):
            raise PromptError("it holds numbers that are not finite.")
        if belonging.hash_rows(anchor) != prompt.anchor_hash:
            raise PromptError("its anchor does not match the anchor's hash.")
        return prompt

    def replace(
        self, *, embeddings: torch.Tensor | None = None, metadata: Mapping[str, Any] | None = None
    ) -> SoftPrompt:
        """A copy of the prompt with other embeddings [k, d] or other metadata; None keeps the present ones."""
        return dataclass_replace(
            self,
            embeddings=self.embeddings if embeddings is None else embeddings.detach().cpu(),
            metadata=dict(self.metadata if metadata is None else metadata),
        )

    def behind(self, model: PromptModel, template: Template) -> SoftPrompt:
        """A copy of the prompt in another template. Raises TemplateError, ContextError."""
        ids, rows = layout(model, template, self.token_ids, self.text)
        return dataclass_replace(self, template=template, layout_ids=ids, layout_rows=rows)

    def similarity(self) -> torch.Tensor:
        """Cosine similarity of each prompt row to its anchor, [k] float64.

        `trust_region.cosine_similarity` defines it for zeros too: 0 for a zero prompt row, 1 for a zero anchor.
        """
        return cosine_similarity(self.embeddings.detach(), self.anchor)

    def check_model(self, model: PromptModel) -> None:
        """Raises PromptError unless the prompt was made for `model`, and gives a LayoutWarning for another layout.

        See `embedgrad.prompt.belonging`.
        """
        belonging.check(self, model)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the prompt to a safetensors file, whole or not at all.

        Raises PromptError where the metadata are not JSON values or the embeddings are not finite (`load` would refuse
        them), and SaveError where the file cannot be written.
        """
        if not bool(self.embeddings.isfinite().all()):
            raise PromptError(f"the prompt is not saved to {path}: it holds numbers that are not finite.")
        try:
            metadata = json.dumps(self.metadata)
        except (TypeError, ValueError, RecursionError) as error:
            raise PromptError(f"a prompt's metadata must be JSON values: {error}.") from error
        tensors = {
            "embeddings": self.embeddings,
            "anchor": self.anchor,
            "token_ids": torch.tensor(self.token_ids, dtype=torch.int64),
            "layout_ids": torch.tensor(self.layout_ids, dtype=torch.int64),
            "layout_rows": torch.tensor(self.layout_rows, dtype=torch.int64),
        }
        if self.fingerprint is not None:
            tensors["fingerprint"] = self.fingerprint.values
        fields = {
            "text": self.text,
            "template": self.template.to_json(),
            "model": self.model_name,
            "anchor_hash": self.anchor_hash,
            "library": f"embedgrad {_library_version()}",
            "metadata": metadata,
        }
        if self.fingerprint is not None:
            fields["fingerprint_exact"] = json.dumps(self.fingerprint.exact)
        write_prompt_file(path, tensors, fields)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: PromptModel | None = None) -> SoftPrompt:
        """Reads a file that `save` wrote. With `model`, checks that the prompt belongs to it (`check_model`).

        Nothing in the file is executed. Raises PromptError for a damaged file or another model.
        """
        tensors, fields = read_prompt_file(path)
        missing = [name for name in _TENSORS if name not in tensors] + [name for name in _FIELDS if name not in fields]
        if missing:
            raise PromptError(f"the prompt file {path} lacks {missing[0]}.")
        try:
            prompt = cls._from_file(tensors, fields)
        except (PromptError, TemplateError) as error:
            raise PromptError(f"the prompt file {path} cannot be used: {error}") from error
        if model is not None:
            prompt.check_model(model)
        return prompt


_TENSORS = ("embeddings", "anchor", "token_ids", "layout_ids", "layout_rows")
_FIELDS = ("text", "template", "model", "anchor_hash", "metadata")


def _integers(tensor: torch.Tensor, name: str) -> list[int]:
    if tensor.dtype != torch.int64 or tensor.dim() != 1:
        raise PromptError(f"its {name} must be a list of int64, not {tensor.dtype} {short(list(tensor.shape))}.")
    return [int(value) for value in tensor.tolist()]


def _library_version() -> str:
    try:
        return version("embedgrad")
    except PackageNotFoundError:
        return "unknown"


def default_template(model: ModelLike, given: Template | None = None) -> Template:
    """The template of a prompt: the one that is given, or the model's default with the settings that are given.

    - The prompt is the system turn and the query the user's turn.
    - Where the chat template refuses or drops system messages, the prompt stands in the user's turn before the query.
    - For a model without a chat template, prompt and query are plain text with empty lines between them.

    Raises TemplateError where settings of a chat template are given and there is none.
    """
    if given is not None and given.has_messages:
        return given
    if model.tokenizer.chat_template is None and (given is None or given.chat_template is None):
        return PLAIN_TEXT if given is None else given.completed(PLAIN_TEXT)
    system, user = (turn if given is None else given.completed(turn) for turn in (SYSTEM_TURN, USER_TURN))
    try:
        layout(model, system, [0], "x")
    except TemplateError:
        return user
    return system
