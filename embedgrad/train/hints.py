"""What an unknown key of a configuration was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from pydantic import BaseModel

# Names that other programs give to a setting.
_MEANT = {
    "learning_rate": "lr",
    "epochs": "num_train_epochs num_epochs n_epochs max_epochs",
    "steps": "max_steps num_steps n_steps iterations max_iters train_steps max_train_steps total_steps",
    "batch_size": "bs batch per_device_train_batch_size train_batch_size",
    "warmup_steps": "warmup num_warmup_steps",
    "weight_decay": "wd",
    "clip_norm": "max_grad_norm grad_clip gradient_clip_val clip_grad_norm gradient_clipping grad_norm_clip",
    "schedule": "lr_scheduler lr_scheduler_type scheduler lr_schedule",
    "validate_every": "eval_steps eval_every eval_interval val_every val_check_interval evaluation_steps",
    "checkpoint_every": "save_steps save_every save_interval",
    "seed": "random_seed random_state",
    "patience": "early_stopping early_stopping_patience",
    "optimizer": "optim optimiser",
    "trust_region": "tau region radius",
    "train": "training train_file train_data train_path train_dataset",
    "validation": "val valid dev eval validate val_file validation_file eval_dataset dev_file",
    "test": "test_file test_data test_dataset",
    "path": "file filename file_path model_name_or_path model_name name_or_path model_id model_path name dataset",
    "dtype": "torch_dtype precision compute_dtype",
    "weights": "quantization quantize load_in_8bit load_in_4bit",
    "backend": "kernels",
    "device": "device_map",
    "query": "input question text source prompt_column input_column text_column",
    "target": "output answer label completion response target_column label_column",
    "labels": "classes label_names choices label_list",
    "grader": "metric metrics scorer",
    "limit": "max_samples max_examples num_samples",
    "query_tokens": "max_query_length max_source_length max_seq_length max_length",
    "target_tokens": "max_target_length",
    "folder": "output_dir out_dir save_dir output_folder dir data_dir",
    "loggers": "report_to logger logging",
    "max_new_tokens": "max_tokens max_gen_len",
    "repetition_penalty": "rep_penalty",
    "stop": "stop_strings stop_sequences",
    "optimize": "train_args trainer training_args optimization optimisation optimise hyperparameters",
    "data": "dataset datasets",
    "template": "chat_template messages enable_thinking",
    "sampling": "generation generation_config decoding",
    "text": "prompt content",
    "file": "path",
}
_SYNONYMS: dict[str, list[str]] = {}
for _name, _others in _MEANT.items():
    for _other in _others.split():
        _SYNONYMS.setdefault(_other, []).append(_name)


def hint(root: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """What to say about the unknown key at `location` in a configuration of the class `root`."""
    key = str(location[-1])
    plain = key.strip().lower().replace("-", "_").replace(" ", "_")
    section = _section(root, location[:-1])
    beside = [] if section is None else list(section.model_fields)
    meant = [plain, *_SYNONYMS.get(plain, [])]
    found = [name for name in meant if name in beside] or difflib.get_close_matches(plain, beside, 1, 0.75)
    if not found:
        paths = list(_paths(root))
        found = [path for name in meant for path in paths if path.rpartition(".")[2] == name][:2]
        found = found or difflib.get_close_matches(plain, beside, 1)
    if found:
        return f"did you mean {' or '.join(repr(name) for name in found)}"
    return f"known are {', '.join(beside)}"


def _inner(section: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The section that a key of `section` holds, or None."""
    field = section.model_fields.get(name)
    kinds = [field.annotation, *getattr(field.annotation, "__args__", ())] if field is not None else []
    inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return inner[0] if inner else None


def _section(root: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = root
    for name in location:
        section = None if section is None else _inner(section, str(name))
    return section


def _paths(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted paths of all settings, those of outer sections first."""
    for name in section.model_fields:
        yield prefix + name
    for name in section.model_fields:
        inner = _inner(section, name)
        if inner is not None:
            yield from _paths(inner, f"{prefix}{name}.")
