"""The tokenizer files of a model copy in the format of Hugging Face."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from embedgrad.exports.same_ids import conversations, right_names, wrong_names
from embedgrad.exports.source import NamedPrompt, Source
from embedgrad.exports.vocabulary import NewTokens, Vocabulary, vocabulary
from embedgrad.model.fields import read_object
from embedgrad.model.files.gguf_tokenizer import build_backend
from embedgrad.model.tokenizer import Tokenizer
from embedgrad.util.errors import ExportError, ModelError

JSON, CONFIG, JINJA, LEGACY = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json"
FILES = (JSON, CONFIG, JINJA, LEGACY, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def write_tokenizer(source: Source, prompts: Sequence[NamedPrompt], out: Path) -> Vocabulary:
    """Writes the tokenizer with the prompts' tokens, and tries it on conversations.

    Raises ExportError where the copy would read a conversation otherwise than our rendering does.
    """
    files = _gguf_files(source) if source.gguf is not None else _folder_files(source.path)
    table = files[JSON]
    known = _known(table) | set(source.tokenizer.special.values())
    special = not is_sentencepiece(table)
    missing = _missing_tokens(files, table)
    first = max(source.tokenizer.vocab_size, 1 + max((token["id"] for token in missing), default=-1))

    def attempt(spaced: Collection[str]) -> tuple[Vocabulary, dict[str, str]]:
        words = vocabulary(source, prompts, special=special, first_id=first, known=known, spaced=spaced)
        _write(files, missing, words, out)
        tokenizer = Tokenizer.from_folder(out)
        _check_ids(out, words)
        return words, wrong_names(tokenizer, words, conversations(source, prompts, words))

    return right_names(attempt)


def is_sentencepiece(table: dict[str, Any]) -> bool:
    """Whether tokenizer.json holds a SentencePiece BPE, whose pieces of a text get a space in front."""
    model = table.get("model", {})
    return model.get("type", "BPE") == "BPE" and bool(model.get("byte_fallback"))


def _folder_files(folder: Path) -> dict[str, Any]:
    """The tokenizer's files by name: JSON objects, and other files as text."""
    found: dict[str, Any] = {}
    for name in FILES:
        if (folder / name).is_file():
            try:
                path = folder / name
                found[name] = read_object(path) if name.endswith(".json") else path.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise ModelError(f"{folder / name} is not readable text; fetch it again.") from error
    return found


def _gguf_files(source: Source) -> dict[str, Any]:
    """The tokenizer of a GGUF file as the files of a folder."""
    assert source.gguf is not None
    tokenizer = source.tokenizer
    backend = build_backend(source.gguf.metadata, str(source.path))
    if tokenizer.adds_bos and tokenizer.bos_id is not None:
        bos = tokenizer.token(tokenizer.bos_id)
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_id)]
        )
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= tokenizer.special | {"model_max_length": source.config.max_position}
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    return {JSON: json.loads(backend.to_str()), CONFIG: config}


def _known(table: dict[str, Any]) -> set[str]:
    entries = table.get("model", {}).get("vocab", {})
    texts = set(entries) if isinstance(entries, dict) else {entry[0] for entry in entries}
    return texts | {token["content"] for token in table.get("added_tokens") or ()}


def _missing_tokens(files: dict[str, Any], table: dict[str, Any]) -> list[dict[str, Any]]:
    """Tokens that only tokenizer_config.json declares, as entries of tokenizer.json."""
    found = files.get(CONFIG, {}).get("added_tokens_decoder")
    declared = found if isinstance(found, dict) else {}
    have = {token["content"] for token in table.get("added_tokens") or ()}
    return [
        {"id": int(key), "content": entry["content"], **{flag: bool(entry.get(flag)) for flag in _FLAGS}}
        for key, entry in sorted(declared.items(), key=lambda item: int(item[0]))
        if entry["content"] not in have
    ]


def _write(files: dict[str, Any], missing: list[dict[str, Any]], words: Vocabulary, out: Path) -> None:
    for name, content in files.items():
        if name == JSON:
            content = _with_tokens(content, missing, words)
        elif name == CONFIG:
            content = _config(content, words, has_file=JINJA in files)
        elif name == JINJA:
            content = words.chat_template
        elif name == LEGACY:
            content = {**content, "chat_template": words.chat_template}
        elif name == "added_tokens.json" and words.special:
            content = content | {text: id for t in words.tokens for text, id in zip(t.texts, t.ids, strict=True)}
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        (out / name).write_text(text, encoding="utf-8")
    if CONFIG not in files:
        content = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": words.chat_template}
        (out / CONFIG).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _with_tokens(table: dict[str, Any], missing: list[dict[str, Any]], words: Vocabulary) -> dict[str, Any]:
    """tokenizer.json with the new tokens. It stays in its format, which older programs can read."""
    added = [*(table.get("added_tokens") or ()), *missing]
    if words.special:
        new = [_added(text, id, special=True) for t in words.tokens for text, id in zip(t.texts, t.ids, strict=True)]
        return {**table, "added_tokens": added + new}
    model = dict(table["model"])
    model["vocab"] = model["vocab"] | {text: id for t in words.tokens for text, id in zip(t.texts, t.ids, strict=True)}
    # The package gives added tokens outside the model's vocabulary the ids behind it; inside they keep theirs.
    model["vocab"] |= {token["content"]: token["id"] for token in added}
    pairs = [tokens.merge for tokens in words.tokens if tokens.merge is not None]
    as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
    model["merges"] = [*model["merges"], *(" ".join(pair) if as_text else list(pair) for pair in pairs)]
    return {**table, "model": model, "added_tokens": added}


def _added(text: str, id: int, special: bool) -> dict[str, Any]:
    return {"id": id, "content": text, **dict.fromkeys(_FLAGS, False), "special": special}


def _config(config: dict[str, Any], words: Vocabulary, has_file: bool) -> dict[str, Any]:
    result = dict(config)
    if isinstance(config.get("added_tokens_decoder"), dict) and words.special:
        entries = [_added(text, id, True) for t in words.tokens for text, id in zip(t.texts, t.ids, strict=True)]
        new = {str(entry.pop("id")): entry for entry in entries}
        result["added_tokens_decoder"] = config["added_tokens_decoder"] | new
    template = config.get("chat_template")
    if isinstance(template, list):
        result["chat_template"] = [
            each | {"template": words.chat_template} if each.get("name") == "default" else each for each in template
        ]
    elif template is not None or not has_file:
        result["chat_template"] = words.chat_template
    return result


def _check_ids(out: Path, words: Vocabulary) -> None:
    backend = tokenizers.Tokenizer.from_file(str(out / JSON))
    for tokens in words.tokens:
        for text, id in zip(tokens.texts, tokens.ids, strict=True):
            found = backend.token_to_id(text)
            if found != id:
                raise ExportError(
                    f"the tokenizer gives the new token {text!r} the id {found} instead of {id}; its vocabulary has "
                    f"gaps, which an export cannot fill."
                )


def new_tokens(words: Vocabulary, name: str) -> NewTokens:
    """The tokens of the prompt `name`."""
    return next(tokens for tokens in words.tokens if tokens.name == name)
