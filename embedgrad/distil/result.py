"""What a distillation came to, as JSON values, as a table, and in words that follow from the numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from embedgrad.distil.distil import ORIGINAL, SOFT, Distillation
from embedgrad.evaluation.evaluate import MEASURES
from embedgrad.evaluation.paired import gain, surviving_share
from embedgrad.evaluation.statistics import Accuracy, in_percent, in_points

FILE = "distil.json"
SHOWN = 12  # texts in a table
Values = dict[str, Any]
Verdicts = Mapping[str, Sequence[bool]]


def result(done: Distillation) -> Values:
    """All figures of a distillation. "texts" has every text that was scored, the best first.

    Accuracies are {value, low, high, correct, total}; "share" is the share of the soft prompt's gain that a text keeps,
    {measure: {value, low, high}}, on the test data where there are any, else on the validation data; a measure is
    missing where the gain itself is not known to be positive. "perplexity" is exp of the nll per token of
    `search.objective`.
    """
    ledger, original = done.ledger, done.prompt.text
    validation = {text: one["correct"] for text, one in ledger.scores.items() if "correct" in one}
    test = ledger.tests
    gains = {
        name: {measure: asdict(gain(part[original][measure], part[SOFT][measure])) for measure in part[SOFT]}
        for name, part in (("validation", validation), ("test", test))
        if SOFT in part and original in part
    }
    texts = [_text(done, text, validation, test) for text in done.best()]
    return {
        "model": done.model.name,
        "judge": None if done.judge is None else done.judge.name,
        "original": original,
        "validation_items": len(done.parts.validation),
        "test_items": len(done.parts.test),
        "soft": {"validation": _shares(validation.get(SOFT, {})), "test": _shares(test.get(SOFT, {}))},
        "gain": gains,
        "texts": texts,
        "budget": done.budget,
        "spent": ledger.spent,
        "warnings": [*_warnings(gains), *done.notes],
        "unusable": sum("correct" not in one for one in ledger.scores.values()),
    }


def _text(done: Distillation, text: str, validation: Mapping[str, Verdicts], test: Mapping[str, Verdicts]) -> Values:
    score, original = done.ledger.scores[text], done.prompt.text
    part = test if text in test else {} if test else validation
    shares = {}
    for measure in part[text] if part else ():
        share = surviving_share(part[original][measure], part[SOFT][measure], part[text][measure])
        if share is not None:
            shares[measure] = asdict(share)
    found: Values = {
        "text": text, "source": ORIGINAL if text == original else score["source"], "tokens": score["tokens"],
        "perplexity": None if score["nll"] is None else math.exp(min(score["nll"], 700.0)),
        "validation": _shares(score["correct"]), "test": _shares(test.get(text, {})), "share": shares,
    }  # fmt: skip
    if text in done.judged:
        verdicts = done.judged[text]
        known = [one for one in verdicts if one is not None]
        first = done.judged[original]
        both = [(a, b) for a, b in zip(first, verdicts, strict=True) if a is not None and b is not None]
        found["judge"] = {
            "accuracy": asdict(Accuracy.of(known)) if known else None,
            "unanswered": len(verdicts) - len(known),
            "gain": asdict(gain([a for a, _ in both], [b for _, b in both])) if both else None,
        }
    return found


def _shares(correct: Verdicts) -> Values:
    return {measure: asdict(Accuracy.of(list(verdicts))) for measure, verdicts in correct.items()}


def _warnings(gains: Mapping[str, Mapping[str, Values]]) -> list[str]:
    """For each part of the data, a sentence where the soft prompt's own gain is not known to be positive."""
    told = []
    for part, by_measure in gains.items():
        within = [f"{MEASURES[m]} ({in_points(one)})" for m, one in by_measure.items() if one["low"] <= 0]
        if within:
            told.append(
                f"The interval of the soft prompt's own gain on the {part} items is not above 0 by "
                f"{', by '.join(within)}: there may be nothing to distil, and no share of that gain is given."
            )
    return told


def early_warning(done: Distillation) -> list[str]:
    """`_warnings` on the validation data, as soon as the soft prompt and the original text are measured there."""
    scores = done.ledger.scores
    if not all("correct" in scores.get(text, {}) for text in (SOFT, done.prompt.text)):
        return []
    before, after = scores[done.prompt.text]["correct"], scores[SOFT]["correct"]
    return _warnings({"validation": {measure: asdict(gain(before[measure], after[measure])) for measure in after}})


def header(found: Values) -> list[str]:
    """The headings of `rows`."""
    return [
        "source", *[f"{part}: {MEASURES[m]}" for part in ("validation", "test") for m in _measures(found)],
        *([f"judge: {found['judge']}"] if found["judge"] else []), "share of the gain kept", "tokens", "perplexity",
    ]  # fmt: skip


def rows(found: Values) -> list[list[str]]:
    """The table of the soft prompt and the best texts, as cells of text; the texts themselves stand below it."""
    judged = ["–"] if found["judge"] else []
    whole = "100 %" if any("generated_accuracy" in one["share"] for one in found["texts"]) else "–"
    table = [["the soft prompt", *_cells(found, found["soft"]), *judged, whole, "–", "–"]]
    for number, one in enumerate(listed(found), 1):
        judged = [_judged(one.get("judge"))] if found["judge"] else []
        share = one["share"].get("generated_accuracy")
        told = "–" if share is None else in_percent(share)
        perplexity = "–" if one["perplexity"] is None else f"{one['perplexity']:,.0f}"
        table.append([f"{number}. {one['source']}", *_cells(found, one), *judged, told, str(one["tokens"]), perplexity])
    return table


def listed(found: Values) -> list[Values]:
    """The texts of the table: the best ones, and the original text."""
    best = found["texts"][:SHOWN]
    return best + [one for one in found["texts"][SHOWN:] if one["text"] == found["original"]]


def _measures(found: Values) -> list[str]:
    return [m for m in ("generated_accuracy", "choice_accuracy") if m in found["soft"]["validation"]]


def _cells(found: Values, one: Values) -> list[str]:
    return [
        in_percent(one[part][m]) if m in one[part] else "–" for part in ("validation", "test") for m in _measures(found)
    ]


def _judged(judge: Values | None) -> str:
    if judge is None or judge["accuracy"] is None:
        return "–"
    return in_percent(judge["accuracy"]) + (f", {judge['unanswered']} unanswered" if judge["unanswered"] else "")


def paragraph(found: Values) -> str:
    """What came out, in words."""
    part = "test" if found["test_items"] else "validation"
    tried = len(found["texts"])
    candidates = [one for one in found["texts"] if one["text"] != found["original"] and one[part]]
    gains = found["gain"].get(part, {}).get("generated_accuracy")
    told = f"{tried} texts were scored on {found['validation_items']} validation items. "
    if gains is None or not candidates:
        return told + "No candidate was measured."
    items = f"{found[part + '_items']} {part} items"
    told += f"By the answer as generated, the soft prompt gains {in_points(gains)} on the {items}. "
    best = candidates[0]
    share = best["share"].get("generated_accuracy")
    accuracy = in_percent(best[part]["generated_accuracy"])
    if share is None:
        told += f"The best text has {accuracy}; what it keeps of a gain that is not known cannot be said."
    elif share["low"] > 0:
        told += f"The best text has {accuracy} and keeps {in_percent(share)} of the gain."
    else:
        told += f"The best text has {accuracy}; that it keeps anything of the gain is not shown ({in_percent(share)})."
    if part == "validation":
        told += " The text was chosen on the same items, so that this is too favourable."
    return told


def markdown(found: Values) -> str:
    """The page distil.md."""
    head = header(found)
    lines = ["# Distillation", "", paragraph(found), ""]
    lines += [f"> {warning}\n" for warning in found["warnings"]]
    lines += ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows(found)]
    lines += [
        "",
        "Shares with 95 % intervals: Wilson for accuracies, bootstrap over items for the share of the gain.",
        "",
    ]
    for number, one in enumerate(listed(found), 1):
        lines += [f"{number}. {one['source']}", "", *(f"    {line}" for line in one["text"].splitlines()), ""]
    spent = ", ".join(f"{name} {count:,}" for name, count in found["spent"].items())
    lines += [f"Budget: {found['budget']:,} tokens; spent: {spent}."]
    return "\n".join(lines) + "\n"
