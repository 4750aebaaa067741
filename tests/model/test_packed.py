"""Quantised frozen weights, and layers that are streamed: the same results from less memory."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from embedgrad.kernels.packing import PackedWeight

from embedgrad.data.example import Example
from embedgrad.engine.gradient import loss_and_grad
from embedgrad.engine.model import Model, load_model
from embedgrad.generation.generate import generate
from embedgrad.generation.sampling import Sampling
from embedgrad.model import frozen, native_matrices, packed, quantised, read_weights
from embedgrad.model.native_matrices import is_built
from embedgrad.model.packed import PackedTable
from embedgrad.model.quantised import QUANTISED, BlockWeight, TileWeight
from embedgrad.model.streaming import StreamedLayers, _packed_size
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.template import Template
from embedgrad.util.errors import ConfigError, ModelError
from tests.model.blocks import HALVES_AT
from tests.model.tiny import FAMILIES, random_model, write_folder, write_gguf
from tests.truth import relative_error

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROUNDING = 1e-5  # relative error of a float32 gradient whose sums run in another order
BATCH = [Example([10, 11], [20, 21]), Example([12], [30])]
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 96}


def step(model: Model, batch: list[Example] = BATCH) -> tuple[float, torch.Tensor]:
    return loss_and_grad(model, SoftPrompt.from_ids(model, [9, 30, 200], template=Template.plain()), batch)


def weight_bytes(model: Model) -> int:
    return sum(x.nbytes for x in model.weights.tensors())


def block_bytes(model: Model) -> int:
    return sum(x.nbytes for layer in model.weights.layers for x in layer.tensors())


def matrices(model: Model) -> list[Any]:
    return [m for layer in model.weights.layers for m in (layer.qkv, layer.out, layer.gate_up, layer.down)]


def dequantised_twin(packed: Model, folder: Path) -> Model:
    """The same model with every packed part replaced by the float32 tensor that it stands for."""
    twin = load_model(folder)
    for ours, theirs in zip(
        [*matrices(packed), packed.weights.head], [*matrices(twin), twin.weights.head], strict=True
    ):
        if not any(isinstance(part, torch.Tensor) for part in ours.parts):
            theirs.parts[0].copy_(torch.cat([part.dequantize() for part in ours.parts]))
    return twin


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize(("family", "tied"), [("llama", True), *((family, False) for family in FAMILIES)])
def test_quantised_while_read_equals_the_dequantised_weights(
    tmp_path: Path, kind: str, family: str, tied: bool
) -> None:
    write_folder(tmp_path, family, tie_word_embeddings=tied, **SIZES)
    model = load_model(tmp_path, weights=kind)
    assert isinstance(model.weights.head.parts[0], torch.Tensor if tied else TileWeight if is_built() else PackedWeight)
    kind_of = model.config.kind
    names = [*kind_of.qkv, *kind_of.gate_up, "self_attn.o_proj", "mlp.down_proj"]
    expected = {f"model.layers.{i}.{name}.weight" for i in range(2) for name in names}
    expected |= set() if tied else {"lm_head.weight"}
    assert set(model.quantisation_errors) == expected
    low, high = {"int8": (1e-4, 1e-2), "int4": (1e-2, 0.12)}[kind]
    assert all(low < error < high for error in model.quantisation_errors.values())
    twin = dequantised_twin(model, tmp_path)
    loss, grad = step(twin)
    found, found_grad = step(model)
    assert found == pytest.approx(loss, rel=1e-6)
    assert relative_error(found_grad, grad) <= ROUNDING
    assert block_bytes(model) < 0.35 * block_bytes(twin)
    before = model.weights_hash()
    step(model)
    assert model.weights_hash() == before


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter (TRITON_INTERPRET=1)")
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_kernels_on_packed_weights_equal_the_reference(tmp_path: Path, kind: str) -> None:
    write_folder(tmp_path, "qwen2", **{**SIZES, "num_hidden_layers": 1})
    reference, triton = (load_model(tmp_path, backend=name, weights=kind) for name in ("reference", "triton"))
    loss, grad = step(reference, BATCH[:1])
    found, found_grad = step(triton, BATCH[:1])
    assert found == pytest.approx(loss, rel=1e-6)
    assert relative_error(found_grad, grad) <= ROUNDING
    asked, sampling = [[50, 51]], Sampling(max_new_tokens=3)
    answers = [
        generate(m, SoftPrompt.from_ids(m, [9, 30], template=Template.plain()), asked, sampling)
        for m in (reference, triton)
    ]
    assert answers[0] == answers[1]


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter (TRITON_INTERPRET=1)")
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_blocks_of_a_file_are_kept(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "tiny.gguf"
    tied = kind == "Q8_0"
    write_gguf(path, random_model("llama", tie_word_embeddings=tied, **{**SIZES, "num_hidden_layers": 1}), kind=kind)
    model, wide = load_model(path, weights="stored", backend="triton"), load_model(path)
    assert isinstance(model.weights.embedding, PackedTable)
    assert all(isinstance(part, PackedWeight) for matrix in matrices(model) for part in matrix.parts)
    assert torch.equal(model.embedding_rows([0, 7, 419]), wide.embedding_rows([0, 7, 419]))
    assert weight_bytes(model) < 0.35 * weight_bytes(wide)
    loss, grad = step(wide, BATCH[:1])
    found, found_grad = step(model, BATCH[:1])
    assert found == pytest.approx(loss, rel=1e-6)
    assert relative_error(found_grad, grad) <= ROUNDING


def without_csrc(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if csrc/ had not been built."""
    for module in (native_matrices, packed, quantised, read_weights):
        monkeypatch.setattr(module, "is_built", lambda: False)


@pytest.mark.parametrize("kind", HALVES_AT)
@pytest.mark.parametrize("compiled", [True, False])
def test_a_files_own_types_are_kept(tmp_path: Path, kind: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradient are those of the dequantised model, and the embedding rows too."""
    if not compiled:
        without_csrc(monkeypatch)
    elif not is_built():
        pytest.skip("csrc/ is not built")
    path = tmp_path / "tiny.gguf"
    sizes = {**SIZES, "hidden_size": 256, "intermediate_size": 256, "tie_word_embeddings": kind in QUANTISED[::2]}
    write_gguf(path, random_model("llama", **sizes), kind=kind)
    model, wide = load_model(path, weights="stored"), load_model(path)
    form = TileWeight if compiled else BlockWeight
    assert all(isinstance(part, form) for matrix in matrices(model) for part in matrix.parts)
    assert torch.equal(model.embedding_rows([0, 7, 419]), wide.embedding_rows([0, 7, 419]))
    chunks, expected = (torch.cat([x for _, x in m.embedding_table_chunks(100)]) for m in (model, wide))
    assert torch.equal(chunks, expected)
    assert weight_bytes(model) < 0.28 * weight_bytes(wide)
    loss, grad = step(wide)
    found, found_grad = step(model)
    assert found == pytest.approx(loss, rel=1e-6)
    assert relative_error(found_grad, grad) <= ROUNDING
    assert model.weights_hash() == load_model(path, weights="stored").weights_hash()


@pytest.mark.skipif(not is_built(), reason="csrc/ is not built")
@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
@pytest.mark.parametrize("tied", [True, False])
def test_types_without_a_product_are_narrowed(tmp_path: Path, kind: str, tied: bool) -> None:
    path = tmp_path / "tiny.gguf"
    sizes = {**SIZES, "hidden_size": 256, "intermediate_size": 256, "tie_word_embeddings": tied}
    write_gguf(path, random_model("llama", **sizes), kind=kind)
    model, wide = load_model(path, weights="stored"), load_model(path)
    parts = [part for matrix in (*matrices(model), model.weights.head) for part in matrix.parts]
    assert all(isinstance(part, TileWeight) and part.kind == "Q2_K" for part in parts)
    assert torch.equal(model.embedding_rows([0, 7, 419]), wide.embedding_rows([0, 7, 419]))
    (loss, grad), (found, found_grad) = step(wide), step(model)
    assert found == pytest.approx(loss, rel=1e-6)
    assert relative_error(found_grad, grad) <= ROUNDING


@pytest.mark.parametrize("form", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_weights_kept_in_a_float_type(tmp_path: Path, form: str, dtype: str) -> None:
    """They take its bytes, whatever is computed in, and one product serves q, k and v."""
    write_folder(tmp_path, "qwen2", **SIZES)
    model, double = load_model(tmp_path, dtype, weights=form), load_model(tmp_path, "float64")
    kept = {"fp32": torch.float32, "bf16": torch.bfloat16}[form]
    assert all(part.dtype == kept for matrix in matrices(model) for part in matrix.parts)
    assert all(len(matrix.parts) == 1 for matrix in matrices(model))
    bound = 5e-2 if "bf" in form + dtype else 1e-5
    assert step(model)[0] == pytest.approx(step(double)[0], rel=bound)
    answers = generate(model, SoftPrompt.from_ids(model, [9], template=Template.plain()), [[50]], Sampling(3))
    assert len(answers[0].ids) <= 3


def test_parts_of_several_types_and_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = [torch.randn(n, 64, generator=generator) for n in (48, 16, 30)]
    parts = [frozen_part(w, kind) for w, kind in zip(wide, ("int8", "int4", "bfloat16"), strict=True)]
    whole = torch.cat([part.dequantize() if isinstance(part, PackedWeight) else part.float() for part in parts])
    monkeypatch.setattr(frozen, "TILE_BYTES", 64 * 4 * 20)
    monkeypatch.setattr(frozen, "UNPACKED", 64 * 7)
    matrix = frozen.FrozenMatrix(parts, None, frozen.Widening(torch.float32, torch.device("cpu")))
    x, dy = torch.randn(5, 64, generator=generator), torch.randn(5, 94, generator=generator)
    torch.testing.assert_close(matrix.forward(x, torch.empty(5, 94)), x @ whole.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(matrix.backward(dy, torch.empty(5, 64)), dy @ whole, rtol=1e-5, atol=1e-5)
    some = matrix.rows(40, 70)
    torch.testing.assert_close(some.forward(x, torch.empty(5, 30)), x @ whole[40:70].T, rtol=1e-5, atol=1e-5)


def test_a_tile_is_widened_once_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward product over several blocks of rows unpacks each tile once, and tiles are almost equally large."""
    generator = torch.Generator().manual_seed(0)
    unpacked = []
    monkeypatch.setattr(frozen, "TILE_BYTES", 64 * 4 * 64)
    monkeypatch.setattr(frozen, "SUM_ROWS", 24)

    def unpack(part: PackedWeight, out: torch.Tensor) -> None:
        unpacked.append(len(out))
        out.copy_(part.dequantize())

    parts = [frozen_quantised(torch.randn(n, 64, generator=generator), "int8") for n in (144, 66)]
    matrix = frozen.FrozenMatrix(parts, None, frozen.Widening(torch.float32, torch.device("cpu"), unpack))
    dy = torch.randn(2 * frozen.ROWS + 7, 210, generator=generator)
    found = matrix.backward(dy, torch.empty(len(dy), 64))
    assert unpacked == [48, 48, 48, 48, 18]
    whole = torch.cat([part.dequantize() for part in parts])
    assert relative_error(found, dy.double() @ whole.double()) < ROUNDING


def frozen_part(w: torch.Tensor, kind: str) -> Any:
    return w.bfloat16() if kind == "bfloat16" else frozen_quantised(w, kind)


def frozen_quantised(w: torch.Tensor, kind: str) -> PackedWeight:
    from embedgrad.model.packed import quantised

    return quantised("w", w, kind)[0]


def test_what_cannot_be_quantised_is_refused(tmp_path: Path) -> None:
    model = random_model("llama", **SIZES)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("inf")
    write_folder(tmp_path, "llama", **SIZES)
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight cannot be quantised: .*NaN.*\.$"):
        load_model(tmp_path, weights="int8")


@pytest.mark.parametrize(
    ("family", "weights"),
    [("qwen3", "compute"), ("qwen3", "stored"), ("qwen3", "int8"), *((family, "int4") for family in sorted(FAMILIES))],
)
def test_streamed_blocks_give_the_same_bits(tmp_path: Path, family: str, weights: str) -> None:
    write_folder(tmp_path, family, dtype=torch.bfloat16, **{**SIZES, "num_hidden_layers": 5})
    whole = load_model(tmp_path, weights=weights)
    rest, block = weight_bytes(whole) - block_bytes(whole), _packed_size(whole.weights.layers[0])
    expected = step(whole)
    for resident in (0, 2):
        limit = rest + (resident + 2) * block
        model = load_model(tmp_path, weights=weights, max_device_memory=limit)
        streamed = model.weights.layers
        assert isinstance(streamed, StreamedLayers)
        assert streamed.device_bytes + rest <= limit
        for _ in range(2):
            loss, grad = step(model)
            assert loss == expected[0]
            assert torch.equal(grad, expected[1])
        assert model.weights_hash() == whole.weights_hash()
        streamed.copies = 0
        step(model)
        # forward and backward bring every streamed block once, less the two that are there at each turn
        assert streamed.copies <= 2 * (5 - resident) - 2
    assert isinstance(load_model(tmp_path, weights=weights, max_device_memory=1 << 30).weights.layers, list)
    with pytest.raises(ConfigError, match=r"^max_device_memory is 1,000 bytes, but .* two blocks take [\d,]+; .*\.$"):
        load_model(tmp_path, weights=weights, max_device_memory=1000)


def test_the_next_block_is_always_on_its_way(tmp_path: Path) -> None:
    write_folder(tmp_path, "llama", **{**SIZES, "num_hidden_layers": 5})
    whole = load_model(tmp_path)
    rest, block = weight_bytes(whole) - block_bytes(whole), _packed_size(whole.weights.layers[0])
    layers = load_model(tmp_path, max_device_memory=rest + 2 * block).weights.layers
    assert isinstance(layers, StreamedLayers)
    walk = [0, 1, 2, 3, 4, 4, 3, 2, 1, 0, 0, 1]  # forward, backward, and into the next step
    for index, following in pairwise(walk):
        assert torch.equal(layers[index].attention_norm, whole.weights.layers[index].attention_norm)
        copies = layers.copies
        layers._bring(following)
        assert layers.copies == copies
    assert layers.copies == 5 + 3


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_streamed_generation_gives_the_same_tokens(tmp_path: Path, family: str) -> None:
    write_folder(tmp_path, family, **{**SIZES, "num_hidden_layers": 3})
    whole = load_model(tmp_path)
    rest, block = weight_bytes(whole) - block_bytes(whole), _packed_size(whole.weights.layers[0])
    streamed = load_model(tmp_path, max_device_memory=rest + 2 * block)
    assert isinstance(streamed.weights.layers, StreamedLayers)
    answers = [
        generate(m, SoftPrompt.from_ids(m, [9, 30], template=Template.plain()), [[50], [51, 52]], Sampling(5))
        for m in (whole, streamed)
    ]
    assert answers[0] == answers[1]


def test_smollm2_in_blocks(smollm2_path: Path) -> None:
    model, wide = load_model(smollm2_path, weights="stored"), load_model(smollm2_path, weights="compute")
    assert weight_bytes(model) < 0.2 * weight_bytes(wide)
    loss, grad = step(wide, [Example("It was a joy.", "positive")])
    found, found_grad = step(model, [Example("It was a joy.", "positive")])
    assert found == pytest.approx(loss, rel=1e-5)
    assert relative_error(found_grad, grad) <= 1e-4
