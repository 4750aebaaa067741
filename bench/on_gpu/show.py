"""How the rows of `bench gpu` are put into tables: one line for each case and commit, contenders side by side."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence

from bench.harness.rows import Row

Cell = str | None
TIMED = {"graph": "in a CUDA graph", "cold": "L2 cold", "python": "from Python"}
"""How an operation was timed: in a graph, with its data in L2 where it fits; queued behind a wait, L2 overwritten; and
in older rows between two events around a call from Python, so that slow launches count."""


def commit(one: Row) -> str:
    """The commit that a row was measured at."""
    return "" if one.run is None else one.run.commit


def grouped(rows: Iterable[Row], key: Callable[[Row], Hashable]) -> dict[tuple[Hashable, str], list[Row]]:
    """Rows by what `key` says and by commit, cases in the order of their first row, commits from the oldest on."""
    rows = list(rows)
    cases = list(dict.fromkeys(key(one) for one in rows))
    commits = list(dict.fromkeys(commit(one) for one in sorted(rows, key=_started)))
    found = {(case, at): [r for r in rows if key(r) == case and commit(r) == at] for case in cases for at in commits}
    return {group: members for group, members in found.items() if members}


def _started(one: Row) -> str:
    return "" if one.run is None else one.run.started


def pick(rows: Iterable[Row], contender: str, **case: int | float | str) -> Row | None:
    """The last row of a contender in a case."""
    wanted = case.items()
    return next((r for r in reversed(list(rows)) if r.contender == contender and wanted <= r.case.items()), None)


def ms(one: Row | None) -> Cell:
    """Milliseconds, or why there are none."""
    return _scaled(one, 1e3)


def us(one: Row | None) -> Cell:
    """Microseconds, or why there are none."""
    return _scaled(one, 1e6)


def _scaled(one: Row | None, scale: float) -> Cell:
    if one is None:
        return None
    if "error" in one.more and one.unit == "none":
        return str(one.more["error"])
    value = one.median * scale
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def short(kernel: str) -> str:
    """A kernel's name without namespaces, template and arguments."""
    name = kernel.removeprefix("void ").replace("(anonymous namespace)::", "")
    return name.partition("(")[0].partition("<")[0].split("::")[-1].strip().removesuffix("_kernel")[:48]


def of_cards(rows: Sequence[Row], make: Callable[[Sequence[Row]], str]) -> str:
    """The table of each card, under its name where there are several."""
    cards = list(dict.fromkeys(one.run.machine.gpu if one.run else None for one in rows))
    texts = []
    for card in cards:
        own = [one for one in rows if (one.run.machine.gpu if one.run else None) == card]
        texts.append(make(own) if len(cards) == 1 else f"**{card}**\n\n{make(own)}")
    return "\n\n".join(texts)
