"""GGUF files: what the gguf package writes is what is read, and damage is one sentence."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.model.checkpoint import read_checkpoint
from embedgrad.model.config import ModelConfig
from embedgrad.model.files.gguf import GgufFile
from embedgrad.model.rope import inverse_frequencies
from embedgrad.util.errors import ModelError
from tests.model import tiny

FAST_KINDS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def dequantised_types() -> list[GGMLQuantizationType]:
    """Block types that the installed gguf package can dequantise."""
    result = []
    for kind, (_, size) in GGML_QUANT_SIZES.items():
        try:
            dequantize(np.zeros((1, size), dtype=np.uint8), kind)
        except NotImplementedError:
            continue
        result.append(kind)
    return result


def refused(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        read_checkpoint(path)
    return one_sentence(caught.value)


def one_sentence(error: ModelError) -> str:
    message = str(error)
    assert "\n" not in message
    assert len(message) < 600
    return message


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.random_model("llama")


@pytest.fixture(scope="module")
def content(model: Any, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tiny.write_gguf(path, model, kind="Q4_0")
    return path.read_bytes()


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_is_read_bit_for_bit(tmp_path: Path, family: str, tied: bool) -> None:
    bias = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    bias = {"attention_bias": True} if family == "qwen3" else bias
    bias |= {"logits_scaling": 1.0} if family == "granite" else {}
    model = tiny.random_model(family, tie_word_embeddings=tied, num_key_value_heads=1, **bias)
    tiny.write_gguf(tmp_path / "m.gguf", model)
    checkpoint = read_checkpoint(tmp_path / "m.gguf")
    config = checkpoint.config
    assert checkpoint.name == "m"
    assert config.family == ("llama" if family in ("mistral", "ministral") else family)
    assert config.tied == tied
    assert config.qk_norm == (family in ("qwen3", "olmo2", "gemma3_text"))
    assert config.mlp_bias == (family == "llama")
    assert config.rms_eps == float(np.float32(model.config.rms_norm_eps))
    assert (config.max_position, config.head_dim) == (256, 8)
    rotary = model.model.rotary_emb
    frequencies = rotary.full_attention_inv_freq if family == "gemma3_text" else rotary.inv_freq
    assert torch.equal(inverse_frequencies(config.rope, config.head_dim), frequencies)
    expected = model.state_dict()
    if family.startswith("gemma"):
        expected = {name: x + 1 if "norm" in name else x for name, x in expected.items()}
    assert set(checkpoint.tensors.names()) == set(expected) - ({"lm_head.weight"} if tied else set())
    for name in checkpoint.tensors.names():
        assert torch.equal(checkpoint.tensors.get(name), expected[name]), name


@pytest.mark.parametrize("kind", FAST_KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_block_types_and_raw_blocks(tmp_path: Path, family: str, kind: str) -> None:
    """Values and blocks are those of the unpermuted weights: the permutation moves whole rows, blocks included."""
    model = tiny.random_model(family)
    tiny.write_gguf(tmp_path / "m.gguf", model, kind=kind)
    tensors = read_checkpoint(tmp_path).tensors
    code = GGMLQuantizationType[kind]
    for name, weight in model.state_dict().items():
        if weight.dim() != 2:
            continue
        stored = quantize(weight.numpy(), code)
        values = tensors.get(name)
        assert values.dtype == {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
        assert torch.equal(values.float(), torch.from_numpy(dequantize(stored, code).copy()))
        raw = tensors.raw(name)
        assert raw is not None
        assert raw[0] == kind
        assert raw[1].dtype == torch.uint8
        assert np.array_equal(raw[1].numpy(), stored.view(np.uint8).reshape(weight.shape[0], -1))


@pytest.mark.parametrize("kind", dequantised_types(), ids=lambda kind: kind.name)
def test_every_type_that_the_package_dequantises(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    """Random blocks, in a number of rows that no chunk size divides."""
    values, size = GGML_QUANT_SIZES[kind]
    rows, columns = 67, 3 * values
    blocks = np.random.default_rng(0).integers(0, 256, (rows, columns // values * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", blocks, raw_dtype=kind, raw_shape=blocks.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = GgufFile(tmp_path / "m.gguf").get("model.embed_tokens.weight")
    assert found.shape == (rows, columns)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(np.array(dequantize(blocks, kind)))
    torch.testing.assert_close(found.float(), expected.float().view(rows, columns), rtol=0, atol=0, equal_nan=True)


def test_plain_tensors_are_views_of_the_mapping(tmp_path: Path, model: Any) -> None:
    tiny.write_gguf(tmp_path / "m.gguf", model)
    tensors = read_checkpoint(tmp_path).tensors
    name = "model.layers.1.mlp.up_proj.weight"
    assert tensors.get(name).data_ptr() == tensors.get(name).data_ptr()
    assert tensors.get(name).untyped_storage().nbytes() == (tmp_path / "m.gguf").stat().st_size


def test_llama3_scaling_as_a_tensor_of_divisors(tmp_path: Path) -> None:
    rope = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = {"head_dim": 64, "rope_parameters": {**rope, "original_max_position_embeddings": 64}}
    model = tiny.random_model("llama", **config)
    expected = model.model.rotary_emb.inv_freq
    unscaled = 1.0 / (5e5 ** (torch.arange(0, 64, 2).double() / 64))
    divisors = (unscaled / expected).numpy()
    assert divisors.min() == pytest.approx(1)
    assert divisors.max() == pytest.approx(8)
    tiny.write_gguf(tmp_path / "m.gguf", model, rope_divisors=divisors)
    found = read_checkpoint(tmp_path / "m.gguf").config
    torch.testing.assert_close(inverse_frequencies(found.rope, found.head_dim), expected, rtol=5e-7, atol=0)
    tiny.write_gguf(tmp_path / "ones.gguf", model, rope_divisors=np.ones(32))
    assert read_checkpoint(tmp_path / "ones.gguf").config.rope.kind == "default"
    tiny.write_gguf(tmp_path / "short.gguf", model, rope_divisors=np.full(31, 2.0))
    assert "rope_freqs.weight has 31 values" in refused(tmp_path / "short.gguf")
    tiny.write_gguf(tmp_path / "zero.gguf", model, rope_divisors=np.zeros(32))
    assert "positive" in refused(tmp_path / "zero.gguf")


def test_linear_scaling(tmp_path: Path) -> None:
    rope = {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.5}
    model = tiny.random_model("llama", rope_parameters=rope)
    for field in (
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5},
        {"llama.rope.scale_linear": 2.5},
    ):
        tiny.write_gguf(tmp_path / "m.gguf", model, metadata=field)
        found = read_checkpoint(tmp_path / "m.gguf").config
        assert torch.equal(inverse_frequencies(found.rope, found.head_dim), model.model.rotary_emb.inv_freq)


def test_yarn(tmp_path: Path) -> None:
    rope = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    model = tiny.random_model("qwen2", rope_parameters=rope)
    fields = {"type": "yarn", "factor": 4.0, "original_context_length": 64}
    tiny.write_gguf(tmp_path / "m.gguf", model, metadata={f"qwen2.rope.scaling.{k}": v for k, v in fields.items()})
    found = read_checkpoint(tmp_path / "m.gguf").config
    assert torch.equal(inverse_frequencies(found.rope, found.head_dim), model.model.rotary_emb.inv_freq)
    assert found.rope.attention_factor == model.model.rotary_emb.attention_scaling


@pytest.mark.parametrize(
    ("changes", "window"),
    [({}, 4096), ({"rope.freq_base": 1e6}, None), ({"context_length": 8192}, None), ({"words": 128256}, None),
     ({"attention.sliding_window": 0}, None), ({"attention.sliding_window": 512}, 512)],
)  # fmt: skip
def test_mistral_files_without_their_window(changes: dict[str, Any], window: int | None) -> None:
    """GGUF files of Mistral-7B v0.1 leave it out; those of Llama-3-8B and of Mistral-7B v0.3 have none."""
    words = changes.pop("words", 32000)
    fields = {
        "embedding_length": 4096, "feed_forward_length": 14336, "block_count": 32, "attention.head_count": 32,
        "attention.head_count_kv": 8, "attention.layer_norm_rms_epsilon": 1e-5, "context_length": 32768, **changes,
    }  # fmt: skip
    metadata = {"general.architecture": "llama"} | {f"llama.{name}": value for name, value in fields.items()}
    config = ModelConfig.from_gguf(metadata, "m.gguf", {"model.embed_tokens.weight": (words, 4096)})
    assert set(config.windows) == {window}


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"general.architecture": "gemma"}, ["gemma", "gemma3, granite, llama"]),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0}, ["longrope"]),
        ({"llama.rope.scaling.type": "yarn"}, ["rope.scaling.factor", "missing"]),
        ({"llama.rope.scaling.attn_factor": 1.5}, ["rope.scaling.attn_factor", "1.5"]),
        ({"llama.attention.sliding_window": "wide"}, ["attention.sliding_window", "wide"]),
        ({"llama.expert_count": 8}, ["expert_count", "8"]),
        ({"llama.attention.value_length": 16}, ["value_length", "16"]),
        ({"llama.rope.dimension_count": 4}, ["rope.dimension_count", "4"]),
        ({"llama.logit_scale": 0.5}, ["logit_scale", "0.5"]),
        ({"llama.attention.clamp_kqv": 8.0}, ["llama.attention.clamp_kqv", "8.0"]),
        ({"llama.attention.head_count_kv": [2, 1]}, ["attention.head_count_kv"]),
        ({"llama.embedding_length": None}, ["llama.embedding_length", "missing"]),
        ({"llama.embedding_length": 64}, ["model.embed_tokens.weight", "[420, 32]", "[420, 64]"]),
        ({"llama.block_count": 3}, ["model.layers.2", "more tensors"]),
        ({"llama.block_count": 1}, ["model.layers.1", "no place"]),
        ({"llama.block_count": 2**32 - 1}, ["block_count", "4294967295"]),
        ({"split.count": 2}, ["split"]),
        ({"general.alignment": 48}, ["general.alignment"]),
        ({"tokenizer.ggml.model": "t5"}, ["t5", "gpt2 and llama"]),
        ({"tokenizer.ggml.model": None}, ["None", "gpt2 and llama"]),
        ({"tokenizer.ggml.pre": "deepseek-coder"}, ["deepseek-coder", "smollm, qwen2, llama-bpe"]),
        ({"tokenizer.ggml.merges": ["a b c", "nope"]}, ["tokenizer's tables"]),
        ({"tokenizer.ggml.merges": None}, ["tokenizer.ggml.merges"]),
        ({"tokenizer.ggml.token_type": [1, 1]}, ["token_type", "400"]),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, ["token_type", "2"]),
    ],
)
def test_refused_by_name(tmp_path: Path, model: Any, metadata: dict[str, Any], said: list[str]) -> None:
    renamed = metadata.pop("general.architecture", None)
    tiny.write_gguf(tmp_path / "m.gguf", model, metadata=metadata)
    if renamed:
        data = (tmp_path / "m.gguf").read_bytes()
        old, new = (len(text).to_bytes(8, "little") + text for text in (b"llama", renamed.encode()))
        key = b"general.architecture" + (8).to_bytes(4, "little")
        (tmp_path / "m.gguf").write_bytes(data.replace(key + old, key + new))
    message = refused(tmp_path / "m.gguf")
    for part in said:
        assert part in message


def test_equal_counts_per_layer_are_one_count(tmp_path: Path, model: Any) -> None:
    tiny.write_gguf(tmp_path / "m.gguf", model, metadata={"llama.attention.head_count_kv": [2, 2]})
    assert read_checkpoint(tmp_path / "m.gguf").config.num_kv_heads == 2


def test_sentencepiece_that_normalises_is_refused(tmp_path: Path) -> None:
    model = tiny.random_model("mistral")
    tiny.write_gguf(tmp_path / "m.gguf", model, metadata={"tokenizer.ggml.remove_extra_whitespaces": True})
    assert "SentencePiece" in refused(tmp_path / "m.gguf")
    tiny.write_gguf(tmp_path / "m.gguf", model, metadata={"tokenizer.ggml.scores": [0.0, 1.0]})
    assert "scores" in refused(tmp_path / "m.gguf")


def test_two_files_and_one(tmp_path: Path, model: Any) -> None:
    tiny.write_gguf(tmp_path / "a.gguf", model)
    (tmp_path / "config.json").write_text("{}")  # as in many repositories of GGUF files
    assert read_checkpoint(tmp_path).name == "a"
    (tmp_path / "config.json").unlink()
    tiny.write_gguf(tmp_path / "b.gguf", model)
    assert "2 .gguf files" in refused(tmp_path)


@pytest.mark.parametrize(("at", "value", "said"), [(0, b"GGML", "begin with GGUF"), (4, b"\1\0\0\0", "version 1")])
def test_other_formats(tmp_path: Path, content: bytes, at: int, value: bytes, said: str) -> None:
    (tmp_path / "m.gguf").write_bytes(content[:at] + value + content[at + len(value) :])
    assert said in refused(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(content[:4] + content[4:8][::-1] + content[8:])
    assert "big-endian" in refused(tmp_path / "m.gguf")


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_truncated_anywhere(tmp_path_factory: pytest.TempPathFactory, content: bytes, data: st.DataObject) -> None:
    length = data.draw(st.one_of(st.integers(0, 200), st.integers(0, len(content) - 1)))
    path = tmp_path_factory.mktemp("cut") / "m.gguf"
    path.write_bytes(content[:length])
    try:
        checkpoint = read_checkpoint(path)
    except ModelError as error:
        one_sentence(error)
    else:  # the file ends in padding; only that may be missing unnoticed
        assert len(content) - length < gguf.GGUF_DEFAULT_ALIGNMENT
        for name in checkpoint.tensors.names():
            checkpoint.tensors.get(name)


def _moved(content: bytes, name: str, by: int) -> bytes:
    """`content` with another offset for the tensor `name`."""
    mark = len(name).to_bytes(8, "little") + name.encode()
    at = content.index(mark) + len(mark)
    dimensions = int.from_bytes(content[at : at + 4], "little")
    at += 4 + 8 * dimensions + 4
    offset = int.from_bytes(content[at : at + 8], "little") + by
    return content[:at] + offset.to_bytes(8, "little") + content[at + 8 :]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["blk.0.attn_q.weight", "blk.1.ffn_down.weight", "output_norm.weight"]), st.integers(-9, 9))
def test_tensors_that_do_not_follow_one_another(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str, steps: int
) -> None:
    path = tmp_path_factory.mktemp("moved") / "m.gguf"
    path.write_bytes(_moved(content, name, 32 * steps))
    if steps == 0:
        read_checkpoint(path)
    else:
        assert "is not a complete GGUF file" in refused(path)


def test_two_tensors_in_one_place(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(_moved(content, "blk.1.attn_norm.weight", -32))
    assert "overlap" in refused(tmp_path / "m.gguf")


@pytest.mark.parametrize("size", [1, 32, 5000])
def test_bytes_behind_the_last_tensor(tmp_path: Path, content: bytes, size: int) -> None:
    (tmp_path / "m.gguf").write_bytes(content + bytes(size))
    assert f"{size} bytes behind the last tensor" in refused(tmp_path / "m.gguf")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_bit_flips_in_the_header(tmp_path_factory: pytest.TempPathFactory, content: bytes, data: st.DataObject) -> None:
    """Every flip is refused with a sentence, or leaves a model that can be read whole."""
    damaged = bytearray(content)
    header = len(content) - sum(tensor.n_bytes for tensor in _tensors(content, tmp_path_factory))
    positions = st.one_of(st.integers(0, 8 * 1200), st.integers(0, 8 * header - 1))
    for bit in data.draw(st.lists(positions, min_size=1, max_size=3, unique=True)):
        damaged[bit // 8] ^= 1 << bit % 8
    path = tmp_path_factory.mktemp("flip") / "m.gguf"
    path.write_bytes(damaged)
    try:
        checkpoint = read_checkpoint(path)
        for name, shape in checkpoint.config.shapes().items():
            assert checkpoint.tensors.get(name).shape == shape
        checkpoint.tokenizer.decode(checkpoint.tokenizer.encode("It's a test 123"))
        inverse_frequencies(checkpoint.config.rope, checkpoint.config.head_dim)
    except ModelError as error:
        one_sentence(error)


_CACHE: dict[int, list[Any]] = {}


def _tensors(content: bytes, folders: pytest.TempPathFactory) -> list[Any]:
    if not _CACHE:
        path = folders.mktemp("read") / "m.gguf"
        path.write_bytes(content)
        _CACHE[0] = gguf.GGUFReader(path).tensors
    return _CACHE[0]


def test_smollm2(smollm2_path: Path) -> None:
    checkpoint = read_checkpoint(smollm2_path)
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    assert (config.family, config.num_layers, config.hidden_size, config.intermediate_size) == ("llama", 30, 576, 1536)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (9, 3, 64, 49152)
    assert (config.tied, config.rope.theta, config.max_position) == (True, 100000.0, 8192)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.adds_bos) == (1, (2,), False)
    assert tokenizer.chat_template is not None
    assert tokenizer.special["eos_token"] == "<|im_end|>"
    kinds = [checkpoint.tensors.raw(name) for name in checkpoint.tensors.names()]
    assert sorted({kind[0]: None for kind in kinds if kind}) == ["F32", "Q4_1", "Q8_0"]


@pytest.mark.slow
def test_smollm2_against_transformers(smollm2_path: Path) -> None:
    path = smollm2_path
    expected = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).state_dict()
    tensors = read_checkpoint(path).tensors
    for name in tensors.names():
        assert torch.equal(tensors.get(name), expected[name]), name
