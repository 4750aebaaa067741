"""The model that is exported: its checkpoint, its files, and the prompts that belong to it."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from embedgrad.maths.trust_region import cosine_similarity
from embedgrad.model.checkpoint import Checkpoint, read_checkpoint
from embedgrad.model.config import ModelConfig, is_composite
from embedgrad.model.fields import read_object
from embedgrad.model.files.gguf import GgufFile
from embedgrad.model.files.hub import resolve
from embedgrad.model.fingerprint import Fingerprint
from embedgrad.model.tokenizer import Tokenizer
from embedgrad.prompt.belonging import hash_rows
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.rendering import layout
from embedgrad.util.errors import ConfigError, EmbedGradError, PromptError

Prompts = SoftPrompt | str | os.PathLike[str]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Rows of a fine-tune point where those of its base do. Rows of unrelated models share at most a common mean.
LEAST_FORCED_SIMILARITY = 0.8
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RESERVED = ("none",)


class ForcedPromptWarning(UserWarning):
    """A prompt is used with a model that it was not made for."""


@dataclass(frozen=True)
class Source:
    """An opened checkpoint. It has what prompts need of a model (`PromptModel`); weights stay in the file.

    path: the folder or the .gguf file. asked: what the user called it.
    """

    path: Path
    asked: str
    checkpoint: Checkpoint

    @classmethod
    def open(cls, path_or_id: str | os.PathLike[str]) -> Source:
        """Opens a folder, a .gguf file or a hub id. Raises ModelError."""
        path = resolve(path_or_id)
        checkpoint = read_checkpoint(path)
        if isinstance(checkpoint.tensors, GgufFile):
            path = checkpoint.tensors.path
        return cls(path.resolve(), os.fspath(path_or_id), checkpoint)

    @property
    def gguf(self) -> GgufFile | None:
        """The GGUF file; None where the model is a folder of safetensors."""
        tensors = self.checkpoint.tensors
        return tensors if isinstance(tensors, GgufFile) else None

    @property
    def config(self) -> ModelConfig:
        return self.checkpoint.config

    @property
    def tokenizer(self) -> Tokenizer:
        return self.checkpoint.tokenizer

    @property
    def name(self) -> str:
        return self.checkpoint.name

    @cached_property
    def table(self) -> Tensor:
        """The embedding table [V, d] in a float type."""
        return self.checkpoint.tensors.get(EMBEDDING)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """What tells the model from its fine-tunes."""
        return Fingerprint.of(self.checkpoint)

    def embedding_rows(self, ids: list[int], /) -> Tensor:
        """Rows of the embedding table, [n, d] float32 on the CPU."""
        return self.table[torch.tensor(ids)].float()

    @property
    def input_scale(self) -> float:
        """What programs that take embeddings expect them to be multiplied by."""
        return self.config.input_scale

    @cached_property
    def is_composite(self) -> bool:
        """Whether it is the text part of a multimodal model."""
        return self.gguf is None and is_composite(read_object(self.path / "config.json"))

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding table."""
        return self.config.tied


@dataclass(frozen=True)
class NamedPrompt:
    """A prompt and the name by which callers choose it."""

    name: str
    prompt: SoftPrompt


def named_prompts(
    prompts: Prompts | Sequence[Prompts] | Mapping[str, Prompts], names: Sequence[str], source: Source, force: bool
) -> list[NamedPrompt]:
    """The prompts with their names, checked against the model.

    names: one for each prompt; empty: the keys of a mapping, or names made of the files' names. force: take a prompt of
    another model whose embedding rows for its tokens are similar, such as the base of a fine-tune. Raises PromptError,
    ConfigError.
    """
    if isinstance(prompts, Mapping):
        names, prompts = list(prompts), list(prompts.values())
    elif isinstance(prompts, (SoftPrompt, str, os.PathLike)):
        prompts = [prompts]
    if not prompts:
        raise ConfigError("there is no prompt to export; name at least one prompt file.")
    chosen = prompt_names(prompts, names)
    return [
        NamedPrompt(name, _fitting(given if isinstance(given, SoftPrompt) else SoftPrompt.load(given), source, force))
        for name, given in zip(chosen, prompts, strict=True)
    ]


def prompt_names(prompts: Sequence[Prompts], names: Sequence[str]) -> list[str]:
    """One name for each prompt: `names`, or where it is empty names made of the files' names. Raises ConfigError."""
    if names and len(names) != len(prompts):
        raise ConfigError(f"{len(prompts)} prompts need as many names, not {len(names)}; repeat --name for each.")
    chosen = [_name(given, names[i] if names else "", i) for i, given in enumerate(prompts)]
    twice = next((name for name in chosen if chosen.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"two prompts are called {twice!r}; give each a name of its own with --name.")
    return chosen


def _name(given: Prompts, name: str, index: int) -> str:
    if not name:
        name = f"prompt{index or ''}" if isinstance(given, SoftPrompt) else _stem(Path(given))
    if not _NAME.fullmatch(name) or name in _RESERVED:
        raise ConfigError(
            f"{name!r} cannot be a prompt's name: it needs 1 to 64 letters, digits, '.', '_' or '-', begins with a "
            f"letter or digit and is not {_RESERVED[0]!r}."
        )
    return name


def _stem(path: Path) -> str:
    """A name for a prompt file: that of the run for runs/NAME/prompt.safetensors. Characters that it lacks are '-'."""
    stem = path.absolute().parent.name if path.name == "prompt.safetensors" else path.name.removesuffix(".safetensors")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("._-")[:64] or "prompt"


def _fitting(prompt: SoftPrompt, source: Source, force: bool) -> SoftPrompt:
    """The prompt, which belongs to the model; with `force` its anchor becomes the model's rows. Raises PromptError."""
    try:
        prompt.check_model(source)
    except PromptError as error:
        if not force:
            raise PromptError(f"{str(error).rstrip('.')}; --force takes it for a fine-tune of that model.") from error
        prompt = _forced(prompt, source, error)
    if not bool(prompt.embeddings.isfinite().all()):
        raise PromptError("the prompt holds numbers that are not finite; it cannot be exported.")
    return prompt


def _forced(prompt: SoftPrompt, source: Source, reason: EmbedGradError) -> SoftPrompt:
    if source.config.hidden_size != prompt.anchor.shape[1] or max(prompt.token_ids) >= source.config.vocab_size:
        raise PromptError(f"{reason} --force cannot change that.") from reason
    rows = source.embedding_rows(prompt.token_ids)
    similarity = float(cosine_similarity(rows, prompt.anchor).mean())
    if similarity < LEAST_FORCED_SIMILARITY:
        raise PromptError(
            f"{source.name} is no fine-tune of {prompt.model_name}: the mean cosine of their embedding rows for the "
            f"prompt's tokens is {similarity:.2f}, and --force asks for {LEAST_FORCED_SIMILARITY}."
        ) from reason
    ids, shown = layout(source, prompt.template, prompt.token_ids, prompt.text)
    same = (ids, shown) == (list(prompt.layout_ids), list(prompt.layout_rows))
    warnings.warn(
        f"the prompt was made for {prompt.model_name} and is exported for {source.name} (mean cosine of their rows "
        f"{similarity:.3f}{'' if same else ', another template'}); measure it there.",
        ForcedPromptWarning,
        stacklevel=2,
    )
    anchor = rows.clone()
    return replace(
        prompt, anchor=anchor, anchor_hash=hash_rows(anchor), layout_ids=ids, layout_rows=shown,
        fingerprint=source.fingerprint,
    )  # fmt: skip
