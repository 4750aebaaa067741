"""The tokenizer of a Hugging Face folder or of GGUF metadata, on top of the `tokenizers` package.

tokenizer.json is used unchanged. As in transformers, tokenizer.json decides whether a text gets a BOS token, not
`add_bos_token` in tokenizer_config.json. transformers 5 rebuilds some tokenizers from the class that
tokenizer_config.json names; where its result differs, this module follows tokenizer.json.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
from tokenizers import AddedToken

from embedgrad.model.fields import read_object
from embedgrad.model.files.gguf_tokenizer import build_backend
from embedgrad.model.files.recognise import stand_in
from embedgrad.model.files.tokenizer_steps import check_steps
from embedgrad.model.literal import ControlTokens, LiteralTokenizer, control_tokens
from embedgrad.util.errors import DataError, ModelError
from embedgrad.util.shown import first_line, short

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_SURROGATE = re.compile("[\ud800-\udfff]")
_LARGEST_ID = 2**31 - 1
_NOT_OF_THE_PACKAGE = (KeyboardInterrupt, SystemExit, MemoryError)  # all other errors, panics too, come from tokenizers
_T = TypeVar("_T")


class Tokenizer:
    """Encodes text without adding special tokens. Special tokens that occur in the text are recognised."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None,
        eos_ids: Sequence[int],
        adds_bos: bool,
        chat_template: str | None,
        special: Mapping[str, str],
    ) -> None:
        """adds_bos: plain text is preceded by `bos_id`. special: bos_token, eos_token, ... for chat templates.

        Sets `vocab_size` and `words`, the ids that all tokens need and those that all tokens but the added ones need.
        """
        backend.no_truncation()
        backend.no_padding()
        backend.post_processor = None  # it would add special tokens and trim offsets
        self._backend = backend
        self.bos_id = bos_id
        self.eos_ids = tuple(sorted(set(eos_ids)))
        self.adds_bos = adds_bos and bos_id is not None
        self.chat_template = chat_template
        self.special = dict(special)
        added = backend.get_added_tokens_decoder()
        ids = backend.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1
        self.words = max((id for id in ids if id not in added), default=-1) + 1
        self.controls = ControlTokens(control_tokens(backend))

    @cached_property
    def literal(self) -> LiteralTokenizer:
        """What tokenises text in which the texts of control tokens are ordinary text."""
        return LiteralTokenizer(self._backend, self.controls)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`.

        Raises DataError for a text that the tokenizer has no tokens for, and for half a surrogate pair, which is no
        character.
        """
        return list(self._encoding(text).ids)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """(token ids, for each token the range [start, end) of its characters in `text`).

        A character that several tokens share is in the range of each of them.
        """
        encoding = self._encoding(text)
        return list(encoding.ids), [(int(start), int(end)) for start, end in encoding.offsets]

    def _encoding(self, text: str) -> tokenizers.Encoding:
        if not text.isascii() and _SURROGATE.search(text):
            raise DataError(f"{text[:40]!r}... holds half a surrogate pair, which is no character; repair the text.")
        try:
            return self._backend.encode(text, add_special_tokens=False)
        except _NOT_OF_THE_PACKAGE:
            raise
        except BaseException as error:  # such as an unknown character and no token for unknown ones
            raise DataError(f"the tokenizer cannot encode {short(text)}: {first_line(error)}.") from error

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`. An id without a token (an unused row of the embedding table) gives no text.

        skip_special: leave out special tokens.
        """
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    def texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each id alone; an incomplete UTF-8 character gives U+FFFD."""
        return [self.decode([id], skip_special=False) for id in ids]

    def token(self, id: int) -> str:
        """A token as the vocabulary spells it; empty for an id without a token."""
        return self._backend.id_to_token(id) or ""

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Reads tokenizer.json and the configuration files in the same folder. Raises ModelError."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                f"{folder} has no tokenizer.json; save the model's fast tokenizer there "
                f"(transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...))."
            )
        if (found := stand_in(path)) is not None:
            raise ModelError(f"{path} {found}.")
        backend = _guarded(lambda: tokenizers.Tokenizer.from_file(str(path)), f"{path} is not a usable tokenizer")
        # Training programs save their padding and truncation; both would apply to the next line that encodes.
        backend.no_padding()
        backend.no_truncation()
        _guarded(lambda: check_steps(backend, str(path)), f"{path} is not a usable tokenizer")
        config = _optional(folder / "tokenizer_config.json")
        special = _special_tokens(_optional(folder / "special_tokens_map.json") | config)
        _guarded(lambda: _add_tokens(backend, config, special, folder), f"{folder}: the added tokens are not usable")
        before = _guarded(lambda: _added_in_front(backend, str(path)), f"{path} is not a usable tokenizer")
        model, generation = _optional(folder / "config.json"), _optional(folder / "generation_config.json")
        bos = backend.token_to_id(special["bos_token"]) if "bos_token" in special else None
        if before:
            bos = before[0]
        elif bos is None:
            bos = next(iter(_ids(model, "bos_token_id", folder / "config.json")), None)
        eos = _ids(model, "eos_token_id", folder / "config.json")
        eos += _ids(generation, "eos_token_id", folder / "generation_config.json")
        if "eos_token" in special and (own := backend.token_to_id(special["eos_token"])) is not None:
            eos.append(own)
        return cls(
            backend,
            bos_id=bos,
            eos_ids=eos,
            adds_bos=bool(before),
            chat_template=_chat_template(folder, config),
            special=special,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], where: str = "GGUF file") -> Tokenizer:
        """Builds the tokenizer that GGUF metadata describe. `where` names the file in messages. Raises ModelError."""
        backend = _guarded(lambda: build_backend(metadata, where), f"{where}: the tokenizer's tables are not usable")
        kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
        ids: dict[str, int] = {}
        for name in ("bos", "eos", "unknown", "padding", "eot", "eom"):
            key = f"tokenizer.ggml.{name}_token_id"
            value = next(iter(_ids(metadata, key, where)), None)
            if value is not None and backend.id_to_token(value) is not None:
                ids[name] = value
        special = {
            key: str(backend.id_to_token(ids[name]))
            for key, name in zip(_SPECIAL[:4], ("bos", "eos", "unknown", "padding"), strict=True)
            if name in ids
        }
        # llama.cpp's default where the key is absent.
        default = kind == "llama" or pre in ("llama-bpe", "llama3", "tekken")
        adds_bos = metadata.get("tokenizer.ggml.add_bos_token", default)
        return cls(
            backend,
            bos_id=ids.get("bos"),
            eos_ids=[ids[name] for name in ("eos", "eot", "eom") if name in ids],
            adds_bos=bool(adds_bos),
            chat_template=_template_in(metadata, "tokenizer.chat_template", where),
            special=special,
        )


def _guarded(action: Callable[[], _T], what: str) -> _T:
    """The result of `action()`. Errors of the tokenizers package become a ModelError.

    On damaged tables the package also raises panics, which are not subclasses of Exception.
    """
    try:
        return action()
    except (ModelError, *_NOT_OF_THE_PACKAGE):
        raise
    except BaseException as error:
        raise ModelError(f"{what} ({first_line(error)}); fetch it again.") from error


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _ids(fields: Mapping[str, Any], name: str, where: object) -> list[int]:
    """The token ids of a field that holds one, several or none; a negative number is none. Raises ModelError."""
    value = fields.get(name)
    values = value if isinstance(value, list) else [value]
    ids = [item for item in values if isinstance(item, int) and not isinstance(item, bool) and item >= 0]
    if ids and max(ids) > _LARGEST_ID:
        raise ModelError(f'{where}: "{name}" is {short(value)}; a token id is at most {_LARGEST_ID}.')
    return ids


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by role. Some files hold them as strings, others as objects with the field `content`."""
    result = {}
    for name in _SPECIAL:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            result[name] = text
    return result


def _add_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], special: Mapping[str, str], folder: Path
) -> None:
    """Adds the tokens that only tokenizer_config.json declares, and makes every token with a role a special token.

    Raises ModelError where a token would not get the id that is declared for it.
    """
    have = {token.content for token in backend.get_added_tokens_decoder().values()}
    declared = config.get("added_tokens_decoder")
    for key, entry in sorted((declared if isinstance(declared, dict) else {}).items(), key=lambda item: int(item[0])):
        if entry["content"] in have:
            continue
        flags = {name: bool(entry.get(name)) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        backend.add_tokens([AddedToken(entry["content"], **flags)])
        have.add(entry["content"])
        if backend.token_to_id(entry["content"]) != int(key):
            raise ModelError(
                f"{folder}: tokenizer_config.json gives {entry['content']!r} the id {key}, but tokenizer.json leaves "
                f"it {backend.token_to_id(entry['content'])}."
            )
    for text in special.values():
        if text not in have and backend.token_to_id(text) is not None:
            backend.add_special_tokens([text])


def _added_in_front(backend: tokenizers.Tokenizer, where: str) -> list[int]:
    """The token ids that tokenizer.json puts before a text: none or one. Raises ModelError for more."""
    plain, full = (backend.encode("a", add_special_tokens=flag).ids for flag in (False, True))
    front = full[: next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)] if plain else []
    if len(front) > 1:
        raise ModelError(f"{where} puts {len(front)} tokens before a text; at most one is supported.")
    return list(front)


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template from chat_template.jinja, else tokenizer_config.json, else chat_template.json; None for none.

    Of several templates in one file it is the one named "default". Raises ModelError.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelError(f"{file} is not readable text; fetch it again.") from error
    if config.get("chat_template") is not None:
        return _template_in(config, "chat_template", folder / "tokenizer_config.json")
    file = folder / "chat_template.json"
    return _template_in(_optional(file), "chat_template", file)


def _template_in(fields: Mapping[str, Any], name: str, where: object) -> str | None:
    """The chat template in a field: a text, or texts by name as an object or as a list of objects."""
    value = found = fields.get(name)
    if isinstance(found, list) and all(isinstance(entry, dict) for entry in found):
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry.get("name"), str)}
    if isinstance(found, dict):
        found = found.get("default")
    if found is not None and not isinstance(found, str):
        raise ModelError(
            f'{where}: "{name}" is {short(value)}; it should be text (Jinja), or a list of named templates.'
        )
    return found
