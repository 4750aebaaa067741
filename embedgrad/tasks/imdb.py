"""IMDB: is a movie review positive or negative?

Maas, Daly, Pham, Huang, Ng and Potts, "Learning Word Vectors for Sentiment Analysis", ACL 2011. Reviews are cut after
`query_tokens` tokens of the model, which every figure should state: the text of the first 120 tokens is what a small
model reads in a bearable time, and not the whole benchmark.
"""

from __future__ import annotations

from embedgrad.data import text_field
from embedgrad.errors import DataError
from embedgrad.example import Example
from embedgrad.tasks.source import HubSet, Source
from embedgrad.tasks.task import Pools, Task

LABELS = ("negative", "positive")
REPOSITORY = "stanfordnlp/imdb"


def load(source: Source, variant: str | None = None) -> Pools:
    """Rows have `text`, and `label` 0 (negative) or 1 (positive)."""
    return Pools(train=_part(source, "train"), test=_part(source, "test"))


def _part(source: Source, name: str) -> list[Example]:
    examples = []
    for where, row in source.rows(f"imdb/{name}.jsonl", HubSet(REPOSITORY, (name,))):
        label = row.get("label")
        if isinstance(label, bool) or label not in (0, 1):
            raise DataError(f"{where}: the field 'label' must be 0 or 1, not {label!r}.")
        examples.append(Example(text_field(row, "text", where), LABELS[int(label)]))
    return examples


TASK = Task(
    name="imdb",
    load=load,
    prompt="Classify the sentiment of the movie review. Answer with one word, positive or negative.",
    paraphrases=(
        "Is this movie review positive or negative? Reply with exactly one word: positive or negative.",
        "You label movie reviews. Say positive if the reviewer liked the film and negative if not. One word only.",
        "Decide whether the following review praises or criticises the film. Answer positive or negative.",
        "Sentiment analysis. Output: positive or negative.",
        "Read the review and name its overall sentiment with a single lowercase word, positive or negative.",
        "Did the author of this review enjoy the movie? Answer positive for yes, negative for no.",
        "Classify the text. The only allowed answers are the words positive and negative.",
    ),
    labels=LABELS,
    sizes={"train": 2000, "validation": 100, "test": 500},
    query_tokens=120,
    optimize={"steps": 50, "batch_size": 8, "learning_rate": 3e-3, "validate_every": 25},
)
