"""A stand-in for a model where only its tokenizer and embedding matrix matter, and tokenizers of several families.

The tokenizers are byte-pair encodings trained on the spot; the chat templates are our own short forms of what the
families use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace

import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from embedgrad.model.tokenizer import Tokenizer

CORPUS = """The quick brown fox jumps over the lazy dog. Classify the sentiment of the movie review.
Answer with one word, positive or negative. It was a great film, truly moving; the acting isn't bad, and the plot
doesn't drag.
Please reason step by step, and put your final answer within \\boxed{}. What is 12 + 30? The answer is 42.
You are a helpful assistant. You are Qwen, created by Alibaba Cloud. Thanks for your question! Let me think: first, ...
system user assistant model You're welcome. I'd say it's fine; we'll see. They've been here since 1987 or 2024.
def f(x):\n    return {"a": [1, 2, 3], "b": x ** 2}\n\nfor i in range(10):\n    print(f(i))\n
"""

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

QWEN2 = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

QWEN3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" %}
        {%- set ns.last_query_index = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- " [INST] " + system_message + "\\n\\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- " [INST] " + message["content"] + " [/INST]" }}
        {%- endif %}
    {%- else %}
        {%- generation %}
        {{- " " + message["content"] + eos_token }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
"""

NO_SYSTEM = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' "
    "+ message.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

CHAT_TEMPLATES = {
    "chatml": CHATML,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "no_system": NO_SYSTEM,
}
SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<s>", "</s>", "<start_of_turn>", "<end_of_turn>"),
]
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BOS_EOS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "mistral": ("<s>", "</s>"),
}


def backend(space_prefix: bool = False) -> tokenizers.Tokenizer:
    """Byte-level pairs behind Qwen's word pattern; with `space_prefix` SentencePiece-like pieces as in Llama 2."""
    return tokenizers.Tokenizer.from_str(_trained(space_prefix))


@lru_cache(maxsize=2)
def _trained(space_prefix: bool) -> str:
    special = [AddedToken(text, special=True, normalized=False) for text in SPECIAL]
    if space_prefix:
        tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=900,
            special_tokens=["<unk>", *special, *byte_tokens],
            show_progress=False,
        )
    else:
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=800,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    tokenizer.train_from_iterator(CORPUS.splitlines(keepends=True), trainer)
    if space_prefix:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])  # the split was for the training alone
    return str(tokenizer.to_str())


def tokenizer_of(
    family: str | None = "chatml",
    *,
    space_prefix: bool = False,
    adds_bos: bool = False,
    chat_template: str | None = None,
) -> Tokenizer:
    """The stand-in tokenizer with a family's special tokens and chat template; family None: no chat template."""
    inner = backend(space_prefix)
    bos, eos = BOS_EOS.get(family or "", ("<s>", "<|endoftext|>"))
    return Tokenizer(
        inner,
        bos_id=inner.token_to_id(bos),
        eos_ids=[inner.token_to_id(eos)],
        adds_bos=adds_bos,
        chat_template=chat_template if chat_template is not None else CHAT_TEMPLATES.get(family or ""),
        special={"bos_token": bos, "eos_token": eos},
    )


@dataclass(eq=False)
class FakeModel:
    """`tokenizer`, `config`, `name` and `embedding_rows`, as templates and prompts use them."""

    tokenizer: Tokenizer
    hidden_size: int = 8
    max_position: int = 4096
    vocab_size: int | None = None
    seed: int = 0
    name: str = "fake"

    def __post_init__(self) -> None:
        rows = self.tokenizer.vocab_size if self.vocab_size is None else self.vocab_size
        self.config = SimpleNamespace(vocab_size=rows, max_position=self.max_position, hidden_size=self.hidden_size)
        self.table = torch.randn(rows, self.hidden_size, generator=torch.Generator().manual_seed(self.seed))
        self.rows_asked = 0

    def embedding_rows(self, ids: Sequence[int]) -> torch.Tensor:
        self.rows_asked += 1
        return self.table[torch.tensor(list(ids))]


def fake_model(family: str | None = "chatml", **options: object) -> FakeModel:
    """A FakeModel; options go to `tokenizer_of` (space_prefix, adds_bos, chat_template) or to FakeModel."""
    names = ("space_prefix", "adds_bos", "chat_template")
    chosen = {name: options.pop(name) for name in names if name in options}
    return FakeModel(tokenizer_of(family, **chosen), **options)  # type: ignore[arg-type]
