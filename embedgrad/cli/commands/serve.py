"""`embedgrad serve`: an OpenAI-compatible server."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from embedgrad.engine.model import Model
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.util.errors import ConfigError

_NEEDED = ("starlette", "uvicorn", "prometheus_client")
KEY = "EMBEDGRAD_API_KEY"


def run(
    open_model: Callable[[], Model],
    prompts: Sequence[Path],
    names: Sequence[str],
    bare: str | None,
    keys: Sequence[str],
    options: dict[str, Any],
) -> None:
    """Runs the command. The prompts are read before the model is opened. Raises EmbedGradError."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"the server needs {' and '.join(missing)}: pip install 'embedgrad[serve]'.")
    from embedgrad.serve.run import Settings, is_loopback, serve, served_models

    given = (*keys, *([os.environ[KEY]] if os.environ.get(KEY) else []))
    if not all(key.strip() and key.isascii() and key.isprintable() for key in given):
        raise ConfigError("an API key must be printable ASCII text that is not blank.")
    settings = Settings(api_keys=tuple(key.strip() for key in given), **options)
    for path in prompts:
        SoftPrompt.load(path)
    models = served_models(open_model(), prompts, names, bare)
    if not given and not is_loopback(settings.host):
        print(f"embedgrad: everybody who reaches {settings.host} can ask; --api-key closes it.", file=sys.stderr)

    def announce(address: str) -> None:
        print(f"{address}/v1: {', '.join(served.name for served in models)}", flush=True)

    serve(models, settings, announce)
