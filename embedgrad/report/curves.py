"""The pictures of a report as numbers: lines, levels and marks. `figures` and `pictures` draw them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from embedgrad.report.read import Record, Run, find, number
from embedgrad.train.alarms import Alarm

COLUMNS = 240  # largest number of steps in a heat map; of a longer run, evenly spaced steps are shown
COLOURS = (
    "#3b82c4",
    "#d9822b",
    "#2a9d7f",
    "#c7508a",
    "#8b6fc8",
    "#7d8794",
    "#b59a1f",
    "#4aa7bd",
)  # legible in the light and in the dark theme


@dataclass(frozen=True)
class Line:
    """A quantity over steps.

    colour: index into COLOURS. points: draw the points as well as the line. dashed, faint: style of the line. error:
    (lower, upper) ends of an interval at each point.
    """

    name: str
    steps: list[int]
    values: list[float]
    colour: int = 0
    points: bool = False
    dashed: bool = False
    faint: bool = False
    error: tuple[list[float], list[float]] | None = None


@dataclass(frozen=True)
class Level:
    """A threshold, drawn as a horizontal line with a name."""

    name: str
    value: float


@dataclass(frozen=True)
class Mark:
    """An alarm after a step. value: its value if a curve of this picture shows it, else None. text: its sentence."""

    step: int
    value: float | None
    text: str


@dataclass(frozen=True)
class Panel:
    """A picture of curves.

    axis, across: labels of the y and the x axis. band: indices of two lines between which the area is filled. percent:
    the values are shares. note: explanation for readers.
    """

    key: str
    title: str
    axis: str
    lines: list[Line]
    levels: list[Level] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    band: tuple[int, int] | None = None
    percent: bool = False
    note: str = ""
    across: str = "step"


@dataclass(frozen=True)
class HeatMap:
    """Similarity of each prompt token (row of the map) after each of `steps` (column)."""

    key: str
    title: str
    steps: list[int]
    rows: list[str]
    values: list[list[float]]
    note: str = ""


def panels(run: Run) -> list[Panel]:
    """The pictures of one run. Pictures without points are left out."""
    marks = _marks(run)
    threshold = {
        sign: number(run.setting("optimize", "monitors", sign, "threshold"))
        for sign in ("similarity", "gap", "collapse")
    }
    drawn = [
        Panel(
            "loss", "Loss", "loss in nats per target token",
            [
                _line("training batch", run.steps, "loss", faint=True),
                _line("validation", run.validations, "loss", colour=1, points=True),
            ],
            marks=_of(marks, None),
            note="A training point is the loss of one batch, just before its step.",
        ),
        Panel(
            "accuracy", "Accuracy", "share that is right",
            [
                _line("training batch", run.steps, "accuracy", colour=5, faint=True),
                _line("training", run.validations, "train_accuracy", points=True),
                _line("validation", run.validations, "accuracy", colour=1, points=True),
                _gap(run),
            ],
            levels=_level(threshold["gap"], "alarm: gap"),
            marks=_of(marks, "gap"),
            percent=True,
            note="The gap is training less validation accuracy, with its 95 % interval.",
        ),
        Panel(
            "similarity", "Similarity to the start", "cosine",
            [_line("mean", run.steps, "similarity_mean"), _line("lowest token", run.steps, "similarity_min", colour=1)],
            levels=[*_tau(run), *_level(threshold["similarity"] or 0.90, "alarm")],
            marks=_of(marks, "similarity"),
            band=(0, 1),
            note="Cosine of each prompt token with the embedding it started from: the lowest, and the mean of all.",
        ),
        Panel(
            "entropy", "Entropies of answers", "entropy",
            [
                _line("collapse sign", run.validations, "answers", "collapse", colour=1, points=True),
                _line("answers / targets", run.validations, "answers", "answer_entropy", points=True, dashed=True),
                _line("per token", run.validations, "answers", "token_entropy", colour=2, points=True),
                _line("trajectory", run.validations, "answers", "trajectory_entropy", colour=4, points=True),
                _line("windowed", run.validations, "answers", "windowed_entropy", colour=3, points=True, dashed=True),
            ],
            levels=_level(threshold["collapse"] or 0.05, "alarm"),
            marks=_of(marks, "collapse"),
            note="Of generated answers to some validation examples. The collapse sign is the windowed entropy where "
            "answers are long, else the answers' entropy over that of the targets.",
        ),
    ]  # fmt: skip
    return [kept for panel in drawn if (kept := _without_empty(panel)) is not None]


def heat_map(run: Run) -> HeatMap | None:
    """The similarity of each token over the steps; None where no step has recorded it."""
    width = len(run.token_names)
    rows = [record for record in run.steps if len(_numbers(record.get("similarity"))) == width]
    if not rows or not width:
        return None
    note = "Yellow has kept its direction; dark has moved most."
    if len(rows) > COLUMNS:
        note += f" Of {len(rows)} steps {COLUMNS} are shown, evenly spread."
        rows = [rows[(i * (len(rows) - 1)) // (COLUMNS - 1)] for i in range(COLUMNS)]
    columns = [_numbers(record["similarity"]) for record in rows]
    return HeatMap(
        "tokens", "Similarity per token", [record["step"] for record in rows],
        [f"{row} {name}" for row, name in enumerate(run.token_names)],
        [[column[row] for column in columns] for row in range(width)], note,
    )  # fmt: skip


def overlays(runs: Sequence[Run], names: Sequence[str]) -> list[Panel]:
    """The pictures that show curves of all runs together."""

    def each(kind: str, key: str, **style: bool) -> list[Line]:
        return [
            _line(n, getattr(r, kind), key, colour=i, dashed=i // len(COLOURS) % 2 == 1, **style)
            for i, (r, n) in enumerate(zip(runs, names, strict=True))
        ]

    drawn = [
        Panel("loss", "Training loss", "loss in nats per target token", each("steps", "loss")),
        Panel("validation-loss", "Validation loss", "loss in nats per target token",
              each("validations", "loss", points=True)),
        Panel("accuracy", "Validation accuracy", "share that is right", each("validations", "accuracy", points=True),
              percent=True),
        Panel("similarity", "Lowest similarity to the start", "cosine", each("steps", "similarity_min"),
              levels=[Level("alarm", 0.90)]),
    ]  # fmt: skip
    return [kept for panel in drawn if (kept := _without_empty(panel)) is not None]


def alarm_sentence(record: Record) -> str:
    """An alarm's record as a sentence. An unknown alarm gives a sentence with its values."""
    try:
        alarm = Alarm(**{key: record[key] for key in ("sign", "step", "value", "threshold", "action")})
        sentence = alarm.sentence()
        return f"{sentence[:1].upper()}{sentence[1:]} Action: {alarm.action}."
    except (KeyError, TypeError, ValueError):
        return f"Alarm after step {record['step']}: {record.get('sign')} is {record.get('value')}."


def _line(
    name: str, records: Sequence[Record], *keys: str, colour: int = 0, points: bool = False, dashed: bool = False,
    faint: bool = False,
) -> Line:  # fmt: skip
    found = [(record["step"], value) for record in records if (value := number(find(record, *keys))) is not None]
    return Line(name, [s for s, _ in found], [v for _, v in found], colour, points, dashed, faint)


def _gap(run: Run) -> Line:
    found = []
    for record in run.validations:
        gap, low, high = (number(record.get(name)) for name in ("gap", "gap_low", "gap_high"))
        if gap is not None and low is not None and high is not None:
            found.append((record["step"], gap, low, high))
    error = ([low for *_, low, _ in found], [high for *_, high in found])
    return Line("gap", [s for s, *_ in found], [g for _, g, *_ in found], 3, points=True, dashed=True, error=error)


def _level(value: float | None, name: str) -> list[Level]:
    return [] if value is None else [Level(f"{name} {value:g}", value)]


def _tau(run: Run) -> list[Level]:
    region = run.setting("optimize", "trust_region")
    return _level(number(find(region, "tau")), "τ") if isinstance(region, dict) else []


def _marks(run: Run) -> list[tuple[str, Mark]]:
    return [
        (str(record.get("sign")), Mark(record["step"], number(record.get("value")), alarm_sentence(record)))
        for record in run.alarms
    ]


def _of(marks: Sequence[tuple[str, Mark]], own: str | None) -> list[Mark]:
    """All alarms as marks. Only alarms of the sign `own`, whose curve is in the picture, have a value."""
    return [mark if sign == own else Mark(mark.step, None, mark.text) for sign, mark in marks]


def _without_empty(panel: Panel) -> Panel | None:
    lines = [line for line in panel.lines if line.steps]
    if not lines:
        return None
    band = panel.band if len(lines) == len(panel.lines) else None
    return Panel(panel.key, panel.title, panel.axis, lines, panel.levels, panel.marks, band, panel.percent, panel.note)


def _numbers(values: object) -> list[float]:
    """`values` if it is a list of finite numbers, else an empty list."""
    found = [number(value) for value in values] if isinstance(values, list) else []
    return [value for value in found if value is not None] if None not in found else []
