"""Causal judgement: would a typical person say that this caused that, or that it was done intentionally?

The data are the task `causal_judgment` of BIG-bench (Srivastava et al., arXiv 2206.04615; 190 items) and its selection
in BIG-Bench Hard, `causal_judgement` (Suzgun et al., arXiv 2210.09261; 187 items). Two texts occur twice with opposite
labels. Most items are variations of others: another question about the same story, or the story with one sentence
changed, often with the other label. The 190 items form 67 families (`embedgrad.data.splitting.families`). A family goes
to one part of a split; otherwise half of the test items would occur in the training data except for one sentence.

In both variants the query is the story with its question. The benchmark's instruction before the story is removed,
because the prompt gives the instruction. The options after the story are removed, because they are the labels. With so
few items, measure with cross-validation (`data.folds`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from embedgrad.data.example import Example
from embedgrad.data.readers import text_field
from embedgrad.data.splitting import families
from embedgrad.tasks.source import HubSet, Source
from embedgrad.tasks.task import Pools, Task
from embedgrad.util.errors import DataError

LABELS = ("Yes", "No")
BIGBENCH = HubSet("tasksource/bigbench", ("train", "validation"), "causal_judgment")
BBH = HubSet("lukaemon/bbh", ("test",), "causal_judgement")
INSTRUCTION = "How would a typical person answer each of the following questions about causation?"
_OPTIONS = re.compile(r"\s*(?:\n\s*(?:Options:|choice:|A:)[\s\S]*)?\s*\Z")


def load(source: Source, variant: str | None = None) -> Pools:
    """The items of the variant "bigbench" (default) or "bbh". Raises DataError.

    A data row has the fields `input` and `target`; the hub's BIG-bench has `inputs` and a list `targets` of one text.
    """
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
    return Example(text, target, where=where)


def story(text: str) -> str:
    """The story with its question, without the benchmark's instruction and its options."""
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
