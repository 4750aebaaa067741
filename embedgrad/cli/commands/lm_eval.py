"""`embedgrad lm-eval`: lm-evaluation-harness with our engine as the model."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Sequence

from embedgrad.util.errors import ConfigError

NAME = "embedgrad"


def run(arguments: Sequence[str]) -> None:
    """Runs the harness' own command line with `--model embedgrad` where no model is named. Raises EmbedGradError."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm-evaluation-harness is not installed: pip install 'embedgrad[lm-eval]'.")
    import lm_eval.models  # noqa: F401  (the harness' own models are registered first)
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model

    from embedgrad.harness.lm_eval_model import EmbedGradLM

    with contextlib.suppress(ValueError):  # a release with plugins knows it by our entry point
        register_model(NAME)(EmbedGradLM)
    asked = list(arguments)
    named = any(argument == "--model" or argument.startswith("--model=") or argument == "-M" for argument in asked)
    evaluates = "--tasks" in asked or any(argument.startswith("--tasks=") for argument in asked)
    if evaluates and not named:
        asked += ["--model", NAME]
    sys.argv = ["embedgrad lm-eval", *asked]
    cli_evaluate()
