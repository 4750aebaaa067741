"""What a resumed run keeps: settings, data, model, date, and whether its bits can be those of an undisturbed run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from embedgrad.engine.model import Model
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.rendering import Rendered
from embedgrad.prompt.sandbox import today
from embedgrad.prompt.template import Template
from embedgrad.train.checkpoints import COMPUTATION, RunState, differences
from embedgrad.util.errors import ConfigError, TemplateError

_LENGTH = ("steps", "epochs")


def computation(model: Model, ranks: int = 1) -> dict[str, Any]:
    """What decides how numbers are rounded, beside model and settings: ranks, threads and kernels split the sums."""
    gpu = model.device.type == "cuda"
    return {
        "backend": model.backend,
        "device": torch.cuda.get_device_name(model.device) if gpu else str(model.device),
        "threads": torch.get_num_threads(),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
        **({"ranks": ranks} if ranks > 1 else {}),
    }


def tokens_hash(sequences: Iterable[Rendered]) -> str:
    """sha256 (hex) of rendered examples."""
    digest = hashlib.sha256()
    for one in sequences:
        digest.update(
            json.dumps([one.ids, one.prompt_rows, sum(one.target_mask), one.constant_prefix]).encode() + b"\n"
        )
    return digest.hexdigest()


def on_its_date(prompt: SoftPrompt, model: Model, saved: RunState | None) -> tuple[SoftPrompt, str | None]:
    """(the prompt with the date on which its run began, a note where that is another day).

    A date other than today's was given on purpose and stays.
    """
    date = prompt.template.date
    if saved is None or date is None or date != today():
        return prompt, None
    try:
        began = Template.from_json(saved.identity["prompt"]["template"])
    except (KeyError, TypeError, TemplateError):
        return prompt, None
    if began.date in (None, date) or began != prompt.template.on(str(began.date)):
        return prompt, None
    return prompt.behind(model, began), f"The chat template's date stays {began.date}, the day on which the run began."


def accept(saved: RunState, now: RunState, total: int, path: Path, allow_other_bits: bool) -> list[str]:
    """Notes about what changed between a saved run and its resumption. Raises ConfigError for what must not change.

    now: the state as a new run would begin. total: the number of steps that the run shall have.
    """
    old, new = (_without_length(state.identity) for state in (saved, now))
    changed = differences(old, {part: value for part, value in new.items() if part != COMPUTATION})
    if changed:
        raise ConfigError(f"the run in {path} cannot be resumed, because this changed: {', '.join(changed)}.")
    if total < saved.step:
        raise ConfigError(
            f"the run in {path} has taken {saved.step} steps, and the settings now ask for {total}; ask for more."
        )
    notes = []
    computed = [{COMPUTATION: {"ranks": 1, **one[COMPUTATION]}} for one in (old, new) if COMPUTATION in one]
    otherwise = differences(*computed) if len(computed) == 2 else []  # an earlier version did not note it
    if otherwise and goes_on(saved, total):
        told = ", ".join(otherwise)
        if not allow_other_bits:
            raise ConfigError(
                f"the run in {path} would end with other bits, because this changed: {told}; resume it with the same, "
                f"or allow that (--allow-other-bits)."
            )
        notes.append(f"The run goes on with other bits, because this changed: {told}.")
    lengths = [[state.identity["config"].get(name) for name in _LENGTH] for state in (saved, now)]
    if lengths[0] != lengths[1] and goes_on(saved, total):
        notes.append(f"The run goes on to {total} steps; schedule and intervals count from that number now.")
    elif lengths[0] != lengths[1]:
        notes.append(f"The run has ended ({saved.stop_reason}) at step {saved.step} and does not go on.")
    return notes


def goes_on(saved: RunState, total: int) -> bool:
    """Whether a saved run has steps to take: it was interrupted, or completed with fewer than `total` steps."""
    return saved.stop_reason is None or (saved.stop_reason == "completed" and saved.step < total)


def _without_length(identity: Mapping[str, Any]) -> dict[str, Any]:
    config = {name: value for name, value in identity["config"].items() if name not in _LENGTH}
    return {**identity, "config": config}
