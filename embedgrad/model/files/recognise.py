"""Says what a path is that holds no model, so that a refusal can say what to give instead."""

from __future__ import annotations

import json
import re
from pathlib import Path

from embedgrad.util.errors import ModelError

GGUF_MAGIC = b"GGUF"
_BEFORE_GGUF = (b"lmgg", b"tjgg", b"fmgg", b"algg")
_LFS = b"version https://git-lfs"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_OF_A_FOLDER = (".safetensors", ".json", ".jinja", ".model", ".txt")
_CACHED = re.compile(r"models--(.+?)--(.+)")


def stand_in(path: Path) -> str | None:
    """What lies in the place of a file that was to be fetched, with advice; None where it may be the file itself."""
    try:
        with open(path, "rb") as file:
            head = file.read(256)
    except OSError:
        return None
    begin = head.lstrip().lower()
    if not head:
        return "is empty; fetch it again"
    if head.startswith(_LFS):
        return "is a Git LFS pointer, not the file that it points to; run git lfs pull in its folder"
    if begin.startswith((b"<!doctype html", b"<html")):
        return "is a web page; fetch the file itself (on the hub: the link named download)"
    if head.startswith((b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ")):
        return "is an archive; unpack it"
    return None


def refuse_file(path: Path) -> None:
    """Raises ModelError for a file that is not GGUF; its sentence says what the file is."""
    with open(path, "rb") as file:
        head = file.read(len(GGUF_MAGIC))
    suffix = path.suffix.lower()
    if head == GGUF_MAGIC:
        return
    if suffix in _PICKLED:  # torch's own are archives
        raise ModelError(
            f"{path} holds pickled weights, which are not read; save the model as safetensors and give its folder."
        )
    found = stand_in(path)
    if found is not None:
        raise ModelError(f"{path} {found}.")
    if head in _BEFORE_GGUF:
        raise ModelError(f"{path} is in a format that GGUF has replaced; convert the original model to GGUF.")
    if suffix in _OF_A_FOLDER:
        raise ModelError(f"{path} is one file of a model; give the folder that holds it: {path.parent}.")
    if suffix != ".gguf":
        raise ModelError(f"{path} is neither a GGUF file nor a model folder.")


def refuse_adapter(folder: Path) -> None:
    """Raises ModelError for a folder with an adapter, which would not be applied."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        return
    try:
        values = json.loads(file.read_text("utf-8"))
        kind, base = values.get("peft_type"), values.get("base_model_name_or_path")
    except (OSError, ValueError, RecursionError, AttributeError):
        kind = base = None
    told = f" ({kind[:40]})" if isinstance(kind, str) else ""
    made_for = f" for {base[:100]}" if isinstance(base, str) else ""
    raise ModelError(
        f"{folder} holds an adapter{told}{made_for}, which is not applied; merge it into its base model (PEFT: "
        f"merge_and_unload, save_pretrained) and give the folder of the result."
    )


def refuse_folder(folder: Path) -> None:
    """Raises ModelError for a folder without config.json and without a .gguf file; its sentence says what it is."""
    refuse_adapter(folder)
    shown = f"{folder} is not a model folder: it has neither config.json nor a .gguf file"
    snapshots = folder if folder.name == "snapshots" else folder / "snapshots"
    if snapshots.is_dir() and (_CACHED.fullmatch(snapshots.parent.name) or snapshots != folder):
        held = sorted((path for path in snapshots.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
        last = f"{snapshots / held[-1].name}" if held else f"a folder in {snapshots}/, which is empty"
        raise ModelError(f"{folder} is a folder of the hub's cache; give the model in it: {last}.")
    inside = sorted(path.parent for path in folder.glob("*/config.json"))
    cached = sorted(path for path in folder.glob("models--*--*") if path.is_dir())
    if cached:
        raise ModelError(
            f"{folder} is the hub's cache; give one model of it, by its hub id or as a folder of snapshots/."
        )
    if inside:
        raise ModelError(f"{shown}; {inside[0]} has one: give that folder.")
    if (folder / "params.json").is_file() or any(folder.glob("consolidated*")):
        raise ModelError(f"{shown}; it is in the publisher's own format: convert it to that of transformers.")
    if any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder} has weights and no config.json; fetch the model's other files as well.")
    raise ModelError(f"{shown}.")
