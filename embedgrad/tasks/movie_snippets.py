"""Movie-review snippets with human sentiment ratings: 10,605 sentences, each rated from -4 to +4 by several people.

C. J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text",
ICWSM 2014 (MIT licence). The data are part of the source distribution of the PyPI package vaderSentiment 0.5. The
archive is downloaded and read; it is never installed.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

from embedgrad.data.example import Example
from embedgrad.tasks import pypi
from embedgrad.tasks.source import Source
from embedgrad.tasks.task import Pools, Task
from embedgrad.util.errors import DataError

PACKAGE = "vaderSentiment==0.5"
ARCHIVE = "vaderSentiment-0.5.zip"
SHA256 = "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a"
INNER = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
TABLE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"

LABELS = ("positive", "negative")
PROMPT = "Classify the sentiment of the movie review. Answer with one word, positive or negative."


def load(cache: Path | None = None, *, least_rating: float = 1.0) -> list[Example]:
    """The snippets whose mean rating is at least `least_rating` away from 0. The sign of the rating is the label.

    cache: folder with the archive, which is downloaded where it is missing; None: the default cache. Raises DataError
    where the download fails or the archive is not the published one.
    """
    cache = pypi.cache_folder() if cache is None else cache
    text = _table(pypi.archive(PACKAGE, ARCHIVE, SHA256, cache, source=True))
    examples = []
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{ARCHIVE}, {TABLE}, line {number}"
        try:
            _, rating_text, snippet = line.split("\t", 2)
            rating = float(rating_text)
        except ValueError:
            raise DataError(f"{where}: not a number, a rating and a text.") from None
        if abs(rating) >= least_rating and snippet.strip():
            examples.append(Example(snippet.strip(), LABELS[0] if rating > 0 else LABELS[1], where=where))
    return examples


def _table(archive: Path) -> str:
    with zipfile.ZipFile(archive) as outer, tarfile.open(fileobj=io.BytesIO(outer.read(INNER))) as inner:
        member = inner.extractfile(TABLE)
        if member is None:
            raise DataError(f"{archive} holds no {TABLE}.")
        return member.read().decode("utf-8")


def _load(source: Source, variant: str | None = None) -> Pools:
    """The snippets as pools. `source` is not used, because the data come from PyPI."""
    return Pools(train=load())


TASK = Task(
    name="movie-snippets",
    load=_load,
    prompt=PROMPT,
    paraphrases=(
        "Is this snippet of a movie review positive or negative? Reply with exactly one word: positive or negative.",
        "You label movie reviews. Say positive if the reviewer liked the film and negative if not. One word only.",
        "Decide whether the following text praises or criticises the film. Answer positive or negative.",
        "Sentiment analysis. Output: positive or negative.",
        "Read the snippet and name its sentiment with a single lowercase word, positive or negative.",
        "Did the author enjoy the movie? Answer positive for yes, negative for no.",
        "Classify the text. The only allowed answers are the words positive and negative.",
    ),
    labels=LABELS,
    sizes={"train": 2000, "validation": 100, "test": 500},
    optimize={"steps": 45, "batch_size": 16, "learning_rate": 3e-3, "validate_every": 45},
)
