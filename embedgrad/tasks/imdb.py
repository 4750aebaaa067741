"""IMDB: is a movie review positive or negative?

Maas, Daly, Pham, Huang, Ng and Potts, "Learning Word Vectors for Sentiment Analysis", ACL 2011. Reviews are truncated
to their first `query_tokens` tokens, so that a small model reads them in acceptable time. This is not the original
benchmark, so every published figure should state the number (default: 120).
"""

from __future__ import annotations

from embedgrad.data.example import Example
from embedgrad.data.readers import text_field
from embedgrad.tasks.source import HubSet, Source
from embedgrad.tasks.task import Pools, Task
from embedgrad.util.errors import DataError

LABELS = ("negative", "positive")
REPOSITORY = "stanfordnlp/imdb"


def load(source: Source, variant: str | None = None) -> Pools:
    """The training and test reviews. Raises DataError.

    A data row has the fields `text` and `label`: 0 (negative) or 1 (positive).
    """
    return Pools(train=_part(source, "train"), test=_part(source, "test"))


def _part(source: Source, name: str) -> list[Example]:
    examples = []
    for where, row in source.rows(f"imdb/{name}.jsonl", HubSet(REPOSITORY, (name,))):
        label = row.get("label")
        if isinstance(label, bool) or label not in (0, 1):
            raise DataError(f"{where}: the field 'label' must be 0 or 1, not {label!r}.")
        examples.append(Example(text_field(row, "text", where), LABELS[int(label)], where=where))
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
