"""Downloads models from the Hugging Face hub with the optional package huggingface_hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from embedgrad.util.errors import ModelError
from embedgrad.util.shown import first_line

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
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?(?::([\w./-]+))?")
_PART = re.compile(r"-(\d{5})-of-\d{5}\.gguf$", re.IGNORECASE)
_SHOWN = 12  # GGUF files that a message lists
_SNAPSHOT = re.compile(r"models--(.+?)--(.+)")


def resolve(path_or_id: str | os.PathLike[str]) -> Path:
    """An existing path unchanged; for a hub id what was downloaded.

    Hub ids are `org/name` and `org/name@revision`, behind which `:FILE` or `:TYPE` (`org/name:Q4_K_M`) names one of
    several GGUF files. A repository of safetensors gives the folder of its files, one of GGUF files the path of the
    file that is wanted; no other is downloaded.
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
        raise ModelError(
            f"{path} does not exist{_looked(path)}; give a model folder, a .gguf file or a hub id like org/name."
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise ModelError(
            f"{path} does not exist here, and hub ids need a package: pip install embedgrad[hub]."
        ) from error
    name, revision, wanted = match.groups()
    try:
        if wanted is None:
            folder = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(PATTERNS)))
            if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
                return folder
        files = _gguf_files(name, revision)
        if wanted is None and not files:
            return folder
        chosen = _chosen(name, files, wanted)
        return Path(huggingface_hub.hf_hub_download(name, chosen, revision=revision))
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{path_or_id} is no file here{_looked(path)} and could not be fetched from the hub: {first_line(error)}."
        ) from error


def _looked(path: Path) -> str:
    return "" if path.is_absolute() else f" (in {Path.cwd()})"


def _gguf_files(name: str, revision: str | None) -> list[str]:
    """The models among a repository's files, without further parts of a split one and without vision projectors."""
    import huggingface_hub

    try:
        files = huggingface_hub.list_repo_files(name, revision=revision)
    except Exception:  # offline: what was downloaded before
        folder = Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True))
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf")]
    models = [file for file in files if file.lower().endswith(".gguf") and "mmproj" not in file.lower()]
    return sorted(file for file in models if (part := _PART.search(file)) is None or int(part[1]) == 1)


def _chosen(name: str, files: list[str], wanted: str | None) -> str:
    """The file that is meant by its name, or by its type at the name's end. Raises ModelError."""
    found = files
    if wanted is not None:
        plain = wanted.lower()
        ends = tuple(f"{sign}{plain}.gguf" for sign in "-._/")
        found = [file for file in files if plain in (file.lower(), file.rpartition("/")[2].lower())]
        found = found or [file for file in files if _PART.sub(".gguf", file).lower().endswith(ends)]
    if len(found) == 1:
        return found[0]
    told = ", ".join(files[:_SHOWN]) + (f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else "")
    if not files:
        raise ModelError(f"the repository {name} has no GGUF files; give {name} alone.")
    if wanted is not None and not found:
        raise ModelError(f"the repository {name} has no GGUF file {wanted}; there are {told}.")
    raise ModelError(
        f"the repository {name} has several GGUF files; give one of them behind a colon ({name}:TYPE): {told}."
    )


def name_of(folder: Path) -> str:
    """The name of a model folder; `org/name` for a folder in the hub's cache."""
    folder = folder.absolute()
    if folder.parent.name == "snapshots" and (match := _SNAPSHOT.fullmatch(folder.parent.parent.name)):
        return f"{match[1]}/{match[2]}"
    return folder.resolve().name
