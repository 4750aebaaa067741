"""Downloads models from the Hugging Face hub with the optional package huggingface_hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from embedgrad.util.errors import ModelError

# The files that read_checkpoint may open. Weights in other formats are not downloaded.
PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",
    "model*.safetensors",
)
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
_SNAPSHOT = re.compile(r"models--(.+?)--(.+)")


def resolve(path_or_id: str | os.PathLike[str]) -> Path:
    """An existing path unchanged; for a hub id `org/name` or `org/name@revision` the folder of its downloaded files.

    huggingface_hub's environment variables apply (HF_HOME, HF_HUB_OFFLINE, HF_TOKEN, ...). Raises ModelError.
    """
    path = Path(path_or_id)
    try:
        if path.exists():
            return path
    except OSError as error:  # a name that is too long, a folder without permission
        raise ModelError(f"the model {path} cannot be opened: {error.strerror or error}.") from error
    match = _HUB_ID.fullmatch(os.fspath(path_or_id))
    if match is None:
        raise ModelError(f"{path} does not exist; give a model folder, a .gguf file or a hub id like org/name.")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ModelError(
            f"{path} does not exist here, and hub ids need a package: pip install embedgrad[hub]."
        ) from error
    name, revision = match.groups()
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(PATTERNS)))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0].rstrip(".") or type(error).__name__
        raise ModelError(f"{path_or_id} is no file here and could not be fetched from the hub: {reason}.") from error


def name_of(folder: Path) -> str:
    """The name of a model folder; `org/name` for a folder in the hub's cache."""
    folder = folder.absolute()
    if folder.parent.name == "snapshots" and (match := _SNAPSHOT.fullmatch(folder.parent.parent.name)):
        return f"{match[1]}/{match[2]}"
    return folder.resolve().name
