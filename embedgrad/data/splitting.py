"""Splits examples into parts that share no text.

The split depends on a seed and on hashes of the texts, and not on the order of the examples. Two texts count as the
same if they have the same words, and signs that carry meaning, in the same order (`embedgrad.data.words`); case,
punctuation and spacing are ignored. So a text never occurs in two parts, even if its copies differ in their label or in
a comma.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from embedgrad.data.example import Example
from embedgrad.data.words import words, words_and_signs
from embedgrad.util.errors import DataError

GRAM = 8  # words; as in the contamination check of PaLM (Chowdhery et al., arXiv 2204.02311, section 8)

Group = Callable[[Example], str]  # examples for which it gives the same text always go to the same part


def text_key(query: str | Sequence[int]) -> str:
    """A key that is equal for queries that count as the same text.

    It is made of the text's words and signs, of all characters but white space where it has neither, or of the token
    ids.
    """
    if isinstance(query, str):
        return "words:" + " ".join(found) if (found := words_and_signs(query)) else _exact_key(query)
    return _exact_key(query)


def grams(query: str | Sequence[int]) -> list[tuple[str, ...]]:
    """All n-grams of GRAM words (in scripts without spaces, characters); none for shorter texts and for token ids."""
    found = words(query) if isinstance(query, str) else []
    return [tuple(found[i : i + GRAM]) for i in range(len(found) - GRAM + 1)]


def families(examples: Sequence[Example], share: float = 0.5) -> Group:
    """Groups texts that are variations of each other, such as the same story with different endings.

    Two texts are in one family if at least `share` of the shorter text's n-grams of GRAM words occur in the other text,
    or if a chain of such pairs connects them. The time grows with the number of pairs that share an n-gram. The
    returned function raises KeyError for an example that is not in `examples`.
    """
    held = {text_key(example.query): set(grams(example.query)) for example in examples}
    keys = list(held)
    where: dict[tuple[str, ...], list[int]] = {}
    for number, key in enumerate(keys):
        for gram in held[key]:
            where.setdefault(gram, []).append(number)
    head = list(range(len(keys)))

    def find(number: int) -> int:
        while head[number] != number:
            number = head[number]
        return number

    for number, key in enumerate(keys):
        shared = Counter(other for gram in held[key] for other in where[gram] if other < number)
        for other, count in shared.items():
            if count >= share * min(len(held[key]), len(held[keys[other]])):
                one, two = sorted((find(number), find(other)))
                head[two] = one
    names = {key: keys[find(number)] for number, key in enumerate(keys)}
    return lambda example: names[text_key(example.query)]


def split(
    examples: Sequence[Example], sizes: Mapping[str, int | float], seed: int = 0, group: Group | None = None
) -> dict[str, list[Example]]:
    """Splits `examples` into named parts. `seed` determines the parts and the order within each part.

    sizes: for each part the number of its examples (int) or its fraction of all examples (float, rounded down). If all
        sizes are fractions and add up to 1, the largest part also takes the examples that are left over.
    group: gives the text that an example is grouped by; None: its query.
    Examples whose texts have the same `text_key` always go to the same part, so a part may be a few examples smaller
    than its size. The part of a query depends on the seed, the sizes and the set of queries, and not on the order of
    the examples. Raises DataError where there are too few examples or a size is invalid.
    """
    wanted, all_of_them = _counts(len(examples), sizes)
    left = _groups(examples, seed, group)
    parts: dict[str, list[Example]] = {}
    for name, count in wanted.items():
        part: list[Example] = []
        rest = []
        for together in left:
            if len(part) + len(together) <= count:
                part.extend(together)
            else:
                rest.append(together)
        if count and not part:
            raise DataError(f"the part {name!r} of {count} examples stays empty: equal queries come in larger groups.")
        parts[name], left = part, rest
    if all_of_them:
        largest = max(wanted, key=lambda name: wanted[name])
        parts[largest].extend(example for together in left for example in together)
    return parts


def folds(examples: Sequence[Example], count: int, seed: int = 0, group: Group | None = None) -> list[list[Example]]:
    """Splits all `examples` into `count` folds for cross-validation with similar sizes and similar shares of targets.

    Examples are grouped as in `split`. The groups are taken in an order drawn by `seed`. Each goes to the fold with the
    fewest examples of the group's most common target, and among those folds to the smallest. Raises DataError where
    there are fewer than 2 folds, or fewer groups than folds.
    """
    if count < 2:
        raise DataError(f"a cross-validation needs at least 2 folds, not {count}.")
    groups = _groups(examples, seed, group)
    if len(groups) < count:
        raise DataError(f"{len(groups)} different texts cannot be divided into {count} folds.")
    parts: list[list[Example]] = [[] for _ in range(count)]
    targets: list[Counter[object]] = [Counter() for _ in range(count)]
    for together in groups:
        has = Counter(_target(example) for example in together)
        target = has.most_common(1)[0][0]
        chosen = min(range(count), key=lambda n: (targets[n][target], len(parts[n]), n))
        parts[chosen].extend(together)
        targets[chosen].update(has)
    return parts


def without(examples: Sequence[Example], others: Sequence[Example], group: Group | None = None) -> list[Example]:
    """The examples whose text (or group) does not occur in `others`."""
    taken = {_group_key(example, group) for example in others}
    return [example for example in examples if _group_key(example, group) not in taken]


def _groups(examples: Sequence[Example], seed: int, group: Group | None) -> list[list[Example]]:
    """Groups of examples that must stay together, in an order drawn by the seed."""
    together: dict[str, list[Example]] = {}
    ranks: dict[str, bytes] = {}
    for example in examples:
        key = _group_key(example, group)
        rank = hashlib.sha256(f"{seed}:{_exact_key(example.query)}".encode("utf-8", "surrogatepass")).digest()
        together.setdefault(key, []).append(example)
        ranks[key] = min(rank, ranks.get(key, rank))
    return [together[key] for key in sorted(together, key=lambda key: ranks[key])]


def _group_key(example: Example, group: Group | None) -> str:
    return text_key(example.query if group is None else group(example))


def _exact_key(query: str | Sequence[int]) -> str:
    if isinstance(query, str):
        return "text:" + " ".join(query.split())
    return "ids:" + ",".join(str(int(token)) for token in query)


def _target(example: Example) -> object:
    return example.target if isinstance(example.target, str) else tuple(example.target)


def _counts(total: int, sizes: Mapping[str, int | float]) -> tuple[dict[str, int], bool]:
    """(number of examples in each part, whether the sizes are fractions of the whole that add up to 1)."""
    counts: dict[str, int] = {}
    fractions = 0.0
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, (int, float)) or not 0 <= size < math.inf:
            raise DataError(f"the size of the part {name!r} must be a number of examples or a fraction, not {size!r}.")
        if isinstance(size, float):
            if size > 1:
                raise DataError(f"the fraction of the part {name!r} must lie between 0 and 1, not {size}.")
            fractions += size
            counts[name] = math.floor(size * total + 1e-9)
        else:
            counts[name] = size
    everything = math.isclose(fractions, 1.0) and all(isinstance(size, float) for size in sizes.values())
    if not counts:
        raise DataError("a split needs at least one part.")
    if fractions > 1 + 1e-9 or sum(counts.values()) > total:
        asked = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise DataError(f"a split into {asked} needs more than the {total} examples there are.")
    return counts, everything
