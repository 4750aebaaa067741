"""The content of a report, for both of its forms: tables of strings, sentences, examples and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from embedgrad.data.leakage import Leakage
from embedgrad.evaluation.evaluate import MEASURES
from embedgrad.evaluation.statistics import Accuracy, McNemar, mcnemar_p
from embedgrad.report.curves import HeatMap, Panel, alarm_sentence, heat_map, overlays, panels
from embedgrad.report.elsewhere import elsewhere
from embedgrad.report.read import Record, Run, find, number
from embedgrad.report.table import Table

_LONGEST = 1200  # characters of a text in an example; a longer text is truncated
NOTHING = "–"


@dataclass(frozen=True)
class Changed:
    """A test example whose answer is right only before, or only after. before, after: the generated answers."""

    query: str
    target: str
    before: str
    after: str


@dataclass(frozen=True)
class Examples:
    """Some (`shown`) of `total` examples that changed in the same direction."""

    title: str
    total: int
    shown: list[Changed]


@dataclass(frozen=True)
class Section:
    """The part of a report on one run. tables: the tables by heading. missing: what is absent or contradictory."""

    title: str
    verdict: str
    missing: list[str]
    facts: Table
    tables: dict[str, Table]
    leakage: str
    alarms: list[str]
    prompt: str
    panels: list[Panel]
    heat: HeatMap | None
    tokens: Table | None
    examples: list[Examples]
    config: str
    versions: Table | None


@dataclass(frozen=True)
class Content:
    """A whole report. comparison, overlays: only for several runs."""

    title: str
    sections: list[Section]
    comparison: Table | None = None
    overlays: list[Panel] = field(default_factory=list)


@dataclass(frozen=True)
class Share:
    """A share of right answers with its 95 % interval. counted: "N of M", or empty where it is not known."""

    value: float
    low: float
    high: float
    counted: str = ""

    def told(self) -> str:
        """The share as text, such as "88.8 % [85.7, 91.3]"."""
        return f"{percent(self.value)} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class Measured:
    """A measure on the test data before and after. test: their paired test; None where it is not known."""

    name: str
    before: Share
    after: Share
    test: McNemar | None


def build(runs: Sequence[Run], examples: int) -> Content:
    """The report on `runs`, with at most `examples` examples for each run and direction of change."""
    names = _names(runs)
    sections = [_section(run, name, examples) for run, name in zip(runs, names, strict=True)]
    if len(runs) == 1:
        return Content(f"embedgrad: the run “{names[0]}”", sections)
    return Content(f"embedgrad: {len(runs)} runs", sections, _comparison(runs, names), overlays(runs, names))


def percent(value: float) -> str:
    """A share as text, such as "88.8 %", with a no-break space."""
    return f"{100 * value:.1f}\u00a0%"


def measured(run: Run) -> list[Measured]:
    """The measures on the test data that are known both before and after."""
    found = []
    for name, told in MEASURES.items():
        before, after = (_share(run, name, when) for when in ("before", "after"))
        if before is not None and after is not None:
            found.append(Measured(told, before, after, _paired(run, name)))
    return found


def _share(run: Run, name: str, when: str) -> Share | None:
    """The share by `name`, counted from the answers where they are stored, else read from the summary."""
    records = find(run.test, when, "records")
    if isinstance(find(run.test, when, name), dict) and _are_records(records):
        counted = Accuracy.of(list(map(_correct(name), records)))
        return Share(counted.value, counted.low, counted.high, f"{counted.correct} of {counted.total}")
    value, interval = number(find(run.summary, name, when)), find(run.summary, "intervals", name, when)
    low, high = map(number, interval) if isinstance(interval, list) and len(interval) == 2 else (None, None)
    return None if value is None or low is None or high is None else Share(value, low, high)


def _contradictions(run: Run) -> list[str]:
    """A sentence for each share in the summary that differs from the stored answers."""
    found = []
    for name, told in MEASURES.items():
        for when in ("before", "after"):
            said, share = number(find(run.summary, name, when)), _share(run, name, when)
            if said is not None and share is not None and abs(said - share.value) > 1e-9:
                found.append(
                    f"summary.json gives {percent(said)} for “{told}” {when}, but the answers in test.json "
                    f"come to {percent(share.value)}, which is shown."
                )
    return found


def _paired(run: Run, name: str) -> McNemar | None:
    """The paired test by `name`, from the answers where they are stored, else from the summary; None if unknown."""
    pairs = _pairs(run)
    if pairs:
        correct = _correct(name)
        return McNemar.of([correct(before) for before, _ in pairs], [correct(after) for _, after in pairs])
    gained, lost = (find(run.summary, "mcnemar", name, key) for key in ("gained", "lost"))
    if not isinstance(gained, int) or not isinstance(lost, int):
        return None
    return McNemar(gained, lost, mcnemar_p(gained, lost))


def _correct(measure: str) -> Callable[[Record], bool]:
    if measure == "generated_accuracy":
        return lambda record: record.get("generated_correct") is True
    name = measure.removesuffix("_accuracy")
    return lambda record: record.get(name) is not None and record.get(name) == record.get("target")


def _pairs(run: Run) -> list[tuple[Record, Record]]:
    before, after = (find(run.test, when, "records") for when in ("before", "after"))
    if not _are_records(before) or not _are_records(after) or len(before) != len(after):
        return []
    return list(zip(before, after, strict=True))


def _are_records(values: object) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(value, dict) for value in values)


def _names(runs: Sequence[Run]) -> list[str]:
    """The names of the runs' folders, or their whole paths where two names are equal."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    return [str(run.path) for run in runs]


def _section(run: Run, title: str, examples: int) -> Section:
    tables = {"Test data, before and after": _results(run), "Answers to the test data": _answers(run)}
    tables |= {"Validation data, before and after": _validation(run)}
    further, damaged = elsewhere(run.path)
    tables |= further
    return Section(
        title=title,
        verdict=_verdict(run),
        missing=[*run.missing, *damaged, *_contradictions(run)],
        facts=_facts(run),
        tables={heading: table for heading, table in tables.items() if table is not None},
        leakage=_leakage(run),
        alarms=[alarm_sentence(record) for record in run.alarms],
        prompt=run.prompt.text if run.prompt is not None else "",
        panels=panels(run),
        heat=heat_map(run),
        tokens=_tokens(run),
        examples=_examples(run, examples),
        config=run.config_text,
        versions=_versions(run),
    )


def _verdict(run: Run) -> str:
    """The outcome in one or two sentences: the generated answers, and the likeliest label."""
    found = measured(run)
    return " ".join(map(_told, found[:2])) or "There are no test figures."


def _told(one: Measured) -> str:
    gain = 100 * (one.after.value - one.before.value)
    told = f"{one.name[:1].upper()}{one.name[1:]}: {percent(one.before.value)} before, {percent(one.after.value)} after"
    told += f" ({gain:+.1f} points"
    if one.test is None:
        return f"{told})."
    told += f"; {one.test.gained} gained, {one.test.lost} lost, p = {one.test.p:.2g})."
    changed = one.test.gained + one.test.lost
    return told + (" A difference like this may be chance." if changed and one.test.p >= 0.05 else "")


def _facts(run: Run) -> Table:
    summary = run.summary
    last = run.steps[-1]["step"] if run.steps else 0
    facts: list[tuple[str, object]] = [
        ("model", summary.get("model") or (run.prompt.model_name if run.prompt is not None else None)),
        ("task", summary.get("task")),
        ("ended", summary.get("stop_reason")),
        ("steps", summary.get("steps", last)),
        ("best prompt from step", run.best_step),
        ("prompt tokens", len(run.token_names) or summary.get("prompt_tokens")),
        ("training, validation, test examples", _sizes(run)),
        ("lowest similarity of the best prompt", _fixed(_lowest(run), 4)),
        ("weights unchanged", "yes, by their hash" if summary.get("weights_unchanged") is True else None),
        ("time in training", _seconds(number(summary.get("train_seconds")), run)),
        ("peak memory", _gigabytes(number(summary.get("peak_memory_bytes")))),
    ]
    return Table(["", ""], [[name, str(value)] for name, value in facts if value not in (None, NOTHING, "")])


def _sizes(run: Run) -> str:
    names = ("train_examples", "validation_examples", "test_examples")
    sizes = [run.summary.get(name) for name in names]
    return "" if not run.summary else ", ".join(NOTHING if size is None else str(size) for size in sizes)


def _lowest(run: Run) -> float | None:
    return min(token.similarity for token in run.tokens) if run.tokens else number(run.summary.get("min_similarity"))


def _seconds(seconds: float | None, run: Run) -> str:
    if seconds is None:
        seconds = sum(number(record.get("seconds")) or 0.0 for record in run.steps)
        return f"{seconds:.1f} s in steps" if seconds else NOTHING
    return f"{seconds:.1f} s"


def _gigabytes(size: float | None) -> str:
    return NOTHING if size is None else f"{size / 1e9:.2f} GB"


def _fixed(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:.{digits}f}"


def _results(run: Run) -> Table | None:
    rows = []
    for one in measured(run):
        paired = [NOTHING] * 3 if one.test is None else [f"{one.test.gained}", f"{one.test.lost}", f"{one.test.p:.2g}"]
        cells = [f"{share.told()}{', ' + share.counted if share.counted else ''}" for share in (one.before, one.after)]
        rows.append([one.name, *cells, *paired])
    if not rows:
        return None
    note = (
        "95 % Wilson intervals. Gained: wrong before, right after; lost: the other way round; p: McNemar's exact "
        "two-sided test of the two. “As generated” is mostly format where the prompt's first answers are not labels; "
        "the likeliest label is what the prompt knows."
    )
    grader = find(run.summary, "grader", "kind") or find(run.test, "after", "grader", "kind")
    if grader:
        note += f" Grader: {grader}."
    return Table(["measure", "before", "after", "gained", "lost", "p"], rows, note)


_STATISTICS: dict[str, tuple[str, Callable[[float], str]]] = {
    "answers": ("answers", lambda value: f"{value:.0f}"),
    "tokens": ("mean length, tokens", lambda value: f"{value:.1f}"),
    "invalid": ("invalid", percent),
    "truncated": ("cut off", percent),
    "loops": ("end in a loop", percent),
    "token_entropy": ("entropy per token", lambda value: f"{value:.3f}"),
    "distinct_1": ("different tokens (1-grams)", percent),
    "distinct_2": ("different pairs (2-grams)", percent),
    "answer_entropy": ("entropy of answers over that of targets", lambda value: f"{value:.3f}"),
    "trajectory_entropy": ("trajectory entropy (long answers)", lambda value: f"{value:.3f}"),
    "windowed_entropy": ("windowed entropy (long answers)", lambda value: f"{value:.3f}"),
}


def _answers(run: Run) -> Table | None:
    sources = [find(run.test, when, "statistics") or find(run.summary, "answers", when) for when in ("before", "after")]
    rows = []
    for key, (told, form) in _STATISTICS.items():
        values = [number(find(source, key)) for source in sources]
        if any(value is not None for value in values):
            rows.append([told, *(NOTHING if value is None else form(value) for value in values)])
    return Table(["", "before", "after"], rows) if rows else None


def _validation(run: Run) -> Table | None:
    first = next((record for record in run.validations if record["step"] == 0), None)
    best = next((record for record in run.validations if record["step"] == run.best_step), None)
    before, after = find(run.summary, "validation", "before") or first, find(run.summary, "validation", "after") or best
    rows = []
    for name in ("accuracy", "loss"):
        values = [number(find(source, name)) for source in (before, after)]
        if values[0] is not None:
            form = percent if name == "accuracy" else lambda value: f"{value:.4f}"
            rows.append([name, *(NOTHING if value is None else form(value) for value in values)])
    if not rows:
        return None
    gap, low, high = (number(find(best, name)) for name in ("gap", "gap_low", "gap_high"))
    if gap is not None and low is not None and high is not None:
        told = f"{100 * gap:+.1f} points [{100 * low:.1f}, {100 * high:.1f}]"
        rows.append(["training less validation accuracy", NOTHING, told])
    note = "The best prompt was chosen on these examples, so “after” flatters it; the test data had no say in it."
    return Table(["", "before", f"after (step {run.best_step})"], rows, note)


def _leakage(run: Run) -> str:
    values = run.summary.get("leakage")
    if not isinstance(values, Mapping):
        return "Nothing says whether the parts of the data share texts: the run holds no leakage check."
    try:
        sentence = Leakage(**{name: value for name, value in values.items() if name != "clean"}).sentence()
    except (TypeError, ValueError, AttributeError):
        return "The run's leakage check cannot be read."
    return f"{sentence[:1].upper()}{sentence[1:]}."


def _tokens(run: Run) -> Table | None:
    if not run.tokens:
        return None
    nearest = any(token.before or token.after for token in run.tokens)
    header = ["row", "token", "id", "similarity", "norm ratio"]
    header += ["nearest before", "cosine", "own rank", "nearest after", "cosine", "own rank"] if nearest else []
    rows = []
    for row, token in enumerate(run.tokens):
        cells = [str(row), token.text, str(token.id), f"{token.similarity:.4f}", f"{token.norm_ratio:.4f}"]
        for near in (token.before, token.after) if nearest else ():
            cells += [NOTHING] * 3 if near is None else [near[0], f"{near[1]:.4f}", str(near[2])]
        rows.append(cells)
    note = "Similarity and norm ratio: of the best prompt's row to the embedding that it started from (1 before)."
    if nearest:
        note += " Own rank: how near the row's own token is among the whole vocabulary; 1 is nearest."
    return Table(header, rows, note, (0, 1, 5, 8))


def _examples(run: Run, limit: int) -> list[Examples]:
    correct = _correct("generated_accuracy")
    found: dict[bool, list[Changed]] = {True: [], False: []}
    for before, after in _pairs(run):
        if correct(before) != correct(after):
            texts = [after.get("query"), after.get("target"), before.get("generated"), after.get("generated")]
            found[correct(after)].append(Changed(*map(_cut, texts)))
    titles = {True: "From wrong to right", False: "From right to wrong"}
    if not _pairs(run) or not limit:
        return []
    return [Examples(titles[gained], len(changed), changed[:limit]) for gained, changed in found.items()]


def _cut(value: object) -> str:
    text = value if isinstance(value, str) else f"token ids {value}"
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _versions(run: Run) -> Table | None:
    versions, machine, computing = (run.summary.get(name) for name in ("versions", "machine", "computing"))
    rows: list[list[str]] = []
    for name, values in (("", versions), ("machine: ", machine), ("computed with: ", computing)):
        if isinstance(values, Mapping):
            rows += [[f"{name}{key}".replace("_", " "), _plainly(value)] for key, value in values.items()]
    return Table(["", ""], rows) if rows else None


def _plainly(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plainly, value)) or "none"
    if isinstance(value, dict):
        return " ".join(map(_plainly, value.values()))
    return "not installed" if value is None else str(value)


def _comparison(runs: Sequence[Run], names: Sequence[str]) -> Table:
    """The comparison of several runs, with one column per run, because there are fewer runs than figures."""
    columns = [_compared(run) for run in runs]
    told = list(dict.fromkeys(name for column in columns for name in column))
    rows = [[name, *(column.get(name, NOTHING) for column in columns)] for name in told]
    note = "Each p compares one run's before and after; it says nothing about the difference between two runs."
    return Table(["", *names], rows, note)


def _compared(run: Run) -> dict[str, str]:
    last = run.steps[-1]["step"] if run.steps else 0
    column = {
        "model": str(run.summary.get("model") or (run.prompt.model_name if run.prompt is not None else NOTHING)),
        "ended": str(run.summary.get("stop_reason", "unfinished")),
        "steps": str(run.summary.get("steps", last)),
        "best prompt from step": NOTHING if run.best_step is None else str(run.best_step),
    }
    for one in measured(run):
        column[f"{one.name}: before"] = one.before.told()
        column[f"{one.name}: after"] = one.after.told()
        if one.test is not None:
            column[f"{one.name}: gained, lost, p"] = f"{one.test.gained}, {one.test.lost}, {one.test.p:.2g}"
    validation = _validation(run)
    for name, before, after in validation.rows[:2] if validation is not None else ():
        column |= {f"validation {name}: before": before, f"validation {name}: after": after}
    column["lowest similarity"] = _fixed(_lowest(run), 4)
    column["alarms"] = ", ".join(str(record.get("sign")) for record in run.alarms) or "none"
    column["time in training"] = _seconds(number(run.summary.get("train_seconds")), run)
    return column
