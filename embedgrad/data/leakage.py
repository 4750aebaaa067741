"""Whether training data contain test data. The check runs on the final parts, after all queries are truncated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

from embedgrad.data.example import Example
from embedgrad.data.splitting import GRAM, Group, grams, text_key

SIMILAR = 0.7  # share of a text's sequences of GRAM words, as in PaLM (Chowdhery et al., arXiv 2204.02311, section 8)


@dataclass(frozen=True)
class Leakage:
    """The result of the check. All values are numbers of examples.

    sizes: examples in each part. shared: for each pair of parts "a/b", examples of b whose text (`text_key`) is also in
    a. groups: the same for the group of an example, where examples are grouped by more than their text (by story, for
    instance). similar: for each part but the first, examples for which at least SIMILAR of their n-grams of GRAM words
    also occur in the first part; shorter texts have no such n-grams and are not counted. left_out: training examples
    that were removed because the test data have the same text. dropped: examples that were removed for another reason,
    such as a target that is too long.
    """

    sizes: dict[str, int]
    shared: dict[str, int]
    groups: dict[str, int] = field(default_factory=dict)
    similar: dict[str, int] = field(default_factory=dict)
    left_out: int = 0
    dropped: int = 0

    @property
    def clean(self) -> bool:
        """Whether every text and every group is in one part only."""
        return not any(self.shared.values()) and not any(self.groups.values())

    def to_dict(self) -> dict[str, Any]:
        """All fields, and `clean`, as JSON-able values."""
        return {"clean": self.clean, **asdict(self)}

    def sentence(self) -> str:
        """The result as one sentence for people."""
        told = ", ".join(f"{name} {size}" for name, size in self.sizes.items())
        counted = {name: max(n, self.groups.get(name, 0)) for name, n in self.shared.items()}
        found = ", ".join(f"{n} of {b} in {a}" for (a, _, b), n in _named(counted) if n)
        parts = [f"leakage check ({told}): " + (f"LEAK, {found}" if found else "no text is in two parts")]
        near = ", ".join(f"{n} of {name}" for name, n in self.similar.items() if n)
        if near:
            parts.append(f"nearly the same ({SIMILAR:.0%} of the {GRAM}-word sequences): {near}")
        if self.left_out:
            parts.append(f"{self.left_out} left out of training because the test data has the same words")
        if self.dropped:
            parts.append(f"{self.dropped} not usable")
        return "; ".join(parts)


def _named(counts: Mapping[str, int]) -> list[tuple[tuple[str, str, str], int]]:
    return [(name.partition("/"), n) for name, n in counts.items()]


def check_leakage(
    parts: Mapping[str, Sequence[Example]], group: Group | None = None, left_out: int = 0, dropped: int = 0
) -> Leakage:
    """Compares all pairs of parts. `parts` come in the order train, validation, test.

    group: gives the text that an example is grouped by; None: its query. left_out, dropped: as in `Leakage`.
    """
    filled = {name: part for name, part in parts.items() if part}
    texts = {name: [text_key(example.query) for example in part] for name, part in filled.items()}
    stories = {name: [text_key(group(example)) for example in part] for name, part in filled.items()} if group else {}
    return Leakage(
        {name: len(part) for name, part in parts.items()},
        _common(texts),
        _common(stories),
        _similar(filled),
        left_out,
        dropped,
    )


def _common(keys: Mapping[str, Sequence[str]]) -> dict[str, int]:
    held = {name: set(part) for name, part in keys.items()}
    return {f"{a}/{b}": sum(key in held[a] for key in keys[b]) for a, b in combinations(keys, 2)}


def _similar(parts: Mapping[str, Sequence[Example]]) -> dict[str, int]:
    if len(parts) < 2:
        return {}
    first, *others = parts
    known = {gram for example in parts[first] for gram in grams(example.query)}

    def near(example: Example) -> bool:
        own = grams(example.query)
        return bool(own) and sum(gram in known for gram in own) >= SIMILAR * len(own)

    return {name: sum(map(near, parts[name])) for name in others}
