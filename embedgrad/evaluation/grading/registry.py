"""Makes a grader from a configuration."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from embedgrad.evaluation.grading.grader import Grader
from embedgrad.evaluation.grading.labels import Exact, GeneratedLabel
from embedgrad.evaluation.grading.mathematics import Boxed, Mathematics
from embedgrad.util.errors import ConfigError


def make_grader(values: str | Mapping[str, Any], labels: Sequence[str] | None = None) -> Grader:
    """The grader of a configuration.

    values: a kind, or a mapping with `kind` and the settings of this kind. labels: all possible answers, for the kinds
    that use them. Raises ConfigError for an unknown kind or setting, an invalid value, or a kind whose package is not
    installed.
    """
    kinds: dict[str, type[Grader]] = {each.kind: each for each in (Exact, GeneratedLabel, Mathematics, Boxed)}
    rest: dict[str, Any] = {"kind": values} if isinstance(values, str) else dict(values)
    kind = rest.pop("kind", None)
    if not isinstance(kind, str) or kind not in kinds:
        raise ConfigError(f"the grader is {kind!r}, but must be one of {', '.join(kinds)}.")
    chosen = kinds[kind]
    for name in rest:
        if name not in chosen.settings:
            near = difflib.get_close_matches(str(name), chosen.settings, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(chosen.settings) or 'none'}."
            raise ConfigError(f"the grader {kind!r} has no setting {name!r}{hint}")
    if issubclass(chosen, (Exact, GeneratedLabel)):
        rest["labels"] = tuple(labels or ())
    return chosen(**rest)
