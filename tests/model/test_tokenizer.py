"""Tokenizer against transformers' AutoTokenizer (folders), against tokenizer.json (GGUF), and against llama.cpp."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.model.checkpoint import read_checkpoint
from embedgrad.model.files.tokenizer_steps import LARGEST_GROWTH
from embedgrad.model.tokenizer import Tokenizer
from embedgrad.util.errors import DataError, ModelError
from tests.model import tiny

TEXTS = [
    "",
    " ",
    "\n\n",
    "Classify the sentiment of the movie review.",
    " leading and trailing  spaces   ",
    "tabs\tand\r\nline ends\n\n\n  indented",
    "It's 1234567 or 3.14, 1,000,000 and ½ ² ٣٤; don't, WE'LL, i'M",
    "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
    "<s>[INST] hi [/INST] there</s> again</s>",
    "<|begin_of_text|>x<|eot_id|> y",
    "é e\u0301 你好，世界 Привет 🙂👩‍👩‍👧 \u200b\ufeff ▁▂",
    "def f(x):\n    return [x**2 for x in range(10)]  # {a: 'b'} $^~|<=>\\",
    "a" * 70 + "9" * 20,
    "<0x41> <|endoftext",
]
PIECES = [
    " ",
    "\n",
    "'s",
    "the",
    "12",
    "<|im_end|>",
    "</s>",
    "<s>",
    "<|eot_id|>",
    "é",
    "e\u0301",
    "🙂",
    "▁",
    "movie",
    ".",
]
ANY_TEXT = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=12).map("".join)


def folder_of(style: str, tmp: Path, **config: Any) -> Path:
    tiny.write_tokenizer(tmp, style)
    if config:
        table = json.loads((tmp / "tokenizer_config.json").read_text())
        (tmp / "tokenizer_config.json").write_text(json.dumps({**table, **config}))
    return tmp


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Any]]:
    """Per style: ours and transformers' of the same folder."""
    result = {}
    for style in tiny.STYLES:
        folder = folder_of(style, tmp_path_factory.mktemp(style))
        result[style] = (Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder))
    return result


@pytest.fixture(scope="module")
def from_gguf() -> dict[str, Tokenizer]:
    result = {}
    for style in tiny.STYLES:
        metadata = tiny.tokenizer_metadata(style)
        for name in ("token_type", "scores"):
            key = f"tokenizer.ggml.{name}"
            if key in metadata:
                metadata[key] = np.array(metadata[key])
        result[style] = Tokenizer.from_gguf(metadata)
    return result


def assert_same_text(ours: Tokenizer, theirs: Any, text: str) -> None:
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    for skip in (True, False):
        expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert ours.decode(ids, skip_special=skip) == expected


@pytest.mark.parametrize("style", tiny.STYLES)
def test_texts_as_transformers(pairs: dict[str, tuple[Tokenizer, Any]], style: str) -> None:
    ours, theirs = pairs[style]
    for text in TEXTS:
        assert_same_text(ours, theirs, text)
    assert ours.vocab_size == len(theirs) == tiny.VOCABULARY
    assert [ours.token(id) for id in range(ours.vocab_size)] == theirs.convert_ids_to_tokens(range(ours.vocab_size))
    assert ours.bos_id == theirs.bos_token_id
    assert ours.eos_ids == (theirs.eos_token_id,)
    assert ours.special == {name: text for name, text in theirs.special_tokens_map.items() if isinstance(text, str)}
    assert ours.adds_bos == (theirs("a").input_ids[0] == theirs.bos_token_id)
    assert ours.chat_template == theirs.chat_template == tiny.CHAT_TEMPLATE


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(tiny.STYLES), ANY_TEXT)
def test_any_text_as_transformers(pairs: dict[str, tuple[Tokenizer, Any]], style: str, text: str) -> None:
    assert_same_text(*pairs[style], text)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(tiny.STYLES), ANY_TEXT)
def test_gguf_metadata_gives_the_same_tokenizer(
    pairs: dict[str, tuple[Tokenizer, Any]], from_gguf: dict[str, Tokenizer], style: str, text: str
) -> None:
    ours, theirs = from_gguf[style], pairs[style][0]
    ids = ours.encode_with_offsets(text)
    assert ids == theirs.encode_with_offsets(text)
    assert ours.decode(ids[0]) == theirs.decode(ids[0])
    assert (ours.bos_id, ours.eos_ids, ours.adds_bos) == (theirs.bos_id, theirs.eos_ids, theirs.adds_bos)
    assert (ours.special, ours.vocab_size) == (theirs.special, theirs.vocab_size)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([style for style in tiny.STYLES if style != "mistral"]), ANY_TEXT)
def test_byte_level_round_trip_and_offsets(pairs: dict[str, tuple[Tokenizer, Any]], style: str, text: str) -> None:
    """Nothing is lost, and the tokens' ranges go over the text from left to right without gaps."""
    ours, _ = pairs[style]
    text = unicodedata.normalize("NFC", text)  # qwen2 composes accents
    ids, offsets = ours.encode_with_offsets(text)
    assert ids == ours.encode(text)
    assert ours.decode(ids, skip_special=False) == text
    end = 0
    for start, stop in offsets:
        assert start <= end
        assert stop >= start
        end = max(end, stop)
    assert end == len(text)


def test_half_a_surrogate_pair(pairs: dict[str, tuple[Tokenizer, Any]]) -> None:
    with pytest.raises(DataError, match="surrogate"):
        pairs["smollm"][0].encode("a \ud800 b")
    with pytest.raises(DataError, match="surrogate"):
        pairs["smollm"][0].encode_with_offsets("\udfff")


PAD = {"pad_to_multiple_of": None, "pad_id": 2, "pad_type_id": 0, "pad_token": "x"}
CUT = {"direction": "Right", "strategy": "LongestFirst", "stride": 0}
PADDINGS = st.fixed_dictionaries(
    {
        "strategy": st.just("BatchLongest") | st.builds(lambda n: {"Fixed": n}, st.sampled_from([1, 16, 10**9])),
        "direction": st.sampled_from(["Left", "Right"]),
        "pad_to_multiple_of": st.sampled_from([None, 8, 10**9]),
    }
).map(lambda drawn: PAD | drawn)
TRUNCATIONS = st.integers(0, 3).map(lambda length: {**CUT, "max_length": length})


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(tiny.STYLES), st.none() | PADDINGS, st.none() | TRUNCATIONS)
def test_padding_and_truncation_of_the_file_do_not_apply(
    pairs: dict[str, tuple[Tokenizer, Any]], tmp_path_factory: Any, style: str, padding: Any, truncation: Any
) -> None:
    """They neither change a text's tokens, nor hide that BOS stands in front of it, nor take memory."""
    folder = folder_of(style, tmp_path_factory.mktemp("saved"))
    table = {**json.loads(tiny.tokenizer_json(style)), "padding": padding, "truncation": truncation}
    (folder / "tokenizer.json").write_text(json.dumps(table))
    found, right = Tokenizer.from_folder(folder), pairs[style][0]
    text = "Classify the sentiment of the movie review, 123456."
    assert found.encode_with_offsets(text) == right.encode_with_offsets(text)
    assert (found.adds_bos, found.bos_id, found.eos_ids) == (right.adds_bos, right.bos_id, right.eos_ids)


@pytest.mark.parametrize("style", ["smollm", "llama3", "mistral"])
@pytest.mark.parametrize(
    "config",
    [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"bos_token": None}],
    ids=str,
)
def test_adds_bos_as_transformers(tmp_path: Path, style: str, config: dict[str, Any]) -> None:
    folder = folder_of(style, tmp_path, **config)
    ours, theirs = Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)
    full, bare = theirs("The movie").input_ids, theirs("The movie", add_special_tokens=False).input_ids
    assert ([ours.bos_id] if ours.adds_bos else []) + ours.encode("The movie") == full
    assert bare == ours.encode("The movie")


def rewritten(folder: Path, **parts: Any) -> Path:
    """tokenizer.json of the folder with other parts."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **parts}))
    return folder


def steps(kind: str, single: list[Any]) -> dict[str, Any]:
    return {"type": "Sequence", kind: single}


def replace(content: str, **pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
GROWING = {
    "one": ("normalizer", replace("ab" * 200, String="a"), "Replace"),
    "doubling": ("normalizer", steps("normalizers", [replace("aa", String="a")] * 40), "Replace"),
    "empty matches": ("normalizer", steps("normalizers", [replace("-", Regex="x*")] * 40), "Replace"),
    "nested": ("normalizer", steps("normalizers", [steps("normalizers", [replace("a" * 20, String="a")])] * 2), "Repl"),
    "bytes": ("normalizer", steps("normalizers", [{"type": "ByteLevel"}] * 40), "ByteLevel"),
    "prepend": ("normalizer", {"type": "Prepend", "prepend": "a" * 10**6}, "characters in front"),
    "split": ("pre_tokenizer", steps("pretokenizers", [BYTES] * 40), "ByteLevel"),
    "decode": ("decoder", steps("decoders", [replace("aa", String="a")] * 40), "Replace"),
}


@pytest.mark.parametrize("case", GROWING.values(), ids=GROWING)
def test_steps_that_blow_a_text_up_are_refused_by_name(tmp_path: Path, case: tuple[str, Any, str]) -> None:
    part, step, name = case
    with pytest.raises(ModelError, match=rf"tokenizer\.json: its (normalizer|pre-tokenizer|decoder) .*{name}.*\.$"):
        Tokenizer.from_folder(rewritten(folder_of("smollm", tmp_path), **{part: step}))


def test_steps_of_published_tokenizers_are_read(tmp_path: Path) -> None:
    """Those of ALBERT, T5, Llama-2 and Gemma, and of GPT-2."""
    several = [replace(" ", Regex=" {2,}"), replace('"', String="``"), {"type": "NFKD"}, {"type": "StripAccents"}]
    several += [{"type": "Lowercase"}, {"type": "Prepend", "prepend": "▁"}, replace("▁", String=" ")]
    for normalizer in (None, steps("normalizers", several), {"type": "NFKC"}, replace("", Regex="\\s+$")):
        Tokenizer.from_folder(rewritten(folder_of("smollm", tmp_path), normalizer=normalizer))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([replace("bb", String="a"), replace("a-", Regex="b*"), {"type": "NFKC"}]), max_size=12))
def test_what_is_read_makes_no_text_longer_than_promised(tmp_path_factory: Any, drawn: list[Any]) -> None:
    folder = rewritten(folder_of("smollm", tmp_path_factory.mktemp("t")), normalizer=steps("normalizers", drawn))
    try:
        found = Tokenizer.from_folder(folder)
    except ModelError:
        return
    assert len(found.encode("ab" * 20)) <= (40 + 1) * LARGEST_GROWTH


@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_bpe_dropout_is_refused(tmp_path: Path, rate: float) -> None:
    model = json.loads(tiny.tokenizer_json("smollm"))["model"]
    with pytest.raises(ModelError, match=rf"leaves out merges at random \(dropout {rate:g}\)"):
        Tokenizer.from_folder(rewritten(folder_of("smollm", tmp_path), model={**model, "dropout": rate}))
    Tokenizer.from_folder(rewritten(folder_of("smollm", tmp_path), model={**model, "dropout": 0.0}))


def test_a_vocabulary_of_words_without_its_unknown_word_is_refused(tmp_path: Path) -> None:
    words: dict[str, Any] = {"vocab": {"a": 0, "movie": 1}, "unk_token": "[UNK]"}
    piece = {"type": "WordPiece", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    parts = {"pre_tokenizer": {"type": "Whitespace"}, "added_tokens": [], "post_processor": None, "decoder": None}
    for model in ({**words, **piece}, {**words, "type": "WordLevel"}):
        folder = rewritten(folder_of("smollm", tmp_path), model=model, **parts)
        with pytest.raises(ModelError, match=rf"its {model['type']} has no token '\[UNK\]' for unknown words"):
            Tokenizer.from_folder(folder)
        model["vocab"] = {**words["vocab"], "[UNK]": 2}
        assert Tokenizer.from_folder(rewritten(folder, model=model)).encode("a zebra movie") == [0, 2, 1]


def test_a_text_that_has_no_tokens_is_refused(tmp_path: Path) -> None:
    model = {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]], "byte_fallback": False}
    parts = {"pre_tokenizer": None, "added_tokens": [], "post_processor": None, "decoder": None}
    found = Tokenizer.from_folder(rewritten(folder_of("smollm", tmp_path), model=model, **parts))
    assert found.encode("aa") == [0, 0]
    with pytest.raises(DataError, match=r"^the tokenizer cannot encode 'zebra': .*\.$"):
        found.encode("zebra")


def test_several_tokens_before_a_text_are_refused(tmp_path: Path) -> None:
    folder = folder_of("mistral", tmp_path)
    table = json.loads((folder / "tokenizer.json").read_text())
    table["post_processor"]["single"].insert(0, table["post_processor"]["single"][0])
    (folder / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(ModelError, match="puts 2 tokens before a text"):
        Tokenizer.from_folder(folder)


def test_end_of_sequence_ids_are_united(tmp_path: Path) -> None:
    folder = folder_of("smollm", tmp_path)
    assert Tokenizer.from_folder(folder).eos_ids == (2,)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    assert Tokenizer.from_folder(folder).eos_ids == (0, 2)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    assert Tokenizer.from_folder(folder).eos_ids == (0, 2, 7)


def test_roles_as_objects_and_in_the_map(tmp_path: Path) -> None:
    folder = folder_of("smollm", tmp_path, bos_token={"__type": "AddedToken", "content": "<|endoftext|>"})
    found = Tokenizer.from_folder(folder)
    assert (found.bos_id, found.special["bos_token"]) == (0, "<|endoftext|>")
    (folder / "tokenizer_config.json").unlink()
    assert Tokenizer.from_folder(folder).special == {}
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    found = Tokenizer.from_folder(folder)
    assert (found.special, found.eos_ids) == ({"eos_token": "<|im_end|>"}, (2,))


def test_a_role_makes_an_ordinary_token_special(tmp_path: Path) -> None:
    table = json.loads(tiny.tokenizer_json("smollm"))
    word = max(table["model"]["vocab"], key=len)
    folder = folder_of("smollm", tmp_path, eos_token=word)
    ours, theirs = Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert_same_text(ours, theirs, f"x{word}y movie")
    assert ours.eos_ids == (theirs.eos_token_id,)


def test_tokens_that_only_the_configuration_declares(tmp_path: Path) -> None:
    entry = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    declared = {
        "400": {"content": "<think>", "special": False, **entry},
        "401": {"content": "<|call|>", "special": True, **entry},
    }
    folder = folder_of("qwen2", tmp_path, added_tokens_decoder=declared)
    ours, theirs = Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert_same_text(ours, theirs, "a <think> b <|call|> c<|im_end|>")
    assert ours.encode("<think><|call|>") == [400, 401]
    assert ours.vocab_size == 402
    declared["401"]["content"] = "<|other|>"
    declared["405"] = declared.pop("401")
    with pytest.raises(ModelError, match=r"'<\|other\|>' the id 405"):
        Tokenizer.from_folder(folder_of("qwen2", tmp_path, added_tokens_decoder=declared))
    with pytest.raises(ModelError, match="added tokens"):
        Tokenizer.from_folder(folder_of("qwen2", tmp_path, added_tokens_decoder={"x": 3}))


def test_where_the_chat_template_stands(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert Tokenizer.from_folder(folder_of("smollm", tmp_path, chat_template=named)).chat_template == "D"
    assert Tokenizer.from_folder(folder_of("smollm", tmp_path, chat_template=named[:1])).chat_template is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "J"}))
    assert Tokenizer.from_folder(folder_of("smollm", tmp_path, chat_template="S")).chat_template == "S"
    assert Tokenizer.from_folder(folder_of("smollm", tmp_path, chat_template=None)).chat_template == "J"
    (tmp_path / "chat_template.jinja").write_text("F\n")
    found = Tokenizer.from_folder(folder_of("smollm", tmp_path, chat_template="S")).chat_template
    assert found == "F\n"
    assert found == transformers.AutoTokenizer.from_pretrained(tmp_path).chat_template
    assert Tokenizer.from_folder(folder_of("smollm", tmp_path, chat_template=5)).chat_template == "F\n"  # not read
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelError, match=r"chat_template\.jinja"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "wrong", [5, True, ["T"], [3], {"default": 5}, [{"name": "default", "template": ["T"]}]], ids=str
)
def test_a_chat_template_of_a_wrong_type_is_refused(tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(ModelError, match=r'tokenizer_config\.json: "chat_template" is .*; it should be text'):
        Tokenizer.from_folder(folder_of("smollm", tmp_path, chat_template=wrong))
    folder = folder_of("smollm", tmp_path, chat_template=None)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": wrong}))
    with pytest.raises(ModelError, match=r'chat_template\.json: "chat_template" is .*; it should be text'):
        Tokenizer.from_folder(folder)
    metadata = tiny.tokenizer_metadata("qwen2") | {"tokenizer.chat_template": wrong}
    metadata["tokenizer.ggml.token_type"] = np.array(metadata["tokenizer.ggml.token_type"])
    with pytest.raises(ModelError, match="chat_template"):
        Tokenizer.from_gguf(metadata)


@pytest.mark.parametrize("wrong", [2**31, 2**70, [0, 10**400]], ids=lambda wrong: str(wrong)[:12])
def test_end_tokens_that_are_no_ids_are_refused(tmp_path: Path, wrong: Any) -> None:
    for name in ("config.json", "generation_config.json"):
        folder = folder_of("smollm", tmp_path / name)
        (folder / name).write_text(
            json.dumps({"eos_token_id": wrong}) if wrong != [0, 10**400] else f'{{"eos_token_id": [0, {"9" * 400}]}}'
        )
        with pytest.raises(ModelError, match=rf'{name}: "eos_token_id" is .*; a token id is at most') as refusal:
            Tokenizer.from_folder(folder)
        assert len(str(refusal.value)) < 600
    metadata = tiny.tokenizer_metadata("qwen2") | {"tokenizer.ggml.eos_token_id": 2**63}
    metadata["tokenizer.ggml.token_type"] = np.array(metadata["tokenizer.ggml.token_type"])
    with pytest.raises(ModelError, match="eos_token_id"):
        Tokenizer.from_gguf(metadata)


def test_an_end_token_without_a_row_is_refused(tmp_path: Path) -> None:
    tiny.write_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": 420}))
    with pytest.raises(ModelError, match="has the id 420, but the embedding has 420 rows"):
        read_checkpoint(tmp_path)


def test_no_tokenizer_json(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


def test_unused_rows_are_no_tokens() -> None:
    metadata = tiny.tokenizer_metadata("qwen2")
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "[PAD400]", "[PAD401]"]
    metadata["tokenizer.ggml.token_type"] = np.array([*metadata["tokenizer.ggml.token_type"], 5, 5])
    found = Tokenizer.from_gguf(metadata)
    assert found.vocab_size == 400
    assert found.token(400) == ""
    assert found.decode(found.encode("[PAD400]")) == "[PAD400]"


def test_end_of_turn_tokens_of_gguf_files_end_a_generation() -> None:
    metadata = tiny.tokenizer_metadata("llama3")
    metadata["tokenizer.ggml.token_type"] = np.array(metadata["tokenizer.ggml.token_type"])
    tokens = metadata["tokenizer.ggml.tokens"]
    metadata["tokenizer.ggml.eos_token_id"] = tokens.index("<|end_of_text|>")
    metadata["tokenizer.ggml.eot_token_id"] = tokens.index("<|eot_id|>")
    del metadata["tokenizer.ggml.add_bos_token"]
    found = Tokenizer.from_gguf(metadata)
    assert found.eos_ids == (398, 399)
    assert found.adds_bos  # llama.cpp's default for this split


SPLITS = [(style, None) for style in tiny.STYLES] + [("smollm", "gpt-2"), ("smollm", "default")]


@pytest.mark.parametrize(("style", "pre"), SPLITS)
def test_texts_as_llama_cpp(tmp_path: Path, style: str, pre: str | None) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp's Python package is not installed")
    metadata = {"tokenizer.ggml.pre": pre} if pre else {}
    tiny.write_gguf(tmp_path / "m.gguf", tiny.random_model("llama"), style=style, metadata=metadata)
    ours = read_checkpoint(tmp_path / "m.gguf").tokenizer
    theirs = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    for text in TEXTS:
        if style == "qwen2" and "\u0301" in text:
            continue  # llama.cpp does not compose accents; Qwen's own tokenizer.json does
        assert ours.encode(text) == theirs.tokenize(text.encode(), add_bos=False, special=True), text


def test_smollm2_as_llama_cpp(smollm2_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp's Python package is not installed")
    ours = read_checkpoint(smollm2_path).tokenizer
    theirs = llama_cpp.Llama(str(smollm2_path), vocab_only=True, verbose=False)
    for text in [*TEXTS, *("".join(tiny.PASSAGES[i:]) for i in range(len(tiny.PASSAGES)))]:
        assert ours.encode(text) == theirs.tokenize(text.encode(), add_bos=False, special=True), text


@pytest.mark.slow
def test_smollm2_as_transformers_but_for_digits(smollm2_path: Path) -> None:
    """transformers' conversion of this file leaves out that SmolLM2 splits digits: texts without any are compared."""
    path = smollm2_path
    ours = read_checkpoint(path).tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in [*TEXTS, *tiny.PASSAGES]:
        if not any(character.isnumeric() for character in text):
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
    assert [ours.token(id) for id in ours.encode("1234")] == list("1234")
