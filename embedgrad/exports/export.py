"""`export`: writes tuned prompts for another program, whole or not at all."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from embedgrad.exports.check.report import CheckReport
from embedgrad.exports.source import NamedPrompt, Prompts, Source, named_prompts
from embedgrad.util.errors import ConfigError, SaveError
from embedgrad.util.files import umask
from embedgrad.util.host import available_memory

TARGETS = ("hf", "gguf", "peft", "vllm", "ollama")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    path: the folder or file. prompts: the names, the default first. facts: sizes, types and rounding errors. check:
    what the target's own program said; None where it was not asked. unchecked: then the reason.
    """

    target: str
    path: Path
    prompts: list[str]
    facts: dict[str, Any] = field(default_factory=dict)
    check: CheckReport | None = None
    unchecked: str = ""


def export(
    prompts: Prompts | Sequence[Prompts] | Mapping[str, Prompts],
    *,
    to: str,
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    names: Sequence[str] = (),
    untie: bool = False,
    force: bool = False,
    check: bool | None = None,
    dtype: str = "float32",
) -> ExportReport:
    """Write tuned prompts in a form that another program serves.

    prompts: prompts or prompt files; the first is the default. A mapping gives names.
    to: "hf" (a folder for transformers, vLLM, SGLang and MLX), "gguf" (a file for llama.cpp), "ollama" (a folder with a
        GGUF file and a Modelfile), "peft" (a prompt-tuning adapter), or "vllm" (requests with `prompt_embeds`).
    model: folder, .gguf file or hub id of the model that the prompts were tuned on.
    out: what is written; it must not exist, or be an empty folder.
    names: one for each prompt; default: from the files' names.
    untie: write a head of its own in which the new tokens have the logit 0, for engines that ignore suppressed tokens.
    force: take a prompt that was tuned on another model for a fine-tune of that model.
    check: load the result in the target's program and compare ids and logits with ours; None: where the program is
        installed and the memory suffices. A failed check leaves nothing behind.
    dtype: type of the weights where a GGUF file becomes a folder.

    Raises ExportError (the target cannot express a prompt, or the check failed), PromptError (another model's prompt),
    ModelError, ConfigError, SaveError.
    """
    if to not in TARGETS:
        raise ConfigError(f"there is no target {to!r}; choose one of {', '.join(TARGETS)}.")
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}.")
    target = Path(out)
    _check_place(target, is_file=to == "gguf")
    source = Source.open(model)
    named = named_prompts(prompts, names, source, force)
    with _building(target) as building:
        facts, checked, unchecked = _write(to, source, named, building, untie, check, DTYPES[dtype])
    return ExportReport(to, target, [each.name for each in named], facts, checked, unchecked)


def _write(
    to: str,
    source: Source,
    prompts: list[NamedPrompt],
    out: Path,
    untie: bool,
    check: bool | None,
    dtype: torch.dtype,
) -> tuple[dict[str, Any], CheckReport | None, str]:
    """Writes and checks one target. `out` does not exist yet. Returns facts, check, and why there is none."""
    if to == "hf":
        from embedgrad.exports.check.with_transformers import check_hf
        from embedgrad.exports.hf import write_hf

        out.mkdir()
        words, facts = write_hf(source, prompts, out, untie=untie, dtype=dtype)
        return facts, *_checked(check, lambda: check_hf(source, prompts, words, out), "transformers", source)
    if to == "gguf":
        from embedgrad.exports.check.with_llama_cpp import check_gguf
        from embedgrad.exports.gguf import write_gguf

        words, facts = write_gguf(source, prompts, out, untie=untie)
        return facts, *_checked(check, lambda: check_gguf(source, prompts, words, out), "xllamacpp", source)
    if to == "ollama":
        from embedgrad.exports.check.with_llama_cpp import check_gguf
        from embedgrad.exports.ollama import FILE, write_ollama

        out.mkdir()
        words, facts = write_ollama(source, prompts, out, untie=untie)
        return facts, *_checked(check, lambda: check_gguf(source, prompts, words, out / FILE), "xllamacpp", source)
    out.mkdir()
    if to == "peft":
        from embedgrad.exports.check.with_peft import check_peft
        from embedgrad.exports.peft import write_peft

        facts = write_peft(source, prompts, out)
        return facts, *_checked(check, lambda: check_peft(source, prompts, out), "peft", source)
    from embedgrad.exports.vllm import write_vllm

    return write_vllm(source, prompts, out), None, "vLLM is not started here; README.md has the requests"


def _checked(
    check: bool | None, run: Callable[[], CheckReport], package: str, source: Source
) -> tuple[CheckReport | None, str]:
    """(the result of the check, why there is none). Raises ConfigError where it is asked for and cannot be done."""
    if check is False:
        return None, "not asked for"
    reason = ""
    if importlib.util.find_spec(package) is None:
        reason = f"{package} is not installed"
    # Both programs hold the model in float32.
    needed = 2 * 4 * sum(torch.Size(shape).numel() for shape in source.config.shapes().values())
    if not reason and check is None and needed > available_memory() * 3 // 4:
        reason = f"it needs {needed / 2**30:.0f} GiB of memory; --check tries it all the same"
    if reason and check:
        raise ConfigError(f"the export cannot be checked: {reason}.")
    return (None, reason) if reason else (run(), "")


def _check_place(target: Path, is_file: bool) -> None:
    """Raises SaveError unless `target` can be made: it does not exist, or is an empty folder."""
    try:
        parent = target.absolute().parent
        if not target.name:
            raise SaveError(f"{target} is no name for an export; give the name of a new folder or file.")
        if not parent.is_dir():
            raise SaveError(f"{parent} is not a folder; make it first.")
        empty = not is_file and target.is_dir() and not any(target.iterdir())
        if target.is_symlink() or (target.exists() and not empty):
            raise SaveError(f"{target} exists already; give a new name, or remove it first.")
    except OSError as error:
        raise SaveError(f"cannot write {target}: {error.strerror or error}; choose another place.") from error


@contextlib.contextmanager
def _building(target: Path) -> Iterator[Path]:
    """A place beside `target` that becomes `target` when all is written; after an error nothing is left of it."""
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.absolute().parent))
        building = folder / target.name
        yield building
        if building.is_dir():
            os.chmod(building, 0o777 & ~umask())
        os.replace(building, target)
    except OSError as error:
        raise SaveError(
            f"cannot write {target}: {error.strerror or error}; free some space or choose another place."
        ) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
