"""Causal judgement: would a typical person say that this caused that, or that it was done intentionally?

The task `causal_judgment` of BIG-bench (Srivastava et al., arXiv 2206.04615; 190 items) and its selection in BIG-Bench
Hard as `causal_judgement` (Suzgun et al., arXiv 2210.09261; 187 items). Two texts stand there twice with opposite
labels, and most items are variations of others: another question to the same story, or the story with one sentence
changed, often with the other label. The 190 items make 67 families (`embedgrad.splitting.families`); a family comes to
one side of a split, else half of the test items would be trained on but for a sentence.

In both variants the query is the bare story with its question: the instruction in front of it is the prompt's business,
and the options behind it are the labels. With so few items cross-validation (`data.folds`) is the way to measure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from embedgrad.data import text_field
from embedgrad.errors import DataError
from embedgrad.example import Example
from embedgrad.splitting import families
from embedgrad.tasks.source import HubSet, Source
from embedgrad.tasks.task import Pools, Task

LABELS = ("Yes", "No")
BIGBENCH = HubSet("tasksource/bigbench", ("train", "validation"), "causal_judgment")
BBH = HubSet("lukaemon/bbh", ("test",), "causal_judgement")
INSTRUCTION = "How would a typical person answer each of the following questions about causation?"
_OPTIONS = re.compile(r"\s*(?:\n\s*(?:Options:|choice:|A:)[\s\S]*)?\s*\Z")


def load(source: Source, variant: str | None = None) -> Pools:
    """Rows have `input` and `target`; those of the hub's BIG-bench `inputs` and a list `targets` of one text."""
    if variant == "bbh":
        rows = source.rows("causal_judgment/bbh.jsonl", BBH)
    else:
        rows = source.rows("causal_judgment/bigbench.jsonl", BIGBENCH)
    return Pools(train=[_example(where, row) for where, row in rows])


def _example(where: str, row: Mapping[str, Any]) -> Example:
    if "inputs" in row:
        targets = row.get("targets")
        row = {"input": row["inputs"], "target": targets[0] if isinstance(targets, list) and targets else None}
    target = text_field(row, "target", where).strip()
    if target not in LABELS:
        raise DataError(f"{where}: the field 'target' must be Yes or No, not {target!r}.")
    text = story(text_field(row, "input", where))
    if not text:
        raise DataError(f"{where}: the field 'input' holds no story.")
    return Example(text, target)


def story(text: str) -> str:
    """The story with its question, without the benchmark's instruction and options."""
    text = text.strip().removeprefix(INSTRUCTION).strip().removeprefix("Q:").lstrip(" ")
    return _OPTIONS.sub("", text).strip()


TASK = Task(
    name="causal_judgement",
    load=load,
    prompt="How would a typical person answer the question about causation? Answer with one word, Yes or No.",
    paraphrases=(
        "Read the story and answer the question as most people would. Reply with Yes or No only.",
        "Would a typical person say yes or no to the question at the end? Answer with one word, Yes or No.",
        "You judge causes and intentions as ordinary people do. Answer Yes or No.",
        "Answer the question about who or what caused the outcome, or meant it. One word: Yes or No.",
        "Think of what the average person would say. Answer only Yes or No.",
        "Causal judgement. Output: Yes or No.",
        "Decide the question by common sense and reply with a single word, Yes or No.",
    ),
    labels=LABELS,
    grouping=families,
    variants=("bigbench", "bbh"),
    sizes={"train": 100, "validation": 20, "test": 60},
    optimize={"steps": 50, "batch_size": 8, "learning_rate": 1e-3, "validate_every": 10},
)
