"""Text to token ids and back, with the `tokenizers` package, from a Hugging Face folder or from GGUF metadata.

tokenizer.json is taken as it stands; as in transformers, it and not tokenizer_config.json's add_bos_token says whether
a text gets a BOS. (transformers 5 rebuilds some tokenizers by the class that tokenizer_config.json names; where the two
differ, this is what the model's own file says.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
from tokenizers import AddedToken

from embedgrad.errors import DataError, ModelError
from embedgrad.model.fields import read_object
from embedgrad.model.gguf_tokenizer import build_backend

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_SURROGATE = re.compile("[\ud800-\udfff]")
_T = TypeVar("_T")


class Tokenizer:
    """Encodes without adding special tokens; special tokens that stand in the text are recognised as such."""

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
        """`adds_bos`: plain text gets `bos_id` in front; `special`: bos_token, eos_token, ... for chat templates."""
        backend.no_truncation()
        backend.no_padding()
        backend.post_processor = None  # adds special tokens and trims offsets; neither is wanted
        self._backend = backend
        self.bos_id = bos_id
        self.eos_ids = tuple(sorted(set(eos_ids)))
        self.adds_bos = adds_bos and bos_id is not None
        self.chat_template = chat_template
        self.special = dict(special)
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Raises DataError for a string that is no Unicode text (half a surrogate pair)."""
        return list(self._encoding(text).ids)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and for each the characters [start, end) of `text` it stands for; a character that is spread over
        several tokens belongs to each of them."""
        encoding = self._encoding(text)
        return list(encoding.ids), [(int(start), int(end)) for start, end in encoding.offsets]

    def _encoding(self, text: str) -> tokenizers.Encoding:
        if not text.isascii() and _SURROGATE.search(text):
            raise DataError(f"{text[:40]!r}... holds half a surrogate pair, which is no character; repair the text.")
        return self._backend.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`; ids of embedding rows that are no token say nothing."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    def texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each id by itself; half a character of UTF-8 shows as U+FFFD."""
        return [self.decode([id], skip_special=False) for id in ids]

    def token(self, id: int) -> str:
        """The vocabulary's own spelling of a token; empty for an embedding row that is no token."""
        return self._backend.id_to_token(id) or ""

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json and the files beside it. Raises ModelError."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                f"{folder} has no tokenizer.json; save the model's fast tokenizer there "
                f"(transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...))."
            )
        backend = _guarded(lambda: tokenizers.Tokenizer.from_file(str(path)), f"{path} is not a usable tokenizer")
        config = _optional(folder / "tokenizer_config.json")
        special = _special_tokens(_optional(folder / "special_tokens_map.json") | config)
        _guarded(lambda: _add_tokens(backend, config, special, folder), f"{folder}: the added tokens are not usable")
        before = _guarded(lambda: _added_in_front(backend, str(path)), f"{path} is not a usable tokenizer")
        model, generation = _optional(folder / "config.json"), _optional(folder / "generation_config.json")
        bos = backend.token_to_id(special["bos_token"]) if "bos_token" in special else None
        if before:
            bos = before[0]
        elif bos is None:
            bos = next(iter(_ids(model.get("bos_token_id"))), None)
        eos = _ids(model.get("eos_token_id")) + _ids(generation.get("eos_token_id"))
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
        """Build the tokenizer that GGUF metadata describes. Raises ModelError."""
        backend = _guarded(lambda: build_backend(metadata, where), f"{where}: the tokenizer's tables are not usable")
        kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
        ids: dict[str, int] = {}
        for name in ("bos", "eos", "unknown", "padding", "eot", "eom"):
            value = metadata.get(f"tokenizer.ggml.{name}_token_id")
            if isinstance(value, int) and backend.id_to_token(value) is not None:
                ids[name] = value
        special = {
            key: str(backend.id_to_token(ids[name]))
            for key, name in zip(_SPECIAL[:4], ("bos", "eos", "unknown", "padding"), strict=True)
            if name in ids
        }
        # What llama.cpp assumes where the key is absent.
        adds_bos = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre in ("llama-bpe", "llama3"))
        template = metadata.get("tokenizer.chat_template")
        return cls(
            backend,
            bos_id=ids.get("bos"),
            eos_ids=[ids[name] for name in ("eos", "eot", "eom") if name in ids],
            adds_bos=bool(adds_bos),
            chat_template=template if isinstance(template, str) else None,
            special=special,
        )


def _guarded(action: Callable[[], _T], what: str) -> _T:
    """Run `action`; what the tokenizers package raises on bad tables (panics are no Exception) is a ModelError."""
    try:
        return action()
    except (ModelError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(f"{what} ({reason}); fetch it again.") from error


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int) and not isinstance(item, bool) and item >= 0]


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by role; some files write them as strings, some as objects with `content`."""
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
    """Tokens that only tokenizer_config.json declares, under the ids it gives them; and roles make a token special."""
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
    """The ids that tokenizer.json itself puts before a text."""
    plain, full = (backend.encode("a", add_special_tokens=flag).ids for flag in (False, True))
    front = full[: next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)] if plain else []
    if len(front) > 1:
        raise ModelError(f"{where} puts {len(front)} tokens before a text; at most one is supported.")
    return list(front)


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else tokenizer_config.json (one template, or the one named default), else
    chat_template.json."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelError(f"{file} is not readable text; fetch it again.") from error
    found = config.get("chat_template")
    if found is None:
        found = _optional(folder / "chat_template.json").get("chat_template")
    if isinstance(found, list):
        found = next((e.get("template") for e in found if isinstance(e, dict) and e.get("name") == "default"), None)
    return found if isinstance(found, str) else None
