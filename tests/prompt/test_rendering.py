"""Rendering: the ids that transformers' apply_chat_template gives, the prompt's own tokens, and every refusal."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from embedgrad.data.example import Example
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.rendering import TokenisationWarning, end_token, render, render_query
from embedgrad.prompt.template import Template
from embedgrad.prompt.tokenise import Slot, tokenise_whole
from embedgrad.util.errors import ContextError, DataError, PromptError, TemplateError
from tests.prompt.fake_model import BOS_EOS, CHAT_TEMPLATES, FakeModel, backend, fake_model

FAMILIES = st.sampled_from(sorted(CHAT_TEMPLATES))
PLAIN = ("a", "The", "great", "film", "isn't", "12", "2024", "x = 3", ".", ",", "?", ":", "-", "\ue000", "\ue001")
WORDS = st.sampled_from(PLAIN) | st.sampled_from(
    ("\\boxed{}", "{prompt}", "{query}", "{", "}}", "é", "e\u0301", "漢字", "😀", "</think>", "=")
)
TEXTS = st.lists(st.tuples(WORDS, st.sampled_from(["", " ", "  ", "\n", "\n\n", "\t"])), min_size=1, max_size=6).map(
    lambda pairs: "".join(word + gap for word, gap in pairs)
)
NEAT = st.tuples(TEXTS, st.sampled_from(["a", "film", "Ça"])).map(lambda pair: f"The {pair[0]} {pair[1]}")
IDS = st.lists(st.integers(11, 500), min_size=1, max_size=6)
AROUND = st.sampled_from(["", " ", "\n", "\n\n", "Task: ", "Review:\n", ". ", "<|im_start|>", "{'a': ", "<x>"])


@st.composite
def conversations(draw: st.DrawFn, system: bool = True) -> list[dict[str, str]]:
    """Messages with the slots in the system turn, the user turn, before or after the query, once or twice."""
    one, other, third = draw(AROUND), draw(AROUND), draw(AROUND)
    user = draw(
        st.sampled_from(
            [
                one + "{query}" + other,
                one + "{prompt}" + other + "{query}" + third,
                one + "{query}" + other + "{prompt}",
            ]
        )
    )
    turns = [{"role": "user", "content": user}]
    if draw(st.booleans()):
        turns = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi!"}, *turns]
    if system and ("{prompt}" not in user or draw(st.booleans())):
        turns.insert(0, {"role": "system", "content": draw(AROUND) + "{prompt}" + draw(AROUND)})
    if not any("{prompt}" in turn["content"] for turn in turns):
        turns[-1]["content"] = "{prompt}\n" + user
    return turns


@contextmanager
def heard() -> Iterator[list[str]]:
    """The texts of the tokenisation warnings given inside."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts.extend(str(warning.message) for warning in caught if warning.category is TokenisationWarning)


@lru_cache(maxsize=16)
def reference(family: str, space_prefix: bool) -> PreTrainedTokenizerFast:
    bos, eos = BOS_EOS.get(family, ("<s>", "<|endoftext|>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend(space_prefix), bos_token=bos, eos_token=eos)
    tokenizer.chat_template = CHAT_TEMPLATES[family]
    return tokenizer


def apply(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], **options: object) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options))


@settings(deadline=None, max_examples=200)
@given(FAMILIES, st.booleans(), st.data(), NEAT | TEXTS, TEXTS.filter(str.strip), TEXTS.filter(str.strip))
def test_ids_are_those_of_apply_chat_template_unless_a_warning_says_otherwise(
    family: str, space_prefix: bool, data: st.DataObject, prompt_text: str, query: str, target: str
) -> None:
    messages = data.draw(conversations(system=family != "no_system"))
    model = fake_model(family, space_prefix=space_prefix)
    with heard() as said:
        prompt = SoftPrompt.from_text(model, prompt_text, Template.chat(messages))
        rendered = render(model, prompt, Example(query, target))
    asked = prompt.template.fill(prompt_text, query)
    assert isinstance(asked, list)
    tokenizer = reference(family, space_prefix)
    context = apply(tokenizer, asked, add_generation_prompt=True)
    count = rendered.target_mask.index(True)
    if said:
        return
    assert rendered.ids[:count] == context
    if family == "qwen3":  # its assistant turns have a thinking block that generation does not get to see
        return
    whole = apply(tokenizer, [*asked, {"role": "assistant", "content": target}])
    assert rendered.ids == whole[: len(rendered.ids)]
    tail = model.tokenizer.decode(whole[len(rendered.ids) :], skip_special=False)
    assert not tail.strip()
    assert rendered.ids[-1] in {
        model.tokenizer.encode(end)[0] for end in ("<|im_end|>", "<|eot_id|>", "</s>", "<end_of_turn>")
    }


@settings(deadline=None)
@given(st.sampled_from(["chatml", "qwen2", "qwen3", "llama3"]), NEAT, NEAT, NEAT)
def test_no_warning_where_slots_stand_between_line_breaks_and_special_tokens(
    family: str, prompt_text: str, query: str, target: str
) -> None:
    model = fake_model(family)
    with heard() as said:
        prompt = SoftPrompt.from_text(model, prompt_text)
        rendered = render(model, prompt, Example(query, target))
    assert not said
    messages = [{"role": "system", "content": prompt_text}, {"role": "user", "content": query}]
    context = apply(reference(family, False), messages, add_generation_prompt=True)
    assert rendered.ids[: len(context)] == context
    assert rendered.ids[len(context) : -1] == model.tokenizer.encode(target)
    assert prompt.token_ids == model.tokenizer.encode(prompt_text)


@st.composite
def cases(draw: st.DrawFn) -> tuple[FakeModel, SoftPrompt, str | list[int], str | list[int]]:
    """Any model, any template, any prompt, and a query and a target as text or ids."""
    family = draw(FAMILIES)
    model = fake_model(family, space_prefix=draw(st.booleans()), adds_bos=draw(st.booleans()))
    body = draw(AROUND) + draw(
        st.sampled_from(["{prompt}{}{query}", "{query}{}{prompt}", "{prompt}{}{query}{}{prompt}"])
    )
    template = draw(
        st.one_of(
            conversations(system=family != "no_system").map(Template.chat),
            st.builds(Template.text, AROUND.map(lambda gap: body.replace("{}", gap)), st.booleans()),
            st.just(Template.plain()),
        )
    )
    with heard():
        prompt = (
            SoftPrompt.from_text(model, draw(TEXTS.filter(str.strip)), template)
            if draw(st.booleans())
            else SoftPrompt.from_ids(model, draw(IDS), template)
        )
    texts = TEXTS.filter(str.strip)
    return model, prompt, draw(texts | IDS), draw(texts | IDS)


@settings(deadline=None, max_examples=60)
@given(cases(), TEXTS.filter(str.strip), TEXTS.filter(str.strip))
def test_what_every_rendering_keeps(
    case: tuple[FakeModel, SoftPrompt, str | list[int], str | list[int]], other_query: str, other_target: str
) -> None:
    model, prompt, query, target = case
    with heard() as said:
        rendered = render(model, prompt, Example(query, target))
        asked = render_query(model, prompt, query)
        others = [
            render(model, prompt, Example(query, other_target)),
            render(model, prompt, Example(other_query, target)),
        ]
    assert len(said) <= 1
    assert len(rendered.ids) == len(rendered.prompt_rows) == len(rendered.target_mask)

    count = rendered.target_mask.index(True)
    assert rendered.target_mask == [False] * count + [True] * (len(rendered.ids) - count)
    assert asked.ids == rendered.ids[:count] == others[0].ids[: others[0].target_mask.index(True)]
    assert asked.prompt_rows == rendered.prompt_rows[:count]
    assert not any(asked.target_mask)
    assert asked.constant_prefix == rendered.constant_prefix == others[0].constant_prefix

    places = [number for number, row in enumerate(rendered.prompt_rows) if row == 0]
    size = len(prompt.token_ids)
    for place in places:
        assert rendered.ids[place : place + size] == prompt.token_ids
        assert rendered.prompt_rows[place : place + size] == list(range(size))
    assert sum(row >= 0 for row in rendered.prompt_rows) == size * len(places) > 0

    shared = min(rendered.constant_prefix, others[1].constant_prefix)
    assert rendered.ids[:shared] == others[1].ids[:shared]
    assert rendered.constant_prefix <= places[0]

    if not isinstance(query, str):
        gaps = [rendered.ids[start : start + len(query)] for start in range(count)]
        assert query in gaps
    if not isinstance(target, str):
        assert rendered.ids[count : count + len(target)] == target
        assert len(rendered.ids) - count - len(target) <= 4
    if prompt.template.kind == "plain":
        parts = [
            prompt.token_ids,
            *(model.tokenizer.encode(part) if isinstance(part, str) else part for part in (query, target)),
        ]
        assert rendered.ids == [token for part in parts for token in part]


@settings(deadline=None)
@given(NEAT, NEAT, st.booleans(), st.booleans(), st.booleans())
def test_bos_stands_in_front_of_plain_text_exactly_once(
    prompt_text: str, query: str, space_prefix: bool, own: bool, adds_bos: bool
) -> None:
    model = fake_model(None, space_prefix=space_prefix, adds_bos=adds_bos)
    body = ("<s>" if own else "") + "Task:\n{prompt}\n{query}\n"
    with heard() as said:
        prompt = SoftPrompt.from_text(model, prompt_text, Template.text(body))
        rendered = render(model, prompt, Example(query, "yes"))
    assert rendered.ids.count(model.tokenizer.bos_id) == (1 if own or adds_bos else 0)
    assert rendered.ids[-1] == model.tokenizer.eos_ids[0]
    if not said:
        text = body.replace("{prompt}", prompt_text, 1) if "{query}" not in prompt_text else None
        if text is not None:
            whole = model.tokenizer.encode(text.replace("{query}", "\0", 1).replace("\0", query) + "yes")
            start = 1 if adds_bos and not own else 0
            assert rendered.ids[start:-1] == whole


def test_a_chat_rendering_gets_no_bos_from_us() -> None:
    for family, times in (("llama3", 1), ("qwen2", 0)):
        model = fake_model(family, adds_bos=True)
        prompt = SoftPrompt.from_text(model, "Answer briefly.")
        ids = render(model, prompt, Example("why", "because")).ids
        assert ids.count(model.tokenizer.bos_id) == times


@pytest.mark.parametrize(("family", "end"), [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("mistral", "</s>")])
def test_the_end_of_the_turn_is_the_last_target_and_not_doubled(family: str, end: str) -> None:
    model = fake_model(family)
    prompt = SoftPrompt.from_ids(model, [40, 41])
    (token,) = model.tokenizer.encode(end)
    assert end_token(model, prompt) == token
    for target in ("yes", "yes" + end, [50], [50, token]):
        ids = render(model, prompt, Example("why", target)).ids
        assert ids[-1] == token
        assert ids[-2] != token


def test_without_an_end_token_in_the_chat_template_the_end_of_text_ends_the_answer() -> None:
    bare = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    bare += "{% if add_generation_prompt %}assistant: {% endif %}"
    for source in (bare, bare.replace("{{ m.content }}", "{{ m.content if m.role != 'assistant' else 'done' }}")):
        model = fake_model("chatml", chat_template=source)
        prompt = SoftPrompt.from_ids(model, [40, 41])
        assert render(model, prompt, Example("why", "yes")).ids[-1] == model.tokenizer.encode("<|im_end|>")[0]


def test_variables_reach_the_chat_template() -> None:
    model = fake_model("qwen3")
    messages = [{"role": "system", "content": "{prompt}"}, {"role": "user", "content": "{query}"}]
    prompt = SoftPrompt.from_ids(model, [40], Template.chat(messages, variables={"enable_thinking": False}))
    rendered = render_query(model, prompt, "why")
    assert model.tokenizer.decode(rendered.ids).endswith("<think>\n\n</think>\n\n")


def test_default_templates() -> None:
    for family, kind, role in (("llama3", "chat", "system"), ("no_system", "chat", "user"), (None, "text", None)):
        template = SoftPrompt.from_ids(fake_model(family), [40]).template
        assert template.kind == kind
        if role:
            assert template.messages[0][0] == role
            assert "{prompt}" in template.messages[0][1]
    drops = CHAT_TEMPLATES["chatml"].replace(
        "{{ '<|im_start|>' + m", "{% if message.role != 'system' %}{{ '<|im_start|>' + m"
    )
    drops = drops.replace("{% endfor %}", "{% endif %}{% endfor %}")
    assert SoftPrompt.from_ids(fake_model("chatml", chat_template=drops), [40]).template.messages[0][0] == "user"


def test_a_split_that_breaks_tokens_warns_once_per_prompt() -> None:
    model = fake_model("chatml")
    template = Template.chat([{"role": "user", "content": "Read this: {prompt} {query}"}])
    prompt = SoftPrompt.from_text(model, "movie review, great film.", template)
    with heard() as said:
        rows = [render(model, prompt, Example(f"film {number}", "yes")).prompt_rows for number in range(5)]
    assert len(said) == 1
    assert "differ from tokenising the whole text at once, near" in said[0]
    assert all(sum(row >= 0 for row in each) == len(prompt.token_ids) for each in rows)


def test_a_prompt_that_the_chat_template_trims_keeps_its_tokens_and_warns() -> None:
    model = fake_model("llama3")
    with heard() as said:
        prompt = SoftPrompt.from_text(model, "  Answer briefly. \n")
    assert any("changes the prompt's text" in text for text in said)
    assert len(prompt.token_ids) == sum(row >= 0 for row in prompt.layout_rows)


MODEL = fake_model("chatml", max_position=64)
PROMPT = SoftPrompt.from_text(MODEL, "Answer.")
VOCABULARY = MODEL.tokenizer.vocab_size


@pytest.mark.parametrize(
    ("query", "target", "error", "said"),
    [
        ("", "x", DataError, "the query is empty"),
        (" \n", "x", DataError, "the query is empty"),
        ([], "x", DataError, "the query is empty"),
        ("x", "", DataError, "the target is empty"),
        ("x", [], DataError, "the target is empty"),
        (
            [10**6],
            "x",
            DataError,
            f"the query has the token id 1000000, outside the model's vocabulary of {VOCABULARY}",
        ),
        ([-1], "x", DataError, "the query has the token id -1"),
        ("x", [0, VOCABULARY], DataError, f"the target has the token id {VOCABULARY}"),
        ("x", [1.5], DataError, "the target must be text or a list of token ids, not list"),
        (b"x", "x", DataError, "the query must be text or a list of token ids, not bytes"),
        (None, "x", DataError, "the query must be text or a list of token ids, not NoneType"),
        ("\ud800", "x", DataError, "the query has a character that is not valid Unicode"),
        ("x", "\udfff", DataError, "the target has a character that is not valid Unicode"),
        (
            [40] * 60,
            [40],
            ContextError,
            "the target would be cut by the context limit: 7. tokens before it and 2 of its own",
        ),
        ("x", [40] * 60, ContextError, "the target would be cut by the context limit: .* the model's context holds 64"),
    ],
)
def test_refusals(query: object, target: object, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match="^here, line 3: " + said) as raised:
        render(MODEL, PROMPT, Example(query, target), where="here, line 3")  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)
    with pytest.raises(error, match="^" + said):
        render(MODEL, PROMPT, Example(query, target))  # type: ignore[arg-type]


def test_refusals_of_prompts_queries_and_templates() -> None:
    with pytest.raises(ContextError, match=r"prompt and query have .* tokens; the model's context holds 64"):
        render_query(MODEL, PROMPT, [40] * 64)
    with pytest.raises(ContextError, match="the prompt is longer than the context: 64 tokens"):
        SoftPrompt.from_ids(MODEL, [40] * 64)
    with pytest.raises(PromptError, match="the prompt is empty"):
        SoftPrompt.from_text(MODEL, "  ")
    with pytest.raises(PromptError, match="the prompt is empty"):
        SoftPrompt.from_ids(MODEL, [])
    with pytest.raises(PromptError, match=f"the prompt has the token id {VOCABULARY}"):
        SoftPrompt.from_ids(MODEL, [VOCABULARY])
    with pytest.raises(PromptError, match=r"the tokenizer gives the token id .* the model has only 50 embedding rows"):
        render(small := fake_model("chatml", vocab_size=50), SoftPrompt.from_ids(small, [40]), Example("film", "x"))
    with pytest.raises(TemplateError, match="the model fake has no chat template"):
        SoftPrompt.from_text(fake_model(None), "x", Template.chat([{"role": "user", "content": "{prompt}{query}"}]))
    system_only = "{{ messages[0].content }}"
    messages = [{"role": "system", "content": "{prompt}"}, {"role": "user", "content": "{query}"}]
    with pytest.raises(TemplateError, match=r"drops the message that holds \{query\}"):
        SoftPrompt.from_ids(MODEL, [40], Template.chat(messages, system_only))
    with pytest.raises(TemplateError, match=r"drops the message that holds \{prompt\}"):
        SoftPrompt.from_ids(MODEL, [40], Template.chat(messages, system_only.replace("0", "1")))


def test_ids_may_come_as_tensors_and_arrays() -> None:
    ids = torch.tensor([40, 41])
    assert (
        render(MODEL, PROMPT, Example(ids, ids.numpy())).ids == render(MODEL, PROMPT, Example([40, 41], [40, 41])).ids
    )


def test_two_thousand_short_examples_take_about_a_second() -> None:
    model = fake_model("qwen2")
    prompt = SoftPrompt.from_text(model, "Classify the sentiment of the movie review. Answer with one word.")
    examples = [Example(f"a great film , truly number {number} of the year " * 2, "positive") for number in range(2000)]
    start = time.process_time()
    for example in examples:
        render(model, prompt, example)
    assert time.process_time() - start < 6  # a second or less on an idle machine


def test_smollm2_from_its_gguf_file(smollm2_path: Path) -> None:
    from embedgrad.model.files.gguf import GgufFile
    from embedgrad.model.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_gguf(GgufFile(smollm2_path).metadata)
    model = FakeModel(tokenizer)
    same = PreTrainedTokenizerFast(tokenizer_object=tokenizer._backend)
    same.chat_template = tokenizer.chat_template
    text = "Classify the sentiment of the movie review. Answer with one word, positive or negative."
    with heard() as said:
        prompt = SoftPrompt.from_text(model, text)
        for query in ("an utterly compelling 'who wrote it' , rated 8.5 of 10", "Ça va?\n\nno ."):
            rendered = render(model, prompt, Example(query, "positive"))
            messages = [{"role": "system", "content": text}, {"role": "user", "content": query}]
            whole = apply(same, [*messages, {"role": "assistant", "content": "positive"}])
            assert rendered.ids == whole[: len(rendered.ids)]
            assert len(whole) == len(rendered.ids) + 1
    assert not said


@pytest.mark.parametrize("family", ["llama3", "no_system", "chatml", "qwen3"])
def test_the_answer_is_trimmed_where_the_chat_template_trims_it(family: str) -> None:
    model = fake_model(family)
    prompt = SoftPrompt.from_ids(model, [40, 41])
    rendered = render(model, prompt, Example("why", " \tyes \n"))
    answer = model.tokenizer.decode(
        [token for token, target in zip(rendered.ids, rendered.target_mask, strict=True) if target]
    )
    assert answer == ("yes" if family in ("llama3", "no_system") else " \tyes \n")
    if family in ("llama3", "no_system"):
        with pytest.raises(DataError, match="the target is empty"):
            render(model, prompt, Example("why", " \n"))


def test_a_target_that_would_join_the_context_is_tokenised_alone() -> None:
    model = fake_model(None)
    assert len(model.tokenizer.encode("ok great")) == len(model.tokenizer.encode("ok")) + 1
    with heard() as said:
        prompt = SoftPrompt.from_text(model, "Classify.", Template.text("{prompt}\n{query}\nok "))
        rendered = render(model, prompt, Example("film", "great"))
        context = render_query(model, prompt, "film").ids
    assert rendered.ids[: len(context)] == context
    assert model.tokenizer.decode(context).endswith("ok ")
    assert rendered.ids[len(context) : -1] == model.tokenizer.encode("great")
    assert len(said) == 1


def test_the_constant_prefix_is_never_more_than_the_sequence_has() -> None:
    model = fake_model("chatml")
    prompt = SoftPrompt.from_text(model, "Classify.", Template.text("def f(x):{query}\n{prompt}"))
    plain, joined = render_query(model, prompt, "film"), render_query(model, prompt, "\n    return 1")
    assert plain.ids[: plain.constant_prefix] == model.tokenizer.encode("def f(x):")
    assert joined.ids[: plain.constant_prefix] != plain.ids[: plain.constant_prefix]
    assert joined.ids[: joined.constant_prefix] == plain.ids[: joined.constant_prefix]
    assert joined.ids[joined.constant_prefix] != plain.ids[joined.constant_prefix]


def test_a_slot_whose_text_ends_inside_a_token_has_no_place_in_the_whole() -> None:
    tokenizer = fake_model("chatml").tokenizer
    ids = tuple(tokenizer.encode("a great"))
    assert tokenise_whole(tokenizer, ["\n", Slot(ids, "a great", True), "\n"]) is not None
    assert tokenise_whole(tokenizer, ["\n", Slot(ids, "a gre", True), "at\n"]) is None
    assert tokenise_whole(tokenizer, ["\n", Slot(ids[:1], "a great", True), "\n"]) is None
