"""`--model` of the benches: files, folders, and SmolLM2 in another type."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from bench.harness import files
from bench.harness.rows import row
from embedgrad.model.checkpoint import read_checkpoint
from tests.model.tiny import random_model, write_folder, write_gguf


@pytest.mark.parametrize("kind", files.TYPES)
def test_a_file_in_another_type(tmp_path: Path, kind: str) -> None:
    """Same configuration and tokenizer; every matrix is the old one's values, quantised anew."""
    source, target = tmp_path / "old.gguf", tmp_path / "new.gguf"
    write_gguf(source, random_model("llama", num_hidden_layers=1), kind="Q4_1")
    files.requantise(source, target, kind)
    old, new = read_checkpoint(source), read_checkpoint(target)
    assert new.config == old.config
    assert new.tokenizer.encode("a great film") == old.tokenizer.encode("a great film")
    assert new.tokenizer.chat_template == old.tokenizer.chat_template
    code = GGMLQuantizationType[kind]
    for name, shape in old.config.shapes().items():
        values = old.tensors.get(name)
        if len(shape) == 2 and "_proj" not in name:  # the rows of q and k stand in another order in the file
            values = torch.from_numpy(dequantize(quantize(values.numpy(), code), code))
            assert new.tensors.raw(name) is not None
        if "_proj" not in name:
            assert torch.equal(new.tensors.get(name), values), name


def test_files_and_folders_are_named_with_their_types(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", random_model("llama", num_hidden_layers=1), kind="Q8_0")
    (tmp_path / "folder").mkdir()
    write_folder(tmp_path / "folder", "qwen2")
    with files.model_files([str(tmp_path / "tiny.gguf"), str(tmp_path / "folder")]) as found:
        assert [(one.title, one.types) for one in found] == [("tiny", "Q8_0"), ("folder", "float32")]


@pytest.mark.parametrize("name", ["nothing.gguf", "smollm2:Q4_K"])
def test_what_is_no_model_is_said_in_a_sentence(name: str) -> None:
    with pytest.raises(SystemExit, match=rf"^--model {name}: .*\.$"), files.model_files([name]):
        pass


def test_rows_by_model() -> None:
    """Rows of earlier commits do not name one."""
    cases = [{}, {"model": "m", "types": "Q8_0"}, {"model": "m", "types": "Q8_0"}, {"model": "m", "types": "Q5_0"}]
    rows = [row("q", "c", "1", [1.0], case=case) for case in cases]
    found = {title: len(group) for title, group in files.by_model(rows).items()}
    assert found == {files.DEFAULT_TITLE: 1, "m (Q8_0)": 2, "m (Q5_0)": 1}
